"""SID's two schedules: the same gradients, and what the sequential one promises of memory, hooks and statistics."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lbi_compile import SID, DoubleBackwardError
from lbi_compile.credit.check import Saved
from tests.credit_models import both_schedules, bound, gradients, largest_difference, other_schedule


@pytest.mark.parametrize(
    "options",
    [
        {}, {"kl": "reverse", "label_smoothing": 0.1}, {"readout": "shared"}, {"belief": "none"}, {"update": "add"},
        {"kl": "reverse", "label_smoothing": 0.1, "update": "add"},
    ],
)  # fmt: skip
def test_schedules_give_equal_gradients(options):
    bounded, x, y = bound(SID(**options), dropout=0.2)
    x = x.clone().requires_grad_()
    inputs = []

    def make():
        inputs.append(x.grad)
        x.grad = None
        return bounded.local_loss(x, target=y)

    parallel, sequential = both_schedules(bounded, make)
    assert len(parallel) > 20
    assert largest_difference(parallel, sequential) < 1e-12
    assert float((inputs[1] - x.grad).abs().max()) < 1e-12


def test_sequential_scales_hooks_and_repeats():
    bounded, x, y = bound(SID(schedule="sequential"))
    plain = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    scaled = gradients(bounded, lambda: bounded.local_loss(x, target=y), scale=1024.0)
    assert largest_difference({name: 1024 * g for name, g in plain.items()}, scaled) < 1e-9
    fired = []
    handles = [p.register_hook(lambda g, name=name: fired.append(name)) for name, p in bounded.named_parameters()]
    bounded.zero_grad()
    loss = bounded.local_loss(x, target=y)
    loss.backward(retain_graph=True)
    assert sorted(fired) == sorted(plain)
    loss.backward()
    for handle in handles:
        handle.remove()
    twice = {name: p.grad for name, p in bounded.named_parameters()}
    assert largest_difference({name: 2 * g for name, g in plain.items()}, twice) < 1e-12


def test_data_parallel():
    bounded, x, y = bound(SID(schedule="sequential"), fresh=True)
    plain = gradients(bounded, lambda: bounded.local_loss(x, target=y))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.bounded = bounded

        def forward(self, x, y):
            return self.bounded.local_loss(x, target=y)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bounded.zero_grad()
        nn.parallel.DistributedDataParallel(Loss())(x, y).backward()
    finally:
        dist.destroy_process_group()
    assert largest_difference(plain, {name: p.grad for name, p in bounded.named_parameters()}) < 1e-12


def test_sequential_refuses_what_would_be_wrong():
    bounded, x, y = bound(SID(schedule="sequential"), fresh=True)
    loss = bounded.local_loss(x, target=y)
    with torch.no_grad():
        bounded.get_parameter("blocks.1.norm.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = bounded.local_loss(x, target=y)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(loss, bounded.get_parameter("head.weight"), create_graph=True)


def test_sequential_updates_statistics_once():
    bounded, x, y = bound("sid", norm=True)
    before = {name: buffer.clone() for name, buffer in bounded.named_buffers()}
    found = []
    for context in (contextlib.nullcontext(), other_schedule(bounded)):
        with torch.no_grad():
            for name, buffer in bounded.named_buffers():
                buffer.copy_(before[name])
        with context:
            gradient = gradients(bounded, lambda: bounded.local_loss(x, target=y))
        found.append(gradient | {name: buffer.clone() for name, buffer in bounded.named_buffers()})
    assert int(found[1]["blocks.0.norm.num_batches_tracked"]) == 1
    assert largest_difference(*found) < 1e-12


def test_schedules_under_autocast():
    bounded, x, y = bound("sid", fresh=True)
    bounded.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # also the backward: casts that the first phase made without a graph must not be found here
        found = both_schedules(bounded, lambda: bounded.local_loss(x.float(), target=y))
    assert all(g is not None for g in found[0].values())
    largest = max(float(g.abs().max()) for name, g in found[0].items() if name != "loss")
    assert largest_difference(*found) < 2**-7 * largest  # sums of bfloat16 in another order


def test_memory_of_the_sequential_schedule_is_flat_in_depth():
    peaks = {}
    for depth in (3, 6):
        bounded, x, y = bound("sid", depth=depth, batch=64)
        for name, context in (("parallel", contextlib.nullcontext()), ("sequential", other_schedule(bounded))):
            with context, Saved(bounded.parameters()) as saved:
                bounded.local_loss(x, target=y).backward()
            assert saved.now == 0
            peaks[name, depth] = saved.peak
    assert peaks["sequential", 6] == peaks["sequential", 3] > 0
    assert peaks["parallel", 6] > 1.9 * peaks["parallel", 3] > 3.8 * peaks["sequential", 3]
