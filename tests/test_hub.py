"""Models sent to a hub and read back: a small one, in this process."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, file_download

from unclip.cli import main
from unclip.errors import CheckpointError, ConfigError
from unclip.files.folder import WEIGHTS, WEIGHTS_LAST, update_index
from unclip.hub import card, push
from unclip.pipeline import UnCLIP
from unclip.stages.lora import describe

TOKEN = "a secret"


class Hub(ThreadingHTTPServer):
    """The few endpoints that pushing and loading ask for; everything in it is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}  # repo → branch → files
        self.created: list[dict[str, Any]] = []


class Endpoints(BaseHTTPRequestHandler):
    """What the hub answers."""

    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def answer(self, data: bytes | Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlparse(self.path).path.strip("/").split("/")
        if not self.known:
            return self.missing("Unauthorized", 401)
        if parts[1] == "validate-yaml":  # the card's head
            return self.answer({"errors": [], "warnings": []})
        if parts[1] == "repos":
            data = json.loads(body)
            repo = f"{data['organization']}/{data['name']}"
            self.server.created.append(data)
            self.server.branches.setdefault(repo, {"main": {}})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}"})
        repo, verb, branch = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        branches = self.server.branches[repo]
        if verb == "branch":
            branches[branch] = dict(branches["main"])
            return self.answer({})
        if verb == "preupload":
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": f["path"], **told} for f in files]})
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                content = base64.b64decode(item["value"]["content"])
                branches[branch][item["value"]["path"]] = content
            if item["key"] == "deletedFile":
                del branches[branch][item["value"]["path"]]
        url = f"http://{self.headers['Host']}/{repo}/commit/{sha(branches[branch])}"
        self.answer({"success": True, "commitOid": sha(branches[branch]), "commitUrl": url})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if not self.known:
            return self.missing("RepoNotFound", 401)
        at = 2 if parts[0] == "api" else 0
        repo, verb, revision = "/".join(parts[at : at + 2]), parts[at + 2], parts[at + 3]
        branches = self.server.branches[repo]
        named = {**branches, **{sha(files): files for files in branches.values()}}
        if revision not in named:
            return self.missing("RevisionNotFound")
        files = named[revision]
        if verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": repo, "sha": sha(files), "siblings": siblings})
        if verb == "tree":
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
                    for name, data in files.items()
                ]
            )
        data = files["/".join(parts[at + 4 :])]
        self.answer(data, ETag=f'"{blob(data)}"', X_Repo_Commit=sha(files))

    do_HEAD = do_GET


