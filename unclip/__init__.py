"""unclip: the DALL·E 2 stack in PyTorch. `from unclip import UnCLIP` is the way in."""

from typing import TYPE_CHECKING, Any

from unclip.torchvision_ops import declare_missing_operators

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

__all__ = ["UnCLIP"]

declare_missing_operators()  # before anything that imports torchvision


def __getattr__(name: str) -> Any:
    """Load the pipeline when it is asked for: it takes seconds to import."""
    if name in __all__:
        from unclip import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
