"""What a run learns from its training embeddings before it begins: their scale, and the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from unclip import randomness
from unclip.clip import FrozenCLIP
from unclip.data.dataset import Dataset, fixed
from unclip.data.images import resize
from unclip.models.decoder import Decoder
from unclip.models.layers import EmbeddingScale

STATISTICS_COUNT = 2048  # pictures on which the mean and deviation of embeddings are measured
LAYOUT_COUNT, LAYOUT_EPOCHS, LAYOUT_BATCH, LAYOUT_LR = 20_000, 120, 256, 2e-3


def fit_scale(scale: EmbeddingScale, clip: FrozenCLIP, dataset: Dataset) -> None:
    """Measure what `whiten` needs on pictures spread evenly over the dataset."""
    if scale.config.kind == "whiten":
        scale.fit(torch.cat([z for z, _ in _embedded(clip, dataset, STATISTICS_COUNT)]))


def fit_layout(
    decoder: Decoder,
    clip: FrozenCLIP,
    dataset: Dataset,
    seed: int,
    jitter: float = 0.0,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Fit a decoder's layout by itself to small pictures, by least squares of their pixels.

    It sees two hundred times as many pictures a second as through the U-Net, which goes on from
    here. **Units**: `jitter` as in `jittered`, another share of it for every picture each time.
    """
    layout = decoder.layout
    assert layout is not None
    parts = [(z, resize(x, layout.side)) for z, x in _embedded(clip, dataset, LAYOUT_COUNT)]
    device = layout.out.weight.device  # not the encoder's before the run has begun
    z = torch.cat([z for z, _ in parts]).to(device)  # (n, D)
    x0 = torch.cat([x for _, x in parts]).to(device)  # (n, 3, s, s)
    frozen = [parameter for parameter in layout.parameters() if not parameter.requires_grad]
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in frozen], LAYOUT_LR, fused=True)
    rounds = -(-len(z) // LAYOUT_BATCH) * LAYOUT_EPOCHS
    bar = tqdm(range(rounds), desc="layout", delay=2.0, leave=False, disable=None)
    for step in bar:
        g = randomness.generator(seed, "layout", step)
        rows = torch.randint(len(z), (LAYOUT_BATCH,), generator=g)
        share = torch.rand(LAYOUT_BATCH, generator=g)
        noise = torch.randn(LAYOUT_BATCH, z.shape[1], generator=g)
        optimizer.param_groups[0]["lr"] = LAYOUT_LR * min(1, 20 * step / rounds, 1 - step / rounds)
        rows, share, noise = rows.to(device), share.to(device), noise.to(device)
        z_image = decoder.scale(jittered(decoder.scale, z[rows], jitter * share, noise))
        with autocast():
            drawn = layout(z_image)
        loss = (drawn.float() - x0[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in frozen:
        parameter.requires_grad_(False)


def jittered(scale: EmbeddingScale, z: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Embeddings a little off the data, as those are that a prior draws.

    **Shapes**: z raw, noise standard normal, both (B, D); sigma (B,) → (B, D) raw. **Units**:
    sigma on the scaled embedding, whose components `whiten` gives a standard deviation of one.
    """
    return scale.inverse(scale(z) + sigma[:, None] * noise)


def _embedded(clip: FrozenCLIP, dataset: Dataset, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings and pictures of at most about `count` samples, evenly over the dataset."""
    chosen = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    for start in range(0, len(chosen), 64):
        x = torch.stack([fixed(dataset, i).image for i in chosen[start : start + 64]])
        yield clip.encode_image(x).float(), x
