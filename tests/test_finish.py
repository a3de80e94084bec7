"""Where latents per position enter a region: before the model's own last operations, or behind them."""

from __future__ import annotations

import pytest
import torch

import lbi_compile
from lbi_compile.errors import OptionError
from lbi_compile.interfaces.base import Decoder
from lbi_compile.plan import Plan
from tests.cases import in_float64


def test_an_own_finish_begins_where_the_region_ends():
    model, inputs = in_float64("transformer")
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4, interface="token", finish="own", backward="autograd")
    for region in bounded.plan.regions:
        assert region.own_finish
        assert region.finish == region.end
        assert ("finish", "asked for") in [(one.about, one.why) for one in region.why]
    assert all(isinstance(decoder, Decoder) for decoder in bounded.interface.decoders.values())
    usual = lbi_compile.plan(model, inputs, regions=3, r=4, interface="token")
    assert not any(region.own_finish for region in usual.regions)
    assert [region.end for region in usual.regions] == [region.end for region in bounded.plan.regions]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cell": "linear"}, {"cell": "gru"}, {"interface": "token+chunked"}])
def test_verify_is_satisfied(options: dict[str, str]):
    model, inputs = in_float64("transformer")
    given = {"interface": "token", "finish": "own", **options}
    report = lbi_compile.verify(lbi_compile.transform(model, inputs, regions=3, r=4, **given), inputs)
    assert report.ok, str(report)


def test_a_latent_hears_the_whole_region_and_reaches_its_output():
    model, inputs = in_float64("transformer")
    model.eval()  # without dropout two forwards are the same
    bounded = lbi_compile.transform(model, inputs, regions=2, r=4, interface="token", finish="own", backward="autograd")
    _, taps = bounded.forward_regions(inputs)
    said = bounded.interface.encode(0, taps.h[0])
    torch.testing.assert_close(taps.m[1], said)
    with torch.no_grad():
        for parameter in bounded.interface.decoders["1"].out.parameters():
            parameter.zero_()
        _, silent = bounded.forward_regions(inputs)
        # region 1 reads the canvas alone: what it hears is all that tells the two apart
        heard = bounded.interface.decoders["1"](silent.m[1])
        assert heard.abs().max() == 0
    assert not torch.allclose(taps.h[1], silent.h[1])


def test_a_plan_keeps_it():
    model, inputs = in_float64("transformer")
    made = lbi_compile.plan(model, inputs, regions=3, r=4, finish="own")
    again = lbi_compile.transform(model, inputs, regions=Plan.from_json(made.to_json()), backward="autograd")
    assert again.plan.hash == made.hash
    assert all(isinstance(decoder, Decoder) for decoder in again.interface.decoders.values())


@pytest.mark.parametrize("interface", ["pooled", "chunked", "zero", "identity"])
def test_interfaces_that_enter_at_the_start_have_no_finish(interface: str):
    model, inputs = in_float64("transformer")
    with pytest.raises(OptionError, match="finish='own' with interface"):
        lbi_compile.plan(model, inputs, regions=3, interface=interface, finish="own")


def test_finishes_that_do_not_exist():
    model, inputs = in_float64("transformer")
    with pytest.raises(OptionError, match="finish='mine'"):
        lbi_compile.transform(model, inputs, finish="mine")
    with pytest.raises(OptionError, match="finish='own' with credit='sid'"):
        lbi_compile.transform(model, inputs, finish="own", credit="sid")


def test_one_region_has_no_finish():
    model, inputs = in_float64("transformer")
    model.eval()
    bounded = lbi_compile.transform(model, inputs, regions=1, finish="own")
    assert torch.equal(bounded(inputs), model(inputs))
