"""After training: read the saved model again, so that a file that cannot be read is noticed at once."""

from __future__ import annotations

from pathlib import Path

from library.log import UserError
from library.models.spec import FAMILY_TITLES, ArchitectureSpec


def check_model(path: Path, spec: ArchitectureSpec) -> list[str]:
    """Recognise a whole model that was just saved (file or Diffusers folder); lines for the report.

    Raises UserError if it is not what was trained.
    """
    from library.models.load import recognise

    found = recognise(path).spec
    if found.family != spec.family or found.unet.widths != spec.unet.widths:
        raise UserError(f"{path.name}: the saved model is not recognised as what was trained; keep the training state")
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return [f"{path.name}: {FAMILY_TITLES[found.family]}, {size / 1e6:,.0f} MB, can be read"]
