"""Insert what a Python function does into a joint graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

import lbi_compile.kernels.ops  # noqa: F401  registers the operators
from lbi_compile._torch import (
    detect_fake_mode,
    enable_python_dispatcher,
    no_autocast,
    no_new_guards,
    traced,
    vmap_without_fallback,
)
from lbi_compile.passes.jacobian_slices import distinct

# AOTAutograd's tags of nodes: where they run.
FORWARD, BACKWARD = "is_forward", "must_be_in_backward"


class Splicer:
    """Traces functions over values of the joint graph and inserts what they do.

    Args:
        gm: The joint graph.
        before: Node before which it is inserted.
        decompositions: What to trace with.
        latent: A latent of the graph, whose symbolic sizes functions may use beside those of their inputs.
    """

    def __init__(
        self, gm: fx.GraphModule, *, before: fx.Node, decompositions: Any, latent: fx.Node | None = None
    ) -> None:
        self.gm, self.decompositions, self.before = gm, decompositions, before
        self.inserted = 0
        self.traced: dict[Hashable, fx.GraphModule] = {}
        self.values: dict[Hashable, fx.Node] = {}
        values = [node.meta.get("val") for node in gm.graph.nodes]
        self.fake = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
        # Sizes that a trace uses must be bound by its inputs: Dynamo's symbolic sizes, and a latent of this chain.
        sizes = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.SymInt)]
        self.binders = [*sizes, *([] if latent is None else [latent])]

    def __call__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[fx.Node],
        *,
        like: Hashable | None = None,
        tag: str = BACKWARD,
        label: Mapping[str, Any] | None = None,
    ) -> Any:
        """Insert ``function`` of ``inputs``; the node (or list of nodes) of its result.

        Args:
            function: Of the values of ``inputs``.
            inputs: Nodes of the joint graph.
            like: Functions that come with an equal one are known to trace alike and are traced once.
            tag: AOTAutograd's tag of the nodes: where they run.
            label: Of the nodes: whose they are.
        """
        bound = [*self.binders, *inputs]
        trace = self.traced[like] if self.knows(like) else self._trace(function, bound)
        if like is not None:
            self.traced[like] = trace
        graph = self.gm.graph
        copies = dict(zip(trace.graph.find_nodes(op="placeholder"), bound, strict=True))
        with graph.inserting_before(self.before):
            for node in trace.graph.nodes:
                if node.op == "output":
                    return map_arg(node.args[0], copies.__getitem__)
                if node.op == "get_attr":
                    copies[node] = self._constant(getattr(trace, node.target))
                elif node.op != "placeholder":
                    copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op != "placeholder":
                    self._mark(copies[node], node, tag, label)
        raise AssertionError("a traced graph has an output")

    def once(self, function: Callable[[], Tensor], *, like: Hashable, tag: str = BACKWARD) -> fx.Node:
        """Insert ``function`` of nothing, unless it was inserted with this ``like`` before."""
        if like not in self.values:
            self.values[like] = self(function, [], tag=tag)
        return self.values[like]

    def knows(self, like: Hashable | None) -> bool:
        """A function with this ``like`` has been traced."""
        return like is not None and like in self.traced

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """The joint graph's fake mode, without autocast, new guards and silent loops."""
        with contextlib.ExitStack() as stack:
            for context in (torch.no_grad(), no_autocast(), vmap_without_fallback()):
                stack.enter_context(context)
            if self.fake is not None:
                for context in (self.fake, enable_python_dispatcher(), no_new_guards(self.fake)):
                    stack.enter_context(context)
            yield

    def _trace(self, function: Callable[..., Any], bound: Sequence[fx.Node]) -> fx.GraphModule:
        skip = len(self.binders)
        with self.tracing():
            values = [distinct(node.meta["val"]) for node in bound]
            trace = traced(lambda *values: function(*values[skip:]), values, decompositions=self.decompositions)
        trace.graph.eliminate_dead_code()
        return trace

    def _constant(self, value: Any) -> fx.Node:
        at = 0
        while hasattr(self.gm, name := f"_lbi_constant_{at}"):
            at += 1
        if isinstance(value, Tensor):
            self.gm.register_buffer(name, value)  # a graph warns of a plain attribute
        else:
            setattr(self.gm, name, value)
        return self.gm.graph.get_attr(name)

    def _mark(self, copy: fx.Node, node: fx.Node, tag: str, label: Mapping[str, Any] | None) -> None:
        copy.meta = dict(node.meta)
        copy.meta["custom"] = dict(label or {})
        self.inserted += 1
        size = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))
        if tag != BACKWARD or not size:
            # The partitioners may then neither move it forward nor save it in place of its inputs.
            copy.meta["partitioner_tag"] = tag
        else:
            copy.meta.pop("partitioner_tag", None)
