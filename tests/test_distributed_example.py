"""The example of region-parallel training under torchrun: it runs, and it survives the loss of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
SMALL = ("--layers", "3", "--width", "16", "--length", "16", "--batch", "4")

# The example, with a process that is lost after a step of the first attempt.
LOSES = """
import os, signal, sys
from examples.distributed_lm import main

def lose(step):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

main(sys.argv[2:], after_step=lose)
"""


def torchrun(*arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script on several processes of this machine."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip


def test_it_trains_on_two_processes():
    done = torchrun(ROOT / "examples" / "distributed_lm.py", *SMALL, "--steps", 20)
    assert done.returncode == 0, done.stderr
    assert "token interface, regions 0..0 of 3, rank 0; engine: chain" in done.stdout
    assert "step 20: loss" in done.stdout


def weights(folder: Path, step: int, path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    dcp_to_torch_save(folder / f"step-{step:08d}", path)
    state = torch.load(path, weights_only=False)
    return {f"{kind} {name}": value for kind, part in state.items() for name, value in part.items()
            if isinstance(value, torch.Tensor)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_torchrun_goes_on_from_the_last_checkpoint_bit_for_bit(how: str, tmp_path: Path):
    options = (*SMALL, "--steps", 10, "--save-every", 3, "--timeout", 10)
    whole = torchrun(ROOT / "examples" / "distributed_lm.py", *options, "--folder", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    script = tmp_path / "loses.py"
    script.write_text(LOSES)
    lost = torchrun("--max-restarts", 1, script, how, *options, "--folder", tmp_path / "lost")
    assert lost.returncode == 0, lost.stderr
    assert f"goes on from {tmp_path / 'lost' / 'step-00000006'}" in lost.stdout
    if how == "SIGSTOP":
        assert "rank 1 stopped taking part at step 8" in lost.stderr
    expected = weights(tmp_path / "whole", 10, tmp_path / "whole.pt")
    found = weights(tmp_path / "lost", 10, tmp_path / "lost.pt")
    assert expected.keys() == found.keys()
    assert len(expected) > 50
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
