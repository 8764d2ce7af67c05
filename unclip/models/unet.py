"""The U-Net of the decoder and of the upsamplers (Section 2.1; ADM's blocks as Karlo has them).

B batch, C channels, H and W height and width, N = HW, E time embedding, M context tokens,
K context width, h heads, c channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.config import Config
from unclip.models.layers import attention, run, silu, zero_init
from unclip.models.norm import GroupNorm

Count = Annotated[int, Field(gt=0)]
SHUT = 0.05  # a SiLU that never returns more lets nothing through
LEAST_ALIVE = 0.05  # share of a block's channels


class UNetConfig(Config):
    """Level i has `channels * multiple[i]` channels and `blocks` residual blocks down, one more up:
    as many at every level, or a list.

    `attention` says at which levels every block attends to its own picture and to the context
    tokens, `mid_attention` the same of the middle. `scale_shift`: the time embedding scales as well
    as shifts. `patch`: pixels are folded patch × patch into channels at the ends, which makes small
    networks several times faster. `head`: channels of a last 3 × 3 convolution behind the
    unfolding, which sees across the borders of patches. `groups`: of every group norm. Groups of
    one channel would erase each channel's mean, and with it the picture's colours; groups of fewer
    than 8 channels (16 in bf16) are slow to train on a CPU.
    """

    channels: int = Field(gt=0)
    multiple: list[int] = Field(min_length=1)
    blocks: Count | list[Count]
    attention: list[bool]
    mid_attention: bool
    head_channels: int = Field(64, gt=0)
    scale_shift: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    patch: int = Field(1, gt=0)
    head: int | None = Field(None, gt=0)
    groups: int = Field(32, gt=0)
    checkpointing: bool = False

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if self.channels % 2 or self.channels % self.groups:
            raise ValueError(
                f"channels must be even and a multiple of groups = {self.groups}, got "
                f"{self.channels}"
            )
        if any(m < 1 for m in self.multiple):
            raise ValueError(f"every multiple must be at least 1, got {self.multiple}")
        for name, entries in (("attention", self.attention), ("blocks", self.depths)):
            if len(entries) != len(self.multiple):
                raise ValueError(
                    f"{name} needs one entry for each of the {len(self.multiple)} levels in "
                    f"multiple, got {len(entries)}"
                )
        flags = [*self.attention, self.mid_attention]
        for width, attends in zip([*self.widths, self.widths[-1]], flags, strict=True):
            if attends and width % self.head_channels:
                raise ValueError(f"head_channels = {self.head_channels} must divide width {width}")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from fine to coarse."""
        return [self.channels * m for m in self.multiple]

    @property
    def depths(self) -> list[int]:
        """Blocks down of each level, from fine to coarse."""
        return self.blocks if isinstance(self.blocks, list) else [self.blocks] * len(self.multiple)

    @property
    def embed(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels

    @property
    def attends(self) -> bool:
        """Whether any block attends, and so needs a context."""
        return self.mid_attention or any(self.attention)

    @property
    def stride(self) -> int:
        """What a picture's sides must be multiples of."""
        return self.patch * 2 ** (len(self.multiple) - 1)


class Context(NamedTuple):
    """What the blocks attend to besides the picture, ready for all sampling steps.

    **Shapes**: kv: for each attending block keys and values (B, h, M, c); mask (B, M) bool.
    """

    kv: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


class Attention(nn.Module):
    """Pixels attend to context tokens and to one another in one softmax."""

    def __init__(self, width: int, context_width: int, config: UNetConfig):
        super().__init__()
        self.heads = width // config.head_channels
        self.norm = GroupNorm(config.groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.context_kv = nn.Linear(context_width, 2 * width)
        self.out = zero_init(nn.Linear(width, width))  # a new block changes nothing

    def encode(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the context. **Shapes**: (B, M, K) → two (B, h, M, c)."""
        kv = self.context_kv(context)  # (B, M, 2C)
        k, v = rearrange(kv, "b m (s h c) -> s b h m c", s=2, h=self.heads)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """**Shapes**: x (B, C, H, W); k, v (B, h, M, c); mask (B, M) → (B, C, H, W)."""
        height, width = x.shape[2:]
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")  # (B, N, C), no copy
        qkv = rearrange(self.qkv(pixels), "b n (s h c) -> s b h n c", s=3, h=self.heads)
        k, v = torch.cat([k, qkv[1]], dim=2), torch.cat([v, qkv[2]], dim=2)  # (B, h, M + N, c)
        if mask is not None:
            mask = F.pad(mask, (0, pixels.shape[1]), value=True)[:, None, None]  # every pixel
        h = rearrange(attention(qkv[0], k, v, mask), "b h n c -> b n (h c)")  # (B, N, C)
        return x + rearrange(self.out(h), "b (h w) c -> b c h w", h=height, w=width)


class Block(nn.Module):
    """ADM's residual block, which may also halve or double the picture, then attention."""

    def __init__(
        self,
        width_in: int,
        width: int,
        config: UNetConfig,
        *,
        context_width: int | None = None,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.scale_shift = config.scale_shift
        self.norm1 = GroupNorm(config.groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.embed = nn.Linear(config.embed, width * (2 if config.scale_shift else 1))
        self.norm2 = GroupNorm(config.groups, width)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_init(nn.Conv2d(width, width, 3, padding=1))  # a new block changes nothing
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attention = Attention(width, context_width, config) if context_width else None

    def forward(self, x: Tensor, emb: Tensor, *context: Tensor | None) -> Tensor:
        """**Shapes**: x (B, C, H, W); emb (B, E) after its SiLU; context as in `Attention`."""
        h = silu(self.norm1(x))
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2.0, mode="nearest"), upsampled_conv(h, self.conv1)
        elif self.resample == "down":
            x, h = F.avg_pool2d(x, 2), self.conv1(F.avg_pool2d(h, 2))
        else:
            h = self.conv1(h)  # (B, C', H', W')
        emb = self.embed(emb)[:, :, None, None]  # (B, C' or 2C', 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        x = self.skip(x) + self.conv2(self.dropout(silu(h)))
        return self.attention(x, *context) if self.attention is not None else x


def upsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution of a picture doubled by nearest neighbour, which is never made.

    Every result reads 2 x 2 of the small picture's pixels: a transposed convolution whose 4 x 4
    kernel is the 3 x 3 one spread over the doubled pixels, with 4/9 of the arithmetic.

    **Shapes**: x (B, C, H, W) → (B, C', 2H, 2W).
    """
    flipped = F.pad(conv.weight.flip(2, 3), (1, 1, 1, 1))  # (C', C, 5, 5)
    spread = flipped[:, :, :-1] + flipped[:, :, 1:]
    spread = spread[:, :, :, :-1] + spread[:, :, :, 1:]  # (C', C, 4, 4)
    return F.conv_transpose2d(x, spread.transpose(0, 1), conv.bias, stride=2, padding=1)


class UNet(nn.Module):
    """Blocks going down, in the middle, and up again with every way-down result concatenated."""

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, context_width: int | None
    ):
        super().__init__()
        assert context_width or not config.attends, "attention needs a context"
        self.config = config
        patch = config.patch**2
        self.conv_in = nn.Conv2d(in_channels * patch, config.channels, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        at_level = [context_width if attends else None for attends in config.attention]
        width, skips = config.channels, [config.channels]
        for level, out in enumerate(config.widths):
            for _ in range(config.depths[level]):
                self.down.append(Block(width, out, config, context_width=at_level[level]))
                width = out
                skips.append(width)
            if level < len(config.widths) - 1:
                self.down.append(Block(width, width, config, resample="down"))
                skips.append(width)
        middle = context_width if config.mid_attention else None
        self.mid.append(Block(width, width, config, context_width=middle))
        self.mid.append(Block(width, width, config))
        for level, out in reversed(list(enumerate(config.widths))):
            for _ in range(config.depths[level] + 1):
                fan_in = width + skips.pop()
                self.up.append(Block(fan_in, out, config, context_width=at_level[level]))
                width = out
            if level > 0:
                self.up.append(Block(width, width, config, resample="up"))
        self.norm_out = GroupNorm(config.groups, width)
        last = out_channels if config.head is None else config.head
        self.conv_out = nn.Conv2d(width, last * patch, 3, padding=1)
        self.head = None if config.head is None else nn.Conv2d(last, out_channels, 3, padding=1)
        zero_init(self.conv_out if self.head is None else self.head)  # starts as no picture
        for conv in self.modules():  # channels-last convolutions are the faster ones
            if isinstance(conv, nn.Conv2d):
                conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)

    def context_kv(self, tokens: Tensor, mask: Tensor | None) -> Context:
        """What stays the same over sampling steps. **Shapes**: tokens (B, M, K); mask (B, M)."""
        return Context([block.attention.encode(tokens) for block in self._attending()], mask)

    def _attending(self) -> list[Any]:
        """The blocks that attend, in the order of `Context.kv`."""
        blocks = [*self.down, *self.mid, *self.up]
        return [block for block in blocks if block.attention is not None]

    def forward(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """**Shapes**: x (B, in, H, W) with sides that `stride` divides; emb (B, E).

        **Raises**: `ValueError` for sides that can't be halved often enough.
        """
        if x.shape[2] % self.config.stride or x.shape[3] % self.config.stride:
            size = f"{x.shape[3]}x{x.shape[2]}"
            raise ValueError(f"image is {size}; sides must be multiples of {self.config.stride}")
        told: dict[nn.Module, tuple[Tensor | None, ...]] = {}
        if context is not None:
            pairs = zip(self._attending(), context.kv, strict=True)
            told = {block: (*kv, context.mask) for block, kv in pairs}

        def step(block: nn.Module, x: Tensor) -> Tensor:
            extra = told.get(block, ())
            return run(block, x, emb, *extra, checkpointing=self.config.checkpointing)

        emb = F.silu(emb)  # the same in every block
        x = self.conv_in(F.pixel_unshuffle(x, self.config.patch))  # (B, C, H/p, W/p)
        skips = [x]
        for block in self.down:
            x = step(block, x)
            skips.append(x)
        for block in self.mid:
            x = step(block, x)
        for block in self.up:
            if block.resample is None:
                x = torch.cat([x, skips.pop()], dim=1)
            x = step(block, x)
        x = self.conv_out(silu(self.norm_out(x)))  # (B, out·p², H/p, W/p)
        x = F.pixel_shuffle(x, self.config.patch)  # (B, out, H, W)
        return x if self.head is None else self.head(silu(x))


@contextmanager
def dead_blocks(network: nn.Module) -> Iterator[list[str]]:
    """The names of residual blocks that give every picture the same, filled in at the end.

    Of what passes meanwhile, hardly a channel comes through a dead block's second SiLU: far below
    zero it returns nothing and has no slope that would lead back (Lu et al. 2019 say it of ReLU).
    """
    dead: list[str] = []
    highest: dict[str, Tensor] = {}  # by block, of each channel so far (C',)

    def seen_by(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            now = inputs[0].detach().abs().amax((0, 2, 3))
            highest[name] = torch.maximum(now, highest.get(name, now))

        return see

    with ExitStack() as hooks:
        for name, block in network.named_modules():
            if isinstance(block, Block):
                hooks.enter_context(block.conv2.register_forward_pre_hook(seen_by(name)))
        yield dead
    alive = {name: (channels > SHUT).float().mean() for name, channels in highest.items()}
    dead += [name for name, share in alive.items() if share < LEAST_ALIVE]
