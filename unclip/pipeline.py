"""UnCLIP: CLIP text → prior → CLIP image embedding → decoder → upsamplers (Section 2).

B pictures, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch
from PIL import Image

from unclip import edit
from unclip.errors import ConfigError
from unclip.files.disk import check_writable, from_home
from unclip.files.folder import update_index
from unclip.hub import push
from unclip.inputs import Picture, as_device, as_pictures
from unclip.precision import default_dtype
from unclip.sources import Source
from unclip.stack import Stack
from unclip.stages.lora import read_loras

P = ParamSpec("P")


def _listed(draw: Callable[P, Iterator[Image.Image]]) -> Callable[P, list[Image.Image]]:
    @wraps(draw)
    def drawn(*arguments: P.args, **named: P.kwargs) -> list[Image.Image]:
        return list(draw(*arguments, **named))

    drawn.__annotations__ = {**draw.__annotations__, "return": "list[Image.Image]"}
    return drawn


class UnCLIP(Stack):
    """The stack, from disk and back, with all that it does. Stages may be missing: then what needs
    them says so.

    Image k of a call uses one float32 CPU generator seeded `seed + k` through all stages.

    **Raises**: `CheckpointError` if stages were trained with different CLIP encoders.
    """

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | Source,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        upsampler_1024: str | Path | None = None,
        offload: bool = False,
        variant: str | None = None,
        lora: Sequence[str | Path] = (),
    ) -> UnCLIP:
        """Load a model folder, a run folder (its newest checkpoint) or one in Karlo's layout.

        `folder` is on this machine or a hub id such as `kakaobrain/karlo-v1-alpha`; `variant` the
        copy of the weights to read where there are several, such as fp16. Without `dtype` networks
        compute in half precision on an accelerator, in float32 on a CPU.
        `upsampler_1024` is a folder from which that stage is taken. With `offload` weights stay in
        main memory and only the stage at work is on `device`. `lora` are folders, runs or hub ids
        of low-rank changes of its stages, which are merged into the weights as these are read.

        **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere,
        `ConfigError` for a device that can't be used here.
        """
        device = as_device(device)
        dtype = default_dtype(device) if dtype is None else dtype
        source = folder if isinstance(folder, Source) else Source(folder, variant)
        source.change(read_loras(lora))
        if upsampler_1024 is not None:
            source.stages["upsampler_1024"] = Source(upsampler_1024).stage("upsampler_1024")
        clip, stages = source.load("cpu" if offload else device, dtype)
        return cls(
            clip,
            stages.get("prior"),
            stages.get("decoder"),
            [stage for stage in stages.values() if stage.kind == "upsampler"],
            device,
            dtype,
            source.prior_candidates,
            stages.get("ar_prior"),
        )

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        push_to_hub: str | None = None,
        **more: Any,
    ) -> None:
        """Write every stage as a model folder, in `dtype` or as they are.

        `push_to_hub` is a name on the hub (owner/name) to which it is then sent, with `more` as
        keywords of `hub.push`: private, revision, licence, notes, token.

        **Raises**: `ConfigError` if nothing can be written there.
        """
        folder = from_home(folder)
        check_writable(folder, "folder")
        if self.clip is not None:
            self.clip.save(folder, dtype)
        for stage in self.stages:
            stage.save(folder, dtype=dtype)
        update_index(folder, prior_candidates=self.prior_candidates)
        if push_to_hub is not None:
            push(folder, push_to_hub, **more)

    def text_to_image(
        self, prompt: str | Sequence[str], n: int = 1, seed: int | None = 0, **options: Any
    ) -> list[Image.Image]:
        """n pictures for each prompt, prompt-major; see `Options` for the rest."""
        return list(self.iterate(prompt, n, seed, **options))

    def image_from_embedding(
        self,
        z_image: Any,
        text: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int | None = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures for each raw CLIP image embedding, with an optional caption for each.

        **Shapes**: z_image (B, D). **Raises**: `ConfigError` for another width, `DataError` for
        numbers that are not finite.
        """
        if z_image is None:
            raise ConfigError("no embeddings; to make pictures of a text call text_to_image")
        return list(self.iterate(text, n, seed, z_image=z_image, **options))

    def variations(
        self,
        image: Picture | Sequence[Picture],
        n: int = 1,
        seed: int | None = 0,
        inverted: bool = False,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures with the same CLIP embedding as a given one (Section 3.1); see `varied`.

        `inverted`: from its x_T as well, and the less like it the larger `eta`; 0 `reconstruct`s.
        """
        if inverted:
            return list(edit.vary(self, image, n, seed, **options))
        return list(self.iterate(n=n, seed=seed, image=as_pictures(image), **options))

    # Section 3: pictures as pairs (z_image, x_T), and parts of pictures.
    # Those of `edit` give pictures as they are ready, these a list.
    invert, noise, reconstruct = edit.invert, edit.noise, edit.reconstruct
    redraw, interpolate = _listed(edit.redraw), _listed(edit.interpolate)
    text_diff, mix, inpaint = _listed(edit.text_diff), _listed(edit.mix), _listed(edit.inpaint)
