"""The page itself: a tab a verb, what all share below, and what was made beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from unclip.app.forms import TABS, Fields, Tab
from unclip.app.studio import MOST, UPLOAD_BYTES, Look, Made, Model, Studio, models_near
from unclip.cli.output import read_about
from unclip.cli.shell import default_model
from unclip.diffusion.schedulers import SamplerName
from unclip.errors import CheckpointError, ConfigError, UnclipError
from unclip.images import to_html

KEPT = 200  # pictures in the gallery; the folder has them all
OWN = "the model's own"
THEME = gr.themes.Default(primary_hue="indigo").set(  # hints that can be read on either ground
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
)
CSS = """
.tab-container button { padding-inline: 0.7rem }
.look { text-align: center; min-height: 3rem }
.look img { width: 100%; max-width: 512px; margin: 0 auto; image-rendering: pixelated }
.look progress { width: 100% }
"""


def launch(studio: Studio, name: str, port: int) -> str:
    """Serve the page on this machine, until the process ends. Its address.

    **Raises**: `ConfigError` for a port that is taken, `CheckpointError` without the model.
    """
    blocks = page(studio, studio.open(name))
    try:
        _, url, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,  # whatever the environment says
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(studio.out.absolute())],
            max_file_size=UPLOAD_BYTES,
            footer_links=["settings"],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            theme=THEME,
            css=CSS,
        )
    except OSError:
        raise ConfigError(f"--port {port} is taken or can't be opened; try another one") from None
    return url


def page(studio: Studio, model: Model) -> gr.Blocks:
    """The page of a studio in which this model is open."""
    with gr.Blocks(title="unclip", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown("# unclip")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Tabs() as tabs:
                    forms = [_form(tab) for tab in TABS]
                shared, drop, note = _settings(studio, model)
            with gr.Column(scale=4, min_width=320):
                results = _Results()
        fields = [form for _, form in forms]
        calls = [
            _draws(studio, tab, button, form, shared, results)
            for tab, (button, form) in zip(TABS, forms, strict=True)
        ]
        stopped = _words("Stopped.")
        ended = results.stop.click(None, None, None, cancels=calls)
        ended.then(lambda: stopped, None, results.look, queue=False)
        results.sends(tabs, fields)
        _reads(studio, tabs, fields, shared, drop, note)
    return blocks.queue(max_size=32)


def _form(tab: Tab) -> tuple[gr.Button, Fields]:
    with gr.Tab(tab.title, id=tab.verb.name):
        gr.Markdown(tab.about)
        fields = tab.fields()
        button = gr.Button(tab.action, variant="primary", elem_id=f"draw-{tab.verb.name}")
    return button, fields


def _settings(studio: Studio, model: Model) -> tuple[Fields, gr.File, gr.Markdown]:
    """What all verbs share, by name; where PNGs are dropped, and what is said of them."""
    with gr.Accordion("Model and settings", open=False, elem_id="settings"):
        picker = gr.Dropdown(
            _choices(model.name),
            value=model.name,
            label="Model",
            info="Choose one, or type a folder, a run or a hub id.",
            allow_custom_value=True,
        )
        size = gr.Dropdown(_sizes(model), value=0, label="Size in pixels")
        # gradio sends an empty number as 0, so 0 stands for the model's own.
        seed = gr.Number(-1, label="Seed", info="-1: another one each time.", precision=0)
        steps = gr.Number(
            0, label="Steps", info=f"0: {OWN}.", minimum=0, maximum=MOST["steps"], precision=0
        )
        guidance = gr.Number(0, label="Guidance", info=f"0: {OWN}; 1 is off.", step=0.5)
        names = [(OWN, ""), *((name, name) for name in get_args(SamplerName))]
        sampler = gr.Dropdown(names, value="", label="Sampler of the decoder")
        drop = gr.File(label="A PNG that was made here: read its settings", file_types=[".png"])
        note = gr.Markdown()

    def opened(name: str) -> Any:
        with _readable():
            return gr.update(choices=_sizes(studio.open(name)), value=0)

    picker.input(opened, picker, size)
    shared: Fields = {"seed": seed, "size": size, "steps": steps}
    return shared | {"guidance": guidance, "sampler": sampler, "model": picker}, drop, note


def _choices(model: str) -> list[tuple[str, str]]:
    """The shipped model, the one that is open, and what lies in this folder's runs and weights."""
    found = dict.fromkeys([model, *models_near(Path())])
    try:
        shipped = str(default_model())
    except CheckpointError:
        return [(name, name) for name in found]
    return [("the shipped model", shipped), *((name, name) for name in found if name != shipped)]


