"""Measures on features of pictures: what is shown, how near to real ones, how varied.

N pictures, M real ones, F features, D embedding, S samples of one caption. Distances are cosine
distances. `own` (N,) names for each picture the real one that is left out of its
neighbours: a picture does not count as like itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # within which a picture is near a real one
TOP = 5
COPIES = 0.05  # the share of real held-out pictures that lie nearer than what counts as a copy
PROBE_DECAY, PROBE_STEPS = 1e-2, 100
CHUNK = 4096  # real pictures whose distances are held at a time


def nearest(x: Tensor, real: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest real pictures of each, nearest first.

    **Shapes**: x (N, F), real (M, F), own (N,) int64 → distances (N, k), rows of `real` (N, k).
    **Raises**: `ValueError` for fewer than k real pictures.
    """
    if len(real) - (own is not None) < k:
        raise ValueError(f"{len(real)} real pictures are too few for {k} neighbours")
    parts, unit = [], F.normalize(x.float(), dim=1)
    for start in range(0, len(real), CHUNK):
        distance = 1 - unit @ F.normalize(real[start : start + CHUNK].float(), dim=1).T  # (N, c)
        if own is not None:
            there = (own >= start) & (own < start + CHUNK)
            distance[there.nonzero()[:, 0], own[there] - start] = torch.inf
        values, rows = distance.topk(min(k, distance.shape[1]), largest=False)
        parts.append((values, rows + start))
    values, rows = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    best = values.topk(k, largest=False)
    return best.values, rows.gather(1, best.indices)


def same_concept(
    x: Tensor, real: Tensor, names: Sequence[str], real_names: Sequence[str], own: Tensor | None
) -> tuple[float, float] | None:
    """How often the nearest real picture, or one of the nearest five, has the picture's name.

    Pictures whose name no other real one has are left out; None where that is all of them.
    """
    number = {name: k for k, name in enumerate(dict.fromkeys([*names, *real_names]))}
    asked = torch.tensor([number[name] for name in names])  # (N,)
    there = torch.tensor([number[name] for name in real_names])  # (M,)
    others = torch.bincount(there, minlength=len(number))[asked]
    if own is not None:
        others = others - (there[own] == asked).long()
    kept = others > 0
    if not kept.any():
        return None
    k = min(TOP, len(real) - (own is not None))
    _, rows = nearest(x[kept], real, k, None if own is None else own[kept])
    hit = there[rows] == asked[kept, None]  # (n, k)
    return float(hit[:, 0].float().mean()), float(hit.any(1).float().mean())


def realistic(x: Tensor, real: Tensor) -> float:
    """The share of pictures that lie as near to some real one as its third neighbour among real
    ones does.

    The more real pictures, the nearer they lie: compare figures of equal M.

    **Shapes**: x (N, F), real (M, F). **Source**: precision in Kynkäänniemi et al. 2019, eq. 1.
    """
    return float(_near(x, real, NEIGHBOURS).any(0).float().mean())


def _near(x: Tensor, real: Tensor, k: int) -> Tensor:
    """Which pictures lie within each real one's k-th neighbour. **Shapes**: → (M, N) bool."""
    radius = nearest(real, real, k, torch.arange(len(real)))[0][:, -1:]  # (M, 1)
    unit, unit_real = F.normalize(x.float(), dim=1), F.normalize(real.float(), dim=1)
    return 1 - unit_real @ unit.T <= radius


def copy_threshold(held_out: Tensor, real: Tensor) -> float:
    """The distance to training pictures below which 5 % of real held-out ones lie."""
    return float(nearest(held_out, real, 1)[0].quantile(COPIES))


def copies(x: Tensor, real: Tensor, threshold: float) -> float:
    """The share of pictures nearer to a training picture than `threshold`."""
    return float((nearest(x, real, 1)[0] < threshold).float().mean())


def kernel_distance(x: Tensor, y: Tensor, paired: bool = False, together: int = 1) -> float:
    """Squared maximum mean discrepancy under the kernel (cos(x, y) + 1)³, without bias.

    KID's kernel on features of unit length: as with neighbours, only directions count. `paired`
    rows, one made for the other, don't meet: they are no independent draws. Nor are so many rows of
    x that stand `together`, of one caption each: they are alike whatever they are alike to.

    **Shapes**: x (N, F), y (M, F), two rows or more each, of x two captions'.
    **Source**: Bińkowski et al. 2018, "Demystifying MMD GANs", eq. 3 and 4.
    """
    x, y = (F.normalize(a.float(), dim=1) for a in (x, y))
    xx, yy, xy = (((a @ b.T).double() + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))

    def between(k: Tensor, together: int = 1) -> Tensor:
        group = torch.arange(len(k), device=k.device) // together
        return k[group[:, None] != group].mean()

    across = between(xy) if paired else xy.mean()
    return float(between(xx, together) + between(yy) - 2 * across)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of x and y.

    tr (C_x C_y)^½ is the sum of the singular values of A Bᵀ where AᵀA = C_x and BᵀB = C_y, so that
    no square root of an F × F matrix is taken, and few pictures are no numerical trouble. They are
    a statistical one: compare only figures of equal N and M.

    **Shapes**: x (N, F), y (M, F).
    """
    (mean_x, a), (mean_y, b) = _root(x), _root(y)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and A of at most F rows with AᵀA the covariance. **Shapes**: (N, F) → (F,), (n, F)"""
    x = x.double()
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return x.mean(0), torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def density_coverage(x: Tensor, real: Tensor, k: int = DENSITY_NEIGHBOURS) -> tuple[float, float]:
    """How densely pictures lie among real ones, and the share of real ones that have one near.

    "Near" is within the real picture's k-th neighbour. Density is about 1 for real pictures.

    **Shapes**: x (N, F), real (M, F). **Source**: Naeem et al. 2020, eq. 7 and 9.
    """
    near = _near(x, real, k)
    density = near.sum() / (k * near.shape[1])
    return float(density), float(near.any(1).float().mean())


class Probe:
    """A linear classifier on standardised features: logistic regression with weight decay.

    **Shapes**: x (N, F), labels (N,) int64 below `classes`.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int):
        self.std, self.mean = torch.std_mean(x.float(), dim=0, correction=0)
        self.linear = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        inputs, parameters = self._scaled(x), list(self.linear.parameters())
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=PROBE_STEPS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            decay = PROBE_DECAY * self.linear.weight.square().sum()
            value = F.cross_entropy(self.linear(inputs), labels) + decay
            value.backward()
            return value

        optimizer.step(loss)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std.clamp(min=1e-6)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Probabilities. **Shapes**: (N, F) → (N, classes)."""
        return self.linear(self._scaled(x)).softmax(1)


def spread(z: Tensor) -> float:
    """Root of the summed variances of some vectors. **Shapes**: (S, D), two or more."""
    return float(z.double().var(0).sum().sqrt())


def variety(x: Tensor) -> float:
    """Mean cosine distance between different pictures. **Shapes**: (S, F), two or more."""
    unit = F.normalize(x.double(), dim=1)
    pairs = comb(len(x), 2)
    return float(1 - (unit @ unit.T).triu(1).sum() / pairs)
