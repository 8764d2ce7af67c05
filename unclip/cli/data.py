"""The verbs that work on data: embed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli.arguments import (
    Device,
    Model,
    Precision,
)
from unclip.cli.shell import default_model, to_device, to_dtype
from unclip.errors import ConfigError

if TYPE_CHECKING:
    pass


def embed(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
) -> None:
    """Write the CLIP image embeddings of pictures, which `vary` reads."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    import torch

    from unclip.cli.output import free_path, make_folder
    from unclip.clip.embeddings import write_embeddings
    from unclip.clip.encoder import FrozenCLIP
    from unclip.files.find import resolve_folder
    from unclip.images import load_image
    from unclip.pipeline import UnCLIP
    from unclip.progress import progress_bar

    make_folder(out.parent)
    clip = FrozenCLIP.load(str(resolve_folder(model or default_model())))
    encoder = clip.fingerprint  # taken in float32 and kept
    pipe = UnCLIP(clip.to(to_device(device), to_dtype(dtype)))
    read = map(load_image, progress_bar(images, "embed"))
    rows = [pipe.encode_image(image).float().cpu() for image in read]
    path = free_path(out)
    write_embeddings(path, torch.cat(rows), [str(image) for image in images], encoder)
    print(path)