def _sizes(model: Model) -> list[tuple[str, int]]:
    pipe = model.pipe
    sides = sorted({*pipe.sizes, *(stage.side for stage in pipe.upsamplers)})
    return [("the largest", 0), *((str(side), side) for side in sides)]


class _Results:
    """What is being drawn, and what was made since the page was opened."""

    def __init__(self) -> None:
        self.look = gr.HTML(_words("Ready."), elem_id="look", elem_classes="look")
        self.stop = gr.Button("Stop", size="sm", elem_id="stop")
        self.gallery = gr.Gallery(
            label="Pictures, newest first",
            columns=3,
            fit_columns=False,
            object_fit="contain",
            buttons=["download", "download_all", "fullscreen"],
            interactive=False,
            elem_id="gallery",
        )
        self.made, self.chosen = gr.State([]), gr.State(0)
        with gr.Row():
            self.buttons = {
                tab.verb.name: gr.Button(f"Send to {tab.title}", size="sm", min_width=180)
                for tab in TABS
                if tab.receives
            }

        def choose(event: gr.SelectData) -> int:
            return event.index

        self.gallery.select(choose, None, self.chosen, queue=False)

    def sends(self, tabs: gr.Tabs, forms: Sequence[Fields]) -> None:
        """Let the chosen picture, the newest unless one is, go to the tabs that take pictures."""
        for tab, fields in zip(TABS, forms, strict=True):
            if tab.receives:
                to = [tabs, fields[tab.receives]]
                button, name = self.buttons[tab.verb.name], tab.verb.name
                button.click(_sender(name), [self.made, self.chosen], to, queue=False)


def _sender(name: str) -> Any:
    def send(made: list[tuple[str, str]], chosen: int) -> tuple[Any, Any]:
        if not made:
            gr.Warning("There is no picture yet that could be sent.")
            return gr.skip(), gr.skip()
        return gr.Tabs(selected=name), made[min(chosen, len(made) - 1)][0]

    return send


def _draws(
    studio: Studio, tab: Tab, button: gr.Button, form: Fields, shared: Fields, results: _Results
) -> Any:
    """Let a tab's button draw: looks while it does, then pictures into the gallery."""

    def draw(made: list[tuple[str, str]], *values: Any) -> Iterator[tuple[Any, ...]]:
        said = dict(zip((*shared, *form), values, strict=True))
        how = {name: said.pop(name) for name in shared}
        how |= {"negative_prompt": said.pop("negative", "").strip()}
        name, seed = how.pop("model"), how.pop("seed")
        seed = None if seed is None or seed < 0 else seed
        given = {
            key: Path(x) if isinstance(form[key], gr.Image) and x else x for key, x in said.items()
        }
        picture = ""
        try:
            for event in studio.draw(tab.verb, name, seed, tab.verb.options(**how), given):
                if isinstance(event, str):
                    gr.Warning(escape(event), duration=None)
                elif isinstance(event, Made):
                    caption = f"{given.get('caption') or tab.title} – seed {event.seed}"
                    made = [(str(event.path), caption), *made][:KEPT]
                    yield gr.skip(), made, made, 0
                else:
                    if event.picture is not None:
                        alt = f"What {event.stage} has drawn so far"
                        picture = to_html(event.picture, alt, "webp")
                    yield picture + _bar(event), gr.skip(), gr.skip(), gr.skip()
        except UnclipError as error:
            yield _words(str(error)), gr.skip(), gr.skip(), gr.skip()
            with _readable():
                raise error
        yield _words("Done."), gr.skip(), gr.skip(), gr.skip()

    triggers = [button.click]
    if isinstance(form.get("caption"), gr.Textbox):
        triggers.append(form["caption"].submit)
    return gr.on(
        triggers,
        draw,
        [results.made, *shared.values(), *form.values()],
        [results.look, results.gallery, results.made, results.chosen],
        concurrency_id="draw",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=results.look,
    )


