"""The page in a real browser, with the shipped model: `make test-web`."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unclip.cli.output import read_about
from unclip.cli.shell import default_model

pytestmark = pytest.mark.web
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("not tested in a browser: no Chromium here (apt-get install chromium)")
    with sync_playwright() as play:
        with_browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield with_browser
        with_browser.close()


@pytest.fixture(scope="module")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    from unclip.app.page import launch
    from unclip.app.studio import Studio

    studio = Studio(tmp_path_factory.mktemp("out"), torch.device("cpu"), torch.float32)
    return launch(studio, str(default_model()), 7897)


def opened(browser: Any, **how: Any) -> Any:
    """An empty page that is patient with a machine that has other things to do."""
    page = browser.new_page(**how)
    page.set_default_timeout(PATIENCE)
    return page


def shoot(page: Any, name: str, tmp_path: Path) -> None:
    """A screenshot, into the docs if that is asked for."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(folder / f"{name}.webp", quality=70)


def says(page: Any, words: str) -> None:
    pattern = re.compile(words)
    page.locator("#look", has_text=pattern).wait_for()


def test_draw_download_vary_and_drop_a_broken_file(url: str, browser: Any, tmp_path: Path) -> None:
    page = opened(browser, viewport={"width": 1280, "height": 900})
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(url)
    page.get_by_label("Caption").first.fill("a red apple")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#look img").wait_for()
    shoot(page, "app", tmp_path)
    says(page, "Done")
    page.locator("#gallery .thumbnail-item, #gallery .thumbnail-lg").first.click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label("Download", exact=True).first.click()
    download.value.save_as(tmp_path / "apple.png")
    assert read_about(tmp_path / "apple.png")["prompt"] == "a red apple"

    page.get_by_role("button", name="Send to Variations").click()
    page.get_by_role("button", name="Draw variations").click()
    says(page, "step")
    says(page, "Done")
    shoot(page, "app_done", tmp_path)

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    page.get_by_role("tab", name="Upscale").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Enlarge"))
    panel.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator(".toast-body", has_text="broken.png").wait_for()
    panel.get_by_role("button", name="Enlarge").click()
    says(page, "no picture yet")
    assert hosts == {url.split("/")[2]}
    page.close()


def test_a_picture_that_is_too_large_is_refused_in_words(
    url: str, browser: Any, tmp_path: Path
) -> None:
    page = opened(browser)
    page.goto(url)
    Image.new("L", (5000, 4000)).save(tmp_path / "huge.png")
    page.get_by_role("tab", name="Upscale").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Enlarge"))
    panel.locator("input[type=file]").set_input_files(tmp_path / "huge.png")
    page.locator(".toast-body", has_text="5000 x 4000, more than the 16,000,000 pixels").wait_for()
    page.close()


def test_a_model_without_a_prior_says_what_it_can_do(
    url: str, browser: Any, tmp_path: Path
) -> None:
    shipped = default_model()
    index = json.loads((shipped / "unclip.json").read_text())
    (tmp_path / "half").mkdir()
    index["stages"] = [stage for stage in index["stages"] if not stage.endswith("prior")]
    for stage in index["stages"]:
        (tmp_path / "half" / stage).symlink_to((shipped / stage).absolute())
    (tmp_path / "half" / "unclip.json").write_text(json.dumps(index))
    page = opened(browser)
    page.goto(url)
    page.get_by_role("button", name="Model and settings").click()
    page.get_by_label("Model", exact=True).fill(str(tmp_path / "half"))
    page.keyboard.press("Enter")
    page.get_by_label("Caption").first.fill("a red apple")
    page.get_by_role("button", name="Draw", exact=True).click()
    says(page, "prior")
    page.close()


def test_stop_ends_a_long_call(url: str, browser: Any) -> None:
    page = opened(browser)
    page.goto(url)
    page.get_by_label("Caption").first.fill("a red apple")
    page.get_by_role("button", name="Model and settings").click()
    page.get_by_label("Steps").fill("500")
    page.get_by_role("button", name="Draw", exact=True).click()
    says(page, "decoder")
    page.get_by_role("button", name="Stop").click()
    says(page, "Stopped")
    page.close()


def test_a_phone_needs_no_sideways_scrolling(url: str, browser: Any) -> None:
    page = opened(browser, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(url)
    page.get_by_label("Caption").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "dark" in page.evaluate("document.body.className")
    page.close()
