"""Random models, cut with random options: every gradient is exact, or the model is refused with a clear error.

``python -m tests.fuzz --from SEED --examples N --out FILE`` draws slices of 25 cases a seed and writes one JSON line a
case. What stands in the file is not run again. Exit code 1 where a case is silently wrong or fails unclearly.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import lbi_compile
from lbi_compile import BoundedModule, LBIError
from lbi_compile.errors import TooManyRegionsError
from lbi_compile.verify import relative_errors
from tests.dags import KINDS, SEQUENCE, WIDTH, Dag, Step, Trace, recipes, trace

SLICE = 25
SILENT = 1e-8
FLAT = ("pooled", "identity", "auto", "pooled", "identity", "zero", "self")
POSITIONS = ("token", "identity", "auto", "chunked", "token+chunked", "identity", "token", "pooled", "zero", "self")
# The scan is compiled for seconds, so that it has one case in five only.
ENGINES = ("chain",) * 6 + ("scan", "scan", "autograd", "auto")


@dataclass(frozen=True)
class Case:
    """A random model, how it is cut, and how it is called.

    Attributes:
        steps: Of the model.
        tap: The model returns a value from its middle too.
        positions: Inputs are `[B, T, 4]`.
        training: Mode.
        frozen: Every so many-th parameter is frozen; 0 for none.
        leaf: The input requires a gradient.
        options: Of ``transform``.
        batches: Sizes of the batches after the first.
    """

    steps: tuple[Step, ...]
    tap: bool
    positions: bool
    training: bool
    frozen: int
    leaf: bool
    options: dict[str, Any]
    batches: tuple[int, ...]


@st.composite
def cases(draw: Callable[..., Any], engines: Sequence[str] = ENGINES, longest: int = 9) -> Case:
    """Cases; which options go together is left to ``transform``, but for those that are always refused."""
    positions = draw(st.sampled_from([False, True, False]))
    interface = draw(st.sampled_from(POSITIONS if positions else FLAT))
    token = interface in ("token", "token+chunked")
    options = {
        "regions": draw(st.sampled_from([3, 2, 3, 4])),
        "r": draw(st.sampled_from([4, 8] if "chunked" in interface else [2, 1, 3, 4])),
        "interface": interface,
        "cell": draw(st.sampled_from(["auto", "gru", "linear"])) if token else "auto",
        "readout": draw(st.sampled_from(["auto", "auto", "sum"] if token else ["auto", "auto", "last", "sum"])),
        "backward": draw(st.sampled_from(list(engines))),
        "batch_regions": draw(st.booleans()),
        "jacobian_bytes": draw(st.sampled_from([2**28, 512])),
        "allow_leak": draw(st.booleans()),
    }
    return Case(
        tuple(draw(recipes(SEQUENCE if positions else (*KINDS, "norm", "skip", "skip", "scale"), longest=longest))),
        draw(st.booleans()),
        positions,
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 2, 3])),
        draw(st.booleans()),
        options,
        tuple(draw(st.lists(st.sampled_from([1, 2, 5]), max_size=1))),
    )


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        kind: ``"exact"``, ``"refused"`` (by an ``LBIError``), ``"no model"`` (the model itself has no gradient), or one
            of the defects ``"silent"`` (a wrong number and no exception) and ``"unclear"`` (another exception).
        note: The error, or what is wrong.
        error: Largest relative error of a gradient.
        regions: Of the bounded model.
        engine: What ran.
    """

    kind: str
    note: str = ""
    error: float = 0.0
    regions: int = 0
    engine: str = ""

    @property
    def defect(self) -> bool:
        return self.kind in ("silent", "unclear")


