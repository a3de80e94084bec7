"""Analysis: finishes, names that another capture finds again, counts of parts, and what a plan says of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lbi_compile
from lbi_compile.analysis import Analysis, analyse, locate
from lbi_compile.capture import Capture, as_inputs, capture
from lbi_compile.demo_model import Attention
from lbi_compile.errors import PlanError, RegionsError
from lbi_compile.options import Options
from lbi_compile.plan import Plan
from tests import models
from tests.untouched import differences, snapshot

D, T, B, V = 8, 6, 2, 16


class Parallel(nn.Module):
    """Attention and MLP side by side: nothing position-wise comes after the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention(D, heads=2, causal=True)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mlp(y) + self.attention(y)


class LanguageModel(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens() -> Tensor:
    return torch.randint(0, V, (B, T))


def transformer(depth: int = 4, width: int = D) -> nn.Module:
    return models.CausalTransformer(vocabulary=V, length=10, width=width, depth=depth, heads=2, dropout=0.1)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_embd=D, n_head=2, vocab_size=V, n_positions=10, bos_token_id=0, eos_token_id=0)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "transformer": (transformer, tokens),
    "gpt2": (gpt2, lambda: {"input_ids": tokens()}),
    "parallel": (lambda: LanguageModel(Parallel), tokens),
    "tokens alone": (lambda: LanguageModel(lambda: models._PreNorm(D, dropout=0.1)), tokens),
    "vit": (lambda: models.VisionTransformer(width=D, depth=3, heads=2), lambda: torch.randn(3, 1, 8, 8)),
    "mlp": (lambda: models.ResidualMLP(6, width=D, depth=4, classes=3, dropout=0.1), lambda: torch.randn(3, 6)),
    "post-norm": (lambda: models.PostNormMLP(6, width=D, depth=4, classes=3), lambda: torch.randn(3, 6)),
    "batch-norm": (lambda: models.BatchNormMLP(6, width=D, depth=4, classes=3), lambda: torch.randn(3, 6)),
}


@functools.cache
def captured(name: str, training: bool = True) -> tuple[nn.Module, Capture]:
    model = model_of(name).train(training)
    return model, capture(model, as_inputs(model, CASES[name][1]()))


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]()


@functools.cache
def analysed(name: str, regions: int | tuple[str, ...] = 2, interface: str = "auto", r: int = 4) -> Analysis:
    return analyse(*captured(name), Options(regions, r, interface, "auto", "auto", "auto", False, 0))


def finishes(plan: Plan) -> list[tuple[str | None, bool]]:
    return [(region.finish.name if region.finish else None, region.own_finish) for region in plan.regions]


# --- finishes -----------------------------------------------------------------------------------------------------


def test_a_transformers_finish_begins_at_the_attention_residual_of_its_last_block() -> None:
    plan = analysed("transformer").plan
    assert finishes(plan) == [("blocks.1:add[0]", False), ("blocks.3:add[0]", False)]
    why = [decision for decision in plan.regions[0].why if decision.about == "finish"]
    assert [(d.choice, d.why) for d in why] == [("from blocks.1:add[0] on", "all later ops are position-wise")]


def test_gpt2s_finish_begins_there_too() -> None:
    assert finishes(analysed("gpt2").plan)[-1] == ("transformer.h.2:add[0]", False)


def test_a_region_that_ends_in_attention_gets_a_finish_of_the_interface() -> None:
    plan = analysed("transformer", ("blocks.2.norm_mlp",)).plan
    assert finishes(plan) == [("blocks.2:add[0]", True), ("blocks.3:add[0]", False)]
    assert plan.regions[0].end.name == "blocks.2:add[0]"


def test_parallel_blocks_get_a_finish_of_the_interface() -> None:
    plan = analysed("parallel").plan
    assert finishes(plan) == [("blocks.1:add[1]", True), ("blocks.3:add[1]", True)]
    (why,) = [decision.why for decision in plan.regions[0].why if decision.about == "finish"]
    assert why == "the region ends in an op that mixes positions"


def test_the_interfaces_own_finish_carries_the_latent() -> None:
    """What enters behind the last op of a region reaches the output: every interface parameter gets a gradient."""
    model = model_of("parallel").train()
    bounded = lbi_compile.transform(model, tokens(), regions=3, r=4, backward="autograd")
    out, taps = bounded.forward_regions(tokens())
    wanted = [*bounded.lbi.parameters(), taps.m[2]]
    gradients = torch.autograd.grad(out.square().sum() + taps.h[-1].sum(), wanted, allow_unused=True)
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_a_region_without_attention_is_all_finish() -> None:
    """Where every op is position-wise the finish is the whole region: a_k is what enters it."""
    plan = analysed("tokens alone").plan
    assert finishes(plan) == [(plan.canvas.name, False), (plan.regions[0].end.name, False)]


