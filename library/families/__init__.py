"""Model families: everything that an architecture decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.base import ModelFamily

if TYPE_CHECKING:
    from library.models.spec import FamilyName
    from library.options import ModelOptions
    from library.options.settings import FamilyChoice


def family_for(options: ModelOptions, choice: FamilyChoice = "sd") -> ModelFamily:
    """The family that a script is for; ``sd`` is SD1, or SD2 with ``v2``."""
    name: FamilyName = choice if choice != "sd" else "sd2" if options.v2 else "sd1"
    return family_named(name, options.tokenizer_cache_dir)


def family_named(name: FamilyName, tokenizer_cache_dir: str | None = None) -> ModelFamily:
    """The family of a model that was recognised."""
    if name == "sdxl":
        from library.families.sdxl import SdxlFamily

        return SdxlFamily(tokenizer_cache_dir)
    from library.families.sd import SdFamily

    return SdFamily(name == "sd2", tokenizer_cache_dir)
