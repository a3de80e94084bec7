"""Which rank is to blame when ranks stop answering: a heartbeat beside training, and an error that names it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore

from .._torch import default_store
from ..errors import LBIError, RankLostError
from .clipping import region_parallel
from .module import RegionParallel

# What process groups say where another rank does not answer; Gloo raises plain RuntimeErrors.
_LOST = re.compile("gloo|NCCL|[Cc]onnection|Timed out|Broken pipe|Socket|recvValue|Store", re.DOTALL)
BEAT, FAILED, DONE = "beat", "failed", "done"


@contextlib.contextmanager
def watch(module: nn.Module, *, interval: float = 1.0) -> Iterator[None]:
    """Train inside; where another rank is killed, hangs or fails, the error says which, and at which step.

    A thread tells the other ranks every ``interval`` seconds that this one is alive, through the store of the process
    group. When an exchange fails (at once where a process is gone, after the process group's own timeout where one
    hangs), ranks that tell nothing any more and have not failed because of another are to blame; else the rank whose
    own error came first; else the one that has come least far.

    Args:
        module: What ``parallelize`` returned, or a wrapper around it.
        interval: Seconds between two signs of life. Finding out who is silent takes a few of them.

    Raises:
        RankLostError: Another rank stopped taking part. (This rank's own errors are raised as they are.)

    Example:
        >>> dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        >>> with lbi_compile.distributed.watch(parallel):
        ...     for x, y in batches:
        ...         train_step(parallel, x, y)
    """
    pulse = _Pulse(region_parallel(module), interval)
    pulse.start()
    try:
        yield
    except LBIError:
        pulse.tell(FAILED, "its own error")
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            pulse.tell(FAILED, f"{type(error).__name__}: {_line(error)}")
            raise
        blamed = pulse.blame(error)
        pulse.tell(FAILED, "", because_of=blamed.rank)
        raise blamed.error from error
    except BaseException as error:
        pulse.tell(FAILED, f"{type(error).__name__}: {_line(error)}")
        raise
    else:
        pulse.tell(DONE, "")
    finally:
        pulse.stop()


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
        return False
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


class _Blame:
    """A rank, and the error that names it."""

    def __init__(self, rank: int | None, error: RankLostError) -> None:
        self.rank, self.error = rank, error


class _Pulse:
    """The heartbeat of one rank."""

    def __init__(self, parallel: RegionParallel, interval: float) -> None:
        self.parallel, self.interval = parallel, interval
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # a store of its own: requests of another thread would wait for those of this one
        self.store = PrefixStore("lbi/watch", default_store().clone())
        self.beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lbi heartbeat", daemon=True)

    def start(self) -> None:
        for kind in (FAILED, DONE):  # of a watch before this one
            with contextlib.suppress(RuntimeError):
                self.store.delete_key(f"{kind}/{self.rank}")
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(2 * self.interval)

    def tell(self, kind: str, text: str, *, because_of: int | None = None) -> None:
        """Tell the others how this rank ended."""
        record = {"step": self.parallel.steps, "text": text, "because": because_of, "when": time.time()}
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{kind}/{self.rank}", json.dumps(record))

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self._beat()
            except RuntimeError:
                return  # nobody to tell any more

    def _beat(self) -> None:
        self.beats += 1
        record = {"beat": self.beats, "step": self.parallel.steps, "exchanges": self.parallel.ranks.exchanges}
        self.store.set(f"{BEAT}/{self.rank}", json.dumps(record))

    def _read(self, kind: str) -> dict[int, dict[str, Any]]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world) if rank != self.rank}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def blame(self, error: RuntimeError) -> _Blame:
        """Find out whose fault an error is."""
        where = "; ".join(getattr(error, "__notes__", [])) or "an exchange"
        try:
            rank, step, why = self._culprit()
        except RuntimeError:
            rank, step, why = None, self.parallel.steps, "the store of the process group does not answer"
        who = "a rank that cannot be told" if rank is None else f"rank {rank}"
        lost = RankLostError(
            f"{who} stopped taking part at step {step} ({why}); rank {self.rank} was at step {self.parallel.steps}, in"
            f" {where}: {_line(error)}",
            expected="all ranks to take part in every step",
            do="start again from the last checkpoint; torchrun --max-restarts does so by itself",
        )
        return _Blame(rank, lost)

    def _culprit(self) -> tuple[int | None, int, str]:
        first = self._read(BEAT)
        for _ in range(4):
            time.sleep(self.interval)
            failed = self._read(FAILED)
            own = {rank: record for rank, record in failed.items() if record["because"] is None}
            if own:
                rank = min(own, key=lambda r: own[r]["when"])
                return rank, own[rank]["step"], own[rank]["text"]
        beats, done = self._read(BEAT), self._read(DONE)
        for rank in (r for r in range(self.world) if r != self.rank and r not in failed and r not in done):
            before, after = first.get(rank), beats.get(rank)
            if after is None or (before is not None and before["beat"] == after["beat"]):
                # its last word may be older: what is missing is its part in this rank's step
                return rank, self.parallel.steps, "no sign of life: killed, hung, or cut off"
        named = [record["because"] for record in failed.values() if record["because"] is not None]
        if named:
            return named[0], self.parallel.steps, "as another rank found"
        if beats:
            rank = min(beats, key=lambda r: beats[r]["exchanges"])
            if beats[rank]["exchanges"] < self.parallel.ranks.exchanges:
                behind = self.parallel.ranks.exchanges - beats[rank]["exchanges"]
                return rank, beats[rank]["step"], f"alive, but {behind} exchanges behind"
        return None, self.parallel.steps, "all others show signs of life"
