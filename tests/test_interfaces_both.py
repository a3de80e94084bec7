"""token+chunked: two latents at every boundary, two scans, and nothing from the token latent to the one of chunks."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.errors import InterfaceError, OptionError
from lbi_compile.interfaces import Latents, TokenChunkedInterface
from lbi_compile.verify import relative_errors
from tests.cases import Inputs, gradients, in_float64, project
from tests.hooked_models import Branching
from tests.interface_chain import B, Chain, D, Pointwise, T, build

KIND = "token+chunked"


def chain(cell: str = "linear", *, regions: int = 4, r: int = 16, dtype: torch.dtype = torch.float32) -> Chain:
    canvas = torch.randn(B, T, D)
    return Chain(build(KIND, cell, regions=regions, r=r, canvas=canvas, chunk=3), part=Pointwise).to(dtype)


@pytest.mark.parametrize("cell", ["gru", "linear"])
def test_formulas(cell: str):
    """One region after another, from the two interfaces that it is made of."""
    made = chain(cell)
    lbi, canvas = made.lbi, torch.randn(B, T, D)
    assert isinstance(lbi, TokenChunkedInterface)
    xs, hs, ms = made.trace(canvas)
    c, t = lbi.chunked.initial(canvas), None
    for k, (body, finish) in enumerate(zip(made.bodies, made.finishes, strict=True)):
        x = lbi.chunked.enter(k, canvas, c)
        a = body(x)
        h = finish(a if t is None else a + lbi.token.decoders[str(k)](t))
        assert torch.equal(x, xs[k])
        assert torch.equal(h, hs[k])
        if k == 3:
            assert ms[k + 1] is None
            break
        z = lbi.token.encoders[str(k)](a)
        c, t = lbi.chunked.leave(k, m=c, h=a), z if t is None else lbi.token.cells[str(k)](z, t)
        assert torch.equal(ms[k + 1].token, t)
        assert torch.equal(ms[k + 1].chunk, c)
    assert ms[0].token is None
    assert lbi.latent_shape((B, T, D)) == (tuple(ms[1].token.shape), tuple(ms[1].chunk.shape))


@pytest.mark.parametrize("cell", ["gru", "linear"])
@pytest.mark.parametrize(("regions", "r"), [(2, 1), (2, 16), (3, 3), (4, 16)])
def test_every_parameter_gets_a_gradient(cell: str, regions: int, r: int):
    made = chain(cell, regions=regions, r=r)
    made(torch.randn(B, T, D)).square().sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert made.lbi.readouts == TokenChunkedInterface.readouts_for(r) == ("sum",)


def test_nothing_flows_from_token_to_chunk_latents():
    made = chain()
    _, _, ms = made.trace(torch.randn(B, T, D))
    first, second, last = ms[1], ms[2], ms[3]
    for chunk in (second.chunk, last.chunk):
        (reached,) = torch.autograd.grad(chunk.sum(), first.token, retain_graph=True, allow_unused=True)
        assert reached is None
    # the other three ways are open
    for after, before in ((second.token, first.token), (second.token, first.chunk), (last.chunk, first.chunk)):
        (reached,) = torch.autograd.grad(after.square().sum(), before, retain_graph=True)
        assert reached.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 7, 13, 16])
def test_reads_no_later_position(length: int, dtype: torch.dtype):
    made = chain("gru", dtype=dtype)
    canvas = torch.randn(B, length, D, dtype=dtype)
    whole = made(canvas)
    for t in range(1, length):
        for change in (torch.randn(B, length - t, D, dtype=dtype), torch.tensor(math.nan, dtype=dtype)):
            changed = canvas.clone()
            changed[:, t:] = change
            assert torch.equal(made(changed)[:, :t], whole[:, :t])
        assert torch.equal(made(canvas[:, :t]), whole[:, :t])


def test_finishes_of_other_widths():
    lbi = build(KIND, "linear", regions=3, widths=[24, 12, D])
    assert isinstance(lbi, TokenChunkedInterface)
    m = lbi.initial(torch.randn(B, T, D))
    for k, width in enumerate((24, 12, D)):
        a = torch.randn(B, T, width)
        z = lbi.encode(k, a)
        assert lbi.inject(k, a, z, m).shape == a.shape
        m = lbi.leave(k, m=m, h=a, z=z)
    assert m is None


def test_export_with_dynamic_batch_and_length():
    made = chain()
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    exported = torch.export.export(made, (torch.randn(B, T, D),), dynamic_shapes=(dims,), strict=False).module()
    for shape in [(3, 2), (2, 5), (7, 12), (5, 50)]:
        canvas = torch.randn(*shape, D)
        assert torch.equal(exported(canvas), made(canvas))


@pytest.mark.parametrize("canvas_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_latents_in_one_dtype(canvas_dtype: torch.dtype):
    made = Chain(build(KIND, "gru"))
    with torch.autocast("cpu", torch.bfloat16):
        xs, _, ms = made.trace(torch.randn(B, T, D, dtype=canvas_dtype))
    assert {part.dtype for m in ms if m is not None for part in m if part is not None} == {torch.float32}
    assert {x.dtype for x in xs} == {canvas_dtype}


# --- as a bounded model -----------------------------------------------------------------------------------------------


def bounded_of(
    name: str = "transformer", *, regions: int = 3, **options: str
) -> tuple[nn.Module, Tensor, BoundedModule]:
    model, x = in_float64(name, depth=3)
    assert isinstance(x, Tensor)
    return model, x, lbi_compile.transform(model, x, regions=regions, r=8, interface=KIND, **options)


def auxiliary(bounded: BoundedModule, inputs: Inputs) -> Tensor:
    """A loss that reaches both latents by ways of its own."""
    assert isinstance(inputs, Tensor)
    out, taps = bounded.forward_regions(inputs)
    first, last = taps.m[1], taps.m[-1]
    assert isinstance(first, Latents)
    return (
        project(out)
        + 3 * project(first.token.square(), 4)
        + 2 * project(last.chunk.sin(), 5)
        + project(first.chunk.square(), 6)
        + project(taps.h[1], 7)
    )


@pytest.mark.parametrize(
    ("name", "cell"), [("transformer", "linear"), pytest.param("gpt2", "gru", marks=pytest.mark.slow)]
)
def test_engines_agree_with_autograd(name: str, cell: str):
    _, x, bounded = bounded_of(name, cell=cell)
    plain = gradients(bounded, x, "autograd")
    expected = gradients(bounded, x, "autograd", auxiliary)
    assert all(g is not None for g in plain.values())
    assert max(relative_errors(plain, expected).values()) > 1e-3
    for engine in ("chain", "scan"):
        worst = max(relative_errors(gradients(bounded, x, engine, auxiliary), expected).values())
        assert worst <= 1e-10, engine
    ((_, record),) = bounded._compiled.values()
    # three latents of chunks make two Jacobians, two latents per position one, which is the cell's matrix
    assert (record.scans, record.jacobians, record.shared) == (2, 3, 1 if cell == "linear" else 0)
    assert bounded.engine.name == "scan"


@pytest.mark.slow
def test_latents_per_position_alone_have_no_jacobian_with_two_regions():
    _, x, bounded = bounded_of(regions=2)
    expected = gradients(bounded, x, "autograd")
    assert max(relative_errors(gradients(bounded, x, "scan"), expected).values()) <= 1e-10
    ((_, record),) = bounded._compiled.values()
    assert (record.scans, record.jacobians) == (1, 1)


def test_one_region_is_the_model_itself():
    model, x, bounded = bounded_of(regions=1)
    model.eval()
    assert torch.equal(bounded.eval()(x), model(x))


def test_plan_and_report():
    _, x, bounded = bounded_of()
    plan = bounded.plan
    assert (plan.interface, plan.cell, plan.readout) == (KIND, "linear", "sum")
    assert plan.chunk is not None
    assert lbi_compile.Plan.from_json(plan.to_json()) == plan
    crossing = x.shape[0] * (1 + x.shape[1]) * 8 * 8
    assert [region.forward_bytes for region in plan.regions] == [crossing, crossing, 0]
    report = lbi_compile.verify(bounded, x, engine="chain")
    assert report.ok, report
    assert report.leak is False
    (token,) = report.more_norms
    assert (report.first_boundary, token.latent, token.first) == (0, "token", 1)
    cell = bounded.interface.get_parameter("token.cells.1.A").detach()
    assert token.norms == pytest.approx([float(torch.linalg.matrix_norm(cell, 2))])
    assert len(report.jacobian_norms) == 2
    assert "Jacobians of the token latent" in str(report)


def test_copies_and_state():
    _, x, bounded = bounded_of()
    bounded.eval()
    expected = bounded(x)
    for twin in (copy.deepcopy(bounded), pickle.loads(pickle.dumps(bounded))):
        assert torch.equal(twin(x), expected)


def test_refusals():
    model, x = in_float64("transformer", depth=4)
    with pytest.raises(OptionError, match=r"token\+chunked(.|\n)*sequential"):
        lbi_compile.transform(model, x, regions=2, r=8, interface=KIND, forward="parallel")
    with pytest.raises(InterfaceError, match=r"token\+chunked(.|\n)*cannot be captured"):
        lbi_compile.transform(Branching(), torch.randn(2, 4), regions=2, r=8, interface=KIND)
    with pytest.raises(InterfaceError, match=r"\[B, T, D\]"):
        build(KIND, "gru", canvas=torch.randn(B, D))
