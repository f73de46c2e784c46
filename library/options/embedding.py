# ruff: noqa: RUF009 - option() declares a field
"""Options of textual inversion: the new words and what their vectors begin as."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from library.options.base import OptionGroup, option
from library.options.values import text

_BRACKETS = "()[]"


def _new_words(raw: Any) -> list[str]:
    """Words that a prompt can hold, each once: those of a text, or of a list of texts."""
    items: list[Any] = list(raw) if isinstance(raw, list | tuple) else [raw]
    words = [word for item in items for word in text(item).split()]
    if not words:
        raise ValueError("must be one or more new words")
    if len(set(words)) < len(words):
        raise ValueError("must not have a word twice")
    wrong = [word for word in words if any(bracket in word for bracket in _BRACKETS)]
    if wrong:
        raise ValueError(f"must be words without brackets, which change weights in prompts, not {wrong[0]}")
    return words


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(OptionGroup):
    """The words that are taught."""

    title: ClassVar[str] = "Textual inversion"

    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = option("pt", help="file format of saved models")
    weights: list[str] | None = option(
        None, help="embedding file to start from, one for each of token_string", metavar="FILE"
    )
    num_vectors_per_token: int = option(
        1, ge=1, help="vectors that each new word stands for; with weights those of the file when absent"
    )
    token_string: list[str] | None = option(
        None,
        convert=_new_words,
        help="new word, which the model must not know; several words are taught together, into a file each",
        metavar="WORD",
    )
    init_word: list[str] | None = option(
        None,
        help="known words whose vectors the new ones begin as; several for several new words: one for each",
        metavar="WORD",
    )
    use_object_template: bool = option(
        False, help="ignore captions; sentences such as 'a photo of a WORD' take their place"
    )
    use_style_template: bool = option(
        False, help="ignore captions; sentences such as 'a painting in the style of WORD' take their place"
    )
