"""What is read runs no code: plans, checkpoints, names; what does run code says so."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from lbi_compile import CheckpointError, LBIError, Plan, PlanError, plan, transform
from lbi_compile.distributed import load, save
from lbi_compile.distributed.plain_data import METADATA
from tests.small_models import mlp

ROOT = Path(__file__).parent.parent


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_harm_is_real(tmp_path):
    pickle.loads(pickle.dumps(Harm(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.fixture
def run(tmp_path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path, model, optimizer, step=1)
    return tmp_path / "step-00000001", model, optimizer


def recorded(path: Path) -> None:
    """Make the sizes in the record those of the files, as whoever tampers with them would."""
    file = path / "complete.json"
    record = json.loads(file.read_text())
    record["files"] = {name: (path / name).stat().st_size for name in record["files"]}
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("step", [1, None])
def test_code_in_a_list_of_tensors_is_not_run(run, step):
    path, model, optimizer = run
    mark = path.parent / "mark"
    metadata = pickle.loads((path / METADATA).read_bytes())
    metadata.planner_data = Harm(mark)
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    recorded(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="not plain data") as refused:
        load(path.parent, model, optimizer, step=step)
    assert "do not load" in refused.value.do
    assert not mark.exists()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no pickle", b"cos\nsystem\n(S'true'\ntR."])
def test_a_broken_list_of_tensors(run, content):
    path, model, optimizer = run
    (path / METADATA).write_bytes(content)
    recorded(path)
    with pytest.raises(CheckpointError, match="not plain data"):
        load(path.parent, model, optimizer, step=1)


def test_code_in_a_value_of_the_optimizer_is_not_run(run):
    path, model, optimizer = run
    mark = path.parent / "mark"
    optimizer.param_groups[0]["lr"] = Harm(mark)
    shutil.rmtree(path)
    save(path.parent, model, optimizer, step=1)
    optimizer.param_groups[0]["lr"] = 0.125
    mark.unlink(missing_ok=True)  # writing it may have copied it
    with pytest.raises(CheckpointError, match=r"param_groups.*not plain data"):
        load(path.parent, model, optimizer, step=1)
    assert not mark.exists()


def test_a_checkpoint_of_data_is_read(run):
    path, model, optimizer = run
    expected = copy.deepcopy(model.state_dict())
    nn.init.zeros_(model.weight)
    optimizer.param_groups[0]["lr"] = 1.0
    restored = load(path.parent, model, optimizer)
    assert restored is not None
    assert restored.step == 1
    assert torch.equal(model.weight, expected["weight"])
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "change", [{"step": "1"}, {"random": {}}, {"files": {"__0_0.distcp": "all"}}, {"extra": None}, {"plan": 3}]
)
def test_records_of_another_form(run, change):
    path, model, optimizer = run
    record = json.loads((path / "complete.json").read_text())
    (path / "complete.json").write_text(json.dumps(record | change))
    with pytest.raises(CheckpointError, match=r"complete\.json"):
        load(path.parent, model, optimizer, step=1)
    assert load(path.parent, model, optimizer) is None


@pytest.fixture(scope="module")
def text() -> str:
    return plan(mlp(), torch.randn(4, 5), regions=3, r=4).to_json()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a record that is no container."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, item in items for found in leaves(item, (*path, key))] or [path]
    return [path]


def test_a_plan_of_another_form_is_refused(text):
    """Whatever stands in the place of a value: the plan is read as it is, or refused; nothing else is raised."""
    whole = json.loads(text)
    paths = leaves(whole)
    assert len(paths) > 50
    for number, path in enumerate(paths):
        record = json.loads(text)
        at = record
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = [{"__reduce__": "os.system"}, [], None, 1e400, "__import__('os')", True][number % 6]
        try:
            read = Plan.from_json(json.dumps(record))
        except PlanError:
            continue
        assert read.hash == whole["hash"]


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"text"', "{}", '{"version": 3, "hash": 0}', "[" * 100_000])
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_pickle_is_no_plan(tmp_path):
    with pytest.raises(PlanError):
        Plan.from_json(pickle.dumps(Harm(tmp_path / "mark"), protocol=0).decode())
    assert not (tmp_path / "mark").exists()


class Named(nn.Module):
    """Its weights have a name that ends a string in code and goes on with a call."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.hostile = f'layer") and open("{mark}", "w") and getattr(self, "layer'
        self.register_parameter(self.hostile, nn.Parameter(torch.ones(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self._parameters[self.hostile]


def test_a_name_does_not_become_code(tmp_path):
    with pytest.raises(LBIError):
        transform(Named(tmp_path / "mark"), torch.randn(2, 4), regions=2)
    assert not (tmp_path / "mark").exists()


NAME = "</script><img src=x onerror='alert(1)'>&lt;{{x}}]]>"
HOSTILE = f"""
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.names = nn.Linear(4, 4), []
        for i in range(4):
            self.names.append({NAME!r} + str(i))
            self.add_module(self.names[-1], nn.Linear(4, 4))
    def forward(self, x):
        x = self.stem(x)
        for name in self.names:
            x = x + self.get_submodule(name)(x).tanh()
        return x
def make():
    return Model(), torch.randn(2, 4)
"""


@pytest.mark.slow
def test_hostile_names_from_the_command_line_to_the_files(tmp_path):
    (tmp_path / "model.py").write_text(HOSTILE)
    files = {kind: tmp_path / f"m.{kind}" for kind in ("html", "svg", "dot")}
    done = subprocess.run(
        [sys.executable, "-m", "lbi_compile", "plan", "model.py:make", "--regions", "2",
         *(text for kind, file in files.items() for text in (f"--{kind}", str(file)))],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "running the code of model.py:make" in done.stderr
    page = files["html"].read_text()
    assert "<img" not in page
    assert "onerror" in page  # the name is there, as text
    assert page.count("</script>") == page.count("<script")
    drawn = ElementTree.parse(files["svg"]).getroot()
    assert not [node for node in drawn.iter() if node.tag.endswith(("img", "script"))]
    for line in files["dot"].read_text().splitlines():
        assert line.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 0
