"""The web page's functions, called as the page calls them."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from unclip.app import verbs
from unclip.app.forms import TABS
from unclip.app.page import _said, form_of, page
from unclip.app.studio import Look, Made, Studio, models_near
from unclip.cli.output import encoded, read_about
from unclip.errors import CheckpointError, ConfigError, DataError
from unclip.images import to_pil
from unclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def studio(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    studio = Studio(tmp_path_factory.mktemp("out"), torch.device("cpu"), torch.float32)
    studio.open(str(model_folder))
    return studio


@pytest.fixture
def apple(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "apple.png")
    return tmp_path / "apple.png"


def drawn(studio: Studio, verb: verbs.Verb, seed: int | None = 3, **given: Any) -> list[Made]:
    assert studio.model is not None
    options = verb.options(size=given.pop("size", 32), steps=given.pop("steps", 0))
    events = list(studio.draw(verb, studio.model.name, seed, options, given))
    assert any(isinstance(event, Look) for event in events)
    return [event for event in events if isinstance(event, Made)]


def test_text_draws_what_the_library_draws_and_its_png_says_how(
    studio: Studio, pipe: UnCLIP
) -> None:
    made = drawn(studio, verbs.TEXT, caption="a red apple", n=2)
    expected = pipe.text_to_image("a red apple", n=2, seed=3, size=32)
    for one, picture in zip(made, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one.path)), np.asarray(picture))
    about = read_about(made[1].path)
    assert (about["prompt"], about["seed"], made[1].seed) == ("a red apple", 4, 4)
    assert about["settings"]["verb"] == "text" and about["settings"]["given"] == {"n": 2}


def test_every_other_verb_draws(studio: Studio, apple: Path) -> None:
    mask = Image.new("RGBA", (20, 16))
    mask.paste((255, 0, 0, 255), (0, 0, 10, 16))
    painted = {"background": Image.open(apple), "layers": [mask]}
    weights = {"first_weight": 0.5, "second_weight": 0.5, "caption_weight": 1.0}
    assert len(drawn(studio, verbs.VARY, picture=apple, change=1, n=2)) == 2
    assert len(drawn(studio, verbs.VARY, steps=2, picture=apple, change=0.5, n=1)) == 1
    mixed = {"first": apple, "second": None, "caption": "a red apple", "n": 1}
    assert len(drawn(studio, verbs.MIX, **mixed, **weights)) == 1
    ends = {"first": apple, "second": apple, "frames": 3, "fixed_noise": True}
    assert [one.seed for one in drawn(studio, verbs.INTERPOLATE, steps=2, **ends)] == [3, 3, 3]
    turned = {"picture": apple, "source": "", "caption": "a red apple", "strength": "0,0.5"}
    assert len(drawn(studio, verbs.EDIT, steps=2, **turned)) == 2
    new = {"caption": "", "strength": 1, "repeats": 1, "n": 1}
    assert len(drawn(studio, verbs.INPAINT, steps=2, painted=painted, **new)) == 1
    assert len(drawn(studio, verbs.UPSCALE, picture=apple)) == 1


def sampled(made: Made) -> tuple[int, float]:
    about = read_about(made.path)["settings"]["sampling"]["decoder"]
    return about["steps"], about["eta"]


def test_pngs_say_how_their_decoder_drew(studio: Studio, apple: Path) -> None:
    """Those of variations and inpainting named the model's own sampling, of edits no strength."""
    (made,) = drawn(studio, verbs.VARY, steps=2, picture=apple, change=0.5, n=1)
    assert sampled(made) == (2, 0.5)
    (made,) = drawn(studio, verbs.VARY, picture=apple, change=1, n=1)
    assert sampled(made) == (2, 1)
    painted = {"background": Image.open(apple), "layers": [Image.new("RGBA", (20, 16), "red")]}
    new = {"caption": "a hat", "strength": 0.1, "repeats": 1, "n": 1}
    (made,) = drawn(studio, verbs.INPAINT, painted=painted, **new)
    about = read_about(made.path)
    assert sampled(made) == (5, 0) and about["settings"]["given"]["mask"] == "painted"
    turned = {"picture": apple, "source": "", "caption": "a hat", "strength": "0,0.5"}
    made = drawn(studio, verbs.EDIT, steps=2, **turned)
    assert [read_about(one.path)["settings"]["given"]["strength"] for one in made] == [0, 0.5]


