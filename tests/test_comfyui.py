"""ComfyUI's nodes, called as ComfyUI calls them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unclip.images import to_tensor
from unclip.pipeline import UnCLIP

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder loaded as ComfyUI loads custom nodes: by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("comfy_unclip", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(nodes: ModuleType, name: str, **inputs: object) -> Any:
    """Run a node with exactly the inputs that it declares."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    assert set(node.INPUT_TYPES()["required"]) == set(inputs)
    (result,) = getattr(node(), node.FUNCTION)(**inputs)
    return result


def test_text_to_image_draws_what_the_library_draws(nodes: ModuleType, pipe: UnCLIP) -> None:
    size = pipe.sizes[0]
    drawn = call(
        nodes, "UnclipTextToImage", model=pipe, prompt="a red apple", n=2, seed=3, size=size
    )
    expected = [to_tensor(x) for x in pipe.text_to_image("a red apple", n=2, seed=3, size=size)]
    assert drawn.shape == (2, size, size, 3)
    assert drawn.min() >= 0 and drawn.max() <= 1
    torch.testing.assert_close(drawn.movedim(-1, 1) * 2 - 1, torch.stack(expected))


def test_a_variation_and_an_upscaled_picture_have_the_size_asked_for(
    nodes: ModuleType, pipe: UnCLIP
) -> None:
    picture = torch.rand(2, 20, 30, 3, generator=torch.Generator().manual_seed(0))
    varied = call(nodes, "UnclipVariations", model=pipe, image=picture, n=2, seed=0, size=0)
    side = pipe.sizes[-1]
    assert varied.shape == (4, side, side, 3)
    small = varied[:1, :8, :8]
    larger = call(nodes, "UnclipUpscale", model=pipe, image=small, seed=0, size=side)
    assert larger.shape == (1, side, side, 3)


def test_a_folder_is_loaded_as_the_library_loads_it(
    nodes: ModuleType, pipe: UnCLIP, model_folder: Path
) -> None:
    model = call(nodes, "UnclipLoad", model=str(model_folder), dtype="fp32")
    assert isinstance(model, UnCLIP)
    size, asked = pipe.sizes[0], {"prompt": "a red apple", "n": 1, "seed": 0}
    drawn = call(nodes, "UnclipTextToImage", model=model, size=size, **asked)
    expected = to_tensor(pipe.text_to_image("a red apple", size=size)[0])
    torch.testing.assert_close(drawn[0].movedim(-1, 0) * 2 - 1, expected)


def test_pictures_keep_their_pixels_both_ways(nodes: ModuleType) -> None:
    pixels = torch.randint(0, 256, (2, 5, 7, 3), generator=torch.Generator().manual_seed(0)) / 255
    torch.testing.assert_close(nodes.to_comfy(nodes.from_comfy(pixels)), pixels)


def test_every_node_has_a_name_people_read(nodes: ModuleType) -> None:
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY == "unclip" and len(node.RETURN_TYPES) == 1
