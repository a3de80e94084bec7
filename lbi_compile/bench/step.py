"""``bench step``: one training step of a bounded model under every engine, against autograd and compilers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import BoundedModule, _torch, auto
from lbi_compile.guesses import Memory
from lbi_compile.newton import PARALLEL
from lbi_compile.passes import scan_backward

from . import cases, graphs, hand, hand_token
from .cases import Case
from .compare import Cell, Contender, Oracle, Terms, Variant, compare
from .measure import Timed

# Steps in which the chooser behind `auto` times the engines.
_SETTLING = 3 * (auto.ROUNDS + 1)
BOUNDED, DENSE = "eager autograd of the bounded model in float64", "eager autograd of the dense model in float64"


class Setting(NamedTuple):
    """One case made real.

    Attributes:
        case: What it is.
        dense: The model.
        bounded: The same model, cut; it shares the parameters.
        x: Inputs.
        loss: Of the logits.
    """

    case: Case
    dense: nn.Module
    bounded: BoundedModule
    x: Tensor
    loss: Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """How one variant runs.

    Attributes:
        name: As in the table.
        what: One line that says what it is.
        make: Gives a function of the inputs that returns logits, and the module whose parameters it trains.
        oracle: What it should give.
        baseline: Others are compared with it.
        compiled: Its first run compiles.
        inductor: With Inductor, and so with a C++ compiler on a CPU.
        cases: Names of the cases it exists for.
    """

    name: str
    what: str
    make: Callable[[Setting], tuple[Callable[[Tensor], Tensor], nn.Module]]
    oracle: str
    baseline: bool = False
    compiled: bool = False
    inductor: bool = False
    cases: tuple[str, ...] = cases.NAMES


def _engine(name: str) -> Callable[[Setting], tuple[Callable[[Tensor], Tensor], nn.Module]]:
    def make(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        def run(x: Tensor) -> Tensor:
            with setting.bounded.with_engine(name):
                return setting.bounded(x)

        return run, setting.bounded

    return make


def _auto(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    run, owner = _engine("auto")(setting)
    for _ in range(_SETTLING):
        setting.loss(run(setting.x)).backward()
    return run, owner


def _parallel(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    bounded = setting.bounded

    def run(x: Tensor) -> Tensor:
        # every step has the same inputs here, and a step that starts at their latents has nothing to solve
        bounded._solver.memory = Memory()
        with bounded.with_forward(PARALLEL), bounded.with_engine("scan"):
            return bounded(x)

    return run, bounded


def _compiled(**options: Any) -> Callable[[Setting], tuple[Callable[[Tensor], Tensor], nn.Module]]:
    def make(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        setting.bounded(setting.x)  # a compiled call needs the captured program of such inputs
        return torch.compile(setting.bounded, dynamic=False, fullgraph=True, **options), setting.bounded

    return make


def _inductor(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    # markers are opaque to Inductor: with them it could not fuse across boundaries, and the baseline would be too slow
    erase = _torch.graph_pass(scan_backward.erase_markers, (str(scan_backward.__file__),))
    return _compiled(backend="inductor", options={"joint_custom_pre_pass": erase})(setting)


def _dense(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    return setting.dense, setting.dense


def _dense_compiled(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    return torch.compile(setting.dense, dynamic=False, fullgraph=True), setting.dense


def _by_hand(setting: Setting) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    made = hand.HandWrittenMLP if setting.case.name == cases.MLP else hand_token.HandWrittenTransformer
    net = made(setting.bounded)
    return net, net


FORMS: tuple[Form, ...] = (
    Form("eager", "autograd of the bounded model", _engine("autograd"), BOUNDED, baseline=True),
    Form(
        "inductor",
        "torch.compile of the bounded model",
        _inductor,
        BOUNDED,
        baseline=True,
        compiled=True,
        inductor=True,
    ),
    Form("dense", "autograd of the dense model", _dense, DENSE, baseline=True),
    Form(
        "dense ind.",
        "torch.compile of the dense model",
        _dense_compiled,
        DENSE,
        baseline=True,
        compiled=True,
        inductor=True,
    ),
    Form("by hand", "sequential backward on stacked parameters", _by_hand, BOUNDED, baseline=True),
    Form("chain", "bounded model, engine chain", _engine("chain"), BOUNDED),
    Form("scan", "bounded model, engine scan", _engine("scan"), BOUNDED, compiled=True),
    Form(
        "parallel",
        "bounded model, parallel forward that guesses nothing, engine scan",
        _parallel,
        BOUNDED,
        compiled=True,
        cases=(cases.MLP,),
    ),
    Form("auto", "bounded model, engine auto", _auto, BOUNDED, compiled=True),
    Form(
        "lbi one by one",
        "torch.compile(bounded, backend='lbi'), every region by itself",
        _compiled(backend="lbi", options={"batch_regions": False}),
        BOUNDED,
        compiled=True,
        inductor=True,
    ),
    Form(
        "lbi", "torch.compile(bounded, backend='lbi')", _compiled(backend="lbi"), BOUNDED, compiled=True, inductor=True
    ),
)
NAMES = tuple(form.name for form in FORMS)
# What `auto` chooses from.
ENGINES = ("eager", "chain", "scan")


def cell(case: Case, *, terms: Terms, only: Sequence[str] = NAMES, cuda_graphs: bool = False) -> Cell:
    """Compare all forms of a case.

    The loss is outside of what is compiled, as in a training loop of a user's own; an optimizer's step is not part of
    what is timed. Gradients are set to ``None`` before each step.

    Args:
        case: The model and its sizes.
        terms: How to compare.
        only: Names of the forms to run.
        cuda_graphs: Replay forward and backward as CUDA graphs.
    """
    dtype, device = terms.dtype, terms.device
    torch.compiler.reset()
    dense = case.model(dtype=dtype, device=device, seed=terms.seed)
    bounded = lbi_compile.transform(
        dense, case.example(dtype=dtype, device=device), regions=case.starts, r=case.r, interface=case.interface
    )
    setting = Setting(case, dense, bounded, case.inputs(dtype=dtype, device=device), case.loss(device=device))
    chosen = [form for form in FORMS if form.name in only and case.name in form.cases]
    variants = [
        Variant(
            form.name,
            form.what,
            lambda form=form: _contender(form.make(setting), setting, name=form.name, graphed=cuda_graphs),
            form.oracle,
            form.baseline,
            form.compiled,
        )
        for form in chosen
    ]
    exact = _in_float64(setting)
    oracles = {
        oracle: Oracle(_contender(make(exact), exact).tensors, _contender(make(setting), setting).tensors)
        for oracle, make in ((BOUNDED, _engine("autograd")), (DENSE, _dense))
    }
    about = {key: value for key, value in case._asdict().items() if key != "size"}
    about |= {key: value for key, value in case.size._asdict().items() if value is not None}
    about["readout"], about["cell"] = bounded.plan.readout, bounded.plan.cell
    return compare(about, variants, oracles, terms)


def _in_float64(setting: Setting) -> Setting:
    """The same models with the same numbers in float64."""
    case, x = setting.case, setting.x
    dense = copy.deepcopy(setting.dense).double()
    example = case.example(dtype=torch.float64, device=x.device)
    bounded = lbi_compile.transform(dense, example, regions=case.starts, r=case.r, interface=case.interface)
    bounded.load_state_dict(setting.bounded.state_dict())
    wide = x.double() if x.is_floating_point() else x
    return Setting(case, dense, bounded, wide, setting.loss)


def _contender(
    made: tuple[Callable[[Tensor], Tensor], nn.Module],
    setting: Setting,
    *,
    name: str = "",
    graphed: bool = False,
) -> Contender:
    run, owner = made
    by_hand = owner if isinstance(owner, hand.HandWritten) else None
    named = dict((owner if by_hand is None else by_hand.bounded).named_parameters())
    parameters = list(named.values())
    # what autograd differentiates: the hand-written backward hands its gradients over by itself
    leaves = parameters if by_hand is None else [by_hand.anchor]

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def forward(_: Any = None) -> Tensor:
        return setting.loss(run(setting.x))

    def cleared_forward() -> Tensor:
        clear()
        return forward()

    def step(_: Any = None) -> None:
        forward().backward()

    def tensors() -> Mapping[str, Tensor | None]:
        loss = cleared_forward()
        loss.backward()
        found = {name: parameter.grad for name, parameter in named.items()}
        clear()
        return {"loss": loss.detach(), **found}

    if graphed:
        return graphs.training_step(forward, named, clear)

    def undelivered(loss: Tensor) -> Any:
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    def undelivered_by_hand(loss: Tensor) -> None:
        assert by_hand is not None
        by_hand.delivers = False
        undelivered(loss)
        by_hand.delivers = True

    def whole() -> None:
        clear()
        step()

    parts = {
        "forward": Timed(forward, setup=clear),
        "backward": Timed(lambda loss: loss.backward(), setup=cleared_forward),
        "gradients": Timed(undelivered if by_hand is None else undelivered_by_hand, setup=cleared_forward),
        "step": Timed(step, setup=clear),
    }
    held = 0 if by_hand is None else by_hand.held
    chosen = setting.bounded.engine

    def about() -> str:
        return {"auto": str(chosen), "parallel": str(setting.bounded.solve)}.get(name, "")

    return Contender(parts, tensors, whole, held=held, about=about)
