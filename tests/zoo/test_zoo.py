"""The zoo: ten unlike models with the fast tests, every model with the slow ones (as ``run.py`` measures it)."""

from __future__ import annotations

import pytest

import lbi_compile
from lbi_compile import LBIError
from lbi_compile.analysis import analyse
from lbi_compile.bounded import Options
from lbi_compile.capture import Capture, as_inputs, capture
from tests.zoo.measure import losses
from tests.zoo.models import ZOO, Entry
from tests.zoo.run import TIME_LIMIT, run, surprise
from tests.zoo.table import table

FAST = [entry for entry in ZOO.values() if entry.ci]
# The scan is compiled for two that differ in interface: per position, and per sample over images.
SCANNED = {"gpt2", "cnn-groupnorm"}


@pytest.mark.parametrize("entry", FAST, ids=lambda entry: entry.name)
def test_a_model_of_each_kind_is_cut_and_its_gradients_are_exact(entry: Entry) -> None:
    model, inputs = entry.build()
    found = capture(model, as_inputs(model, inputs))
    assert "batch" in found.dynamic
    regions = max(k for k in (2, 4) if _cuts(entry, found, k))
    bounded = lbi_compile.transform(model, inputs, regions=regions, backward="chain")
    for engine in ("chain", "scan") if entry.name in SCANNED else ("chain",):
        report = lbi_compile.verify(bounded, inputs, engine=engine, tolerance=entry.limit)
        assert report.ok, report
        assert report.engine.startswith(engine)
    before, _, after = losses(bounded, inputs)
    assert after < before


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
