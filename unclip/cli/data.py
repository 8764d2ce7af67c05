"""The verbs that work on data: embed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.arguments import Device, Model, Pictures, Precision, Variant
from unclip.cli.shell import default_model, precision, to_device
from unclip.errors import ConfigError, DataError, UnclipWarning


def embed(
    images: Pictures,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Model = None,
    variant: Variant = None,
    device: Device = "auto",
    dtype: Precision = None,
) -> None:
    """Write the CLIP image embeddings of pictures, which `vary` reads.

    Pictures that can't be read are left out and named.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")

    import torch

    from unclip.data.embeddings import write_embeddings
    from unclip.files.disk import check_writable
    from unclip.pipeline import UnCLIP
    from unclip.progress import progress_bar
    from unclip.sources import Source

    check_writable(out.parent, "--out")
    clip = Source(model or default_model(), variant).need_clip()
    encoder = clip.fingerprint  # taken in float32 and kept
    where = to_device(device)
    pipe = UnCLIP(clip.to(where, precision(dtype, where)), device=where)
    rows, keys = [], []
    for path in progress_bar(images, "embed"):
        try:
            rows.append(pipe.encode_image(path).float().cpu())
            keys.append(str(path))
        except DataError as error:
            warnings.warn(f"left out: {error}", UnclipWarning, stacklevel=2)
    if not rows:
        raise DataError(f"none of {len(images)} pictures can be used")
    print(write_embeddings(out, torch.cat(rows), keys, encoder))
