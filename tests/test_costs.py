"""Costs: counted against formulas and against torch's own counter on real tensors, without touching anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lbi_compile.errors import CaptureError, ExampleInputsError
from lbi_compile.passes.costs import Costs, costs


class Lambda(nn.Module):
    """A function with modules of its own."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def capture(model: nn.Module, *args: Any, dynamic: bool = False) -> fx.GraphModule:
    shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in args),) if dynamic else None
    program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
    found = program.module(check_guards=False)
    assert isinstance(found, fx.GraphModule)
    return found


def of(record: Costs, field: str, name: str) -> Any:
    return next(value for node, value in getattr(record, field).items() if node.name == name)


def block(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)  # [B, T, 3 D]
    q, k, v = y.split(y.shape[-1] // 3, dim=-1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


def test_flops_bytes_and_shapes_of_a_block():
    model = Lambda(block, linear=nn.Linear(8, 24))
    record = costs(capture(model, torch.randn(2, 5, 8)), example=(torch.randn(2, 5, 8),))
    assert of(record, "flops", "linear") == 2 * 2 * 5 * 8 * 24
    assert of(record, "flops", "scaled_dot_product_attention") == 2 * (2 * 2 * 5 * 5 * 8)
    assert record.total_flops == 2 * 2 * 5 * 8 * 24 + 2 * (2 * 2 * 5 * 5 * 8)
    assert of(record, "shape", "linear") == (2, 5, 24)
    assert of(record, "dtype", "linear") == torch.float32
    assert of(record, "bytes", "linear") == 2 * 5 * 24 * 4
    assert of(record, "shape", "split") is None
    assert of(record, "dtype", "split") is None
    assert of(record, "bytes", "split") == 2 * 5 * 24 * 4
    assert of(record, "shape", "getitem") == (2, 5, 8)


def test_every_node_but_the_output_is_counted():
    gm = capture(Lambda(block, linear=nn.Linear(8, 24)), torch.randn(2, 5, 8))
    record = costs(gm, example=(torch.randn(2, 5, 8),))
    expected = [node for node in gm.graph.nodes if node.op != "output"]
    for found in (record.flops, record.bytes, record.shape, record.dtype):
        assert list(found) == expected


def test_the_sum_is_what_torch_counts_on_real_tensors():
    model = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, batch_first=True)
    x = torch.randn(3, 7, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x)
    # torch has no formula for the attention kernel of CPUs
    attention = 2 * (2 * 3 * 7 * 7 * 16)
    seen = counter.get_total_flops()
    assert costs(capture(model, x), example=(x,)).total_flops in (seen, seen + attention)
    assert seen >= 2 * 3 * 7 * (16 * 48 + 16 * 16 + 2 * 16 * 40)


def test_convolution():
    model = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 6)
    assert costs(capture(model, x), example=(x,)).total_flops == 2 * 2 * 4 * 5 * 6 * 3 * 3 * 3


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # the exporter about the flat weights of nn.LSTM
def test_recurrent_nets_count_every_layer_and_direction():
    model = Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 6, num_layers=2, bidirectional=True))
    x = torch.randn(5, 3, 4)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert weights == 2 * 24 * (4 + 6) + 2 * 24 * (12 + 6)
    assert costs(capture(model, x), example=(x,)).total_flops == 2 * 5 * 3 * weights


def test_another_batch_size_than_the_captured_one():
    gm = capture(
        Lambda(lambda m, x: m.linear(x.reshape(x.shape[0] * 5, 8)), linear=nn.Linear(8, 8)),
        torch.randn(2, 5, 8),
        dynamic=True,
    )
    small, large = (costs(gm, example=(torch.randn(b, 5, 8),)) for b in (3, 9))
    assert large.total_flops == 3 * small.total_flops > 0
    assert of(large, "shape", "linear") == (45, 8)
    numbers = [node for node in gm.graph.nodes if node.name.startswith(("sym_size", "mul"))]
    assert numbers
    assert all(large.shape[node] is None and large.bytes[node] == 0 for node in numbers)


def test_full_width_needs_no_memory():
    with torch.device("meta"):
        model, x = (
            nn.Linear(1_000_000, 1_000_000, dtype=torch.bfloat16),
            torch.randn(8, 1_000_000, dtype=torch.bfloat16),
        )
        gm = capture(model, x)
    record = costs(gm, example=(x,))
    assert record.total_flops == 2 * 8 * 10**12
    assert of(record, "bytes", "linear") == 8 * 10**6 * 2


def test_real_parameters_are_not_copied():
    model = nn.Linear(64, 64)
    seen: list[Tensor] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(leaf for leaf in [out] if isinstance(leaf, Tensor) and type(leaf) in (Tensor, nn.Parameter))
            return out

    gm, x = capture(model, torch.randn(4, 64)), torch.randn(4, 64)
    with Watch():
        costs(gm, example=(x,))
    assert not [t for t in seen if not t.is_meta]


def test_buffers_random_state_and_modes_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)
    gm = capture(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, state = gm.code, torch.get_rng_state()
    costs(gm, example=(x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gm.code == text
    assert torch.is_grad_enabled()


def test_constants_among_the_inputs():
    gm = capture(
        Lambda(lambda m, x, scale, mask: m.linear(x) * scale, linear=nn.Linear(4, 4)), torch.randn(3, 4), 2.0, None
    )
    placeholders = gm.graph.find_nodes(op="placeholder")
    record = costs(gm, example=(torch.randn(3, 4), 2.0, None)[: len(placeholders)])
    assert record.total_flops == 2 * 3 * 4 * 4


def test_wrong_number_of_inputs():
    gm = capture(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(ExampleInputsError, match=r"0 example values\n.*1, one for each placeholder"):
        costs(gm, example=())


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[x[:, 0] > 0])


def test_sizes_that_depend_on_values_are_named():
    gm = capture(Picks(), torch.randn(3, 4))
    with pytest.raises(CaptureError) as caught:
        costs(gm, example=(torch.randn(3, 4),))
    assert "depends on the values of a tensor: aten.index (" in caught.value.found
    assert "in forward: return self.linear(x[x[:, 0] > 0])" in caught.value.found
    assert "While executing" not in str(caught.value)
