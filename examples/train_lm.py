"""Train a language model, bounded or dense: ``python examples/train_lm.py mamba2 --interface token --steps 1000``.

A run is a folder: ``metrics.jsonl``, ``checkpoint.pt``, ``tokenizer.json`` for byte-pair tokens, ``curves.png`` with
``--plot``. The same command with ``--resume`` goes on where the checkpoint stands, to the same weights bit for bit as a
run that was never stopped; with ``--forward parallel``, whose guesses are not saved, up to its tolerance. There
``metrics.jsonl`` has the iterations and the residual of every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from command import Say, parser_of, run
from data import FINEWEB, ByteTokens, Corpus, PairTokens, Text, Windows, corpus, files, fineweb, library, package
from models import ARCHITECTURES, PRESETS, preset
from run_folder import draw_curves
from torch import Tensor, nn
from training import CREDITS, DENSE, Settings, make_model, train

import lbi_compile
from lbi_compile.errors import OptionError

TOKENIZER = "tokenizer.json"


def read_text(options: argparse.Namespace) -> Text:
    """The text that the command line names; by default Python's standard library."""
    if options.fineweb is not None:
        return fineweb(options.fineweb, most=options.bytes)
    return files(options.text, most=options.bytes) if options.text else library(most=options.bytes)


def read_corpus(options: argparse.Namespace, folder: Path) -> Corpus:
    """The text in tokens; a folder that has a tokenizer already keeps it."""
    text = read_text(options)
    if options.bpe is None:
        return corpus(text, ByteTokens())
    if options.resume and (folder / TOKENIZER).exists():
        return corpus(text, PairTokens.load(folder / TOKENIZER))
    tokenizer = PairTokens.train(text.train, options.bpe)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    return corpus(text, tokenizer)


def read_settings(options: argparse.Namespace, device: torch.device) -> Settings:
    """The settings that the command line gives.

    Raises:
        OptionError: Two options contradict each other.
    """
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings) if field.name != "bf16"}
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    settings = Settings(**given, bf16=precision == "bf16")
    if options.layers_shallow is None:
        return settings
    if options.interface not in ("auto", DENSE) or options.layers is not None:
        raise OptionError(
            "--layers-shallow with --interface or --layers",
            expected="the shallow control alone: it is dense, and a depth of its own",
            do="leave the other out",
        )
    layers = options.layers_shallow or preset(settings.architecture, settings.size).layers // settings.cut
    return dataclasses.replace(settings, interface=DENSE, layers=layers)


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    made = parser_of(__doc__)
    default = Settings()
    made.add_argument("architecture", choices=ARCHITECTURES, nargs="?", default=default.architecture)

    model = made.add_argument_group("model")
    model.add_argument("--size", choices=PRESETS, default=default.size)
    model.add_argument("--layers", type=int, help="blocks, in place of the size's")
    model.add_argument("--length", type=int, help="positions T, in place of the size's")
    model.add_argument("--interface", default=default.interface, help="of transform; dense: train the model itself")
    model.add_argument("--credit", choices=CREDITS, default=default.credit, help="how regions are taught")
    model.add_argument("--regions", type=int, metavar="K", help="regions, in place of the size's")
    model.add_argument("--r", type=int, default=default.r, help="latent width")
    for name in ("cell", "finish", "readout", "backward"):
        model.add_argument(f"--{name}", default="auto", help="of transform")
    model.add_argument("--forward", default=default.forward, help="of transform: sequential, parallel, ...")
    model.add_argument("--tol", type=float, metavar="X", help="of transform: residual of a parallel forward")
    model.add_argument("--allow-leak", action="store_true", help="let positions see later ones, as published")
    model.add_argument(
        "--layers-shallow",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="the shallow control: dense, with N layers or those of one region",
    )

    text = made.add_argument_group("text")
    text.add_argument("--text", type=Path, nargs="+", default=(), metavar="PATH", help="files, or folders of *.txt")
    text.add_argument("--fineweb", type=Path, nargs="*", metavar="PARQUET", help=f"{FINEWEB}, or files of its schema")
    text.add_argument("--bytes", type=int, default=8_000_000, metavar="N", help="read about N bytes (%(default)s)")
    text.add_argument("--bpe", type=int, metavar="V", help="byte-pair tokens learned from the text, not bytes")

    training = made.add_argument_group("training")
    for name, kind in (
        ("steps", int),
        ("batch", int),
        ("accumulate", int),
        ("learning_rate", float),
        ("warmup", int),
        ("last_rate", float),
        ("weight_decay", float),
        ("clip", float),
        ("seed", int),
        ("evaluate_every", int),
        ("evaluate_on", int),
    ):
        flag = f"--{name.replace('_', '-')}"
        training.add_argument(flag, type=kind, default=getattr(default, name), help="default %(default)s")
    training.add_argument(
        "--precision", choices=("auto", "float32", "bf16"), default="auto", help="auto: bf16 on a GPU"
    )
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--compile", action="store_true", help="torch.compile, with the backend lbi where bounded")

    kept = made.add_argument_group("run")
    kept.add_argument("--out", type=Path, default=Path("run"), help="folder of the run")
    kept.add_argument("--resume", action="store_true", help="go on from the checkpoint where there is one")
    kept.add_argument("--stop-after", type=int, metavar="N", help="stop at step N; --resume goes on")
    kept.add_argument("--checkpoint-every", type=int, default=500, metavar="N")
    kept.add_argument(
        "--norms-every", type=int, default=0, metavar="N", help="record norms of interface Jacobians every N steps"
    )
    kept.add_argument("--plot", action="store_true", help="draw curves.png")
    return made


def train_one(options: argparse.Namespace, say: Say) -> None:
    """Make the run that the options describe."""
    if options.plot:
        package("matplotlib", needed_for="curves")
    device = torch.device(options.device)
    settings = read_settings(options, device)
    tokens = read_corpus(options, options.out)
    counts = f"{len(tokens.train)} tokens of {tokens.vocabulary} kinds, {len(tokens.held_out)} held out"
    say(f"{tokens.source}: {counts}")
    data = Windows(tokens.train, length=settings.positions, seed=settings.seed)
    held_out = Windows(tokens.held_out, length=settings.positions)  # the same ones for every seed
    example = data.batch(0, 2)[0].to(device)
    model = make_model(settings, example, vocabulary=tokens.vocabulary)
    say(f"{sum(parameter.numel() for parameter in model.parameters())} parameters, interface {settings.interface}")
    result = train(
        model,
        data,
        held_out,
        settings,
        folder=options.out,
        resume=options.resume,
        lengths=tokens.lengths,
        fingerprint=tokens.fingerprint,
        stop_after=options.stop_after,
        checkpoint_every=options.checkpoint_every,
        run=compiled(model) if options.compile else None,
        norms_every=options.norms_every,
    )
    for name, value in {**result.held_out, "seconds": result.seconds}.items():
        say(f"{name}: {value:.4g}")
    say(f"engine: {result.engine}")
    if options.plot:
        say(f"curves: {draw_curves(options.out)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return run(parser(), arguments, train_one)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of a model, with the backward of its regions where it is bounded.

    Args:
        model: Dense, or bounded and built.
    """
    bounded = isinstance(model, lbi_compile.BoundedModule)
    return torch.compile(model, backend="lbi") if bounded else torch.compile(model)


if __name__ == "__main__":
    sys.exit(main())
