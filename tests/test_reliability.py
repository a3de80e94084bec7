"""Unusual models, calls and contexts: exact or refused with a clear error, never silently wrong."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lbi_compile
from lbi_compile import BoundedModule, transform
from lbi_compile.errors import ExampleInputsError, NoFloatPathError, StaleCaptureError
from lbi_compile.gate import Gate
from lbi_compile.verify import relative_errors
from tests import fuzz, soak
from tests.cases import gradients, project
from tests.dags import Dag, Step
from tests.fuzz import Case, cases, judge
from tests.models import ResidualMLP

EXACT = 1e-10


def mlp(**options: Any) -> ResidualMLP:
    torch.manual_seed(0)
    return ResidualMLP(5, width=6, depth=4, classes=3, **options).double()


def example(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def of_model(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the model itself, drawn as ``gradients`` draws."""
    model.zero_grad()
    torch.manual_seed(7)
    project(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(bounded: BoundedModule, x: Tensor, engine: str = "chain") -> float:
    return max(relative_errors(gradients(bounded, x, engine), gradients(bounded, x, "autograd")).values())


# -- random models


# What stands behind the canvas first is a statistic of it, through which no gradient comes back.
A_STATISTIC = Case(
    (Step("buffer", 1, 1), Step("tanh", 1, 1), Step("tanh", 1, 1)), False, False, False, 0, False,
    {
        "regions": 4, "r": 2, "interface": "pooled", "cell": "auto", "readout": "auto", "backward": "chain",
        "batch_regions": False, "jacobian_bytes": 2**28, "allow_leak": False,
    },
    (),
)  # fmt: skip


@settings(
    max_examples=6, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(cases(engines=("chain",), longest=7))
@hypothesis.example(A_STATISTIC)
def test_random_models_and_options(case: Case) -> None:
    assert not (found := judge(case)).defect, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(
    max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)  # fmt: skip
@given(cases())
def test_many_random_models_and_options(case: Case) -> None:
    torch._dynamo.reset()
    assert not (found := judge(case)).defect, found


def test_the_judge_tells_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in fuzz.drawn(3, 12) if judge(case).kind == "exact")
    honest = fuzz._traced

    def spoiled(bounded: BoundedModule, x: Tensor, engine: str) -> Any:
        found = honest(bounded, x, engine)
        if engine != "autograd":
            name = next(name for name, g in found.gradients.items() if g is not None)
            found.gradients[name] = found.gradients[name] * (1 + 1e-6)
        return found

    monkeypatch.setitem(case.options, "backward", "chain")
    assert judge(case).kind == "exact"
    monkeypatch.setattr(fuzz, "_traced", spoiled)
    found = judge(case)
    assert (found.kind, found.defect) == ("silent", True)
    assert 1e-7 < found.error < 1e-5

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("internal")

    monkeypatch.setattr(lbi_compile, "transform", broken)
    assert judge(case).kind == "unclear"


def test_cases_of_a_seed_are_always_the_same_and_rows_are_not_run_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.drawn(5, 4) == fuzz.drawn(5, 4) != fuzz.drawn(6, 4)
    run: list[Case] = []

    def found(case: Case) -> fuzz.Outcome:
        run.append(case)
        return fuzz.Outcome("silent" if len(run) == 3 else "exact", engine="chain")

    monkeypatch.setattr(fuzz, "judge", found)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = ["--from", "2", "--examples", "30", "--out", str(tmp_path / "rows.jsonl")]
    with warnings.catch_warnings():
        assert fuzz.main(arguments) == 1
        assert len(run) == 2 * fuzz.SLICE
        assert fuzz.main(arguments) == 1  # it is still in the file
    assert len(run) == 2 * fuzz.SLICE
    assert "seed 2, case 2: silent" in capsys.readouterr().out


# -- models that are not plain


def weight_norm(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        parametrizations.weight_norm(block.branch[0])


def spectral_norm(model: nn.Module) -> None:
    """Its power iteration writes to buffers in every training forward."""
    for block in model.blocks:  # type: ignore[union-attr]
        parametrizations.spectral_norm(block.branch[0])


def tied_by_hand(model: nn.Module) -> None:
    model.blocks[3].branch[0].weight = model.blocks[0].branch[0].weight  # type: ignore[index,union-attr]


@pytest.mark.parametrize("change", [spectral_norm, pytest.param(weight_norm, marks=pytest.mark.slow), tied_by_hand])
def test_parametrizations_before_transform(change: Callable[[nn.Module], None]) -> None:
    model, x = mlp(dropout=0.1), example()
    change(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bounded = transform(model, x, regions=3, r=2, backward="chain")
    identity = transform(model, x, regions=3, interface="identity", backward="chain")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    got, expected = of_model(identity, x), of_model(twin, x)
    assert max(relative_errors(got, expected).values()) <= EXACT
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name  # buffers were written once
    model.eval()
    assert worst(bounded, x) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), example().to(dtype)
    bounded = transform(model, x, regions=3, r=2)
    assert {p.dtype for p in bounded.parameters()} == {bounded(x).dtype} == {dtype}
    assert worst(bounded, x) == 0.0


class ComplexLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, dtype=torch.complex128) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.abs()


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_models_are_refused() -> None:
    with pytest.raises(NoFloatPathError):
        transform(ComplexLayers(), example().to(torch.complex128), regions=2, r=2)
    with pytest.raises(ExampleInputsError, match=r"complex128\[4, 5\]"):
        transform(mlp().to(torch.complex128), example().to(torch.complex128), regions=2, r=2)


def test_on_the_meta_device() -> None:
    model, x = mlp().to("meta"), example().to("meta")
    bounded = transform(model, x, regions=3, r=2)
    out = bounded(x)
    out.sum().backward()
    assert out.is_meta
    assert all(p.is_meta and p.grad.is_meta for p in bounded.parameters())


@pytest.mark.parametrize("interface", ["pooled", "token+chunked"])
def test_contexts_of_the_caller_do_not_reach_the_interface(interface: str) -> None:
    """Default devices and dtypes are for the caller's own tensors."""
    model = mlp()
    x = example() if interface == "pooled" else example(12).view(3, 4, 5)
    options: dict[str, Any] = {"regions": 3, "r": 4, "interface": interface}
    expected = transform(model, x, **options)
    with torch.device("meta"):
        found = transform(model, x, **options)
    torch.set_default_dtype(torch.float16)
    try:
        other = transform(model, x, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for bounded in (found, other):
        for p, wanted in zip(bounded.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, wanted)


# -- models that change after transform

CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 3),
    "forward of its own": lambda layer: setattr(layer, "forward", lambda x: x),
    "another hook": lambda layer: (layer.hook.remove(), layer.register_forward_hook(lambda m, a, out: 3 * out)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_transform_is_noticed(change: str) -> None:
    model, x = mlp(), example()
    layer = model.blocks[1].branch[0]
    layer.hook = layer.register_forward_hook(lambda m, a, out: 2 * out)
    bounded = transform(model, x, regions=3, r=2)
    bounded(x)
    CHANGES[change](layer)
    with pytest.raises(StaleCaptureError, match=r"blocks\.1\.branch\.0"):
        bounded(x)


def test_a_dropout_rate_after_transform_is_noticed() -> None:
    model, x = mlp(dropout=0.1), example()
    bounded = transform(model, x, regions=3, r=2)
    bounded(x)
    model.blocks[2].branch[2].p = 0.5
    with pytest.raises(StaleCaptureError, match=r"blocks\.2\.branch\.2[\s\S]*dropout rates"):
        bounded(x)
    model.blocks[2].branch[2].p = 0.1
    bounded(x)


def test_a_module_at_the_address_of_a_deleted_one_is_noticed() -> None:
    model, x = mlp(), example()
    bounded = transform(model, x, regions=3, r=2)
    bounded(x)
    branch = model.blocks[0].branch
    place = id(branch[1])
    del branch[1]
    others = [nn.ReLU() for _ in range(2000)]
    branch.insert(1, next((other for other in others if id(other) == place), others[0]))
    with pytest.raises(StaleCaptureError, match=r"blocks\.0\.branch\.1"):
        bounded(x)


def test_a_parameter_put_in_the_place_of_another_is_used() -> None:
    model, x = mlp(), example()
    bounded = transform(model, x, regions=3, interface="identity", backward="chain")
    before = bounded(x)
    model.blocks[1].branch[0].weight = nn.Parameter(torch.randn(12, 6, dtype=torch.float64))
    assert not torch.equal(bounded(x), before)
    assert torch.equal(bounded(x), model(x))
    assert max(relative_errors(of_model(bounded, x), of_model(model, x)).values()) <= EXACT


# -- orders of calls


def test_two_bounded_models_of_one_model() -> None:
    model, x = mlp(), example()
    narrow = transform(model, x, regions=3, r=2, backward="chain")
    exact = transform(model, x, regions=2, interface="identity", backward="chain")
    model.zero_grad()
    (project(narrow(x)) + project(exact(x), 5)).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with narrow.with_engine("autograd"):
        (project(narrow(x)) + project(model(x), 5)).backward()
    assert max(relative_errors(got, {n: p.grad for n, p in model.named_parameters()}).values()) <= EXACT


@pytest.mark.parametrize("engine", ["chain", pytest.param("scan", marks=pytest.mark.slow)])
def test_backward_twice_needs_a_retained_graph(engine: str) -> None:
    bounded, x = transform(mlp(), example(), regions=4, r=2, backward=engine), example()
    loss = project(bounded(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert worst(bounded, x, engine) <= EXACT  # and what comes after is as exact as ever


# -- threads


@pytest.fixture
def eager_switching() -> Iterator[None]:
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def by_threads(bounded: BoundedModule, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of one call by each of as many threads, all at once."""
    barrier, found, failed = threading.Barrier(len(inputs)), {}, []

    def work(i: int) -> None:
        try:
            barrier.wait()
            out = bounded(inputs[i])
            named = dict(bounded.named_parameters())
            found[i] = dict(zip(named, torch.autograd.grad(project(out), list(named.values())), strict=True))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    return [found[i] for i in range(len(inputs))]


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("engine", ["chain", "auto", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("built", [True, False])
def test_threads_that_call_one_bounded_model(built: bool, engine: str) -> None:
    """The first calls capture, and one of another rank while others run captures too."""
    inputs = [example(2 + i % 3) for i in range(5)]
    bounded = transform(mlp(), inputs[0] if built else None, regions=4, r=2, backward=engine)
    for found, x in zip(by_threads(bounded, inputs), inputs, strict=True):
        assert max(relative_errors(found, gradients(bounded, x, "autograd")).values()) <= EXACT
    bounded.eval()
    for found, x in zip(by_threads(bounded, inputs), inputs, strict=True):
        assert max(relative_errors(found, gradients(bounded, x, "autograd")).values()) <= EXACT


def test_nobody_runs_while_one_is_alone() -> None:
    gate, at = Gate(), {"running": 0, "alone": 0}
    seen: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for _ in range(30):
            name = "alone" if i == 0 else "running"
            with getattr(gate, name)(), gate.running():
                at[name] += 1
                seen.append((at["running"], at["alone"]))
                threading.Event().wait(1e-4)
                at[name] -= 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(running for running, _ in seen) > 1, "runners wait for each other"
    assert all(not (running and alone) for running, alone in seen)
    with pytest.raises(ZeroDivisionError), gate.alone():
        raise ZeroDivisionError
    with gate.alone():
        pass


# -- numbers that are none


def spoil_input(bounded: BoundedModule, x: Tensor, value: float) -> None:
    x[1, 2] = value


def spoil_weight(bounded: BoundedModule, x: Tensor, value: float) -> None:
    with torch.no_grad():
        bounded.get_parameter("blocks.2.branch.0.weight")[0, 0] = value


def spoil_interface(bounded: BoundedModule, x: Tensor, value: float) -> None:
    with torch.no_grad():
        next(iter(bounded.lbi.parameters())).view(-1)[0] = value


@pytest.mark.parametrize("engine", ["chain", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_autograd_has_it(value: float, engine: str) -> None:
    for spoil in (spoil_input, spoil_weight, spoil_interface):
        bounded, x = transform(mlp(), example(), regions=4, r=2, backward=engine), example()
        spoil(bounded, x, value)
        found = {}
        for name in ("autograd", engine):
            leaf = x.clone().requires_grad_()
            with bounded.with_engine(name):
                out = bounded(leaf)
            named = {"x": leaf, **dict(bounded.named_parameters())}
            given = dict(zip(named, torch.autograd.grad(project(out), list(named.values())), strict=True))
            found[name] = {"out": out.detach(), **given}
        for name, wanted in found["autograd"].items():
            got = found[engine][name]
            assert torch.equal(got.isfinite(), wanted.isfinite()), (spoil.__name__, name)
            held = wanted.isfinite()
            torch.testing.assert_close(got[held], wanted[held], rtol=1e-9, atol=1e-12)
        if spoil is spoil_input:
            assert found[engine]["x"].isfinite().all(1).tolist() == [True, False, True, True]


# -- many steps


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that runs ten thousand steps, and that it sees what it looks for."""
    found = soak.soak(40, every=10, backend="eager", memory=lambda: 100)
    assert found.ok, found
    assert sorted(found.losses) == [10, 20, 30, 40]
    assert [row["form"] for row in found.rows] == ["scan", "compiled by eager"] * 2
    assert found.rows[-1]["graphs"] == found.rows[0]["graphs"] >= 2
    for change in ({"growth": 0.02}, {"late": 1}, {"losses": {10: 1e-4}}, {"losses": {10: float("nan")}}):
        assert not dataclasses.replace(found, **change).ok
    leaking = iter(range(100, 200))
    assert soak.soak(4, every=1, backend="eager", memory=lambda: next(leaking)).growth == pytest.approx(0.03)


# -- what random models found

FOUND = {
    # statistics of detached values, which crossed a boundary and came back with a gradient
    "detached": Case(
        steps=(Step("tanh", 5, 5), Step("buffer", 5, 3), Step("buffer", 2, 3), Step("skip", 1, 2)),
        tap=True,
        positions=False,
        training=True,
        frozen=0,
        leaf=False,
        options={"regions": 4, "r": 4, "interface": "identity", "readout": "last", "backward": "chain"},
        batches=(1,),
    ),
    # a view of a constant, written to between two boundaries
    "view": Case(
        steps=(
            Step("tied", 2, 1),
            Step("zeros", 2, 5),
            *(Step("attention", 1, 1),) * 2,
            Step("alias", 1, 2),
            Step("linear", 3, 3),
        ),
        tap=False,
        positions=True,
        training=False,
        frozen=0,
        leaf=False,
        options={"regions": 2, "r": 3, "interface": "token", "cell": "gru", "backward": "chain", "allow_leak": True},
        batches=(1,),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_models_found(name: str) -> None:
    found = judge(FOUND[name])
    assert (found.kind, found.note) == ("exact", "")


def test_detached_values_that_cross_stay_detached() -> None:
    torch.manual_seed(0)
    model, x = Dag(FOUND["detached"].steps, tap=True).double(), example()[:, :4]
    bounded = transform(model, x, regions=4, r=8, readout="last", backward="chain")
    gaps = [gap for pieces in bounded.programs[0].regions for gap in pieces.gaps]
    assert {gap.lane.startswith("detach") for gap in gaps if gap.detached} == {True}
    assert not any(gap.detached for gap in gaps if not gap.lane.startswith("detach"))
    for _ in range(2):
        project(bounded(x)[0]).backward()
        assert not model.count.requires_grad
