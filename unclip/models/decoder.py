"""The decoder: from a CLIP image embedding, and optionally its caption, to pixels (Section 2.1).

B batch, D CLIP embedding, E time embedding, K context width, L text positions, W text width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.models.layers import (
    Draft,
    DraftConfig,
    EmbeddingScale,
    ScaleConfig,
    TimeEmbedding,
    trim_text,
)
from unclip.models.transformer import Transformer, TransformerConfig
from unclip.models.unet import Context, UNet, UNetConfig


class LayoutConfig(DraftConfig):
    """A draft of the picture, `side` pixels wide."""

    side: int = Field(32, gt=0)


class DecoderConfig(Config):
    """`embed`, `text_width`: widths of the CLIP embeddings and text states; no `text_width`, no
    text. `text_embed` adds the CLIP text embedding to the time embedding, as Karlo does.
    `image_tokens`: as how many tokens the image embedding enters the context, 4 in the paper.
    `text_transformer` is trained on top of the frozen text states (the paper's text encoder).
    `layout` draws a small picture from the embedding in one go, which the U-Net sees and which
    stands for its result where there is nothing but noise (target x0 only): where things are is
    what small networks learn last, and alone it is learned in minutes. With `inpaint` the U-Net
    also sees what is known of the picture, in four channels (GLIDE's inpainting, Nichol et al.
    2022). `detail` is a second, small U-Net without attention that corrects the result at finer
    patches than the first one's, or at single pixels: what a large patch blurs where little noise
    is left (see `Detail`)."""

    resolution: int = Field(gt=0)
    embed: int = Field(gt=0)
    text_width: int | None = Field(None, gt=0)
    text_embed: bool = False
    text_transformer: TransformerConfig | None = None
    context_width: int = Field(gt=0)
    image_tokens: int = Field(4, gt=0)
    learned_variance: bool
    scale: ScaleConfig
    layout: LayoutConfig | None = None
    inpaint: bool = False
    unet: UNetConfig
    detail: UNetConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        if self.text_width is None and (self.text_embed or self.text_transformer is not None):
            raise ValueError("text_embed and text_transformer need text_width")
        if self.layout is not None and self.learned_variance:
            raise ValueError("layout needs learned_variance = false")
        if not self.unet.attends:
            raise ValueError("unet.attention must be true somewhere: the context enters there")
        if self.detail is not None and self.detail.attends:
            raise ValueError("detail.attention and detail.mid_attention must be false")
        for name, unet in (("unet", self.unet), ("detail", self.detail)):
            if unet is not None and self.resolution % unet.stride:
                raise ValueError(
                    f"resolution = {self.resolution} must be a multiple of {unet.stride}, what "
                    f"{name}.patch and the levels in {name}.multiple shrink a picture by"
                )
        return self


class DecoderCache(NamedTuple):
    """What does not depend on t: the embeddings' share of the time embedding (B, E); context; the
    layout at the picture's size (B, 3, H, W), if there is one; what is known of the picture
    (B, 4, H, W), for a decoder that is shown it."""

    emb: Tensor
    context: Context
    layout: Tensor | None
    known: Tensor | None


class Decoder(nn.Module):
    """A U-Net told of the image embedding twice: beside the time, and as tokens."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        emb, width = config.unet.embed, config.context_width
        self.scale = EmbeddingScale(config.scale, config.embed)
        self.null_image = nn.Parameter(torch.empty(config.embed))
        nn.init.normal_(self.null_image, std=0.02)  # near the middle of scaled embeddings
        self.time = TimeEmbedding(config.unet.channels, emb)
        self.image_to_emb = nn.Linear(config.embed, emb)
        self.image_to_tokens = nn.Linear(config.embed, config.image_tokens * width)
        self.text_to_emb = nn.Linear(config.embed, emb) if config.text_embed else None
        self.text = TextSide(config) if config.text_width is not None else None
        self.layout = None
        if config.layout is not None:
            self.layout = Draft(config.layout, config.embed, 3 * config.layout.side**2, emb)
        in_channels = 3 + 3 * (config.layout is not None) + 4 * config.inpaint
        out_channels = 6 if config.learned_variance else 3
        self.unet = UNet(config.unet, in_channels, out_channels, width)
        self.detail = Detail(config.detail, out_channels, emb) if config.detail else None

    def prepare(self, cond: Cond) -> Cond:
        """Everything that stays the same over sampling steps.

        **Raises**: `ValueError` if a decoder that was made with text gets none.
        """
        if cond.cache is not None:
            return cond
        if self.text is not None and cond.text is None:
            raise ValueError("this decoder needs cond.text; null text is the encoded empty string")
        z_image = self._image_embed(cond)  # (B, D)
        emb = self.image_to_emb(z_image)  # (B, E)
        if self.text_to_emb is not None and cond.text is not None:
            emb = emb + self.text_to_emb(cond.text.embed.to(z_image.dtype))
        # Karlo's order: the channels of the tokens are interleaved.
        n = self.config.image_tokens
        tokens = rearrange(self.image_to_tokens(z_image), "b (k n) -> b n k", n=n)
        mask = None
        if self.text is not None and cond.text is not None:
            states, mask = self.text(cond.text)  # (B, l, K), (B, l)
            tokens = torch.cat([tokens, states], dim=1)  # (B, n + l, K)
            mask = F.pad(mask, (n, 0), value=True)
        context, layout = self.unet.context_kv(tokens, mask), self.laid_out(z_image)
        known, side = None, self.config.resolution
        if self.config.inpaint:
            nothing = z_image.new_zeros(len(z_image), 4, side, side)
            known = nothing if cond.known is None else cond.known
        return replace(cond, cache=DecoderCache(emb, context, layout, known))

    def laid_out(self, z_image: Tensor) -> Tensor | None:
        """The layout's picture at full size. **Shapes**: (B, D) scaled → (B, 3, H, W)."""
        if self.layout is None or self.config.layout is None:
            return None
        small, side = self.config.layout.side, self.config.resolution
        pixels = rearrange(self.layout(z_image), "b (c h w) -> b c h w", h=small, w=small)
        return F.interpolate(pixels, (side, side), mode="bilinear")

    def _image_embed(self, cond: Cond) -> Tensor:
        # The null vector takes part even where every row is kept, so that it always has a gradient.
        null = self.null_image.expand(len(cond), -1)
        if cond.image_embed is None:
            return null
        z_image = self.scale(cond.image_embed).to(null.dtype)
        return torch.where(cond.kept()[:, None], z_image, null)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """**Shapes**: x_t (B, 3, H, W), t (B,) → (B, 3, H, W), or (B, 6, H, W) with the variance
        behind the prediction."""
        cache = self.prepare(cond).cache
        time = self.time(t)
        emb = time + cache.emb  # (B, E)
        seen = [part.to(x_t.dtype) for part in (x_t, cache.layout, cache.known) if part is not None]
        x = torch.cat(seen, dim=1)  # (B, 3, 6, 7 or 10, H, W)
        out = self.unet(x.to(emb.dtype), emb, cache.context).to(x_t.dtype)
        if self.layout is not None:
            layout = cache.layout.to(x_t.dtype)
            share = self.layout.share(time)[:, :, None, None].to(x_t.dtype)  # (B, 1, 1, 1)
            out = out + share * (layout - out)
        return out if self.detail is None else self.detail(x_t, out, emb)


class Detail(nn.Module):
    """A correction of the decoder's result at full resolution (cf. Chen et al. 2025, DiP).

    A U-Net that folds pixels into large patches has fewer channels for each than it has numbers:
    where little noise is left, what it passes on knows less of the picture than its input did.
    """

    def __init__(self, config: UNetConfig, channels: int, emb: int):
        super().__init__()
        self.emb = nn.Linear(emb, config.embed)
        self.unet = UNet(config, 3 + channels, channels, None)  # starts as no change

    def forward(self, x_t: Tensor, result: Tensor, emb: Tensor) -> Tensor:
        """**Shapes**: x_t (B, 3, H, W), result (B, C, H, W), emb (B, E) → (B, C, H, W)."""
        x = torch.cat([x_t, result], dim=1).to(emb.dtype)  # (B, 3 + C, H, W)
        return result + self.unet(x, self.emb(emb), None).to(result.dtype)


class TextSide(nn.Module):
    """Frozen text states to context tokens, through a trained transformer if there is one."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.text_width is not None
        width, inner = config.text_width, config.text_transformer
        self.proj_in = nn.Linear(width, inner.width) if inner is not None else None
        self.transformer = Transformer(inner) if inner is not None else None
        self.proj = nn.Linear(inner.width if inner is not None else width, config.context_width)
        self.norm = nn.LayerNorm(config.context_width)

    def forward(self, text: TextEncoding) -> tuple[Tensor, Tensor]:
        """**Shapes**: → (B, l, K) and mask (B, l), cut behind the longest real text."""
        tokens, mask = trim_text(text)  # (B, l, W), (B, l)
        tokens = tokens.to(self.proj.weight.dtype)
        if self.proj_in is not None and self.transformer is not None:
            tokens = self.transformer(self.proj_in(tokens), mask[:, None, None])
        return self.norm(self.proj(tokens)), mask
