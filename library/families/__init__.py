"""Model families: everything that an architecture decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.base import ModelFamily

if TYPE_CHECKING:
    from library.options import ModelOptions
    from library.options.settings import FamilyChoice


def family_for(options: ModelOptions, choice: FamilyChoice = "sd") -> ModelFamily:
    """The family that a script is for: ``sd`` (SD1, or SD2 with ``v2``) or ``sdxl``."""
    if choice == "sdxl":
        from library.families.sdxl import SdxlFamily

        return SdxlFamily(options.tokenizer_cache_dir)
    from library.families.sd import SdFamily

    return SdFamily(options.v2, options.tokenizer_cache_dir)
