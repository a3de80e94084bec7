"""Interfaces under autocast, export, Dynamo, vmap and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from tests.interface_chain import ALL, LEARNED, B, Chain, D, Pointwise, T, build


@pytest.mark.parametrize(("kind", "cell"), LEARNED)
@pytest.mark.parametrize("canvas_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_latents_in_one_dtype(kind: str, cell: str | None, canvas_dtype: torch.dtype):
    chain = Chain(build(kind, cell))
    canvas = torch.randn(B, T, D, dtype=canvas_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        xs, _, ms = chain.trace(canvas)
        out = chain(canvas)
    assert {m.dtype for m in ms if m is not None} == {torch.float32}
    assert {x.dtype for x in xs} == {canvas_dtype}
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in chain.parameters())
    torch.testing.assert_close(out.float(), chain(canvas.float()), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("kind", "cell"), ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(kind: str, cell: str | None, dtype: torch.dtype):
    chain = Chain(build(kind, cell)).to(dtype)
    xs, _, ms = chain.trace(torch.randn(B, T, D, dtype=dtype))
    assert {v.dtype for v in [*xs, *ms] if v is not None} == {dtype}


@pytest.mark.parametrize(("kind", "cell"), ALL)
def test_export_with_dynamic_batch_and_length(kind: str, cell: str | None):
    chain = Chain(build(kind, cell, chunk=3 if kind == "chunked" else None))
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    exported = torch.export.export(chain, (torch.randn(B, T, D),), dynamic_shapes=(dims,), strict=False).module()
    # Shorter than one chunk, inside, at and past the last one.
    for shape in [(3, 2), (2, 5), (7, 12), (4, 13), (5, 50)]:
        canvas = torch.randn(*shape, D)
        torch.testing.assert_close(exported(canvas), chain(canvas), rtol=0, atol=0)


# The other interfaces are made of the same operations, and tests of export cover them.
@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        pytest.param("pooled", None, marks=pytest.mark.slow),
        pytest.param("chunked", None, marks=pytest.mark.slow),
        ("token", "gru"),
    ],
)
def test_dynamo_takes_one_graph_for_all_shapes(kind: str, cell: str | None):
    chain = Chain(build(kind, cell, regions=3, chunk=3 if kind == "chunked" else None))
    counter, compiled_at_first = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(chain, backend=counter, fullgraph=True, dynamic=True)
    for shape in [(3, 11), (2, 5), (7, 12), (4, 13), (5, 50)]:
        canvas = torch.randn(*shape, D)
        out, expected = compiled(canvas), chain(canvas)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(v.square().sum(), list(chain.parameters())) for v in (out, expected)]
        torch.testing.assert_close(*grads)
        # The first call may compile twice: PyTorch starts again where a float, here a norm's eps, has to be a constant.
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


@pytest.fixture
def no_fallback():
    """Make a missing batching rule an error, where vmap would loop in silence."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(before)


@pytest.mark.parametrize(("kind", "cell"), LEARNED)
@pytest.mark.usefixtures("no_fallback")
def test_backward_can_be_batched_over_the_latent(kind: str, cell: str | None):
    chain = Chain(build(kind, cell)).double()
    _, _, ms = chain.trace(torch.randn(B, T, D, dtype=torch.float64))
    m, after = ms[2], ms[3]
    r = after.shape[-1]
    cotangents = torch.eye(r, dtype=after.dtype).view(r, *[1] * (after.dim() - 1), r).expand(r, *after.shape)
    (J,) = torch.autograd.grad(after, m, cotangents, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(after, m, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(J, torch.stack(rows))
    assert J.abs().max() > 0


@pytest.mark.parametrize(("kind", "cell"), ALL)
def test_gradients_by_finite_differences(kind: str, cell: str | None):
    chain = Chain(build(kind, cell, regions=3, r=4, chunk=2 if kind == "chunked" else None), part=Pointwise).double()
    canvas = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chain, (canvas,), fast_mode=True)


@pytest.mark.parametrize(("kind", "cell"), ALL)
def test_copies_and_state(kind: str, cell: str | None):
    lbi = build(kind, cell)
    canvas = torch.randn(B, T, D)
    torch.manual_seed(1)
    chain = Chain(lbi)
    twins = [copy.deepcopy(chain.lbi), pickle.loads(pickle.dumps(chain.lbi)), build(kind, cell, canvas=canvas, seed=9)]
    twins[2].load_state_dict(lbi.state_dict(), strict=True)
    expected = chain(canvas)
    for twin in twins:
        chain.lbi = twin
        assert torch.equal(chain(canvas), expected)
