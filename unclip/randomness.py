"""Random numbers as a function of (seed, purpose, counters): nothing to save, nothing to reseed.

Training draws every number from a generator that depends only on the run's seed, on what the
number is for, and on the global id of the sample, so one process or eight draw the same samples
and a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments.

    torch's takes 32 bits of a seed: of two billion samples some draw the same, never neighbours
    but by chance.
    """
    text = f"{seed}/{purpose}/" + "/".join(map(str, counters))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, purpose: str, ids: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, one independent draw for each id.

    **Shapes**: ids (B,), shape (...) → (B, ...), float32 on the CPU.
    """
    return noise_of([generator(seed, purpose, int(i)) for i in ids], shape)


def uniform(
    seed: int, purpose: str, ids: Sequence[int] | Tensor, shape: Sequence[int] = ()
) -> Tensor:
    """Numbers from [0, 1), one independent draw for each id.

    **Shapes**: ids (B,), shape (...) → (B, ...), float32 on the CPU.
    """
    return torch.stack(
        [torch.rand(tuple(shape), generator=generator(seed, purpose, int(i))) for i in ids]
    )


def integers(seed: int, purpose: str, ids: Sequence[int] | Tensor, high: int) -> Tensor:
    """One integer from [0, high) for each id. **Shapes**: ids (B,) → (B,), int64 on the CPU."""
    return torch.stack(
        [torch.randint(high, (), generator=generator(seed, purpose, int(i))) for i in ids]
    )


def noise_of(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, each row drawn by its own generator.

    **Shapes**: B generators, shape (...) → (B, ...), float32 on the CPU.
    """
    noise = torch.empty(len(generators), *shape)
    for row, own in zip(noise, generators, strict=True):
        row.normal_(generator=own)  # in place: nothing is copied
    return noise


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which pass number `epoch` visits n samples. **Shapes**: → (n,), int64."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))
