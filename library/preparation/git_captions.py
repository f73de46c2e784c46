"""Captions by GIT (J. Wang and others, 2022, arXiv:2205.14100) through transformers: the likeliest words, no draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, GitForCausalLM

from library.data.images import Pixels
from library.device import choose_device
from library.hub import load_pretrained
from library.options.preparation import GitCaptionOptions
from library.preparation.outcome import Outcome
from library.preparation.text_files import caption_images

EXAMPLE = "microsoft/git-large-textcaps"

_DOUBLE = r'(?:" ?[^"]*"|\w+)'
_SINGLE = r"(?:' ?(?:i'm)?[^']*'|\w+)"
_PLACE = r"(?: ?(?:is )?(?:on|in) (?:the |her |their |him )?\w+)?"
READ_WORDS: tuple[re.Pattern[str], ...] = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:has|with|and) the (?:words?|letters?|name) {_DOUBLE}{_PLACE}",
        rf"(?:with a sign )?that says ?{_DOUBLE}(?: ?on it)?",
        rf"(?:with a sign )?that says ?{_SINGLE}(?: ?on it)?",
        r"with the number \d+ on (?:it|\w+ \w+)",
        r'with the words "',
        r"word \w+ on it",
        r"that says the word \w+ on it",
        r"that says'the word \"(?: on it)?",
    )
)
"""What the model says about writing in a picture. Each is taken out wherever it stands, in this order."""


def without_read_words(caption: str) -> str:
    """A caption without what the model believes to read in the picture; the blanks around it stay."""
    for pattern in READ_WORDS:
        caption = pattern.sub("", caption)
    return caption


@dataclass(frozen=True)
class GitCaptioner:
    """A model with its tokenizer and its way to prepare pictures."""

    model: Any
    tokenizer: Any
    processor: Any
    options: GitCaptionOptions

    def prepare(self, pixels_HWC: Pixels) -> Tensor:
        """A picture as the model wants it, CHW."""
        return self.processor(images=pixels_HWC, return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ][0]

    @torch.no_grad()
    def captions(self, names: Sequence[str], pictures: Sequence[Tensor]) -> list[str]:
        """The captions of prepared pictures, whatever their names."""
        pixels_BCHW = torch.stack(list(pictures)).to(self.model.device)
        tokens_BT = self.model.generate(
            pixel_values=pixels_BCHW, max_length=self.options.max_length, do_sample=False, num_beams=1
        )
        texts = self.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
        return [without_read_words(text) if self.options.remove_words else text for text in texts]


def load_captioner(options: GitCaptionOptions) -> GitCaptioner:
    """The model of ``--model_id``, on the device. Raises UserError."""
    where = (options.model_id, "--model_id", EXAMPLE)
    model = load_pretrained(GitForCausalLM.from_pretrained, *where)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, *where)
    processor = load_pretrained(CLIPImageProcessor.from_pretrained, *where)
    return GitCaptioner(model.float().eval().to(choose_device()), tokenizer, processor, options)


def caption_folder(options: GitCaptionOptions) -> Outcome:
    """Write a caption file beside each image. Raises UserError."""
    return caption_images(options, lambda: load_captioner(options))
