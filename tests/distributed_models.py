"""Bounded models that the tests of region-parallel training share, and what ranks make of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lbi_compile import BoundedModule, transform
from lbi_compile.distributed import RegionParallel, parallelize
from tests import ranks
from tests.cases import call, project
from tests.models import CausalTransformer, ResidualMLP

# Options of transform and of parallelize by name; every interface and readout there is.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "token-gru": ("transformer", {"interface": "token", "cell": "gru"}, {}),
    "token-linear-stem": ("transformer", {"interface": "token", "cell": "linear"}, {"reduce": "stem"}),
    "token-tied-canvas": ("gpt2", {"interface": "token"}, {"reduce": "canvas"}),
    "token-tied-stem": ("gpt2", {"interface": "token"}, {"reduce": "stem"}),
    "pooled-sum-scan": ("mlp", {"interface": "pooled", "readout": "sum"}, {"engine": "scan"}),
    "pooled-sum-chain": ("mlp", {"interface": "pooled", "readout": "sum"}, {"engine": "chain"}),
    "pooled-last-scan": ("mlp", {"interface": "pooled", "readout": "last"}, {"engine": "scan"}),
    "pooled-last-chain-stem": (
        "mlp", {"interface": "pooled", "readout": "last"}, {"engine": "chain", "reduce": "stem"},
    ),
    "chunked-sum-scan": ("transformer", {"interface": "chunked", "readout": "sum"}, {"engine": "scan"}),
    "chunked-sum-chain": ("transformer", {"interface": "chunked", "readout": "sum"}, {"engine": "chain"}),
    "chunked-last-scan-stem": (
        "transformer", {"interface": "chunked", "readout": "last"}, {"engine": "scan", "reduce": "stem"},
    ),
    "pooled-last-scan-head": ("mlp", {"interface": "pooled", "readout": "last"}, {"engine": "scan", "head": "last"}),
    "pooled-last-chain-head-stem": (
        "mlp", {"interface": "pooled", "readout": "last"}, {"engine": "chain", "reduce": "stem", "head": "last"},
    ),
    "chunked-last-tied-head-canvas": (
        "gpt2", {"interface": "chunked", "readout": "last"}, {"engine": "scan", "reduce": "canvas", "head": "last"},
    ),
    "chunked-last-tied-head-stem": (
        "gpt2", {"interface": "chunked", "readout": "last"}, {"engine": "chain", "reduce": "stem", "head": "last"},
    ),
    "token+chunked": ("transformer", {"interface": "token+chunked"}, {}),
    "token+chunked-gru-tied-stem": ("gpt2", {"interface": "token+chunked", "cell": "gru"}, {"reduce": "stem"}),
    "identity-scan": ("mlp", {"interface": "identity"}, {"engine": "scan"}),
    "zero": ("mlp", {"interface": "zero"}, {}),
    "self-pooled": ("mlp", {"interface": "self"}, {}),
    "self-token": ("transformer", {"interface": "self"}, {}),
}  # fmt: skip
REGIONS = 5


@functools.cache
def model(kind: str, *, dropout: float = 0.0, depth: int = 5) -> tuple[nn.Module, Any]:
    """A small model in float64 and inputs for it."""
    torch.manual_seed(0)
    if kind == "mlp":
        made, inputs = ResidualMLP(6, width=8, depth=depth, classes=3, dropout=dropout), torch.randn(4, 6).double()
    elif kind == "transformer":
        made = CausalTransformer(vocabulary=11, length=12, width=8, depth=depth, heads=2, dropout=dropout)
        inputs = torch.randint(0, 11, (4, 9))
    else:
        config = GPT2Config(
            n_layer=depth, n_embd=8, n_head=2, vocab_size=11, n_positions=12, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        made, inputs = GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 11, (4, 9))}
    return made.double().train(), inputs


@functools.cache
def bound(kind: str, options: tuple[tuple[str, Any], ...], dropout: float = 0.0) -> tuple[BoundedModule, Any]:
    """A bounded model of five regions; it is not to be changed, for ranks are forked with it."""
    made, inputs = model(kind, dropout=dropout)
    return transform(made, inputs, regions=REGIONS, **{"r": 4, **dict(options)}), inputs


def form(name: str) -> tuple[BoundedModule, Any, dict[str, Any]]:
    """One of ``FORMS``: the bounded model, inputs, and how to spread it."""
    kind, options, spread = FORMS[name]
    options = {**options, "r": 8} if "chunked" in name else options
    return *bound(kind, tuple(sorted(options.items()))), spread


Loss = Callable[[nn.Module, Any], Tensor]


def projected(module: nn.Module, inputs: Any) -> Tensor:
    """A loss that weighs every output differently."""
    return project(call(module, inputs))


def gradients(module: nn.Module, inputs: Any, loss: Loss = projected, *, seed: int = 7) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter under all of its names."""
    module.zero_grad()
    torch.manual_seed(seed)
    value = loss(module, inputs)
    value.backward()
    named = module.named_parameters(remove_duplicate=False)
    return {"loss": value.detach()} | {name: p.grad.clone() for name, p in named if p.grad is not None}


def spread_gradients(
    bounded: BoundedModule, inputs: Any, world: int, options: dict[str, Any], loss: Loss = projected
) -> list[dict[str, Tensor]]:
    """``gradients`` on every rank."""

    def work(rank: int) -> dict[str, Tensor]:
        return gradients(parallelize(bounded, ranks.mesh(world), **options), inputs, loss)

    return ranks.run(world, work)


def differences(expected: dict[str, Tensor], found: list[dict[str, Tensor]]) -> float:
    """The largest relative error of a gradient on any rank; what several ranks have must be the same bits.

    Errors are relative to ``|g_p| + 1e-6 |g|`` over all parameters.
    """
    assert set(expected) == set().union(*found)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    worst = 0.0
    for name, value in expected.items():
        held = [one[name] for one in found if name in one]
        assert all(torch.equal(held[0], other) for other in held)
        worst = max(worst, float((held[0] - value).norm() / (value.norm() + 1e-6 * whole)))
    return worst


def steps(module: nn.Module, batches: list[Any], loss: Loss, *, rate: float = 0.01) -> dict[str, Tensor]:
    """Parameters after one optimizer step (SGD with momentum) on every batch."""
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}


def held(parallel: RegionParallel) -> set[str]:
    """Names of the parameters this rank holds."""
    return {name for name, _ in parallel.named_parameters(remove_duplicate=False)}
