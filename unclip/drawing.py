"""Drawing pictures: prior, decoder and upsamplers one after the other, in groups (Section 2).

B pictures, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.conditioning import Cond, TextEncoding
from unclip.images import to_pil
from unclip.stages.prior import draw_embeddings
from unclip.stages.stage import Draw, Stage, together
from unclip.stages.upsampler import enlarged


@dataclass(frozen=True)
class Drawing:
    """What draws a call's pictures, and how many of which the best are kept.

    `draw` knows the options of every stage; `upsamplers` lead from the decoder's size to the one
    asked for. Without a prior there must be embeddings, without `encode_text` no captions.
    """

    prior: Stage | None
    decoder: Stage
    upsamplers: Sequence[Stage]
    draw: Draw
    device: torch.device
    encode_text: Callable[[Sequence[str]], TextEncoding] | None
    encode_image: Callable[[Sequence[Image]], Tensor]
    prior_candidates: int
    candidates: int

    def pictures(
        self, prompts: Sequence[str], z_image: Tensor | None, seeds: Sequence[int]
    ) -> Iterator[Image]:
        """A picture for each seed, the prompts' own in equal numbers, prompt-major.

        As many as the decoder takes together go through all stages before the next do, so that
        memory doesn't grow with their number. **Shapes**: z_image (B, D) for B seeds.
        """
        group, n = together(self.decoder.shape, self.device), len(seeds) // len(prompts)
        for start in range(0, len(seeds), group):
            own = seeds[start : start + group]
            index = torch.arange(start, start + len(own)) // n  # of the prompts
            text = None
            if self.encode_text is not None:
                read = self.encode_text(prompts[int(index[0]) : int(index[-1]) + 1])
                text = read.rows(index - index[0])
            z = None if z_image is None else z_image[start : start + group].to(self.device)
            yield from self._best(z, text, own)

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
        scores = [cosine_similarity(self.encode_image(r).float(), z_text) for r in rounds]
        best = torch.stack(scores).argmax(0).tolist()  # of (candidates, B)
        yield from (rounds[j][k] for k, j in enumerate(best))

    def _finish(
        self,
        z_image: Tensor | None,
        text: TextEncoding | None,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Image]:
        """A picture for each generator, as soon as the last stage has drawn it."""
        if z_image is None:
            assert text is not None and self.prior is not None
            count = self.prior_candidates
            z_image = draw_embeddings(self.prior, text, generators, count, self.draw)
        cond = Cond(image_embed=z_image, text=text)
        x = self.draw(self.decoder, cond, generators).clamp(-1, 1)  # (B, 3, R, R)
        yield from map(to_pil, enlarged(self.upsamplers, x, generators, self.draw))
