"""Checkpoints of region-parallel models: resharded, whole or refused, and exact to resume from."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile import BoundedModule, CheckpointError, OptionError, transform
from lbi_compile.distributed import load, parallelize, save
from tests import ranks
from tests.distributed_models import bound, model
from tests.models import CausalTransformer, ResidualMLP

SHAPES = (("interface", "token"),)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    """Steps on batches drawn by number, with dropout from the global generator."""
    for number in range(begin, end):
        batch = torch.randint(0, 11, (4, 10), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        logits = module(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()


def values(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a run is made of."""
    found = {name: p.detach().clone() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        found |= {f"{name} {key}": torch.as_tensor(v).clone() for key, v in optimizer.state[p].items()}
    return found | {"random": torch.get_rng_state()}


def _bounded(dropout: float = 0.1) -> BoundedModule:
    return bound("transformer", SHAPES, dropout)[0]


def _trained(world: int, folder: Path, begin: int, end: int, *, resume: bool = False, **options: Any) -> list[Any]:
    bounded = _bounded(**options)

    def work(rank: int) -> dict[str, Tensor]:
        parallel = parallelize(bounded, ranks.mesh(world))
        optimizer = optimizer_of(parallel)
        if resume:
            restored = load(folder, parallel, optimizer)
            assert restored is not None
            assert (restored.step, restored.extra) == (begin, {"position": begin})
        else:
            torch.manual_seed(3)
        train(parallel, optimizer, begin, end)
        save(folder, parallel, optimizer, step=end, extra={"position": end})
        return values(parallel, optimizer)

    return ranks.run(world, work)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint after three steps on four ranks, and what they had."""
    folder = tmp_path_factory.mktemp("run")
    found = _trained(4, folder, 0, 3)
    return folder, {name: value for one in found for name, value in one.items()}


@pytest.mark.parametrize("world", [1, 2, 5])
def test_what_four_ranks_wrote_others_read(written: tuple[Path, dict[str, Tensor]], world: int):
    folder, expected = written
    bounded = _bounded()

    def work(rank: int) -> dict[str, Tensor]:
        parallel = parallelize(bounded, ranks.mesh(world))
        optimizer = optimizer_of(parallel)
        with torch.no_grad():
            for p in parallel.parameters():
                p.fill_(torch.nan)
        assert load(folder, parallel, optimizer) is not None
        return values(parallel, optimizer)

    found = ranks.run(world, work)
    assert set().union(*found) == set(expected)
    assert [name for one in found for name in one if not torch.equal(one[name], expected[name])] == []


def _pooled() -> tuple[BoundedModule, Tensor]:
    """Eight regions, of which the last one alone is read out."""
    torch.manual_seed(0)
    made, x = ResidualMLP(6, width=8, depth=8, classes=3).double(), torch.randn(4, 6).double()
    return transform(made, x, regions=8, r=4, interface="pooled", readout="last"), x


@pytest.mark.slow
def test_eight_ranks_read_what_four_wrote_wherever_the_head_is(tmp_path: Path):
    bounded, x = _pooled()

    def write(rank: int) -> dict[str, Tensor]:
        parallel = parallelize(bounded, ranks.mesh(4), head="last")
        optimizer = optimizer_of(parallel)
        for _ in range(2):
            optimizer.zero_grad()
            parallel(x).square().sum().backward()
            optimizer.step()
        save(tmp_path, parallel, optimizer, step=2)
        return values(parallel, optimizer)

    expected = {name: value for one in ranks.run(4, write) for name, value in one.items()}

    def read(rank: int, world: int, head: str) -> dict[str, Tensor]:
        parallel = parallelize(bounded, ranks.mesh(world), head=head)
        optimizer = optimizer_of(parallel)
        with torch.no_grad():
            for p in parallel.parameters():
                p.fill_(torch.nan)
        assert load(tmp_path, parallel, optimizer) is not None
        return values(parallel, optimizer)

    for world, head in ((1, "all"), (2, "all"), (8, "last"), (8, "all")):
        found = ranks.run(world, read, world, head)
        assert set().union(*found) == set(expected)
        assert [name for one in found for name in one if not torch.equal(one[name], expected[name])] == []


def test_the_bounded_model_reads_it_in_one_process(written: tuple[Path, dict[str, Tensor]]):
    folder, expected = written
    made, inputs = model("transformer", dropout=0.1)
    bounded = transform(copy.deepcopy(made), inputs, regions=5, r=4, interface="token")
    optimizer = optimizer_of(bounded)
    state = torch.get_rng_state()
    restored = load(folder, bounded, optimizer)
    found = values(bounded, optimizer)
    torch.set_rng_state(state)
    assert restored is not None
    assert restored.step == 3
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_model_on_the_meta_device_holds_its_part_only(written: tuple[Path, dict[str, Tensor]]):
    folder, expected = written
    plan = _bounded().plan
    with torch.device("meta"):
        real = CausalTransformer(vocabulary=11, length=12, width=8, depth=5, heads=2, dropout=0.1).double()

    def work(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        x = torch.zeros(4, 9, dtype=torch.long, device="meta")
        bounded = transform(real, x, regions=plan, r=4)
        assert bounded.plan.hash == plan.hash
        with pytest.raises(OptionError, match="meta"):
            parallelize(bounded, ranks.mesh(2), example_inputs=x)
        parallel = parallelize(bounded, ranks.mesh(2), example_inputs=x, device="cpu")
        load(folder, parallel)
        everywhere = dict(parallel.named_parameters(remove_duplicate=False))
        assert [name for name, p in everywhere.items() if p is everywhere["head.weight"] and name != "head.weight"]
        found = {name: p.detach().clone() for name, p in parallel.named_parameters()}
        return found, parallel.eval()(_tokens()).detach()

    found = ranks.run(2, work)
    names = {name for name in expected if " " not in name} - {"random"}
    assert set().union(*(one for one, _ in found)) == names
    assert [n for one, _ in found for n in one if not torch.equal(one[n], expected[n])] == []
    whole = transform(copy.deepcopy(model("transformer", dropout=0.1)[0]), _tokens(), regions=plan, r=4)
    load(folder, whole)
    expected_out = whole.eval()(_tokens()).detach()
    assert all(float((out - expected_out).abs().max()) < 1e-13 for _, out in found)


def _tokens() -> Tensor:
    return torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(4))


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_ends(tmp_path: Path):
    whole = _trained(2, tmp_path / "whole", 0, 6)
    _trained(2, tmp_path / "parts", 0, 3)
    resumed = _trained(2, tmp_path / "parts", 3, 6, resume=True)
    for a, b in zip(whole, resumed, strict=True):
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_what_was_cut_off_is_never_loaded(written: tuple[Path, dict[str, Tensor]], tmp_path: Path):
    folder, _ = written
    bounded = _bounded()
    shutil.copytree(folder / "step-00000003", tmp_path / "step-00000003")
    whole = tmp_path / "step-00000003"
    shutil.copytree(whole, tmp_path / "step-00000004.partial")
    shutil.copytree(whole, tmp_path / "step-00000005")
    (tmp_path / "step-00000005" / "complete.json").unlink()
    shutil.copytree(whole, tmp_path / "step-00000006")
    torn = next((tmp_path / "step-00000006").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-1])

    def work(rank: int) -> tuple[int, list[str]]:
        parallel = parallelize(bounded, ranks.mesh(2))
        restored = load(tmp_path, parallel)
        assert restored is not None
        refused = []
        for step in (4, 5, 6):
            with pytest.raises(CheckpointError) as caught:
                load(tmp_path, parallel, step=step)
            refused.append(caught.value.found.split(" with ")[1].split(" of ")[0])
        return restored.step, refused

    for step, refused in ranks.run(2, work):
        assert step == 3
        assert refused == ["no complete.json", "no complete.json", torn.name]
    shutil.rmtree(whole)
    assert ranks.run(2, lambda rank: load(tmp_path, parallelize(bounded, ranks.mesh(2)))) == [None, None]


def test_a_checkpoint_of_another_plan_is_refused(written: tuple[Path, dict[str, Tensor]]):
    folder, _ = written
    other = bound("transformer", (("cell", "gru"), ("interface", "token")))[0]

    def work(rank: int) -> bool:
        with pytest.raises(CheckpointError, match=r"written for the plan"):
            load(folder, parallelize(other, ranks.mesh(2)))
        return True

    assert ranks.run(2, work) == [True, True]


def test_old_checkpoints_go_and_none_is_written_twice(tmp_path: Path):
    bounded = _bounded()

    def work(rank: int) -> bool:
        parallel = parallelize(bounded, ranks.mesh(2))
        for step in (1, 2, 10):
            save(tmp_path, parallel, step=step, keep=2)
        with pytest.raises(CheckpointError, match="there already"):
            save(tmp_path, parallel, step=10)
        return True

    ranks.run(2, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert json.loads((tmp_path / "step-00000010" / "complete.json").read_text())["step"] == 10
