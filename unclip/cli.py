"""The shell's verbs: `unclip text "a red apple"`, vary, embed, upscale, info, plan, assemble.

What needs torch is imported inside the verbs, so that a mistyped option answers at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unclip.errors import ConfigError, exit_on_error
from unclip.shell import by_stage, default_model, draw, load, on_terminal, to_device, to_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(
    name="unclip",
    help="Pictures from text, from pictures and from CLIP embeddings (DALL·E 2, unCLIP).",
    epilog="Exit codes: 2 usage or configuration, 3 data, 4 checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
SEEDS = 2**63 - 1
Dtype = Literal["fp32", "fp16", "bf16"]

N = Annotated[int, typer.Option("--n", min=1, help="Pictures for each prompt, or each input.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Picture k uses seed + k.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side in pixels [default: the largest].")]
BY_STAGE = "One value for the decoder, or by stage: prior=…,decoder=…,upsampler_256=…"
Steps = Annotated[str | None, typer.Option(help=f"Sampling steps. {BY_STAGE}")]
Guidance = Annotated[str | None, typer.Option(help=f"Guidance scale, 1 is off. {BY_STAGE}")]
Sampler = Annotated[str | None, typer.Option(help=f"ddpm, ddim, dpm++ or unipc. {BY_STAGE}")]
Tile = Annotated[int | None, typer.Option(help="Upsample in tiles of this side: less memory.")]
Out = Annotated[Path, typer.Option(help="A folder, or a .png file for a single picture.")]
Model = Annotated[
    Path | None,
    typer.Option(help="A model folder, a run or a hub id [default: the shipped weights]."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …, or auto.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep one stage at a time on the device: less memory.")
]
Precision = Annotated[Dtype, typer.Option("--dtype", help="Precision of the networks.")]


@app.command()
def text(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="In quotes.")],
    n: N = 1,
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    prior_candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Embeddings drawn for each picture; the closest is kept [default: the model's].",
        ),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Pictures drawn for each one kept, by CLIP score.")
    ] = 1,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Make pictures of one or several prompts."""
    from unclip.output import Writer

    labels = [prompt for prompt in prompts for _ in range(n)]
    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    options |= {"prior_candidates": prior_candidates, "candidates": candidates}
    writer = Writer(out, len(labels))
    pipe = load(model, device, dtype, offload, writer, options, verb="text")

    def make(rows: slice, first: int) -> list[Image]:
        return pipe.text_to_image(labels[rows], seed=first, **options)

    draw(pipe, make, labels, labels, seed, options["size"], writer)
    several = len(prompts) > 1
    columns = n if several and n > 1 else math.ceil(len(labels) ** 0.5)
    writer.sheet(prompts[0], columns, labels if several else None)


@app.command()
def vary(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE|EMBEDDINGS", help="A picture, .safetensors or .npy.")
    ],
    n: N = 1,
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    eta: Annotated[
        float, typer.Option(min=0, max=1, help="DDIM's fresh noise in the decoder.")
    ] = 1.0,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Make variations of a picture, or pictures of embeddings that `embed` wrote."""
    from unclip.data.images import load_image
    from unclip.embeddings import SUFFIXES, read_embeddings
    from unclip.output import Writer

    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    options["eta"] = eta
    embedded = source.suffix in SUFFIXES
    image = None if embedded else load_image(source)
    writer = Writer(out, n)
    pipe = load(model, device, dtype, offload, writer, options, verb="vary", source=source.name)
    if image is None:
        z_image, keys = read_embeddings(source, pipe.encoder)
    else:
        z_image, keys = pipe.encode_image(image), [source.stem]
    writer.expect(n * len(keys))
    z_image = z_image.repeat_interleave(n, 0)  # (N n, D)

    def make(rows: slice, first: int) -> list[Image]:
        return pipe.image_from_embedding(z_image[rows], seed=first, **options)

    names = [f"{Path(key).stem} variation" for key in keys for _ in range(n)]
    draw(pipe, make, names, None, seed, options["size"], writer)
    columns = n if len(keys) > 1 and n > 1 else math.ceil(len(names) ** 0.5)
    writer.sheet(f"{source.stem} variation", columns)


@app.command()
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
    from tqdm import tqdm

    from unclip.clip import FrozenCLIP
    from unclip.data.images import load_image
    from unclip.embeddings import write_embeddings
    from unclip.folder import resolve_folder
    from unclip.output import free_path, make_folder
    from unclip.pipeline import UnCLIP
    from unclip.stages import BAR_AFTER

    make_folder(out.parent)
    clip = FrozenCLIP.load(str(resolve_folder(model or default_model())))
    encoder = clip.fingerprint  # taken in float32 and kept
    pipe = UnCLIP(clip.to(to_device(device), to_dtype(dtype)))
    bar = tqdm(images, desc="embed", disable=not on_terminal(), delay=BAR_AFTER, leave=False)
    rows = [pipe.encode_image(load_image(path)).float().cpu() for path in bar]
    path = free_path(out)
    write_embeddings(path, torch.cat(rows), [str(image) for image in images], encoder)
    print(path)


@app.command()
def upscale(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture smaller than --size.")],
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Enlarge a picture with the upsamplers; single values of options are for all of them."""
    from unclip.data.images import load_image
    from unclip.output import Writer

    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    picture, writer = load_image(image), Writer(out, 1)
    pipe = load(model, device, dtype, offload, writer, options, verb="upscale", source=image.name)
    larger = pipe.upscale(picture, seed=seed, **options)
    writer.save(larger, f"{image.stem} {larger.width}px", seed)


