"""The command line: ``lbi-compile`` and ``python -m lbi_compile``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch

from . import demo, engines, sources
from .analysis import locate
from .bench import arguments as bench_arguments
from .bounded import LOCAL
from .capture import as_inputs, capture
from .errors import LBIError, OptionError, PlanError
from .plan import EXACT, Plan
from .render import files as drawings
from .render.graph import picture
from .render.report import ReportView
from .render.text import show
from .render.tree import PlanView

OK, NOT_OK, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; by default what the process was started with.

    Returns:
        0 where all is well, 1 where a check failed, 2 where the command could not run, 130 after Ctrl-C.

    Example:
        >>> main(["inspect", "hf:gpt2", "--set", "n_layer=4", "--regions", "2"])  # doctest: +SKIP
    """
    options = _parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _quiet_interrupt():
            return options.run(options)
    except LBIError as error:
        print(f"lbi-compile {options.command}: {type(error).__name__}\n  {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"lbi-compile {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_OK


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """Let Ctrl-C silence warnings first: autograd meets it as an error and warns of it with a traceback."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        warnings.simplefilter("ignore")
        signal.default_int_handler(number, frame)

    # a handler of the program around us, or a thread that may set none, stays as it is
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    with warnings.catch_warnings():
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)


def _inspect(options: argparse.Namespace) -> int:
    from . import transform

    files = _files(options)
    model, inputs = _load(options)
    bounded = transform(model, inputs, **_cut(options), credit=options.credit, **_training_side(options))
    local = bounded.credit is not None
    engine = LOCAL if local else engines.choose(bounded.backward, boundaries=bounded.boundaries)
    _print_plan(PlanView(bounded.plan, engine=str(engine), why=options.why), options)
    _draw(files, model, inputs, bounded.plan, engine=str(engine))
    return OK


def _plan(options: argparse.Namespace) -> int:
    from . import plan

    files = _files(options)
    planner = _planner(options)
    model, inputs = _load(options)
    made = plan(model, inputs, **_cut(options), credit=options.credit)
    if planner is None:
        _print_plan(PlanView(made, why=options.why), options)
    else:
        found = planner(model, inputs, made)
        if options.json:
            print(json.dumps({"plan": json.loads(made.to_json()), "costs": found.record()}, indent=2))
        else:
            show(PlanView(made, why=options.why))
            show(planner.view(found))
        planner.draw(found)
    _draw(files, model, inputs, made)
    return OK


def _planner(options: argparse.Namespace) -> Any:
    """The planner with its options, read before the work; ``None`` where it was not asked for."""
    asked = [name for name in _PLANNER_OPTIONS if getattr(options, name.replace("-", "_")) not in (None, False)]
    if options.devices is None:
        if asked:
            raise OptionError(f"--{asked[0]} without --devices", expected="both", do="say how many devices there are")
        return None
    from .planner import Planner  # sympy takes a while to import

    return Planner.of(options)


def _verify(options: argparse.Namespace) -> int:
    from . import transform, verify

    model, inputs = _load(options)
    bounded = transform(model, inputs, **_cut(options), credit=options.credit, **_training_side(options))
    report = verify(bounded, inputs, ablate=True) if options.ablate else verify(bounded, inputs)
    _print_record(report) if options.json else show(ReportView(report))
    return OK if report.ok else NOT_OK


def _demo(options: argparse.Namespace) -> int:
    training = demo.Training(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(demo.Training)}
    )
    result = demo.run(training, quiet=options.json, backward=options.backward, **_cut(options))
    if options.json:
        _print_record(result)
    return OK if result.ok else NOT_OK


def _bench(options: argparse.Namespace) -> int:
    from .bench import command  # what it measures with takes a while to import

    return OK if command.run(options, options.arguments) else NOT_OK


def _load(options: argparse.Namespace) -> sources.Loaded:
    torch.manual_seed(options.seed)
    if ".py:" in options.model:
        print(f"running the code of {options.model}", file=sys.stderr)
    return sources.load(options.model, overrides=dict(options.set), batch=options.batch, length=options.length)


def _print_plan(view: PlanView, options: argparse.Namespace) -> None:
    print(view.plan.to_json()) if options.json else show(view)


def _files(options: argparse.Namespace) -> dict[str, Path]:
    """The drawings that were asked for; a wrong path is told before the work, not after it."""
    wanted = {form: path for form in drawings.FORMS if (path := getattr(options, form)) is not None}
    drawings.check(wanted)
    return wanted


def _draw(files: dict[str, Path], model: Any, inputs: Any, plan: Plan, *, engine: str | None = None) -> None:
    if files:
        analysis = locate(model, capture(model, as_inputs(model, inputs)), plan)
        for line in drawings.write(picture(analysis, engine=engine), files):
            print(line, file=sys.stderr)


def _print_record(record: Any) -> None:
    print(json.dumps({"ok": record.ok, **dataclasses.asdict(record)}, indent=2))


def _cut(options: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(options, name) for name in ("r", "interface", "cell", "finish", "readout")}
    return {"regions": _regions(options.regions), **named}


def _training_side(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("backward", "forward", "tol", "max_iters", "seed")}


def _regions(text: str) -> int | list[str] | Plan:
    if text.lstrip("-").isdigit():
        return int(text)
    if not text.endswith(".json"):
        return text.split(",")
    try:
        return Plan.from_json(Path(text).read_text())
    except OSError as error:
        raise PlanError(
            f"{text}: {error.strerror}", expected="a plan that `lbi-compile plan --json` wrote", do="look at the path"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lbi-compile", description="Cut a PyTorch model into regions that exchange only small latents."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, run, text in (
        ("inspect", _inspect, "transform a model and show its regions"),
        ("plan", _plan, "show where a model would be cut, and insert nothing"),
        ("verify", _verify, "transform a model and check its gradients, leaks and Jacobians"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        _add_source(command)
        _add_cut(command, regions=8)
        command.add_argument(
            "--credit",
            default=EXACT,
            metavar="NAME",
            help="how regions are taught: exact, sid, hbll (default: %(default)s)",
        )
        if run is not _plan:
            _add_backward(command, "auto")
            _add_forward(command)
        if run is _plan:
            _add_planner(command)
        if run is _verify:
            command.add_argument(
                "--ablate", action="store_true", help="also tell what zeroed, noised and shuffled latents change"
            )
        else:
            command.add_argument("--why", action="store_true", help="print every decision with its reason")
            for form, (_, text) in drawings.FORMS.items():
                command.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"also write {text}")
        _add_common(command)
    command = commands.add_parser(
        "demo",
        help="train a causal transformer on bytes of Python's standard library",
        description="Cut an 8-layer causal transformer, verify it, and train it on bytes of Python's standard library.",
    )
    command.set_defaults(run=_demo)
    _add_cut(command, regions=4)
    _add_backward(command, "scan")
    _add_training(command)
    _add_common(command)
    command = commands.add_parser(
        "bench",
        help="measure speed and memory against named baselines",
        description="Measure speed and memory against named baselines, in one process and turn by turn.",
    )
    command.set_defaults(run=_bench)
    bench_arguments.add(command, positive=_positive, override=_override)
    return parser


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=sources.FORMS)
    command.add_argument(
        "--set", action="append", type=_override, default=[], metavar="NAME=VALUE", help="field of an hf: configuration"
    )
    for name, value, text in (("batch", 2, "samples"), ("length", 32, "positions")):
        command.add_argument(
            f"--{name}",
            type=_positive,
            default=value,
            metavar="N",
            help=f"{text} in made-up inputs (default: %(default)s)",
        )


def _add_cut(command: argparse.ArgumentParser, *, regions: int) -> None:
    command.add_argument(
        "--regions",
        default=str(regions),
        metavar="K",
        help="how many; or paths of the modules that start all but the first, comma between; or a plan.json "
        "(default: %(default)s)",
    )
    command.add_argument("--r", type=int, default=16, metavar="R", help="latent width (default: %(default)s)")
    for name, text in (
        ("interface", "what crosses: pooled, chunked, token, token+chunked, identity, zero, self"),
        ("cell", "of token and token+chunked: gru, linear"),
        ("finish", "own: latents per position enter behind a region's last operation"),
        ("readout", "what the head reads: last, sum"),
    ):
        command.add_argument(f"--{name}", default="auto", metavar="NAME", help=f"{text} (default: auto)")


_PLANNER_OPTIONS = ("link", "latency", "flops", "device-memory", "sweep", "plot", "simulate")


def _add_planner(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("planner", "what a training step would cost on many devices")
    group.add_argument("--devices", type=_positive, metavar="N", help="print costs of schedules on N devices")
    for name, meta, text in (
        ("link", "NAME|SPEED", "nvlink, pcie, infiniband, 10gb, ethernet, home, or 100Mb/s, 3GB/s (default: nvlink)"),
        ("latency", "TIME", "of a message, such as 20ms; by default that of the link"),
        ("flops", "RATE", "FLOP/s of a device, such as 300T; by default measured here, on the model's own parts"),
        ("device-memory", "GIB", "of a device; schedules that need more are left out"),
        ("plot", "OUT.png", "draw it, with matplotlib"),
    ):
        group.add_argument(f"--{name}", metavar=meta, help=text)
    group.add_argument("--sweep", nargs="+", metavar="LETTER=N,N", help="also vary K and r: --sweep K=2,4,8 r=8,16")
    group.add_argument("--simulate", action="store_true", help="also simulate every schedule, event by event")


def _add_backward(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--backward",
        default=default,
        metavar="NAME",
        help="how adjoints are solved: auto, autograd, chain, scan (default: %(default)s)",
    )


def _add_forward(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--forward",
        default="sequential",
        metavar="NAME",
        help="how latents are found: sequential, parallel, quasi-newton, jacobi (default: %(default)s)",
    )
    command.add_argument("--tol", type=float, metavar="X", help="residual at which a parallel forward has converged")
    command.add_argument("--max-iters", type=int, metavar="N", help="most iterations of a parallel forward")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON record and nothing else")


def _add_training(command: argparse.ArgumentParser) -> None:
    default = demo.Training()
    for name, kind, text in (
        ("steps", _positive, "optimizer steps"),
        ("seconds", float, "start no step later than this"),
        ("batch", _positive, "windows in a step"),
        ("learning-rate", float, "highest rate of AdamW"),
    ):
        value = getattr(default, name.replace("-", "_"))
        command.add_argument(f"--{name}", type=kind, default=value, metavar="N", help=f"{text} (default: %(default)s)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _override(text: str) -> tuple[str, Any]:
    try:
        return sources.parse_override(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
