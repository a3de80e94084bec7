"""Which children a model is cut between, and what is refused where it cannot be cut so."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbi_compile import errors, plan, transform, verify
from lbi_compile.capture import as_inputs
from lbi_compile.hooked.blocks import NoBlocks, find_blocks
from lbi_compile.passes.layouts import Layout
from tests.hooked_models import (
    Block,
    Branching,
    Checkpointed,
    EarlyExit,
    Experts,
    LanguageModel,
    LayerDrop,
    Looping,
    NoList,
    Skipping,
    Twice,
)
from tests.test_errors import refused
from tests.untouched import differences, snapshot

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(5))
BTD = Layout(batch=0, width=2, rank=3)


def find(model: nn.Module, x: Tensor = X, named: tuple[str, ...] = ()) -> Any:
    return find_blocks(model, as_inputs(model, x), named)


def names(*indices: int) -> tuple[str, ...]:
    return tuple(f"blocks.{i}" for i in indices)


# -- finding blocks


def test_the_list_with_most_work_is_found_wherever_it_is():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.inner = Branching(depth=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.small(x))

    found = find(Outer())
    assert found.children == tuple(f"inner.blocks.{i}" for i in range(4))
    assert found.canvas == ((3, 8), torch.float32)
    assert found.modules == {"stem": ("small", "inner.stem"), "head": ("inner.head",)}
    assert found.stem == 2 * 3 * (4 * 4 + 4 * 4 + 4 * 8)
    assert found.total - found.stem - sum(found.flops) == 2 * 3 * 8 * 3


def test_children_of_another_shape_are_no_blocks():
    model = nn.Sequential(nn.Linear(4, 8), Block(8), Block(8), nn.Dropout(0.1), Block(8), nn.Linear(8, 3))
    found = find(model)
    assert found.children == ("1", "2", "3", "4")
    assert found.modules == {"stem": ("0",), "head": ("5",)}


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0, 3, 1]])
def test_blocks_are_in_the_order_they_run(order):
    class Ordered(Branching):
        def between(self, x: Tensor) -> Tensor:
            for i in order:
                x = self.blocks[i](x) if x.mean() > 0 else self.blocks[i](-x)
            return x

    assert find(Ordered(depth=4)).children == names(*order)


def test_skipped_blocks_have_the_place_the_list_gives_them():
    model = LayerDrop()
    model.dropped = {0, 2, 5}
    found = find(model)
    assert found.children == names(*range(6))
    assert found.idle == names(0, 2, 5)
    assert found.cuts == (1, 2, 3, 4, 5)
    assert [flops > 0 for flops in found.flops] == [False, True, False, True, True, False]
    assert len(set(found.weights)) == 1


def test_calls_out_of_order_count_where_the_order_had_got_to():
    once, seen = find(EarlyExit(depth=3)).flops, set()
    for seed in range(8):
        model, x = Looping(depth=3), torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        found = find(model, x)
        model(x)
        again = len(model.path) // 3 - 1
        seen.add(again)
        assert found.flops == (once[0], once[1], once[2] + again * sum(once))
        assert found.cuts == (1, 2)
    assert seen == {0, 1, 2}


def test_a_shared_block_has_a_place_for_every_call():
    class Shared(Branching):
        def __init__(self) -> None:
            super().__init__(depth=1)
            self.blocks = nn.ModuleList([self.blocks[0]] * 4)

    model = Shared().double()
    assert find(model, X.double()).children == names(0, 1, 2, 3)
    bounded = transform(model, X.double(), regions=4, r=4)
    assert [region.part.modules for region in bounded.plan.regions] == [names(i) for i in range(4)]
    _, taps = bounded.forward_regions(X.double())
    assert len({h.data_ptr() for h in taps.h}) == 4
    assert len([name for name, _ in bounded.named_parameters() if name.startswith("blocks.")]) == 6


def test_places_past_which_a_value_is_read_are_no_cuts():
    model = Skipping(depth=7)
    found = find(model)
    assert found.cuts == (1, 5, 6)  # what block 1 gives is read again in front of block 5
    assert [region.part.modules[0] for region in plan(model, X, regions=4).regions] == list(names(0, 1, 5, 6))
    with refused(errors.TooManyRegionsError, "5 regions", "3 blocks", "at most 4", "blocks.5", model=model):
        transform(model, X, regions=5)
    with refused(errors.NoSeparatorError, "blocks.3", "blocks.1, blocks.5, blocks.6", model=model):
        transform(model, X, regions=["blocks.3"])


def test_a_value_every_region_may_read_is_no_obstacle():
    class FromTheStem(Branching):
        def between(self, x: Tensor) -> Tensor:
            canvas = x
            for block in self.blocks:
                x = block(x + canvas) if x.mean() > 0 else block(canvas - x)
            return x

    assert find(FromTheStem()).cuts == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NoList, "no nn.Sequential or nn.ModuleList"),
        (Experts, "do not pass a hidden state on to each other"),
        (Twice, "blocks.0 runs a second time"),
    ],
)
def test_models_without_blocks(kind, why):
    model = kind()
    before = snapshot(model)
    with pytest.raises(NoBlocks, match=why):
        find(model)
    assert differences(before, model) == []


# -- refusals


@pytest.mark.parametrize(("kind", "code"), [(NoList, "return self.second(x) if x.mean() > 0 else x"), (Twice, "for")])
def test_the_exporters_error_comes_back_with_a_hint(kind, code):
    model = kind()
    with refused(errors.DataDependentControlFlowError, "hooked_models.py", "nn.ModuleList", "(now: ", model=model):
        transform(model, X, regions=2, r=4)
    with refused(errors.DataDependentControlFlowError, "nn.ModuleList", model=model):
        plan(model, X, regions=2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_recomputed_are_refused(reentrant):
    model = Checkpointed()
    model.reentrant = reentrant
    with refused(errors.CaptureError, "activation checkpointing", "around blocks.0", "switch it off", model=model):
        transform(model, X, regions=3, r=4)


def test_blocks_that_begin_to_be_recomputed_are_refused_when_they_do():
    class Late(Checkpointed):
        late = False

        def between(self, x: Tensor) -> Any:
            return super().between(x) if self.late else Branching.between(self, x)

    model = Late()
    bounded = transform(model, X, regions=3, r=4)
    bounded(X)
    model.late = True
    with pytest.raises(errors.CaptureError, match=r"activation checkpointing by the model around blocks\.0"):
        bounded(X)
    with torch.no_grad():
        bounded(X)


@pytest.mark.parametrize(
    ("regions", "kind", "says"),
    [
        (9, errors.TooManyRegionsError, ["9 regions", "5 blocks", "at most 6 regions", "blocks.1, blocks.2"]),
        (["blocks.9"], errors.RegionsError, ["blocks.9", "blocks.1, blocks.2", "cannot be captured"]),
        (["stem"], errors.RegionsError, ["stem", "blocks.1, blocks.2"]),
        (["blocks.2", "head"], errors.RegionsError, ["head", "children of one list"]),
        (["blocks.0"], errors.RegionsError, ["blocks.0", "starts the first region"]),
        (["blocks.2", "blocks.2"], errors.RegionsError, ["blocks.2", "named twice"]),
    ],
)
def test_places_that_do_not_exist(regions, kind, says):
    model = Branching()
    with refused(kind, *says, model=model):
        transform(model, X, regions=regions, r=4)


def test_named_places():
    made = plan(Branching(), X, regions=["blocks.4", "blocks.1"])
    assert [region.part.modules for region in made.regions] == [names(0), names(1, 2, 3), names(4, 5)]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"interface": "token"}, errors.InterfaceError, ["'token'", "x.mean() > 0", '"pooled"']),
        ({"interface": "chunked", "r": 8}, errors.InterfaceError, ["(3, 8)", "[B, T, D]"]),
        ({"cell": "gru"}, errors.OptionError, ["'gru'", "'pooled'"]),
        ({"interface": "self", "cell": "gru"}, errors.OptionError, ["'gru'", "'self'"]),
        ({"interface": "zero", "readout": "last"}, errors.ReadoutError, ["'last'", "'zero'"]),
        ({"readout": "sum"}, errors.ReadoutError, ["'sum'", "changes the hidden state", 'readout="last"']),
        ({"backward": "scan"}, errors.EngineError, ["'scan'", "opaque", "x.mean() > 0", '"chain"']),
    ],
    ids=str,
)
def test_options_that_opaque_regions_do_not_have(options, kind, says):
    model = Branching()
    with refused(kind, *says, model=model):
        transform(model, X, **{"regions": 3, "r": 4, **options})


def test_the_scan_is_refused_for_a_call_too():
    bounded = transform(Branching(), X, regions=3, r=4)
    with bounded.with_engine("scan"), pytest.raises(errors.EngineError, match="opaque"):
        bounded(X)
    assert transform(Branching(), X, regions=1, backward="scan")(X).shape == (3, 3)


def test_a_region_cannot_be_called_by_itself():
    bounded = transform(Branching(), X, regions=3, r=4)
    assert [region.k for region in bounded.regions] == [0, 1, 2]
    with pytest.raises(errors.CaptureError, match=r"region 1 by itself, which is opaque \(blocks\.2, blocks\.3\)"):
        bounded.regions[1](X, None)


def test_hidden_states_of_another_shape():
    class Pruned(EarlyExit):
        keep = 8

        def between(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                if x.mean() > -1e9:
                    x = block(x)
                if i == 2:
                    x = x[: self.keep]
            return x

    model = Pruned()
    bounded = transform(model, X, regions=["blocks.3"], r=4)
    model.keep = 2
    with pytest.raises(errors.ShapeNotCapturedError, match=r"\[2, 8\] at blocks\.3"):
        bounded(X)
    with pytest.raises(errors.ShapeNotCapturedError, match=r"\[3, 5, 8\] at blocks\.0"):
        bounded(torch.randn(3, 5, 4))


def test_a_sum_cannot_stand_for_a_hidden_state_that_is_changed():
    class Changing(EarlyExit):
        change = ""

        def between(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.mean() > -1e9:
                    x = block(x)
                if self.change == "new":
                    x = x * 1.0
                elif self.change == "written":
                    x.mul_(1.0)
            return x

    model = Changing()
    bounded = transform(model, X, regions=3, interface="zero")
    for model.change in ("new", "written"):
        with pytest.raises(errors.ReadoutError, match=r"changes the hidden state before blocks\.1"):
            bounded(X)


def test_a_canvas_that_is_written_over():
    class Writing(EarlyExit):
        def between(self, x: Tensor) -> Tensor:
            first = x
            for i, block in enumerate(self.blocks):
                if x.mean() > -1e9:
                    x = block(x)
                if i == 1:
                    with torch.no_grad():
                        first.mul_(2)
            return x

    bounded = transform(Writing(), X, regions=["blocks.1"], r=4)  # before it is written over
    bounded(X)
    with pytest.raises(errors.CaptureError, match=r"input of blocks\.0, is written over before blocks\.3 runs"):
        transform(Writing(), X, regions=["blocks.3"], interface="zero")(X)


@pytest.mark.parametrize("causal", [True, False])
def test_batches_on_the_second_axis(causal):
    class Turned(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1), None

    class TimeFirst(LanguageModel):
        def __init__(self) -> None:
            super().__init__(causal=causal)
            self.layers = nn.ModuleList(map(Turned, self.layers))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens).transpose(0, 1)
            for layer in self.layers:
                x = layer(x)[0] if x.mean() > -1e9 else x
            return self.head(x.transpose(0, 1))

    model = TimeFirst().double()
    bounded = transform(model, TOKENS, regions=2, r=8)
    assert bounded.plan.canvas.shape == ("T", "B", 8)
    assert (bounded.plan.interface, bounded.plan.causal) == ("chunked" if causal else "pooled", causal)
    assert bounded.interface.initial(bounded.interface.fold(torch.zeros(12, 3, 8).double())).shape == (3, 8)
    torch.testing.assert_close(bounded(TOKENS)[:1], bounded(TOKENS[:1]))
    assert verify(bounded, TOKENS).ok


@pytest.mark.parametrize("options", [{}, {"interface": "identity"}, {"interface": "zero"}, {"interface": "self"}])
def test_images(options):
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
            self.stages = nn.Sequential(*(self.stage() for _ in range(4)))

        def stage(self) -> nn.Module:
            return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.stages(x if x.mean() > -1e9 else -x).mean((2, 3)))

    model, images = Convolutions().double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    before = snapshot(model)
    bounded = transform(model, images, regions=2, r=8, **options)
    assert differences(before, model) == []
    assert bounded.plan.canvas.shape == ("B", 4, "H", "W")
    report = verify(bounded, images)
    assert report.ok, report
    assert bounded(torch.randn(5, 3, 9, 9, dtype=torch.float64)).shape == (5, 3)
    if options.get("interface") == "identity":
        assert torch.equal(bounded(images), model(images))


def test_one_position_does_not_show_what_leaks():
    with refused(errors.ExampleInputsError, "one position", "'pooled'"):
        transform(LanguageModel(), TOKENS[:, :1], regions=2, r=8, interface="pooled")
    bounded = transform(LanguageModel(), TOKENS[:, :1], regions=2, r=8)
    assert (bounded.plan.interface, bounded.plan.causal) == ("chunked", None)


@pytest.mark.parametrize("draw", [random.random, lambda: __import__("numpy").random.rand()], ids=["python", "numpy"])
def test_numbers_a_graph_would_freeze_are_noticed(draw):
    class Noisy(NoList):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * draw()

    model = Noisy()
    with refused(errors.CaptureError, "Python's or NumPy's random generator", model=model):
        transform(model, X, regions=2)
