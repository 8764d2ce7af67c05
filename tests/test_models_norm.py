"""The accelerators' group norm against torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from unclip.models.norm import GroupNorm, group_norm

SHAPES = [(2, 8, 4, 6), (1, 6, 1, 1), (3, 12, 5, 5)]


def inputs(shape, dtype, layout, mean=0.0):
    g = torch.Generator().manual_seed(0)
    channels = shape[1]
    x = (torch.randn(shape, generator=g) + mean).to(dtype).to(memory_format=layout)
    grad = torch.randn(shape, generator=g).to(dtype)
    weight, bias = torch.randn(2, channels, generator=g) + 1
    return [t.requires_grad_() for t in (x, weight, bias)], grad


def results(norm, tensors, grad):
    out = norm(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_torchs_group_norm_forward_and_backward(shape, layout):
    tensors, grad = inputs(shape, torch.float32, layout, mean=3.0)
    ours = results(lambda x, w, b: group_norm(x, w, b, 2, 1e-5), tensors, grad)
    theirs = results(lambda x, w, b: F.group_norm(x, 2, w, b, 1e-5), tensors, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_low_precision_only_what_is_stored_is_rounded(dtype):
    """Statistics in bf16 would be off by 0.4 %, the more so far from zero."""
    tensors, grad = inputs((2, 8, 16, 16), dtype, torch.channels_last, mean=5.0)
    out, by_x, by_weight, by_bias = results(
        lambda x, w, b: group_norm(x, w, b, 4, 1e-5), tensors, grad
    )
    wide = [t.detach().float().requires_grad_() for t in tensors]
    exact = results(lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5), wide, grad.float())
    assert out.dtype == by_x.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert by_x.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip((out, by_x), exact, strict=False):
        eps = torch.finfo(dtype).eps / 2
        error = (ours.float() - theirs).abs()
        assert bool((error <= eps * theirs.abs() + 2e-5).all())
    assert_close([by_weight, by_bias], exact[2:], rtol=1e-4, atol=1e-3)


def test_autocast_makes_no_float32_of_it():
    (x, weight, bias), _ = inputs((2, 8, 4, 4), torch.bfloat16, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm(x, weight, bias, 2, 1e-5).dtype == torch.bfloat16


def test_on_the_cpu_it_keeps_torchs_bits():
    (x, weight, bias), _ = inputs((2, 8, 4, 4), torch.float32, torch.channels_last)
    norm = GroupNorm(2, 8)
    norm.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(norm(x), F.group_norm(x, 2, weight, bias))


def test_it_compiles_whole():
    """Compilers take no channels-last `out`."""
    tensors, grad = inputs((2, 8, 4, 4), torch.float32, torch.channels_last)

    def norm(x, weight, bias):
        return group_norm(x, weight, bias, 2, 1e-5)

    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    found, expected = (results(call, tensors, grad) for call in (compiled, norm))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_it_learns_behind_parts_that_are_not_trained(layout):
    (x, weight, bias), grad = inputs((2, 8, 4, 6), torch.float32, layout)
    norm = GroupNorm(2, 8)
    with torch.no_grad():
        norm.weight.copy_(weight), norm.bias.copy_(bias)
    expected = results(lambda x, w, b: group_norm(x, w, b, 2, 1e-5), (x, weight, bias), grad)
    frozen = x.detach()
    for call in (norm, torch.compile(norm, backend="aot_eager", fullgraph=True)):
        norm.zero_grad()
        call(frozen).backward(grad)
        assert_close(norm.weight.grad, expected[2])
        assert_close(norm.bias.grad, expected[3])
        assert not frozen.requires_grad and frozen.grad is None
