"""Models that no graph can hold are cut between child modules, and stay exactly differentiable."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import BoundedModule, Plan, errors, plan, transform, verify
from lbi_compile.verify import relative_errors
from tests.cases import project
from tests.hooked_models import (
    Branching,
    Dressed,
    EarlyExit,
    InPlace,
    LanguageModel,
    LayerDrop,
    Looping,
)
from tests.small_models import same
from tests.untouched import differences, snapshot

KINDS = [Branching, EarlyExit, LayerDrop, Looping, Dressed, InPlace]
TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(5))


def features(seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), **options)


def seeded(call: Callable[[], Any]) -> Any:
    """Run with the same random numbers of every generator each time."""
    torch.manual_seed(3)
    random.seed(3)
    return call()


def gradients(bounded: BoundedModule, x: Tensor, engine: str) -> dict[str, Tensor | None]:
    """Gradients of a loss on the output, a latent and a region's output."""
    bounded.zero_grad()
    with bounded.with_engine(engine):
        loss = loss_of(bounded, x)
        assert bounded.engine.name == engine
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def loss_of(bounded: BoundedModule, x: Tensor) -> Tensor:
    out, taps = seeded(lambda: bounded.forward_regions(x))
    latents = [project(m.sin(), 4) for m in taps.m[-1:] if m is not None]
    return sum(latents, project(out) + project(taps.h[1], 5))


# -- exactness


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS]
    # branches that change the hidden state between blocks have no sum
    + [(kind, options) for kind in KINDS[1:] for options in ({"interface": "self"}, {"readout": "sum"})],
)
def test_chain_equals_autograd(kind, options):
    bounded = transform(kind().double(), features(dtype=torch.float64), regions=3, r=4, **options)
    for seed in range(3):
        x = features(seed, dtype=torch.float64)
        expected = gradients(bounded, x, "autograd")
        assert same(gradients(bounded, x, "chain"), expected)
        assert all(expected[name] is not None for name in expected if name.startswith("lbi."))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_central_differences(kind):
    torch.manual_seed(1)
    model = kind().double()
    bounded = transform(model, features(dtype=torch.float64), regions=3, r=4)
    x = features(1, dtype=torch.float64)
    found = gradients(bounded, x, "chain")
    path = model.path
    slopes: dict[str, Tensor | None] = dict.fromkeys(found)
    wanted: dict[str, Tensor | None] = dict.fromkeys(found)
    for name, parameter in bounded.named_parameters():
        gradient = found[name]
        if gradient is not None:
            direction = gradient / gradient.norm() + torch.randn_like(parameter) / parameter.numel()
            slopes[name] = (gradient * direction).sum()
            wanted[name] = slope(lambda: loss_of(bounded, x), parameter, direction)
            assert model.path == path
    assert max(relative_errors(slopes, wanted).values()) <= 1e-10


def slope(loss: Callable[[], Tensor], parameter: nn.Parameter, direction: Tensor, step: float = 1e-3) -> Tensor:
    """Derivative of a loss by central differences of order eight."""
    start, found = parameter.detach().clone(), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for i, weight in enumerate((4 / 5, -1 / 5, 4 / 105, -1 / 280), start=1):
            for sign in (1, -1):
                parameter.copy_(start + sign * i * step * direction)
                found += sign * weight * loss() / step
        parameter.copy_(start)
    return found


def test_both_branches_are_taken_and_both_are_exact():
    model = Branching().double()
    bounded = transform(model, features(dtype=torch.float64), regions=3, r=4)
    paths = set()
    for seed in range(12):
        x = features(seed, dtype=torch.float64)
        assert same(gradients(bounded, x, "chain"), gradients(bounded, x, "autograd"))
        paths.update(model.path)
        assert torch.equal(transform(model, x, regions=1)(x), model(x))
    assert paths == {"+", "-"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_region_is_the_model_itself(kind):
    model, x = kind(), features()
    bounded = transform(model, x, regions=1)
    assert torch.equal(seeded(lambda: bounded(x)), seeded(lambda: model(x)))
    assert list(bounded.lbi.parameters()) == []
    out, taps = seeded(lambda: bounded.forward_regions(x))
    assert torch.equal(out, seeded(lambda: model(x)))
    assert len(taps.h) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["autograd", "chain"])
def test_identity_is_the_model_to_the_bit(kind, engine):
    model, x = kind(), features()
    bounded = transform(model, x, regions=3, interface="identity", backward=engine)
    for seed in range(3):
        x = features(seed)
        assert torch.equal(seeded(lambda x=x: bounded(x)), seeded(lambda x=x: model(x)))
    expected = {name: p.grad for name, p in with_gradients(model, x)}
    assert all(torch.equal(p.grad, expected[name]) for name, p in with_gradients(bounded, x) if p.grad is not None)


