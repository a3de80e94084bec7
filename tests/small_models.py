"""A small model and its bounded form, and how two sets of gradients are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lbi_compile import BoundedModule, transform
from tests.models import ResidualMLP


def mlp(**options: Any) -> ResidualMLP:
    return ResidualMLP(5, width=8, depth=3, classes=3, **options)


def small(*, regions: int = 3, **options: Any) -> tuple[ResidualMLP, Tensor, BoundedModule]:
    """A residual MLP, its input and its bounded model."""
    model, x = mlp(dropout=options.pop("dropout", 0.0)), torch.randn(5, 5)
    return model, x, transform(model, x, regions=regions, r=4, **options)


def seeded(call: Callable[[], Any], seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return call()


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    out.square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    """Bit-equal gradients under equal names."""
    assert a.keys() == b.keys()
    return all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a.values(), b.values(), strict=True))


def close(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)