def test_no_finish_where_the_interface_does_not_split() -> None:
    for name in ("mlp", "vit"):
        assert finishes(analysed(name).plan) == [(None, False)] * 2
    assert finishes(analysed("transformer", 2, "chunked").plan) == [(None, False)] * 2


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "gpt2", "batch-norm"])
def test_another_capture_finds_the_places_of_a_plan(name: str) -> None:
    """Found in evaluation mode, the places compute what they compute in the model: hooks on its modules tell."""
    found = analysed(name)
    model, evaluated = captured(name, False)
    located = locate(model.eval(), evaluated, found.plan)
    assert located.plan is found.plan
    assert [n.name for n in located.ends] == [n.name for n in found.ends]
    seen: dict[str, Tensor] = {}
    module = found.plan.boundaries[0].module
    block = model.get_submodule(module)
    handle = block.register_forward_hook(lambda *a: seen.update(out=a[2] if isinstance(a[2], Tensor) else a[2][0]))
    with torch.no_grad():
        model(*evaluated.inputs.args, **evaluated.inputs.kwargs)
    handle.remove()
    assert torch.equal(located.evaluator.values[located.ends[0]], seen["out"])


def test_a_plan_of_another_model_is_refused() -> None:
    plan = analysed("mlp").plan
    with pytest.raises(PlanError, match=r"a plan of tests\.models\.ResidualMLP"):
        locate(*captured("post-norm"), plan)


def test_a_place_of_another_shape_is_refused() -> None:
    model = transformer(width=12)
    with pytest.raises(PlanError, match=r"no value dropout:dropout\[0\] of shape \['B', 'T', 8\].*12"):
        locate(model, capture(model, as_inputs(model, tokens())), analysed("transformer").plan)


def test_a_place_that_is_missing_is_refused() -> None:
    model = transformer(depth=1)
    with pytest.raises(PlanError, match=r"no value blocks\.1:add\[1\]"):
        locate(model, capture(model, as_inputs(model, tokens())), analysed("transformer").plan)


def test_dynamic_sizes_are_named() -> None:
    assert analysed("transformer").plan.canvas.shape == ("B", "T", D)
    assert analysed("vit").plan.canvas.shape == ("B", 17, D)
    assert analysed("mlp").plan.boundaries[0].shape == ("B", D)


