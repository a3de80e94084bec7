"""The study of warm starts: what is distilled, and rows and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import warm_start
from data import Windows
from training import DENSE, Settings, make_model

TOKENS = torch.arange(2 * 32).reshape(2, 32) % 50


def model(interface: str, regions: int = 4, seed: int = 0) -> Any:
    settings = Settings(size="nano", regions=regions, interface=interface, backward="autograd", seed=seed)
    return make_model(settings, TOKENS, vocabulary=50)


def heard(source: Any, stream: Tensor) -> Tensor:
    return source.head(source.norm(stream))


def test_a_dense_stream_is_cut_where_regions_end():
    dense = model(DENSE)
    ends = warm_start.stream(dense, TOKENS, regions=2)
    assert len(ends) == 2
    torch.testing.assert_close(ends[0], dense.blocks[1](dense.blocks[0](dense.embedding(TOKENS))))
    torch.testing.assert_close(heard(dense, ends[1]), dense(TOKENS))


@pytest.mark.parametrize("interface", ["token", "chunked", "token+chunked"])
def test_a_bounded_stream_ends_in_what_the_head_reads(interface: str):
    bounded = model(interface)
    ends = warm_start.reached(bounded, TOKENS)
    assert len(ends) == 4
    torch.testing.assert_close(heard(bounded.source, ends[3]), bounded(TOKENS))


def test_boundaries_come_closer_and_the_teacher_stays():
    teacher, bounded = model(DENSE), model("token", seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = Settings(size="nano", batch=4, warmup=2, learning_rate=1e-2)
    data = Windows(torch.arange(3000) % 47, length=32)
    start = warm_start.boundary_loss(bounded, teacher, TOKENS).item()
    warm_start.distill(bounded, teacher, data, settings, steps=20)
    assert warm_start.boundary_loss(bounded, teacher, TOKENS).item() < start / 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_arms_start_from_the_same_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--steps", "4", "--distill", "2", "--first-steps", "3", "--batch", "2", "--judged", "2"]
    command = [*small, "--bytes", "200000", "--seeds", "1", "--rates", "0.001", "--out", str(tmp_path)]
    assert warm_start.main([*command, "--interfaces", "token", "--plot"]) == 0
    lines = (tmp_path / "rows.jsonl").read_text()
    found = {row["what"]["arm"]: row["found"] for row in map(json.loads, lines.splitlines())}
    assert list(found) == list(warm_start.ARMS)
    assert len({one["dense"] for one in found.values()}) == 1
    assert found["dense"]["cut"] == found["dense"]["dense"] != found["warm"]["cut"] == found["distilled"]["cut"]
    assert [step for step, _ in found["warm"]["curve"]] == [0, 1, 2, 3, 4]
    assert [step for step, _ in found["distilled"]["curve"]] == [0, 2, 3, 4]
    assert (tmp_path / "figure.png").stat().st_size > 5000
    text = capsys.readouterr().out
    assert f"{found['warm']['test']:.4f}" in text
    assert warm_start.main([*command, "--interfaces", "token"]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == lines
    assert warm_start.main([*command, "--distill", "4"]) == 2
    assert "number below 1" in capsys.readouterr().err
