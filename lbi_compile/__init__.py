"""Graph compiler that breaks the sequential backward chain of deep PyTorch networks."""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import Any as _Any

# In a checkout, passes/ and kernels/ stand beside this folder: look for submodules there too. The repository root is
# not put on sys.path, where the bare names would collide with other distributions.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "passes").is_dir() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

from .bounded import BoundedModule  # noqa: E402  after __path__
from .credit import HBLL, SID  # noqa: E402
from .engines import Engine  # noqa: E402
from .errors import *  # noqa: E402,F403
from .errors import __all__ as _errors  # noqa: E402
from .newton import Solve  # noqa: E402
from .plan import Plan  # noqa: E402
from .region import Region, Taps  # noqa: E402
from .report import Report  # noqa: E402
from .transform import plan, transform  # noqa: E402
from .verify import verify  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "HBLL",
    "SID",
    "BoundedModule",
    "Engine",
    "Plan",
    "Region",
    "Report",
    "Solve",
    "Taps",
    "plan",
    "transform",
    "verify",
    *_errors,
]

# Packages that a program which never asks for them need not import.
_LATER = ("ablation", "diagnostics", "distributed", "passes")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
