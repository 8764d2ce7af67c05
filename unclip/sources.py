"""Where models come from: model folders and runs of ours, folders in Karlo's layout, the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.open import from_folder
from unclip.diffusion.process import GaussianDiffusion
from unclip.errors import CheckpointError, ConfigError
from unclip.files.checkpoints import MANIFEST, read_manifest
from unclip.files.diffusers import NO_VARIANTS, PIPELINE, Folder
from unclip.files.disk import sha256
from unclip.files.find import resolve_folder
from unclip.files.folder import WEIGHTS, WEIGHTS_LAST, read_index
from unclip.interop import karlo
from unclip.stages.lora import Lora, Merged
from unclip.stages.stage import Stage
from unclip.stages.stored import StoredStage, read_stage


class Source:
    """A model's stages and encoder, its files checked and its weights not read yet.

    `name` is a folder, a run, whose newest checkpoint it stands for, or a hub id; `variant` the
    copy of the weights to read where others published several, such as fp16. `found`: the name is
    a folder that `resolve_folder` gave, and was checked then.

    **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere.
    """

    def __init__(self, name: str | Path, variant: str | None = None, *, found: bool = False):
        self.root = Path(name) if found else resolve_folder(name)
        self.published: Folder | None = None  # by others, in diffusers' layout
        self.weights: dict[str, list[Path]] = {}  # the files that are read, by stage
        if (self.root / PIPELINE).is_file():
            self.published = folder = Folder(self.root, variant=variant)
            self.stages = karlo.stages(folder)
            self.prior_candidates = karlo.CANDIDATES
            parts: dict[str, tuple[str, ...]] = {"clip": karlo.ENCODER}
            parts |= {name: karlo.PARTS[s.stage.kind] for name, s in self.stages.items()}
            for name, several in parts.items():
                files = [f for p in several if p in folder.parts for f in folder.weights(p)]
                if files:
                    self.weights[name] = files
            return
        if variant is not None:
            raise ConfigError(NO_VARIANTS.format(self.root))
        index = read_index(self.root)
        names = [str(name) for name in index["stages"]]
        self.has_clip = "clip" in names
        for name in names:
            files = [self.root / name / file for file in (WEIGHTS, WEIGHTS_LAST)]
            self.weights[name] = [file for file in files if file.is_file()]
        self.stages = {name: read_stage(self.root, name) for name in names if name != "clip"}
        self.prior_candidates = int(index.get("prior_candidates", 2))

    @cached_property
    def hash(self) -> str:
        """Twelve digits that tell these weights from others: a sha256 over that of each file.

        A checkpoint's manifest, which was compared with its files when they were found, has these.
        """
        known = read_manifest(self.root) if (self.root / MANIFEST).is_file() else {}
        digest = hashlib.sha256()
        for file in (file for files in self.weights.values() for file in files):
            own = file.is_relative_to(self.root)
            entry = known.get(file.relative_to(self.root).as_posix()) if own else None
            digest.update((entry["sha256"] if entry else sha256(file)).encode())
        return digest.hexdigest()[:12]

    def stage(self, name: str) -> StoredStage:
        """One stage. **Raises**: `CheckpointError` naming those that there are."""
        if name not in self.stages:
            there = ", ".join(self.stages) or "none"
            raise CheckpointError(f"no stage {name!r} in {self.root}, which has {there}")
        return self.stages[name]

    def change(self, loras: Iterable[Lora]) -> Source:
        """Have stages' weights read with low-rank changes of theirs, whose files then count too.

        **Raises**: `CheckpointError` if there is no such stage, or a change is of another.
        """
        for lora in loras:
            stored = self.stage(lora.stage)
            stage = stored.stage
            if stage.diffusion is not None:  # what was measured is the base's (Analytic-DPM)
                stage = replace(stage, diffusion=GaussianDiffusion(stage.diffusion.config))
            merged = Merged(stored.tensors, lora)
            self.stages[lora.stage] = replace(stored, stage=stage, tensors=merged)
            self.weights[lora.stage].append(lora.file)
        return self

    def load(
        self, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[FrozenCLIP | None, dict[str, Stage]]:
        """The encoder, if there is one, and all stages by name, with their weights.

        A file is let go of when its network has been read, so that no two are mapped at once; the
        source has no stages left then.
        """
        clip = self.clip(dtype)
        if clip is not None:
            if self.published is None:
                _ = clip.fingerprint  # taken in float32 and kept: in bfloat16 it would not match
            clip = clip.to(device, dtype)
        names = list(self.stages)
        return clip, {name: self.stages.pop(name).load(device, dtype) for name in names}

    def need_clip(self) -> FrozenCLIP:
        """The encoder. **Raises**: `CheckpointError` if there is none."""
        clip = self.clip()
        if clip is None:
            raise CheckpointError(f"{self.root} has no CLIP encoder, which text and pictures need")
        return clip

    def clip(self, dtype: torch.dtype = torch.float32) -> FrozenCLIP | None:
        """The encoder on the CPU, if there is one; what can be read in `dtype` is."""
        if self.published is not None:
            parts = from_folder(self.published, dtype)
            return None if parts is None else FrozenCLIP(*parts)
        return FrozenCLIP.load(str(self.root / "clip")) if self.has_clip else None
