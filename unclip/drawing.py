"""Drawing pictures: prior, decoder and upsamplers one after the other, in groups (Section 2).

B pictures, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.conditioning import Cond, TextEncoding
from unclip.images import to_pil
from unclip.reader import Reader
from unclip.stages.prior import FromText
from unclip.stages.stage import Draw, Stage, Start, chunks
from unclip.stages.upsampler import enlarged


@dataclass(frozen=True)
class Drawing:
    """What draws a call's pictures, and how many of which the best are kept.

    `draw` knows the options of every stage; `upsamplers` lead from the decoder's size to the one
    asked for. `from_text` makes embeddings where none are given, and what to lead away from;
    without an encoder there are no captions.
    """

    from_text: FromText | None
    decoder: Stage
    upsamplers: Sequence[Stage]
    draw: Draw
    reader: Reader
    candidates: int
    start: Start

    def pictures(
        self, prompts: Sequence[str], z_image: Tensor | None, seeds: Sequence[int]
    ) -> Iterator[Image]:
        """A picture for each seed, the prompts' own in equal numbers, prompt-major.

        As many as the decoder takes together go through all stages before the next do, so that
        memory doesn't grow with their number. **Shapes**: z_image (B, D) for B seeds.
        """
        device, n = self.reader.device, len(seeds) // len(prompts)
        for rows in chunks(len(seeds), self.decoder.shape, device):
            own, text = seeds[rows], None
            if self.reader.clip is not None:
                index = torch.arange(rows.start, rows.start + len(own)) // n  # of the prompts
                read = self.reader.text(prompts[int(index[0]) : int(index[-1]) + 1])
                text = read.rows(index - index[0])
            z = None if z_image is None else z_image[rows].to(device)
            yield from replace(self, start=self.start.rows(rows))._best(z, text, own)

    def _best(
        self, z_image: Tensor | None, text: TextEncoding | None, seeds: Sequence[int]
    ) -> Iterator[Image]:
        """Finish `candidates` for each picture and keep the best by CLIP score."""
        first = self._finish(z_image, text, [torch.Generator().manual_seed(s) for s in seeds])
        if self.candidates == 1 or text is None:
            yield from first
            return
        rounds = [list(first)]
        for j in range(1, self.candidates):
            generators = [randomness.generator(s, "candidate", j) for s in seeds]
            rounds.append(list(self._finish(z_image, text, generators)))
        z_text = text.embed.float()
        scores = [cosine_similarity(self.reader.images(r).float(), z_text) for r in rounds]
        best = torch.stack(scores).argmax(0).tolist()  # of (candidates, B)
        yield from (rounds[j][k] for k, j in enumerate(best))

    def _finish(
        self,
        z_image: Tensor | None,
        text: TextEncoding | None,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Image]:
        """A picture for each generator, as soon as the last stage has drawn it."""
        negative = None if self.from_text is None else self.from_text.unwanted(generators)
        if z_image is None:
            assert self.from_text is not None and text is not None
            z_image = self.from_text(text, generators)
        start, kept, shown = self.start, self.start.kept, None
        if kept is not None and self.decoder.config.inpaint:
            # It draws what goes with that, and nothing is put back.
            shown, start = kept.at(self.decoder.side).shown(), replace(start, kept=None)
        cond = self._told(Cond(image_embed=z_image, text=text), shown)
        away = None if negative is None else self._told(negative, shown)
        x = self.draw(self.decoder, cond, generators, negative=away, start=start).clamp(-1, 1)
        yield from map(to_pil, enlarged(self.upsamplers, x, generators, self.draw, kept))

    def _told(self, cond: Cond, shown: Tensor | None) -> Cond:
        if self.from_text is not None and self.from_text.by == "none":
            keep = torch.zeros(len(cond), dtype=torch.bool, device=cond.device)
            cond = replace(cond, keep_image=keep)
        return replace(cond, known=shown)
