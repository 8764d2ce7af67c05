"""A model measured stage by stage against the pictures of a data set.

N captions of a group, M training pictures, F features, D CLIP embedding, S samples a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.evaluation import measures
from unclip.evaluation.drawings import Group, drawers
from unclip.evaluation.prior import prior_draws
from unclip.evaluation.scores import agreement, coinciding, hit_rates, ranks
from unclip.evaluation.setting import DISTRIBUTION, OWN, Request, Setting, set_up
from unclip.evaluation.subjects import Subjects, Wording
from unclip.evaluation.upscaling import upscaling
from unclip.pipeline import UnCLIP


@dataclass(frozen=True)
class Evaluation:
    """`scores` is what the JSON file holds; pictures by group and row are for the page."""

    scores: dict[str, Any]
    groups: list[Group]
    pictures: dict[str, dict[str, list[Image.Image]]]
    upscaled: dict[str, list[Image.Image]]


def evaluate(pipe: UnCLIP, model: str, request: Request, work: Path) -> Evaluation:
    """Draw what is measured and measure it. **Raises**: as `set_up` does."""
    with set_up(pipe, model, request, work) as setting:
        train, held = setting.train, setting.held
        groups = _groups(train, held, request.wording, request)
        pictures = {group.name: _draw(setting, group) for group in groups}
        seen = {
            eye: {
                g: {r: setting.look(eye, x) for r, x in rows.items()}
                for g, rows in pictures.items()
            }
            for eye in setting.eyes
        }
    features = list(request.features)
    scores: dict[str, Any] = {
        "request": {
            **asdict(request),
            "held_out": request.held,
            "captions": request.wording.pattern,
        },
        "model": model,
        "features": {name: setting.eyes[name].network.about for name in features},
        "training pictures": len(train),
        "held-out pictures": 0 if held is None else len(held),
        "captions": {group.name: len(group) for group in groups},
        "tables": {name: _table(name, groups, train, held, seen[name]) for name in features},
        "variety": {n: _variety(n, groups, train, request.seeds, seen[n]) for n in features},
        "retrieval": _retrieval(setting, groups, seen),
    }
    draws = pipe.prior is not None and setting.prior != "none"
    if draws and OWN in setting.eyes and train.styles is not None:
        scores["prior"] = prior_draws(setting, groups[0])
    scores["upsamplers"], upscaled = upscaling(
        pipe, request.held or request.data, request.upscaled, setting.kept, setting.options
    )
    return Evaluation(scores, groups, pictures, upscaled)


def _groups(
    train: Subjects, held: Subjects | None, wording: Wording, request: Request
) -> list[Group]:
    """Captions that were trained on, that were held out, and names alone, each several times."""
    count = min(request.limit, len(train) // 2)  # the others are what they are measured against
    groups = [_group("trained", train, count, torch.arange(count))]
    if held is not None:
        groups.append(_group("held out", held, min(request.limit, len(held)), None))
    names = [name for name in dict.fromkeys(train.names[:count]) for _ in range(request.seeds)]
    plain = [wording.plain(name) for name in names]
    return [*groups, Group("name alone", plain, names, together=request.seeds)]


def _group(name: str, subjects: Subjects, count: int, own: Tensor | None) -> Group:
    styles = subjects.styles and subjects.styles[:count]
    z = subjects.seen[OWN][:count] if OWN in subjects.seen else None
    captions, names = subjects.captions[:count], subjects.names[:count]
    return Group(name, captions, names, styles, own, z, subjects.pictures)


def _draw(setting: Setting, group: Group) -> dict[str, list[Image.Image]]:
    z_train = setting.train.seen.get(OWN, torch.empty(0))
    rows = drawers(setting.pipe, group, z_train, setting.options, setting.prior)
    return {
        row: setting.kept.draw(f"{group.name}-{row}".replace(" ", "-"), len(group), draw)
        for row, draw in rows.items()
    }


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
    if len(x) > group.together:
        line["kernel"] = measures.kernel_distance(x, distribution, together=group.together)
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
    setting: Setting,
    groups: Sequence[Group],
    seen: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, Any]:
    """Which name, among all there are, a CLIP gives each picture; and how often, of the group's
    real pictures, the one that it was drawn from is the nearest."""
    names = setting.names
    number = {name: k for k, name in enumerate(names)}
    by: dict[str, Any] = {}
    for judge in setting.judges:
        z_text = setting.names_as_read_by(judge)  # (K, D)
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
