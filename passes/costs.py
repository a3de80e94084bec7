"""Costs: FLOPs, output bytes and concrete shapes of every node, found by one run on fake tensors.

Contract: a captured graph and example inputs in, a frozen record out; the graph, its buffers and the random state are
left alone, and no tensor is allocated, so a model of any width can be costed on any machine.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lbi_compile._torch import DataDependentValue, FakeTensorMode, detect_fake_mode, pytree
from lbi_compile.errors import CaptureError, ExampleInputsError
from lbi_compile.passes.names import describe, operator_name
from lbi_compile.passes.repeats import form_of_call


@dataclass(frozen=True, slots=True)
class Costs:
    """What each node of a graph costs at the example shapes. Every node but the output has an entry in each mapping.

    Attributes:
        flops: Forward FLOPs of matrix products, convolutions and attention; two for each multiply-add.
        bytes: Bytes of the node's output tensors; views count in full, numbers as zero.
        shape: Sizes of the output tensor; ``None`` where the node gives no tensor or several (its ``getitem`` nodes
            have theirs).
        dtype: Data type of the output tensor; ``None`` like ``shape``.
        total_flops: Sum of ``flops``.
    """

    flops: Mapping[fx.Node, int]
    bytes: Mapping[fx.Node, int]
    shape: Mapping[fx.Node, tuple[int, ...] | None]
    dtype: Mapping[fx.Node, torch.dtype | None]
    total_flops: int


def costs(gm: fx.GraphModule, *, example: tuple[Any, ...]) -> Costs:
    """Run ``gm`` once on fake copies of ``example`` and of its parameters, and count.

    Args:
        gm: Captured graph.
        example: One value for each placeholder, in order: tensors (real or fake) and constants.

    Returns:
        The record.

    Raises:
        ExampleInputsError: The number of values is not the number of placeholders.
        CaptureError: A shape in the graph depends on the values of a tensor, so fake tensors have no sizes to count.

    Example:
        >>> record = costs(gm, example=(torch.randn(2, 128, 512),))
        >>> record.total_flops
        1073741824
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(example):
        raise ExampleInputsError(
            f"{len(example)} example values",
            expected=f"{len(placeholders)}, one for each placeholder of the graph",
            do="pass the flattened inputs the graph was captured with",
        )
    values = pytree.tree_leaves([example, [*gm.parameters(), *gm.buffers()]])
    run = _Count(gm, mode=detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True))
    return run.count(example)


class _Count(fx.Interpreter):
    """Runs a graph on fake tensors and notes what each node gives."""

    def __init__(self, gm: fx.GraphModule, *, mode: Any) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # the interpreter would add lines to our own errors
        self._mode = mode
        # the counter knows the fused attention kernels of GPUs, not the one of CPUs
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._counter = FlopCounterMode(display=False, custom_mapping={on_cpu: _cpu_attention_flops})
        self._fakes: dict[str, Any] = {}
        self._met: dict[Hashable, tuple[Any, int]] = {}  # values and FLOPs: layers repeat each other
        self.flops: dict[fx.Node, int] = {}
        self.bytes: dict[fx.Node, int] = {}
        self.shape: dict[fx.Node, tuple[int, ...] | None] = {}
        self.dtype: dict[fx.Node, torch.dtype | None] = {}

    def count(self, example: tuple[Any, ...]) -> Costs:
        inputs = [self._fake(value) for value in example]
        with self._mode, torch.no_grad(), self._counter:
            self.run(*inputs, enable_io_processing=False)
        return Costs(self.flops, self.bytes, self.shape, self.dtype, sum(self.flops.values()))

    def _fake(self, value: Any) -> Any:
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    def fetch_attr(self, target: str) -> Any:
        # one fake for each attribute, so that a buffer written by one node is the one that another reads
        if target not in self._fakes:
            value = super().fetch_attr(target)
            plain = type(value) is nn.Parameter and value.layout is torch.strided
            self._fakes[target] = _empty(value) if plain else self._fake(value)
        return self._fakes[target]

    def run_node(self, n: fx.Node) -> Any:
        key = form_of_call(n.target, *self.fetch_args_kwargs_from_env(n)) if n.op == "call_function" else None
        if key in self._met:
            value, flops = self._met[key]
            return self._note(n, value, flops)
        before = self._counter.get_total_flops()
        try:
            value = super().run_node(n)
        except DataDependentValue as error:
            raise CaptureError(
                f"a size or a number that depends on the values of a tensor: {describe(n)}",
                expected="sizes that depend on the sizes of the inputs alone",
                do="pad or mask to a fixed size there, or transform the part of the model without it",
            ) from error
        if n.op == "output":
            return value
        recurrent = self._recurrent_flops(n)
        flops = self._counter.get_total_flops() - before if recurrent is None else recurrent
        if key is not None:
            self._met[key] = value, flops
        return self._note(n, value, flops)

    def _note(self, node: fx.Node, value: Any, flops: int) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        single = value if isinstance(value, Tensor) else None
        self.flops[node] = flops
        self.bytes[node] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.shape[node] = None if single is None else tuple(single.shape)
        self.dtype[node] = None if single is None else single.dtype
        return value

    def _recurrent_flops(self, node: fx.Node) -> int | None:
        """FLOPs of a whole LSTM, GRU or RNN, whose kernels the counter does not know and which differ by device."""
        if operator_name(node) not in _RECURRENT:
            return None
        (x, _, weights, *_), _ = self.fetch_args_kwargs_from_env(node)
        return 2 * prod(x.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _empty(value: Tensor) -> Tensor:
    """A fake of a tensor, under the mode that is on: many times as fast as ``from_tensor``."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


_RECURRENT = frozenset({"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"})


def _cpu_attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """FLOPs of the CPU attention kernel from the shapes of its operands."""
    return sdpa_flop_count(query, key, value)
