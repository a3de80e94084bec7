"""Every private torch name the package uses, in one place, each with the reason; torch 2.11 to 2.13.

What pulls in Dynamo, AOTAutograd or Inductor (more than a second) is imported inside a function, so that the passes and
kernels can be used without it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import logging
import operator
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

# Flattens and rebuilds arguments and outputs in the order the exporter uses.
import torch.utils._pytree as pytree
from torch import fx

# Backward operators without a batching rule are traced away with these before they are batched (passes/).
from torch._decomp import core_aten_decompositions

# Makes fake tensors honour Python kernels (decompositions of composite ops) while the rewrite traces.
from torch._dispatch.python import enable_python_dispatcher

# What Dynamo raises where it cannot trace a forward whole.
from torch._dynamo.exc import Unsupported as NotTraceable

# The fake mode and tracing context that AOTAutograd traced the joint graph under; inserted nodes must share them.
from torch._guards import TracingContext, detect_fake_mode

# Runs a graph on tensors without memory, to find storages and shapes.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx import traceback as fx_traceback

# Public name, private place: traces a function over fake values into nodes that are spliced into the joint graph.
from torch.fx.experimental.proxy_tensor import make_fx as _make_fx

# Raised by the exporter where Python branches on the value of a tensor.
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg

__all__ = [
    "DataDependentValue",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "NotTraceable",
    "announce_backend",
    "aot_autograd",
    "applied_functions",
    "associative_scan",
    "below_autograd",
    "boxed",
    "compile_with_inductor",
    "compiling",
    "core_aten_decompositions",
    "default_partition",
    "default_store",
    "detect_fake_mode",
    "dispatch_mode_active",
    "dynamic_sizes",
    "enable_python_dispatcher",
    "example_size",
    "exporting",
    "forget_donations",
    "fresh_code",
    "functional_collectives",
    "functorch_active",
    "gather_flat",
    "graph_pass",
    "has_example",
    "inductor_decompositions",
    "inductor_joint_pass",
    "inductor_options",
    "is_fake",
    "is_tangent",
    "no_autocast",
    "no_new_guards",
    "paused_collector",
    "pytree",
    "quiet_about_gradients",
    "same_shape",
    "same_size",
    "silent_export",
    "size_key",
    "sizes_apart",
    "times_written",
    "traced",
    "unset_fake_temporarily",
    "vmap_without_fallback",
]

# An autograd kernel written in Python hands its operator on to the kernels below with this (kernels/ops.py).
below_autograd = torch._C._AutoDispatchBelowAutograd  # pyright: ignore[reportAttributeAccessIssue]

# An autograd.Function without setup_context, the cheap kind, has to step aside while a torch.func transform runs.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]


def traced(
    function: Callable[..., Any], values: Sequence[Any], *, decompositions: Mapping[Any, Callable[..., Any]] | None
) -> fx.GraphModule:
    """The graph of what ``function`` does with fake values.

    Where a trace has to rebuild a symbolic size it multiplies all factors by one binary operator (torch 2.11 to 2.13),
    and the code written from that graph drops all but two of them; here they are multiplied one by one.
    """
    gm = _make_fx(function, decomposition_table=dict(decompositions or {}))(*values)
    for node in gm.graph.find_nodes(op="call_function", target=operator.mul):
        while len(node.args) > 2:
            a, b, *rest = node.args
            with gm.graph.inserting_before(node):
                product = gm.graph.call_function(operator.mul, (a, b))
            product.meta["val"] = operator.mul(*map_arg((a, b), lambda factor: factor.meta["val"]))
            node.args = product, *rest
    gm.recompile()
    return gm


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage is collected inside: a full collection walks the millions of objects that an exporter leaves behind.

    Passes make many small objects that live until the end, so that Python would collect again and again and free
    nothing: a third of their time on ten thousand nodes.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def fresh_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on a code object of its own.

    Dynamo counts recompiles by code object: without this, many bounded models in one process would share one limit.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# What an operator on fake tensors raises whose sizes or Python numbers depend on values.
DataDependentValue = (DataDependentOutputException, DynamicOutputShapeException)


def dispatch_mode_active() -> bool:
    """A ``TorchDispatchMode`` of the caller is on: Dynamo refuses to trace under one."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(not mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def exporting() -> bool:
    """``torch.export`` is tracing: in torch 2.11 Dynamo takes ``torch.compiler.is_exporting()`` for True always."""
    return torch.compiler._is_exporting_flag


@contextlib.contextmanager
def dynamic_sizes(tensor: torch.Tensor, axes: Sequence[int]) -> Iterator[None]:
    """Ask Dynamo for a symbol of its own for these sizes; one it has to fix all the same is no error."""
    import torch._dynamo

    # Dynamo keeps its marks as attributes of the tensor object, under names that change
    before = {name: set(value) if isinstance(value, set) else value for name, value in vars(tensor).items()}
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
    try:
        yield
    finally:
        for name in [name for name in vars(tensor) if name not in before]:
            delattr(tensor, name)
        for name, value in before.items():
            setattr(tensor, name, value)


