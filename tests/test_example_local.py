"""The examples of local credit in a short form: digits, choices, rows that are kept, tables and figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lbi_compile.errors import OptionError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import depth_scaling
import local_arms
import local_credit
import local_lm
import local_report
import train_recurrent
from choosing import choose
from digits import SPLITS, TurnedDigits, pictures, rows
from result_rows import Rows
from training import DivergedError

# -- digits


def test_splits_share_no_picture():
    found = pictures()
    assert {name: len(split.y) for name, split in found.items()} == SPLITS
    every = torch.cat([split.x.flatten(1) for split in found.values()])
    assert len(every) == 1797 == len(every.unique(dim=0))


def test_turned_digits():
    task = TurnedDigits(copies=2)
    train, test = task.split("train"), task.split("test")
    assert train.x.shape == (2000, task.features)
    assert test.x.shape == (4970, 100)
    torch.testing.assert_close(train.x.mean(0), torch.zeros(100), rtol=0, atol=1e-5)
    assert torch.equal(task.split("test").x, test.x)
    assert torch.equal(test.y[:497], pictures()["test"].y)


def test_a_wrong_class_is_that_of_all_variants_of_a_picture():
    right, wrong = TurnedDigits(copies=3).split("train"), TurnedDigits(copies=3, wrong=0.4).split("train")
    changed = (wrong.y != right.y).view(3, -1)
    assert torch.equal(changed[0], changed[1])
    assert 0.35 < float(changed.double().mean()) < 0.45
    assert torch.equal(wrong.x, right.x)
    other = TurnedDigits(copies=3, wrong=0.4, seed=1).split("train")
    assert not torch.equal(other.y, wrong.y)
    noisy = TurnedDigits(copies=1, wrong=0.4)
    assert torch.equal(noisy.split("test").y, TurnedDigits(copies=1).split("test").y)
    with pytest.raises(OptionError):
        TurnedDigits(wrong=1.0)


def test_rows():
    data = rows("train")
    assert data.x.shape == (1000, 8, 8)
    assert abs(float(data.x.mean())) < 1e-5


# -- choices and rows


def test_settings_are_chosen_one_after_another():
    asked = []

    def accuracy(settings):
        asked.append(settings)
        return settings["a"] * settings["b"]

    assert choose([("a", (1, 3, 2)), ("b", (1, -1))], accuracy) == {"a": 3, "b": 1}
    assert [tuple(settings.values()) for settings in asked] == [(1, 1), (3, 1), (2, 1), (3, 1), (3, -1)]


def test_rows_are_measured_once(tmp_path):
    path, calls = tmp_path / "results" / "rows.jsonl", []

    def measure():
        calls.append(1)
        return {"accuracy": 0.5}

    for _ in range(2):
        rows = Rows(path, command="python it.py")
        assert rows.measured({"arm": "a", "step": ("adam", 0.1)}, measure) == {"accuracy": 0.5}
    assert len(calls) == 1
    (row,) = rows.all()
    assert row["what"] == {"arm": "a", "step": ["adam", 0.1]}
    assert row["command"] == "python it.py"
    assert row["versions"]["torch"] == torch.__version__
    assert row["machine"]["cores"] >= 1
    # a line that was cut off is measured again
    path.write_text(path.read_text() + '{"what": {"arm"')
    rows = Rows(path, command="")
    rows.measured({"arm": "b"}, measure)
    assert len(calls) == 2
    assert [row["what"]["arm"] for row in rows.asked()] == ["b"]
    assert [json.loads(line)["what"]["arm"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_text('{"loss": 1}\n')
    with pytest.raises(OptionError, match="other rows"):
        Rows(path, command="")


# -- the comparison

SMALL = (
    "--width",
    "8",
    "--depth",
    "2",
    "--steps",
    "2",
    "--batch",
    "16",
    "--copies",
    "1",
    "--seeds",
    "2",
    "--wrong",
    "0",
)


def test_local_credit_in_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        local_credit,
        "ARMS",
        {
            name: local_arms.Arm(arm.label, arm.rule, arm.fixed, tuple((s, c[:1]) for s, c in arm.choices))
            for name, arm in local_arms.ARMS.items()
        },
    )
    command = [*SMALL, "--arms", "bp", "bp0", "sid", "hbll", "--out", str(tmp_path)]
    assert local_credit.main(command) == 0
    rows = Rows(tmp_path / "rows.jsonl", command="").all()
    assert len(rows) == 4 * 3
    text = (tmp_path / "table.md").read_text()
    assert "| backprop, 8 blocks | 1 | adam 0.001 | " in text
    assert "| linear probe on the canvas |" in text
    assert "| SID against backprop |" in text
    hbll = [row["found"] for row in rows if row["what"]["arm"] == "hbll"]
    assert all(found["paths"]["2"] == found["accuracy"] for found in hbll)
    assert all(found["flops"]["1"] < found["flops"]["2"] for found in hbll)
    # what is there is not trained again
    monkeypatch.setattr(local_credit, "run", lambda *_, **__: pytest.fail("trained again"))
    assert local_credit.main(command) == 0
    assert local_credit.main([*command, "--steps", "0"]) == 2
    assert "what to do" in capsys.readouterr().err


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"accuracy": 90.0, "probe": 50.0, "paths": {"1": 60.0, "2": 70.0}}
    rows = [{"what": {"arm": arm, "wrong": 0.0, "judge": "test"}, "found": found} for arm in ("bp", "hbll")]
    local_report.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_aims_by_hand():
    def row(arm, accuracy, wrong=0.0, **found):
        return {"what": {"arm": arm, "wrong": wrong, "judge": "test"}, "found": {"accuracy": accuracy, **found}}

    made = local_report.aims(
        [
            row("bp", 90.0), row("bp", 92.0), row("bp0", 81.0), row("sid", 90.0), row("bp", 60.0, 0.4),
            row("sid", 63.0, 0.4), row("hbll", 88.0, probe=70.0, paths={"1": 69.0, "2": 80.0, "8": 88.0}),
        ]
    )  # fmt: skip
    assert [(round(value, 3), least) for _, value, least in made] == [
        (10.0, 5.0), (-1.0, -1.5), (0.9, 0.5), (-3.0, -2.5), (0.7, 0.5), (3.0, 2.0), (-1.0, 0.0), (8.0, 0.0),
    ]  # fmt: skip


def test_a_loss_that_diverges_is_told():
    arm, budget = local_arms.ARMS["bp0"], local_arms.Budget(width=4, steps=4, batch=4, copies=1)

    def run():
        return local_arms.run(arm, {"step": ("sgd", float("inf"))}, budget, seed=0, wrong=0.0, judge="test")

    with pytest.raises(DivergedError, match="diverged"):
        run()
    assert local_arms.candidate(run) == {"accuracy": 0.0, "diverged": "sgd at inf diverged"}


# -- the recurrent net


def test_recurrent_in_short(tmp_path, monkeypatch, capsys):
    few = {
        name: train_recurrent.Arm(
            arm.label, arm.rule, arm.detached, tuple((s, c[:1]) for s, c in arm.choices), arm.like
        )
        for name, arm in train_recurrent.ARMS.items()
    }
    monkeypatch.setattr(train_recurrent, "ARMS", few)
    command = ["--width", "8", "--steps", "2", "--batch", "8", "--seeds", "1", "--out", str(tmp_path)]
    assert train_recurrent.main(command) == 0
    kept = [row["what"] for row in Rows(tmp_path / "rows.jsonl", command="").all()]
    assert [what["arm"] for what in kept] == ["bptt", "bptt", "detached", "detached", "hbll", "hbll", "leaking"]
    text = (tmp_path / "table.md").read_text()
    assert "| the leak falls below 60 |" in text
    assert train_recurrent.main(["--seeds", "0"]) == 2
    assert "what to do" in capsys.readouterr().err


def test_detached_states_bring_nothing_back():
    torch.manual_seed(0)
    model, x = train_recurrent.RowGRU(3, width=4), torch.randn(2, 5, 3, requires_grad=True)
    for detached in (False, True):
        (gradient,) = torch.autograd.grad(model.states(x, detached=detached)[-1].sum(), x)
        assert bool(gradient[:, :-1].any()) is not detached
        assert gradient[:, -1].all()


# -- depth


def test_depth_scaling_in_short(tmp_path, capsys):
    command = ["--depths", "3", "6", "--width", "8", "--batch", "16", "--out", str(tmp_path)]
    assert depth_scaling.main(command) == 0
    found = {
        (row["what"]["rule"], row["what"]["depth"]): row["found"]
        for row in Rows(tmp_path / "rows.jsonl", command="").all()
    }
    paths = {key: (one["forward"], one["backward"]) for key, one in found.items()}
    assert [paths[rule, 6] for rule in depth_scaling.RULES] == [(6, 6), (6, 6), (6, 1), (6, 6), (7, 1)]
    assert sum(paths["HBLL", 3]) <= 2 * 2 + 2
    flat = [found["SID, sequential", depth]["bytes"] for depth in (3, 6)]
    assert flat[0] == flat[1] < found["SID, parallel", 6]["bytes"]
    assert found["backprop", 6]["bytes"] > 1.7 * found["backprop", 3]["bytes"]
    assert "| SID, parallel: steps that wait | 3 + 1 | 6 + 1 |" in (tmp_path / "table.md").read_text()
    assert depth_scaling.main(["--depths", "0"]) == 2
    assert "what to do" in capsys.readouterr().err


# -- language models


def test_language_models_in_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local_lm, "RATES", (3e-3,))
    command = [
        "--steps", "1", "--length", "8", "--layers", "2", "--regions", "2", "--r", "4", "--batch", "2",
        "--evaluate-on", "2", "--bytes", "400000", "--seeds", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    assert local_lm.main(command) == 0
    rows = Rows(tmp_path / "rows.jsonl", command="").all()
    assert [(row["what"]["arm"], row["what"]["judge"]) for row in rows] == [
        (arm, judge) for arm in local_lm.ARMS for judge in ("validation", "test")
    ]
    assert all(4 < row["found"]["nats"] < 7 for row in rows)
    assert "| HBLL | 0.003 | " in (tmp_path / "table.md").read_text()
    assert local_lm.main([*command, "--steps", "0"]) == 2
    assert "what to do" in capsys.readouterr().err
