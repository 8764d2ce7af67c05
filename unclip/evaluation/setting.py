"""What a model is measured on: pictures, the networks that look at them, and what was asked.

N pictures, K names, D CLIP embedding, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import check_same_encoder
from unclip.data.kept import cache_folder
from unclip.data.open import open_dataset
from unclip.data.sample import Dataset, fixed
from unclip.errors import CheckpointError, ConfigError, DataError
from unclip.evaluation.drawings import Kept
from unclip.evaluation.features import Remembered, clip_features, open_features
from unclip.evaluation.subjects import EMOJI_WORDING, Subjects, Wording, caption_of, read_subjects
from unclip.images import to_pil, to_tensor, to_uint8
from unclip.options import Options
from unclip.pipeline import UnCLIP
from unclip.randomness import permutation
from unclip.stages.kinds import KINDS

REFERENCES = 20_000  # training pictures that are looked at
DISTRIBUTION = 4_000  # of them, those that stand for the distribution
LEAST, LEAST_HELD_OUT = 16, 4
OWN = "own"


@dataclass(frozen=True)
class Request:
    """What to measure a model on. `captions` is a pattern (`Wording`), `judge` a CLIP that took no
    part in sampling, `options` those of a pipeline's call; at most `limit` captions a group,
    `seeds` pictures of each name alone."""

    data: str = "emoji"
    held_out: str | None = None
    captions: str | None = None
    judge: str | None = None
    features: Sequence[str] = ("efficientnet-lite0", "efficientnet-lite2")
    limit: int = 96
    seeds: int = 4
    upscaled: int = 24
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, for calls that each have a use for some of them; `prior`
        apart, which calls with embeddings don't take."""
        given = {k: v for k, v in self.options.items() if v is not None and k != "prior"}
        return {"options": Options(elsewhere=tuple(KINDS)), **given}

    @property
    def wording(self) -> Wording:
        """How captions are worded, if not said then as the data set is known to."""
        known = EMOJI_WORDING if self.data.startswith("emoji") else "{name}"
        return Wording(self.captions or known)

    @property
    def held(self) -> str | None:
        """The held-out data, if not said then the part that a built-in set has."""
        built_in = self.data in ("emoji", "emoji-vector", "shapes")
        return self.held_out or (f"{self.data}:val" if built_in else None)


@dataclass(frozen=True)
class Setting:
    """A model, and everything that it is measured with; what was seen in pictures is by `eyes`."""

    pipe: UnCLIP
    model: str
    request: Request
    judges: Mapping[str, FrozenCLIP]
    eyes: Mapping[str, Remembered]
    train: Subjects
    held: Subjects | None
    kept: Kept

    @property
    def options(self) -> dict[str, Any]:
        """Of a pipeline's call, as `Request.given`."""
        return self.request.given

    @property
    def prior(self) -> str | None:
        """What stands between text and decoder, if that was said."""
        return self.request.options.get("prior")

    @property
    def measured(self) -> int:
        """How many captions are: held-out ones, or where there are none at most half of the data's,
        since the others say what real pictures are like."""
        least = len(self.train) // 2 if self.held is None else len(self.held)
        return min(self.request.limit, least)

    @property
    def names(self) -> list[str]:
        """All names that there are."""
        held = () if self.held is None else self.held.names
        return list(dict.fromkeys([*self.train.names, *held]))

    @property
    def side(self) -> int:
        """Of the decoder's pictures."""
        assert self.pipe.decoder is not None
        return self.pipe.decoder.side

    @property
    def judge(self) -> str:
        """Who names pictures: the judge, or where there is none the stack's own encoder."""
        return "judge" if "judge" in self.judges else OWN

    @property
    def judge_in_words(self) -> str:
        """The same, for tables."""
        return "the stack's own CLIP" if self.judge == OWN else "the judge"

    def names_as_read_by(self, judge: str) -> Tensor:
        """Text embeddings of all names, without a style. **Shapes**: → (K, D)."""
        texts = [self.request.wording.plain(name) for name in self.names]
        parts = [texts[k : k + 256] for k in range(0, len(texts), 256)]
        return torch.cat([self.judges[judge].encode_text(p).embed for p in parts]).float().cpu()

    def look(self, eye: str, images: Sequence[Image.Image]) -> Tensor:
        """**Shapes**: N pictures → (N, F)."""
        parts = [images[k : k + 64] for k in range(0, len(images), 64)]
        see = self.eyes[eye]
        return torch.cat([see(to_uint8(torch.stack([to_tensor(x) for x in p]))) for p in parts])