@contextlib.contextmanager
def quiet_about_gradients() -> Iterator[None]:
    """Dynamo looks for ``.grad`` on an input that is computed from something, and warns itself about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def is_tangent(node: fx.Node) -> bool:
    """AOTAutograd names the cotangent inputs of a joint graph ``tangents_1``, ``tangents_2``, ..."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def same_size(a: Any, b: Any) -> bool:
    """Two sizes are provably equal; unlike ``==`` on a SymInt this never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return size_key(a) == size_key(b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Two shapes are provably equal, without a guard."""
    return len(a) == len(b) and all(map(same_size, a, b))


def example_size(size: Any) -> int:
    """A size at the inputs of the capture; unlike ``int`` of a SymInt this never adds a guard."""
    return size if isinstance(size, int) else size.node.hint


def has_example(size: Any) -> bool:
    """The size is known at the inputs of the capture: it does not depend on values."""
    return isinstance(size, int) or size.node.hint is not None


# Sizes that stand for symbols: prime, so that no product of some of them is another, and unlike most fixed sizes.
_APART = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)


def sizes_apart(shapes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """The shapes with a number in place of each symbol, another for each, so that different sizes can be told apart."""
    expressions = {size.node.expr for shape in shapes for size in shape if not isinstance(size, int)}
    symbols = sorted({symbol for one in expressions for symbol in one.free_symbols}, key=str)
    numbers = dict(zip(symbols, itertools.cycle(_APART), strict=False))
    known = {one: int(one.xreplace(numbers)) for one in expressions}
    return [tuple(size if isinstance(size, int) else known[size.node.expr] for size in shape) for shape in shapes]


def size_key(size: Any) -> Any:
    """What two sizes have in common that are provably equal; hashing it is many times as fast as printing the size."""
    return size if isinstance(size, int) else size.node.expr


@contextlib.contextmanager
def vmap_without_fallback() -> Iterator[None]:
    """A missing batching rule raises: the silent fallback is a slow loop that also fixes symbolic sizes."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def annotated(labels: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, nodes that Dynamo traces, and those of their backward, carry ``labels`` in ``meta["custom"]``."""
    return fx_traceback.annotate(labels)


def no_autocast() -> contextlib.AbstractContextManager[None]:
    """Casts are already in the joint graph; tracing its pieces again under autocast would add others."""
    return torch._C._DisableAutocast()  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def no_new_guards(fake_mode: Any) -> Iterator[None]:
    """Tracing that would fix a symbolic size raises instead, and logs nothing: the caller tries another way."""
    shapes = fake_mode.shape_env
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    log.addFilter(_is_not_a_refused_guard)
    try:
        if shapes is None:
            yield
            return
        # every new guard passes here before it is kept, in all versions of torch
        shapes._check_frozen = functools.partial(_refuse_guard, shapes)
        try:
            yield
        finally:
            del shapes._check_frozen
    finally:
        log.removeFilter(_is_not_a_refused_guard)


# Functions whose backward is the derivative of what an exporter traces: recomputation, and registered operators.
_EXACT_FUNCTIONS = ("torch.autograd.", "torch.nn.", "torch.utils.checkpoint", "torch._library.")


@contextlib.contextmanager
def applied_functions() -> Iterator[set[type]]:
    """Collects the class of every ``autograd.Function`` that this thread applies inside, but some of torch's own.

    An exporter traces their forward and never sees the backward that they were written for.
    """
    found: set[type] = set()
    original, thread = torch.autograd.Function.__dict__["apply"], threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and not cls.__module__.startswith(_EXACT_FUNCTIONS):
            found.add(cls)
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        torch.autograd.Function.apply = original  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def silent_export() -> Iterator[None]:
    """``torch.export`` logs, and prints to stderr, whole graphs and tracebacks of what it then raises as an error too.

    What the model itself prints to stderr is passed on, unless the export fails. So are warnings, but for the one that
    recurrent layers keep a list of their weights.
    """
    logs = [logging.getLogger(name) for name in _EXPORT_LOGS]
    said = io.StringIO()
    for log in logs:
        log.addFilter(_nothing)
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? self\.[\w.]*_flat_weights", UserWarning)
            yield
        sys.stderr.write(said.getvalue())
    finally:
        for log in logs:
            log.removeFilter(_nothing)


_EXPORT_LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace")


def _nothing(_: logging.LogRecord) -> bool:
    return False


def _refuse_guard(shapes: Any, expression: Any, value: Any) -> None:
    # A bound, such as "not empty" or "at least two", fixes no size, and Dynamo checks it at every call.
    bounds = sympy.StrictLessThan, sympy.StrictGreaterThan, sympy.LessThan, sympy.GreaterThan
    unequal = isinstance(expression, sympy.Ne if value else sympy.Eq)
    equal = isinstance(expression, sympy.Eq if value else sympy.Ne)
    bound = unequal or isinstance(expression, bounds) or (equal and _says_not_empty(expression))
    if bound and not shapes.frozen:
        return
    raise RuntimeError(f"a new guard {expression} == {value} would fix a symbolic size")


def _says_not_empty(expression: Any) -> bool:
    """The two sides are equal where no size is zero: a tensor that may be empty has strides of ``Max(1, n)``."""
    sides = [side.replace(_at_least_one, _other_than_one) for side in expression.args]
    return sympy.expand(sides[0] - sides[1]) == 0


def _at_least_one(expression: Any) -> bool:
    return expression.func.__name__ == "Max" and len(expression.args) == 2 and 1 in expression.args


def _other_than_one(expression: Any) -> Any:
    return next(a for a in expression.args if a != 1)


def _is_not_a_refused_guard(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed during evaluate_expr")


def aot_autograd(**compilers: Any) -> Callable[..., Any]:
    """AOTAutograd as a Dynamo backend."""
    from torch._dynamo.backends.common import aot_autograd as backend

    return backend(**compilers)


def default_partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph; unlike the min-cut partitioner it never recomputes, so no random op runs twice."""
    from torch._functorch.partitioners import default_partition as partition

    return partition(joint, inputs, **options)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """AOTAutograd's options while a marked graph is compiled.

    * No donated buffers: a saved tensor that the backward may overwrite could not serve a second backward of the same
      graph (``retain_graph=True``). Lowered lazily, a backward would read the option outside of this block.
    * No cache of AOTAutograd's own: a hit would skip the rewrite and with it the record of what the graph does.
      Inductor's cache of generated code stays on.
    """
    from torch._functorch import config

    with config.patch(donated_buffer=False, force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        yield


def forget_donations() -> None:
    """With ``donated_buffer=False`` AOTAutograd leaves ``None`` here, which its run-time check takes for donations.

    Call it where the backward is compiled: earlier the metadata is another object.
    """
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is not None:
        metadata.bw_donated_idxs = []


def boxed(graph: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The graph as a function that empties its list of inputs, so that saved tensors die where they are used last."""
    from torch.fx.graph import _BoxedCodeGen

    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()
    return graph.forward


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions Inductor traces joint graphs with; inserted nodes have to be traced with them too."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """What ``mode=`` and ``options=`` of ``torch.compile`` mean; a backend given by name has to resolve them itself.

    The wrapper that ``backend="inductor"`` gets also checks names and types and honours the compiler bisector.
    """
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def inductor_joint_pass() -> Any:
    """A joint-graph pass that the caller set in Inductor's global configuration."""
    from torch._inductor import config

    return config.joint_custom_pre_pass


def announce_backend(name: str, value: str) -> None:
    """Make ``torch.compile(backend=name)`` find ``value`` (``"module:function"``), installed or not.

    ``register_backend`` would do, but then an installed package fails: Dynamo registers what an entry point loads, and
    a name that its import has registered already is an error.
    """
    from importlib.metadata import EntryPoint

    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault(name, EntryPoint(name, value, "torch_dynamo_backends"))


def graph_pass(run: Callable[[fx.Graph], None], files: tuple[str, ...], *, variant: str = "") -> Any:
    """An Inductor pass whose cache identity is the content of ``files`` and the name of the ``variant``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(files, extra=variant)

    return Pass()


def associative_scan(combine: Callable[..., Any], values: Any, *, reverse: bool = False) -> Any:
    """Torch's scan of an associative operator over axis 0, in its generic form."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(combine, values, 0, reverse=reverse, combine_mode="generic")


def compile_with_inductor(gm: fx.GraphModule, example_inputs: Any, options: dict[str, Any]) -> Any:
    """Inductor with ``options`` over its global configuration, which stays untouched."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_part(*args: Any, **kwargs: Any) -> Any:
        forget_donations()
        return compile_fx_inner(*args, **kwargs)

    return compile_fx(gm, example_inputs, inner_compile=compile_part, config_patches=options)


def functional_collectives() -> Any:
    """Collectives as functions of tensors, which Dynamo traces; the public ones write in place."""
    import torch.distributed._functional_collectives as found

    return found


def default_store() -> Any:
    """The store through which the processes of the default group found each other."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def gather_flat(value: torch.Tensor, group: Any) -> torch.Tensor:
    """``[N * n]`` of all ranks' ``value`` ``[n]``, perhaps still under way; torch 2.13 renamed the function."""
    found = functional_collectives()
    return getattr(found, "all_gather_single", found.all_gather_tensor)(value, 0, group)


def is_fake(tensor: torch.Tensor) -> bool:
    """The tensor has a shape and no numbers (it was made under ``FakeTensorMode``)."""
    return isinstance(tensor, FakeTensor)


def times_written(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written over in place; tensors of inference mode do not count that."""
    return None if tensor.is_inference() else tensor._version
