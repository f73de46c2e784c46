"""The CLIP tokenizer, made from data in the program: no network is touched.

``clip_merges.txt.gz`` holds the 48,894 merges of OpenAI's vocabulary (MIT licence, see CLIP_LICENSE). The 49,408 tokens
are 256 bytes, 256 bytes that end a word, one token per merge, and the two marks.
"""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.log import UserError
from library.models.spec import BOS_ID, EOS_ID

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 77
SD1_TOKENIZER = "openai/clip-vit-large-patch14"
SD2_TOKENIZER = "stabilityai/stable-diffusion-2"
_BOS = "<|startoftext|>"
_EOS = "<|endoftext|>"
_MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")


def clip_tokenizer(pad_id: int = EOS_ID, cache_dir: str | None = None, source: str = SD1_TOKENIZER) -> CLIPTokenizer:
    """A new tokenizer (the caller may add tokens to it) that pads with ``pad_id``: 49407 for SD1, 0 for SD2.

    ``cache_dir`` is ``--tokenizer_cache_dir``: a tokenizer saved there, in the folder itself or in
    ``<source with / as _>``, is used instead of the built-in one. Raises UserError if that one cannot be read.
    """
    saved = _saved_tokenizer(cache_dir, source)
    tokenizer = _load_saved(saved) if saved else _built_in()
    tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(pad_id))
    return tokenizer


def _built_in() -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    pairs: Any = list(merges)  # its annotation says list[str], its code wants pairs
    return CLIPTokenizer(vocab=dict(vocabulary), merges=pairs, model_max_length=MAX_LENGTH)


@functools.cache
def _vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token -> id, and the merges in order of rank."""
    from tokenizers.pre_tokenizers import ByteLevel

    lines = gzip.decompress(_MERGES_FILE.read_bytes()).decode("utf-8").splitlines()
    pairs = [line.split(" ") for line in lines]
    merges = tuple((left, right) for left, right in pairs)
    letters = sorted(ByteLevel.alphabet())  # by code point: the order of the vocabulary
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _BOS, _EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


def _saved_tokenizer(cache_dir: str | None, source: str) -> Path | None:
    if not cache_dir:
        return None
    for folder in (Path(cache_dir) / source.replace("/", "_"), Path(cache_dir)):
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return folder
    return None


def _load_saved(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise UserError(f"--tokenizer_cache_dir: the tokenizer in {folder} cannot be read ({error})") from error
    if tokenizer.bos_token_id != BOS_ID or tokenizer.eos_token_id != EOS_ID:
        raise UserError(f"--tokenizer_cache_dir: {folder} holds no CLIP tokenizer; remove it or choose another folder")
    return tokenizer