def judge(case: Case) -> Outcome:
    """Cut the model, and compare the engine with plain autograd, and ``identity`` with the model itself."""
    torch.manual_seed(len(case.steps))
    model = Dag(case.steps, tap=case.tap).double().train(case.training)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not case.frozen or i % case.frozen != 0)
    inputs = [_input(case, batch) for batch in (3, *case.batches)]
    try:
        expected = [trace(model, lambda x=x: model(x), {"x": x}) for x in inputs]
    except RuntimeError as error:
        return Outcome("no model", str(error).partition("\n")[0])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        bounded = _cut(model, inputs[0].detach(), case.options)
        worst, wrong = 0.0, []
        for x, whole in zip(inputs, expected, strict=True):
            oracle = _traced(bounded, x, "autograd")
            found = _traced(bounded, x, case.options["backward"])
            pairs = [("autograd", found, oracle)]
            if bounded.plan.interface == "identity" or len(bounded.plan.regions) == 1:
                pairs.append(("the model", found, whole))
            for name, got, wanted in pairs:
                error, what = _difference(got, wanted)
                worst = max(worst, error)
                wrong += [f"batch {len(x)} against {name}: {one}" for one in what]
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])]
        wrong += [f"the model's {name} was changed" for name in changed]
    except LBIError as error:
        return Outcome("refused", f"{type(error).__name__}: {error.found}")
    except Exception as error:
        return Outcome("unclear", f"{type(error).__name__}: {error}"[:600])
    kind = "silent" if wrong else "exact"
    return Outcome(kind, "; ".join(wrong)[:600], worst, len(bounded.plan.regions), bounded.engine.name)


def _input(case: Case, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 6, WIDTH) if case.positions else (batch, WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(case.leaf)


def _cut(model: Dag, x: Tensor, options: dict[str, Any]) -> BoundedModule:
    """As many regions as asked for, or as the model has places for."""
    try:
        return lbi_compile.transform(model, x, **options)
    except TooManyRegionsError as error:
        fits = re.search(r"at most (\d+)", str(error))
        if fits is None:
            raise
        return lbi_compile.transform(model, x, **{**options, "regions": int(fits[1])})


def _traced(bounded: BoundedModule, x: Tensor, engine: str) -> Trace:
    with bounded.with_engine(engine):
        return trace(bounded, lambda: bounded(x), {"x": x})


def _difference(got: Trace, wanted: Trace) -> tuple[float, list[str]]:
    gradients = {name: wanted.gradients.get(name) for name in got.gradients}
    errors = relative_errors(got.gradients, gradients if "lbi." in "".join(gradients) else wanted.gradients)
    outputs = zip(got.outputs, wanted.outputs, strict=True)
    wrong = [f"gradient of {name} off by {error:.1e}" for name, error in errors.items() if not error <= SILENT]
    wrong += [f"output {i}" for i, (a, b) in enumerate(outputs) if not torch.allclose(a, b, 1e-9, 1e-9)]
    wrong += [f"buffer {name}" for name, b in got.buffers.items() if not torch.allclose(b, wanted.buffers[name])]
    if not torch.equal(got.random, wanted.random):
        wrong.append("random state")
    return max(errors.values(), default=0.0), wrong


def drawn(number: int, count: int = SLICE, **options: Any) -> list[Case]:
    """The cases of one seed, always the same ones."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(**options))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--from", dest="start", type=int, default=0, metavar="SEED", help="first seed")
    parser.add_argument("--examples", type=int, default=1500, help="cases in all, 25 a seed")
    parser.add_argument("--out", type=Path, help="JSON lines; cases in it are not run again")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known: dict[tuple[int, int], dict[str, Any]] = {}
    if options.out is not None and options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        known = {(row["seed"], row["index"]): row for row in rows}
    counts: Counter[str] = Counter()
    for number in range(options.start, options.start - (-options.examples // SLICE)):
        for index, case in enumerate(drawn(number)):
            row = known.get((number, index))
            if row is None:
                begin = time.perf_counter()
                torch._dynamo.reset()
                row = {"seed": number, "index": index, **asdict(judge(case))}
                row["seconds"] = round(time.perf_counter() - begin, 2)
                if row["kind"] in ("silent", "unclear"):
                    row["case"] = repr(case)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            counts[row["kind"]] += 1
            counts[f"{row['kind']} by {row['engine']}"] += row["kind"] == "exact"
            if row["kind"] in ("silent", "unclear"):
                print(f"seed {number}, case {index}: {row['kind']}: {row['note']}", flush=True)
    print(json.dumps({name: count for name, count in sorted(counts.items()) if count}))
    return 1 if counts["silent"] or counts["unclear"] else 0


if __name__ == "__main__":
    sys.exit(main())