def blob(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sha(files: dict[str, bytes]) -> str:
    """Forty digits, as a commit's."""
    return hashlib.sha1("".join(sorted(map(blob, files.values()))).encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def picture(pipe: UnCLIP) -> bytes:
    return pipe.text_to_image("a red apple", size=16)[0].tobytes()


def test_a_model_goes_to_the_hub_and_comes_back(
    hub: Hub,
    model_folder: Path,
    pipe: UnCLIP,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notes.md").write_text("It knows two shapes.\n")
    said = ["--private", "--license", "mit", "--notes", str(tmp_path / "notes.md")]
    with pytest.raises(SystemExit) as ended:
        main(["push", str(model_folder), "somebody/tiny", *said])
    assert ended.value.code in (0, None)
    assert "/somebody/tiny/commit/" in capsys.readouterr().out
    assert hub.created[0]["visibility"] == "private"
    files = hub.branches["somebody/tiny"]["main"]
    stages = ("clip", "prior", "decoder", "upsampler_32", "upsampler_64")
    expected = {f"{s}/{f}" for s in stages for f in ("config.json", "model.safetensors")}
    assert set(files) == expected | {"unclip.json", "README.md"}
    text = files["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "mit"
    assert "| decoder" in body and "16 px" in body and "tiny 0" in body
    assert "--model somebody/tiny" in body and body.endswith("It knows two shapes.\n")
    assert picture(UnCLIP.from_pretrained("somebody/tiny")) == picture(pipe)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert picture(UnCLIP.from_pretrained("somebody/tiny")) == picture(pipe)  # from the cache
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        UnCLIP.from_pretrained("somebody/else")


def test_a_revision_is_a_branch_of_its_own(hub: Hub, pipe: UnCLIP, tmp_path: Path) -> None:
    folder, more = tmp_path / "model", {"revision": "v1", "token": TOKEN}
    pipe.save_pretrained(folder, push_to_hub="somebody/tiny", **more)
    assert hub.branches["somebody/tiny"]["main"] == {}
    assert picture(UnCLIP.from_pretrained("somebody/tiny@v1")) == picture(pipe)
    with pytest.raises(CheckpointError, match="it has no such revision"):
        UnCLIP.from_pretrained("somebody/tiny@v2")


def test_what_a_later_push_no_longer_has_is_deleted(
    hub: Hub, model_folder: Path, tmp_path: Path
) -> None:
    """A second network for the last step stayed, and was used. Files of others stay."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    shutil.copy(folder / "decoder" / WEIGHTS, folder / "decoder" / WEIGHTS_LAST)
    push(folder, "somebody/tiny")
    files = hub.branches["somebody/tiny"]["main"]
    before, others = (
        set(files),
        {"prior/notes.txt", "samples/config.json", "model_last.safetensors"},
    )
    files |= dict.fromkeys(others, b"")
    (folder / "decoder" / WEIGHTS_LAST).unlink()
    update_index(folder, stages=["clip", "decoder"])
    push(folder, "somebody/tiny")
    assert set(files) == (before - {"decoder/model_last.safetensors"}) | others


def test_a_push_deletes_nothing_of_what_is_no_model_of_ours(hub: Hub, model_folder: Path) -> None:
    """diffusers' folders have a `prior/config.json`, too."""
    theirs = {"prior/model_last.safetensors": b"", "upsampler_8/config.json": b""}
    hub.branches["somebody/tiny"] = {"main": dict(theirs)}
    push(model_folder, "somebody/tiny")
    assert theirs.keys() <= hub.branches["somebody/tiny"]["main"].keys()


def test_who_may_not_is_told_what_to_do(
    hub: Hub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model_folder, "somebody/tiny")
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(CheckpointError, match="needs HF_TOKEN"):
        UnCLIP.from_pretrained("somebody/tiny@main")
    with pytest.raises(ConfigError, match=r"nothing was sent .* needs HF_TOKEN"):
        push(model_folder, "somebody/tiny")
    with pytest.raises(ConfigError, match="expected owner/name"):
        push(model_folder, "tiny")


def test_no_network_is_said_and_no_traceback(
    hub: Hub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP client's own error, which is no OSError, ended `unclip push`."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match="somebody/tiny: nothing was sent"):
        push(model_folder, "somebody/tiny")


def test_a_card_of_a_run_says_how_it_was_trained_and_no_path(tmp_path: Path) -> None:
    """A LoRA's, too, and which model it changes."""
    root = tmp_path / "runs" / "style" / "checkpoints" / "step-40"
    (root / "decoder").mkdir(parents=True)
    (root / "unclip.json").write_text('{"format": 1, "stages": ["decoder"]}')
    (root / "decoder" / "config.json").write_text(json.dumps(describe("decoder", 8, "a/base")))
    train = {"batch": 4, "lr": 0.001, "optimizer": "adamw", "ema": 0.9, "precision": "fp32"}
    run = {"data": {"train": "/home/somebody/blueprints"}, "train": train}
    (root.parent.parent / "config.yaml").write_text(json.dumps(run))
    text = card(root, "somebody/style")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "a/base"
    assert "| decoder | 8" in text and "--model a/base --lora somebody/style" in text
    assert "for 40 steps on `blueprints` (batch 4, lr 0.001" in text and "/home" not in text
    assert "No licence was given" in text
    assert huggingface_hub.ModelCard(text).data.base_model == "a/base"
