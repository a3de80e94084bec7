"""Small byte language models under local credit: ``python examples/local_lm.py``.

One transformer, taught by backpropagation, by exact credit (LBI, its latent of each position), SID, HBLL, and region by
region with nothing that crosses. Every arm chooses its learning rate on one half of the held-out text and is judged on
the other half with three other seeds. Rows go to ``rows.jsonl`` as they are made; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from choosing import choose
from command import Say, add_sizes, at_least_one, parser_of, study
from data import ByteTokens, Corpus, Windows, corpus, library
from local_report import mean
from result_rows import Rows
from training import DENSE, Settings, make_model, train

HOME = Path(__file__).parent / "results" / "local_lm"
CHOICE_SEED = 100
RATES = (5e-3, 2.5e-3, 1e-2)
DEFAULT = Settings(steps=250, length=64, layers=4, regions=4, batch=16, evaluate_every=10**9, evaluate_on=512)
SIZES = ("steps", "length", "layers", "regions", "r", "batch", "evaluate_on")
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("backprop", {"interface": DENSE}),
    "lbi": ("LBI", {"interface": "token"}),
    "sid": ("SID", {"credit": "sid"}),
    "sid-add": ("SID, beliefs multiplied", {"credit": "sid-add"}),
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
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that are judged (%(default)s)")
    made.add_argument("--bytes", type=int, default=4_000_000, metavar="N", help="of the standard library (%(default)s)")
    add_sizes(made, DEFAULT, SIZES)
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Study all arms that are asked for; returns the table."""
    sizes = {name: getattr(options, name) for name in SIZES}
    at_least_one(options.seeds, options.bytes, *sizes.values())
    tokens = corpus(library(most=options.bytes), ByteTokens())
    lines = ["| arm | learning rate | nats per byte |", "|---|---|---|"]

    def once(name: str, rate: float, *, seed: int, judge: str) -> float:
        settings = dataclasses.replace(DEFAULT, **sizes, **ARMS[name][1], learning_rate=rate, seed=seed)
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
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return study("local_lm", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
