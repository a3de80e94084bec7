"""What ``bench parallel`` compares: one step of each schedule on this rank, and what its gradients should be."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import lbi_compile
from lbi_compile.distributed import parallelize, traffic

from .stacks import Sizes, Stack, Stage, cross_entropy

Gradients = Mapping[str, Tensor | None]


class Contestant(NamedTuple):
    """One schedule.

    Attributes:
        name: As in the table.
        form: The closed form that predicts it.
        baseline: The contestant that does the same in one process.
        micro_batches: M.
        alone: Only the first rank works.
        step: Forward and backward of one step on this rank.
        gradients: Those of this rank after a step, by name.
        expected: What they should be.
        sent: Runs a step and gives the bytes this rank sends in it, as rings would.
        head_on_last: The last rank alone has the head.
    """

    name: str
    form: str
    baseline: str
    micro_batches: int
    alone: bool
    step: Callable[[], Any]
    gradients: Callable[[], Gradients]
    expected: Gradients
    sent: Callable[[], float]
    head_on_last: bool = False


class Arena:
    """Makes contestants of one batch.

    Args:
        sizes: Of the model.
        samples: Of the batch.
        mesh: Of all ranks, with the one dimension ``region``.
        seed: Of the model and the batch.
    """

    def __init__(self, sizes: Sizes, samples: int, mesh: DeviceMesh, seed: int) -> None:
        self.sizes, self.samples, self.mesh, self.seed = sizes, samples, mesh, seed
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.x, self.y = sizes.batch(samples, seed + 1)
        self.dense = sizes.model(seed)

    def bounded(self, interface: str) -> lbi_compile.BoundedModule:
        """The model, cut; ``"sid"`` for the local rule."""
        cut: dict[str, Any] = {"regions": self.sizes.starts, "r": self.sizes.r}
        if interface == "sid":
            cut["credit"] = "sid"
        else:
            cut["interface"] = interface
            cut["readout"] = self.sizes.readout if interface in LATENTS else "auto"
        example, _ = self.sizes.batch(2 if self.samples != 2 else 3, self.seed)
        bounded = lbi_compile.transform(self.sizes.model(self.seed), example, **cut)
        bounded(self.x)
        return bounded

    def one_dense(self) -> Contestant:
        """The model as it is, in one process."""
        expected = self._once(self.dense, lambda: cross_entropy(self.dense(self.x), self.y))
        return self._alone("dense, one process", "one", self.dense, expected)

    def one_bounded(self, name: str, bounded: lbi_compile.BoundedModule) -> Contestant:
        """A bounded model in one process."""
        loss = self._loss(name, bounded)
        expected = self._once(bounded, loss)

        def step() -> None:
            bounded.zero_grad()
            loss().backward()

        return Contestant(
            f"{name}, one process", _FORM[name], "", 1, True, step, lambda: _grads(bounded), expected, lambda: 0.0
        )

    def spread(
        self, name: str, bounded: lbi_compile.BoundedModule, *, reduce: str = "auto", head: str = "all"
    ) -> Contestant:
        """Its regions on all ranks; ``head`` is for those that hand latents on."""
        whole = self._once(bounded, self._loss(name, bounded))
        last = head == "last" and name in LATENTS
        with bounded.with_engine("autograd"):
            parallel = parallelize(bounded, self.mesh, reduce=reduce, head=head if last else "all")
        loss = self._loss(name, parallel)
        if last:
            loss = functools.partial(parallel.loss, self.x, criterion=cross_entropy, target=self.y)

        def step() -> None:
            parallel.zero_grad()
            loss().backward()

        def sent() -> float:
            with traffic() as counted:
                step()
            return counted.on_the_wire()

        expected = {key: whole[key] for key, _ in parallel.named_parameters()}
        form = parallel.engine.name if name in LATENTS else _FORM[name]
        baseline = f"{name}, one process"
        return Contestant(
            f"LBI {name}" if name != "sid" else "SID",
            form,
            baseline,
            1,
            False,
            step,
            lambda: _grads(parallel),
            expected,
            sent,
            last,
        )

    def replicas(self) -> Contestant | None:
        """DistributedDataParallel; ``None`` where there are fewer samples than ranks."""
        if self.samples % self.world:
            return None
        # the one buffer never changes, and would be sent again in every forward
        copied = DistributedDataParallel(copy.deepcopy(self.dense), broadcast_buffers=False)
        counted: list[float] = []

        def hook(group, bucket):  # DDP compares annotations with classes, and ours are strings
            counted.append(bucket.buffer().nbytes * 2 * (self.world - 1) / self.world)
            return allreduce_hook(group, bucket)

        copied.register_comm_hook(dist.group.WORLD, hook)
        part = slice(self.rank * self.samples // self.world, (self.rank + 1) * self.samples // self.world)
        x, y = self.x[part], self.y[part]

        def step() -> None:
            copied.zero_grad()
            cross_entropy(copied(x), y).backward()

        def sent() -> float:
            counted.clear()
            step()
            return sum(counted)

        expected = self._once(self.dense, lambda: cross_entropy(self.dense(self.x), self.y))
        return Contestant(
            "DDP", "data", "dense, one process", 1, False, step, lambda: _grads(copied.module), expected, sent
        )

    def pipeline(self, kind: str, micro_batches: int) -> Contestant | None:
        """``"gpipe"`` or ``"1f1b"``; ``None`` where the batch or torch's 1F1B has too few micro-batches."""
        if self.samples % micro_batches or (kind == "1f1b" and micro_batches < self.world):
            return None
        model = copy.deepcopy(self.dense)
        stage = PipelineStage(Stage(model, self.rank, self.world), self.rank, self.world, torch.device("cpu"))
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](
            stage, n_microbatches=micro_batches, loss_fn=cross_entropy
        )

        def step() -> None:
            model.zero_grad()
            if self.rank == 0:
                schedule.step(self.x)
            elif self.rank == self.world - 1:
                schedule.step(target=self.y)
            else:
                schedule.step()

        counted: list[int] = []
        for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
            setattr(stage, name, _counting(getattr(stage, name), counted))

        def sent() -> float:
            counted.clear()
            step()
            return float(sum(counted))

        whole = self._once(self.dense, lambda: cross_entropy(self.dense(self.x), self.y))
        own = {id(p) for p in stage.submod.parameters()}
        names = [name for name, p in model.named_parameters() if id(p) in own]
        title = {"gpipe": "GPipe", "1f1b": "1F1B"}[kind]
        return Contestant(
            f"{title}, {micro_batches} micro",
            kind,
            "dense, one process",
            micro_batches,
            False,
            step,
            lambda: {name: model.get_parameter(name).grad for name in names},
            {name: whole[name] for name in names},
            sent,
        )

    def _alone(self, name: str, form: str, model: Stack, expected: Gradients) -> Contestant:
        def step() -> None:
            model.zero_grad()
            cross_entropy(model(self.x), self.y).backward()

        return Contestant(name, form, "", 1, True, step, lambda: _grads(model), expected, lambda: 0.0)

    def _loss(self, name: str, model: Any) -> Callable[[], Tensor]:
        if name == "sid":
            return lambda: model.local_loss(self.x, target=self.y)
        return lambda: cross_entropy(model(self.x), self.y)

    def _once(self, model: nn.Module, loss: Callable[[], Tensor]) -> Gradients:
        """Gradients by plain autograd in this process."""
        model.zero_grad()
        plain = model.with_engine("autograd") if isinstance(model, lbi_compile.BoundedModule) else _nothing()
        with plain:
            loss().backward()
        found = {name: None if grad is None else grad.clone() for name, grad in _grads(model).items()}
        model.zero_grad()
        return found


_FORM = {"token": "token", "pooled": "chain", "chunked": "chain", "sid": "sid"}
LATENTS = ("pooled", "chunked")
_nothing = contextlib.nullcontext


def _grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _counting(operations: Callable[..., list[Any]], sizes: list[int]) -> Callable[..., list[Any]]:
    """The same operations, with their bytes noted."""

    def noted(*args: Any) -> list[Any]:
        found = operations(*args)
        sizes.extend(one.tensor.nbytes for one in found)
        return found

    return noted
