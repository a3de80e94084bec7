"""``lbi-compile plan --devices``: numbers, advice, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import lbi_compile
from lbi_compile import OptionError, cli
from lbi_compile.cost import FORMS, advice, links, measure, transformer
from lbi_compile.demo_model import CausalTransformer
from lbi_compile.simulate import Link

MODELS = """
import torch
from lbi_compile.demo_model import CausalTransformer

def text():
    return CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16), torch.randint(13, (4, 8))
"""
CUT = ("--regions", "4", "--r", "4")
NAMES = ["one", "data", "gpipe", "1f1b", "zero-bubble", "chain", "scan", "token", "sid", "hbll"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``plan`` at 80 columns; gives its exit code and what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "models.py").write_text(MODELS)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["plan", f"{tmp_path}/models.py:text", *CUT, *arguments])
        return (code, *capsys.readouterr())

    return run


def test_table_sweep_picture_and_advice(run, tmp_path):
    picture = tmp_path / "plan.png"
    code, out, _ = run(
        *("--devices", "4", "--link", "100Mb/s", "--latency", "20ms", "--flops", "40G", "--simulate"),
        *("--sweep", "K=2,4", "r=4,8", "--plot", str(picture)),
    )
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for word in ("GPipe", "zero bubble", "LBI token", "HBLL", "simulated", "sweep", "r = 8", "\nadvice\n"):
        assert word in out
    assert "11.9 MiB/s in each direction, latency 20.0 ms" in out
    assert "Do not use regions for speed here" in out  # 20 ms a message, and a step of microseconds
    assert "every other device costs more than it brings" in " ".join(out.split())
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_json_has_letters_schedules_and_the_plan(run):
    code, out, _ = run("--devices", "2", "--flops", "1T", "--json", "--sweep", "r=2,4")
    record = json.loads(out)
    assert code == 0
    assert lbi_compile.Plan.from_json(json.dumps(record["plan"])).r == 4
    costs = record["costs"]
    assert costs["letters"]["K"] == {"value": 4, "meaning": "regions"}
    assert [row["name"] for row in costs["schedules"]] == NAMES
    assert all(row["estimate"]["seconds"] > 0 for row in costs["schedules"])
    assert [point["r"] for point in costs["sweep"]] == [2, 4]
    assert costs["advice"]["text"]


def test_measured_on_the_model_itself(run):
    code, out, _ = run("--devices", "2", "--json")
    letters = {name: one["value"] for name, one in json.loads(out)["costs"]["letters"].items()}
    assert code == 0
    assert (letters["B"], letters["T"], letters["D"], letters["C"], letters["tau"]) == (4, 8, 16, 13, 8)
    assert letters["p"] * letters["L"] + letters["p_s"] + letters["p_h"] == sum(
        p.numel() for p in CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16).parameters()
    )
    assert 1e6 < letters["s"] < 1e15
    assert letters["a"] > 4 * 8 * 16 * 4  # a block keeps more than its input, in bytes a sample
    assert letters["u"] >= 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--link", "home"), "--link without --devices"),
        (("--simulate",), "--simulate without --devices"),
        (("--devices", "2", "--link", "fast"), "--link fast"),
        (("--devices", "2", "--link", "0Mb/s"), "--link 0Mb/s"),
        (("--devices", "2", "--latency", "20"), "--latency 20"),
        (("--devices", "2", "--flops", "many"), "--flops many"),
        (("--devices", "2", "--sweep", "B=2"), "--sweep B=2"),
        (("--devices", "2", "--sweep", "K=2,x"), "--sweep K=2,x"),
        (("--devices", "2", "--device-memory", "0"), "--device-memory 0"),
        (("--devices", "2", "--plot", "plan.pdf"), "--plot plan.pdf"),
        (("--devices", "2", "--flops", "1T", "--device-memory", "1e-6"), "no schedule fits into a device"),
    ],
)
def test_what_cannot_be_read_is_told(run, arguments, found):
    code, _, err = run(*arguments)
    assert code == 2
    assert f"OptionError\n  found: {found}" in err


def test_links():
    assert links.link("100Mb/s") == Link(1.25e7, links.LATENCY)
    assert links.link("3GB/s", "5ms") == Link(3e9, 5e-3)
    assert links.link("home", "0s").latency == 0.0
    assert links.link("NVLink").bandwidth > links.link("pcie").bandwidth
    assert links.rate("40G") == 4e10


def test_advice_goes_by_what_is_waited_for():
    # two samples and eight devices: nothing to split but the depth
    small = transformer(D=1024, L=32, T=1024, B=2, vocabulary=256, n=8, K=8, s=1e14, o=2e-5, o_i=2e-5, o_c=1e-5)
    table = advice.rows(small, links.link("nvlink"))
    told = advice.advise(table, small, links.link("nvlink"))
    assert (told.choice, told.use) == ("token", True)
    assert "compare its quality" in told.why[-1]
    # plenty of samples: copies of the model wait for nothing but their gradients
    many = dataclasses.replace(small, B=256)
    told = advice.advise(advice.rows(many, links.link("nvlink")), many, links.link("nvlink"))
    assert (told.choice, told.use) == ("data", False)
    assert told.text.startswith("Do not use regions")
    # one device
    alone = dataclasses.replace(small, n=1)
    told = advice.advise(advice.rows(alone, links.link("nvlink")), alone, links.link("nvlink"))
    assert (told.choice, told.use) == ("one", False)
    assert "nobody waits" in told.why[0]
    # a model too large for one device, and for copies of it
    tight = advice.rows(many, links.link("nvlink"), memory=0.3 * next(
        row.estimate.memory for row in advice.rows(many, links.link("nvlink")) if row.name == "data" and row.estimate
    ))  # fmt: skip
    assert {row.name for row in tight if row.estimate is None} >= {"one", "data"}
    assert "GiB of a device" in (tight[1].refusal or "")


def test_micro_batches_are_the_best_of_those_possible():
    work = transformer(D=256, L=8, T=256, B=8, vocabulary=256, n=4, s=1e12)
    row = next(row for row in advice.rows(work, links.link("nvlink")) if row.name == "gpipe")
    assert row.micro_batches == 8
    row = next(row for row in advice.rows(work, Link(1e10, 1.0)) if row.name == "1f1b")
    assert row.micro_batches < 8  # every further round waits for seconds


def test_sweep():
    work = transformer(D=256, L=8, T=256, B=2, vocabulary=256, n=4, s=1e12)
    points = advice.sweep(work, links.link("nvlink"), Ks=(2, 4, 8), rs=(8, 16))
    assert [(point.K, point.r) for point in points] == [(2, 8), (2, 16), (4, 8), (4, 16), (8, 8), (8, 16)]
    assert points[0].seconds is None  # four devices, two regions
    assert points[2].seconds is not None
    with pytest.raises(OptionError):
        advice.sweep(work, links.link("nvlink"), Ks=(0,), rs=(8,))


def test_measure_leaves_gradients_alone_and_fits_a_line():
    torch.manual_seed(0)
    model, x = CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16), torch.randint(13, (4, 8))
    bounded = lbi_compile.transform(model, x, regions=2, r=4)
    bounded(x).sum().backward()
    before = {name: p.grad.clone() for name, p in bounded.named_parameters() if p.grad is not None}
    found = measure.measure(bounded, bounded.programs[-1], [x], rounds=2)
    assert all(torch.equal(p.grad, before[name]) for name, p in bounded.named_parameters() if p.grad is not None)
    assert len(found.regions) == 2
    assert found.samples == 4
    assert all(part.forward > 0 and part.backward > 0 and part.kept > 0 for part in found.regions)
    # 1 ms whatever the batch and 2 ms a sample, in each of four layers; the backward twice that
    timings = [_timing(b, 4 * (1e-3 + 2e-3 * b)) for b in (2, 4)]
    plan = bounded.plan
    work = measure.workload(
        plan, measure.sizes(bounded, bounded.programs[-1], [x]), devices=2, parameters=1, timings=timings
    )
    assert work.L * work.layer(8) == pytest.approx(4 * (1e-3 + 16e-3), rel=1e-6)
    assert work.g == pytest.approx(2.0)


def test_a_step_of_the_bounded_model_is_what_was_measured():
    """Interfaces' FLOPs are in the measured step already, and forms add them: they count once."""
    model = CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16)
    x = torch.randint(13, (4, 8))
    for interface, form in (("token", "token"), ("chunked", "chain")):
        bounded = lbi_compile.transform(model, x, regions=2, r=4, interface=interface)
        bounded(x)
        timings = [_timing(b, 4 * (1e-3 + 2e-3 * b), whole=1.5) for b in (2, 4)]
        found = measure.sizes(bounded, bounded.programs[-1], [x])
        work = measure.workload(bounded.plan, found, devices=1, parameters=1, timings=timings, o_c=0.0)
        assert work.o_i > 0
        step = FORMS[form](work, links.link("nvlink"))
        cells = 3 * 2 * work.r**2 * work.B * work.T / work.s if interface == "token" else 0.0
        assert step.seconds == pytest.approx(1.5 * 3 * 4 * (1e-3 + 8e-3) + cells, rel=1e-6)


def _timing(samples: int, seconds: float, whole: float = 1.0) -> measure.Measured:
    nothing = measure.Timing(1e-9, 2e-9, 1)
    half = measure.Timing(seconds / 2, seconds, 100)
    bounded = measure.Timing(whole * seconds, whole * 2 * seconds, 100)
    return measure.Measured(samples, nothing, (half, half), nothing, bounded)


def test_models_without_counts_are_refused():
    from lbi_compile import planner

    options = SimpleNamespace(
        devices=2, link=None, latency=None, flops=None, device_memory=None, sweep=None, plot=None, simulate=False
    )
    with torch.device("meta"):
        model = CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16)
    x = torch.randint(13, (4, 8), device="meta")
    plan = lbi_compile.plan(model, x, regions=2, r=4)
    with pytest.raises(OptionError, match="meta device without --flops"):
        planner.Planner.of(options)(model, x, plan)
