"""unclip: the DALL·E 2 stack in PyTorch. `UnCLIP` is the way in."""

import unclip.torchvision_ops  # noqa: F401  before anything that imports torchvision
