"""Liveness: which nodes carry gradient from an input through a parameter, and what each node must wait for.

Contract: a captured graph (operators of the training dialect, not functional) in, a frozen record out; the graph is
left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from lbi_compile._torch import DataDependentValue, FakeTensorMode, enable_python_dispatcher, example_size, pytree
from lbi_compile.errors import NoFloatPathError
from lbi_compile.passes.repeats import form_of_call

INPUT, CONSTANT, PARAMETER, PARAMETER_ONLY, LIVE, NUMBER = (
    "input",
    "constant",
    "parameter",
    "parameter-only",
    "live",
    "number",
)


@dataclass(frozen=True, slots=True)
class Liveness:
    """What flows where.

    Attributes:
        kind: For every node but the output one of ``"input"`` (depends on inputs, not on parameters), ``"constant"``,
            ``"parameter"``, ``"parameter-only"``, ``"live"`` (depends by value on an input and on a parameter), and
            ``"number"`` (no tensor: sizes, asserts).
        waits: For every node the nodes that must run before it: its arguments, then those of ``memory``.
        memory: For nodes that use memory which some node writes: the nodes that reach them through memory alone, by a
            write made after the argument it is read through, or because their own read must come before the write.
        overwritten: Nodes whose value a later node writes over.
        live: Live nodes in program order.
        sinks: Live differentiable outputs of the model.
        detached: Live nodes from which no gradient reaches a parameter or an input.
    """

    kind: Mapping[fx.Node, str]
    waits: Mapping[fx.Node, tuple[fx.Node, ...]]
    memory: Mapping[fx.Node, tuple[fx.Node, ...]]
    overwritten: frozenset[fx.Node]
    live: tuple[fx.Node, ...]
    sinks: tuple[fx.Node, ...]
    detached: frozenset[fx.Node] = frozenset()


def liveness(gm: fx.GraphModule, *, trainable: frozenset[str] | None = None) -> Liveness:
    """Classify the nodes of a captured graph.

    Every float ``nn.Parameter`` counts as trainable, frozen or not, so that thawing one later needs no new capture.

    Args:
        gm: Captured graph; ``node.meta["val"]`` holds its values.
        trainable: Names of the attributes that count as trainable, or of inputs where parameters come in as inputs (as
            in a ``torch.compile`` backend); by default every float parameter.

    Returns:
        The record.

    Raises:
        NoFloatPathError: No output depends on an input and on a parameter.
    """
    if trainable is None:
        trainable = frozenset(n for n, p in gm.named_parameters(remove_duplicate=False) if p.is_floating_point())
    order = memory_order(gm)
    waits = {
        node: tuple(dict.fromkeys((*node.all_input_nodes, *order.memory.get(node, ())))) for node in gm.graph.nodes
    }
    kind = _kinds(gm, trainable, waits, order.writes)
    output = gm.graph.output_node()
    trained = _with_gradient(kind, waits)
    sinks = tuple(
        dict.fromkeys(
            node for node in output.all_input_nodes if kind[node] == LIVE and node in trained and is_float_tensor(node)
        )
    )
    if not sinks:
        raise NoFloatPathError(
            f"no output (of {len(output.all_input_nodes)}) reads an input and takes a gradient to a parameter",
            expected="at least one float output computed from an input and a parameter",
            do="check that the model has float parameters and its output is no argmax, detached or made under no_grad",
        )
    overwritten = frozenset(before for written in order.writes.values() for before in written)
    live = tuple(n for n, k in kind.items() if k == LIVE)
    detached = frozenset(live) - _with_gradient(kind, waits, inputs=True)
    return Liveness(kind, waits, order.memory, overwritten, live, sinks, detached)


def _kinds(
    gm: fx.GraphModule,
    trainable: frozenset[str],
    waits: Mapping[fx.Node, tuple[fx.Node, ...]],
    writes: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> dict[fx.Node, str]:
    shared: set[fx.Node] = set()  # parameter-only values whose memory a live node writes: a clone would miss that
    while True:
        kind: dict[fx.Node, str] = {}
        random_live = False
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                kind[node] = PARAMETER if node.name in trainable else INPUT
            elif node.op == "get_attr":
                kind[node] = PARAMETER if str(node.target) in trainable else CONSTANT
            elif node.op != "output" and not _tensors(node):
                kind[node] = NUMBER
            elif node.op != "output":
                kind[node] = _join({kind[before] for before in waits[node]})
                random = is_random(node)
                # what draws random numbers or writes to memory that others see may not be repeated in two regions
                outside = any(kind[before] != PARAMETER_ONLY for before in writes.get(node, ()))
                once = kind[node] == PARAMETER_ONLY and (random or outside or node in shared)
                # and a random draw may not move ahead of an earlier live one
                if once or (random and random_live):
                    kind[node] = LIVE
                random_live |= random and kind[node] == LIVE
        by_live = (before for node, written in writes.items() if kind[node] == LIVE for before in written)
        more = {node for node in by_live if kind[node] == PARAMETER_ONLY}
        if not more:
            return kind
        shared |= more


def _with_gradient(
    kind: Mapping[fx.Node, str], waits: Mapping[fx.Node, tuple[fx.Node, ...]], *, inputs: bool = False
) -> set[fx.Node]:
    """Nodes from which a gradient reaches a trainable parameter (or an input): unlike values, it stops at a detach."""
    found: set[fx.Node] = set()
    for node, what in kind.items():
        name = getattr(node.target, "__name__", "")
        # the exporter wraps what runs under no_grad into an operator that names the mode first
        stops = name.startswith("detach") or (name == "wrap_with_set_grad_enabled" and node.args[0] is False)
        passes = what not in (NUMBER, PARAMETER) and not stops
        starts = what == PARAMETER or (inputs and node.op == "placeholder")
        if starts or (passes and any(before in found for before in waits[node])):
            found.add(node)
    return found


def _join(kinds: set[str]) -> str:
    if LIVE in kinds:
        return LIVE
    if kinds & {PARAMETER, PARAMETER_ONLY}:
        return LIVE if INPUT in kinds else PARAMETER_ONLY
    return INPUT if INPUT in kinds else CONSTANT


def is_random(node: fx.Node) -> bool:
    """The operator draws random numbers when it runs (a dropout in training mode, not one in evaluation mode)."""
    if any(is_random(inner) for body in _bodies(node).values() for inner in body.graph.nodes):
        return True
    name = getattr(node.target, "__name__", "")
    if "scaled_dot_product" in name:
        return _arguments(node).get("dropout_p", 0.0) != 0.0
    if "dropout" in name:
        given = _arguments(node)
        return given.get("train") is not False and given.get("p") != 0.0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator by name, defaults included; empty for what has no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}


def _bodies(node: fx.Node) -> dict[int, fx.GraphModule]:
    """Graphs that an operator runs, by argument: the exporter keeps ``no_grad`` and ``autocast`` blocks apart."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return {}
    owner = node.graph.owning_module
    attributes = {i: arg for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"}
    found = {i: getattr(owner, str(arg.target), None) for i, arg in attributes.items()}
    return {i: body for i, body in found.items() if isinstance(body, fx.GraphModule)}


def is_float_tensor(node: fx.Node) -> bool:
    """The node gives one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_mutating(node: fx.Node) -> bool:
    """The operator writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    return any(is_mutating(inner) for body in _bodies(node).values() for inner in body.graph.nodes)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    if value is None and node.op == "call_function":
        # in-place operators whose result nobody reads carry no value
        return [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)] * is_mutating(
            node
        )
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, slots=True)
class MemoryOrder:
    """Which nodes meet in memory.

    Attributes:
        memory: As in ``Liveness``.
        writes: For every writing node the earlier nodes whose value it writes over.
    """

    memory: Mapping[fx.Node, tuple[fx.Node, ...]]
    writes: Mapping[fx.Node, tuple[fx.Node, ...]]