def _reads(
    studio: Studio,
    tabs: gr.Tabs,
    forms: Sequence[Fields],
    shared: Fields,
    drop: gr.File,
    note: gr.Markdown,
) -> None:
    """Let a PNG that was dropped fill the form that it was made with, and the settings."""

    def read(path: str) -> list[Any]:
        with _readable():
            about = read_about(path)
        settings = about["settings"]
        verb, own = form_of(about)
        updates: list[Any] = []
        for tab, form in zip(TABS, forms, strict=True):
            mine = own if tab.verb.name == verb else {}
            updates += [mine.get(name, gr.skip()) for name in form]
        plain = {name: x for name, x in settings.items() if not isinstance(x, dict)}
        own = (
            {"size": 0, "steps": 0, "guidance": 0, "sampler": ""}
            | plain
            | {"seed": about["seed"] - _before(settings), "model": gr.skip()}
        )
        updates += [own.get(name) for name in shared]
        known = verb in [tab.verb.name for tab in TABS]
        return [gr.Tabs(selected=verb) if known else gr.skip(), *updates, _said(about, studio)]

    every = [field for form in forms for field in form.values()]
    drop.upload(read, drop, [tabs, *every, *shared.values(), note])


def form_of(about: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The tab that makes what a PNG says, and its fields; those of the shell's verbs too."""
    settings = about["settings"]
    given, verb = settings.get("given", {}), settings.get("verb")
    own = {"caption": about.get("prompt", ""), "negative": settings.get("negative_prompt", "")}
    if verb == "vary" and "invert" in given:
        own["change"] = settings.get("eta", 1) if given["invert"] else 1
    elif verb == "mix" and "place" in given:
        images, texts = ([weight for _, weight in given[kind]] for kind in ("images", "texts"))
        most = max(1, *images, *texts)  # sliders end at 1, and only proportions count
        weights = [
            *zip(("first_weight", "second_weight"), images, strict=False),
            *zip(("caption_weight",), texts, strict=False),
        ]
        own |= {name: weight / most for name, weight in weights}
        own["n"] = given["place"] + 1
    return "inpaint" if verb == "redraw" else verb, own | given


def _before(settings: dict[str, Any]) -> int:
    """How many pictures of its call come before one that its own seed alone does not make."""
    return settings.get("given", {}).get("place", 0) if settings.get("verb") == "mix" else 0


def _said(about: dict[str, Any], studio: Studio) -> str:
    """What a PNG says that no field of the page shows."""
    settings, model = about["settings"], studio.model
    lines = [f"Made by `{settings.get('verb')}`, seed {about['seed']}."]
    if settings.get("source"):
        lines.append(f"It was made from `{settings['source']}`, which is not in it.")
    if settings.get("given", {}).get("mask"):
        lines.append(f"Its mask was `{settings['given']['mask']}`, which is not in it.")
    if model is None or about.get("model") != model.hash:
        lines.append(f"Its model was another one than is chosen: `{about.get('model')}`.")
    for name in ("steps", "guidance", "sampler"):
        if isinstance(settings.get(name), dict):
            lines.append(f"Its {name} differed by stage: `{settings[name]}`.")
    usual = {"prior_candidates": 1 if model is None else model.pipe.prior_candidates}
    for name in ("interval", "candidates", "prior", "prior_candidates", "tile"):
        if settings.get(name) not in (None, usual.get(name, 1)):
            lines.append(f"Its {name} was `{settings[name]}`, for which there is no field here.")
    if settings.get("verb") == "vary":
        inverted, eta = settings.get("given", {}).get("invert", False), settings.get("eta")
        eta = 1 if eta is None else eta
        if inverted == (eta == 1) and "change" not in settings.get("given", {}):
            own = "its own" if inverted else "other"
            lines.append(
                f"It was drawn from {own} noise with eta `{eta}`, which no field here says."
            )
    return "\n\n".join(lines)


def _words(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'


def _bar(look: Look) -> str:
    words = f"{look.stage}, step {look.done} of {look.total}"
    bar = f'<progress max="{look.total}" value="{look.done}" aria-label="{escape(words)}">'
    return f"{bar}</progress>{_words(words)}"


@contextmanager
def _readable() -> Iterator[None]:
    """Show a mistake of the user's as a message that stays until it is closed."""
    try:
        yield
    except UnclipError as error:
        title, said = "This can't be done", escape(str(error))
        raise gr.Error(said, None, title=title, print_exception=False) from None
