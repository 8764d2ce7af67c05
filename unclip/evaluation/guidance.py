"""What each way to guide the decoder does to pictures of held-out captions (Figures 9, 11, 13).

N captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.evaluation.findings import Findings
from unclip.evaluation.priors import LIKENESS, TITLES, drawer, figure, likeness, named
from unclip.evaluation.report import Columns, lines_of
from unclip.evaluation.setting import Request, set_up
from unclip.images import to_pil
from unclip.pipeline import UnCLIP

ALWAYS = (0.0, 1.0)  # whatever a model's own interval is
# Rows of the table and the decoder's options in each: with embedding and caption, and without.
EMBEDDED: dict[str, dict[str, Any]] = {
    "1 (off)": {"guidance": 1.0},
    "2": {"guidance": 2.0, "interval": ALWAYS},
    "4": {"guidance": 4.0, "interval": ALWAYS},
    "8": {"guidance": 8.0, "interval": ALWAYS},
    "4, interval 0.2 to 0.8": {"guidance": 4.0, "interval": (0.2, 0.8)},
    "8, interval 0.2 to 0.8": {"guidance": 8.0, "interval": (0.2, 0.8)},
}
ALONE: dict[str, dict[str, Any]] = {
    "caption alone, 1": {"guidance": 1.0},
    "caption alone, 2": {"guidance": 2.0, "interval": ALWAYS},
    "caption alone, 4": {"guidance": 4.0, "interval": ALWAYS},
}
COLUMNS: Columns = {
    "top1": ("name top-1", 100, 0),
    "top5": ("top-5", 100, 0),
    **LIKENESS,
}
MEANING = """\
Captions, embeddings of the prior and the decoder's noise are the same in every row, but that
**caption alone** has no embedding. **Name**: what {judge} calls the picture. **Fréchet**,
**kernel** × 1000: distance from real pictures in features of {eye}; **precision**, **recall**: %
of pictures near a real one, and of real ones near a picture.""".replace("\n", " ")


def compare_guidance(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Draw the same captions and embeddings by the same noise, guided in different ways.

    **Raises**: as `set_up` does.
    """
    reads_text = pipe.need("decoder", "pictures").reads_text
    with set_up(pipe, model, request, work) as setting:
        subjects = setting.held or setting.train
        count = setting.measured
        captions, names = subjects.captions[:count], subjects.names[:count]
        z_image = pipe.text_to_embedding(captions, **setting.options)
        ways: list[tuple[str, Tensor | None, dict[str, Any]]]
        ways = [(name, z_image, how) for name, how in EMBEDDED.items()]
        if reads_text:
            ways += [(name, None, how) for name, how in ALONE.items()]
        pictures = {TITLES["real"]: [to_pil(x) for x in subjects.pictures(range(count))]}
        for name, z, how in ways:
            draw = drawer(pipe, captions, z, {"size": setting.side, **setting.options, **how})
            pictures[name] = setting.kept.draw(f"guidance-{name}", count, draw)
        by_name = named(setting, pictures, names)
        scores, tables = {}, []
        for eye in request.features:
            rows = {
                way: by_name.get(way, {}) | likeness(setting, eye, x, 1)
                for way, x in pictures.items()
            }
            seen_by = setting.eyes[eye].network.about
            about = MEANING.format(judge=setting.judge_in_words, eye=seen_by)
            title = f"Guidance of the decoder on {count} captions, by {eye}"
            tables.append((title, about, *lines_of(COLUMNS, rows)))
            scores[eye] = rows
    return Findings(scores, tables, figure(pictures, captions))
