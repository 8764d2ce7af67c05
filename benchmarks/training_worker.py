"""Training steps on command, for training.py: a line in, a step done, its seconds out.

Runs in the environment of whoever is measured; needs torch and, for `dalle2_pytorch`, that package.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from machine import memory, reset_peak


def commanded(facts: dict[str, Any]) -> Iterator[None]:
    """Hold every step until it is asked for; tell what the one before took.

    A line with `end` in it tells the memory peak and ends the process.
    """
    say(facts | {"resident": memory("VmRSS"), "threads": torch.get_num_threads()})
    reset_peak()
    while sys.stdin.readline().strip() == "step":
        begun = time.perf_counter()
        yield
        say({"seconds": time.perf_counter() - begun, "peak": memory("VmHWM")})
    sys.exit()


def say(facts: dict[str, Any]) -> None:
    """One line of JSON, on the standard output."""
    print(json.dumps(facts), flush=True)


def dalle2_pytorch(batch: int, precision: str) -> None:
    """The peer's own trainer on its own decoder, from embeddings, at 64 px."""
    from accelerate import Accelerator
    from dalle2_pytorch import Decoder, DecoderTrainer, Unet
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    unet = Unet(
        dim=64,
        dim_mults=(1, 2, 3, 4),
        image_embed_dim=512,
        cond_dim=256,
        attn_heads=4,
        attn_dim_head=64,
        num_resnet_blocks=2,
        self_attn=(False, False, True, True),
    )
    decoder = Decoder(unet=unet, image_size=64, timesteps=1000, learned_variance=True)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    trainer = DecoderTrainer(decoder, accelerator, lr=1e-4, wd=0.01, max_grad_norm=1.0)
    trainer.train()
    images, embeds = torch.rand(batch, 3, 64, 64), torch.randn(batch, 512)
    with FlopCounterMode(display=False) as counter:
        trainer(images, image_embed=embeds, unet_number=1)
    trainer.update(1)
    count = sum(p.numel() for p in unet.parameters())
    facts = {"parameters": count, "flops": counter.get_total_flops(), "precision": precision}
    for _ in commanded(facts):
        trainer(images, image_embed=embeds, unet_number=1)
        trainer.update(1)


if __name__ == "__main__":
    dalle2_pytorch(int(sys.argv[1]), sys.argv[2])
