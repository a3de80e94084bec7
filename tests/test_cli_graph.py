"""Drawings from the command line: which files are written, when, and what is said about them."""

from __future__ import annotations

import json
import os
import stat
from xml.etree import ElementTree

import pytest

from lbi_compile import OptionError, Plan, cli
from lbi_compile.render import files
from tests import pictures

MODELS = """
import torch
from lbi_compile.demo_model import CausalTransformer

def text():
    return CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16), torch.randint(13, (2, 8))

def broken():
    raise SystemExit("the model was made although the path is wrong")
"""


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return f"{path}:text"


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    return run


def test_inspect_writes_all_drawings(run, text, tmp_path):
    html, svg, dot = (tmp_path / f"model.{form}" for form in ("html", "svg", "dot"))
    drawings = ("--html", str(html), "--svg", str(svg), "--dot", str(dot))
    code, out, err = run("inspect", text, "--regions", "2", "--r", "3", *drawings)
    assert code == 0
    assert "2 regions, latent width r = 3" in out
    _, *lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"wrote {file}" for file in (html, svg, dot)]
    assert lines[0].endswith(f", {html.stat().st_size:,} bytes")
    page = html.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<dt>engine</dt><dd>autograd (auto: one latent crosses" in page
    assert ElementTree.fromstring(svg.read_text(encoding="utf-8")).tag.endswith("svg")
    assert dot.read_text(encoding="utf-8").startswith('digraph "lbi_compile.demo_model.CausalTransformer" {')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.dot", "model.html", "model.svg", "models.py"]


def test_plan_draws_the_plan_it_prints(run, text, tmp_path):
    file = tmp_path / "model.html"
    code, out, err = run("plan", text, "--regions", "2", "--json", "--html", str(file))
    assert code == 0
    plan = Plan.from_json(out)
    page = file.read_text(encoding="utf-8")
    assert f"<dt>hash</dt><dd>{plan.hash}</dd>" in page
    assert "<dt>engine</dt>" not in page
    assert str(file) in err
    json.loads(out)


def test_without_a_file_nothing_is_drawn(run, text, monkeypatch):
    def never(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(cli, "picture", never)
    code, _, err = run("plan", text, "--regions", "2")
    assert code == 0
    assert "wrote" not in err


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("form", ["html", "svg", "dot"])
def test_missing_folder_is_told_before_the_work(run, text, tmp_path, command, form):
    broken = text.replace(":text", ":broken")
    file = tmp_path / "nowhere" / "model.x"
    code, out, err = run(command, broken, f"--{form}", str(file))
    assert (code, out) == (2, "")
    assert err.startswith(
        f"lbi-compile {command}: OptionError\n  found: --{form} {file}, in a folder that does not exist"
    )
    assert f"what to do: make {file.parent} first" in err
    assert not file.parent.exists()


def test_folder_in_place_of_a_file(run, text, tmp_path):
    code, _, err = run("plan", text, "--svg", str(tmp_path))
    assert code == 2
    assert f"found: --svg {tmp_path}, which is a folder" in err


def test_no_drawings_of_a_verification(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "hf:gpt2", "--html", "model.html"])
    assert "unrecognized arguments: --html" in capsys.readouterr().err


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "model.svg"
    file.write_text("before")

    def fails(*_):
        assert file.read_text() == "before"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OptionError, match="No space left on device"):
            files.write(pictures.tower(), {"svg": file})
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.svg"]
    (line,) = files.write(pictures.tower(), {"svg": file})
    assert line == f"wrote {file}: a drawing, {file.stat().st_size:,} bytes"
    assert file.read_text(encoding="utf-8").startswith("<svg ")


def test_file_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        files.write(pictures.tower(), {"dot": tmp_path / "model.dot"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.dot").stat().st_mode) == 0o644


def test_pipe_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write(pictures.tower(layers=4), {"dot": pipe})
        assert os.read(reader, 7) == b"digraph"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
