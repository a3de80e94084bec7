"""Graph compiler that breaks the sequential backward chain of deep PyTorch networks."""

from __future__ import annotations

from pathlib import Path as _Path

# In a checkout, passes/ and kernels/ stand beside this folder: look for submodules there too. The repository root is not
# put on sys.path, where the bare names would collide with other distributions.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "passes").is_dir() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
