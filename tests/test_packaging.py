"""What is installed, what is imported, and what stands at the top of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = {
    *("lbi_compile", "passes", "kernels", "tests", "examples", ".ci"),
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"),
}


def python(code: str, *options: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_import_leaves_bare_names_alone(tmp_path):
    code = "import lbi_compile, sys; print(sorted({'passes', 'kernels'} & set(sys.modules)))"
    assert python(f"import sys; sys.path.append({str(ROOT)!r}); {code}", cwd=tmp_path).strip() == "[]"


def test_import_is_quiet_and_warns_of_nothing(tmp_path):
    assert python(f"import sys; sys.path.append({str(ROOT)!r}); import lbi_compile", "-W", "error", cwd=tmp_path) == ""


@pytest.mark.parametrize("missing", ["triton", "transformers", "numpy"])
def test_import_works_without(missing, tmp_path):
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
sys.modules[{missing!r}] = None
import torch, lbi_compile
from lbi_compile.kernels import ops
lam = torch.ops.lbi.suffix_scan(torch.eye(2).expand(3, 1, 2, 2).contiguous(), torch.tensor([[1.0, 2.0]]), None)
print(lam.tolist())
"""
    assert python(code, cwd=tmp_path).strip() == str([[[1.0, 2.0]]] * 4)


def test_public_names_exist():
    import lbi_compile

    for name in ("transform", "plan", "verify", "Plan", "LBIError"):
        assert hasattr(lbi_compile, name)
        assert name in lbi_compile.__all__


def test_every_package_is_listed_and_exists():
    setup = project()["tool"]["setuptools"]
    folders = {name: ROOT / setup["package-dir"].get(name, name.replace(".", "/")) for name in setup["packages"]}
    assert all((folder / "__init__.py").is_file() for folder in folders.values())
    found = {path.parent for top in ("lbi_compile", "passes", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert found == set(folders.values())
    assert (ROOT / "lbi_compile" / "py.typed").is_file()


def test_backend_entry_point_is_installed():
    (entry,) = entry_points(group="torch_dynamo_backends", name="lbi")
    assert callable(entry.load())


def test_python_and_torch_ranges():
    text = project()["project"]
    assert text["requires-python"] == ">=3.11"
    assert "torch>=2.11,<2.14" in text["dependencies"]
    assert all(re.search(r"[<=]", need) for need in text["dependencies"]), "every dependency has a range"


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} == TOP
