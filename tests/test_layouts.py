"""Layouts: folding forth and back, and what they find in captured models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from lbi_compile._torch import silent_export
from lbi_compile.errors import InterfaceError
from lbi_compile.passes.layouts import Layout, _matching, layout

ALL = [Layout(batch, width, rank) for rank in range(2, 7) for batch, width in permutations(range(rank), 2)]
SIZES = (2, 3, 5, 4, 1, 2)


# --- fold and unfold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", ALL, ids=str)
def test_fold_has_the_positions_in_row_major_order(lay: Layout):
    shape = SIZES[: lay.rank]
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    folded = lay.fold(x)
    positions = [shape[dim] for dim in lay.positions]
    assert folded.shape == (shape[lay.batch], *([torch.Size(positions).numel()] if positions else []), shape[lay.width])
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        at = 0
        for dim in lay.positions:
            at = at * shape[dim] + index[dim]
        found = (
            folded[index[lay.batch], at, index[lay.width]] if positions else folded[index[lay.batch], index[lay.width]]
        )
        assert found == x[tuple(index)]


@pytest.mark.parametrize("lay", ALL, ids=str)
def test_unfold_is_the_exact_inverse(lay: Layout):
    shape = SIZES[: lay.rank]
    for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*range(lay.rank)[::-1])):
        assert torch.equal(lay.unfold(lay.fold(x), x.shape), x)
        assert lay.unfold(lay.fold(x), x.shape).shape == x.shape
    folded = lay.fold(torch.randn(shape))
    other = torch.randn(7, *folded.shape[1:-1], 9)  # another batch, a latent in place of the width
    back = lay.unfold(other, shape)
    assert back.shape == tuple(
        7 if dim == lay.batch else 9 if dim == lay.width else size for dim, size in enumerate(shape)
    )
    assert torch.equal(lay.fold(back), other)


@pytest.mark.parametrize("lay", [Layout(0, 1, 2), Layout(0, 2, 3)], ids=str)
def test_values_that_are_folded_already_are_handed_on(lay: Layout):
    x = torch.randn(SIZES[: lay.rank])
    assert lay.fold(x) is x
    assert lay.unfold(x, x.shape) is x


def test_a_value_without_a_position_or_a_sample_folds():
    image = Layout(0, 1, 4)
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)]:
        x = torch.randn(shape)
        assert image.fold(x).shape == (shape[0], shape[2] * shape[3], shape[1])
        assert image.unfold(image.fold(x), shape).shape == shape


@pytest.mark.parametrize("lay", [Layout(0, 1, 4), Layout(0, 3, 4), Layout(1, 2, 3), Layout(2, 0, 5)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fold_compiles_once_for_all_sizes(lay: Layout, backend: str):
    torch._dynamo.reset()
    compiled = 0

    def double(x: Tensor) -> Tensor:
        return lay.unfold(lay.fold(x).sin() * 2, x.shape)

    def count(gm: fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    run = torch.compile(double, backend=count, dynamic=True, fullgraph=True)
    for extra in (0, 1, 3):
        x = torch.randn([size + 2 + extra for size in SIZES[: lay.rank]], requires_grad=True)
        got = run(x)
        assert torch.equal(got, x.sin() * 2)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, x.sin() * 2)))
    assert compiled == 1


def test_fold_exports_with_symbolic_sizes():
    class Fold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lay = Layout(0, 1, 4)
            return lay.unfold(F.layer_norm(lay.fold(x), [4]), x.shape)

    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    gm = torch.export.export(Fold(), (torch.randn(2, 4, 3, 5),), dynamic_shapes=sizes).module()
    x = torch.randn(3, 4, 6, 2)
    assert torch.equal(gm(x), F.layer_norm(x.permute(0, 2, 3, 1), [4]).permute(0, 3, 1, 2))


# --- layouts of captured values -----------------------------------------------------------------------------------


def _captured(model: nn.Module, x: Tensor, batch: int) -> tuple[fx.GraphModule, str]:
    """A captured model and how its batch size prints."""
    with silent_export():
        exported = torch.export.export(model, (x,), dynamic_shapes=({batch: Dim.DYNAMIC},), strict=False)
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    (placeholder,) = gm.graph.find_nodes(op="placeholder")
    return gm, str(placeholder.meta["val"].shape[batch])


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def _convnext(x: Tensor, stem: nn.Module, mix: nn.Module, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    x = stem(x)
    for _ in range(2):
        x = x + down(F.gelu(up(norm(mix(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
    return x.mean((2, 3))


def _vit(x: Tensor, stem: nn.Module, layer: nn.Module) -> Tensor:
    return layer(stem(x).flatten(2).transpose(1, 2)).mean(1)


def _conformer(x: Tensor, up: nn.Module, mix: nn.Module, norm: nn.Module) -> Tensor:
    return x + norm(mix(F.glu(up(x.transpose(1, 2)), 1)).transpose(1, 2))


def _attention(x: Tensor, project: nn.Module, out: nn.Module) -> Tensor:
    b, t, d = x.shape
    q, k, v = (part.view(b, t, 3, 2).transpose(1, 2) for part in project(x).chunk(3, -1))
    return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def _mixer(x: Tensor, tokens: nn.Module, channels: nn.Module) -> Tensor:
    x = x + tokens(x.transpose(1, 2)).transpose(1, 2)
    return x + channels(x)


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 2


def _shuffled(x: Tensor, one: nn.Module, two: nn.Module) -> Tensor:
    b, c, h, w = x.shape
    x = one(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return two(x.relu() * 2 + 1)


def _heavy(x: Tensor, weight: nn.Module) -> Tensor:
    """The weight from the left."""
    return (weight.weight @ x).tanh() * 2


# Models with sizes that tell the dims apart: input, dim of the batch, and by size of the value the dim of its width.
MODELS: dict[str, tuple[nn.Module, tuple[int, ...], int, dict[tuple[int, ...], int]]] = {
    "convnext": (
        Apply(
            _convnext, nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8),
            nn.Linear(8, 32), nn.Linear(32, 8),
        ),
        (2, 3, 20, 24), 0,
        {(2, 3, 20, 24): 1, (2, 8, 5, 6): 1, (2, 5, 6, 8): 3, (2, 5, 6, 32): 3},
    ),
    "vit": (
        Apply(_vit, nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)),
        (2, 3, 20, 24), 0,
        {(2, 8, 5, 6): 1, (2, 8, 30): 1, (2, 30, 8): 2, (2, 30, 12): 2},
    ),
    "audio": (
        nn.Sequential(nn.Conv1d(3, 8, 5, 2), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)),
        (2, 3, 41), 0,
        {(2, 3, 41): 1, (2, 8, 19): 1, (2, 6, 17): 1},
    ),
    "conformer": (
        Apply(_conformer, nn.Conv1d(8, 16, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)),
        (2, 7, 8), 0,
        {(2, 7, 8): 2, (2, 8, 7): 1, (2, 16, 7): 1},
    ),
    "attention": (
        Apply(_attention, nn.Linear(6, 18), nn.Linear(6, 6)),
        (4, 7, 6), 0,
        {(4, 7, 6): 2, (4, 7, 18): 2, (4, 7, 3, 2): 3, (4, 3, 7, 2): 3},
    ),
    "time first": (nn.TransformerEncoderLayer(8, 2, 12), (7, 3, 8), 1, {(7, 3, 8): 2, (7, 3, 12): 2}),
    "mixer": (
        Apply(_mixer, nn.Linear(7, 7), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))),
        (2, 7, 8), 0,
        {(2, 7, 12): 2},
    ),
    "channels last": (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8)), (2, 5, 6, 3), 0, {(2, 5, 6, 3): 3, (2, 5, 6, 8): 3},
    ),
    "volumes": (
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4), nn.MaxPool3d(2)), (2, 3, 6, 8, 10), 0,
        {(2, 3, 6, 8, 10): 1, (2, 4, 4, 6, 8): 1, (2, 4, 2, 3, 4): 1},
    ),
    "channel shuffle": (
        Apply(_shuffled, nn.Conv2d(6, 6, 1), nn.PixelShuffle(1)), (2, 6, 5, 7), 0,
        {(2, 6, 5, 7): 1, (2, 2, 3, 5, 7): 2},
    ),
    "pixel shuffle": (
        nn.Sequential(nn.PixelShuffle(2), nn.Upsample(scale_factor=2)), (2, 8, 5, 7), 0,
        {(2, 8, 5, 7): 1, (2, 2, 10, 14): 1, (2, 2, 20, 28): 1},
    ),
    "norm in pieces": (Apply(_rms), (2, 7, 8), 0, {(2, 7, 8): 2}),
    "norm in pieces of images": (Apply(_rms), (2, 5, 7, 8), 0, {(2, 5, 7, 8): 3}),
    "weight on the left": (Apply(_heavy, nn.Linear(7, 9)), (2, 7, 5), 0, {(2, 7, 5): 1, (2, 9, 5): 1}),
    "layer norm of images": (nn.LayerNorm([8, 5, 7]), (2, 8, 5, 7), 0, {(2, 8, 5, 7): 1}),
    "layer norm of frames": (nn.LayerNorm([8, 5, 7]), (2, 3, 8, 5, 7), 0, {(2, 3, 8, 5, 7): 2}),
    "pooled images": (Apply(lambda x: x.mean((1, 2)).relu()), (2, 5, 7, 8), 0, {(2, 5, 7, 8): 3, (2, 8): 1}),
    "rows": (nn.Linear(8, 5), (2, 8), 0, {(2, 8): 1, (2, 5): 1}),
    "rows, batch last": (Apply(_heavy, nn.Linear(8, 5)), (8, 2), 1, {(8, 2): 0, (5, 2): 0}),
    "nothing known": (Apply(torch.tanh), (2, 5, 6, 7), 0, {(2, 5, 6, 7): 1}),
    "nothing known of rows": (Apply(torch.tanh), (2, 5, 6), 0, {(2, 5, 6): 2}),
    "nothing known, batch second": (Apply(torch.tanh), (5, 2, 6, 7), 1, {(5, 2, 6, 7): 3}),
    "nothing known, batch last": (Apply(torch.tanh), (5, 6, 2), 2, {(5, 6, 2): 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_widths_of_models(name: str):
    model, shape, batch, widths = MODELS[name]
    gm, symbol = _captured(model, torch.randn(shape), batch)
    met = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "call_function") and isinstance(value, Tensor):
            sizes = tuple(shape[batch] if str(size) == symbol else size for size in value.shape)
            if all(isinstance(size, int) for size in sizes) and sizes in widths:
                met.add(sizes)
                at = [str(size) for size in value.shape].index(symbol)
                assert layout(node, batch=symbol) == Layout(at, widths[sizes], len(sizes)), node
    assert met == set(widths)


def test_recurrent_nets_tell_time_first():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.GRU(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.tanh())[0].relu()

    gm, symbol = _captured(Net(), torch.randn(5, 3, 6), 1)
    (before,) = [node for node in gm.graph.nodes if node.name == "tanh"]
    (after,) = [node for node in gm.graph.nodes if node.name == "relu"]
    assert layout(before, batch=symbol) == layout(after, batch=symbol) == Layout(1, 2, 3)


def test_the_batch_is_dim_0_where_the_symbol_does_not_tell():
    gm, symbol = _captured(Apply(lambda x: (x @ x.t()) * 2), torch.randn(3, 5), 0)
    product = gm.graph.output_node().all_input_nodes[0]
    assert [str(size) for size in product.meta["val"].shape] == [symbol, symbol]
    assert layout(product, batch=symbol) == Layout(0, 1, 2)
    table, symbol = _captured(Apply(lambda x: (x[:, :, None] - x[:, None]).abs()), torch.randn(5, 3), 1)
    pairs = table.graph.output_node().all_input_nodes[0]
    assert [str(size) for size in pairs.meta["val"].shape] == ["5", symbol, symbol]
    assert layout(pairs, batch=symbol) == Layout(0, 2, 3)
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert layout(x) == layout(x, batch="s1234") == Layout(0, 1, 2)


def test_a_value_of_one_dim_has_one_feature():
    gm, symbol = _captured(Apply(lambda x: x.sum(1) * 2), torch.randn(3, 5), 0)
    scores = gm.graph.output_node().all_input_nodes[0]
    lay, x = layout(scores, batch=symbol), torch.randn(3)
    assert lay == Layout(0, 0, 1)
    assert lay.positions == ()
    assert torch.equal(lay.fold(x), x[:, None])
    assert torch.equal(lay.unfold(lay.fold(x), x.shape), x)


def test_values_without_samples_are_refused():
    gm, symbol = _captured(Apply(lambda x: x.sum() * 2), torch.randn(3, 5), 0)
    total = gm.graph.output_node().all_input_nodes[0]
    with pytest.raises(InterfaceError, match="a number for the whole batch: mul"):
        layout(total, batch=symbol)
    with pytest.raises(InterfaceError, match="no single tensor: output"):
        layout(gm.graph.output_node(), batch=symbol)


def test_the_nearest_opinion_counts():
    """A linear layer right behind, a convolution further on."""
    model = Apply(
        lambda x, linear, conv: conv(linear(x.tanh()).relu().sigmoid().permute(0, 3, 1, 2)),
        nn.Linear(5, 6),
        nn.Conv2d(6, 7, 1),
    )
    gm, symbol = _captured(model, torch.randn(2, 3, 4, 5), 0)
    widths = {node.name: layout(node, batch=symbol).width for node in gm.graph.nodes if node.op == "call_function"}
    assert widths == {"tanh": 3, "linear": 3, "relu": 3, "sigmoid": 3, "permute": 1, "conv2d": 1}


@pytest.mark.parametrize(
    ("base", "view", "pairs"),
    [
        (("B", "T", "D"), ("B", "T", "H", "E"), {0: 0, 1: 1, 2: 3}),  # heads are split off
        (("B", "T", "H", "E"), ("B", "T", "D"), {0: 0, 1: 1, 3: 2}),
        (("B", "T", "D"), ("B T", "D"), {2: 1, 1: 0}),  # positions join the samples
        (("B", "T", "D"), ("B", "T", "D"), {0: 0, 1: 1, 2: 2}),
        (("2", "2"), ("2", "2", "1"), {0: 0, 1: 1}),
    ],
)
def test_dims_of_a_view_are_found_from_both_ends(base, view, pairs):
    assert _matching(base, view) == pairs
