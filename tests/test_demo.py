"""The demo: its data, its losses, and short runs of the whole."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lbi_compile import cli, demo
from lbi_compile.errors import CorpusError
from tests import records

ROOT = Path(__file__).parent.parent


def fill(folder: Path, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        (folder / f"m{number:02}.py").write_bytes(bytes([number]) * size)
    (folder / "notes.txt").write_bytes(b"not source" * 99)


def test_every_tenth_file_is_held_out(tmp_path):
    fill(tmp_path, [200] * 21)
    data = demo.corpus(tmp_path)
    assert data.files == 21
    assert set(data.held_out.tolist()) == {9, 19}
    assert set(data.train.tolist()) == set(range(21)) - {9, 19}
    assert (len(data.train), len(data.held_out)) == (19 * 200, 2 * 200)


def test_corpus_is_capped(tmp_path):
    fill(tmp_path, [200] * 21)
    data = demo.corpus(tmp_path, most=2010)
    assert data.files == 11
    assert len(data.train) + len(data.held_out) == 2200


@pytest.mark.parametrize("sizes", [[], [500] * 9, [500] * 9 + [demo.LENGTH]])
def test_library_without_source_files(sizes, tmp_path):
    fill(tmp_path, sizes)
    with pytest.raises(CorpusError, match="what to do: "):
        demo.corpus(tmp_path)


def test_corpus_of_this_python_is_worth_training_on():
    data = demo.corpus()
    assert len(data.train) > 1_000_000
    assert len(data.held_out) > 50_000


def test_windows_predict_the_next_byte():
    tokens, targets = demo.windows(torch.arange(100, dtype=torch.uint8), torch.tensor([0, 7]), length=5)
    assert tokens.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert torch.equal(targets, tokens + 1)


def test_last_window_stays_inside():
    draw = torch.Generator().manual_seed(0)
    tokens, targets = demo._batch(torch.arange(demo.LENGTH + 1, dtype=torch.uint8), 9, draw)
    assert (tokens[:, 0] == 0).all()
    assert (targets[:, -1] == demo.LENGTH).all()


def test_loss_of_byte_frequencies():
    train = torch.tensor([0] * 743 + [1], dtype=torch.uint8)  # with one added to each of 256 counts: 744, 2, 1, 1, ...
    data = demo.Corpus(train, torch.tensor([0, 0, 1, 255], dtype=torch.uint8), 2)
    expected = -(2 * math.log(0.744) + math.log(0.002) + math.log(0.001)) / 4
    assert demo._frequency_loss(data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("steps", "lines"), [(3, 3), (40, 10)])
def test_progress_without_a_terminal_is_a_few_lines(steps, lines, capsys):
    with demo._progress(steps, quiet=False) as advance:
        for done in range(1, steps + 1):
            advance(done, 5.0 - done, 12_345.0)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == lines
    assert out.splitlines()[-1] == f"step {steps:>6}/{steps}  loss {5.0 - steps:.3f}  12.3k tokens/s"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80)
    monkeypatch.setattr(demo, "Console", lambda **_: terminal)
    with demo._progress(4, quiet=False) as advance:
        advance(3, 2.25, 12_345.0)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "3/4" in shown
    assert "loss 2.250 12.3k tokens/s ETA" in shown


def test_short_run_learns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    steps = ("--steps", "12", "--batch", "4", "--seconds", "1000")
    code = cli.main(["demo", *steps, "--regions", "3", "--backward", "chain"])
    out = capsys.readouterr().out
    losses = dict(re.findall(r"(before|after) training +(\d+\.\d+) nats per byte", out))
    assert 5.0 < float(losses["before"]) < 6.0
    assert float(losses["after"]) < float(losses["before"]) - 1.0
    assert "3 regions, latent width r = 16" in out
    assert "verify: ok" in out
    assert "step     12/12" in out
    assert "engine            chain (asked for)" in out
    assert max(map(len, out.splitlines())) <= 80
    # twelve small steps do not beat byte frequencies, and the exit code says so
    assert code == (0 if float(losses["after"]) < 3.11 else 1)


@pytest.mark.slow
def test_json_is_all_there_is_and_time_ends_it(capsys):
    code = cli.main(["demo", "--json", "--seconds", "0", "--regions", "2", "--backward", "autograd"])
    record = json.loads(capsys.readouterr().out)
    assert record["trained"]["steps"] == 1
    assert record["trained"]["engine"].startswith("autograd")
    assert record["report"]["ok"]
    assert record["ok"] is False
    assert code == 1


def test_nothing_is_trained_on_wrong_gradients(monkeypatch):
    monkeypatch.setattr("lbi_compile.verify", lambda *_: dataclasses.replace(records.report(), ok=False))
    result = demo.run(demo.Training(), quiet=True, regions=2, backward="chain")
    assert result.trained is None
    assert result.after == result.before
    assert not result.ok


@pytest.mark.slow
def test_ctrl_c_ends_training_cleanly():
    command = [
        sys.executable,
        "-m",
        "lbi_compile",
        "demo",
        "--regions",
        "2",
        "--backward",
        "autograd",
        "--seconds",
        "999",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("training"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "lbi-compile demo: interrupted\n"


@pytest.mark.slow
def test_full_run_is_quick_and_the_same_twice():
    def run() -> demo.Result:
        return demo.run(demo.Training(steps=150, seconds=1e9), quiet=True, regions=4, r=16, backward="scan")

    first, second = run(), run()
    assert first.ok
    assert first.seconds < 180
    assert first.after == second.after
