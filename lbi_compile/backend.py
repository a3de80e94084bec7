"""Backends of ``torch.compile`` that put the scan into the backward: the eager default and ``lbi`` (Inductor)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lbi_compile import _torch
from lbi_compile.errors import EngineError, LBIError, OptionError
from lbi_compile.passes import (
    adjoint_scan,
    alike,
    axes,
    axis_calls,
    axis_probes,
    axis_recurrent,
    axis_routing,
    axis_rules,
    axis_views,
    axis_windows,
    axis_writes,
    batch_cotangents,
    index_chunks,
    jacobian_budget,
    jacobian_slices,
    jacobians,
    layouts,
    linearity,
    liveness,
    names,
    ordering,
    region_rules,
    region_sums,
    repeats,
    splicing,
)
from lbi_compile.passes import batch_regions as batch_regions_file
from lbi_compile.passes import scan_backward as scan_backward_file
from lbi_compile.passes.batch_regions import batch_regions
from lbi_compile.passes.critical_path import critical_path
from lbi_compile.passes.forward_jacobians import forward_jacobians
from lbi_compile.passes.jacobian_budget import JACOBIAN_BYTES, check_budget
from lbi_compile.passes.scan_backward import ScanRecord, erase_markers, scan_backward

__all__ = ["ScanRecord", "compile_errors", "eager_backend", "erase_markers", "last_record", "lbi"]


def eager_backend(
    record: ScanRecord,
    *,
    batched: bool = True,
    jacobian_bytes: int = JACOBIAN_BYTES,
    side_by_side: bool = False,
) -> Callable[..., Any]:
    """A ``torch.compile`` backend that runs a marked graph operator by operator, with the scan in its backward.

    It needs no C++ compiler. Use it with ``dynamic=True``.

    Args:
        record: Always describes the graph that was compiled or run last.
        batched: Run what regions do alike as one operator.
        jacobian_bytes: Most bytes for Jacobians; see ``scan_backward``.
        side_by_side: The graph evaluates regions side by side: Jacobians go into its forward, and it has no backward.

    Returns:
        The backend. Where the graph cannot be solved by a scan it raises ``EngineError`` (inside Dynamo's
        ``BackendCompilerFailed``, and in ``record.error``).

    Example:
        >>> import torch
        >>> record = ScanRecord()
        >>> f = torch.compile(lambda x: x.sin(), backend=eager_backend(record), dynamic=True)
        >>> f(torch.ones(3, requires_grad=True)).sum().backward()
        >>> record.status
        'plain'
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        this = ScanRecord()

        def boxed(graph: fx.GraphModule, *, forward: bool) -> Callable[..., Any]:
            run = _torch.boxed(graph)

            def call(args: list[Any]) -> Any:
                if forward:
                    record.become(this)
                return run(args)

            call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
            return call

        def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            try:
                if side_by_side:
                    forward_jacobians(joint, record=this, forward_outputs=options["num_fwd_outputs"])
                else:
                    scan_backward(joint, record=this, jacobian_bytes=jacobian_bytes)
                if batched:
                    batch_regions(joint, record=this.batched)
            finally:
                record.become(this)
            forward, backward = _torch.default_partition(joint, inputs, **options)
            _reshape(backward)
            this.forward_nodes, this.backward_nodes = len(forward.graph.nodes), len(backward.graph.nodes)
            this.forward_path, this.backward_path = critical_path(forward.graph), critical_path(backward.graph)
            record.become(this)
            return forward, backward

        def compile_backward(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            _torch.forget_donations()
            return boxed(graph, forward=False)

        def compile_inference(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            scan_backward(graph, record=this)
            this.forward_nodes = len(graph.graph.nodes)
            record.become(this)
            return boxed(graph, forward=True)

        with _torch.compiling():
            return _torch.aot_autograd(
                fw_compiler=lambda graph, _: boxed(graph, forward=True),
                bw_compiler=compile_backward,
                inference_compiler=compile_inference,
                partition_fn=partition,
                keep_inference_input_mutations=True,
            )(gm, example_inputs)

    return backend


@contextlib.contextmanager
def compile_errors(record: ScanRecord, *, do: str) -> Iterator[None]:
    """Inside, a graph with this record is compiled or run; what went wrong in it comes out as an error of ours.

    Args:
        record: Of the graph.
        do: What to do about a region that Dynamo does not trace.

    Raises:
        EngineError: Dynamo does not trace the graph.
    """
    record.error = None
    try:
        yield
    except Exception as error:
        if isinstance(record.error, LBIError):  # Dynamo wraps it
            raise record.error from error
        if isinstance(error, _torch.NotTraceable):
            raise EngineError(
                f"a region that torch.compile does not trace: {str(error).strip().splitlines()[0]}",
                expected="regions whose forward it traces whole",
                do=do,
            ) from error
        raise


def _reshape(backward: fx.GraphModule) -> None:
    """Let views be reshapes: some operators (softplus_backward) give other strides than their fake tensors promise."""
    for node in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    backward.recompile()


class _Last:
    """Holds the record of the last graph that backend ``lbi`` rewrote."""

    record = ScanRecord()


def last_record() -> ScanRecord:
    """What the last compilation by backend ``lbi`` did."""
    return _Last.record


def _rewrite(graph: fx.Graph, *, batched: bool, jacobian_bytes: int) -> None:
    joint = graph.owning_module
    assert joint is not None
    _Last.record = ScanRecord()
    decompositions = _torch.inductor_decompositions()
    scan_backward(joint, record=_Last.record, decompositions=decompositions, jacobian_bytes=jacobian_bytes)
    if batched:
        batch_regions(joint, record=_Last.record.batched, decompositions=decompositions)


def rewrite_sources() -> tuple[str, ...]:
    """Files on which the rewrite depends; Inductor's caches must miss when one of them changes."""
    batching = (alike, batch_regions_file, ordering, region_rules, region_sums, repeats)
    scans = (adjoint_scan, index_chunks, jacobian_budget, jacobian_slices, jacobians, scan_backward_file)
    rules = (axis_calls, axis_recurrent, axis_routing, axis_rules, axis_views, axis_windows, axis_writes)
    axes_files = (axes, axis_probes, layouts, liveness, names, *rules)
    modules = (batch_cotangents, linearity, splicing, _torch, *scans, *axes_files, *batching)
    return tuple(str(module.__file__) for module in modules)


def lbi(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Inductor, with the scan in the backward of marked graphs; a graph without markers compiles as under ``inductor``.

    ``torch.compile(bounded, backend="lbi")`` finds it by name.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        mode: As for ``backend="inductor"``.
        options: As for ``backend="inductor"``, over those of ``mode``; and ``"batch_regions"``: whether what regions do
            alike runs as one operator, which it does unless told otherwise; and ``"jacobian_bytes"``, as for
            ``transform``.

    Raises:
        EngineError: The graph cannot be solved by a scan (inside Dynamo's ``BackendCompilerFailed``).
        OptionError: Another joint-graph pass is set where this one goes.
    """
    given = dict(options or {})
    batched = bool(given.pop("batch_regions", True))
    jacobian_bytes = check_budget(given.pop("jacobian_bytes", JACOBIAN_BYTES))
    config = _torch.inductor_options(mode, given)
    if config.get("joint_custom_pre_pass", _torch.inductor_joint_pass()) is not None:
        raise OptionError(
            "joint_custom_pre_pass is set in Inductor's options or global configuration",
            expected="that place free for the rewrite of the backward",
            do="use joint_custom_post_pass for your own pass, or compile with another backend (exact, as a chain)",
        )
    rewrite = functools.partial(_rewrite, batched=batched, jacobian_bytes=jacobian_bytes)
    variant = f"batch_regions={batched} jacobian_bytes={jacobian_bytes}"
    config["joint_custom_pre_pass"] = _torch.graph_pass(rewrite, rewrite_sources(), variant=variant)
    with _torch.compiling():
        return _torch.compile_with_inductor(gm, example_inputs, config)


_torch.announce_backend("lbi", "lbi_compile.backend:lbi")
