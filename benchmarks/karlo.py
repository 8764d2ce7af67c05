"""A Karlo of a quarter of the width: our networks beside diffusers' on the same weights.

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from machine import machine_peak
from speed import TEXT, Watch, watched
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from unclip.errors import exit_on_error
from unclip.files.disk import write_json
from unclip.interop.encoder import write_tokenizer
from unclip.pipeline import UnCLIP
from unclip.text import markdown_table

CONTEXT = 77
PRIOR, DECODER, UPSAMPLER = "prior", "decoder", "upsampler_256"
STEPS = {PRIOR: 25, DECODER: 25, UPSAMPLER: 7}
PROMPTS = ["a red apple", "two dogs playing in the snow", "a castle at night", "a blue bicycle"]
WIDTHS = {"quarter": (64, 192, 8), "half": (128, 384, 16)}  # U-Net channels, embedding, prior heads


def build(folder: Path, width: str) -> None:
    """Write a Karlo of that width with random weights, small enough not to explode."""
    channels, embed, heads = WIDTHS[width]
    torch.manual_seed(0)
    blocks = [channels * m for m in (1, 2, 3, 4)]
    flat: dict[str, Any] = {
        "block_out_channels": blocks,
        "layers_per_block": 3,
        "norm_num_groups": 32,
    }
    sides: dict[str, Any] = {
        "sample_size": 256,
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
    }
    sides |= {
        "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    }
    write_tokenizer(folder / "tokenizer", CONTEXT)
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    fixed = {"variance_type": "fixed_small_log", "prediction_type": "epsilon"}
    prior = {"variance_type": "fixed_small_log", "prediction_type": "sample"}
    parts: dict[str, Any] = {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=embed,
                intermediate_size=4 * embed,
                projection_dim=embed,
                num_hidden_layers=12,
                num_attention_heads=embed // 64,
                bos_token_id=49406,
                eos_token_id=49407,
                pad_token_id=0,
            )
        ),
        "prior": PriorTransformer(
            num_attention_heads=heads, num_layers=20, embedding_dim=embed, num_embeddings=CONTEXT
        ),
        "decoder": UNet2DConditionModel(
            sample_size=64,
            out_channels=6,
            in_channels=3,
            down_block_types=["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
            up_block_types=[*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=2 * embed,
            attention_head_dim=64,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
            **flat,
        ),
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=embed, time_embed_dim=4 * channels, cross_attention_dim=2 * embed
        ),
        "super_res_first": UNet2DModel(**sides, **flat),
        "super_res_last": UNet2DModel(**sides, **flat),
        "prior_scheduler": UnCLIPScheduler(clip_sample_range=5.0, **prior),
        "decoder_scheduler": UnCLIPScheduler(**learned),
        "super_res_scheduler": UnCLIPScheduler(**fixed),
    }
    nn.init.ones_(parts["prior"].clip_std)
    with quiet():
        UnCLIPPipeline(**parts).save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' word that its pipelines are deprecated: that is why we are here."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_theirs(folder: Path) -> UnCLIPPipeline:
    """Their pipeline, part by part: its own `from_pretrained` no longer can."""
    kinds: dict[str, Any] = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModelWithProjection,
        "prior": PriorTransformer,
        "decoder": UNet2DConditionModel,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": UNet2DModel,
        "super_res_last": UNet2DModel,
        "prior_scheduler": UnCLIPScheduler,
        "decoder_scheduler": UnCLIPScheduler,
        "super_res_scheduler": UnCLIPScheduler,
    }
    with quiet():
        made = UnCLIPPipeline(
            **{part: kind.from_pretrained(folder / part) for part, kind in kinds.items()}
        )
    made.set_progress_bar_config(disable=True)
    return made


class Theirs:
    """diffusers' pipeline, timed between the first calls of its networks."""

    def __init__(self, folder: Path):
        self.pipe = load_theirs(folder)
        self.first: dict[str, float] = {}
        for name in ("text_encoder", "prior", "text_proj", "super_res_first"):
            part = getattr(self.pipe, name)
            part.register_forward_pre_hook(lambda *_, name=name: self._note(name))

    def _note(self, name: str) -> None:
        self.first.setdefault(name, time.perf_counter())

    def __call__(self, prompts: list[str]) -> tuple[list[Any], dict[str, float]]:
        self.first = {}
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        begun = time.perf_counter()
        images = self.pipe(
            prompts,
            generator=generators,
            prior_num_inference_steps=STEPS[PRIOR],
            decoder_num_inference_steps=STEPS[DECODER],
            super_res_num_inference_steps=STEPS[UPSAMPLER],
        ).images
        end, first = time.perf_counter(), self.first
        return images, {
            TEXT: first["prior"] - first["text_encoder"],
            PRIOR: first["text_proj"] - first["prior"],
            DECODER: first["super_res_first"] - first["text_proj"],
            UPSAMPLER: end - first["super_res_first"],
            "all": end - begun,
        }


