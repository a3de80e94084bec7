"""What is installed, what is imported, and what stands at the top of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TOP = {
    *("lbi_compile", "passes", "kernels", "tests", "examples", "docs", ".ci"),
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".gitignore"),
}


def python(code: str, *options: str, cwd: Path) -> str:
    """Run code outside the checkout, with the checkout after everything else on the path."""
    whole = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, *options, "-c", whole], capture_output=True, text=True, timeout=120, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_import_is_quiet_leaves_bare_names_alone_and_loads_packages_with_their_first_use(tmp_path):
    code = """
import lbi_compile
print(sorted({"passes", "kernels", "lbi_compile.distributed"} & set(sys.modules)))
print(lbi_compile.distributed.start.__name__, hasattr(lbi_compile, "nothing"))
"""
    assert python(code, "-W", "error", cwd=tmp_path) == "[]\nstart False\n"


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
    assert all("<" in need and ">=" in need for need in text["dependencies"])


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} == TOP


def test_the_lock_pins_what_is_required():
    lines = (ROOT / ".ci" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    text = project()["project"]
    needs = [Requirement(need) for need in (*text["dependencies"], *text["optional-dependencies"]["test"])]
    for need in needs:
        assert need.specifier.contains(pins[need.name.lower()]), need
    assert "--constraint .ci/lock.txt" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_release_builds_installs_and_runs(tmp_path):
    done = subprocess.run(
        [ROOT / ".ci" / "release", tmp_path / "dist"],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No broken requirements found." in done.stdout
    assert {path.suffix for path in (tmp_path / "dist").iterdir()} == {".whl", ".gz"}
