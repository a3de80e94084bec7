"""Region-parallel training on torch.distributed: one process per rank, started by ``torchrun``.

``parallelize`` spreads a bounded model over the ranks of a device mesh. ``links`` has what ranks exchange inside a
differentiated forward, ``schedules`` in which order, ``adjoints`` the scan over ranks, ``placement`` who holds what.
"""

from __future__ import annotations

from .module import RegionParallel
from .spreading import parallelize
from .traffic import Message, Traffic, traffic

__all__ = ["Message", "RegionParallel", "Traffic", "parallelize", "traffic"]
