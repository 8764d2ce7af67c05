"""Does a prior draw, or does it answer with one embedding? Measured on embeddings alone.

S samples of a name, D CLIP embedding.
"""

from __future__ import annotations

import torch

from unclip.evaluation.drawings import Group
from unclip.evaluation.measures import Probe, spread
from unclip.evaluation.setting import OWN, Setting

NAMES, SAMPLES = 12, 32
LEAST_STYLES = 3  # of a name in the data
SURE = 0.8


def prior_draws(setting: Setting, group: Group) -> dict[str, float]:
    """Over seeds of a name without a style: how far embeddings spread beside the true ones of that
    name, which of its styles occur, how sure of a style the probe is. With a style: how often it
    is the right one. `group` are captions with styles.
    """
    pipe, train, wording = setting.pipe, setting.train, setting.request.wording
    options, z_train = {**setting.options, "prior": setting.prior}, train.seen[OWN]  # (M, D)
    assert pipe.prior is not None and train.styles is not None and group.styles is not None
    scale = pipe.prior.network.scale
    number = {style: k for k, style in enumerate(dict.fromkeys(train.styles))}
    labels = torch.tensor([number[style] for style in train.styles])
    scaled = scale(z_train.to(pipe.device)).cpu()  # (M, D)
    probe = Probe(scaled[len(group) :], labels[len(group) :], len(number))
    rows: dict[str, list[int]] = {}
    for k, name in enumerate(train.names):
        rows.setdefault(name, []).append(k)
    several = [n for n, own in rows.items() if len(set(labels[own].tolist())) >= LEAST_STYLES]
    result = {}
    if names := several[: min(NAMES, len(group))]:
        captions = [wording.plain(name) for name in names]
        z = pipe.text_to_embedding(captions, n=SAMPLES, **options)
        drawn = scale(z).cpu().unflatten(0, (len(names), SAMPLES))  # (n, S, D)
        chance = probe(drawn.flatten(0, 1)).unflatten(0, (len(names), SAMPLES))  # (n, S, styles)
        occur = []
        for name, guess in zip(names, chance.argmax(-1), strict=True):
            theirs = set(labels[rows[name]].tolist())
            occur.append(len(theirs & set(guess.tolist())) / len(theirs))
        result = {
            "names": len(names),
            "samples": SAMPLES,
            "spread": sum(map(spread, drawn)) / len(names),
            "true spread": sum(spread(scaled[rows[name]]) for name in names) / len(names),
            "styles that occur": sum(occur) / len(names),
            "sure of a style": float((chance.amax(-1) >= SURE).float().mean()),
        }
    z = pipe.text_to_embedding(list(group.captions), **options)
    asked = torch.tensor([number[style] for style in group.styles])
    right = (probe(scale(z).cpu()).argmax(1) == asked).float().mean()
    return {**result, "right style where asked": float(right)}
