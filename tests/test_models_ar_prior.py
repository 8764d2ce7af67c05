"""The autoregressive prior: quantised components, causality, the cache, drawing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity import randomise

from unclip.conditioning import Cond, TextEncoding
from unclip.errors import DataError
from unclip.models.ar_prior import ArPrior, ArPriorConfig, Quantizer
from unclip.models.transformer import TransformerConfig
from unclip.stages.ar_prior import ArSamplingConfig, choose, sample_autoregressive

D, W, L, K, V = 12, 8, 6, 5, 16


def pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.05, D)
    return torch.randn(n, D, generator=g) * spread + 0.5, torch.randn(n, D, generator=g)


def text(rows: int, seed: int = 0) -> TextEncoding:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.arange(rows) % (L - 2) + 3
    mask = torch.arange(L) < lengths[:, None]
    return TextEncoding(
        torch.randn(rows, L, W, generator=g), mask, torch.randn(rows, D, generator=g)
    )


@pytest.fixture(scope="module")
def model() -> ArPrior:
    config = ArPriorConfig(
        embed=D,
        text_width=W,
        context=L,
        components=K,
        buckets=V,
        dot_buckets=8,
        transformer=TransformerConfig(width=16, layers=2, heads=2),
    )
    model = ArPrior(config)
    randomise(model, 0)
    model.quantizer.fit(*pairs(400))
    return model.eval().requires_grad_(False)


def test_components_are_those_of_a_principal_component_analysis() -> None:
    z, z_text = pairs(500)
    quantizer = Quantizer(D, K, V, 8)
    quantizer.fit(z, z_text)
    unit = F.normalize(z.double(), dim=-1)
    values, vectors = torch.linalg.eigh(torch.cov(unit.T))
    variance = quantizer.project(z).var(0)
    torch.testing.assert_close(variance.double(), values.flip(0)[:K], rtol=1e-4, atol=1e-7)
    cosine = (quantizer.axes.double() * vectors.flip(1).T[:K]).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones(K, dtype=torch.float64), rtol=1e-4, atol=0)


def test_quantising_costs_at_most_half_a_bucket_in_each_component() -> None:
    z, z_text = pairs(500)
    quantizer = Quantizer(D, D - 1, 32, 8)
    quantizer.fit(z, z_text)
    share = (quantizer.quantize(z) + 0.5) / 32
    back = quantizer.low + share * (quantizer.high - quantizer.low)
    error = (back - quantizer.project(z)).abs()
    half = (quantizer.high - quantizer.low) / 64
    assert bool((error <= half * 1.001).all())
    assert bool((error.amax(0) > half * 0.8).all())  # and no less fine than promised


def test_a_round_trip_through_many_components_and_buckets_is_the_embedding() -> None:
    z, z_text = pairs(500)
    quantizer = Quantizer(D, D, 4096, 8)
    quantizer.fit(z, z_text)
    back = quantizer.dequantize(quantizer.quantize(z))
    torch.testing.assert_close(back, F.normalize(z, dim=-1), rtol=0, atol=1e-3)


def test_dropped_components_cost_what_their_eigenvalues_say() -> None:
    z, z_text = pairs(500)
    quantizer = Quantizer(D, K, 4096, 8)
    quantizer.fit(z, z_text)
    unit = F.normalize(z.double(), dim=-1)
    lost = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0)).flip(0)[K:].sum()
    values = quantizer.mean + quantizer.project(z) @ quantizer.axes
    error = (values.double() - unit).square().sum(1).mean()
    torch.testing.assert_close(error, lost, rtol=1e-3, atol=0)


def test_dot_products_fill_their_buckets_evenly() -> None:
    z, z_text = pairs(800)
    quantizer = Quantizer(D, K, V, 8)
    quantizer.fit(z, z_text)
    counts = quantizer.dot(z, z_text).bincount(minlength=8)
    assert int((counts - 100).abs().max()) <= 2
    cosine = F.cosine_similarity(z, z_text, dim=-1)
    top = quantizer.dot(z, z_text) >= 4
    assert float(cosine[top].min()) >= float(cosine[~top].max())


def test_too_few_embeddings_are_a_data_error() -> None:
    with pytest.raises(DataError, match=r"fewer than model\.components = 5 directions"):
        Quantizer(D, K, V, 8).fit(*pairs(4))


def test_statistics_stay_float32(model: ArPrior) -> None:
    before = model.quantizer.axes.clone()
    half = ArPrior(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    assert half.out.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.quantizer.axes, before, rtol=0, atol=0)


def test_a_component_sees_those_before_it_and_no_other(model: ArPrior) -> None:
    numbers = model.quantizer.quantize(pairs(2, 3)[0])
    cond = Cond(text=text(2))
    dot = torch.tensor([1, 6])
    logits = model(numbers, dot, cond)
    changed = numbers.clone()
    changed[:, 2] = (changed[:, 2] + 1) % V
    other = model(changed, dot, cond)
    torch.testing.assert_close(other[:, :3], logits[:, :3], rtol=0, atol=0)
    assert bool(((other[:, 3] - logits[:, 3]).abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize("what", ["text", "dot"])
def test_conditions_change_the_logits(model: ArPrior, what: str) -> None:
    numbers = model.quantizer.quantize(pairs(2, 3)[0])
    dot = torch.tensor([1, 6])
    logits = model(numbers, dot, Cond(text=text(2)))
    if what == "text":
        other = model(numbers, dot, Cond(text=text(2, seed=1)))
    else:
        other = model(numbers, dot - 1, Cond(text=text(2)))
    assert float((other - logits).abs().max()) > 1e-3


def test_padding_does_not_change_the_logits(model: ArPrior) -> None:
    numbers = model.quantizer.quantize(pairs(1, 3)[0])
    short = text(1)
    padded = TextEncoding(torch.where(short.mask[..., None], short.tokens, 7.0), *short[1:])
    dot = torch.tensor([3])
    logits = [model(numbers, dot, Cond(text=part)) for part in (short, padded)]
    torch.testing.assert_close(logits[0], logits[1])


def test_cached_and_uncached_logits_agree(model: ArPrior) -> None:
    numbers = model.quantizer.quantize(pairs(3, 3)[0])
    dot = torch.tensor([1, 6, 7])
    cond = Cond(text=text(3))
    whole = model(numbers, dot, cond)
    ready, token, steps = model.prepare(cond), dot, []
    for place in range(K):
        logits, ready = model.step(token, place, ready)
        token = numbers[:, place]
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(model: ArPrior) -> None:
    model = ArPrior(model.config)
    randomise(model, 2)
    logits = model(torch.randint(V, (8, K)), torch.arange(8), Cond(text=text(8)))
    F.cross_entropy(logits.flatten(0, 1), torch.randint(V, (8 * K,))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_a_sample_depends_on_its_own_generator_alone(model: ArPrior) -> None:
    config = ArSamplingConfig(guidance=2.0, top_p=0.9)
    cond, away = Cond(text=text(3)), Cond(text=text(3, seed=9))

    def draw(rows: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(k) for k in range(3)[rows]]
        return sample_autoregressive(model, cond.rows(rows), away.rows(rows), config, generators)

    together, alone = draw(slice(0, 3)), draw(slice(1, 2))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_drawing_follows_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.6, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    numbers = choose(p.log().expand(1000, 3), uniform, 1.0, 1.0)
    torch.testing.assert_close(numbers.bincount(minlength=3) / 1000, p, rtol=0, atol=2e-3)
    few = choose(p.log().expand(1000, 3), uniform, 1.0, 0.7).bincount(minlength=3) / 1000
    torch.testing.assert_close(few, torch.tensor([0, 2 / 3, 1 / 3]), rtol=0, atol=2e-3)
    assert set(choose(p.log().expand(1000, 3), uniform, 1.0, 0.5).tolist()) == {1}
    assert set(choose(p.log().expand(1000, 3), uniform, 0.0, 1.0).tolist()) == {1}
    cold = choose(p.log().expand(1000, 3), uniform, 0.5, 1.0).bincount(minlength=3) / 1000
    torch.testing.assert_close(cold, p.square() / p.square().sum(), rtol=0, atol=2e-3)
