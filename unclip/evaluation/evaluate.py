"""A model measured stage by stage against the pictures of a data set.

N captions of a group, M training pictures, F features, D CLIP embedding, S samples a caption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import check_same_encoder
from unclip.data.kept import cache_folder
from unclip.errors import CheckpointError, ConfigError
from unclip.evaluation import measures
from unclip.evaluation.drawings import Group, Kept, drawers
from unclip.evaluation.features import Remembered, clip_features, open_features
from unclip.evaluation.prior import prior_draws
from unclip.evaluation.scores import agreement, coinciding, hit_rates, ranks
from unclip.evaluation.subjects import EMOJI_WORDING, Subjects, Wording, read_subjects
from unclip.evaluation.upscaling import upscaling
from unclip.images import to_tensor, to_uint8
from unclip.pipeline import UnCLIP

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
class Evaluation:
    """`scores` is what the JSON file holds; pictures by group and row are for the page."""

    scores: dict[str, Any]
    groups: list[Group]
    pictures: dict[str, dict[str, list[Image.Image]]]
    upscaled: dict[str, list[Image.Image]]


def evaluate(pipe: UnCLIP, model: str, request: Request, work: Path) -> Evaluation:
    """Draw what is measured (kept under `work` by `model`, a hash of the weights) and measure it.

    **Raises**: `ConfigError` for a judge or a feature network that took part in sampling or is not
    installed, `DataError` for data that can't be measured on, `CheckpointError` for a model without
    decoder or CLIP.
    """
    if pipe.decoder is None or pipe.clip is None:
        missing = "decoder" if pipe.decoder is None else "CLIP encoder"
        raise CheckpointError(f"this model has no {missing}, which evaluation needs")
    options = {k: v for k, v in request.options.items() if v is not None}
    settings = [model, str(pipe.dtype), asdict(request) | {"limit": 0, "features": [], "judge": ""}]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()  # what changes no picture: 0
    kept = Kept(work / digest[:12])
    with ExitStack() as stack:
        judges = _judges(pipe, request)
        eyes = _open_eyes(pipe, request, judges, stack)
        side, wording = pipe.decoder.network.config.resolution, request.wording
        train = read_subjects(request.data, side, wording, eyes, REFERENCES, LEAST)
        held = None
        if request.held is not None:
            held = read_subjects(request.held, side, wording, eyes, REFERENCES, LEAST_HELD_OUT)
        groups = _groups(train, held, wording, request)
        pictures = {group.name: _draw(pipe, group, train, kept, options) for group in groups}
        seen = {
            eye: {g: {r: _look(look, x) for r, x in rows.items()} for g, rows in pictures.items()}
            for eye, look in eyes.items()
        }
    features = list(request.features)
    names = list(dict.fromkeys([*train.names, *(held.names if held is not None else ())]))
    scores: dict[str, Any] = {
        "request": {**asdict(request), "held_out": request.held, "captions": wording.pattern},
        "model": model,
        "features": {name: eyes[name].network.about for name in features},
        "training pictures": len(train),
        "held-out pictures": 0 if held is None else len(held),
        "captions": {group.name: len(group) for group in groups},
        "tables": {name: _table(name, groups, train, held, seen[name]) for name in features},
        "variety": {n: _variety(n, groups, train, request.seeds, seen[n]) for n in features},
        "retrieval": _retrieval(judges, groups, names, wording, seen),
    }
    if pipe.prior is not None and OWN in eyes and train.styles is not None:
        scores["prior"] = prior_draws(pipe, train, train.seen[OWN], groups[0], wording, options)
    scores["upsamplers"], upscaled = upscaling(
        pipe, request.held or request.data, request.upscaled, kept
    )
    return Evaluation(scores, groups, pictures, upscaled)


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


def _groups(
    train: Subjects, held: Subjects | None, wording: Wording, request: Request
) -> list[Group]:
    """Captions that were trained on, that were held out, and names alone, each several times."""
    count = min(request.limit, len(train) // 2)  # the others are what they are measured against
    groups = [_group("trained", train, count, torch.arange(count))]
    if held is not None:
        groups.append(_group("held out", held, min(request.limit, len(held)), None))
    names = [name for name in dict.fromkeys(train.names[:count]) for _ in range(request.seeds)]
    return [*groups, Group("name alone", [wording.plain(name) for name in names], names)]


def _group(name: str, subjects: Subjects, count: int, own: Tensor | None) -> Group:
    styles = subjects.styles and subjects.styles[:count]
    z = subjects.seen[OWN][:count] if OWN in subjects.seen else None
    captions, names = subjects.captions[:count], subjects.names[:count]
    return Group(name, captions, names, styles, own, z, subjects.pictures)


def _draw(
    pipe: UnCLIP, group: Group, train: Subjects, kept: Kept, options: dict[str, Any]
) -> dict[str, list[Image.Image]]:
    z_train = train.seen.get(OWN, torch.empty(0))
    rows = drawers(pipe, group, z_train, options)
    return {
        row: kept.draw(f"{group.name}-{row}".replace(" ", "-"), len(group), draw)
        for row, draw in rows.items()
    }


def _look(look: Remembered, images: Sequence[Image.Image]) -> Tensor:
    """**Shapes**: N pictures → (N, F)."""
    parts = [images[k : k + 64] for k in range(0, len(images), 64)]
    return torch.cat([look(to_uint8(torch.stack([to_tensor(x) for x in p]))) for p in parts])


def _table(
    name: str,
    groups: Sequence[Group],
    train: Subjects,
    held: Subjects | None,
    seen: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, dict[str, float]]]:
    """The measures of every row of every group in one network's features."""
    real = train.seen[name]  # (M, F)
    others = slice(len(groups[0]), None)  # the training pictures that are not measured themselves
    probe, number = None, {}
    if train.styles is not None:
        number = {style: k for k, style in enumerate(dict.fromkeys(train.styles))}
        labels = torch.tensor([number[style] for style in train.styles])
        probe = measures.Probe(real[others], labels[others], len(number))
    threshold = None if held is None else measures.copy_threshold(held.seen[name], real)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for group in groups:
        table[group.name] = {}
        for row, x in seen[group.name].items():
            line = table[group.name][row] = _likeness(x, group, real, train.names, others)
            if probe is not None and group.styles is not None:
                asked = torch.tensor([number.get(style, -1) for style in group.styles])
                line["style"] = float((probe(x).argmax(1) == asked).float().mean())
            if threshold is not None and (group.own is None or row not in ("real", "shrunk")):
                line["copies"] = measures.copies(x, real, threshold)
    return table


