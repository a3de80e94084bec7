"""Train a byte language model whose regions are spread over processes.

``torchrun --nproc-per-node 2 examples/distributed_lm.py`` trains on the source of Python's standard library, with Gloo
on CPUs and NCCL on GPUs. ``--copies 2`` with four processes also averages over two copies of the model. With
``--folder`` it writes checkpoints and goes on from the newest one, on however many processes; so does
``torchrun --max-restarts 3 --nproc-per-node 2 examples/distributed_lm.py --folder run`` after a process was lost.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lbi_compile
import lbi_compile.distributed
from lbi_compile.demo import corpus
from lbi_compile.demo_model import CausalTransformer


def batch_of(data: torch.Tensor, number: int, *, size: int, length: int) -> torch.Tensor:
    """Windows `[B, T + 1]` of the text, which depend on the number of the batch alone."""
    draw = torch.Generator().manual_seed(number)
    starts = torch.randint(0, len(data) - length - 1, (size,), generator=draw)
    return torch.stack([data[start : start + length + 1] for start in starts.tolist()]).long()


def main(arguments: Sequence[str] | None = None, *, after_step: Callable[[int], None] | None = None) -> None:
    """Train.

    Args:
        arguments: Of the command line.
        after_step: Is told how many steps have been taken.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 64), ("length", 64), ("batch", 8), ("steps", 100), ("copies", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--interface", default="token")
    parser.add_argument("--folder", help="where checkpoints are written and looked for")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds an exchange may take")
    given = parser.parse_args(arguments)

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    lbi_compile.distributed.start(timeout=given.timeout)
    kind = "cuda" if gpu else "cpu"
    shape = (given.copies, dist.get_world_size() // given.copies)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("dp", "region"))
    copy, first = mesh.get_local_rank("dp"), dist.get_rank() == 0

    data = corpus().train.to(kind)
    torch.manual_seed(0)  # the same on every process
    model = CausalTransformer(vocabulary=256, length=given.length, width=given.width, depth=given.layers, heads=4)
    example = torch.zeros(given.batch, given.length, dtype=torch.long, device=kind)
    bounded = lbi_compile.transform(model.to(kind), example, regions=given.layers, interface=given.interface)
    parallel: nn.Module = lbi_compile.distributed.parallelize(bounded, mesh)
    if first:
        print(f"{bounded.plan.interface} interface, {parallel.extra_repr()}; engine: {parallel.engine}")
    del model, bounded  # what other processes hold is freed
    if given.copies > 1:
        parallel = DistributedDataParallel(parallel, process_group=mesh.get_group("dp"))
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    start = 0
    if given.folder:
        restored = lbi_compile.distributed.load(given.folder, parallel, optimizer)
        start = restored.step if restored else 0
        if first and restored:
            print(f"goes on from {restored.path}")
    with lbi_compile.distributed.watch(parallel):
        for step in range(start, given.steps):
            batch = batch_of(data, step * given.copies + copy, size=given.batch, length=given.length)
            loss = nn.functional.cross_entropy(parallel(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            lbi_compile.distributed.clip_grad_norm_(parallel, 1.0)
            optimizer.step()
            done = step + 1
            if first and done % 20 == 0:
                print(f"step {done}: loss {loss.item():.3f}")
            if given.folder and (done % given.save_every == 0 or done == given.steps):
                lbi_compile.distributed.save(given.folder, parallel, optimizer, step=done, keep=3)
            if after_step is not None:
                after_step(done)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
