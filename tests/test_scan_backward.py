"""The rewrite of the joint graph: gradients equal those of plain autograd of the same marked model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lbi_compile.backend import eager_backend
from lbi_compile.errors import EngineError
from lbi_compile.passes.scan_backward import ScanRecord
from tests.marked import (
    EXACT,
    MlpRegion,
    Pooled,
    Scans,
    Token,
    mark,
    pooled_attention,
    pooled_mlp,
    step,
)


def scanned(module: nn.Module) -> tuple[Callable[..., Any], ScanRecord]:
    record = ScanRecord()
    return torch.compile(module, backend=eager_backend(record), dynamic=True, fullgraph=True), record


def check(
    module: nn.Module, inputs: Sequence[Tensor], *, bitwise: bool = True, scans: Scans | None = None, **options: Any
) -> ScanRecord:
    """Output, random state and gradients equal plain autograd's; one graph serves all inputs; one scan per backward."""
    scans = scans or Scans()
    module = module.double()
    compiled, record = scanned(module)
    torch._dynamo.utils.counters.clear()
    for x in inputs:
        expected = step(module, module, x.double(), **options)
        scans.jacobians.clear()
        found = step(compiled, module, x.double(), watch=scans, **options)
        assert torch.equal(found.output, expected.output) if bitwise else torch.allclose(found.output, expected.output)
        assert torch.equal(found.random, expected.random)
        assert found.error(expected) <= EXACT
        assert len(scans.jacobians) == record.scans
        assert sum(len(J) for J in scans.jacobians) == record.jacobians
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return record


def refused(module: nn.Module, inputs: Tensor) -> EngineError:
    compiled, record = scanned(module)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(inputs)
    assert isinstance(caught.value.inner_exception, EngineError)
    assert record.error is caught.value.inner_exception
    assert record.status == "failed"
    return record.error


SLOW = pytest.mark.slow
FLAT = [torch.randn(b, 6) for b in (3, 5, 9)]
DEEP = [torch.randn(b, t, 6) for b, t in ((3, 7), (5, 11), (4, 2))]


def test_mlp_regions_with_dropout():
    record = check(pooled_mlp(4, r=5), FLAT)
    assert (record.status, record.scans, record.jacobians, record.shared, record.r) == ("scan", 1, 4, 0, (5,))
    assert not record.unrolled


@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("r", [1, 16])
@SLOW
def test_numbers_of_regions_and_latents(K: int, r: int):
    assert check(pooled_mlp(K, r=r), FLAT).jacobians == K


def test_fused_attention_folds_the_cotangents_into_its_batch():
    record = check(pooled_attention(), DEEP)
    assert record.sdpa == "fold"
    assert not record.unrolled


@pytest.mark.parametrize("options", [{"p": 0.1}, {"masked": True}, {"masked": True, "p": 0.1}], ids=str)
@SLOW
def test_attention_with_dropout_and_masks(options: dict[str, Any]):
    record = check(pooled_attention(**options), DEEP)
    assert record.sdpa == ("" if "p" in options else "fold")  # with dropout the CPU takes the decomposed form
    assert not record.unrolled


def test_latents_per_position():
    # AOTAutograd decomposes the fused GRU cell, so the output is not bit-equal with any backend
    record = check(Token("gru"), DEEP, bitwise=False)
    assert (record.jacobians, record.shared) == (2, 0)
    assert not record.unrolled


def test_jacobians_of_linear_cells_are_computed_once():
    module, scans = Token("linear"), Scans()
    assert check(module, DEEP[1::-1], scans=scans).shared == 2
    (J,) = scans.jacobians
    assert J.shape == (2, 21, 4, 4)
    assert J.stride(1) == 0
    torch.testing.assert_close(J[:, 0], torch.stack([cell.weight for cell in module.cells]))


def test_tied_weights_and_auxiliary_losses():
    module = pooled_mlp(4, aux=(1, 3))
    module.regions[2] = module.regions[1]
    module.regions[3].down.weight = module.regions[0].down.weight
    check(module, FLAT[:2])


def test_checkpointed_regions_draw_the_same_dropout_again():
    check(pooled_mlp(3, checkpoint=True), FLAT[:2])


@pytest.mark.parametrize(
    ("frozen", "jacobians"), [(1, 1), pytest.param(0, 2, marks=SLOW), pytest.param(2, 0, marks=SLOW)]
)
def test_frozen_prefix(frozen: int, jacobians: int):
    module = pooled_mlp(3)
    for part in (module.stem, module.enter, *module.regions[:frozen]):
        part.requires_grad_(False)
    record = check(module, FLAT[:2], leaf=False)
    assert record.jacobians == jacobians
    assert record.status == ("scan" if jacobians else "plain")


