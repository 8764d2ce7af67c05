"""Make torchvision importable where its compiled operators are built for another torch.

PyPI's torchvision wheel for Linux is built against CUDA; beside a CPU build of torch its library
does not load, and then `import torchvision` itself fails ("operator torchvision::nms does not
exist") although only its Python transforms are wanted: open_clip imports it, and so do parts of
transformers and diffusers. Declaring the two operators whose fake kernels torchvision registers
unconditionally is enough. Where the library does load nothing is declared.

torch itself calls this, through the entry point `torch.backends`, so that programs which import
torchvision before unclip (`accelerate launch` does) work too. Where unclip is not installed, the
first import of torchvision after that of unclip does, so that `import unclip` needs no torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a Library's declarations live as long as it does


class _Watch:
    """Finds nothing; sees that torchvision is looked for, and has its operators declared."""

    seen = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and not self.seen:
            self.seen = True
            declare_missing_operators()


def declare_when_needed() -> None:
    """Have the operators declared before torchvision is imported for the first time."""
    sys.meta_path.insert(0, _Watch())


def declare_missing_operators() -> None:
    """Declare torchvision's operators unless they are there or its library provides them."""
    import torch  # here, because importing torch calls this function

    spec = importlib.util.find_spec("torchvision")  # first: the watch sees it, and may declare
    if torch.version.cuda or "torchvision._meta_registrations" in sys.modules or _libraries:
        return
    if spec is None or spec.origin is None:
        return
    compiled = [p for p in Path(spec.origin).parent.glob("_C*") if p.suffix in (".so", ".pyd")]
    try:
        for path in compiled:
            torch.ops.load_library(str(path))
        if compiled:
            return
    except (ImportError, OSError):
        pass  # built for another torch, the case that this module is for
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
