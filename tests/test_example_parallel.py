"""The study of parallel forwards in a short form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import parallel_forward

SMALL = ["--regions", "3", "--steps", "3", "--warmup", "1", "--seeds", "1", "--width", "8", "--r", "4", "--batch", "8"]


def test_both_forwards_are_trained_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert parallel_forward.main([*SMALL, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["what"]["task"], row["what"]["forward"]) for row in rows] == [
        ("digits", "sequential"), ("digits", "parallel"), ("bytes", "sequential"), ("bytes", "parallel"),
    ]  # fmt: skip
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["found"]["losses"] == pytest.approx(other["found"]["losses"], abs=1e-3)
        assert 1 <= min(other["found"]["iterations"]) <= max(other["found"]["iterations"]) <= 2
        assert other["found"]["fallbacks"] == 0
        assert other["found"]["exactness"]["error"] <= other["found"]["exactness"]["allowed"] > 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| digits", "| bytes"]
    assert lines[2] in capsys.readouterr().out


def test_a_warmup_that_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert parallel_forward.main([*SMALL, "--warmup", "3", "--out", str(tmp_path)]) == 2
    assert "warmup 3" in capsys.readouterr().err