def test_one_boundary_leaves_nothing_to_scan():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(mark(self.a(x), 0))

    record = check(One(), FLAT[:1])
    assert (record.status, record.scans) == ("plain", 0)
    assert record.why == "nothing to scan: fewer than two boundaries get a gradient"


W = torch.linspace(-1, 1, 16, dtype=torch.double).view(4, 4)
KEEP = torch.tensor([True, False, True, False])


class Join(torch.autograd.Function):
    """Splits a latent ``[B, 4]`` so that the backward joins two gradients in the operator ``kind``."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        ctx.kind = kind
        if kind == "where":
            return torch.where(KEEP, m, 0.0), torch.where(KEEP, 0.0, m)
        if kind == "cat":
            return m[:, :2].clone(), m[:, 2:].clone()
        if kind == "addmm":
            return m.clone(), m @ W.t()
        if kind == "index_put":
            return m * torch.tensor([0.0, 1, 0, 1]), m[:, torch.tensor([0, 2])]
        if kind == "slice_scatter":
            return m * torch.tensor([0.0, 0, 1, 1]), m[:, :2].clone()
        return m[:, :1].clone(), m[:, 1:2].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        a, b = grads
        if ctx.kind == "where":
            joined = torch.where(KEEP, a, b)
        elif ctx.kind == "cat":
            joined = torch.cat([a, b], 1)
        elif ctx.kind == "addmm":
            joined = torch.addmm(a, b, W)
        elif ctx.kind == "index_put":
            joined = a.t().index_put((torch.tensor([0, 2]),), b.t()).t()
        elif ctx.kind == "slice_scatter":
            joined = torch.slice_scatter(a, b, 1, 0, 2)
        else:
            zero = torch.zeros_like(a[:, 0])
            joined = torch.stack([a[:, 0], b[:, 0], zero, zero], 1)
        return joined, None


class Joins(nn.Module):
    """One region per kind of join: one side leads to the next latent, the other (every second time the first) out."""

    def __init__(self, kinds: Sequence[str], flip: int) -> None:
        super().__init__()
        self.kinds, self.flip = tuple(kinds), flip
        self.enter, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.down = nn.ModuleList([nn.Linear(4, 4) for _ in kinds])

    def forward(self, x: Tensor) -> Tensor:
        m = self.enter(x)
        out = x[:, :1] * 0
        for k, kind in enumerate(self.kinds):
            on, side = Join.apply(torch.sin(mark(m, k)), kind)
            if k % 2 == self.flip:
                on, side = side, on
            out = out + side.square().sum(-1, keepdim=True)
            m = self.down[k](torch.tanh(on.sum(-1, keepdim=True) + x[:, :4]))
        return self.head(mark(m, len(self.kinds))) + out


# torch's own: Dynamo instantiates torch.autograd.Function
instantiates = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@instantiates
@pytest.mark.parametrize("flip", [0, pytest.param(1, marks=SLOW)])
def test_gradients_that_join_the_path_inside_an_operator(flip: int):
    kinds = ("where", "cat", "addmm", "index_put", "slice_scatter", "stack")
    record = check(Joins(kinds, flip), FLAT[:2])
    assert record.jacobians == len(kinds)
    assert not record.unrolled


class Chain(nn.Module):
    """Four linear regions; ``skip`` adds to each the hidden value of the one before, past its boundary."""

    def __init__(self, *, skip: bool = False, detach: str = "", r: int = 4) -> None:
        super().__init__()
        self.skip, self.detach = skip, detach
        self.enter, self.head = nn.Linear(6, r), nn.Linear(r, 3)
        self.up = nn.ModuleList([nn.Linear(r, 8) for _ in range(4)])
        self.down = nn.ModuleList([nn.Linear(8, r) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        m = self.enter(x)
        hidden: list[Tensor] = []
        for k in range(4):
            if k == 2 and self.detach == "latent":
                m = m.detach()
            m = mark(m, k)
            hidden.append(torch.tanh(self.up[k](m)))
            h = hidden[-1] + hidden[-2] if self.skip and k else hidden[-1]
            m = self.down[k](h.detach() if k == 2 and self.detach == "region" else h)
        return self.head(mark(m, 4)) + sum(h.sum(-1, keepdim=True) for h in hidden)


def test_a_cut_that_is_no_separator_is_refused():
    error = refused(Chain(skip=True), FLAT[0])
    assert "the adjoint of latent 0 also depends on the adjoints of latents [2" in error.found
    assert "latent 1 to be the only way from region 0 to later latents" in error.expected


def test_a_detached_region_has_a_zero_jacobian():
    record = check(Chain(detach="region"), FLAT[:2])
    assert (record.jacobians, record.shared) == (4, 1)


def test_a_latent_without_gradient_in_the_middle_is_refused():
    assert "gradients at boundaries [0, 1, 3, 4]" in refused(Chain(detach="latent"), FLAT[0]).found


def test_wide_latents_are_refused():
    assert refused(Chain(r=65), FLAT[0]).found == "latents of 65 numbers"
    assert check(Chain(r=64), FLAT[:1]).r == (64,)


def test_latents_of_different_shapes_are_refused():
    class Widths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return mark(self.b(mark(self.a(x), 0)), 1)

    assert "one shape [..., r]" in refused(Widths(), FLAT[0]).expected


class Hook(torch.autograd.Function):
    """Identity whose backward is ``kind``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        changed = {
            "clamp": lambda: g.clamp(-0.1, 0.1),
            "noise": lambda: g + 0.1,
            "norm": lambda: g / g.norm(),
            "max": lambda: g - g.amax(-1, keepdim=True),
            "scale": lambda: g * 0.5,
            "where": lambda: torch.where(torch.arange(4) > 1, g, 0.1),
            "where zero": lambda: torch.where(torch.arange(4) > 1, g, torch.zeros_like(g)),
            "cat": lambda: torch.cat([g[..., :2], torch.ones_like(g[..., 2:])], -1),
            "cat zero": lambda: torch.cat([g[..., :2], g.new_zeros(1).expand_as(g[..., 2:])], -1),
            "pad": lambda: nn.functional.pad(g[..., :3], (0, 1), value=0.1),
            "pad zero": lambda: nn.functional.pad(g[..., :3], (0, 1)),
            "write": lambda: g.index_fill(-1, torch.tensor([1]), 0.1),
            "put": lambda: g.index_put((torch.tensor([0]),), torch.tensor(0.1, dtype=g.dtype)),
        }
        return changed[ctx.kind](), None


