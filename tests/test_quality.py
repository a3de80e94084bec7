"""The study of model quality: models drawn anew, choices on the validation split, leaks, rows and tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import mixing  # noqa: E402
import quality  # noqa: E402
from quality_arms import ARMS, Arm, Drawn, prefix_losses, settings_of  # noqa: E402
from quality_report import best, chosen, gaps, signed, table  # noqa: E402
from result_rows import Rows  # noqa: E402
from training import Settings, make_model  # noqa: E402

COMMON = Settings(size="nano", steps=3, warmup=1, batch=2, evaluate_every=3, evaluate_on=2)
TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["dense", "both"])
def test_a_model_drawn_anew_is_the_one_that_is_made(name: str) -> None:
    settings = settings_of(ARMS[name], COMMON)
    drawn = Drawn(settings, TOKENS, vocabulary=256)
    first = {key: value.clone() for key, value in drawn(0).state_dict().items()}
    again = drawn(3)
    made = make_model(dataclasses.replace(settings, seed=3), TOKENS, vocabulary=256)
    assert {key: value.shape for key, value in first.items()} == {k: v.shape for k, v in made.state_dict().items()}
    for key, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert not torch.equal(first["blocks.0.0.branch.query.weight"], made.state_dict()["blocks.0.0.branch.query.weight"])
    assert torch.equal(again(TOKENS), made(TOKENS))


def test_shallow_has_the_layers_of_one_region() -> None:
    assert settings_of(ARMS["shallow"], COMMON).layers == 1
    assert settings_of(ARMS["shallow"], dataclasses.replace(COMMON, layers=6, regions=2)).layers == 3
    assert settings_of(ARMS["dense"], COMMON).layers is None
    assert settings_of(Arm("x", {"interface": "zero"}), COMMON).backward == "autograd"


class Means(nn.Module):
    """Logits that are the mean over all tokens (``leaks``) or over those so far."""

    def __init__(self, *, leaks: bool) -> None:
        super().__init__()
        self.leaks = leaks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hot = F.one_hot(tokens, 5).float() * 4
        if self.leaks:
            return hot.mean(1, keepdim=True).expand_as(hot)
        return hot.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]


class Fixed:
    """One batch of tokens and what follows them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def batch(self, position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[:size, :-1], self.tokens[:size, 1:]


def test_the_worth_of_a_leak_is_what_the_later_tokens_give() -> None:
    tokens = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(1))
    causal = prefix_losses(Means(leaks=False), Fixed(tokens), windows=6)
    assert causal["prefix"] == pytest.approx(causal["published"], rel=1e-5)
    leaking = prefix_losses(Means(leaks=True), Fixed(tokens), windows=6)
    assert leaking["prefix"] == pytest.approx(causal["published"], rel=1e-5)
    assert leaking["published"] < leaking["prefix"] - 0.01


def row(arm: str, rate: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    what = {"architecture": "transformer", "arm": arm, "rate": rate, "seed": seed, **more}
    splits = {"validation": {"held_out": validation}, "test": {"held_out": test}}
    return {"what": what, "found": {"parameters": 10, "flops": 2e6, **splits}, "cpu_seconds": 30.0}


ROWS = [
    row("dense", 0.1, 0, 2.0, 1.0),
    row("dense", 0.2, 0, 1.9, 1.5),
    row("dense", 0.2, 1, 1.9, 1.7),
    row("token", 0.1, 0, 1.8, 1.4),
    row("token", 0.1, 1, 1.8, 1.5),
    row("self", 0.1, 0, 1.85, 1.45),
    row("token", 0.1, 0, 1.7, 1.3, r=4),
    {**row("both", 0.1, 0, 1.0, 1.0), "found": {"parameters": 10, "flops": 1, "diverged": "loss nan"}},
]


def test_rates_are_chosen_on_the_validation_split_and_judged_on_the_other() -> None:
    dense, token = chosen(ROWS, "transformer", "dense"), chosen(ROWS, "transformer", "token")
    assert {seed: one["rate"] for seed, one in dense.items()} == {0: 0.2, 1: 0.2}
    assert gaps(token, dense) == pytest.approx([-0.1, -0.2])
    assert chosen(ROWS, "transformer", "both") == chosen(ROWS, "mamba2", "dense") == {}
    assert chosen(ROWS, "transformer", "token", r=4)[0]["test"]["held_out"] == 1.3
    assert best(ROWS, "transformer") == "token"
    assert signed([-0.5]) == "-0.5000"
    text = table(ROWS)
    assert "| dense | 10 | 2.0 | 0.2 | 2 | 1.6000 ± 0.1414 |" in text
    assert "| +0.0000 ± 0.0000 |" in text
    assert "| token, linear cell (default), r=4 | 10 | 0.1 | 1 | 1.3000 | -0.1000 |" in text
    assert "8 runs, 4 minutes" in text


def test_the_command_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "2", "--batch", "2", "--judged", "2", "--bytes", "200000", "--rates", "0.001", "0.01"]
    command = ["transformer", *small, "--seeds", "2", "--out", str(tmp_path), "--arms", "dense"]
    assert quality.main(command) == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [(one["what"]["rate"], one["what"]["seed"]) for one in map(json.loads, lines)][:2] == [(0.001, 0), (0.01, 0)]
    assert len(lines) == 3
    assert quality.main([*command, "shallow", "--plot"]) == 0
    after = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert (after[:3], len(after)) == (lines, 6)
    assert "shallow" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert quality.main(["lstm", "--out", str(tmp_path)]) == 2
    assert "architecture 'lstm'" in capsys.readouterr().err


def test_mixing_tells_accuracy_by_task_and_arm(tmp_path: Path) -> None:
    small = ["--steps", "2", "--batch", "2", "--judged", "4", "--rates", "0.001", "--out", str(tmp_path)]
    assert mixing.main(["--tasks", "S5", "recall", "--arms", "dense", "shallow", "--plot", *small]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(one["what"]["task"], one["what"]["arm"]) for one in rows] == [
        (task, arm) for task in ("S5", "recall") for arm in ("dense", "shallow")
    ]
    accuracy = [f"{100 * one['found']['test']['accuracy']:.1f}" for one in rows]
    last = [f"{100 * one['found']['last']['accuracy']:.1f}" for one in rows[:2]]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == f"| dense | {accuracy[0]} | {last[0]} | {accuracy[2]} |"
    assert lines[3].endswith(f"| {accuracy[1]} | {last[1]} | {accuracy[3]} |")
    assert len(lines) == 4
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert mixing.main(["--only-report", "--arms", "self", *small]) == 0
    assert (tmp_path / "table.md").read_text().splitlines() == lines


def test_splits_of_a_task_share_no_sequence() -> None:
    study = mixing.study_of("3 hops", mixing.parser().parse_args([]), Rows(Path("none"), command=""), say=print)
    batches = [study.data(0), study.data(1), study.judges["validation"], study.judges["test"]]
    drawn = [source.batch(0, 32)[0] for source in batches]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert not (one == other).all(1).any()
