"""Views: golden text at two widths, without colour, and the small pieces they are made of.

After a wanted change of a view, write the golden files anew and read the diff:
``LBI_WRITE_GOLDEN=1 pytest tests/test_render.py``.
"""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from lbi_compile.plan import Decision
from lbi_compile.quantities import count, size
from lbi_compile.render import tree
from lbi_compile.render.report import ReportView, page
from lbi_compile.render.text import bar, layers, plain
from lbi_compile.render.tree import PlanView
from lbi_compile.report import Check
from tests import records

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("LBI_WRITE_GOLDEN"):
        file.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 140])
def test_inspect_view(width):
    view = PlanView(records.plan(), engine="scan (asked for)", why=True)
    check(f"inspect_{width}.txt", plain(view, width))


@pytest.mark.parametrize("width", [80, 140])
def test_report_page(width):
    check(f"report_{width}.txt", page(records.report(), width))


def test_records_print_as_pages():
    assert str(records.plan()) == tree.page(records.plan())
    assert str(records.report()) == page(records.report())


def test_brackets_and_colons_are_no_markup():
    odd = "[bold]x[/bold] [s72, 64] :smile: [/]"
    why = (Decision("interface", odd, odd),)
    plan = dataclasses.replace(records.plan(), model=odd, interface=odd, inputs=((odd, (2,)),), dynamic=(odd,), why=why)
    assert tree.page(plan, 200, why=True).count(odd) == 9
    report = dataclasses.replace(
        records.report(), worst=((odd, 0.0),), lanes=((odd, 1),), engine=odd, checks=(Check(odd, None, odd),)
    )
    assert page(report, 200).count(odd) == 5


def test_reasons_are_left_out_unless_asked_for():
    assert "nearest to an equal share" not in plain(PlanView(records.plan()), 80)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_nothing_is_wider_than_the_console(width):
    text = plain(PlanView(records.plan(), why=True), width) + page(records.report(), width)
    assert max(map(len, text.splitlines())) <= width


def test_narrow_views_name_every_layer_in_full():
    text = " ".join(plain(PlanView(records.plan()), 60).replace("│", " ").split())
    assert "blocks.2, blocks.3.norm_attention, blocks.3.attention, blocks.3.norm_mlp, blocks.3.mlp, extra.3" in text


@pytest.mark.parametrize("view", [PlanView(records.plan(), why=True), ReportView(records.report())])
def test_output_that_is_no_utf8_gets_plain_ascii(view):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80).print(view)
    file.seek(0)
    assert "#" in file.read()


def test_colour_only_on_terminals(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def printed(**options) -> str:
        file = io.StringIO()
        Console(file=file, width=80, **options).print(PlanView(records.plan()))
        return file.getvalue()

    assert "\x1b[" not in printed()
    assert "\x1b[36m" in printed(force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in printed(force_terminal=True)


def test_report_says_what_is_wrong():
    report = dataclasses.replace(records.report(), ok=False, leak=True, batch_independent=False)
    text = str(report)
    assert text.startswith("verify: FAILED\n")
    assert "FUTURE LEAK" in text
    assert "SAMPLES MIX" in text


def test_report_of_one_region_has_no_empty_sections():
    report = dataclasses.replace(records.report(), lanes=(), jacobian_norms=(), product_norms=(), worst=())
    text = page(report, 80)
    assert "Jacobian" not in text
    assert "lanes" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (99_949, "99.9k"), (999_960, "1.0M"), (1_234_567_890, "1.2G")],
)
def test_count(number, text):
    assert count(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB")])
def test_size(number, text):
    assert size(number) == text


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], ""),
        (["h.0"], "h.0"),
        (["h.0", "h.1", "h.3", "h.4", "g.5"], "h.0-1, h.3-4, g.5"),
        (["h.9", "h.10", "h.11"], "h.9-11"),
        (["h.1", "h.0"], "h.1, h.0"),
        (["layer1.0", "layer1.1", "layer2.0"], "layer1.0-1, layer2.0"),
        (["a", "a1", "a2"], "a, a1-2"),
    ],
)
def test_layers(paths, text):
    assert layers(paths) == text


def test_bar():
    assert bar(1.0, 4, ascii_only=False) == "████"
    assert bar(0.3125, 4, ascii_only=False) == "█▎"
    assert bar(1e-9, 4, ascii_only=False) == "▏"
    assert bar(1e-9, 4, ascii_only=True) == "#"
    assert bar(0.0, 4, ascii_only=False) == ""
