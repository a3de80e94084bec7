"""Models of published sizes are cut into even regions without the memory to hold them, as they would be with it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lbi_compile
from lbi_compile._torch import FakeTensorMode
from lbi_compile.plan import Part, Plan
from tests.models import CausalTransformer
from tests.zoo_wide.models import ZOO
from tests.zoo_wide.unet import UNet

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    """What a Python program prints, run from the root of the repository on one thread."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ZOO)
def test_even_regions_at_the_published_size(name: str) -> None:
    record = json.loads(run("-m", "tests.zoo_wide.run", name, "--regions", "4", "8"))
    assert record["parameters"] == ZOO[name].parameters
    assert [plan.get("error") for plan in record["plans"]] == [None, None]
    for plan, regions in zip(record["plans"], (4, 8), strict=True):
        assert len(plan["ends"]) == regions
        assert len(plan["lanes"]) == regions - 1
        assert 1.0 <= plan["balance"] <= ZOO[name].balance, plan
        assert plan["inside"] > 0.9  # even regions that leave the work to stem and head would be none
    assert record["mib"] < 3000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_prints_a_table_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "balance.json"
    text = run("examples/balance.py", "--models", "vit-l16", "--regions", "2", "--json", str(file))
    (record,) = json.loads(file.read_text())
    (plan,) = record["plans"]
    (row,) = (line for line in text.splitlines() if "vit-l16" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:7] == [
        "vit-l16", "304.3M", f"{plan['nodes']:,}", "2", "1", f"{plan['balance']:.2f}", f"{plan['inside']:.0%}",
    ]  # fmt: skip


def test_the_unet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == ZOO["unet-sd15"].parameters


def test_the_unet_runs_and_trains() -> None:
    model = UNet((8, 12, 16, 16), context=6, heads=2, groups=4)
    inputs = {
        "latents": torch.randn(2, 4, 16, 16),
        "timesteps": torch.tensor([3, 900]),
        "context": torch.randn(2, 5, 6),
    }
    out = model(**inputs)
    assert out.shape == inputs["latents"].shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    others = [
        model(**{**inputs, "timesteps": torch.tensor([3, 901])}),
        model(**{**inputs, "context": inputs["context"].flip(1)[:, :4]}),
    ]
    assert not any(torch.equal(out[1], other[1]) for other in others)


def lm() -> tuple[nn.Module, Any]:
    return CausalTransformer(vocabulary=11, length=9, width=8, depth=6, heads=2), torch.randint(11, (3, 7))


def unet() -> tuple[nn.Module, Any]:
    inputs = {
        "latents": torch.randn(2, 4, 16, 16),
        "timesteps": torch.randint(9, (2,)),
        "context": torch.randn(2, 5, 6),
    }
    return UNet((8, 12, 16, 16), context=6, heads=2, groups=4), inputs


def without_numbers(plan: Plan) -> Plan:
    """A plan without what only numbers tell, and without counts of nodes, which depend on kernels."""

    def part(of: Part) -> Part:
        return dataclasses.replace(of, nodes=0)

    regions = tuple(dataclasses.replace(region, part=part(region.part)) for region in plan.regions)
    parts = {name: part(getattr(plan, name)) for name in ("prologue", "stem", "head")}
    return dataclasses.replace(plan, regions=regions, causal=None, **parts)


@pytest.mark.parametrize("make", [lm, pytest.param(unet, marks=pytest.mark.slow)])
def test_a_model_without_numbers_is_cut_as_one_with_numbers(make: Any) -> None:
    wanted = lbi_compile.plan(*make(), regions=3, r=6)
    with torch.device("meta"):
        meta = make()
    assert without_numbers(lbi_compile.plan(*meta, regions=3, r=6)).hash == without_numbers(wanted).hash


def test_a_model_made_of_fake_tensors_is_cut_as_well() -> None:
    wanted = lbi_compile.plan(*lm(), regions=3, r=6)
    with FakeTensorMode():
        model, tokens = lm()
    found = lbi_compile.plan(model, tokens, regions=3, r=6)
    assert without_numbers(found).hash == without_numbers(wanted).hash
    assert found.causal is None
    assert wanted.causal
