"""The arguments of ``bench``; apart from what they run, so that other commands need not import it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbi_compile import sources


def add(command: argparse.ArgumentParser, *, positive: Callable[[str], int], override: Callable[[str], Any]) -> None:
    """Add ``scan``, ``step``, ``transform`` and ``parallel`` to the parser of ``bench``.

    Args:
        command: The parser.
        positive: Reads a number of at least 1.
        override: Reads ``NAME=VALUE``.
    """
    benches = command.add_subparsers(dest="bench", required=True, metavar="what")

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(positive(part) for part in text.split(","))

    def add_one(name: str, text: str) -> argparse.ArgumentParser:
        return benches.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    def option(parser: argparse.ArgumentParser, name: str, kind: Any, default: Any, meta: str, text: str) -> None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        end = "" if default is None else f" (default: {shown})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=meta, help=f"{text}{end}")

    scan = add_one("scan", "the suffix scan against other ways to solve the same recursion")
    option(scan, "indices", numbers, (1, 64), "N,N", "independent indices")
    option(scan, "regions", numbers, (8, 64), "K,K", "Jacobians in a row")
    option(scan, "r", numbers, (4, 16), "R,R", "latent width")

    step = add_one("step", "one training step under every engine, against autograd and compilers")
    step.add_argument("case", choices=("mlp", "transformer"), help="deep narrow model to train")
    option(step, "batch", numbers, (1, 8), "B,B", "samples")
    option(step, "length", numbers, (1, 8, 32, 128), "T,T", "positions, transformer only")
    option(step, "interface", str, None, "NAME", "pooled or token; by default what suits the case")

    for parser in (scan, step):
        option(parser, "dtype", str, "float32", "NAME", "float64, float32 or bfloat16")
        option(parser, "rounds", positive, 20, "N", "how often each variant is timed")
        option(parser, "variants", lambda text: tuple(text.split(",")), None, "A,B", "only these")
        option(parser, "compile-limit", float, 600.0, "S", "seconds after which a variant that compiles is given up")
        parser.add_argument(
            "--clock",
            choices=("wall", "process"),
            default="wall",
            help="on a CPU: time that passes, or time of this process alone, for a machine others use (default: wall)",
        )
        parser.add_argument("--memory", action="store_true", help="measure the peak memory of one run too")
        parser.add_argument("--cuda-graphs", action="store_true", help="replay every variant as a CUDA graph")

    transform = add_one("transform", "seconds and memory of capture, passes and insertion")
    transform.add_argument("model", help=f"{sources.FORMS}, case:mlp or case:transformer")
    transform.add_argument("--set", action="append", type=override, default=[], metavar="NAME=VALUE", help="hf: field")
    option(transform, "batch", positive, 2, "B", "samples")
    option(transform, "length", positive, 32, "T", "positions")

    for parser in (step, transform):
        for name, meta, text in (
            ("layers", "L", "layers of the case, a multiple of the regions"),
            ("width", "D", "width of a layer of the case"),
            ("regions", "K", "regions"),
            ("r", "R", "latent width"),
        ):
            option(parser, name, positive, None, meta, f"{text}; by default what the case is known for")

    parallel = add_one("parallel", "training on several processes by every schedule, beside the planner's closed forms")
    parallel.add_argument(
        "case",
        choices=("lm", "classifier", "lean"),
        help="what to train: a transformer, or one with few FLOPs for each byte that pipelines send (lean)",
    )
    option(parallel, "ranks", positive, 2, "N", "processes, of one thread each")
    option(parallel, "batch", numbers, (1, 2, 8), "B,B", "samples")
    option(parallel, "micro-batches", numbers, (1, 2, 4, 8), "M,M", "of pipelines")
    option(parallel, "variants", lambda text: tuple(text.split(",")), None, "A,B", "only these: token,gpipe,...")
    for name, default, meta, text in (
        ("layers", 8, "L", "layers, a multiple of the regions"),
        ("width", 256, "D", "width"),
        ("length", 256, "T", "positions"),
        ("regions", 8, "K", "regions"),
        ("r", 16, "R", "latent width"),
        ("rounds", 10, "N", "how often each schedule is timed"),
    ):
        option(parallel, name, positive, default, meta, text)
    option(parallel, "readout", str, "auto", "NAME", "of pooled and chunked latents: last, sum or auto")
    option(parallel, "reduce", str, "auto", "NAME", "what ranks add up: canvas, stem or auto")
    option(parallel, "head", str, "all", "NAME", "of pooled and chunked latents, read out last: on all ranks or last")
    limits = "limit ranks' links to X Mb/s, one speed after another, none for no limit; needs root and iproute2"
    option(parallel, "mbit", _speeds, None, "X,X", limits)
    option(parallel, "delay", float, 0.0, "MS", "milliseconds by which limited links hold messages back")
    option(parallel, "seed", int, 0, "N", "of all random numbers")
    option(parallel, "json", Path, None, "OUT", "write the record, every round of it, to this file")

    for parser in (scan, step, transform):
        option(parser, "device", str, "cpu" if parser is transform else "auto", "NAME", "cpu, cuda or auto")
        option(parser, "threads", positive, 1, "N", "of torch, within one operator")
        option(parser, "seed", int, 0, "N", "of all random numbers")
        option(parser, "json", Path, None, "OUT", "write the record, every round of it, to this file")
        option(parser, "plot", Path, None, "OUT.png", "draw the medians, with matplotlib")


def _speeds(text: str) -> tuple[float | None, ...]:
    return tuple(None if part == "none" else float(part) for part in text.split(","))