class Ours:
    """Our pipeline on the same folder, its stages watched from outside."""

    def __init__(self, folder: Path):
        self.pipe = UnCLIP.from_pretrained(folder)

    def __call__(self, prompts: list[str], counting: bool = False) -> tuple[list[Any], Any]:
        watch = Watch()
        watch.counting = counting
        begun = time.perf_counter()
        with watched(watch):
            images = self.pipe.text_to_image(prompts, seed=0, steps=STEPS)
        seconds = {name: cost.seconds for name, cost in watch.costs.items()}
        if counting:
            return images, {name: cost.flops for name, cost in watch.costs.items()}
        return images, seconds | {"all": time.perf_counter() - begun}


def bandwidth(seconds: float = 1.0) -> float:
    """The best GB/s of reading weights: products of large matrices and one vector."""
    weights, x = torch.randn(8, 4096, 2048), torch.randn(2048, 6)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        for weight in weights:
            weight @ x
        best = max(best, weights.numel() * 4 / (time.perf_counter() - begun) / 1e9)
    return best


class Peak:
    """The most memory above that at the start, looked at every two milliseconds: anonymous, and
    resident (with the files that are mapped)."""

    def __enter__(self) -> Peak:
        self.base = self.peak = _held()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(0.002):
            self.peak = np.maximum(self.peak, _held())

    def bytes(self) -> tuple[int, int]:
        """How much more than at the start, now included."""
        self.peak = np.maximum(self.peak, _held())
        anonymous, resident = (self.peak - self.base).tolist()
        return anonymous, resident