def test_a_png_of_the_shell_fills_the_form() -> None:
    """Captions of edits and their arguments did not come back, and those of redraw to no tab."""

    def told(verb: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
        settings = {"verb": verb, "given": given, **more}
        tab, fields = form_of({"prompt": "a hat", "seed": 5, "settings": settings})
        with gr.Blocks():
            own = next(one for one in TABS if one.verb.name == tab).fields()
        return {"tab": tab} | {name: fields[name] for name in own if name in fields}

    caption = {"caption": "a hat", "negative": ""}
    anew = {"strength": 0.4, "repeats": 2}
    for verb in ("inpaint", "redraw"):
        assert told(verb, anew | {"mask": None}) == {"tab": "inpaint", **caption, **anew}
    turn = {"source": "a cat", "strength": 0.3}
    assert told("edit", turn) == {"tab": "edit", "caption": "a hat", **turn}
    assert told("vary", {"invert": True}, eta=0.3) == {"tab": "vary", "change": 0.3}
    parts = {"images": [["a.png", 2], ["b.png", 1]], "texts": [["a hat", 1]], "place": 1}
    weights = {"first_weight": 1, "second_weight": 0.5, "caption_weight": 0.5}
    assert told("mix", parts) == {"tab": "mix", **caption, **weights, "n": 2}


def test_a_dropped_png_of_a_mix_asks_for_its_call(studio: Studio, tmp_path: Path) -> None:
    """The texts of a mix are embedded by the seed of the call's first picture."""
    given = {"images": [], "texts": [["a hat", 1]], "place": 1}
    about = {"prompt": "a hat", "seed": 5, "settings": {"verb": "mix", "given": given}}
    (tmp_path / "mix.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "png", about))
    assert studio.model is not None
    read = next(x for x in page(studio, studio.model).fns.values() if x.name == "read")
    assert read.fn is not None
    filled = zip(read.outputs, read.fn(str(tmp_path / "mix.png")), strict=True)
    values = {x.label: value for x, value in filled if isinstance(x, gr.components.Component)}
    assert values["Seed"] == 4


def test_a_picture_with_alpha_is_painted_over_on_white() -> None:
    """It was put on black, and everywhere else on white."""
    picture, mask = verbs.unpainted({"background": Image.new("RGBA", (2, 2)), "layers": []})
    assert picture.getpixel((0, 0)) == (255, 255, 255) and mask is None


def test_the_last_preview_is_the_picture(pipe: UnCLIP) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    (picture,) = pipe.text_to_image(
        "a red apple", seed=1, preview=lambda stage, rows, x0: seen.append((stage, x0))
    )
    assert [stage for stage, _ in seen] == [
        stage.name for stage in pipe.stages for _ in range(stage.sampling.steps)
    ]
    np.testing.assert_array_equal(np.asarray(to_pil(seen[-1][1][0])), np.asarray(picture))


@pytest.mark.parametrize(
    ("given", "error"), [({"n": 99}, ConfigError), ({"n": 1, "steps": 5000}, ConfigError)]
)
def test_what_is_too_much_is_refused(studio: Studio, given: dict[str, Any], error: type) -> None:
    with pytest.raises(error, match="at most"):
        drawn(studio, verbs.TEXT, caption="a red apple", **given)


def test_a_broken_upload_is_a_data_error(studio: Studio, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(DataError, match=r"broken\.png"):
        drawn(studio, verbs.UPSCALE, picture=broken)
    with pytest.raises(DataError, match="says nothing"):
        read_about(broken)
    with pytest.raises(DataError, match="no picture yet"):
        drawn(studio, verbs.UPSCALE, picture=None)


def test_a_painted_picture_that_is_too_large_is_a_data_error() -> None:
    with pytest.raises(DataError, match="5000 x 4000, more than the 16,000,000 pixels"):
        verbs.unpainted({"background": Image.new("L", (5000, 4000)), "layers": []})


def test_a_call_that_is_closed_stops_and_the_next_one_runs(studio: Studio) -> None:
    assert studio.model is not None
    options = verbs.TEXT.options(steps=900)
    given = {"caption": "a red apple", "n": 1}
    before = set(studio.out.iterdir())
    call: Iterator[Any] = studio.draw(verbs.TEXT, studio.model.name, 77, options, given)
    with closing(call):  # type: ignore[type-var]
        assert isinstance(next(call), Look)
    assert len(drawn(studio, verbs.TEXT, **given)) == 1  # waits for the lock of the first
    assert len(set(studio.out.iterdir()) - before) == 1


def test_a_call_that_names_another_model_has_one_in_memory(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / "other")
    two = Studio(tmp_path / "out", torch.device("cpu"), torch.float32)
    before, gone = weakref.ref(two.open(str(model_folder)).pipe), []
    plain = UnCLIP.from_pretrained

    def read(*arguments: Any, **more: Any) -> UnCLIP:
        gc.collect()
        gone.append(before() is None)
        return plain(*arguments, **more)

    monkeypatch.setattr(UnCLIP, "from_pretrained", read)
    options = verbs.TEXT.options(size=16, steps=1)
    given = {"caption": "a red apple", "n": 1}
    assert [*two.draw(verbs.TEXT, str(tmp_path / "other"), 0, options, given)]
    assert gone == [True]


def test_what_a_png_says_and_no_field_shows_is_told(studio: Studio) -> None:
    settings = {"verb": "text", "interval": [0.2, 0.8], "candidates": 1, "prior": "ar"}
    told = _said({"seed": 3, "settings": settings}, studio)
    assert "Its interval was `[0.2, 0.8]`" in told and "Its prior was `ar`" in told
    assert "candidates" not in told and "tile" not in told


@pytest.mark.parametrize(
    ("given", "eta", "told"),
    [
        ({"invert": True}, None, True),  # at 1 the form does not invert
        ({"invert": True}, 0.0, False),
        ({"invert": False}, 0.3, True),
        ({"invert": False}, 1.0, False),
        ({"invert": True, "change": 0.3}, 0.3, False),
    ],
)
def test_variations_that_the_form_can_not_make_are_told(
    studio: Studio, given: dict[str, Any], eta: float | None, told: bool
) -> None:
    settings = {"verb": "vary", "given": given, "eta": eta}
    assert ("which no field here says" in _said({"seed": 3, "settings": settings}, studio)) == told


def test_an_unknown_model_is_said_to_be_so(studio: Studio) -> None:
    with pytest.raises(CheckpointError, match="no model"):
        studio.open("/nowhere/at-all")


def test_the_page_builds_and_every_field_has_a_label(studio: Studio) -> None:
    assert studio.model is not None
    blocks = page(studio, studio.model)
    fields = [x for x in blocks.blocks.values() if isinstance(x, gr.components.FormComponent)]
    assert fields and all(x.label for x in fields)
    assert [tab.verb.name for tab in TABS] == [
        "text", "vary", "mix", "interpolate", "edit", "inpaint", "upscale",
    ]  # fmt: skip


def test_models_are_found_in_runs_and_weights(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "tiny").symlink_to(model_folder)
    assert models_near(tmp_path) == [str(tmp_path / "weights" / "tiny")]
