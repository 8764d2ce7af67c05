"""Models to the Hugging Face hub: what is sent, and the card that says what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from unclip.config import read_yaml
from unclip.errors import CheckpointError, ConfigError
from unclip.files.find import hub_errors, resolve_folder, why
from unclip.files.folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    WEIGHTS_LAST,
    read_index,
    read_stage_config,
)
from unclip.shipped import located
from unclip.sources import Source
from unclip.stages.lora import LORA
from unclip.summary import summarise
from unclip.text import markdown_table

CARD = "README.md"
OURS = (CONFIG, WEIGHTS, WEIGHTS_LAST)  # of a stage's folder


def push(
    name: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
    notes: str = "",
    token: str | None = None,
) -> str:
    """Send a model folder, a run's newest checkpoint or a LoRA to the hub, in one commit.

    `repo` is `owner/name`, which is made if it is not there; `revision` a branch, likewise. Stages
    and index are sent, what resuming needs is not. Of a stage that is sent, what an earlier push
    left there and this one lacks is deleted; other stages stay, outside of the index. A folder's
    own `README.md` is its card; otherwise `card` writes one. Without `token` the hub's own settings
    count (HF_TOKEN). Returns where it lies.

    **Raises**: `CheckpointError` for what is no model folder, `ConfigError` if the hub takes
    nothing.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is None:
        raise ConfigError(f"{repo!r} is no name on the hub; expected owner/name")
    root = resolve_folder(name)
    if not (root / INDEX).is_file():
        raise CheckpointError(
            f"{root} is no model folder of ours; `unclip convert` makes one of it"
        )
    stages = [str(stage) for stage in read_index(root)["stages"]]
    files = [root / INDEX, *(root / stage / file for stage in stages for file in OURS)]
    own = root / CARD
    text = own.read_bytes() if own.is_file() else card(root, repo, licence, notes).encode()
    sent: dict[str, Any] = {CARD: text}
    sent |= {file.relative_to(root).as_posix(): file for file in files if file.is_file()}
    api = HfApi(token=token, library_name="unclip")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        ours = {f"{stage}/{file}" for stage in stages for file in OURS} if INDEX in there else set()
        stale = sorted((there & ours) - set(sent))
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path, content) for path, content in sent.items()),
                *map(CommitOperationDelete, stale),
            ],
            commit_message=f"{', '.join(stages)}, by unclip",
            revision=revision,
        )
    except hub_errors() as error:
        raise ConfigError(f"{repo}: nothing was sent ({why(error)})") from None
    return str(done.commit_url)


def card(root: Path, repo: str, licence: str | None = None, notes: str = "") -> str:
    """A model card: stages, encoder and settings, what it learned from where that is known, how it
    is used, and `notes`.

    **Raises**: `CheckpointError` if the folder is damaged.
    """
    stages = [str(stage) for stage in read_index(root)["stages"]]
    configs = {stage: read_stage_config(root, stage) for stage in stages}
    changes = {name: data for name, data in configs.items() if data.get("kind") == LORA}
    head: dict[str, Any] = {
        "library_name": "unclip",
        "pipeline_tag": "text-to-image",
        "tags": ["unclip", *(["lora"] if changes else [])],
    }
    if licence is not None:
        head["license"] = licence
    of_hub = {str(data["base"]) for data in changes.values() if "/" in str(data.get("base"))}
    if len(of_hub) == 1 and not located(*of_hub).exists():
        head["base_model"] = of_hub.pop()
    body = _of_changes(changes, repo) if changes else _of_stages(root, repo)
    terms = "" if licence else "No licence was given with it.\n"
    return (
        "\n".join(
            [
                f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {repo.rpartition('/')[2]}\n",
                *body,
                *_training(root),
                terms,
                notes,
            ]
        ).rstrip()
        + "\n"
    )


def _of_stages(root: Path, repo: str) -> Iterator[str]:
    rows = summarise(Source(root, found=True))
    yield "A model of [unclip](https://arxiv.org/abs/2204.06125) (DALL·E 2, in PyTorch).\n"
    columns = ["stage", "parameters", "size", "sampling", "encoder"]
    told = [[s.name, f"{s.parameters / 1e6:,.2f} M", s.size, s.sampling, s.encoder] for s in rows]
    yield markdown_table(columns, told) + "\n"
    yield f'```\nunclip text "a caption" --model {repo}\n```\n'
    yield f'```python\nfrom unclip import UnCLIP\n\npipe = UnCLIP.from_pretrained("{repo}")\n```\n'


def _of_changes(changes: dict[str, Any], repo: str) -> Iterator[str]:
    yield "Low-rank changes (LoRA) of a model of unclip (DALL·E 2, in PyTorch).\n"
    columns = ["stage", "rank", "of"]
    told = [[name, str(data.get("rank")), str(data.get("base"))] for name, data in changes.items()]
    yield markdown_table(columns, told) + "\n"
    base = told[0][2]
    yield f'```\nunclip text "a caption" --model {base} --lora {repo}\n```\n'


def _training(root: Path) -> Iterator[str]:
    """What a run says of itself, where the folder is a checkpoint of one, without its paths."""
    saved = root.parent.parent / "config.yaml"
    if root.parent.name != "checkpoints" or not saved.is_file():
        return
    run = read_yaml(saved)
    step = int(root.name.rpartition("-")[2])
    said = {name: run["train"][name] for name in ("batch", "lr", "optimizer", "ema", "precision")}
    settings = ", ".join(f"{name} {value}" for name, value in said.items())
    data = Path(run["data"]["train"]).name
    yield f"Trained for {step:,} steps on `{data}` ({settings}).\n"
