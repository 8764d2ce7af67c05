"""What a training step of the shipped configurations takes on a GPU, by arithmetic alone.

    python benchmarks/arithmetic.py [gpu24/decoder.yaml ...]

Nothing is run: networks and encoders are counted on tensors without data. "Before" is torch's own
group norm and an encoder in float32, "now" what `unclip` does, "compiled" what a compiler can make
of the norm. Milliseconds are those of an A100 that reaches 40 % of its tensor cores' best, 90 % of
its float32 units' and 80 % of its memory's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip.clip.towers import ClipConfig, build_clip
from unclip.config import parse_config
from unclip.text import markdown_table
from unclip.training.counting import flop_counter, step_needs
from unclip.training.plan import _checkpointing, _load

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = [
    f"{stack}/{stage}.yaml"
    for stack in ("gpu24", "dalle2")
    for stage in ("prior", "decoder", "upsampler_256", "upsampler_1024")
]
SPEED = {"float32": 0.9 * 19.5e12, "half": 0.4 * 312e12}  # operations a second
MEMORY = 0.8 * 2.04e12  # bytes a second

# Bytes for each number normalised, from a bf16 picture in channels-last to the next convolution's
# input, going forward and backward.
BYTES = {
    # Forward: to float32 (2 + 4), contiguous (4 + 4), statistics (4), result (4 + 4), SiLU (4 + 4),
    # to bf16 (4 + 2), channels-last (2 + 2). Backward: contiguous (2 + 2), to float32 (2 + 4),
    # SiLU (8 + 4), sums (8), result (8 + 4), to bf16 (4 + 2), channels-last (2 + 2).
    "before": (44, 52),
    # Forward: sum (2), square sum (2), result (2 + 2), SiLU (2 + 2). Backward: SiLU (4 + 2), sum
    # (2), product (4 + 4) and its sum (4), result in two steps (2 + 4, 6 + 2).
    "now": (12, 34),
    # Statistics (2), result with SiLU (2 + 2); sums (4), result (4 + 2).
    "compiled": (6, 10),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", default=SHIPPED, help="below configs/")
    rows = [row(name) for name in parser.parse_args(argv).configs]
    norms = [f"norms {name}: GB, ms" for name in BYTES]
    head = ["a picture", "GFLOP", "ms", *norms, "CLIP: GFLOP", "before: ms, share", "now"]
    print(markdown_table(head, rows))


def row(name: str) -> list[str]:
    """One configuration's numbers, for each picture, crop or caption."""
    run = _load(CONFIGS / name, [])
    batch = 2
    needs = step_needs(run, batch, any(_checkpointing(run.model.model_dump())))
    step = needs.flops / batch
    norms = [
        sum(b * n for b, n in zip(BYTES[kind], needs.normed, strict=True)) / batch / 1e9
        for kind in BYTES
    ]
    encoder = encoder_flops(run)
    seconds = step / SPEED["half"]
    times = [encoder / SPEED[kind] for kind in ("float32", "half")]
    # Of what takes long: the network's arithmetic, its norms, the encoder.
    around = [seconds + 1e9 * gb / MEMORY for gb in norms[:2]]
    clip = [
        f"{1e3 * own:.1f}, {own / (own + rest):.0%}"
        for own, rest in zip(times, around, strict=True)
    ]
    return [
        name.removesuffix(".yaml"),
        f"{step / 1e9:,.0f}",
        f"{1e3 * seconds:.1f}",
        *[f"{gb:.1f}, {1e12 * gb / MEMORY:.1f}" if gb else "–" for gb in norms],
        *([f"{encoder / 1e9:.0f}", *clip] if encoder else ["–"] * 3),
    ]


def encoder_flops(run: Any) -> float:
    """Of one picture and its caption, as far as the run encodes them."""
    if not hasattr(run, "clip"):
        return 0.0
    name = run.clip.partition("/")[0]
    config = parse_config(open_clip.get_model_config(name), ClipConfig, name)
    torch.backends.mha.set_fastpath_enabled(False)  # whose operations no one counts
    with FakeTensorMode(), torch.no_grad():
        model: Any = build_clip(config).eval()
        side = config.vision_cfg.image_size
        with flop_counter() as flops:
            model.encode_image(torch.zeros(1, 3, side, side))
            if run.model.text_width is not None:
                length = config.text_cfg.context_length
                model.encode_text(torch.zeros(1, length, dtype=torch.long))
    return float(flops.get_total_flops())


if __name__ == "__main__":
    main()
