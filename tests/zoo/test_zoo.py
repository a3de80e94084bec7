"""The zoo: some unlike models with the fast tests, every model with the slow ones (as ``run.py`` measures it)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lbi_compile
from lbi_compile import BoundedModule, LBIError
from lbi_compile.analysis import analyse
from lbi_compile.capture import Capture, as_inputs, capture
from lbi_compile.options import Options
from lbi_compile.verify import relative_errors
from tests.zoo.measure import FAITHFUL, losses, objective, unfaithful
from tests.zoo.models import ZOO, Entry
from tests.zoo.run import TIME_LIMIT, run, surprise
from tests.zoo.table import table

FAST = [
    pytest.param(
        entry,
        marks=pytest.mark.slow if entry.name in ("mamba2", "llama", "t5", "cnn-groupnorm", "rnn-unrolled") else (),
        id=entry.name,
    )
    for entry in ZOO.values()
    if entry.ci
]
# The scan is compiled for two that differ in interface: per position, and per sample over images.
SCANNED = {"gpt2", "cnn-groupnorm"}


@pytest.mark.parametrize("entry", FAST)
def test_a_model_of_each_kind_is_cut_and_its_gradients_are_exact(entry: Entry) -> None:
    model, inputs = entry.build()
    found = capture(model, as_inputs(model, inputs))
    assert "batch" in found.dynamic
    assert unfaithful(model, found) <= FAITHFUL
    regions = max(k for k in (2, 4) if _cuts(entry, found, k))
    # verify captures twice more, which the fast tests have no time for: the model itself in float64 does here
    wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    bounded = lbi_compile.transform(model.double(), wide, regions=regions, backward="chain")
    exact = _gradients(bounded, wide, "autograd")
    assert sum(gradient is not None for name, gradient in exact.items() if name.startswith("lbi.")) >= regions - 1
    for engine in ("chain", "scan") if entry.name in SCANNED else ("chain",):
        errors = relative_errors(_gradients(bounded, wide, engine), exact)
        assert max(errors.values()) <= entry.limit, (engine, max(errors, key=errors.__getitem__))
    before, _, after = losses(bounded, wide)
    assert after < before


def _gradients(bounded: BoundedModule, inputs: Any, engine: str) -> dict[str, Tensor | None]:
    bounded.zero_grad()
    with bounded.with_engine(engine):
        torch.manual_seed(7)
        loss = objective(bounded(**inputs) if isinstance(inputs, dict) else bounded(*inputs))
        assert bounded.engine.name == engine
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def _cuts(entry: Entry, found: Capture, k: int) -> bool:
    """Whether ``K`` regions can be cut; of every model here, two can."""
    options = Options(
        regions=k, r=16, interface="auto", cell="auto", readout="auto", backward="auto", allow_leak=False, seed=0
    )
    try:
        plan = analyse(entry.build()[0], found, options).plan
    except LBIError:
        assert k > 2
        return False
    assert len(plan.regions) == k
    return True


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT + 60)
@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_as_the_zoo_expects(name: str) -> None:
    row = run(name)
    assert not surprise(row), row
    assert row["status"] != "green" or row["error"] <= ZOO[name].limit


def test_the_zoo_is_wide_and_every_exception_has_a_reason() -> None:
    assert len(ZOO) >= 46
    assert len({entry.family for entry in ZOO.values()}) >= 15
    assert len(FAST) == 10
    for entry in ZOO.values():
        assert (entry.expect == "scan") == (not entry.why), entry


def test_a_row_that_is_not_as_expected_is_a_surprise_and_the_table_counts_it() -> None:
    green = {
        "name": "gpt2",
        "family": "decoder LM",
        "status": "green",
        "engine": "scan",
        "nodes": 9,
        "regions": {"2": "ok"},
    }
    slow = {**green, "name": "llama", "engine": "chain", "engines": {"scan": "refused: EngineError: no rule"}}
    refused = {
        "name": "lstm-bidirectional",
        "family": "recurrent",
        "status": "refused: TooManyRegionsError: one operator",
    }
    wrong = {**green, "name": "bert", "status": "red: scan: gradient of x off by 1e-3"}
    assert [surprise(row) for row in (green, refused)] == ["", ""]
    assert surprise(slow) == "chain, expected scan"
    assert surprise(wrong) == "red: scan: gradient of x off by 1e-3, expected scan"
    text = table([green, slow, refused, wrong])
    assert "Captured 3 of 4 (75%); green 2 of 4 (50%); green with the scan 1 of 4 (25%)." in text
    assert "no scan: EngineError" in text
    assert "1 refused: TooManyRegionsError" in text
