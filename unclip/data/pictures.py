"""Pictures in files of their own, and folders of them with captions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip.data.captions import draw, printable, read_captions
from unclip.data.damage import Damage
from unclip.data.folders import with_suffix
from unclip.data.sample import Sample
from unclip.errors import DataError
from unclip.images import SUFFIXES, Fit


@dataclass(frozen=True)
class Picture:
    """A picture file, its captions, and the name under which it is reported."""

    path: Path
    captions: Sequence[str]
    key: str


class Files:
    """Pictures in separate files."""

    def __init__(self, name: str, pictures: Sequence[Picture], fit: Fit) -> None:
        self.name, self.pictures, self.fit = name, pictures, fit

    def __len__(self) -> int:
        return len(self.pictures)

    def place(self, index: int) -> str:
        """The file of picture `index`."""
        return str(self.pictures[index].path)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index`; of several captions the generator draws one."""
        picture = self.pictures[index]
        caption = draw(picture.captions, generator)
        return Sample(self.fit.read(picture.path), caption, picture.key)


def read_folder(root: Path, files: Sequence[Path]) -> list[Picture]:
    """The pictures among `files`, with captions from the .txt of the same name.

    **Raises**: `DataError` when more than 5 % have none, or are in another format.
    """
    damage = Damage(str(root), "pictures")
    texts = {path.with_suffix(""): path for path in with_suffix(files, ".txt")}
    images = with_suffix(files, *SUFFIXES)
    pictures = []
    for path in images:
        key = printable(path.relative_to(root).as_posix())
        text = texts.get(path.with_suffix(""))
        try:
            captions = [] if text is None else read_captions(text.read_bytes(), text)
            problem = "have no caption (write it to a .txt of the same name)"
        except OSError:
            captions, problem = [], "have captions that can't be read"
        except DataError as error:
            captions, problem = [], f"have captions that {error.kind}"
        if captions:
            pictures.append(Picture(path, captions, key))
        else:
            damage.add(problem, key)
    drawn = {path.with_suffix("") for path in images}
    for path in files:
        stem = path.with_suffix("")
        if stem in texts and stem not in drawn and path.suffix.lower() != ".txt":
            drawn.add(stem)
            damage.add("are not JPEG, PNG or WebP", printable(path.relative_to(root).as_posix()))
    damage.check(len(pictures))
    return pictures
