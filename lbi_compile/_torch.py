"""Every private torch name the package uses, in one place, each with the reason; torch 2.11 to 2.13.

What pulls in Dynamo, AOTAutograd or Inductor (more than a second) is imported inside a function, so that
``import lbi_compile`` stays as light as ``import torch``.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

# Flattens and rebuilds arguments and outputs in the order the exporter uses.
import torch.utils._pytree as pytree

# Backward operators without a batching rule are traced away with these before they are batched (passes/).
from torch._decomp import core_aten_decompositions

# Makes fake tensors honour Python kernels (decompositions of composite ops) while the rewrite traces.
from torch._dispatch.python import enable_python_dispatcher

# The fake mode and tracing context that AOTAutograd traced the joint graph under; inserted nodes must share them.
from torch._guards import TracingContext, detect_fake_mode

# Runs a graph on tensors without memory, to find storages and shapes.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

# Raised by the exporter where Python branches on the value of a tensor.
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

# Public name, private place: traces a Python function over fake values into nodes that are spliced into the joint graph.
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "DataDependentValue",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "TracingContext",
    "aot_autograd",
    "below_autograd",
    "compile_with_inductor",
    "core_aten_decompositions",
    "default_partition",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "fresh_code",
    "functorch_active",
    "graph_pass",
    "inductor_decompositions",
    "is_tangent",
    "keep_saved_buffers",
    "make_fx",
    "mode_options",
    "no_autocast",
    "no_new_guards",
    "pytree",
    "same_size",
    "unset_fake_temporarily",
    "vmap_without_fallback",
]

# An autograd kernel written in Python hands its operator on to the kernels below with this (kernels/ops.py).
below_autograd = torch._C._AutoDispatchBelowAutograd  # pyright: ignore[reportAttributeAccessIssue]

# An autograd.Function without setup_context, the cheap kind, has to step aside while a torch.func transform runs.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]


def fresh_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on a code object of its own.

    Dynamo counts recompiles by code object: without this, many bounded models in one process would share one limit.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# What an operator on fake tensors raises whose sizes or Python numbers depend on values.
DataDependentValue = (DataDependentOutputException, DynamicOutputShapeException)


def is_tangent(node: fx.Node) -> bool:
    """AOTAutograd names the cotangent inputs of a joint graph ``tangents_1``, ``tangents_2``, ..."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def same_size(a: Any, b: Any) -> bool:
    """Two sizes are provably equal; unlike ``==`` on a SymInt this never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _expression(a) == _expression(b)


def _expression(size: Any) -> Any:
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


def no_autocast() -> contextlib.AbstractContextManager[None]:
    """Casts are already in the joint graph; tracing its pieces again under autocast would add others."""
    return torch._C._DisableAutocast()  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def no_new_guards(fake_mode: Any) -> Iterator[None]:
    """Tracing that would fix a symbolic size raises instead."""
    shapes = fake_mode.shape_env
    if shapes is None:
        yield
    elif hasattr(shapes, "error_on_new_guards"):
        with shapes.error_on_new_guards():
            yield
    else:
        # torch 2.11: every new guard passes `_check_frozen`, which only warns.
        shapes._check_frozen = _refuse_guard
        try:
            yield
        finally:
            del shapes._check_frozen


def _refuse_guard(expression: Any, value: Any) -> None:
    raise RuntimeError(f"a new guard {expression} == {value} would fix a symbolic size")


def aot_autograd(**compilers: Any) -> Callable[..., Any]:
    """AOTAutograd as a Dynamo backend."""
    from torch._dynamo.backends.common import aot_autograd as backend

    return backend(**compilers)


def default_partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph; unlike the min-cut partitioner it never recomputes, so no random op runs twice."""
    from torch._functorch.partitioners import default_partition as partition

    return partition(joint, inputs, **options)


@contextlib.contextmanager
def keep_saved_buffers() -> Iterator[None]:
    """AOTAutograd options under which a compiled backward may run twice (``retain_graph=True``) with a dynamic batch.

    A backward that is lowered lazily reads its options when it first runs, outside this block, hence the second option.
    """
    from torch._functorch import config

    # A hit in AOTAutograd's own cache would skip the rewrite and with it the record of what the graph does. Inductor's
    # cache of generated code stays on.
    with config.patch(donated_buffer=False, force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        yield


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions Inductor traces joint graphs with; inserted nodes have to be traced with them too."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def mode_options(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    """What ``torch.compile(mode=...)`` means; a backend given by name has to resolve it by hand."""
    from torch._inductor import list_mode_options

    return {} if mode in (None, "default") else dict(list_mode_options(mode, dynamic))


def graph_pass(run: Callable[[fx.Graph], None], files: tuple[str, ...]) -> Any:
    """An Inductor pass whose cache identity is the content of ``files``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(files)

    return Pass()


def compile_with_inductor(gm: fx.GraphModule, example_inputs: Any, options: dict[str, Any]) -> Any:
    """Inductor with ``options`` over its global configuration, which stays untouched."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=options)