def _likeness(
    x: Tensor, group: Group, real: Tensor, names: Sequence[str], others: slice
) -> dict[str, float]:
    """What is shown and how near to real pictures it lies. **Shapes**: x (N, F), real (M, F)."""
    line = {}
    if (same := measures.same_concept(x, real, group.names, names, group.own)) is not None:
        line["same"], line["same5"] = same
    distribution = real[others][:DISTRIBUTION]
    line["realistic"] = measures.realistic(x, distribution)
    line["kernel"] = measures.kernel_distance(x, distribution)
    line["frechet"] = measures.frechet_distance(x, distribution)
    as_many = distribution[: max(len(x), measures.DENSITY_NEIGHBOURS + 1)]
    line["density"], line["coverage"] = measures.density_coverage(x, as_many)
    return line


def _variety(
    name: str,
    groups: Sequence[Group],
    train: Subjects,
    seeds: int,
    seen: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, float]:
    """How pictures of one name differ over seeds, and how the data's own of that name do."""
    rows: dict[str, list[int]] = {}
    for k, concept in enumerate(train.names):
        rows.setdefault(concept, []).append(k)
    made = seen["name alone"].get("product")
    pairs = []
    for k, concept in enumerate(dict.fromkeys(groups[-1].names)):
        if made is not None and seeds > 1 and len(rows[concept]) > 1:
            own = measures.variety(made[k * seeds : (k + 1) * seeds])
            pairs.append((own, measures.variety(train.seen[name][rows[concept]])))
    if not pairs:
        return {}
    drawn, data = torch.tensor(pairs).mean(0).tolist()
    return {"drawn": drawn, "data": data, "names": len(pairs)}


def _retrieval(
    judges: Mapping[str, FrozenCLIP],
    groups: Sequence[Group],
    names: Sequence[str],
    wording: Wording,
    seen: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, Any]:
    """Which name, among all there are, a CLIP gives each picture; and how often, of the group's
    real pictures, the one that it was drawn from is the nearest."""
    number = {name: k for k, name in enumerate(names)}
    by: dict[str, Any] = {}
    for judge, clip in judges.items():
        texts = [wording.plain(name) for name in names]
        parts = [clip.encode_text(texts[k : k + 256]).embed for k in range(0, len(texts), 256)]
        z_text = torch.cat(parts).float().cpu()  # (K, D)
        by[judge] = {"names": len(names), "twins": coinciding(z_text), "groups": {}}
        for group in groups:
            own = torch.tensor([number[name] for name in group.names])
            rows = seen[judge][group.name]
            by[judge]["groups"][group.name] = {
                row: hit_rates(ranks(z, z_text, own))
                | (agreement(z, rows["real"]) if "real" in rows else {})
                for row, z in rows.items()
            }
    return by
