"""What a run learns from its training embeddings before it begins: their scale, and drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.data.sample import TOGETHER, Batch, Dataset, batches_of, evenly, fixed, reworded
from unclip.images import resize
from unclip.models.ar_prior import Quantizer
from unclip.models.decoder import Decoder
from unclip.models.layers import Draft, EmbeddingScale
from unclip.models.prior import DiffusionPrior
from unclip.progress import progress_bar
from unclip.training.misses import Misses
from unclip.training.task import embeddings_of

STATISTICS_COUNT = 2048  # pictures on which the mean and deviation of embeddings are measured
QUANTIZER_COUNT = 50_000  # pairs on which components and dot products are
LAYOUT_COUNT, LAYOUT_EPOCHS = 20_000, 120  # pictures, and how often each is shown
LAYOUT_JITTER = 0.25  # of what the decoder's embeddings are moved by at most
LAYOUT_MOVED = 40_000  # pictures where they are moved: small data several times, each differently
DRAFT_COUNT, DRAFT_EPOCHS = 40_000, 30  # captions
DRAFT_WORDINGS = 32  # of one picture, at most
DRAFT_JITTER = 0.5  # the most noise on a caption, in deviations of the captions in each direction
DRAFT_FLOOR = 0.1  # directions in which captions differ less than this are not blown up to one
BATCH, LR = 256, 2e-3

Autocast = Callable[[], AbstractContextManager[None]]
Moved = Callable[[Tensor, Tensor], Tensor]  # pictures by their samples' numbers


def fit_scale(scale: EmbeddingScale, clip: FrozenCLIP, dataset: Dataset) -> None:
    """Measure what `whiten` needs on pictures spread evenly over the dataset."""
    if scale.config.kind == "whiten":
        scale.fit(torch.cat([z for z, _ in _embedded(clip, dataset, STATISTICS_COUNT)]))


def fit_quantizer(quantizer: Quantizer, clip: FrozenCLIP, dataset: Dataset, seed: int) -> None:
    """Measure a prior's components, their ranges and dot products, evenly over the data."""
    count = min(QUANTIZER_COUNT, DRAFT_WORDINGS * len(dataset))
    pairs = list(_paired(clip, dataset, seed, count))
    quantizer.fit(torch.cat([z for z, _ in pairs]), torch.cat([z for _, z in pairs]))


