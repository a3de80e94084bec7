"""The commands, through ``main`` and once as a process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lbi_compile import Plan, cli, demo
from tests import records

MODELS = """
import torch
from lbi_compile.demo_model import CausalTransformer

def text():
    return CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16), torch.randint(13, (2, 8))

def number():
    return 3, torch.zeros(2)
"""
CUT = ("--regions", "4", "--r", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODELS)
    return f"{path}:text"


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command at 80 columns; gives its exit code and what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    return run


def test_inspect_shows_every_part(run, text):
    code, out, err = run("inspect", text, *CUT)
    assert code == 0
    assert "4 regions, latent width r = 3" in out
    for word in ("prologue", "stem", "region 0", "region 3", "head", "separator", "m_1 (token", "backward"):
        assert word in out
    assert "blocks.1" in out
    assert "engine     auto (at the first training steps" in out
    assert "\nwhy\n" not in out
    assert "\x1b" not in out
    assert err == f"running the code of {text}\n"


def test_inspect_why_adds_reasons(run, text):
    _, out, _ = run("inspect", text, *CUT, "--why")
    assert "\nwhy\n" in out
    assert "\npasses\n" in out


def test_columns_decide_the_width(run, text, monkeypatch):
    _, narrow, _ = run("plan", text, *CUT, "--why")
    monkeypatch.setenv("COLUMNS", "140")
    _, wide, _ = run("plan", text, *CUT, "--why")
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines())) <= 140


def test_plan_json_is_a_plan_that_can_be_used_again(run, text, tmp_path):
    code, out, _ = run("plan", text, *CUT, "--json")
    assert code == 0
    plan = Plan.from_json(out)
    assert len(plan.regions) == 4
    file = tmp_path / "plan.json"
    file.write_text(out)
    _, again, _ = run("inspect", text, "--regions", str(file), "--r", "3", "--json")
    assert Plan.from_json(again).hash == plan.hash


def test_plan_takes_an_own_finish(run, text):
    code, out, _ = run("plan", text, *CUT, "--finish", "own", "--json")
    assert code == 0
    assert all(region.own_finish for region in Plan.from_json(out).regions)


def test_regions_by_module_path(run, text):
    _, out, _ = run("plan", text, "--regions", "blocks.1,blocks.3", "--json")
    assert [region.part.modules for region in Plan.from_json(out).regions][1:] == [
        ("blocks.1", "blocks.2"),
        ("blocks.3",),
    ]


def test_verify_passes(run, text):
    code, out, _ = run("verify", text, *CUT, "--backward", "chain")
    assert code == 0
    assert out.startswith("verify: ok\n")
    assert "engine     chain (asked for)" in out


def test_verify_json(run, text):
    code, out, _ = run("verify", text, *CUT, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["ok"] is True
    assert record["max_rel_error"] <= record["tolerance"]


def test_verify_that_fails_exits_with_1(run, text, monkeypatch):
    bad = dataclasses.replace(records.report(), ok=False)
    monkeypatch.setattr("lbi_compile.verify", lambda *_: bad)
    code, out, _ = run("verify", text, *CUT)
    assert code == 1
    assert out.startswith("verify: FAILED\n")


def test_credit_is_shown_and_kept_in_the_plan(run, text, tmp_path):
    code, out, _ = run("inspect", text, *CUT, "--credit", "sid")
    assert code == 0
    assert "credit     sid  (asked for" in out
    assert "engine     autograd (local credit" in out
    _, exact, _ = run("inspect", text, *CUT)
    assert "credit" not in exact
    _, made, _ = run("plan", text, *CUT, "--credit", "hbll", "--json")
    assert Plan.from_json(made).credit == "hbll"
    (tmp_path / "plan.json").write_text(made)
    code, _, err = run("inspect", text, "--regions", str(tmp_path / "plan.json"))
    assert code == 2
    assert "a plan made for credit='hbll' with credit='exact'" in err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("inspect", "nowhere"), "ModelSourceError"),
        (("inspect", "{text}", "--regions", "0"), "RegionsError"),
        (("inspect", "{text}", "--regions", "99"), "TooManyRegionsError"),
        (("plan", "{text}", "--r", "0"), "LatentWidthError"),
        (("plan", "{text}", "--interface", "nonsense"), "InterfaceError"),
        (("inspect", "{text}", "--backward", "nonsense"), "OptionError"),
        (("plan", "{text}", "--credit", "nonsense"), "OptionError"),
        (("plan", "{text}", "--regions", "missing.json"), "PlanError"),
        (("verify", "{number}"), "NotAModuleError"),
        (("demo", "--r", "0"), "LatentWidthError"),
    ],
)
def test_errors_are_two_lines_of_advice_and_exit_code_2(run, text, arguments, error):
    number = text.replace(":text", ":number")
    code, _, err = run(*(argument.format(text=text, number=number) for argument in arguments))
    assert code == 2
    assert f"lbi-compile {arguments[0]}: {error}\n" in err
    assert "expected: " in err
    assert "what to do: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("inspect",),
        ("inspect", "hf:gpt2", "--set", "n_layer"),
        ("inspect", "hf:gpt2", "--batch", "0"),
        ("demo", "--steps", "-1"),
    ],
)
def test_wrong_use_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: lbi-compile" in capsys.readouterr().err


def test_interrupt_is_one_line_and_exit_code_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert run("demo") == (130, "", "lbi-compile demo: interrupted\n")


@pytest.fixture
def heard_interrupts():
    """Python's own handler, also where a shell started the tests in the background, deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_interrupt_silences_the_warnings_it_causes(run, monkeypatch):
    def interrupted(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            warnings.warn("Error detected in AddBackward0, with a long traceback", stacklevel=1)

    monkeypatch.setattr(demo, "run", interrupted)
    assert run("demo") == (130, "", "lbi-compile demo: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", stacklevel=1)


def test_as_a_process_in_a_pipe(text):
    done = subprocess.run(
        [sys.executable, "-m", "lbi_compile", "plan", text, *CUT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "COLUMNS": "80"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4 regions, latent width r = 3" in done.stdout
    assert "\x1b" not in done.stdout
