"""Captions by BLIP (J. Li and others, 2022, arXiv:2201.12086) through transformers.

Shapes: B images, C = 3 colours, H W pixel height and width, V words of the vocabulary, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from library.data.images import Pixels
from library.device import choose_device
from library.hub import load_pretrained
from library.options.preparation import BlipCaptionOptions
from library.preparation.outcome import Outcome
from library.preparation.text_files import caption_images
from library.rng import torch_stream

PROMPT = "a picture of"
REPETITION_PENALTY = 1.1
EXAMPLE = "Salesforce/blip-image-captioning-large"
# Mean and deviation of CLIP's training images, which BLIP was trained with, in 0..1.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class OwnDraws(LogitsProcessor):
    """Makes greedy search draw words by nucleus sampling (A. Holtzman and others, 2019), each row from its own stream.

    The likeliest words that together have probability ``top_p`` stay; with Gumbel noise added, the largest is a draw
    from their distribution. So a caption does not depend on what else is in its batch.
    """

    def __init__(self, top_p: float, generators: Sequence[torch.Generator]) -> None:
        self._top_p = top_p
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores BV of the next word, with noise; -inf outside of the nucleus."""
        sorted_BV, order_BV = scores.float().log_softmax(-1).sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        outside_BV = torch.zeros_like(sorted_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= self._top_p)
        uniform_BV = torch.stack([torch.rand(scores.shape[-1], generator=one) for one in self._generators])
        gumbel_BV = -(-uniform_BV.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return (scores.float() + gumbel_BV.to(scores.device)).masked_fill(outside_BV, -torch.inf)


@dataclass(frozen=True)
class BlipCaptioner:
    """A model with its tokenizer, and how captions are chosen."""

    model: Any
    tokenizer: Any
    options: BlipCaptionOptions

    @property
    def side(self) -> int:
        """Side of the square that the model looks at, in pixels."""
        return int(self.model.config.vision_config.image_size)

    def prepare(self, pixels_HWC: Pixels) -> Tensor:
        """A picture as the model wants it, CHW: stretched to the square, normalised."""
        square = Image.fromarray(pixels_HWC).resize((self.side, self.side), Image.Resampling.BICUBIC)
        scaled_HWC = (np.asarray(square, np.float32) / 255 - _MEAN) / _DEVIATION
        return torch.from_numpy(scaled_HWC).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def captions(self, names: Sequence[str], pictures: Sequence[Tensor]) -> list[str]:
        """The captions of prepared pictures; ``names`` name the streams of their draws."""
        options = self.options
        pixels_BCHW = torch.stack(list(pictures)).to(self.model.device)
        prompt_T = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"][0]  # begins and ends with a mark
        choice: dict[str, Any] = {"num_beams": options.num_beams}
        if not options.beam_search:
            generators = [torch_stream(options.seed, "caption", name) for name in names]
            draws = LogitsProcessorList([OwnDraws(options.top_p, generators)])
            choice = {"num_beams": 1, "logits_processor": draws, "repetition_penalty": REPETITION_PENALTY}
        tokens_BT = self.model.generate(
            pixel_values=pixels_BCHW,
            input_ids=prompt_T.repeat(len(pictures), 1).to(self.model.device),
            attention_mask=torch.ones(len(pictures), len(prompt_T), dtype=torch.long, device=self.model.device),
            do_sample=False,
            max_length=options.max_length,
            min_length=options.min_length,
            **choice,
        )
        texts = self.tokenizer.batch_decode(tokens_BT[:, len(prompt_T) - 1 :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_captioner(options: BlipCaptionOptions) -> BlipCaptioner:
    """The model of ``--caption_weights``, on the device. Raises UserError."""
    where = (options.caption_weights, "--caption_weights", EXAMPLE)
    model = load_pretrained(BlipForConditionalGeneration.from_pretrained, *where)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, *where)
    return BlipCaptioner(model.float().eval().to(choose_device()), tokenizer, options)


def caption_folder(options: BlipCaptionOptions) -> Outcome:
    """Write a caption file beside each image. Raises UserError."""
    return caption_images(options, lambda: load_captioner(options))
