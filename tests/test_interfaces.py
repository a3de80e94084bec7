"""Interfaces: what crosses a boundary, and what must not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lbi_compile.errors import InterfaceError, LatentWidthError, RegionsError
from lbi_compile.interfaces import (
    KINDS,
    PooledInterface,
    TokenInterface,
    build_interface,
    canvas_scale,
    interface_class,
)
from lbi_compile.interfaces.token import GRUCell, LinearCell
from tests.interface_chain import ALL, CROSSING, LEARNED, B, Chain, D, Pointwise, T, build

# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cell"), ALL)
@pytest.mark.parametrize("regions", [2, 3, 5])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_latents_exist_where_they_are_said_to(kind: str, cell: str | None, regions: int, r: int):
    canvas = torch.randn(B, T, D)
    lbi = build(kind, cell, regions=regions, r=r, canvas=canvas)
    assert type(lbi) is interface_class(kind, cell)
    xs, _, ms = Chain(lbi).trace(canvas)
    assert [k for k, m in enumerate(ms) if m is not None] == list(lbi.latents)
    assert {tuple(m.shape) for m in ms if m is not None} <= {lbi.latent_shape(tuple(canvas.shape))}
    assert (lbi.latent_shape(tuple(canvas.shape)) is None) == (not lbi.latents)
    assert all(x.shape == canvas.shape and x.dtype == canvas.dtype for x in xs)
    assert lbi.parallel == (cell is not None or kind in ("zero", "self"))
    assert lbi.splits == (cell is not None)
    if lbi.parallel:
        for k in range(regions):  # Nothing but the canvas is asked for.
            torch.testing.assert_close(lbi.enter(k, canvas, None), xs[k], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "cell"), ALL)
@pytest.mark.parametrize("regions", [2, 3, 4])
@pytest.mark.parametrize("r", [1, 3, 16])
def test_every_parameter_gets_a_gradient(kind: str, cell: str | None, regions: int, r: int):
    lbi = build(kind, cell, regions=regions, r=r)
    for readout in lbi.readouts:
        chain = Chain(lbi, readout=readout)
        chain(torch.randn(B, T, D)).square().sum().backward()
        idle = [name for name, p in chain.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not idle, readout
        chain.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("kind", "cell", "r"), [("token", "gru", 16), ("zero", None, 16), ("self", None, 16), ("chunked", None, 7)]
)
def test_readouts_leave_out_what_would_idle(kind: str, cell: str | None, r: int):
    chain = Chain(build(kind, cell, r=r), readout="last")
    chain(torch.randn(B, T, D)).square().sum().backward()
    assert any(p.grad is None or not p.grad.any() for p in chain.parameters())
    assert chain.lbi.readouts == type(chain.lbi).readouts_for(r) == ("sum",)


@pytest.mark.parametrize(("kind", "cell"), ALL)
def test_what_crosses(kind: str, cell: str | None):
    """The last region hears of region 0's weights through a latent, and in the controls not at all."""
    chain = Chain(build(kind, cell))
    _, hs, _ = chain.trace(torch.randn(B, T, D))
    hs[-1].square().sum().backward()
    first = chain.bodies[0].weight.grad
    assert (first is not None and first.abs().max() > 0) == ((kind, cell) in CROSSING)


@pytest.mark.parametrize("cell", ["gru", "linear"])
@pytest.mark.parametrize("regions", [2, 3, 6])
@pytest.mark.parametrize("own", [False, True])
def test_self_has_the_parameters_of_token(cell: str, regions: int, own: bool):
    token, control = (build(kind, cell, regions=regions, own_finish=[own] * regions) for kind in ("token", "self"))
    assert control.parameter_count == token.parameter_count == sum(p.numel() for p in token.parameters())
    assert sorted(map(str, _shapes(control))) == sorted(map(str, _shapes(token)))