@app.command()
def info(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A model folder, a run or a hub id [default: the shipped weights]."),
    ] = None,
) -> None:
    """List the stages of a model: parameters, sizes, samplers, encoder, megabytes on disk."""
    from unclip.folder import resolve_folder
    from unclip.summary import model_hash, summarise

    root = resolve_folder(folder or default_model())
    stages = summarise(root)
    print(f"{root}  (model hash {model_hash(root)})")
    for stage in stages:
        print(
            f"{stage.name:<16} {stage.parameters / 1e6:9.2f} M parameters {stage.bytes / 1e6:9.1f} "
            f"MB  {stage.size:<20} {stage.sampling}".rstrip()
        )
    total = sum(stage.bytes for stage in stages) / 1e6
    count = sum(stage.parameters for stage in stages) / 1e6
    print(f"{'total':<16} {count:9.2f} M parameters {total:9.1f} MB")
    encoders = sorted({stage.encoder for stage in stages if stage.encoder})
    print(f"CLIP encoder: {', '.join(encoders) or 'none named'}")


@app.command()
def assemble(
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    clip: Annotated[Path | None, typer.Option(help="Run or model folder of the encoder.")] = None,
    prior: Annotated[Path | None, typer.Option(help="Run or model folder of the prior.")] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Run or model folder of the decoder.")
    ] = None,
    upsampler: Annotated[
        list[Path] | None, typer.Option(help="Run or model folder of upsamplers; repeatable.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the stored weights.")] = "fp32",
) -> None:
    """Collect stages from runs (their newest averaged weights) into one model folder."""
    from unclip.assemble import assemble as collect

    collect(out, clip, prior, decoder, upsampler or [], to_dtype(dtype))
    print(out)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A model folder, a folder like Karlo's, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Precision of the stored weights [default: as they are].")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights too, tensors only.")
    ] = False,
) -> None:
    """Carry a model from Karlo's (diffusers') layout to ours, or from ours to Karlo's."""
    from unclip.folder import resolve_folder
    from unclip.interop.convert import convert as carry

    root = resolve_folder(source, allow_pickle=allow_pickle)
    for note in carry(root, out, to_dtype(dtype) if dtype else None, allow_pickle=allow_pickle):
        print(f"note: {note}", file=sys.stderr)
    print(out)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="Of a prior, a decoder or an upsampler.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there are.")] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="Each holds its share (FSDP2), not a copy (DDP).")
    ] = False,
    memory: Annotated[float, typer.Option(min=1, help="Of one GPU, in GB.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="Of one GPU at its best.")] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share reached.")] = 0.4,
) -> None:
    """Say what a training will need, without allocating it: memory, arithmetic, days."""
    from unclip.training.plan import plan as count
    from unclip.training.plan import report

    needs = count(config, overrides or [], gpus, shard)
    print(report(needs, gpus=gpus, memory=memory, tflops=tflops, utilisation=utilisation))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Errors a person can act on become one paragraph and their exit code."""
    with exit_on_error():
        app(args=None if argv is None else list(argv), prog_name="unclip")
