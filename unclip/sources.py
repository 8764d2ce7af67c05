"""Where models come from: model folders and runs of ours, folders in Karlo's layout, the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.open import from_folder
from unclip.errors import CheckpointError, ConfigError
from unclip.files.diffusers import NO_VARIANTS, PIPELINE, Folder
from unclip.files.find import resolve_folder
from unclip.files.folder import read_index
from unclip.interop import karlo
from unclip.stages.stored import StoredStage, read_stage


class Source:
    """A model's stages and encoder, its files checked and its weights not read yet.

    `name` is a folder, a run, whose newest checkpoint it stands for, or a hub id; `variant` the
    copy of the weights to read where others published several, such as fp16.

    **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere.
    """

    def __init__(self, name: str | Path, variant: str | None = None):
        self.root = resolve_folder(name)
        self.published: Folder | None = None  # by others, in diffusers' layout
        if (self.root / PIPELINE).is_file():
            self.published = Folder(self.root, variant=variant)
            self.stages = karlo.stages(self.published)
            self.prior_candidates = karlo.CANDIDATES
            return
        if variant is not None:
            raise ConfigError(NO_VARIANTS.format(self.root))
        index = read_index(self.root)
        names = [str(name) for name in index["stages"]]
        self.has_clip = "clip" in names
        self.stages = {name: read_stage(self.root, name) for name in names if name != "clip"}
        self.prior_candidates = int(index.get("prior_candidates", 2))

    def stage(self, name: str) -> StoredStage:
        """One stage. **Raises**: `CheckpointError` naming those that there are."""
        if name not in self.stages:
            there = ", ".join(self.stages) or "none"
            raise CheckpointError(f"no stage {name!r} in {self.root}, which has {there}")
        return self.stages[name]

    def clip(self, dtype: torch.dtype = torch.float32) -> FrozenCLIP | None:
        """The encoder on the CPU, if there is one; what can be read in `dtype` is."""
        if self.published is not None:
            parts = from_folder(self.published, dtype)
            return None if parts is None else FrozenCLIP(*parts)
        return FrozenCLIP.load(str(self.root / "clip")) if self.has_clip else None
