"""Progress bars: on a terminal after two seconds, and never anywhere else."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.utils import logging

from unclip import progress
from unclip.progress import progress_bar, without_bars

PACKAGE = Path(progress.__file__).parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "shown", "after", "expected"),
    [
        (Terminal, True, 0.0, True),
        (Terminal, True, 60.0, False),  # it is done before
        (Terminal, False, 0.0, False),
        (io.StringIO, True, 0.0, False),  # a log
    ],
)
def test_a_bar_is_for_people_who_wait(
    monkeypatch: pytest.MonkeyPatch,
    stderr: type[io.StringIO],
    shown: bool,
    after: float,
    expected: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(progress, "BAR_AFTER", after)
    monkeypatch.setenv("COLUMNS", "80")
    assert list(progress_bar(range(3), "drawing", shown=shown)) == [0, 1, 2]
    with progress_bar(what="drawing", total=5, done=2, shown=shown) as bar:
        bar.update()
        bar.set_postfix_str("loss 1", refresh=False)
    drawn = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("drawing" in drawn) == expected
    assert bool(drawn) == expected


def test_no_other_bars_are_made() -> None:
    """Each had its own rule, and some filled log files."""
    makers = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(r"import.*\btqdm", path.read_text())
    }
    assert makers == {"progress.py"}


def test_the_bars_of_libraries_are_off_only_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' "Loading weights" filled stderr, terminal or not."""
    config = CLIPTextConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    capsys.readouterr()
    with without_bars(logging):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert "Loading weights" in capsys.readouterr().err