@pytest.mark.parametrize("shape", [(B, D), (B, T, D)])
@pytest.mark.parametrize("regions", [2, 5])
def test_self_has_the_parameters_of_pooled(shape: tuple[int, ...], regions: int):
    pooled, control = (build(kind, regions=regions, canvas=torch.randn(shape)) for kind in ("pooled", "self"))
    assert {n: p.shape for n, p in control.named_parameters()} == {n: p.shape for n, p in pooled.named_parameters()}
    assert pooled.parameter_count > 0


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [p.shape for p in module.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_one_region_crosses_nothing(kind: str):
    lbi = build(kind, "gru" if kind.startswith("token") else None, regions=1)
    assert (lbi.kind, lbi.parameter_count, list(lbi.latents)) == ("zero", 0, [])


def test_parameters_stand_under_the_index_of_their_region():
    names = {name.rsplit(".", 1)[0] for name, _ in build("token", "linear").named_parameters()}
    regions = {part: sorted({int(n.split(".")[1]) for n in names if n.startswith(part)}) for part in ("enc", "dec")}
    assert regions == {"enc": [0, 1, 2], "dec": [1, 2, 3]}
    assert {n for n in names if n.startswith("cells")} == {"cells.1", "cells.2"}


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, D), (B, T, D)])
def test_pooled_formulas(shape: tuple[int, ...]):
    canvas, h = torch.randn(shape).double(), torch.randn(shape).double()
    lbi = build("pooled", canvas=canvas)
    assert isinstance(lbi, PooledInterface)
    mean = canvas if canvas.dim() == 2 else canvas.sum(1) / T
    m = lbi.initial(canvas)
    torch.testing.assert_close(m, lbi.encode_canvas(mean))
    change = lbi.enter(1, canvas, m) - canvas
    torch.testing.assert_close(change, lbi.decoders[1](m).reshape(B, *[1] * (len(shape) - 2), D).expand(shape))
    step = m + math.tanh(lbi.gates[1].item()) * lbi.encoders[1](h if h.dim() == 2 else h.sum(1) / T)
    torch.testing.assert_close(lbi.leave(1, m=m, h=h), F.layer_norm(step, (16,)))
    assert lbi.leave(3, m=m, h=h) is None


def test_narrow_latents_keep_their_value():
    """A LayerNorm over one number would return its bias, whatever the number."""
    lbi = build("pooled", r=1)
    out = lbi.leave(0, m=torch.tensor([[0.1], [0.5]]), h=torch.zeros(2, D))
    assert out is not None
    assert (out[1] - out[0]).item() > 0.1


def test_gru_cell_is_that_of_torch():
    canvas = torch.randn(1, 1, D, dtype=torch.float64)
    cell = build("token", "gru", canvas=canvas).cells["2"]
    assert isinstance(cell, GRUCell)
    oracle = nn.GRUCell(16, 16, dtype=torch.float64)
    with torch.no_grad():
        # Ours has the order keep, reset, new; torch's reset, keep, new.
        order = torch.cat([torch.arange(16, 32), torch.arange(16), torch.arange(32, 48)])
        oracle.weight_ih.copy_(cell.input.weight[order])
        oracle.bias_ih.copy_(cell.input.bias[order])
        oracle.weight_hh.copy_(cell.latent.weight[order])
        oracle.bias_hh.zero_()
    z, m = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(cell(z, m), oracle(z, m))
    assert torch.sigmoid(cell.input.bias[:16]).sub(2 / 3).abs().max() < 1e-12


def test_linear_cell_starts_as_a_scaled_rotation():
    cells = [build("token", "linear").cells[k] for k in "12"]
    for k, cell in enumerate(cells, start=1):
        assert isinstance(cell, LinearCell)
        torch.testing.assert_close(cell.A @ cell.A.T, torch.eye(16) * k / (k + 1), atol=1e-6, rtol=0)
        assert cell.A.diagonal().min() > 0.5 * math.sqrt(k / (k + 1))
    z, m = torch.randn(2, 2, 5, 16)
    torch.testing.assert_close(cells[0](z, m), torch.einsum("ij,btj->bti", cells[0].A, m) + z)
    assert (cells[0].A @ cells[1].A - cells[1].A @ cells[0].A).abs().max() > 1e-2


def test_token_formulas():
    lbi = build("token", "linear")
    assert isinstance(lbi, TokenInterface)
    a, m = torch.randn(B, T, D), torch.randn(B, T, 16)
    z = lbi.encode(1, a)
    encoder = lbi.encoders["1"]
    torch.testing.assert_close(z, encoder.out(F.layer_norm(a, (D,))))
    assert lbi.encode(3, a) is None
    assert lbi.inject(0, a, z, None) is a
    torch.testing.assert_close(lbi.inject(2, a, z, m), a + lbi.decoders["2"](m))
    assert lbi.leave(0, m=None, h=a, z=z) is z
    torch.testing.assert_close(lbi.leave(1, m=m, h=a, z=z), lbi.cells["1"](z, m))
    assert lbi.leave(3, m=m, h=a, z=None) is None