def with_gradients(module: nn.Module, x: Tensor) -> list[tuple[str, nn.Parameter]]:
    module.zero_grad()
    seeded(lambda: module(x)).square().sum().backward()
    return [(name, copy.deepcopy(p)) for name, p in module.named_parameters() if p.grad is not None]


# -- what control flow skips


def test_a_skipped_region_is_the_identity():
    model = LayerDrop().double()
    x = features(dtype=torch.float64)
    bounded = uneven(model, x)
    model.dropped = {2, 3}
    out, taps = bounded.forward_regions(x)
    lbi, canvas = bounded.interface, model.stem(x)
    m = lbi.initial(canvas)
    for k, blocks in enumerate(((0, 1), (), (4, 5))):
        torch.testing.assert_close(taps.m[k], m, rtol=0, atol=0)
        h = lbi.enter(k, canvas, m)
        for i in blocks:
            h = model.blocks[i](h)
        assert torch.equal(taps.h[k], h)
        m = lbi.leave(k, m=m, h=h, z=None)
    assert torch.equal(out, model.head(h))
    assert same(gradients(bounded, x, "chain"), gradients(bounded, x, "autograd"))


def uneven(model: LayerDrop, x: Tensor, **options: Any) -> BoundedModule:
    """Cut in three where the test wants it, whatever is dropped from the example."""
    random.seed(0)
    return transform(model, x, regions=["blocks.2", "blocks.4"], r=4, **options)


@pytest.mark.parametrize("dropped", [{0, 1}, {4, 5}, {1, 4}, {0, 1, 2, 3, 4}, set(range(6))], ids=str)
def test_whatever_is_dropped_the_gradient_is_exact(dropped):
    model = LayerDrop().double()
    x = features(dtype=torch.float64)
    bounded = uneven(model, x)
    model.dropped = dropped
    if len(dropped) == 6:
        assert torch.equal(bounded(x), model(x))
        with pytest.raises(errors.CaptureError, match="no block runs"):
            bounded.forward_regions(x)
        return
    assert same(gradients(bounded, x, "chain"), gradients(bounded, x, "autograd"))
    assert torch.equal(transform(model, x, regions=bounded.plan)(x), bounded(x))


def test_an_early_exit_reads_the_block_that_ran_last():
    model, x = EarlyExit().double(), features(dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4)
    bounded(x)
    assert model.path == list("012345")
    model.limit = 0.0
    out, taps = bounded.forward_regions(x)
    assert model.path == ["0"]
    assert torch.equal(out, model.head(taps.h[0]))
    assert [len(taps.h), len(taps.m)] == [3, 3]
    out.sum().backward()
    assert bounded.lbi.decoders[0].out.weight.grad is not None
    assert bounded.lbi.decoders[1].out.weight.grad is None
    assert same(gradients(bounded, x, "chain"), gradients(bounded, x, "autograd"))


def test_the_sum_is_what_the_regions_add():
    model, x = LayerDrop().double(), features(dtype=torch.float64)
    bounded = uneven(model, x, interface="zero")
    assert bounded.plan.readout == "sum"
    model.dropped = {2, 5}
    canvas = model.stem(x)
    parts = [model.blocks[1](model.blocks[0](canvas)), model.blocks[3](canvas), model.blocks[4](canvas)]
    wanted = canvas
    for h in parts:
        wanted = wanted + (h - canvas)
    assert torch.equal(bounded(x), model.head(wanted))
    out, taps = bounded.forward_regions(x)
    assert all(torch.equal(h, part) for h, part in zip(taps.h, parts, strict=True))
    assert torch.equal(out, model.head(wanted))


# -- positions


@pytest.mark.parametrize("backward", ["autograd", "chain"])
def test_a_causal_model_is_chunked_and_does_not_leak(backward):
    model = LanguageModel().double()
    bounded = transform(model, TOKENS, regions=3, r=8, backward=backward)
    assert (bounded.plan.interface, bounded.plan.causal) == ("chunked", True)
    report = verify(bounded, TOKENS)
    assert report.ok, report
    assert report.leak is False
    assert report.max_rel_error <= 1e-10
    longer = torch.cat([TOKENS, TOKENS], 1)
    torch.testing.assert_close(bounded(longer)[:, :12], bounded(TOKENS))


