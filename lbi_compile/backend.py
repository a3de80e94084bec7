"""Backends of ``torch.compile`` that rewrite the backward of marked graphs: the eager default and ``lbi`` (Inductor)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lbi_compile import _torch
from lbi_compile.passes.scan_backward import ScanRecord, erase_markers, scan_backward

__all__ = ["ScanRecord", "eager_backend", "erase_markers"]


def eager_backend(record: ScanRecord) -> Callable[..., Any]:
    """A ``torch.compile`` backend that runs a marked graph operator by operator, with the scan in its backward.

    It needs no C++ compiler. Use it with ``dynamic=True``.

    Args:
        record: Always describes the graph that was compiled or run last.

    Returns:
        The backend. It raises ``EngineError`` (inside Dynamo's ``BackendCompilerFailed``, and in ``record.error``) where
        the graph cannot be solved by a scan.

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
            run = graph.forward

            def call(args: list[Any]) -> Any:
                if forward:
                    record.become(this)
                inputs = list(args)
                args.clear()
                return run(*inputs)

            call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
            return call

        def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            try:
                scan_backward(joint, record=this)
            finally:
                record.become(this)
            forward, backward = _torch.default_partition(joint, inputs, **options)
            this.forward_nodes, this.backward_nodes = len(forward.graph.nodes), len(backward.graph.nodes)
            record.become(this)
            return forward, backward

        def compile_backward(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            _forget_donations()
            return boxed(graph, forward=False)

        def compile_inference(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            erase_markers(graph.graph)
            graph.recompile()
            this.status, this.why = "inference", "no input or parameter of the graph needs a gradient"
            this.forward_nodes = len(graph.graph.nodes)
            record.become(this)
            return boxed(graph, forward=True)

        with _torch.keep_saved_buffers():
            return _torch.aot_autograd(
                fw_compiler=lambda graph, _: boxed(graph, forward=True),
                bw_compiler=compile_backward,
                inference_compiler=compile_inference,
                partition_fn=partition,
                keep_inference_input_mutations=True,
            )(gm, example_inputs)

    return backend


def _forget_donations() -> None:
    """A saved tensor that the backward may overwrite could not serve a second backward of the same graph."""
    context = _torch.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is not None:
        metadata.bw_donated_idxs = []