class Hooked(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(mark(torch.tanh(Hook.apply(self.b(mark(self.a(x), 0)), self.kind)), 1))


@instantiates
@pytest.mark.parametrize("kind", ["clamp", "noise", "norm", "max"])
def test_backwards_that_are_not_linear_are_refused(kind: str):
    error = refused(Hooked(kind), FLAT[0])
    assert "which is not linear in it" in error.found
    assert "backward='chain'" in error.do


@instantiates
@pytest.mark.parametrize("kind", ["where", "cat", "pad", "write", "put"])
def test_constants_put_in_the_place_of_gradients_are_refused(kind: str):
    error = refused(Hooked(kind), FLAT[0])
    assert "not known to be zero" in error.found or "which is not linear in it" in error.found
    assert "backward='chain'" in error.do


@instantiates
@pytest.mark.parametrize("kind", ["scale", "where zero", "cat zero", "pad zero"])
def test_a_linear_hook_is_exact(kind: str):
    check(Hooked(kind), FLAT[:1])


@torch.library.custom_op("lbi_test::roll_twice", mutates_args=())
def roll_twice(x: Tensor) -> Tensor:
    return 2 * x.roll(1, -1)


@roll_twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lbi_test::roll_back", mutates_args=())
def roll_back(g: Tensor) -> Tensor:
    return 2 * g.roll(-1, -1)


@roll_back.register_fake
def _(g: Tensor) -> Tensor:
    return torch.empty_like(g)


roll_twice.register_autograd(lambda ctx, g: roll_back(g), setup_context=lambda ctx, inputs, output: None)


def test_an_operator_without_batching_rule_runs_once_per_cotangent():
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            m = mark(self.a(x), 0)
            return mark(torch.tanh(self.b(roll_twice(torch.tanh(m)))), 1)

    record = check(Rolled(), FLAT[:2])
    assert list(record.unrolled) == ["lbi_test.roll_back.default"]
    assert record.unrolled["lbi_test.roll_back.default"]


class Calls(nn.Module):
    """Calls one bounded model several times: side by side, on batches of different size, or one after the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.back = pooled_mlp(2), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.how == "sizes":
            return y.sum(0) + self.inner(torch.cat([x, 2 * x])).sum(0)
        again = torch.tanh(self.back(y)) + x if self.how == "sequence" else 2 * x
        return 1.5 * self.inner(again) + y


@pytest.mark.parametrize("how", ["sequence", *[pytest.param(how, marks=SLOW) for how in ("sizes", "beside")]])
def test_a_model_called_twice_in_one_graph_is_scanned_twice(how: str):
    record = check(Calls(how), FLAT[:2])
    assert (record.scans, record.jacobians, record.r) == (2, 4, (4, 4))


class Nested(nn.Module):
    """Region 1 of bounded model 7 holds the whole of bounded model 8."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList([MlpRegion(6, 4, 0.1) for _ in range(2)])
        self.inner = nn.ModuleList([MlpRegion(6, 4, 0.1) for _ in range(2)])
        self.enter, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        m = self.outer[0](mark(self.enter(x), 0, 7), x)
        n = m = mark(m, 1, 7)
        for k, region in enumerate(self.inner):
            n = region(mark(n, k, 8), x)
        n = mark(n, 2, 8)
        return self.head(mark(self.outer[1](m + n, x), 2, 7)) + n.sum(-1, keepdim=True)


class Pair(nn.Module):
    """A second latent is read from inside the regions of a first; ``mutual`` feeds it back into the first."""

    def __init__(self, *, mutual: bool) -> None:
        super().__init__()
        self.mutual = mutual
        self.regions = nn.ModuleList([MlpRegion(6, 4, 0.1) for _ in range(3)])
        self.cells = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])
        self.enter, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        c = self.enter(x)
        t = torch.zeros_like(c)
        for k, (region, cell) in enumerate(zip(self.regions, self.cells, strict=True)):
            h = region(mark(c, k, 1), x)
            t = mark(torch.tanh(cell(torch.cat([h, t], -1))), k, 2)
            c = h + t if self.mutual else h
        return self.head(mark(c, 3, 1) + t)


