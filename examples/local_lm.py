"""Small byte language models under local credit: ``python examples/local_lm.py``.

One transformer, taught by backpropagation, by exact credit (LBI, its latent of each position), SID, HBLL, and region by
region with nothing that crosses. Every arm chooses its learning rate on one half of the held-out text and is judged on
the other half with three other seeds. Rows go to ``rows.jsonl`` as they are made; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from choosing import choose
from data import ByteTokens, Corpus, Windows, corpus, library
from local_report import mean
from result_rows import Rows
from rich.console import Console
from training import DENSE, Settings, make_model, train

from lbi_compile.errors import LBIError, OptionError

HOME = Path(__file__).parent / "results" / "local_lm"
CHOICE_SEED = 100
RATES = (3e-3, 6e-3, 1e-2)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("backprop", {"interface": DENSE}),
    "lbi": ("LBI", {"interface": "token"}),
    "sid": ("SID", {"credit": "sid"}),
    "hbll": ("HBLL", {"credit": "hbll"}),
    "alone": ("regions alone, no latent", {"credit": "alone"}),
}


def held_out(tokens: Corpus, split: str, *, length: int) -> Windows:
    """Windows of one half of the held-out text."""
    half = len(tokens.held_out) // 2
    return Windows(tokens.held_out[:half] if split == "validation" else tokens.held_out[half:], length=length)


def run(tokens: Corpus, settings: Settings, *, judge: str) -> dict[str, float]:
    """Train once and judge.

    Args:
        tokens: The text.
        settings: Of the run.
        judge: ``"validation"`` or ``"test"``.

    Returns:
        ``nats`` per byte.
    """
    data = Windows(tokens.train, length=settings.positions, seed=settings.seed)
    model = make_model(settings, data.batch(0, 2)[0], vocabulary=tokens.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        other = held_out(tokens, judge, length=settings.positions)
        result = train(model, data, other, settings, folder=Path(folder), quiet=True)
    return {"nats": round(result.held_out["held_out"], 4)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Settings(steps=600, length=64, layers=4, regions=4, batch=16, evaluate_every=10**9, evaluate_on=512)
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that are judged (%(default)s)")
    made.add_argument("--bytes", type=int, default=4_000_000, metavar="N", help="of the standard library (%(default)s)")
    for name in ("steps", "length", "layers", "regions", "r", "batch", "evaluate_on"):
        flag = f"--{name.replace('_', '-')}"
        made.add_argument(flag, type=int, default=getattr(default, name), metavar="N", help="default %(default)s")
    made.add_argument("--out", type=Path, default=HOME, help="folder of rows and table")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    say = Console(highlight=False, soft_wrap=True).print
    names = ("steps", "length", "layers", "regions", "r", "batch", "evaluate_on")
    sizes = {name: getattr(options, name) for name in names}
    lines = ["| arm | learning rate | nats per byte |", "|---|---|---|"]
    try:
        if min(options.seeds, options.bytes, *sizes.values()) < 1:
            raise OptionError("a number below 1", expected="sizes and seeds from 1 on", do="pass larger numbers")
        tokens = corpus(library(most=options.bytes), ByteTokens())
        rows = Rows(options.out / "rows.jsonl", command=shlex.join(["python", "examples/local_lm.py", *given]))

        def once(name: str, rate: float, *, seed: int, judge: str) -> float:
            settings = Settings(**sizes, **ARMS[name][1], evaluate_every=10**9, learning_rate=rate, seed=seed)
            what = {"arm": name, "bytes": options.bytes, **dataclasses.asdict(settings), "judge": judge}
            nats = rows.measured(what, lambda: run(tokens, settings, judge=judge))["nats"]
            say(f"{ARMS[name][0]}, rate {rate}, seed {seed}: {nats:.3f} nats per byte on {judge}")
            return nats

        for name in options.arms:
            rate = choose(
                [("rate", RATES)],
                lambda tried, name=name: -once(name, tried["rate"], seed=CHOICE_SEED, judge="validation"),
            )["rate"]
            found = [once(name, rate, seed=seed, judge="test") for seed in range(options.seeds)]
            lines.append(f"| {ARMS[name][0]} | {rate} | {mean(found, digits=3)} |")
        text = "\n".join(lines) + "\n"
        (options.out / "table.md").write_text(text)
        say(text)
    except LBIError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
