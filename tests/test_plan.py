"""Plans: text that comes back equal, and a hash that speaks for what was cut."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lbi_compile.errors import PlanError
from lbi_compile.plan import Plan
from tests import records


def edited(**changes) -> str:
    return json.dumps({**json.loads(records.plan().to_json()), **changes})


def test_json_round_trip():
    plan = records.plan()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    assert again.passes == plan.passes
    assert again.to_json() == plan.to_json()


def test_credit_comes_back():
    plan = dataclasses.replace(records.plan(), credit="hbll")
    assert Plan.from_json(plan.to_json()).credit == "hbll"
    assert plan.hash != dataclasses.replace(plan, credit="sid").hash


def test_boundaries_lie_between_regions():
    assert [point.name for point in records.plan().boundaries] == ["blocks.1:add[1]", "extra.3:add[1]"]


def test_hash_ignores_reasons_times_and_example_sizes():
    plan = records.plan()
    other = dataclasses.replace(
        plan,
        why=(),
        passes=(),
        inputs=(("tokens", (7, 9)),),
        regions=tuple(dataclasses.replace(region, why=()) for region in plan.regions),
    )
    assert other.hash == plan.hash


@pytest.mark.parametrize(
    "change",
    [
        {"interface": "pooled"},
        {"cell": "linear"},
        {"readout": "last"},
        {"r": 8},
        {"credit": "sid"},
        {"canvas": records.point("stem")},
        {"regions": records.plan().regions[:2]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_hash_tells_plans_apart(change):
    assert dataclasses.replace(records.plan(), **change).hash != records.plan().hash


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (edited(r=8), "on a plan whose content hashes to"),
        (edited(hash="0" * 16), "hash 0000000000000000 on a plan"),
        (edited(regions=json.loads(records.plan().to_json())["regions"][:2]), "on a plan whose content hashes to"),
        (edited(credit="sid"), "on a plan whose content hashes to"),
        (edited(version=2), "a plan of version 2"),
        (edited(version=99), "a plan of version 99"),
        (edited(surprise=1), "surprise"),
        (edited(canvas="embed"), "text that is no plan"),
        ("not json", "text that is no plan"),
        ("[]", "text that is no plan"),
        ("{}", "text that is no plan (KeyError: 'version')"),
    ],
)
def test_tampered_text_is_refused(text, found):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert found in str(caught.value)
    assert "what to do: " in str(caught.value)


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        records.plan().r = 8  # pyright: ignore[reportAttributeAccessIssue]