def _held() -> np.ndarray:
    """Anonymous and resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, files = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return np.array([anonymous, anonymous + files])


def memory_of(folder: Path, who: str, dtype: str) -> dict[str, int]:
    """Peaks of loading and of one picture, in a process of its own."""
    job = [sys.executable, __file__, "--folder", str(folder), "--memory-of", who, "--dtype", dtype]
    done = subprocess.run(job, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _memory(folder: Path, who: str, dtype: str) -> dict[str, int]:
    from transformers import CLIPTextModelWithProjection  # noqa: F401  # imports are not counted

    with Peak() as peak:
        if who == "ours":
            pipe: Any = UnCLIP.from_pretrained(folder, dtype=getattr(torch, dtype))
        else:
            pipe = load_theirs(folder)
        loading, _ = peak.bytes()
        if dtype == "float32":
            if who == "ours":
                pipe.text_to_image(PROMPTS[0], steps=STEPS)
            else:
                pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0))
    files = sum(f.stat().st_size for f in folder.glob("*/*.safetensors"))
    anonymous, resident = peak.bytes()
    return {"loading": loading, "peak": anonymous, "resident": resident, "weights": files}


@torch.no_grad()
def measure(folder: Path, repeat: int) -> dict[str, Any]:
    """Both pipelines by turns, then ours on four prompts, its arithmetic, and memory."""
    memory = {who: memory_of(folder, who, "float32") for who in ("ours", "theirs")}
    ours, theirs = Ours(folder), Theirs(folder)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": [], "four": []}
    difference = 0
    for _ in range(repeat):
        a, seconds = ours(PROMPTS[:1])
        runs["ours"].append(seconds)
        b, seconds = theirs(PROMPTS[:1])
        runs["theirs"].append(seconds)
        difference = max(difference, int(np.abs(np.int16(a[0]) - np.int16(b[0])).max()))
        runs["four"].append(ours(PROMPTS)[1])
    flops = ours(PROMPTS[:1], counting=True)[1]
    best, what = machine_peak()
    prior = ours.pipe.prior
    assert prior is not None
    read = sum(p.numel() * 4 for n, p in prior.network.named_parameters() if "text" not in n)
    median = {
        who: {key: statistics.median(run[key] for run in several) for key in several[0]}
        for who, several in runs.items()
    }
    return {
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "difference": difference,
        "flops": flops,
        "machine_gflops": best,
        "machine_gflops_of": what,
        "bandwidth": bandwidth(),
        "prior_bytes_per_step": read,
        "memory": memory,
    }


def report(data: dict[str, Any]) -> str:
    """The tables, as markdown."""
    ours, theirs, four = (data["seconds"][who] for who in ("ours", "theirs", "four"))
    rows = []
    for name in (TEXT, PRIOR, DECODER, UPSAMPLER, "all"):
        rate = data["flops"].get(name, 0) / ours[name] / 1e9
        rows.append(
            [
                name,
                f"{theirs[name]:.2f}",
                f"{ours[name]:.2f}",
                f"{theirs[name] / ours[name]:.2f} x",
                f"{four[name] / len(PROMPTS) / ours[name]:.2f}",
                f"{100 * rate / data['machine_gflops']:.0f} %" if rate else "-",
            ]
        )
    header = ["stage", "diffusers s", "ours s", "faster", "a picture of four", "of peak arithmetic"]
    reads = data["prior_bytes_per_step"] * STEPS[PRIOR] / ours[PRIOR] / 1e9
    share = 100 * reads / data["bandwidth"]
    memory = {
        who: f"{m['peak'] / 1e6:.0f} MB (loading {m['loading'] / 1e6:.0f}, "
        f"resident {m['resident'] / 1e6:.0f})"
        for who, m in data["memory"].items()
    }
    weights = data["memory"]["ours"]["weights"] / 1e6
    return "\n".join(
        [
            markdown_table(header, rows),
            "",
            f"Medians of {data['repeat']} runs by turns, {data['threads']} threads, steps "
            f"{'/'.join(map(str, STEPS.values()))}; pictures differ by at most "
            f"{data['difference']}/255.",
            f"The prior reads its weights at {reads:.1f} GB/s, {share:.0f} % of the "
            f"{data['bandwidth']:.1f} GB/s measured here; peak arithmetic "
            f"{data['machine_gflops']:.0f} GFLOP/s ({data['machine_gflops_of']}).",
            f"Anonymous memory: ours {memory['ours']}, diffusers {memory['theirs']}; "
            f"weights {weights:.0f} MB.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build the folder once, measure, save, print."""
    parser = argparse.ArgumentParser(description="Ours beside diffusers' unCLIP, same weights.")
    parser.add_argument("--folder", default="runs/benchmarks/karlo-quarter", type=Path)
    parser.add_argument("--width", default="quarter", choices=WIDTHS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/karlo.json", type=Path)
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help="loading alone, then JSON")
    parser.add_argument("--dtype", default="float32", help="of --memory-of ours")
    given = parser.parse_args(argv)
    with exit_on_error():
        if not (given.folder / "model_index.json").is_file():
            build(given.folder, given.width)
        if given.memory_of:
            print(json.dumps(_memory(given.folder, given.memory_of, given.dtype)))
            return
        data = measure(given.folder, given.repeat)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, data)
        print(report(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
