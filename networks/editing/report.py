"""After a tool wrote a network: read it again, and say what is in it."""

from __future__ import annotations

import logging
from pathlib import Path

from library.checkpoint.inspection import NetworkCheck, check_network, with_hash
from networks.kinds import read_network, weight_norms

logger = logging.getLogger(__name__)


def check_file(path: str | Path) -> NetworkCheck:
    """What a network file of any kind and naming holds. Raises UserError if it cannot be read or is not whole."""
    table, kinds = read_network(path)
    ranks = [kinds[name].rank_of(tensors) for name, tensors in table.modules.items()]
    check = check_network(table.flat(), Path(path).name, weight_norms, ranks)
    return with_hash(check, path, table.metadata)


def report(path: str | Path) -> NetworkCheck:
    """Read the network file that was just written and log modules, ranks, norms by block, finiteness and hash."""
    check = check_file(path)
    problems = check.problems
    for line in check.lines():
        (logger.warning if line in problems else logger.info)("%s", line)
    return check