@pytest.mark.parametrize(("module", "jacobians"), [(Pair(mutual=False), 5), pytest.param(Nested(), 4, marks=SLOW)])
def test_several_bounded_models_in_one_graph(module: nn.Module, jacobians: int):
    record = check(module, FLAT[:2])
    assert (record.scans, record.jacobians) == (2, jacobians)


def test_bounded_models_that_feed_each_other_are_refused():
    assert "also depends on the adjoints" in refused(Pair(mutual=True), FLAT[0]).found


class Convolutions(nn.Module):
    """``m [B, R], x [B, D] -> [B, R]`` through convolution, pooling, interpolation, normalisation, sorting."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(r, d), nn.Linear(d, r)
        self.line, self.plane = nn.Conv1d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, m: Tensor, x: Tensor) -> Tensor:
        h = self.line((self.up(m) + x)[:, None])
        plane = torch.relu(self.plane(torch.nn.functional.interpolate(h, scale_factor=2).view(-1, 2, 4, 4)))
        pooled = torch.nn.functional.max_pool2d(plane, 2) + torch.nn.functional.avg_pool2d(plane, 2)
        h = torch.nn.functional.group_norm(torch.nn.functional.rms_norm(pooled.flatten(1), (8,)), 2)
        h = torch.gather(torch.softmax(h, -1), 1, x.argsort(-1)).cumsum(-1)
        return m * torch.sigmoid(self.down(h))


@SLOW
def test_operators_of_vision_models():
    assert not check(Pooled([Convolutions(8, 4) for _ in range(2)]), FLAT).unrolled


def test_gradients_come_from_the_scan():
    module = pooled_mlp(3, p=0.0).double()
    compiled, _ = scanned(module)
    expected = step(module, module, FLAT[0].double())
    found = step(compiled, module, FLAT[0].double(), watch=Scans(zeros=True))
    assert torch.equal(found.output, expected.output)
    assert found.error(expected) > 0.1


@pytest.mark.slow
def test_bf16_autocast_is_as_exact_as_compiled_autograd():
    module = pooled_mlp(2, p=0.0)
    compiled, _ = scanned(module)
    chain = torch.compile(module, backend="aot_eager", dynamic=True)
    errors: dict[str, list[float]] = {"scan": [], "chain": []}
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(16, 6)
        exact = step(module.double(), module, x.double())
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            errors["scan"].append(step(compiled, module, x).error(exact))
            errors["chain"].append(step(chain, module, x).error(exact))
    median = {name: sorted(values)[2] for name, values in errors.items()}
    assert 0 < median["scan"] <= 1.5 * median["chain"]
