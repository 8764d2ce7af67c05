"""CLIP's contrastive objective, over all processes, and retrieval scores (Section 2's encoder).

B local batch, G global batch, N pictures, D CLIP embedding, L text positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = 100.0  # CLIP clips the learned logit scale there "to prevent training instability"


def contrastive_loss(
    z_image: Tensor, z_text: Tensor, ids: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """Symmetric cross-entropy of each picture against all captions, and the other way round.

    The batch is gathered over processes with gradients, so that N processes compute what one
    would on the whole batch. Another picture with the same caption is no negative: it is left
    out. Gradient accumulation does not enlarge the set of negatives.

    **Shapes**: z_image, z_text (B, D) unit norm; ids (B, L) token ids; scale () →
    loss, top1 (B,): top1 is 1 where the picture's own caption scores highest.
    """
    all_image, all_text, all_ids = (gather(part) for part in (z_image, z_text, ids))  # (G, ·)
    own = torch.arange(len(ids), device=ids.device) + _rank() * len(ids)
    same = (ids[:, None] == all_ids[None]).all(-1)  # (B, G)
    same[torch.arange(len(ids), device=ids.device), own] = False
    scale = scale.float()
    # Softmax over hundreds of candidates needs float32 whatever the towers run in.
    by_image = (scale * z_image.float() @ all_text.float().T).masked_fill(same, -torch.inf)
    by_text = (scale * z_text.float() @ all_image.float().T).masked_fill(same, -torch.inf)
    loss = F.cross_entropy(by_image, own, reduction="none")  # (B,)
    loss = (loss + F.cross_entropy(by_text, own, reduction="none")) / 2
    return {"loss": loss, "top1": (by_image.argmax(1) == own).float()}


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in order of rank; gradients flow back to each.

    **Shapes**: (B, ...) → (G, ...).
    """
    return torch.cat(dist_nn.all_gather(x.contiguous())) if _world() > 1 else x


def retrieval_rank(z_image: Tensor, z_text: Tensor) -> Tensor:
    """How many captions score higher than a picture's own; below k means a top-k hit.

    Pictures that share one caption do not compete with each other.

    **Shapes**: z_image, z_text (N, D), row i of one belongs to row i of the other → (N,) int64.
    """
    scores = F.normalize(z_image.float(), dim=-1) @ F.normalize(z_text.float(), dim=-1).T
    own = scores.diagonal()[:, None]
    return (scores > own + 1e-6).sum(1)  # equal captions differ by rounding only


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0
