"""What a run over many files did: counted, named, and turned into an exit status."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Counts of a run, and what failed with the reason. One bad file never ends a run."""

    done: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, name: str, reason: str) -> None:
        """Note a file that nothing could be done with."""
        self.failures.append((name, reason))
        logger.warning("%s: %s; it is left out", name, reason)

    @property
    def exit_status(self) -> int:
        """1 if something failed and nothing was done or left alone on purpose, else 0."""
        return int(bool(self.failures) and not self.done and not self.skipped)

    def report(self, what: str) -> int:
        """Log the counts; returns the exit status. ``what`` names what was done ("captions written")."""
        parts = [f"{what}: {self.done}"]
        parts += [f"left alone: {self.skipped}"] if self.skipped else []
        parts += [f"failed: {len(self.failures)}"] if self.failures else []
        logger.info("%s", ", ".join(parts))
        return self.exit_status
