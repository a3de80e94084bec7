"""Casts: a norm that computes in float32 does not stand in the residual stream of a float32 model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lbi_compile
from lbi_compile.analysis import locate
from lbi_compile.passes.names import module_path
from tests.dags import find, run, split


class FloatNorm(nn.Module):
    """Computes in float32 and gives the dtype of its input back, as RMS norms of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.layer, self.head = nn.Linear(4, 4), FloatNorm(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer(self.norm(x))
        return self.head(x)


class CastsInside(Model):
    """The module that casts made the value itself, and gives the cast out: its readers mean the cast."""

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).to(torch.float32)

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.Layer(4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_residual_stream_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    found = find(Model().to(dtype), torch.randn(3, 4, dtype=dtype))
    stem, layer, _ = found.named("aten.linear")
    total = found.named("aten.add.Tensor")[-1]
    assert total.args == (stem, layer)
    assert [point.node for point in found.points] == [stem, total]


def test_the_module_itself_still_reads_the_cast() -> None:
    """Under autocast its argument may have another dtype than at the capture."""
    found = find(Model(), torch.randn(3, 4))
    first, second = found.named("aten.to")
    assert [module_path(user) for user in first.users] == ["norm"] * len(first.users)
    assert len(first.users) == 2
    assert [user.name for user in second.users] == [found.named("aten.mul")[-1].name]


def test_a_cast_that_a_module_gives_out_keeps_its_readers() -> None:
    found = find(CastsInside(), torch.randn(3, 4))
    cast = found.named("aten.to")[-1]
    assert found.named("aten.add.Tensor")[-1] in cast.users


def test_a_cast_that_changes_the_dtype_keeps_its_readers() -> None:
    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float64)

    found = find(nn.Sequential(Model(), Widen()), torch.randn(3, 4))
    assert found.live.sinks == (found.named("aten.to")[-1],)


def test_numbers_stay_the_same_with_and_without_autocast() -> None:
    model, x = Model(), torch.randn(3, 4)
    found = find(model, x)
    stem, total = (point.node for point in found.points)
    program = split(found, stem, [total])
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(run(program, [x])[0], model(x))


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rotary tables under ``no_grad``, norms in float32."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).train(), {"input_ids": torch.randint(0, 16, (2, 5))}


def test_a_llama_is_cut_between_residual_sums_in_every_dtype() -> None:
    model, inputs = llama()
    plan = lbi_compile.plan(model, inputs, regions=3, r=2)
    assert [point.name for point in plan.boundaries] == ["model.layers.0:add[1]", "model.layers.1:add[1]"]
    assert (plan.canvas.name, plan.interface, plan.readout) == ("model.embed_tokens:embedding[0]", "token", "sum")
    found = find(model.double(), inputs)
    located = locate(model, found.capture, plan)
    program = split(found, located.canvas, located.ends, located.finishes)
    torch.testing.assert_close(run(program, found.capture.inputs.leaves)[0], model(**inputs).logits)


@pytest.mark.slow
def test_a_llama_bounded_in_float32_is_verified_in_float64() -> None:
    model, inputs = llama()
    bounded = lbi_compile.transform(model, inputs, regions=3, r=2)
    report = lbi_compile.verify(bounded, inputs, engine="scan")
    assert report.ok, report
