"""Random numbers that do not depend on how many ranks there are."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator

import torch

from ..passes.insert import Program
from ..passes.liveness import is_random


def draws(program: Program, *, head: bool = False) -> bool:
    """Whether a region of the program draws random numbers, or its head where that is asked too."""
    pieces = [piece for region in program.regions for piece in (region.body, region.finish) if piece is not None]
    pieces += [program.head] if head else []
    return any(is_random(node) for piece in pieces for node in piece.code.graph.nodes)


class Draws:
    """Random numbers of one call: every run of a region has a generator of its own.

    One number is drawn from the global generator, which all ranks of the region dimension have in the same state; the
    n-th run of region k draws from generators seeded by that number, k and n. So regions draw the same numbers wherever
    they run, and the global generators of all ranks stay alike.

    Args:
        program: What runs. If its regions draw nothing, nothing is drawn here.
        device: Where it runs.
        head: The head draws here too, as region K.
    """

    def __init__(self, program: Program, device: torch.device, *, head: bool = False) -> None:
        self.device = device
        self.base = int(torch.randint(0, 2**62, (), device="cpu")) if draws(program, head=head) else None
        self._runs: Counter[int] = Counter()

    @contextlib.contextmanager
    def region(self, k: int) -> Iterator[None]:
        """Inside, random numbers are those of the next run of region ``k``."""
        if self.base is None:
            yield
            return
        self._runs[k] += 1
        text = f"{self.base} {k} {self._runs[k]}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            yield

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, runs of regions draw what the next runs will draw again."""
        before = self._runs.copy()
        try:
            yield
        finally:
            self._runs = before
