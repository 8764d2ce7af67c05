"""The frozen CLIP encoder (Section 2), its towers, and where encoders come from."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.clip.encoder import FrozenCLIP

__all__ = ["FrozenCLIP"]


def __getattr__(name: str) -> Any:
    """`from unclip.clip import FrozenCLIP`, without loading towers for those who need none."""
    if name in __all__:
        from unclip.clip import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