def test_self_reads_its_own_latent():
    lbi = build("self", "gru")
    a = torch.randn(B, T, D)
    assert lbi.encode(0, a) is None
    for k in (1, 2, 3):
        z = lbi.encode(k, a)
        u = z if k == 3 else lbi.cells[str(k)](z, z)
        torch.testing.assert_close(lbi.inject(k, a, z, None), a + lbi.decoders[str(k)](u))


def test_own_finish_brings_an_mlp():
    lbi = build("token", "gru", own_finish=[True, False, True, True])
    assert isinstance(lbi, TokenInterface)
    assert isinstance(lbi.decoders["1"], nn.Linear)
    mlp = lbi.decoders["2"]
    assert (mlp.hidden.out_features, mlp.out.out_features) == (64, D)
    a, m = torch.randn(B, T, D), torch.randn(B, T, 16)
    torch.testing.assert_close(lbi.inject(2, a, None, m), a + mlp.out(F.gelu(mlp.hidden(m))))


def test_finishes_of_other_widths():
    lbi = build("token", "gru", widths=[8, 24, 8, 12])
    a, m = torch.randn(B, T, 24), torch.randn(B, T, 16)
    assert lbi.encode(1, a).shape == (B, T, 16)
    assert lbi.inject(1, a, None, m).shape == a.shape


@pytest.mark.parametrize("shape", [(B, D), (B, T, D), (B, D, 5, 5)])
def test_identity_is_the_chain_itself(shape: tuple[int, ...]):
    canvas = torch.randn(shape)
    chain = Chain(build("identity", canvas=canvas, r=7), part=nn.Tanh)
    direct = canvas
    for body, finish in zip(chain.bodies, chain.finishes, strict=True):
        direct = finish(body(direct))
    assert torch.equal(chain(canvas), direct)
    assert chain.lbi.r == canvas[0].numel()
    m = chain.lbi.initial(canvas)
    assert m.data_ptr() == canvas.data_ptr()
    assert chain.lbi.enter(1, canvas, m).data_ptr() == canvas.data_ptr()


def test_zero_adds_nothing():
    canvas = torch.randn(B, D, 5, 5)
    lbi = build("zero", canvas=canvas)
    assert lbi.parameter_count == 0
    assert lbi.enter(2, canvas, None) is canvas


@pytest.mark.parametrize("cell", ["gru", "linear"])
def test_token_positions_are_independent(cell: str):
    chain = Chain(build("token", cell), part=Pointwise)
    canvas = torch.randn(B, T, D)
    out = chain(canvas)
    for t in range(T):
        changed = canvas.clone()
        changed[:, t] += 1
        same = (chain(changed) == out).all(-1)
        assert same[:, torch.arange(T) != t].all()
        assert not same[:, t].any()


