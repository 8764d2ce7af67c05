"""Conditions: dropping, stacking and choosing rows keep every other row as it was."""

from __future__ import annotations

import pytest
import torch

from unclip.conditioning import Cond, TextEncoding

B, D, L, W = 3, 4, 5, 6


def text(rows: int) -> TextEncoding:
    return TextEncoding(torch.randn(rows, L, W), torch.rand(rows, L) > 0.5, torch.randn(rows, D))


def cond(rows: int = B) -> Cond:
    return Cond(torch.randn(rows, D), None, text(rows), torch.randn(rows, 3, 8, 8))


def test_drop_replaces_only_the_chosen_rows() -> None:
    full, null = cond(), text(1)
    drop_image = torch.tensor([True, False, False])
    drop_text = torch.tensor([False, False, True])
    dropped = full.drop(null, drop_image=drop_image, drop_text=drop_text)
    assert dropped.keep_image is not None
    assert dropped.keep_image.tolist() == [False, True, True]
    assert dropped.image_embed is full.image_embed  # absence is a mask, never a value
    assert dropped.low_res is full.low_res
    assert dropped.text is not None and full.text is not None
    for part, was, empty in zip(dropped.text, full.text, null, strict=True):
        assert torch.equal(part[:2], was[:2])
        assert torch.equal(part[2], empty[0])
    assert full.keep_image is None


def test_drop_never_brings_an_image_back() -> None:
    first = cond().drop(None, drop_image=torch.tensor([True, False, False]))
    again = first.drop(None, drop_image=torch.tensor([False, True, False]))
    assert again.keep_image is not None
    assert again.keep_image.tolist() == [False, False, True]


def test_null_drops_everything_but_the_low_resolution_image() -> None:
    full, null = cond(), text(1)
    dropped = full.null(null)
    assert dropped.keep_image is not None and not dropped.keep_image.any()
    assert dropped.text is not None
    assert all(
        torch.equal(part, n.expand_as(part)) for part, n in zip(dropped.text, null, strict=True)
    )
    assert dropped.low_res is full.low_res


def test_cat_stacks_and_rows_takes_apart() -> None:
    a, b = cond(2), cond(1).drop(None, drop_image=torch.tensor([True]))
    both = Cond.cat([a, b])
    assert len(both) == 3
    assert both.keep_image is not None
    assert both.keep_image.tolist() == [True, True, False]
    assert both.text is not None and both.text.tokens.shape == (3, L, W)
    last = both.rows(slice(2, 3))
    assert last.image_embed is not None and b.image_embed is not None
    assert torch.equal(last.image_embed, b.image_embed)
    assert last.text is not None and b.text is not None
    assert torch.equal(last.text.mask, b.text.mask)


def test_cat_refuses_conditions_with_different_parts() -> None:
    """A part that only later conditions had used to be dropped without a word."""
    with pytest.raises(ValueError, match="some conditions have text"):
        Cond.cat([Cond(torch.randn(1, D)), Cond(torch.randn(1, D), text=text(1))])


def test_prepared_conditions_cannot_change() -> None:
    prepared = Cond(torch.randn(B, D), cache=object())
    with pytest.raises(AssertionError):
        prepared.null(None)
    with pytest.raises(AssertionError):
        Cond.cat([prepared, prepared])


def test_an_empty_condition_has_no_batch_size() -> None:
    with pytest.raises(ValueError, match="no batch size"):
        len(Cond())


def test_text_repeats_prompt_major_and_keeps_its_mask_bool() -> None:
    encoding = text(2)
    repeated = encoding.repeat(3)
    assert torch.equal(repeated.embed[:3], encoding.embed[:1].expand(3, D))
    assert torch.equal(repeated.tokens[3:], encoding.tokens[1:].expand(3, L, W))
    moved = encoding.to("cpu", torch.bfloat16)
    assert moved.tokens.dtype == moved.embed.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool
    assert torch.equal(encoding.rows(slice(1, 2)).mask, encoding.mask[1:])
