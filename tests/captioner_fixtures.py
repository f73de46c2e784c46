"""Tiny BLIP and GIT models with a vocabulary of a few words, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
)

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*MARKS, *"a picture of cat dog red blue on the table and with big small sky".split(" ")]  # noqa: SIM905
SIDE = 32
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": SIDE, "patch_size": 8}


def _save(model: nn.Module, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.3, generator=generator)
    for name, bias in model.named_parameters():
        if name.endswith("predictions.bias") or name == "output.bias":
            bias.data[[0, 1, 2, 4]] = -20  # only the mark that ends a caption is ever chosen
            bias.data[len(WORDS) :] = -20
    model.save_pretrained(folder)  # type: ignore[operator]
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """A BLIP captioner whose last word is the mark that begins a caption."""
    text = {**_TEXT, "vocab_size": len(WORDS) + 1, "encoder_hidden_size": 32, "projection_dim": 16}
    marks = {"bos_token_id": len(WORDS), "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config={**text, **marks, "max_position_embeddings": 64}, vision_config={**_VISION, "projection_dim": 16}
    )
    return _save(BlipForConditionalGeneration(config), folder)


def write_git(folder: Path) -> Path:
    """A GIT captioner."""
    marks = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GitConfig(vision_config=_VISION, vocab_size=len(WORDS), max_position_embeddings=64, **_TEXT, **marks)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return _save(GitForCausalLM(config), folder)
