"""Region-parallel training on torch.distributed: one process per rank, started by ``torchrun``.

``parallelize`` spreads a bounded model over the ranks of a device mesh. ``links`` has what ranks exchange inside a
differentiated forward, ``schedules`` in which order, ``adjoints`` the scan over ranks, ``placement`` who holds what.
"""

from __future__ import annotations

from .checkpoint import Restored, load, save
from .clipping import clip_grad_norm_
from .faults import watch
from .module import RegionParallel
from .spreading import parallelize
from .starting import start
from .traffic import Message, Traffic, traffic

__all__ = [
    "Message",
    "RegionParallel",
    "Restored",
    "Traffic",
    "clip_grad_norm_",
    "load",
    "parallelize",
    "save",
    "start",
    "traffic",
    "watch",
]