def fit_layout(
    decoder: Decoder,
    clip: FrozenCLIP,
    dataset: Dataset,
    seed: int,
    jitter: float = 0.0,
    autocast: Autocast = nullcontext,
    moved: Moved | None = None,
    misses: Misses | None = None,
) -> None:
    """Fit a decoder's layout by itself to small pictures, by least squares of their pixels.

    It sees two hundred times as many pictures a second as through the U-Net, which goes on from
    here. `moved` is what training does to pictures with these numbers before they are encoded.
    Half of each batch are `misses`, each beside the picture that it means.
    **Units**: `jitter` as in `jittered`; up to a quarter of it for every picture each time.
    """
    layout, config = decoder.layout, decoder.config.layout
    assert layout is not None and config is not None
    device = layout.out.weight.device
    count = LAYOUT_COUNT if moved is None else LAYOUT_MOVED

    def pixels(batch: Batch) -> Tensor:
        return resize(batch.images.to(device), config.side).clamp(-1, 1).flatten(1)

    parts = [(z, pixels(batch)) for z, batch in _embedded(clip, dataset, count, moved)]
    z = torch.cat([z for z, _ in parts]).to(device)  # (n, D)
    x0 = torch.cat([x for _, x in parts])  # (n, 3 s s)
    if misses is not None:
        drawn = misses.z_image.to(device)
        meant, which = misses.picture.unique(return_inverse=True)
        small = torch.cat([pixels(batch) for batch in batches_of(dataset, meant.tolist())])
        by_prior = (torch.arange(BATCH) % 2 == 0)[:, None].to(device)

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(z), (BATCH,), generator=g).to(device)
        sigma, noise = _jitter(LAYOUT_JITTER * jitter, z.shape[1], g)
        z_image = jittered(decoder.scale, z[rows], sigma.to(device), noise.to(device))
        if misses is None:
            return decoder.scale(z_image), x0[rows]
        other = torch.randint(len(drawn), (BATCH,), generator=g)
        z_image = torch.where(by_prior, drawn[other.to(device)], z_image)
        return decoder.scale(z_image), torch.where(by_prior, small[which[other]], x0[rows])

    shown = LAYOUT_EPOCHS * min(len(z), LAYOUT_COUNT)
    _fit("layout", layout, draw, -(-shown // BATCH), seed, autocast)


def fit_draft(
    prior: DiffusionPrior,
    clip: FrozenCLIP,
    dataset: Dataset,
    seed: int,
    drop: float = 0.0,
    autocast: Autocast = nullcontext,
) -> None:
    """Fit a prior's draft by itself to image embeddings, by least squares, from captions.

    Small datasets are gone through several times, for other wordings. The share `drop` of captions
    is the null text, as when the prior trains, so that its draft is the mean embedding.
    """
    draft, scale = prior.draft, prior.text_scale
    assert draft is not None and scale is not None
    device = draft.out.weight.device
    count = min(DRAFT_COUNT, DRAFT_WORDINGS * len(dataset))
    pairs = list(_paired(clip, dataset, seed, count))
    x0 = prior.scale(torch.cat([z for z, _ in pairs]).to(device))  # (n, D)
    text = torch.cat([z for _, z in pairs]).to(device)
    scale.fit(text)
    null = scale(clip.null_text.embed.to(device))  # (1, D)
    text = scale(text)
    # Fitted where every direction counts alike, three times faster; the first layer then turns.
    few = len(text) < text.shape[1]  # captions: in the other directions they don't differ
    _, spread, axes = torch.linalg.svd(text, full_matrices=few)
    spread = F.pad(spread, (0, len(axes) - len(spread))) / len(text) ** 0.5  # (D,)
    turn = axes / spread.clamp(min=DRAFT_FLOOR)[:, None]  # (D, D)

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x0), (BATCH,), generator=g).to(device)
        dropped = (torch.rand(BATCH, 1, generator=g) < drop).to(device)
        sigma, noise = _jitter(DRAFT_JITTER, text.shape[1], g)
        z_text = torch.where(dropped, null, text[rows]) @ turn.T
        return z_text + sigma[:, None].to(device) * noise.to(device), x0[rows]

    _fit("draft", draft, draw, -(-len(x0) // BATCH) * DRAFT_EPOCHS, seed, autocast)
    with torch.no_grad():
        draft.fc.weight.copy_(draft.fc.weight @ turn)


def _fit(
    name: str,
    draft: Draft,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    rounds: int,
    seed: int,
    autocast: Autocast,
) -> None:
    """Least squares on `rounds` batches of (condition, what it stands for)."""
    fitted = [parameter.requires_grad_() for parameter in draft.fitted()]
    optimizer = torch.optim.AdamW(fitted, LR, fused=True)
    for step in progress_bar(range(rounds), name):
        condition, x0 = draw(randomness.generator(seed, name, step))
        optimizer.param_groups[0]["lr"] = LR * min(1, 20 * step / rounds, 1 - step / rounds)
        with autocast():
            expected = draft(condition)
        loss = (expected.float() - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in fitted:
        parameter.requires_grad_(False)


def _jitter(most: float, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A deviation for each of a batch, evenly up to `most` (B,), and normal noise (B, width)."""
    sigma = most * torch.rand(BATCH, generator=g)
    return sigma, torch.randn(BATCH, width, generator=g)


def jittered(scale: EmbeddingScale, z: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Embeddings a little off the data, as those are that a prior draws.

    **Shapes**: z raw, noise standard normal, both (B, D); sigma (B,) → (B, D) raw. **Units**:
    sigma on the scaled embedding, whose components `whiten` gives a standard deviation of one.
    """
    return scale.inverse(scale(z) + sigma[:, None] * noise)


def _embedded(
    clip: FrozenCLIP, dataset: Dataset, count: int, moved: Moved | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """At most about `count` samples with their embeddings, evenly over the dataset; where they are
    `moved`, a smaller dataset again and again."""
    chosen = evenly(dataset, count)
    if moved is not None and len(dataset) < count:
        chosen = range(count)
    for start in range(0, len(chosen), TOGETHER):
        numbers = chosen[start : start + TOGETHER]
        batch = Batch.of([fixed(dataset, i % len(dataset)) for i in numbers])
        if moved is not None:
            batch = replace(batch, pixels=moved(batch.images, torch.tensor(numbers)), z_image=None)
        yield embeddings_of(clip, batch), batch


def _paired(
    clip: FrozenCLIP, dataset: Dataset, seed: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings (n, D) of `count` pictures and of their captions, evenly over the dataset."""
    for _, batch in reworded(dataset, count, seed, "draft caption"):
        yield embeddings_of(clip, batch), clip.encode_text(batch.captions).embed.float()
