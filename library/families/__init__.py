"""Model families: everything that an architecture decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.base import ModelFamily

if TYPE_CHECKING:
    from library.options import ModelOptions


def family_for(options: ModelOptions) -> ModelFamily:
    """The family that the options ask for: SD1, or SD2 with ``v2``."""
    from library.families.sd import SdFamily

    return SdFamily(options.v2, options.tokenizer_cache_dir)
