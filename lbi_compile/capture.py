"""Capture: any module as an FX graph of aten operators, its parameters the module's own."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from ._torch import GuardOnDataDependentSymNode, applied_functions, pytree, silent_export, unset_fake_temporarily
from .errors import CaptureError, DataDependentControlFlowError, ExampleInputsError, NotAModuleError
from .passes.casts import untangle_casts

LADDER = (("batch", "sequence"), ("batch",), ())


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of one call, in the form capture and bounded models use.

    Attributes:
        args: Positional arguments that cannot be named (a ``*args`` forward has them).
        kwargs: Every other argument by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """The tensors and constants of the call, in pytree order."""
        return pytree.tree_leaves((self.args, self.kwargs))


@dataclass(frozen=True, slots=True)
class Capture:
    """One captured program.

    Attributes:
        graph_module: The exported graph; its parameters and buffers are the model's own objects.
        inputs: The inputs it was captured with (real tensors, batch of at least 2).
        dynamic: Axes that may change from call to call, a subset of ``("batch", "sequence")``.
        out_spec: Structure of the output.
        refused: For each rung of the ladder that failed, why.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    dynamic: tuple[str, ...]
    out_spec: Any
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What ``forward`` calls its arguments.

    Attributes:
        names: Arguments that positions can be turned into, in order; empty where some have no name (``*args``).
        optional: Arguments that are ``None`` where they are not given.
    """

    names: tuple[str, ...]
    optional: frozenset[str]


def signature(model: nn.Module) -> Signature:
    """How ``model.forward`` names its arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    nameless = any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters)
    names = () if nameless else tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return Signature(names, frozenset(p.name for p in parameters if p.default is None))


