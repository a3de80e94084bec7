"""The pages for readers: links lead somewhere, snippets are Python, and the README stays short."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lbi_compile
from tests import cases
from tests.models import ResidualMLP
from tests.small_models import mlp

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def snippets(page: Path) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}")
def test_links_and_snippets(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for snippet in snippets(page):
        ast.parse(snippet)


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) < 16_000


def test_every_guide_is_listed():
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in listed for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


@pytest.mark.parametrize("page", ["README.md", "docs/debug.md"])
def test_snippets_run(page):
    model, x = ResidualMLP(5, width=8, depth=10, classes=3), torch.randn(6, 5)
    y = torch.randint(0, 3, (6,))
    names: dict[str, Any] = {"model": model, "example_inputs": x, "x": x, "y": y, "torch": torch}
    names |= {"criterion": torch.nn.CrossEntropyLoss(), "lbi_compile": lbi_compile}
    names["bounded"] = lbi_compile.transform(model, x, regions=2)
    for snippet in snippets(ROOT / page):
        exec(snippet, names)
    assert names["report"].ok
    assert page == "docs/debug.md" or len(names["bounded"].regions) == 8


def test_the_published_form_as_it_is_told():
    model, x = cases.transformer(depth=6)
    names: dict[str, Any] = {"model": model, "x": x, "lbi_compile": lbi_compile}
    for snippet in snippets(ROOT / "docs" / "reproduce.md"):
        exec(snippet, names)
    assert names["bounded"].plan.interface == "pooled"
    assert names["bounded"](x).shape == model(x).shape


def test_the_guide_to_passes():
    names: dict[str, Any] = {"model": mlp(), "x": torch.randn(4, 5)}
    for snippet in snippets(ROOT / "docs" / "passes.md"):
        exec(snippet.replace("regions=4", "regions=2"), names)
    assert len(names["program"].regions) == 2
    alive = names["crossings"](names["gm"]).alive
    assert len(alive) == len(names["gm"].graph.nodes)
    assert min(alive) == 0 < max(alive)
