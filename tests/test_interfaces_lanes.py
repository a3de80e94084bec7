"""Interfaces of boundaries with several lanes: nothing leaks, every parameter learns, every engine agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import BoundedModule, EngineError, InterfaceError, LatentWidthError
from lbi_compile.interfaces.lanes import LanesInterface
from lbi_compile.verify import relative_errors
from tests.lane_models import Conditioned, EncoderDecoder, Recurrent, UNet


def encoder_decoder(**options: Any) -> tuple[EncoderDecoder, tuple[Tensor, Tensor], BoundedModule]:
    torch.manual_seed(0)
    model, inputs = EncoderDecoder().double(), EncoderDecoder.inputs()
    return model, inputs, lbi_compile.transform(model, inputs, regions=4, **options)


def gradients(bounded: BoundedModule, inputs: tuple[Tensor, ...], engine: str) -> dict[str, Tensor | None]:
    bounded.zero_grad()
    torch.manual_seed(3)
    with bounded.with_engine(engine):
        out = bounded(*inputs)
        leaves = out if isinstance(out, tuple) else (out,)
        sum((leaf.square() * (i + 1)).sum() for i, leaf in enumerate(leaves)).backward()  # type: ignore[union-attr]
    assert bounded.engine.name == engine
    return {name: p.grad for name, p in bounded.named_parameters()}


def test_encoder_and_decoder_are_cut_with_a_lane_for_each() -> None:
    model, inputs, bounded = encoder_decoder()
    plan = bounded.plan
    assert plan.interface == "chunked"
    assert plan.causal
    assert max(map(len, plan.crossings)) == 2
    held = [lane for lane in plan.lanes if lane.last > lane.first]
    assert len(held) == 1  # the encoder's output, which every later region of the decoder reads
    assert not held[0].causal
    assert [lane.base for lane in plan.lanes] == ["source"] * len(plan.lanes)
    assert {point.module for point in plan.shared} == {"target"}
    again = lbi_compile.Plan.from_json(plan.to_json())
    assert again == plan
    assert lbi_compile.transform(model, inputs, regions=again).plan.hash == plan.hash


@pytest.mark.parametrize("engine", ["chain", "scan"])
def test_gradients_are_those_of_autograd_and_reach_every_parameter(engine: str) -> None:
    torch.manual_seed(0)
    model, inputs = EncoderDecoder(depth=2).double(), EncoderDecoder.inputs()
    bounded = lbi_compile.transform(model, inputs, regions=3)
    assert max(map(len, bounded.plan.crossings)) == 2
    wanted = gradients(bounded, inputs, "autograd")
    assert [name for name, grad in wanted.items() if grad is None or not grad.any()] == []
    assert max(relative_errors(gradients(bounded, inputs, engine), wanted).values()) < 1e-12


@pytest.mark.parametrize(
    ("make", "inputs", "options"),
    [
        (UNet, (torch.randn(3, 3, 8, 8),), {}),
        (Recurrent, (torch.randn(3, 12, 5),), {}),
        (Conditioned, (torch.randn(3, 6), torch.randn(3, 1)), {}),
    ],
    ids=["u-net", "recurrent", "conditioned"],
)
def test_every_parameter_learns(make: type[nn.Module], inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make().double()
    wide = tuple(x.double() for x in inputs)
    bounded = lbi_compile.transform(model, wide, regions=3, **options)
    wanted = gradients(bounded, wide, "autograd")
    assert [name for name, grad in wanted.items() if grad is None or not grad.any()] == []
    assert max(relative_errors(gradients(bounded, wide, "chain"), wanted).values()) < 1e-12


def test_a_decoder_never_sees_later_positions_and_may_see_all_of_its_source() -> None:
    _, (source, target), bounded = encoder_decoder()
    bounded.eval()
    before = bounded(source, target)
    for t in range(1, target.shape[1]):
        later = target.clone()
        later[:, t:] = (later[:, t:] + 1) % 20
        assert torch.equal(bounded(source, later)[:, :t], before[:, :t])
        assert not torch.equal(bounded(source, later), before)
    other = source.clone()
    other[:, -1] = (other[:, -1] + 1) % 20
    assert (bounded(other, target) != before).flatten(1).any(1).all()


def test_a_pooled_decoder_would_see_later_positions_and_is_refused() -> None:
    with pytest.raises(lbi_compile.FutureLeakError, match="pooled"):
        encoder_decoder(interface="pooled")


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (EncoderDecoder, EncoderDecoder.inputs()),
        (UNet, (torch.randn(3, 3, 8, 8),)),
        (Recurrent, (torch.randn(3, 12, 5),)),
    ],
    ids=["encoder-decoder", "u-net", "recurrent"],
)
def test_identity_is_the_model(make: type[nn.Module], inputs: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    model = make()
    bounded = lbi_compile.transform(model, inputs, regions=3, interface="identity")
    assert isinstance(bounded.interface, LanesInterface) == (make is not Recurrent)  # whose states are of one shape
    assert torch.equal(bounded(*inputs), model(*inputs))
    got = gradients(bounded, inputs, "chain")
    model.zero_grad()
    model(*inputs).square().sum().backward()
    assert max(relative_errors(got, {name: p.grad for name, p in model.named_parameters()}).values()) < 1e-5


def test_other_batches_and_lengths_run() -> None:
    model, _, bounded = encoder_decoder()
    for batch, source, target in ((1, 7, 9), (5, 4, 12), (2, 11, 3)):
        inputs = EncoderDecoder.inputs(batch, source, target)
        assert bounded(*inputs).shape == model(*inputs).shape


def test_interfaces_that_need_one_lane_are_refused() -> None:
    for interface in ("token", "zero", "self"):
        with pytest.raises((InterfaceError, lbi_compile.TooManyRegionsError)):
            lbi_compile.transform(UNet(), torch.randn(3, 3, 8, 8), regions=3, interface=interface)


def test_a_latent_too_narrow_for_its_slots_is_refused() -> None:
    with pytest.raises(LatentWidthError, match="r=3 for boundaries with up to 2 lanes, of which some look back only"):
        encoder_decoder(r=3)


@pytest.mark.slow
def test_the_scan_refuses_identity_of_lanes_that_differ_in_size() -> None:
    _, inputs, bounded = encoder_decoder(interface="identity", backward="scan")
    with pytest.raises((EngineError, lbi_compile.BatchCouplingError)):
        bounded(*inputs)


def test_boundaries_may_be_named_inside_a_decoder() -> None:
    model, inputs = EncoderDecoder(), EncoderDecoder.inputs()
    plan = lbi_compile.plan(model, inputs, regions=["encoder.2", "decoder.1", "decoder.2"])
    assert [len(points) for points in plan.crossings] == [1, 2, 2]
    assert [region.part.modules[0] for region in plan.regions[1:]] == ["encoder.2", "decoder.1", "decoder.2"]