def bind(form: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Name the positional arguments and drop those that say nothing, so that equal calls look equal.

    Args:
        form: What ``signature`` gave.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        ExampleInputsError: An argument is given by position and by name.
    """
    # too many for the model: it says so itself when it is run
    named = dict(zip(form.names, args, strict=False)) if len(args) <= len(form.names) else {}
    twice = [name for name in named if name in kwargs]
    if twice:
        raise ExampleInputsError(
            f"the argument {twice[0]} by position and by name",
            expected="each argument once",
            do="leave one of them out",
        )
    merged = {**named, **kwargs}
    given = [name for name in merged if merged[name] is not None or name not in form.optional]
    order = [*(name for name in form.names if name in given), *sorted(name for name in given if name not in form.names)]
    return Inputs(args[len(named) :], {name: merged[name] for name in order})


def as_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Read the four forms of example inputs: tensor, tuple of args, dict of kwargs, ``(args, kwargs)``.

    Raises:
        ExampleInputsError: None was given and the model brings none, or the form is another one.
    """
    form = signature(model)
    if example_inputs is None:
        example_inputs = default_inputs(model)
        if example_inputs is None:
            raise ExampleInputsError(
                f"no example inputs, and {type(model).__name__} has neither example_input_array nor dummy_inputs",
                expected="one set of inputs the model can run on",
                do="pass example_inputs, or call the bounded model once: it is then built from that call",
            )
    if isinstance(example_inputs, Tensor):
        return bind(form, (example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return bind(form, (), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        match example_inputs:
            case (tuple() | list() as args, Mapping() as kwargs):
                return bind(form, tuple(args), dict(kwargs))
        return bind(form, tuple(example_inputs), {})
    raise ExampleInputsError(
        f"example_inputs of type {type(example_inputs).__name__}",
        expected="a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments)",
        do="wrap the input in a tuple: example_inputs=(x,)",
    )


def default_inputs(model: nn.Module) -> Any:
    """``model.example_input_array`` (Lightning), else ``model.dummy_inputs`` (transformers), else ``None``."""
    found = getattr(model, "example_input_array", None)
    return found if found is not None else getattr(model, "dummy_inputs", None)


def capture(model: nn.Module, inputs: Inputs, *, ladder: tuple[tuple[str, ...], ...] = LADDER) -> Capture:
    """Export ``model`` in the mode it is in, with as many dynamic axes as it allows.

    Contract: the model, its buffers, its configuration and the random state are afterwards as before.

    Args:
        model: The module; its parameters and buffers become the graph's, by identity.
        inputs: One call's inputs. A batch of one is repeated to two, because a size of one is not generalised.
        ladder: Sets of dynamic axes to try in order.

    Returns:
        The first rung of the ladder that exports.

    Raises:
        NotAModuleError: ``model`` is no module.
        DataDependentControlFlowError: The forward branches on the value of a tensor; the line is named.
        ExampleInputsError: The model itself fails on these inputs.
        CaptureError: ``torch.export`` fails for another reason, or would lose the backward of an
            ``autograd.Function``.

    Example:
        >>> found = capture(model, as_inputs(model, (x,)))
        >>> found.dynamic
        ('batch', 'sequence')
    """
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"a model of type {type(model).__name__}",
            expected="a torch.nn.Module",
            do="wrap the function in a module whose forward calls it",
        )
    _refuse_names(model)
    inputs = _at_least_two(inputs)
    refused: list[tuple[str, str]] = []
    first: BaseException | None = None
    tried: list[Any] = []
    for rung in ladder:
        shapes = _dynamic_shapes(model, inputs, rung)
        if shapes in tried:
            continue
        tried.append(shapes)
        name = "+".join(rung) or "static"
        try:
            with undisturbed(model), unset_fake_temporarily(), silent_export(), applied_functions() as functions:
                numbers = _host_random()
                given = fresh(inputs, gradients=False)  # layers that set requires_grad need leaves to set it on
                program = torch.export.export(model, given.args, given.kwargs, dynamic_shapes=shapes, strict=False)
                # a generator that came into being meanwhile was not drawn from by anybody else
                drawn = any(a != b for a, b in zip(numbers, _host_random(), strict=False))
        except Exception as error:  # every failure of the exporter is a reason to try the next rung
            first = first or error
            if _is_data_dependent(error):
                raise _data_dependent(error) from error
            refused.append((name, str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)))
            continue
        if drawn:
            raise CaptureError(
                f"{type(model).__name__} draws numbers from Python's or NumPy's random generator in its forward",
                expected="random numbers of torch: a graph would repeat those of this run for ever",
                do="draw them with torch, or outside of the model",
            )
        if functions:
            names = ", ".join(sorted(function.__qualname__ for function in functions))
            raise CaptureError(
                f"{type(model).__name__} applies {names}, of autograd.Function: the exporter traces its forward and"
                " loses the backward that it was written for",
                expected="operators that bring their derivative along",
                do="make it an operator with torch.library.custom_op and register_autograd; until then the model is cut"
                " at its child modules, which run as they are",
            )
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        untangle_casts(module)
        return Capture(
            module, fresh(inputs), _really_dynamic(module, inputs, rung), program.call_spec.out_spec, tuple(refused)
        )
    assert first is not None
    raise _why_not(model, inputs, first) from first


def raise_if_unfit(model: nn.Module, inputs: Inputs) -> None:
    """Run the model itself, to tell inputs it cannot run on from a fault of ours.

    Raises:
        ExampleInputsError: The model fails on these inputs.
    """
    try:
        with undisturbed(model), torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except Exception as own:
        raise ExampleInputsError(
            f"{type(model).__name__} fails on the example inputs {describe_inputs(inputs)}: {_line(own)}",
            expected="inputs that the model itself runs on",
            do="call model(...) with them first; pass keyword arguments as a dict",
        ) from own


def _refuse_names(model: nn.Module) -> None:
    """Graphs become code in which names stand between quotes as they are: some would end the quotes."""
    for path, _ in itertools.chain(model.named_modules(), model.named_parameters(), model.named_buffers()):
        if any(letter in path for letter in '"\\\n\r'):
            raise CaptureError(
                f"the name {path!r}",
                expected="names of modules, parameters and buffers without quotes, backslashes and line breaks",
                do="rename it: torch.fx writes names into the code of a graph as they are",
            )


def _why_not(model: nn.Module, inputs: Inputs, error: BaseException) -> CaptureError:
    raise_if_unfit(model, inputs)
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {_line(error)}",
        expected="a forward that torch.export.export(model, args, strict=False) can read",
        do=f"rewrite {_user_frame(error) or 'what the exporter names above'} without Python side effects",
    )


def _is_data_dependent(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text


def _data_dependent(error: BaseException) -> DataDependentControlFlowError:
    return DataDependentControlFlowError(
        f"Python control flow on the value of a tensor at {_user_frame(error) or 'an unknown line'}",
        expected="a forward whose branches depend on shapes and options alone",
        do="use torch.where or torch.cond there, or transform the part of the model without the branch",
    )


def _user_frame(error: BaseException) -> str | None:
    """The innermost line of the traceback that is not torch's own: ``file:line, in function: code``."""
    torch_home = str(Path(torch.__file__).parent)
    found = None
    seen: BaseException | None = error
    while seen is not None:
        frames = [f for f in traceback.extract_tb(seen.__traceback__) if not f.filename.startswith(torch_home)]
        frames = [f for f in frames if f.filename != __file__]
        if frames:
            found = frames[-1]
            break
        seen = seen.__cause__ or seen.__context__
    return None if found is None else f"{found.filename}:{found.lineno}, in {found.name}: {found.line}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def describe_inputs(inputs: Inputs) -> str:
    """Types and shapes of a call's inputs, for messages."""

    def one(value: Any) -> str:
        return f"{value.dtype}{list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)

    named = [f"{name}={one(value)}" for name, value in inputs.kwargs.items()]
    return "(" + ", ".join([*(one(value) for value in inputs.args), *named]) + ")"


def fresh(inputs: Inputs, *, gradients: bool = True) -> Inputs:
    """The inputs as other tensors on the same memory: the exporter leaves marks on those it is given.

    They require gradients where the inputs do, unless ``gradients`` is off.

    It would take one tensor that is given for two arguments for one argument; these are two. Tensors made in inference
    mode are copied, for no gradient may be taken of them.
    """

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        same = leaf.clone() if leaf.is_inference() else leaf.detach()
        return same.requires_grad_(gradients and leaf.requires_grad)

    with torch.inference_mode(False):
        args, kwargs = pytree.tree_map(other, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def _at_least_two(inputs: Inputs) -> Inputs:
    """Repeat a batch of one: the exporter would bake the size in. The first tensor tells the batch size."""
    sizes = [leaf.shape[0] for leaf in inputs.leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes or sizes[0] != 1:
        return inputs

    def twice(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != 1:
            return leaf
        doubled = leaf.detach().repeat(2, *[1] * (leaf.dim() - 1))
        return doubled.requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(twice, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def _dynamic_shapes(model: nn.Module, inputs: Inputs, rung: tuple[str, ...]) -> dict[str, Any] | None:
    """The exporter's ``dynamic_shapes``: axis 0 where it has the batch size, axis 1 of sequences of any length.

    The rung asks it of the first tensor that has the axis; other sizes may be equal to its size by chance.
    """
    tensors = [leaf for leaf in inputs.leaves if isinstance(leaf, Tensor) and leaf.dim()]
    batch = tensors[0].shape[0] if tensors else 0
    # a sequence is integers [B, T] or floats [B, T, D]; a float matrix is features, four axes are an image
    sequences = [t for t in tensors if t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())]
    length = sequences[0].shape[1] if sequences else 0

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return None
        axes: dict[int, Any] = {}
        if "batch" in rung and leaf.shape[0] == batch > 1:
            axes[0] = Dim.DYNAMIC if leaf is tensors[0] else Dim.AUTO
        alike = leaf.dim() in (2, 3) and leaf.shape[1] == length
        if "sequence" in rung and (alike or any(leaf is other for other in sequences)) and leaf.shape[1] > 1:
            axes[1] = Dim.DYNAMIC if leaf is sequences[0] else Dim.AUTO
        return axes or None

    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError:
        return None  # the model cannot be called so, which its own error says better
    return pytree.tree_map(one, dict(bound.arguments)) if rung else None


def _really_dynamic(module: fx.GraphModule, inputs: Inputs, rung: tuple[str, ...]) -> tuple[str, ...]:
    axes: set[int] = set()
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            axes |= {axis for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
    return tuple(name for axis, name in enumerate(("batch", "sequence")) if axis in axes and name in rung)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Caching, autocast, no_grad and inference mode off while inside; model and random state as before afterwards.

    A capture is used under other conditions than those of the call that happened to need it first.
    """
    caches: list[tuple[Any, bool]] = []
    for config in _configs(model):
        if getattr(config, "use_cache", None):
            caches.append((config, config.use_cache))
            config.use_cache = False
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    # modes, and values that a forward keeps on its modules: those of the exporter are of no use to anybody
    numbers = _host_random()
    attributes = [(known, dict(known)) for module in model.modules() for known in _kept(module)]
    kinds = {tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers())} & {"cpu", "cuda"}
    try:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(devices=[d for d in devices if d is not None]))
            yield
    finally:
        for config, value in caches:
            config.use_cache = value
        _set_host_random(numbers)
        for known, before in attributes:
            for name in [name for name in known if name not in before]:
                del known[name]
            known.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _kept(module: nn.Module) -> list[dict[Any, Any]]:
    """What a forward may change of its modules: attributes, buffers and hooks, of which some models add their own."""
    hooks = [value for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)]
    return [vars(module), module._buffers, *hooks]


def _host_random() -> tuple[Any, ...]:
    """State of the random generators beside torch's that a forward may draw from, to compare and to put back."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)


def _set_host_random(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    if len(state) > 1:
        numpy = sys.modules["numpy"]
        kind, keys, *rest = state[1]
        numpy.random.set_state((kind, numpy.frombuffer(keys, numpy.uint32), *rest))


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object of the model and of its parts: each keeps its own ``use_cache``."""
    found: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if config is None or isinstance(config, (dict, str, int, float)) or id(config) in found:
            continue
        found[id(config)] = config
        values = vars(config).values() if hasattr(config, "__dict__") else ()
        pending.extend(value for value in values if hasattr(value, "use_cache"))
    return list(found.values())
