"""The bench: what it measures, that it holds its tongue where a variant is wrong, and the command around it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lbi_compile import cli
from lbi_compile.bench import check, compare, environment, hand, measure, plot, report
from lbi_compile.bench.compare import CANNOT, GAVE_UP, OK, WRONG, Contender, Terms, Variant
from lbi_compile.bench.measure import Timed
from lbi_compile.bench.record import Record
from lbi_compile.errors import EngineError, OptionError

CPU = torch.device("cpu")
TERMS = Terms(rounds=2, device=CPU, dtype=torch.float64, compile_limit=0.2)
RIGHT = {"loss": torch.tensor(1e6, dtype=torch.float64), "w": torch.arange(3.0, dtype=torch.float64)}


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command at 80 columns; gives its exit code and what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    return run


class Ticks:
    """A clock on which each piece of work takes as long as it says."""

    def __init__(self) -> None:
        self.now, self.slow, self.log = 0.0, 1.0, []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Timed:
        def run(state: Any) -> None:
            assert state == f"set up for {name}"
            self.log.append(name)
            self.now += seconds * self.slow

        def setup() -> str:
            self.now += 100.0
            return f"set up for {name}"

        return Timed(run, setup)


def test_rounds_are_interleaved_and_setup_is_not_timed():
    ticks = Ticks()
    timed = {name: ticks.work(name, seconds) for name, seconds in (("a", 1.0), ("b", 4.0), ("c", 2.0))}
    seconds = measure.paired(timed, rounds=12, device=CPU, seed=0, clock=ticks)
    assert seconds == {"a": [1.0] * 12, "b": [4.0] * 12, "c": [2.0] * 12}
    log = "".join(ticks.log[-36:])
    rounds = [log[i : i + 3] for i in range(0, 36, 3)]
    assert all(sorted(part) == ["a", "b", "c"] for part in rounds)
    assert len(set(rounds)) > 3


def test_short_work_is_repeated_to_fill_a_reading():
    ticks = Ticks()
    measure.paired({"short": ticks.work("short", 2e-5)}, rounds=1, device=CPU, clock=ticks)
    assert len(ticks.log) == 3 + 50


def test_the_collector_is_off_during_the_rounds_and_back_after_an_error():
    def run(_: Any) -> None:
        seen.append(gc.isenabled())
        if len(seen) > 4:
            raise RuntimeError("stop")

    seen: list[bool] = []
    with pytest.raises(RuntimeError):
        measure.paired({"a": Timed(run, lambda: time.sleep(2e-3))}, rounds=9, device=CPU)
    assert seen[0] is True
    assert seen[-1] is False
    assert gc.isenabled()


def test_ratios_are_paired_by_round():
    # the machine is ten times as slow in the second round: the ratio of medians would be 5.5 / 22 or 1 / 40
    found = measure.ratios("step", {"base": [4.0, 40.0], "fast": [1.0, 10.0], "other": [2.0, 10.0]}, ["base", "gone"])
    assert [(one.variant, one.baseline, one.ratio.all) for one in found] == [
        ("fast", "base", (4.0, 4.0)),
        ("other", "base", (2.0, 4.0)),
    ]
    assert (found[1].ratio.median, found[1].ratio.min, found[1].ratio.max) == (3.0, 2.0, 4.0)


def test_peak_memory_counts_what_lives_at_one_time():
    kib = torch.zeros(256)

    def run() -> Tensor:
        first = kib + kib
        second = first + first
        del first
        return second.repeat(4)  # beside it only `second`

    # the allocator adds a little of its own
    assert 5 * 1024 <= measure.peak_bytes(run, CPU) < 5 * 1024 + 256


def test_judge_is_strict_about_each_tensor():
    def error(**changes: Tensor | None) -> check.Check:
        return check.judge({**RIGHT, **changes}, RIGHT, dtype=torch.float64, oracle="o")

    assert error().ok
    assert error().tensors == 2
    off = error(w=RIGHT["w"] * (1 + 1e-9))
    assert (off.ok, off.worst) == (False, "w")
    assert not error(loss=RIGHT["loss"] * 1.1).ok
    assert not error(w=None).ok
    assert not check.judge({}, {}, dtype=torch.float64, oracle="o").ok


def test_nobody_is_asked_to_round_less_than_plain_autograd():
    exact = {"w": torch.ones((), dtype=torch.float64)}
    plain = {"w": torch.full((), 1.001)}
    assert check.tolerance_beside(plain, exact, dtype=torch.float32) == pytest.approx(4e-3, rel=1e-3)
    assert check.tolerance_beside(exact, exact, dtype=torch.float32) == 1e-4
    oracle = compare.Oracle(lambda: exact, lambda: plain)

    def cell(value: float) -> compare.Cell:
        variant = Variant("own", "", lambda: contender(lambda: {"w": torch.full((), value)}), "o")
        return compare.compare({"name": "case"}, [variant], {"o": oracle}, TERMS._replace(dtype=torch.float32))

    assert cell(1.003).ok
    assert not cell(1.005).ok


def contender(tensors: Callable[[], Mapping[str, Tensor | None]]) -> Contender:
    return Contender({"step": Timed(lambda _: None)}, tensors, lambda: None)


def right() -> Contender:
    return contender(lambda: RIGHT)


def compared(*variants: Variant) -> compare.Cell:
    return compare.compare({"name": "case"}, variants, {"o": compare.Oracle(lambda: RIGHT)}, TERMS)


def test_a_right_cell_has_ratios():
    cell = compared(Variant("base", "", right, "o", baseline=True), Variant("own", "", right, "o"))
    assert cell.ok
    assert [(one.variant, one.baseline, one.part) for one in cell.ratios] == [("own", "base", "step")]
    assert all(len(row.seconds["step"].all) == 2 for row in cell.rows)


@pytest.mark.parametrize("calls", [1, 2])  # wrong before the rounds, and only after them
def test_no_speed_where_a_variant_is_wrong(calls: int):
    count = itertools.count(1)

    def tensors() -> Mapping[str, Tensor | None]:
        return {**RIGHT, "w": RIGHT["w"] + 1e-3} if next(count) == calls else RIGHT

    cell = compared(
        Variant("base", "", right, "o", baseline=True),
        Variant("own", "", lambda: contender(tensors), "o"),
    )
    assert not cell.ok
    assert not cell.ratios
    assert not any(row.seconds for row in cell.rows)
    assert [row.status for row in cell.rows] == [OK, WRONG]


def test_what_cannot_run_says_so_and_the_others_are_timed():
    def slow() -> Contender:
        with contextlib.suppress(Exception):  # a compiler that takes another way when it fails
            time.sleep(5.0)
        return right()

    def refuses() -> Contender:
        raise EngineError("no way", expected="another", do="that")

    def breaks() -> Contender:
        raise ValueError("a fault of torch\nand more")

    cell = compared(
        Variant("slow", "", slow, "o", baseline=True, compiled=True),
        Variant("broken", "", breaks, "o", baseline=True),
        Variant("refused", "", refuses, "o"),
        Variant("base", "", right, "o", baseline=True),
        Variant("own", "", right, "o"),
    )
    assert cell.ok
    assert [(row.status, row.note) for row in cell.rows] == [
        (GAVE_UP, "not compiled after 0.2 s"),
        (CANNOT, "ValueError: a fault of torch"),
        (CANNOT, "EngineError: no way"),
        (OK, ""),
        (OK, ""),
    ]
    assert {(one.variant, one.baseline) for one in cell.ratios} == {("own", "base")}
    with pytest.raises(ValueError, match="a fault"):  # of our own it is a bug
        compared(Variant("own", "", breaks, "o"))


def test_a_limit_is_off_again_after_the_block():
    with compare.time_limit(0.05):
        pass
    time.sleep(0.1)


def test_the_caches_of_compilers_are_empty_inside(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with environment.empty_compile_cache():
        inside = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert inside != "before"
        assert os.environ["TRITON_CACHE_DIR"] != inside
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("value", "text"), [(12.0, "12.0 s"), (1.0, "1.0 s"), (0.25, "250 ms"), (2e-3, "2.0 ms"), (3e-7, "0.3 us")]
)
def test_times_are_short(value: float, text: str):
    assert report.seconds(value) == text


STEP = ("bench", "step", "mlp", "--layers", "6", "--width", "8", "--regions", "3", "--batch", "2", "--rounds", "2")


def test_step_prints_a_table_and_writes_a_record(run, tmp_path: Path):
    out = tmp_path / "out.json"
    arguments = (*STEP, "--variants", "eager,dense,by hand,chain", "--memory", "--json", str(out))
    code, text, _ = run(*arguments)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    for word in ("bench step: ok", "/ eager", "/ by hand", "backward alone", "whole step", "torch 2."):
        assert word in text
    assert "\x1b" not in text
    record = json.loads(out.read_text())
    assert record["ok"] is True
    assert record["command"].startswith("lbi-compile bench step mlp --layers 6")
    assert record["command"].endswith(" --json out.json")  # without the folder, which is of one machine
    assert record["settings"]["threads"] == 1
    assert {"processor", "cores", "gpu"} <= set(record["machine"])
    assert {"torch", "triton", "python", "lbi_compile"} <= set(record["versions"])
    assert record["date"].endswith("+00:00")
    (cell,) = record["cells"]
    assert cell["case"]["layers"] == 6
    assert [row["name"] for row in cell["rows"]] == ["eager", "dense", "by hand", "chain"]
    for row in cell["rows"]:
        assert row["check"]["ok"] is True
        assert row["check"]["tensors"] > 10
        assert row["peak_bytes"] > 0
        assert set(row["seconds"]) == {"forward", "backward", "gradients", "step"}
    pairs = {(one["part"], one["variant"], one["baseline"]) for one in cell["ratios"]}
    assert len(pairs) == 4 * (4 * 3 - 3)  # four parts; each against the three baselines but itself


def test_a_wrong_backward_gives_exit_code_1_and_no_ratio(run, monkeypatch, tmp_path: Path):
    gelu_backward = hand._gelu_backward
    monkeypatch.setattr(hand, "_gelu_backward", lambda g, x: gelu_backward(g, x) * 1.01)
    out = tmp_path / "out.json"
    code, text, _ = run(*STEP, "--variants", "eager,by hand", "--json", str(out))
    assert code == 1
    assert "bench step: FAILED" in text
    assert "wrong" in text
    assert "whole step" not in text
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["ratios"] == []
    assert not any(row["seconds"] for row in cell["rows"])


def test_transform_tells_every_stage(run, tmp_path: Path):
    out = tmp_path / "out.json"
    code, text, _ = run("bench", "transform", "case:mlp", "--layers", "4", "--regions", "2", "--json", str(out))
    assert code == 0
    costs = {cost["stage"]: cost for cost in json.loads(out.read_text())["costs"]}
    assert {"capture", "liveness", "partition", "transform"} <= set(costs)
    assert costs["transform"]["seconds"] > costs["capture"]["seconds"] > 0
    assert costs["transform"]["peak_bytes"] is None or costs["transform"]["peak_bytes"] >= 0
    assert "transform" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*STEP, "--dtype", "int8"), "--dtype int8"),
        ((*STEP, "--variants", "eager,quick"), "--variants quick"),
        ((*STEP, "--cuda-graphs", "--device", "cpu"), "--cuda-graphs"),
        ((*STEP, "--regions", "4"), "6 layers and 4 regions"),
        ((*STEP, "--clock", "process", "--threads", "2"), "--clock process"),
        ((*STEP, "--plot", "here.svg"), "--plot here.svg"),
        ((*STEP, "--json", "/nowhere/at/all.json"), "--json"),
        (("bench", "transform", "case:rnn"), "case:rnn"),
    ],
)
def test_wrong_use_is_told(run, arguments: tuple[str, ...], says: str):
    threads = torch.get_num_threads()
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert torch.get_num_threads() == threads


def test_plot_without_matplotlib_is_told(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"lbi-compile\[plot\]"):
        plot.check(tmp_path / "out.png")


def test_plot_draws_every_variant_once_per_part(monkeypatch, tmp_path: Path):
    drawn: list[tuple[Any, ...]] = []
    axis = SimpleNamespace(
        errorbar=lambda places, values, *, label, **_: drawn.append((label, places, len(values))),
        set=lambda **_: None,
        set_xticks=lambda places, labels, **_: drawn.append(tuple(labels)),
        legend=lambda **_: None,
    )
    figure = SimpleNamespace(suptitle=lambda *_, **__: None, tight_layout=lambda: None, savefig=lambda *_, **__: None)

    class Axes:
        def __getitem__(self, _: Any) -> list[Any]:
            return [axis]

    library = SimpleNamespace(subplots=lambda *_, **__: (figure, Axes()), close=lambda _: None)
    monkeypatch.setattr(plot, "library", lambda: library)
    cells = tuple(
        dataclasses.replace(
            compared(Variant("base", "", right, "o", baseline=True), Variant("own", "", right, "o")),
            case={"name": "mlp", "width": 8, "batch": batch},
        )
        for batch in (1, 8)
    )
    record = Record("step", True, "lbi-compile", "now", {"processor": "p"}, {"torch": "t"}, {}, cells)
    plot.draw(record, tmp_path / "out.png")
    assert drawn == [("base", (0, 1), 2), ("own", (0, 1), 2), ("batch 1", "batch 8")]
