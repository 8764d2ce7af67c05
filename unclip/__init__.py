"""unclip: the DALL·E 2 stack in PyTorch. `from unclip import UnCLIP` is the way in."""

from typing import TYPE_CHECKING, Any

from unclip.torchvision_ops import declare_when_needed

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

__all__ = ["UnCLIP", "__version__"]
__version__ = "0.1.0"

declare_when_needed()  # before anything imports torchvision


def __getattr__(name: str) -> Any:
    """Load the pipeline when it is asked for: it takes seconds to import."""
    if name == "UnCLIP":
        from unclip.pipeline import UnCLIP

        return UnCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
