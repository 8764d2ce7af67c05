"""The page's tabs: what each verb is called, what it says of itself, and what its form asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import gradio as gr

from unclip.app import verbs
from unclip.app.studio import MOST, Verb, uploaded
from unclip.errors import DataError

LETTERS = 1000  # of a caption: no encoder reads more
Fields = dict[str, gr.components.Component]


@dataclass(frozen=True)
class Tab:
    """A verb's place on the page: its name there, what its button says, what it says of itself.

    `fields` makes its form, by the names that the verb knows them by; `receives` is the one that
    pictures of the gallery can be sent to.
    """

    verb: Verb
    title: str
    action: str
    about: str
    fields: Callable[[], Fields]
    receives: str | None = None


def _caption(label: str, info: str | None = None) -> gr.Textbox:
    return gr.Textbox(label=label, info=info, lines=2, max_length=LETTERS)


def _negative() -> gr.Textbox:
    return gr.Textbox(label="Away from", info="A caption to be led away from.", max_length=LETTERS)


def _count() -> gr.Slider:
    return gr.Slider(1, MOST["n"], 1, step=1, label="Pictures", info="Picture k uses seed + k.")


def _picture(label: str = "Picture") -> gr.Image:
    picture = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=240,
        alt_text=label,
    )
    # A file that can't be used is said to be such at once; it is a dict before gradio opens it.
    picture.upload(_sound, picture, picture, preprocess=False, api_visibility="private")
    return picture


def _sound(file: dict[str, str] | None) -> str | None:
    """The path of what was dropped, or nothing and a message where it can't be used."""
    if file is None:
        return None
    try:
        uploaded(file["path"])
    except DataError as error:
        gr.Warning(escape(str(error)), title="This picture can't be used", duration=None)
        return None
    return file["path"]


def _weight(label: str) -> gr.Slider:
    return gr.Slider(0, 1, 0.5, label=label)


TABS = (
    Tab(
        verbs.TEXT,
        "Text",
        "Draw",
        "Pictures of a caption.",
        lambda: {"caption": _caption("Caption"), "negative": _negative(), "n": _count()},
    ),
    Tab(
        verbs.VARY,
        "Variations",
        "Draw variations",
        "Other pictures with the same CLIP embedding.",
        lambda: {
            "picture": _picture(),
            "change": gr.Slider(
                0, 1, 1, label="Change", info="Below 1 from the picture's own noise; 0 is itself."
            ),
            "n": _count(),
        },
        receives="picture",
    ),
    Tab(
        verbs.MIX,
        "Mix",
        "Draw the mix",
        "Pictures of the mean of pictures and a text.",
        lambda: {
            "first": _picture("First picture"),
            "first_weight": _weight("Weight of the first"),
            "second": _picture("Second picture"),
            "second_weight": _weight("Weight of the second"),
            "caption": _caption("Caption"),
            "caption_weight": _weight("Weight of the caption"),
            "negative": _negative(),
            "n": _count(),
        },
        receives="first",
    ),
    Tab(
        verbs.INTERPOLATE,
        "Interpolate",
        "Draw the frames",
        "Frames from one picture to another.",
        lambda: {
            "first": _picture("From"),
            "second": _picture("To"),
            "frames": gr.Slider(2, MOST["frames"], 5, step=1, label="Frames", info="Both ends in."),
            "fixed_noise": gr.Checkbox(
                label="One noise for all", info="Drawn by the seed, not found in the pictures."
            ),
        },
        receives="first",
    ),
    Tab(
        verbs.EDIT,
        "Text diff",
        "Turn it",
        "A picture turned towards what one caption adds to another.",
        lambda: {
            "picture": _picture(),
            "source": gr.Textbox(label="What it is", max_length=LETTERS),
            "caption": gr.Textbox(label="What it should be", max_length=LETTERS),
            "strength": gr.Textbox("0.35", label="Strength", info="One or several, as 0.1,0.2."),
        },
        receives="picture",
    ),
    Tab(
        verbs.INPAINT,
        "Inpaint",
        "Draw anew",
        "What you paint over is drawn anew and the rest is kept; with no paint all is drawn anew.",
        lambda: {
            "painted": gr.ImageEditor(
                label="Picture and brush",
                type="pil",
                sources=["upload", "clipboard"],
                transforms=None,
                layers=False,
                brush=gr.Brush(colors=["#e60073"], color_mode="fixed"),
                height=420,
            ),
            "caption": _caption("Caption", "What to draw; empty: as it is."),
            "negative": _negative(),
            "strength": gr.Slider(
                0.05, 1, 1, label="Strength", info="Below 1 some of what was there shows through."
            ),
            "repeats": gr.Slider(
                1, MOST["repeats"], 1, step=1, label="Turns a step", info="More join better."
            ),
            "n": _count(),
        },
        receives="painted",
    ),
    Tab(
        verbs.UPSCALE,
        "Upscale",
        "Enlarge",
        "A picture through the upsamplers.",
        lambda: {"picture": _picture()},
        receives="picture",
    ),
)
