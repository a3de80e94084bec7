"""The chooser behind ``backward="auto"``: its model, its race over steps, its stopwatch and what it remembers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lbi_compile
from lbi_compile import auto
from lbi_compile.auto import Decision, Facts, Race, Stopwatch, Store
from lbi_compile.bench import cases

CPU = torch.device("cpu")
POOLED = Facts(
    regions=64,
    latents=64,
    r=4,
    nodes=1500,
    flops=2e6,
    slice_nodes=1500,
    slice_flops=2e6,
    batched=False,
    parallel=False,
    device="cpu",
)
TOKEN = dataclasses.replace(POOLED, latents=63, slice_nodes=130, slice_flops=1e4, parallel=True)


def best(facts: Facts) -> str:
    cost = auto.predict(facts)
    return min(cost, key=lambda name: cost[name])


def test_without_batched_regions_the_scan_of_a_pooled_model_is_not_tried():
    assert auto.narrow(auto.predict(POOLED)) == ("autograd",)


def test_batching_regions_makes_the_scan_cheaper_and_brings_it_into_the_race():
    for facts in (POOLED, TOKEN):
        assert auto.predict(dataclasses.replace(facts, batched=True))["scan"] < auto.predict(facts)["scan"]
    assert "scan" not in auto.narrow(auto.predict(TOKEN))
    assert "scan" in auto.narrow(auto.predict(dataclasses.replace(TOKEN, batched=True)))


def test_much_arithmetic_and_wide_latents_keep_it_out():
    light = dataclasses.replace(TOKEN, batched=True)
    for change in ({"flops": 1e10}, {"slice_flops": 1e10}, {"slice_flops": 1e8, "r": 64}):
        assert "scan" not in auto.narrow(auto.predict(dataclasses.replace(light, **change)))


@pytest.mark.parametrize("facts", [POOLED, TOKEN])
def test_costs_grow_with_what_they_count(facts: Facts):
    for field, engines in (
        ("nodes", ("autograd", "chain", "scan")),
        ("flops", ("autograd", "chain", "scan")),
        ("latents", ("chain", "scan")),
        ("slice_nodes", ("scan",)),
        ("slice_flops", ("scan",)),
        ("r", ("scan",)),
    ):
        more = auto.predict(dataclasses.replace(facts, **{field: 2 * getattr(facts, field)}))
        assert all((more[name] > auto.predict(facts)[name]) == (name in engines) for name in more), field


@pytest.mark.parametrize(("interface", "cell"), [("pooled", "auto"), ("token", "linear"), ("token", "gru")])
def test_facts_are_read_off_a_plan_and_grow_with_the_call(interface: str, cell: str):
    name = cases.MLP if interface == "pooled" else cases.TRANSFORMER
    (case,) = cases.make(name, cases.Shape(4, 8, 4, 4), sizes=[cases.Size(6, 5)])
    here = {"dtype": torch.float32, "device": CPU}
    example = case.example(**here)
    bounded = lbi_compile.transform(
        case.model(**here), example, regions=case.starts, r=4, interface=interface, cell=cell
    )

    def facts(x: torch.Tensor) -> Facts:
        latents, splits = bounded.boundaries, bounded.interface.splits
        return auto.facts_of(bounded.plan, [x], latents=latents, splits=splits, batched=False, device=CPU)

    small, large = facts(example), facts(example.repeat(10, 1))
    assert (small.regions, small.latents, small.r) == (4, 4 if interface == "pooled" else 3, 4)
    assert small.nodes == large.nodes > sum(region.part.nodes for region in bounded.plan.regions)
    assert small.flops == sum(region.part.flops for region in bounded.plan.regions)
    assert large.flops == 10 * small.flops
    assert large.slice_flops == 10 * small.slice_flops > 0
    assert (small.slice_nodes == small.nodes) == (interface == "pooled")
    if cell == "gru":
        assert small.slice_flops == 3 * 2 * 16 * 6 * 3  # three gates of 4 x 4, at 2 x 3 positions, for three latents


def test_chain_is_tried_only_where_autograd_may_not_run():
    assert auto.narrow({"autograd": 1.0, "chain": 1.01, "scan": 0.65}) == ("scan", "autograd")
    assert auto.narrow({"chain": 1.0, "scan": 0.6}) == ("scan", "chain")


def run(race: Race, seconds: dict[str, list[float]]) -> list[str]:
    turns = []
    while race.decision is None:
        name = race.turn()
        turns.append(name)
        race.record(name, seconds[name].pop(0))
    return turns


def test_a_race_alternates_and_leaves_first_steps_out():
    race = Race({"chain": 1.0, "scan": 0.6})
    turns = run(race, {"chain": [1.0, 5.0, 9.0, 5.0, 5.0, 1.0], "scan": [900.0, 4.0, 4.0, 99.0, 4.0, 4.0]})
    assert turns == ["scan", "chain"] * (auto.ROUNDS + 1)
    assert race.decision is not None
    assert race.decision.engine == "scan" == race.turn()
    assert race.decision.seconds == {"chain": 5.0, "scan": 4.0}
    assert "scan 4e+03 ms, chain 5e+03 ms" in race.decision.why
    race.record("chain", 0.0)
    race.miss()
    assert race.turn() == "scan"


def test_a_race_of_one_is_over_at_once():
    race = Race({"chain": 1.0, "scan": 3.0})
    assert race.decision == Decision("chain", "auto: chain by the cost model, which predicts scan 3.0x the time", {})


def test_a_known_outcome_needs_no_race():
    known = Decision("scan", "auto: timed before", {})
    race = Race({"chain": 1.0, "scan": 3.0}, known=known)
    assert (race.turn(), race.decision, race.why) == ("scan", known, "auto: timed before")


def test_a_race_that_is_forbidden_is_settled_by_the_model():
    race = Race({"chain": 1.0, "scan": 0.6})
    assert race.why == "auto: its turn in a race of scan, chain, 0 steps done"
    race.settle("ranks have to agree")
    assert race.turn() == "scan"
    assert race.why == "auto: scan by the cost model; ranks have to agree"


def test_a_race_nobody_differentiates_ends_with_the_model():
    race = Race({"chain": 1.0, "scan": 0.6})
    for _ in range(auto.MOST_MISSES - 1):
        race.miss()
    race.record("scan", 1.0)
    for _ in range(auto.MOST_MISSES):
        assert race.decision is None
        race.miss()
    assert race.decision is not None
    assert race.decision.engine == "scan"
    assert "nothing to time" in race.decision.why


def test_an_engine_that_cannot_run_drops_out():
    race = Race({"chain": 1.0, "scan": 0.6})
    race.drop("scan", "no tracing")
    assert race.decision is not None
    assert race.decision.engine == "chain"
    assert "scan cannot run: no tracing" in race.decision.why


def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(8, 4)


def hooks(net: nn.Module) -> int:
    return sum(len(p._backward_hooks or {}) for p in net.parameters())


def test_a_stopwatch_times_the_two_halves_and_not_the_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(auto.time, "perf_counter", lambda: now[0])
    net, x = model()
    found: list[float] = []
    next(net.parameters()).register_hook(lambda _: now.__setitem__(0, now[0] + 0.5))
    watch = Stopwatch(CPU, found.append)
    now[0] += 1.0  # forward
    out = net(x)
    assert watch.forward_ended([out, None, 3], [*net.parameters(), x])
    now[0] += 100.0  # the loss
    loss = out.square().sum()
    out.register_hook(lambda _: now.__setitem__(0, now[0] + 0.25))
    loss.backward()
    now[0] += 100.0  # the optimizer
    assert found == [1.75]
    net(x).sum().backward()
    assert found == [1.75]


def test_a_stopwatch_leaves_no_trace():
    net, x = model()
    net(x).sum().backward()
    plain = {name: p.grad for name, p in net.named_parameters()}
    state, net_state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}

    other, _ = model()
    found: list[float] = []
    watch = Stopwatch(CPU, found.append)
    out = other(x)
    watch.forward_ended([out], list(other.parameters()))
    out.sum().backward()
    assert len(found) == 1
    assert found[0] > 0
    assert hooks(other) == 0
    torch.testing.assert_close({n: p.grad for n, p in other.named_parameters()}, plain, rtol=0, atol=0)
    torch.testing.assert_close(dict(other.state_dict()), net_state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cancelled_stopwatch_says_nothing():
    net, x = model()
    watch = Stopwatch(CPU, lambda _: pytest.fail("cancelled"))
    out = net(x)
    watch.forward_ended([out], list(net.parameters()))
    watch.cancel()
    out.sum().backward()
    assert hooks(net) == 0
    with torch.no_grad():
        assert not Stopwatch(CPU, lambda _: None).forward_ended([net(x)], list(net.parameters()))


def test_hooks_go_with_the_graph_they_wait_for():
    net, x = model()
    watch = Stopwatch(CPU, lambda _: pytest.fail("nothing was differentiated"))
    loss = net(x)
    assert watch.forward_ended([loss], list(net.parameters()))
    loss = loss.sum()
    assert hooks(net) > 0  # the output is gone, its graph is not
    del loss
    assert hooks(net) == 0
    net(x).sum().backward()


def test_keys_tell_apart_what_changes_the_outcome():
    def key(program: str = "p", size: int = 8, dtype: torch.dtype = torch.float32, engines: tuple[str, ...] = ("a",)):
        return auto.key(program=program, leaves=[torch.zeros(size, 3, dtype=dtype), 1], engines=engines, device=CPU)

    assert key() == key()
    assert key(size=7) == key(size=8) != key(size=9) == key(size=16)
    assert key(size=1) != key(size=2)
    others = [key("q"), key(size=100), key(dtype=torch.float64), key(engines=("a", "b"))]
    assert len({key(), *others}) == 5


def test_a_store_without_a_path_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store().put("k", Decision("chain", "w", {}))
    assert list(tmp_path.iterdir()) == []
    assert Store().get("k") is None


def test_a_store_with_a_path_is_shared(tmp_path: Path):
    path = tmp_path / "deep" / "auto.json"
    mine, other = Store(path), Store(path)
    decision = Decision("scan", "auto: the fastest", {"chain": 2.0, "scan": 1.0})
    mine.put("k", decision)
    other.put("l", Decision("chain", "w", {}))
    again = Store(path)
    assert again.get("k") == decision
    assert again.get("l") is not None
    assert [file.name for file in path.parent.iterdir()] == ["auto.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "decisions": {"k": {"engine": "scan"}}}'])
def test_a_broken_store_is_told_and_begun_anew(tmp_path: Path, text: str):
    path = tmp_path / "auto.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="timed anew"):
        store = Store(path)
    assert store.get("k") is None


def test_a_store_of_another_version_is_not_read(tmp_path: Path):
    path = tmp_path / "auto.json"
    Store(path).put("k", Decision("chain", "w", {}))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
    assert Store(path).get("k") is None


def test_the_file_is_opt_in(tmp_path: Path):
    assert auto.store_path({}) is None
    assert auto.store_path({auto.VARIABLE: "0"}) is None
    assert auto.store_path({auto.VARIABLE: "1", "XDG_CACHE_HOME": "/c"}) == Path("/c/lbi_compile/auto.json")
    assert auto.store_path({auto.VARIABLE: "/a/b.json"}) == Path("/a/b.json")