@contextmanager
def set_up(pipe: UnCLIP, model: str, request: Request, work: Path) -> Iterator[Setting]:
    """Look at the data. Pictures are kept under `work` by `model`, a hash of the weights, by what
    else draws them, and by what the data say and show.

    **Raises**: `ConfigError` for a judge or a feature network that took part in sampling or is not
    installed, `DataError` for data that can't be measured on, `CheckpointError` for a model without
    decoder or CLIP.
    """
    if pipe.decoder is None or pipe.clip is None:
        missing = "decoder" if pipe.decoder is None else "CLIP encoder"
        raise CheckpointError(f"this model has no {missing}, which evaluation needs")
    sampling = {stage.name: stage.sampling.model_dump() for stage in pipe.stages}
    asked = asdict(request) | {"limit": 0, "features": [], "judge": ""}
    settings = [model, str(pipe.dtype), pipe.prior_candidates, sampling, asked]
    digest = hashlib.sha256(json.dumps(settings).encode())  # what changes no picture is 0
    with ExitStack() as stack:
        judges = _judges(pipe, request)
        eyes = _open_eyes(pipe, request, judges, stack)
        side, wording = pipe.decoder.side, request.wording
        train = read_subjects(request.data, side, wording, eyes, REFERENCES, LEAST)
        held = None
        if request.held is not None:
            held = read_subjects(request.held, side, wording, eyes, REFERENCES, LEAST_HELD_OUT)
        for subjects in (train,) if held is None else (train, held):
            digest.update(json.dumps(subjects.captions).encode())
            known = subjects.seen.get(OWN)
            shown = subjects.pictures(range(LEAST_HELD_OUT)) if known is None else known
            digest.update(shown.numpy().tobytes())
        kept = Kept(work / digest.hexdigest()[:12])
        yield Setting(pipe, model, request, judges, eyes, train, held, kept)


def _judges(pipe: UnCLIP, request: Request) -> dict[str, FrozenCLIP]:
    """The stack's own encoder, which grades its own work, and the judge."""
    judges = {} if pipe.clip is None or not pipe.clip.has_images else {OWN: pipe.clip}
    if request.judge is not None:
        judges["judge"] = FrozenCLIP.load(request.judge, pipe.device)
    return judges


def _open_eyes(
    pipe: UnCLIP, request: Request, judges: Mapping[str, FrozenCLIP], stack: ExitStack
) -> dict[str, Remembered]:
    """The feature networks and the judges, by name; none but "own" may be the stack's encoder."""
    networks = {name: open_features(name, pipe.device) for name in request.features}
    networks |= {name: clip_features(clip) for name, clip in judges.items()}
    for name, network in networks.items():
        encoder = network.encoder
        if name != OWN and encoder is not None and pipe.encoder is not None:
            try:
                check_same_encoder(pipe.encoder, encoder, name)
            except CheckpointError:
                continue  # another one, as it should be
            raise ConfigError(f"{name}: this is the CLIP that the model samples with")
    folder = cache_folder("features")
    return {name: stack.enter_context(Remembered(x, folder)) for name, x in networks.items()}


@dataclass(frozen=True)
class Pairs:
    """Some of a data set's captions with their pictures, at the decoder's size, and these's
    embeddings; `numbers` are those of the pictures there.

    **Shapes**: z_image (N, D) raw.
    """

    numbers: list[int]
    captions: list[str]
    pictures: list[Image.Image]
    z_image: Tensor


def read_pairs(pipe: UnCLIP, request: Request) -> Pairs:
    """The first held-out pictures in a fixed shuffled order, or the first of all.

    **Raises**: `CheckpointError` without decoder or encoder, `DataError` for fewer than four.
    """
    side, spec = pipe.need("decoder", "experiments").side, request.held or request.data
    dataset = open_dataset(spec, side)
    if len(dataset) < LEAST_HELD_OUT:
        raise DataError(f"{spec} holds {len(dataset)} pictures; {LEAST_HELD_OUT} are needed")
    return pairs_of(pipe, dataset, request.limit)


def pairs_of(pipe: UnCLIP, dataset: Dataset, count: int) -> Pairs:
    """The first `count` of a data set in a fixed shuffled order."""
    order = permutation(0, 0, len(dataset))[:count].tolist()
    samples = [fixed(dataset, k) for k in order]
    captions = [caption_of(dataset, k, s) for k, s in zip(order, samples, strict=True)]
    pictures = [to_pil(sample.image) for sample in samples]
    return Pairs(order, captions, pictures, pipe.encode_image(pictures).float())