def memory_order(gm: fx.GraphModule) -> MemoryOrder:
    """Find read/write order on shared storage.

    Exported graphs are not functional: an operator may write into a view that another node reads by another name.
    Storages are found by running the graph on fake tensors; a graph without a writing operator needs no run.
    """
    if not any(is_mutating(node) for node in gm.graph.nodes):
        return MemoryOrder({}, {})
    try:
        # sizes as numbers: a run with symbols takes ten times as long
        run = _run(gm, FakeTensorMode(allow_non_fake_inputs=True), _at_example_size)
    except DataDependentValue:
        modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in gm.graph.nodes)
        run = _run(gm, next(mode for mode in modes if mode is not None), lambda value: value)
    return MemoryOrder(run.in_order(run.memory), run.in_order(run.writes))


def _run(gm: fx.GraphModule, mode: Any, given: Callable[[Any], Any]) -> _Storages:
    run = _Storages(gm, mode)
    # its decompositions take symbolic sizes where a kernel takes numbers alone (`constant_pad_nd`)
    with mode, enable_python_dispatcher(), torch.no_grad():
        values = [given(node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder")]
        run.run(*values, enable_io_processing=False)
    return run


def _at_example_size(value: Any) -> Any:
    """A value of its own, at the sizes of the inputs of the capture."""
    if isinstance(value, Tensor):
        sizes, strides = ([example_size(n) for n in some] for some in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return example_size(value) if isinstance(value, torch.SymInt) else value


class _Storages(fx.Interpreter):
    """Runs a graph on fake tensors and notes which node last wrote, and which since read, every storage."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.mode = mode
        self.memory: dict[fx.Node, set[fx.Node]] = {}
        self.writes: dict[fx.Node, set[fx.Node]] = {}
        self.written: dict[int, fx.Node] = {}
        self._read: dict[int, set[fx.Node]] = {}
        self._holders: dict[int, set[fx.Node]] = {}
        self._position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._fresh: dict[Hashable, Any] = {}  # results in memory of their own: layers repeat each other

    def in_order(self, found: Mapping[fx.Node, set[fx.Node]]) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The same with the nodes in program order."""
        return {node: tuple(sorted(some, key=self._position.__getitem__)) for node, some in found.items() if some}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value) if isinstance(value, (Tensor, nn.Parameter)) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the exporter's guard module: it reads nothing

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            self._note(n)
            value = self._call(n)
        else:
            value = super().run_node(n)
        for storage in _storages(value):
            self._holders.setdefault(storage, set()).add(n)
        return value

    def _call(self, node: fx.Node) -> Any:
        given = self.fetch_args_kwargs_from_env(node)
        form = form_of_call(node.target, *given)
        if form in self._fresh:
            return pytree.tree_map_only(Tensor, _another, self._fresh[form])
        value = super().run_node(node)
        own = _storages(value)
        apart = len(own) == sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        if form is not None and apart and not own & _storages(given):
            self._fresh[form] = value
        return value

    def _note(self, node: fx.Node) -> None:
        written = self._written_by(node) if is_mutating(node) else set()
        memory: set[fx.Node] = set()
        for before in node.all_input_nodes:
            for storage in _storages(self.env[before]):
                writer = self.written.get(storage)
                # a value made after the write carries it along; an older one names the memory only
                if writer is not None and self._position[before] < self._position[writer]:
                    memory.add(writer)
                if storage not in written:
                    self._read.setdefault(storage, set()).add(node)
        for storage in written:
            memory |= self._read.pop(storage, set())
            self.writes.setdefault(node, set()).update(self._holders.get(storage, ()))
            self.written[storage] = node
        self.memory[node] = memory - {node}

    def _written_by(self, node: fx.Node) -> set[int]:
        if not _bodies(node):
            schema, given = node.target._schema, _arguments(node)  # type: ignore[union-attr]
            marked = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            return {storage for name in marked for storage in _storages(self._values(given.get(name)))}
        found: set[int] = set()
        for i, body in _bodies(node).items():
            inner = _Storages(body, self.mode)
            inner.run(*self._values(node.args[i + 1 :]), enable_io_processing=False)
            found |= set(inner.written)
        return found

    def _values(self, of: Any) -> Any:
        return map_arg(of, self.env.__getitem__)


def _another(value: Tensor) -> Tensor:
    """A tensor of the same form, in other memory."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
