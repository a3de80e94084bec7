"""A record of everything ``transform`` may not change in the caller's model and process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """State, identity, modes, hooks, gradients, attributes and configuration of a model, and the random state."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: _hooks(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
        "random": torch.get_rng_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def differences(before: dict[str, Any], model: nn.Module) -> list[str]:
    """What changed since a snapshot; values are compared bit for bit."""
    return [key for key, now in snapshot(model).items() if not _same(before[key], now)]


def _hooks(module: nn.Module) -> list[int]:
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return a == b
