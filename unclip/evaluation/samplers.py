"""How few steps a prior needs with which sampler (Section 2.2; Appendix C), on embeddings alone.

N captions, D CLIP embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from torch.nn.functional import cosine_similarity

from unclip.diffusion.schedulers import SamplerName, check_sampler
from unclip.errors import CheckpointError, ConfigError
from unclip.evaluation.findings import Findings, curves
from unclip.evaluation.measures import frechet_distance, kernel_distance, spread
from unclip.evaluation.report import Table
from unclip.evaluation.setting import Request, read_pairs
from unclip.pipeline import UnCLIP

STEPS = (4, 8, 16, 32, 64)
MEASURES = {
    "frechet": ("Fréchet distance", 2, "as Gaussians, in the prior's scale, so that all count"),
    "kernel": (
        "kernel distance × 1000",
        2,
        "under (cos + 1)³; none meets its own caption's",
    ),
    "spread": ("spread over the true one", 3, "1 is as varied as the data's own"),
    "cosine": ("cosine to the caption's own", 3, "the highest is that of a mean, not of a draw"),
}


def compare_samplers(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Draw an embedding of each caption with every sampler in more and more steps.

    Against the embeddings of the captions' own pictures, of held-out data where there are any.

    **Raises**: `CheckpointError` for a model without a diffusion prior.
    """
    if pipe.prior is None:
        raise CheckpointError("this model has no prior, whose samplers are to be compared")
    pairs, notes = read_pairs(pipe, request), []
    scale = pipe.prior.network.scale
    found: dict[str, dict[int, dict[str, float]]] = {}
    true = scale(pairs.z_image).cpu()
    for sampler in get_args(SamplerName):
        try:
            check_sampler(pipe.prior.diffusion, sampler, max(STEPS))
        except ConfigError as error:
            notes.append(f"Left out, {sampler}: {error}.")
            continue
        for steps in STEPS:
            how: dict[str, Any] = {
                **request.given,
                "sampler": sampler,
                "steps": steps,
                "prior_candidates": 1,
            }
            z = pipe.text_to_embedding(pairs.captions, prior="diffusion", **how).float()
            drawn = scale(z).cpu()
            found.setdefault(sampler, {})[steps] = {
                "frechet": frechet_distance(drawn, true),
                "kernel": 1000 * kernel_distance(drawn, true, paired=True),
                "spread": spread(drawn) / spread(true),
                "cosine": float(cosine_similarity(z.cpu(), pairs.z_image.cpu().float()).mean()),
            }
    head = ["sampler", *(f"{steps} steps" for steps in STEPS)]
    tables: list[Table] = [
        (
            f"{title} of {len(true)} embeddings from true ones",
            about,
            head,
            [
                [name, *(f"{by[steps][key]:.{digits}f}" for steps in STEPS)]
                for name, by in found.items()
            ],
        )
        for key, (title, digits, about) in MEASURES.items()
    ]
    lines = {n: [(float(s), by[s]["frechet"]) for s in STEPS] for n, by in found.items()}
    figure = curves(lines, "sampling steps", "Fréchet distance of embeddings")
    return Findings({"captions": len(true), **found}, tables, figure, notes)