def test_a_latent_that_sees_later_positions_is_refused():
    model = LanguageModel()
    with pytest.raises(errors.FutureLeakError, match="interface='pooled' on a model whose outputs are causal"):
        transform(model, TOKENS, regions=3, r=8, interface="pooled")
    bounded = transform(model, TOKENS, regions=3, r=8, interface="pooled", allow_leak=True)
    report = verify(bounded, TOKENS)
    assert report.leak is True
    assert not report.ok


def test_a_model_that_is_not_causal_is_pooled():
    bounded = transform(LanguageModel(causal=False), TOKENS, regions=3, r=8)
    assert (bounded.plan.interface, bounded.plan.causal) == ("pooled", False)
    assert verify(bounded, TOKENS).ok


# -- training and state


@pytest.mark.parametrize("kind", [Branching, LayerDrop])
def test_optimizers_train_it(kind):
    random.seed(0)
    model, x = kind(), features()
    bounded = transform(model, x, regions=3, r=4)
    before = {name: p.detach().clone() for name, p in bounded.named_parameters()}
    optimizer, losses = torch.optim.AdamW(bounded.parameters(), lr=0.02), []
    for _ in range(40):
        loss = nn.functional.mse_loss(bounded(x), torch.ones(3, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(p, before[name]) for name, p in bounded.named_parameters())


def test_parameters_keep_names_and_identity():
    model, x = Branching(), features()
    names = list(model.state_dict())
    bounded = transform(model, x, regions=3, r=4)
    assert [name for name in bounded.state_dict() if not name.startswith("lbi.")] == names
    assert list(model.state_dict()) == names
    assert all(dict(bounded.named_parameters())[name] is p for name, p in model.named_parameters())
    assert bounded.blocks is model.blocks
    other = transform(Branching(), x, regions=3, r=4, seed=1)
    other.load_state_dict(bounded.state_dict())
    assert torch.equal(other(x), bounded(x))


def test_a_copy_goes_its_own_way():
    model, x = Branching(), features()
    bounded = transform(model, x, regions=3, r=4)
    out = bounded(x)
    twin = copy.deepcopy(bounded)
    assert torch.equal(twin(x), out)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(twin(x), out)
    assert torch.equal(bounded(x), out)
    assert twin.plan == bounded.plan


def test_modes_are_the_bounded_models():
    random.seed(0)
    model, x = LayerDrop(), features()
    bounded = transform(model, x, regions=3, r=4)
    bounded.eval()
    assert model.training  # the model's own flag, which only its owner sets
    for _ in range(5):
        bounded(x)
        assert model.path == list("012345")
    bounded.train()
    lengths = set()
    for _ in range(20):
        bounded(x)
        lengths.add(len(model.path))
    assert len(lengths) > 1
    assert model.training


def test_transform_leaves_the_model_and_all_random_states_as_they_were():
    model, x = LayerDrop(), features()
    before = snapshot(model), random.getstate(), numpy.random.get_state()[2]
    transform(model, x, regions=3, r=4)
    plan(model, x, regions=3)
    assert differences(before[0], model) == []
    assert (random.getstate(), numpy.random.get_state()[2]) == before[1:]


def test_hooks_may_come_later_for_the_model_runs_them():
    class Recording(Branching):
        """Adds a hook to itself when it first runs."""

        def forward(self, x: Tensor) -> Tensor:
            if not self.head._forward_hooks:
                self.head.register_forward_hook(lambda module, args, out: seen.append(out))
            return super().forward(x)

    seen: list[Tensor] = []
    model, x = Recording(), features()
    bounded = transform(model, x, regions=3, r=4)
    assert len(model.head._forward_hooks) == 0
    seen.clear()
    wanted = bounded(x)
    assert torch.equal(seen[0], wanted)
    model.blocks[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert not torch.equal(bounded(x), wanted)
    assert len(seen) == 2
    model.blocks[3] = Branching().blocks[3]
    with pytest.raises(errors.StaleCaptureError, match=r"blocks\.3"):
        bounded(x)


@pytest.mark.parametrize("taps", [False, True])
def test_nothing_is_left_on_the_blocks_after_a_call_or_an_exception(taps):
    class Failing(Branching):
        fails = False

        def between(self, x: Tensor) -> Tensor:
            x = super().between(x)
            assert all("forward" in vars(block) or block._forward_hooks for block in self.blocks)
            if self.fails:
                raise ArithmeticError("in the middle of a forward")
            return x

    model, x = Failing(), features()
    with pytest.raises(AssertionError):
        model(x)  # the model called by itself has nothing on its blocks
    bounded = transform(model, x, regions=3, r=4)
    call = bounded.forward_regions if taps else bounded
    model.fails = False
    before = snapshot(model)
    call(x)
    model.fails = True
    with pytest.raises(ArithmeticError):
        call(x)
    model.fails = False
    assert differences({**before, "random": torch.get_rng_state()}, model) == []
    call(x)


def test_threads_run_it_side_by_side():
    model = Branching().eval()
    bounded = [transform(model, features(), regions=3, interface=kind).eval() for kind in ("pooled", "identity")]
    calls, inputs = [model, *bounded], [features(seed) for seed in range(2)]
    with torch.no_grad():
        wanted = [[call(x) for x in inputs] for call in calls]
    wrong: list[Any] = []

    def work(i: int, j: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                try:
                    if not torch.equal(calls[i](inputs[j]), wanted[i][j]):
                        wrong.append((i, j))
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i, j)) for i in range(3) for j in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not any("forward" in vars(block) or block._forward_hooks for block in model.blocks)


def test_first_call_builds_it():
    bounded = transform(Branching(), regions=3, r=4)
    with pytest.raises(errors.NotBuiltError):
        _ = bounded.plan
    assert bounded(features()).shape == (3, 3)
    assert bounded.plan.interface == "pooled"
    assert bounded(torch.randn(7, 4)).shape == (7, 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_an_outer_compile_runs_it_outside_of_the_graph():
    bounded = transform(Branching(), features(), regions=3, r=4)
    wanted = bounded(features())
    compiled = torch.compile(bounded, backend="eager")
    torch.testing.assert_close(compiled(features()), wanted)
    compiled(features()).sum().backward()
    assert bounded.stem.weight.grad is not None


# -- plans


def test_the_plan_says_that_it_fell_back_and_why():
    model, x = Branching(), features()
    made = plan(model, x, regions=3)
    (why,) = [decision for decision in made.why if decision.about == "capture"]
    assert why.choice == "child modules"
    assert "hooked_models.py:" in why.why
    assert "if x.mean() > 0:" in why.why
    assert made.canvas == lbi_compile.plan(model, x, regions=2).canvas
    assert (made.canvas.module, made.canvas.op, made.canvas.index) == ("blocks.0", "module", 0)
    assert (made.canvas.shape, made.canvas.dtype) == (("B", 8), "float32")
    assert [point.module for point in made.boundaries] == ["blocks.2", "blocks.4"]
    assert [region.part.modules for region in made.regions] == [
        ("blocks.0", "blocks.1"),
        ("blocks.2", "blocks.3"),
        ("blocks.4", "blocks.5"),
    ]
    assert (made.stem.modules, made.head.modules) == (("stem",), ("head",))
    assert sum(region.part.share for region in made.regions) + made.stem.share + made.head.share == pytest.approx(1)
    assert "child modules" in str(made)
    assert "if x.mean() > 0:" in " ".join(str(made).split())


def test_plans_come_back_from_json_and_cut_alike():
    model, x = Branching(), features()
    bounded = transform(model, x, regions=3, r=4)
    read = Plan.from_json(bounded.plan.to_json())
    assert read == bounded.plan
    again = transform(model, x, regions=read)
    assert again.plan.hash == bounded.plan.hash
    assert torch.equal(again(x), bounded(x))
    assert plan(model, x, regions=read) == read


def test_a_plan_of_another_model_is_refused():
    made = plan(Branching(), features(), regions=3)
    with pytest.raises(errors.PlanError, match="EarlyExit"):
        transform(EarlyExit(), features(), regions=made)
    with pytest.raises(errors.PlanError, match=r"blocks the model does not have: blocks\.4, blocks\.5"):
        transform(Branching(depth=4), features(), regions=made)


def test_a_plan_of_a_graph_is_refused():
    x, model = features(), LayerDrop().eval()
    graph = plan(model, x, regions=2)
    assert graph.canvas.op != "module"
    with pytest.raises(errors.PlanError, match="plan of a captured graph for a model that cannot be captured"):
        transform(model.train(), x, regions=graph)


def test_a_mode_that_cannot_be_captured_after_one_that_could():
    bounded = transform(LayerDrop().eval(), features(), regions=2, r=4)
    assert bounded.eval()(features()).shape == (3, 3)
    bounded.train()
    with pytest.raises(errors.CaptureError, match="transform the model in this mode: it is then cut between child"):
        bounded(features())


def test_verify_says_that_regions_are_opaque():
    bounded = transform(LayerDrop(), features(), regions=3, r=4)
    report = verify(bounded, features())
    assert report.ok, report
    assert report.leak is None
    assert report.batch_independent is None
    assert [count for _, count in report.lanes] == [1, 1]
    assert "fell back to child modules" in str(report)
    assert "Python's or NumPy's random generator" in " ".join(str(report).split())
