"""Models, data and measurements that the tests of local credit rules share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lbi_compile import BoundedModule, transform
from lbi_compile.credit.check import nodes_behind
from tests.models import BatchNormMLP, ResidualMLP

CLASSES = 4


def problem(depth: int = 4, *, batch: int = 6, dropout: float = 0.0, norm: bool = False) -> tuple[nn.Module, Any, Any]:
    """A residual MLP in float64 with features and classes."""
    torch.manual_seed(0)
    kind = BatchNormMLP if norm else ResidualMLP
    model = kind(5, width=8, depth=depth, classes=CLASSES, dropout=dropout).double()
    return model, torch.randn(batch, 5, dtype=torch.float64), torch.randint(0, CLASSES, (batch,))


def bound(credit: Any, *, fresh: bool = False, **options: Any) -> tuple[BoundedModule, Any, Any]:
    """``problem`` under a local rule, by default with as many regions as blocks; a ``fresh`` one may be changed."""
    make = _bound.__wrapped__ if fresh else _bound
    return make(_Key(credit), tuple(sorted(options.items())))


@contextlib.contextmanager
def other_schedule(bounded: BoundedModule) -> Iterator[None]:
    """Inside, SID's phase two runs region by region."""
    credit: Any = bounded.credit
    before, credit.rule = credit.rule, dataclasses.replace(credit.rule, schedule="sequential")
    try:
        yield
    finally:
        credit.rule = before


def both_schedules(bounded: BoundedModule, make: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Gradients of one loss under SID's schedules, and the loss itself, with the same random numbers."""
    found = []
    for context in (contextlib.nullcontext(), other_schedule(bounded)):
        with context:
            values: list[Tensor] = []

            def loss(values: list[Tensor] = values) -> Tensor:
                values.append(make())
                return values[-1]

            found.append(gradients(bounded, loss) | {"loss": values[0].detach()})
    return found


class _Key:
    """A rule, or its name, equal to others of equal options."""

    def __init__(self, credit: Any) -> None:
        self.credit = credit

    def __hash__(self) -> int:
        return hash(repr(self.credit))

    def __eq__(self, other: Any) -> bool:
        return repr(self.credit) == repr(other.credit)


@functools.cache
def _bound(key: _Key, options: tuple[tuple[str, Any], ...]) -> tuple[BoundedModule, Any, Any]:
    given = dict(options)
    depth, r = given.pop("depth", 4), given.pop("r", 6)
    regions = given.pop("regions", depth)
    model, x, y = problem(depth, **given)
    return transform(model, x, regions=regions, r=r, credit=key.credit), x, y


def gpt2(vocabulary: int, *, depth: int = 3, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A tiny GPT-2 in float64."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=depth, n_embd=16, n_head=2, vocab_size=vocabulary, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


class Recurrent(nn.Module):
    """A GRU cell over rows `[B, T, F]`, unrolled, read out after the last one."""

    def __init__(self, features: int = 3, width: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        self.embed, self.width = nn.Linear(features, width), width
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x)
        h = rows.new_zeros(rows.shape[0], self.width)
        for t in range(x.shape[1]):
            h = self.cell(rows[:, t], h)
        return self.head(h)


def recurrent(steps: int = 4) -> tuple[Recurrent, Tensor, Tensor]:
    """``Recurrent`` in float64 with rows and classes."""
    torch.manual_seed(0)
    return Recurrent().double(), torch.randn(5, steps, 3, dtype=torch.float64), torch.randint(0, CLASSES, (5,))


def gradients(
    bounded: BoundedModule, make: Callable[[], Tensor], *, scale: float = 1.0, seed: int = 7
) -> dict[str, Any]:
    """Gradient of every parameter for a loss that ``make`` computes under a seed."""
    bounded.zero_grad()
    torch.manual_seed(seed)
    (scale * make()).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over all parameters; those without a gradient must be the same."""
    assert a.keys() == b.keys()
    assert [name for name in a if (a[name] is None) != (b[name] is None)] == []
    return max(float((a[name] - b[name]).abs().max()) for name in a if a[name] is not None)


def parameters_behind(tensor: Tensor, bounded: BoundedModule, *, stop: Tensor | None = None) -> set[str]:
    """Names of the parameters a tensor's gradient reaches without passing ``stop``."""
    names = {id(p): name for name, p in bounded.named_parameters()}
    reached = [getattr(node, "variable", None) for node in nodes_behind(tensor, stop=stop)]
    return {names[id(variable)] for variable in reached if variable is not None and id(variable) in names}
