"""unclip: the DALL·E 2 stack in PyTorch. `UnCLIP`, in `unclip.pipeline`, is the way in."""

from unclip.torchvision_ops import declare_missing_operators

declare_missing_operators()  # before anything that imports torchvision
