"""A rank that is killed, hangs or runs out of memory is named by all others, and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lbi_compile import LBIError, RankLostError
from lbi_compile.distributed import parallelize, watch
from tests import ranks
from tests.distributed_models import bound

WORLD, CULPRIT, STEP = 3, 1, 3
# of the process group: how long a hung rank is waited for
TIMEOUT = 10.0


class Out(torch.autograd.Function):
    """Fails in the forward or in the backward."""

    @staticmethod
    def forward(ctx: Any, fail: Any, x: Tensor) -> Tensor:
        ctx.fail = fail
        fail("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.fail("backward")
        return None, grad


def _die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hung":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "memory":
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")


def _train(rank: int, folder: Path, how: str, where: str) -> None:
    """Steps until a rank fails at one of them; writes down what the others say."""
    bounded, _ = bound("transformer", (("interface", "token"),))
    parallel = parallelize(bounded, ranks.mesh(WORLD))

    def fail(place: str) -> None:
        if rank == CULPRIT and parallel.steps == STEP and place == where:
            (folder / "when").write_text(str(time.time()))
            _die(how)

    body = parallel._known[True, *next(iter(parallel._known))[1:]][0].regions[parallel.own[0]].body
    run = body.run

    def failing(values: dict[str, Any]) -> None:
        run(values)
        values[body.outputs[0]] = Out.apply(fail, values[body.outputs[0]])

    body.run = failing
    gather = parallel.ranks.all_gather

    def gathering(*args: Any, **kwargs: Any) -> Tensor:
        fail("collective")
        return gather(*args, **kwargs)

    parallel.ranks.all_gather = gathering
    try:
        with watch(parallel, interval=0.5):
            for number in range(6):
                x = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(number))
                F.cross_entropy(parallel(x).flatten(0, 1), x.flatten()).backward()
    except LBIError as error:
        (folder / f"{rank}.said").write_text(f"{time.time()} {type(error).__name__} {error.found}")
        os._exit(3)
    except torch.OutOfMemoryError:
        os._exit(4)


CASES = [(how, where) for how in ("killed", "hung", "memory") for where in ("forward", "backward", "collective")]
QUICK = (("killed", "backward"), ("memory", "forward"))


@pytest.mark.parametrize(
    ("how", "where"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_others_name_the_rank_and_the_step(how: str, where: str, tmp_path: Path):
    for attempt in range(1 if (how, where) in QUICK else 3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        codes = ranks.start(
            WORLD, _train, folder, how, where, timeout=TIMEOUT, stop=(CULPRIT,) if how == "hung" else ()
        )
        when = float((folder / "when").read_text())
        for rank in set(range(WORLD)) - {CULPRIT}:
            assert codes[rank] == 3
            said_at, kind, found = (folder / f"{rank}.said").read_text().split(" ", 2)
            assert kind == RankLostError.__name__
            assert found.startswith(f"rank {CULPRIT} stopped taking part at step {STEP}")
            assert float(said_at) - when < 10 * TIMEOUT  # the process group's timeout, and a loaded machine
        assert codes[CULPRIT] == {"killed": -signal.SIGKILL, "hung": -signal.SIGKILL, "memory": 4}[how]
