"""Probes of CLIP's space and of what the decoder takes from it (Sections 4 and 7).

N pictures, D CLIP embedding, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip.data.open import open_dataset
from unclip.data.shapes import Scene, Shapes, render, score
from unclip.errors import ConfigError
from unclip.evaluation.findings import Findings
from unclip.evaluation.measures import Probe
from unclip.evaluation.priors import figure
from unclip.evaluation.report import Columns, lines_of
from unclip.evaluation.setting import Request, pairs_of, read_pairs
from unclip.images import grid, to_pil, to_tensor
from unclip.pipeline import UnCLIP

SHOWN = 6
LEARNED = 4_000  # training pictures that components and probes are fitted to
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the components; the paper shows 20 to 320
TEMPERATURE = 0.01  # of CLIP's softmax


def principal(z: Tensor, components: int, mean: Tensor, axes: Tensor) -> Tensor:
    """Embeddings from so many of their principal components.

    **Shapes**: z (N, D), mean (D,), axes (D, D) by falling variance → (N, D).
    """
    kept = axes[:components]
    return mean + (z - mean) @ kept.T @ kept


def pca(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Pictures of embeddings cut to fewer and fewer principal components, by the same noise.

    **Raises**: as `read_pairs` does.
    """
    pairs = read_pairs(pipe, request)
    known = read_pairs(pipe, replace(request, held_out=request.data, limit=LEARNED)).z_image
    mean = known.mean(0)
    _, deviations, axes = torch.linalg.svd(known - mean, full_matrices=False)  # (D,), (D, D)
    variance = deviations.square() / deviations.square().sum()
    columns: Columns = {
        "variance": ("% of variance", 100, 1),
        "cosine": ("cosine to the whole", 1, 3),
    }
    rows, tiles, shown = {}, [], pairs.z_image[:SHOWN]
    side = pipe.need("decoder", "pictures").side
    for count in dict.fromkeys(max(1, round(share * len(axes))) for share in SHARES):
        z = principal(pairs.z_image, count, mean, axes)
        rows[f"{count} of {len(axes)}"] = {
            "variance": float(variance[:count].sum()),
            "cosine": float(cosine_similarity(z, pairs.z_image).mean()),
        }
        cut = principal(shown, count, mean, axes)
        tiles.append(pipe.image_from_embedding(cut, size=side, **request.given))
    title = f"Principal components of {len(known)} embeddings, held-out ones cut to them"
    table = (title, "", *lines_of(columns, rows))
    words = ["the picture", *rows]
    sheet = [*zip(pairs.pictures, *tiles, strict=False)]
    flat = [picture for row in sheet for picture in row]
    return Findings(rows, [table], grid(flat, len(words), words * len(sheet)))


def swapped(scene: Scene) -> Scene:
    """The two objects of a scene with each other's colours."""
    a, b = scene.objects
    return Scene((replace(a, colour=b.colour), replace(b, colour=a.colour)))