# --- the first step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cell"), ALL)
def test_numbers_come_from_the_seed_alone(kind: str, cell: str | None):
    canvas = torch.randn(B, T, D)
    state = torch.get_rng_state()
    first, again, other = (build(kind, cell, canvas=canvas, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    double = build(kind, cell, canvas=canvas.double(), seed=3).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert double[name].dtype == torch.float64
        torch.testing.assert_close(value, double[name].float())
    weights = [name for name, value in first.items() if value.dim() == 2 and value.numel() > 1]
    assert all(not torch.equal(first[name], other[name]) for name in weights)
    assert weights or kind in ("identity", "zero")


@pytest.mark.parametrize(("kind", "cell"), [*LEARNED, *ALL[-3:]])
@pytest.mark.parametrize("size", [0.02, 1.0, 5.0])
def test_decoded_latent_starts_heard_but_small(kind: str, cell: str | None, size: float):
    regions, width = 24, 96
    # Deep in a chain of GRUs the latent is a mean over many regions; some chunked positions read nothing.
    floor = {"gru": 0.04, None: 0.08, "linear": 0.1}[cell if kind == "token" else None]
    canvas = torch.randn(8, 40, width) * size
    lbi = build(kind, cell, regions=regions, canvas=canvas)
    m = lbi.initial(canvas)
    for k in range(regions):
        h = canvas + size * torch.randn(8, 40, width)
        x, z = lbi.enter(k, canvas, m), lbi.encode(k, h)
        change = lbi.inject(k, h, z, m) - h + x - canvas
        m = lbi.leave(k, m=m, h=h, z=z)
        if k:  # Region 0 of token has no latent, group 0 of chunked reads none.
            assert floor < change.square().mean().sqrt() / canvas_scale(canvas) < 0.4
        if m is not None:
            assert 4 * floor < m.square().mean().sqrt() < 1.5


def test_linear_latent_keeps_unit_variance_and_every_word():
    regions = 48
    lbi = build("token", "linear", regions=regions, canvas=torch.randn(4, 8, 64))
    values = [torch.randn(200, 1, 64, requires_grad=True) for _ in range(regions - 1)]
    m = None
    for k, a in enumerate(values):
        m = lbi.leave(k, m=m, h=a, z=lbi.encode(k, a))
    assert m.var().item() == pytest.approx(1, abs=0.2)
    sizes = torch.stack([g.norm() for g in torch.autograd.grad(m.square().sum(), values)])
    assert sizes.max() / sizes.min() < 2.5


def test_canvas_scale():
    assert canvas_scale(torch.full((2, 3), 0.9)) == 1.0
    assert canvas_scale(torch.full((2, 3), -0.02)) == 2.0**-6
    assert canvas_scale(torch.zeros(2, 3)) == canvas_scale(torch.full((2,), math.nan)) == 1.0
    weights = [build("pooled", canvas=torch.full((B, D), v)).decoders[0].out.weight for v in (0.25, 1.0)]
    torch.testing.assert_close(weights[0] * 4, weights[1])
    with FakeTensorMode() as mode, pytest.raises(InterfaceError, match=r"without numbers(.|\n)*scale="):
        canvas_scale(mode.from_tensor(torch.randn(2, 3)))
    lbi = build("chunked", canvas=torch.empty(B, T, D, device="meta"), scale=1.0)
    assert {p.device.type for p in lbi.parameters()} == {"meta"}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        ("pool", {}, InterfaceError, r"interface='pool'(.|\n)*one of pooled, chunked, token"),
        ("token", {"cell": "lstm"}, InterfaceError, r"cell='lstm'(.|\n)*gru, linear"),
        ("token", {}, InterfaceError, r"cell=None(.|\n)*gru, linear"),
        ("token", {"cell": "gru", "shape": (B, D)}, InterfaceError, r"shape \(3, 8\)(.|\n)*\[B, T, D\](.|\n)*'pooled'"),
        ("chunked", {"shape": (B, D)}, InterfaceError, r"shape \(3, 8\)(.|\n)*\[B, T, D\](.|\n)*'pooled'"),
        ("pooled", {"shape": (B, 4, 5, D)}, InterfaceError, r"\[B, D\] or \[B, T, D\](.|\n)*'identity' or 'zero'"),
        ("token", {"cell": "gru", "shape": (B, 4, 5, D)}, InterfaceError, r"\[B, T, D\](.|\n)*'identity' or 'zero'"),
        ("self", {"cell": "gru", "shape": (B, D)}, InterfaceError, r"no positions(.|\n)*cell=None"),
        ("self", {"cell": "rnn"}, InterfaceError, r"cell='rnn'(.|\n)*gru, linear, or None"),
        ("pooled", {"width": 9}, InterfaceError, r"width=9(.|\n)*width=8"),
        ("pooled", {"dtype": torch.long}, InterfaceError, r"torch.int64(.|\n)*floating point"),
        ("chunked", {"chunk": 0}, InterfaceError, r"chunks of 0 positions"),
        ("token", {"cell": "gru", "own_finish": [True]}, InterfaceError, r"1 own_finish for 4 regions"),
        ("token", {"cell": "gru", "widths": [8] * 5}, InterfaceError, r"5 widths for 4 regions"),
        ("chunked", {"chunks": 3}, LatentWidthError, r"r=16 in 3 chunks(.|\n)*divides r(.|\n)*r=15"),
        ("chunked", {"chunks": 0}, LatentWidthError, r"r=16 in 0 chunks"),
        ("pooled", {"r": 0}, LatentWidthError, r"r=0(.|\n)*r=1 or more"),
        ("pooled", {"regions": 0}, RegionsError, r"regions=0(.|\n)*regions=1 or more"),
    ],
)
def test_errors(kind: str, options: dict, error: type[Exception], text: str):
    shape: Sequence[int] = options.pop("shape", (B, T, D))
    canvas = torch.ones(*shape, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(error, match=text):
        build_interface(kind, **{"regions": 4, "width": D, "r": 16, "canvas": canvas, **options})