class TwoSequences(nn.Module):
    """Cross attention from one sequence to another of a length of its own, with positions merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Linear(3, D), nn.Linear(3, D)
        self.blocks = nn.ModuleList(models._PreNorm(D, dropout=0.0) for _ in range(3))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.stem(x) @ self.other(y).transpose(1, 2)
        x = (scores.softmax(-1) @ self.other(y)).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_sizes_that_are_products_and_second_sequences_have_names_too() -> None:
    model = TwoSequences()
    example = (torch.randn(2, 5, 3), torch.randn(2, 7, 3))
    found = analyse(
        model, capture(model, as_inputs(model, example)), Options(2, 4, "auto", "auto", "auto", "auto", False, 0)
    )
    assert found.plan.canvas.shape == ("B*T", D)
    (lane,) = [decision.choice for decision in found.plan.why if decision.about == "lane"]
    assert lane == "[B*T, 8] float32"


def test_module_that_is_unknown_is_refused_with_examples() -> None:
    with pytest.raises(RegionsError, match=r"regions names the module 'block\.1'") as caught:
        analysed("mlp", ("block.1",))
    assert "blocks.0" in caught.value.expected


# --- counts -------------------------------------------------------------------------------------------------------


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def test_parameters_of_the_parts() -> None:
    model = model_of("transformer")
    assert isinstance(model, models.CausalTransformer)
    plan = analysed("transformer").plan
    assert plan.stem.parameters == count(model.token, model.position)
    assert [r.part.parameters for r in plan.regions] == [count(*model.blocks[:2]), count(*model.blocks[2:])]
    assert plan.head.parameters == count(model.norm, model.head)  # the tied weight counts in both its parts
    assert plan.prologue.parameters == 0


def test_layers_of_the_parts() -> None:
    plan = analysed("transformer").plan
    assert plan.stem.modules == ("token", "dropout")  # positions are embedded from parameters alone
    assert [r.part.modules for r in plan.regions] == [("blocks.0", "blocks.1"), ("blocks.2", "blocks.3")]
    assert plan.head.modules == ("norm", "head")
    inside = analysed("transformer", ("blocks.2.norm_mlp",)).plan
    assert "blocks.2" not in inside.regions[0].part.modules
    assert "blocks.2.attention" in inside.regions[0].part.modules
    assert "blocks.2.mlp" in inside.regions[1].part.modules


@pytest.mark.parametrize("name", CASES)
def test_shares_of_the_work_add_up_to_one(name: str) -> None:
    plan = analysed(name).plan
    parts = [plan.prologue, plan.stem, *(r.part for r in plan.regions), plan.head]
    assert sum(p.share for p in parts) == pytest.approx(1.0)
    assert sum(p.flops for p in parts) == analysed(name).costs.total_flops
    assert all(p.share >= 0 for p in parts)
    assert all(r.part.share > 0.1 for r in plan.regions)


def test_work_of_a_region_is_that_of_its_layers() -> None:
    plan = analysed("mlp").plan
    layer = 2 * 3 * D * 2 * D  # batch 3: two products of D and 2 D for each block
    assert [r.part.flops for r in plan.regions] == [2 * 2 * layer] * 2
    assert plan.stem.flops == 2 * 3 * 6 * D
    assert plan.head.flops == 2 * 3 * D * 3


def test_live_nodes_are_counted_once() -> None:
    found = analysed("transformer")
    parts = [found.plan.stem, *(r.part for r in found.plan.regions), found.plan.head]
    assert sum(p.nodes for p in parts) == len(found.live.live)


@pytest.mark.parametrize(
    ("name", "interface", "numbers"),
    [
        ("mlp", "pooled", 3 * 4),
        ("mlp", "identity", 3 * D),
        ("mlp", "zero", 0),
        ("transformer", "token", B * T * 4),
        ("transformer", "chunked", B * 4),
        ("transformer", "identity", B * T * D),
        ("transformer", "self", 0),
    ],
)
def test_bytes_that_cross(name: str, interface: str, numbers: int) -> None:
    plan = analysed(name, 3, interface).plan
    assert [r.forward_bytes for r in plan.regions] == [4 * numbers, 4 * numbers, 0]
    assert [r.backward_bytes for r in plan.regions] == [4 * numbers, 4 * numbers, 0]


def test_one_region_crosses_nothing() -> None:
    plan = analysed("mlp", 1).plan
    assert (plan.interface, plan.regions[0].forward_bytes, plan.boundaries) == ("none", 0, ())


# --- facts --------------------------------------------------------------------------------------------------------


def test_residual_regions_are_told_from_others() -> None:
    assert [r.residual for r in analysed("transformer").plan.regions] == [True, True]
    assert [r.residual for r in analysed("post-norm").plan.regions] == [False, False]
    assert (analysed("transformer").plan.readout, analysed("post-norm").plan.readout) == ("sum", "last")


def test_dependence_of_positions() -> None:
    assert (analysed("transformer").dependence(), analysed("transformer").plan.causal) == ("causal", True)
    assert (analysed("tokens alone").dependence(), analysed("tokens alone").plan.causal) == ("position-wise", True)
    assert (analysed("vit").dependence(), analysed("vit").plan.causal) == (None, None)


def test_dependence_of_samples() -> None:
    assert {analysed("mlp").coupling(k).kind for k in range(2)} == {"position-wise"}
    coupled = analysed("batch-norm").coupling(0)
    assert coupled.kind == "mixed"
    assert coupled.node is not None
    assert "batch_norm" in str(coupled.node.target)


def test_passes_are_recorded_in_order() -> None:
    passes = analysed("mlp").plan.passes
    assert [p.name for p in passes] == ["liveness", "costs", "separators", "partition", "axes"]
    assert all(p.seconds >= 0 for p in passes)
    assert f"{len(analysed('mlp').live.live)} of" in passes[0].result


def test_equal_captures_give_equal_plans() -> None:
    model, first = captured("mlp")
    second = capture(model.train(), as_inputs(model, torch.randn(3, 6)))
    options = Options(2, 4, "auto", "auto", "auto", "auto", False, 0)
    plans = [analyse(model, c, options).plan for c in (first, second)]
    assert plans[0].hash == plans[1].hash
    assert plans[0].regions == plans[1].regions


def test_model_and_graph_are_left_alone() -> None:
    model, found = captured("batch-norm")
    code, before = found.graph_module.code, snapshot(model)
    analysis = analyse(model, found, Options(3, 4, "auto", "auto", "auto", "auto", False, 0))
    analysis.coupling(0)
    assert found.graph_module.code == code
    assert differences(before, model) == []


def test_a_model_without_numbers_is_planned_by_rules_alone() -> None:
    with torch.device("meta"):
        model, example = transformer(), tokens()
    plan = lbi_compile.plan(model, example, regions=2, r=4, interface="token")
    assert plan.regions == analysed("transformer").plan.regions
    assert plan.causal is None
