"""Private names of torch, where what they do is not plain from a test of their user."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lbi_compile import _torch


@pytest.fixture
def symbolic() -> tuple[SimpleNamespace, torch.Tensor]:
    """A fake mode and a fake tensor ``[B, 4]`` whose batch size is a symbol with hint 3."""
    mode = _torch.FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    return mode, mode.from_tensor(torch.zeros(3, 4), symbolic_context=context)


@pytest.mark.parametrize("version", ["2.11", "new"])
def test_a_new_guard_raises_and_logs_nothing(
    version: str,
    symbolic: tuple[SimpleNamespace, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    if version == "2.11":
        monkeypatch.delattr(ShapeEnv, "error_on_new_guards", raising=False)
    mode, x = symbolic
    batch = x.shape[0]
    with caplog.at_level(logging.WARNING), _torch.no_new_guards(mode), pytest.raises(Exception, match=r"[gG]uard"):
        bool(batch == 3)
    assert not caplog.records
    assert not mode.shape_env.guards
    with _torch.no_new_guards(mode):
        assert bool(batch == batch)
    assert bool(batch == 3)
    assert mode.shape_env.guards


def test_sizes_are_compared_without_a_guard(symbolic: tuple[SimpleNamespace, torch.Tensor]):
    mode, x = symbolic
    batch, width = x.shape
    assert _torch.same_size(width, 4)
    assert not _torch.same_size(width, 3)
    assert _torch.same_size(batch, x.sum(1).shape[0])
    assert _torch.same_size(2 * batch, batch + batch)
    assert not _torch.same_size(batch, 3)
    assert not _torch.same_size(batch, 2 * batch)
    assert not mode.shape_env.guards


def test_a_missing_batching_rule_raises():
    q = torch.randn(1, 2, 3, 4)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)

    def backward(g: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, q, q, out, lse, 0.0, False)[0]

    with _torch.vmap_without_fallback(), pytest.raises(RuntimeError, match="vmap fallback which is currently disabled"):
        torch.vmap(backward)(torch.randn(5, 1, 2, 3, 4))


def test_a_product_of_several_sizes_is_traced_whole(symbolic: tuple[SimpleNamespace, torch.Tensor]):
    """A size that a trace meets first inside another object is rebuilt from its factors."""
    mode, x = symbolic
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    y = mode.from_tensor(torch.zeros(5), symbolic_context=context, source=ConstantSource("y"))
    known = 2 * x.shape[0] * y.shape[0]
    with mode, _torch.enable_python_dispatcher():
        gm = _torch.traced(lambda x, y: x.new_ones([known]), [x, y], decompositions=None)
    assert gm(torch.zeros(3, 4), torch.zeros(5)).shape == (2 * 3 * 5,)


def test_the_collector_is_as_it_was_after_a_pause():
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with _torch.paused_collector():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