def binding(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Whether attributes stay with their objects (Section 7): two coloured shapes, from the caption
    alone, the true embedding alone and both, read from the pixels.

    **Raises**: `ConfigError` for data other than shapes.
    """
    if request.data.partition(":")[0] != "shapes":
        raise ConfigError("binding is read from pictures of shapes: --data shapes")
    decoder = pipe.need("decoder", "pictures")
    shapes = Shapes(decoder.side, "val")
    scenes = [s for k in range(len(shapes)) if len((s := shapes.scene(k)).objects) == 2]
    scenes = scenes[: request.limit]
    captions, others = [s.caption for s in scenes], [swapped(s) for s in scenes]
    true = [to_pil(render(s, decoder.side)) for s in scenes]
    z, how = pipe.encode_image(true), {"size": decoder.side, **request.given}
    made = {"the scenes themselves": true}
    if decoder.reads_text:
        made["the caption alone"] = pipe.text_to_image(captions, prior="none", **how)
        made["the true embedding and the caption"] = pipe.image_from_embedding(z, captions, **how)
    made["the true embedding alone"] = pipe.image_from_embedding(z, **how)
    if pipe.prior is not None or pipe.ar_prior is not None:
        made["the prior's embedding and the caption"] = pipe.text_to_image(captions, **how)
    rows = {}
    for name, pictures in made.items():
        x = torch.stack([to_tensor(picture) for picture in pictures])
        rows[name] = score(x, scenes) | {"swapped": score(x, others)["binding"]}
    heads = ("colour", "shape", "position", "binding", "swapped")
    columns: Columns = {head: (head, 100, 0) for head in heads}
    told = _told_apart(pipe, z, captions, [s.caption for s in others])
    about = (
        "% right over both objects; **binding**: colour, shape and place of each together; "
        "**swapped**: each in the other's colour. CLIP finds the caption nearer to its own picture "
        f"than the one with swapped colours for {100 * told:.0f} % of the scenes."
    )
    table = (f"Binding, {len(scenes)} held-out scenes", about, *lines_of(columns, rows))
    return Findings({**rows, "told apart": told}, [table], figure(made, captions))


def _told_apart(
    pipe: UnCLIP, z_image: Tensor, captions: Sequence[str], others: Sequence[str]
) -> float:
    own, other = (cosine_similarity(z_image, pipe.encode_text(c)) for c in (captions, others))
    return float((own > other).float().mean())


def with_word(picture: Image.Image, word: str, ink: str = "black") -> Image.Image:
    """A picture with a word written across it, as large as fits, on a strip of white; in white ink
    it is the strip alone, which hides as much."""
    image = picture.copy()
    draw, size = ImageDraw.Draw(image), image.height // 3
    while size > 6 and ImageFont.load_default(size).getlength(word) > 0.95 * image.width:
        size -= 1
    font, middle = ImageFont.load_default(size), image.height // 2
    left = (image.width - font.getlength(word)) / 2
    draw.rectangle([0, middle - size * 0.7, image.width, middle + size * 0.7], fill="white")
    draw.text((left, middle - size * 0.6), word, ink, font)
    return image


def typography(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """A word is written on pictures of something else: what CLIP calls them, and what their
    variations show (Section 4, Figure 6).

    **Raises**: as `read_pairs` does, `ConfigError` for captions of fewer than two names.
    """
    pairs = read_pairs(pipe, request)
    read = [request.wording.read(caption) for caption in pairs.captions]
    names = [
        caption if r is None else r[0] for r, caption in zip(read, pairs.captions, strict=True)
    ]
    first = list(dict.fromkeys(names))
    if len(first) < 2:
        raise ConfigError("a word for something else needs captions of two names or more")
    words = [first[(first.index(name) + 1) % len(first)] for name in names]
    attacked, blank = (
        [with_word(*both, ink) for both in zip(pairs.pictures, words, strict=True)]
        for ink in ("black", "white")
    )
    z_text = F.normalize(pipe.encode_text([request.wording.plain(n) for n in first]).float(), dim=1)
    own, other = (torch.tensor([first.index(n) for n in them]) for them in (names, words))
    rows = {}
    shown = {"as it is": pairs.pictures, "an empty strip": blank, "the word on it": attacked}
    for what, pictures in shown.items():
        z = F.normalize(pipe.encode_image(pictures).float(), dim=1)
        chance = (z @ z_text.T / TEMPERATURE).softmax(1).cpu()  # (N, C)
        best = chance.argmax(1)
        rows[what] = {
            "own": float(chance.gather(1, own[:, None]).mean()),
            "word": float(chance.gather(1, other[:, None]).mean()),
            "own first": float((best == own).float().mean()),
            "word first": float((best == other).float().mean()),
        }
    columns: Columns = {
        "own": ("P(what it shows) %", 100, 1),
        "word": ("P(the word) %", 100, 1),
        "own first": ("the former first %", 100, 1),
        "word first": ("the latter first %", 100, 1),
    }
    about = f"Of {len(first)} names, by the model's CLIP, softmax at temperature {TEMPERATURE}."
    table = (f"A word on {len(names)} pictures", about, *lines_of(columns, rows))
    side = pipe.need("decoder", "pictures").side
    varied = pipe.variations(attacked[:SHOWN], n=2, size=side, **request.given)
    tiles, said = [], []
    for k, picture in enumerate(pairs.pictures[:SHOWN]):
        tiles += [picture, attacked[k], *varied[2 * k : 2 * k + 2]]
        said += [names[k], f"with the word {words[k]!r}", "variation", "variation"]
    return Findings(rows, [table], grid(tiles, 4, said))


def linear(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """What a linear classifier reads off the embedding, on pictures that it was not fitted to.

    **Raises**: `ConfigError` for data that don't say what their pictures show.
    """
    side = pipe.need("decoder", "pictures").side
    train, held = (_labelled(pipe, spec, side) for spec in (request.data, request.held))
    rows = {}
    for what in train[1]:
        seen = [k for k, label in enumerate(train[1][what]) if label is not None]
        number = {c: k for k, c in enumerate(dict.fromkeys(train[1][what][k] for k in seen))}
        labels = torch.tensor([number[train[1][what][k]] for k in seen])
        probe = Probe(train[0][seen], labels, len(number))
        there = [k for k, label in enumerate(held[1][what]) if label in number]
        asked = torch.tensor([number[held[1][what][k]] for k in there])
        common = Counter(labels.tolist()).most_common(1)[0][0]
        rows[what] = {
            "right": float((probe(held[0][there]).argmax(1) == asked).float().mean()),
            "chance": float((asked == common).float().mean()),
            "classes": len(number),
            "pictures": len(there),
        }
    columns: Columns = {
        "right": ("% right", 100, 1),
        "chance": ("% of the commonest", 100, 1),
        "classes": ("classes", 1, 0),
        "pictures": ("held-out pictures", 1, 0),
    }
    title = f"Linear probes of z_image, fitted to {len(train[0])} pictures"
    return Findings(rows, [(title, "", *lines_of(columns, rows))])


def _labelled(
    pipe: UnCLIP, spec: str | None, side: int
) -> tuple[Tensor, dict[str, list[str | None]]]:
    """Embeddings of pictures on the CPU, and what each shows, by attribute."""
    dataset = open_dataset(spec, side) if spec is not None else None
    attributes = getattr(dataset, "attributes", None)
    if dataset is None or attributes is None:
        raise ConfigError("linear probes need data that say what they show: --data emoji or shapes")
    pairs = pairs_of(pipe, dataset, LEARNED)
    read = [attributes(k) for k in pairs.numbers]
    keys = dict.fromkeys(key for labels in read for key in labels)
    return pairs.z_image.cpu(), {key: [labels.get(key) for labels in read] for key in keys}
