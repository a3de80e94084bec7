"""Examples run, on their own, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def printed(example: str) -> str:
    """What an example writes, run in a process of its own; it has to end well and to write nothing else."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_quickstart():
    text = printed("quickstart.py")
    assert "engine: scan" in text
    assert "GPT2LMHeadModel: 3 regions" in text
    assert "verify: ok" in text


def test_a_backend_of_ones_own():
    text = printed("own_backend.py")
    assert "boundary 2: add" in text
    assert "the pieces in order give the model's output bit for bit" in text
