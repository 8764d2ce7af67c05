"""Drawing several pictures and keeping the best by CLIP: what the score says to another CLIP.

N captions, S pictures each, D CLIP embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip.errors import ConfigError
from unclip.evaluation.findings import Findings, curves
from unclip.evaluation.report import Columns, lines_of
from unclip.evaluation.scores import ranks
from unclip.evaluation.setting import OWN, Request, Setting, set_up
from unclip.pipeline import UnCLIP

COLUMNS: Columns = {
    "own": ("score that ranks", 1, 4),
    "judge": ("the judge's score", 1, 4),
    "top1": ("name top-1 by the judge", 100, 1),
    "best": ("the judge's own best", 1, 4),
}
ABOUT = (
    "Cosine of picture and caption: by the stack's CLIP, which chooses one of so many pictures, "
    "and of those chosen by the judge, which takes no part; last, had the judge chosen itself."
)


def reranking(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Score against number of candidates, by a judge that does not rerank.

    `request.seeds` is the largest number; fewer are taken as all disjoint parts of these pictures.

    **Raises**: `ConfigError` without a judge or for one candidate, and as `set_up` does.
    """
    if request.judge is None:
        raise ConfigError("reranking needs a CLIP that takes no part in it: name one with --judge")
    if request.seeds < 2:
        raise ConfigError(f"{request.seeds} candidates: reranking needs 2 or more (--seeds)")
    with set_up(pipe, model, request, work) as setting:
        own, judge, named = _scores(setting)
    rows = {}
    count = 1
    while count <= request.seeds:
        rows[f"best of {count}" if count > 1 else "any"] = curve_at(own, judge, named, count)
        count *= 2
    table = (f"Reranking, {len(own)} captions", ABOUT, *lines_of(COLUMNS, rows))
    points = {
        name: [(float(2**k), row[key]) for k, row in enumerate(rows.values())]
        for key, name in (("judge", "the judge's score"), ("best", "had it chosen itself"))
    }
    return Findings(rows, [table], curves(points, "pictures to choose from", "the judge's cosine"))


def curve_at(own: Tensor, judge: Tensor, named: Tensor, count: int) -> dict[str, float]:
    """Means over the parts of `count` pictures of each caption. **Shapes**: each (N, S)."""
    used = own.shape[1] // count * count
    own, judge, named = (x[:, :used].unflatten(1, (-1, count)) for x in (own, judge, named.float()))
    chosen = own.argmax(-1, keepdim=True)  # (N, S / n, 1)
    return {
        "own": float(own.amax(-1).mean()),
        "judge": float(judge.gather(-1, chosen).mean()),
        "top1": float(named.gather(-1, chosen).mean()),
        "best": float(judge.amax(-1).mean()),
    }


def _scores(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Of S pictures a caption, both scores, and whether the judge gives them their name.

    **Shapes**: → (N, S) each.
    """
    subjects, seeds = setting.held or setting.train, setting.request.seeds
    count = min(setting.request.limit, len(subjects))
    captions = [caption for caption in subjects.captions[:count] for _ in range(seeds)]
    how = {"size": setting.side, "prior": setting.prior, **setting.options}
    pictures = setting.kept.draw(
        "candidates",
        len(captions),
        lambda rows: setting.pipe.text_to_image(
            captions[rows.start : rows.stop], seed=rows.start, **how
        ),
    )
    scores = []
    for name in (OWN, "judge"):
        z = setting.look(name, pictures)  # (N S, D)
        z_text = setting.judges[name].encode_text(subjects.captions[:count]).embed.float().cpu()
        scores.append(cosine_similarity(z, z_text.repeat_interleave(seeds, 0)).view(count, seeds))
    names = setting.names
    asked = torch.tensor([names.index(name) for name in subjects.names[:count]])
    rank = ranks(z, setting.names_as_read_by("judge"), asked.repeat_interleave(seeds))
    return scores[0], scores[1], rank.view(count, seeds) == 0
