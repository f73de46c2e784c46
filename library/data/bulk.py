"""Making very many small objects at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def many_objects() -> Generator[None, None, None]:
    """Hold back the search for reference cycles inside the block.

    Plain records have no cycles, but each few thousand of them start a search through all objects that there are:
    with 100,000 records it takes most of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # nobody else keeps objects out of the search
                gc.freeze()
                gc.unfreeze()  # together: all objects count as old at once, without the search that is due
            gc.enable()
