"""Many training steps with random batch sizes: memory stays flat, nothing is compiled again, and losses stay exact.

``python -m tests.soak`` trains a tiny residual MLP in float64 and prints one line per thousand steps; exit code 1 where
memory grew by 2 % or more after step 1,000, a graph was compiled after the first three steps of each form, or a loss
differs from that of a copy which was trained on the same batches by the autograd engine by more than 1e-5 of it.

Two forms take turns: odd thousands of steps run the bounded model with its scan, even ones ``torch.compile(bounded)``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import lbi_compile
from tests.models import ResidualMLP

GROWTH = 0.02
LOSS = 1e-5
LARGEST_BATCH = 32


@dataclass
class Soak:
    """What was seen.

    Attributes:
        steps: Steps run.
        losses: Relative difference of the loss from that of the copy, by step.
        growth: Growth of memory after the first thousand steps (or tenth, if steps are fewer), as a share of it.
        late: Graphs that were compiled after the first three steps of each form.
        seconds: In all.
        rows: One for each thousand steps.
    """

    steps: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    growth: float = 0.0
    late: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.growth < GROWTH and not self.late and all(error <= LOSS for error in self.losses.values())


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def graphs() -> int:
    """Graphs that Dynamo has compiled so far."""
    return counters["stats"]["unique_graphs"]


def soak(
    steps: int = 10_000,
    *,
    every: int = 1000,
    backend: str = "aot_eager",
    memory: Callable[[], int] = resident,
    show: Callable[[str], None] = lambda _: None,
) -> Soak:
    """Train, and look every so many steps.

    Args:
        steps: Optimizer steps.
        every: Steps from one look to the next; the engines take turns by it.
        backend: Of ``torch.compile`` for the second form.
        memory: Bytes in use.
        show: Gets one line for each look.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = ResidualMLP(6, width=8, depth=4, classes=3).double()
    bounded = lbi_compile.transform(model, torch.randn(3, 6, dtype=torch.float64), regions=4, r=2, backward="scan")
    twin = copy.deepcopy(bounded)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (bounded, twin)]
    forms = {"scan": bounded, f"compiled by {backend}": torch.compile(bounded, backend=backend, dynamic=True)}
    teacher = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    found, begin = Soak(), time.perf_counter()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        return x, (x @ teacher).argmax(1)

    for form in forms.values():  # both are compiled before it begins, for batches of any size
        for size in (2, 5, 1):
            x, y = batch(size)
            F.cross_entropy(form(x), y).backward()
    bounded.zero_grad()
    early, base = graphs(), 0
    for step in range(1, steps + 1):
        name = list(forms)[(step - 1) // every % 2]
        x, y = batch(int(torch.randint(1, LARGEST_BATCH + 1, (), generator=generator)))
        loss = F.cross_entropy(forms[name](x), y)
        with twin.with_engine("autograd"):
            exact = F.cross_entropy(twin(x), y)
        for one, optimizer in zip((loss, exact), optimizers, strict=True):
            one.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % every == 0:
            found.losses[step] = abs(loss.item() - exact.item()) / abs(exact.item())
            used = memory()
            base = base or used
            found.growth = used / base - 1
            row = {"step": step, "form": name, "loss": loss.item(), "error": found.losses[step], "MiB": used / 2**20}
            found.rows.append({**row, "graphs": graphs(), "seconds": round(time.perf_counter() - begin, 1)})
            show(json.dumps(found.rows[-1]))
    found.steps, found.late, found.seconds = steps, graphs() - early, time.perf_counter() - begin
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument(
        "--backend", default="aot_eager", help="of torch.compile, for the compiled form: lbi, inductor, aot_eager"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = soak(
        options.steps,
        every=max(options.steps // 10, 1),
        backend=options.backend,
        show=functools.partial(print, flush=True),
    )
    print(json.dumps({name: value for name, value in asdict(found).items() if name != "rows"} | {"ok": found.ok}))
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
