"""What `unclip doctor` says of a machine, whole or with something missing."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from unclip import doctor
from unclip.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """(exit code, what was said), with nothing asked of the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def run() -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out + err  # type: ignore[return-value]

    return run


def test_a_machine_on_which_the_tests_run_is_sound(run: Any) -> None:
    code, said = run()
    assert code == 0 and "broken:" not in said
    for subject in ("are a pair", "CPU: ", "bf16", "UNCLIP_CACHE", "HF_HUB_OFFLINE is set"):
        assert subject in said


def test_what_will_not_work_ends_with_a_code_and_what_to_do(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "file"))
    there = metadata.version
    old = {"einops": "0.1", "torchvision": "0.9.0"}
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or there(name))
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["einops>=0.8", "pillow>=11", 'nowhere; extra == "train"']
    )
    code, said = run()
    assert code == 2
    assert "broken: einops is 0.1, not >=0.8; pip install --upgrade unclip" in said
    assert f"broken: can't write into {tmp_path / 'file'}" in said
    assert "choose another UNCLIP_CACHE" in said
    assert "note:   the extra train is not there: nowhere is not installed: pip install" in said
    assert "torchvision 0.9.0 are no pair, but both load; beside it belongs torchvision==0." in said
    assert "2 of these will not work here" in said


def test_a_hub_that_does_not_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    found = doctor._hub()
    assert found.state == "note" and "HF_HUB_OFFLINE=1" in found.sentence
