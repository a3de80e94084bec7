"""Validate: every choice with its reason, proofs of identity paths, and the refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile.errors import FutureLeakError, InterfaceError, OptionError, ReadoutError
from lbi_compile.interfaces import KINDS, interface_class
from lbi_compile.passes.validate import has_identity_path, refuse_leak, settle_interface, settle_readout
from tests.dags import find

# --- interface ----------------------------------------------------------------------------------------------------


def interface(request: str = "auto", cell: str = "auto", **facts: Any) -> tuple[str, str | None, str]:
    known: dict[str, Any] = {"regions": 4, "rank": 3, "positions": True, "causal": True, "residual": True}
    kind, chosen, why = settle_interface(request, cell, **{**known, **facts})
    assert why[0].about == "interface"
    assert why[0].choice == kind
    assert [(d.about, d.choice) for d in why[1:]] == ([("cell", chosen)] if chosen else [])
    return kind, chosen, why[0].why


@pytest.mark.parametrize(
    ("facts", "kind", "cell", "why"),
    [
        ({"regions": 1}, "none", None, "the model itself, bit for bit"),
        ({"rank": 2, "positions": False, "causal": None}, "pooled", None, "has no positions"),
        ({"positions": False, "causal": None}, "pooled", None, "the output has no position axis"),
        ({}, "token", "linear", "every region is residual"),
        ({"causal": False}, "token", "linear", "every region is residual"),
        ({"residual": False}, "chunked", None, "nothing may leak from later positions"),
        ({"residual": False, "causal": None}, "chunked", None, "nothing may leak from later positions"),
        ({"residual": False, "causal": False}, "pooled", None, "the model is not causal"),
    ],
)
def test_automatic_interface(facts: dict[str, Any], kind: str, cell: str | None, why: str) -> None:
    found = interface(**facts)
    assert found[:2] == (kind, cell)
    assert why in found[2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interface_asked_for_is_taken(kind: str) -> None:
    cell = "linear" if kind in ("token", "token+chunked", "self") else None
    assert interface(kind) == (kind, cell, "asked for")
    assert interface(kind, regions=1)[0] == "none"


def test_cells() -> None:
    assert interface("token", "gru")[1] == "gru"
    assert interface("auto", "linear")[1] == "linear"
    assert interface("self", "gru")[1] == "gru"
    assert interface("self", rank=2, positions=False)[1] is None
    _, _, (_, automatic) = settle_interface(
        "token", "auto", regions=2, rank=3, positions=True, causal=True, residual=True
    )
    assert "whatever the batch and length" in automatic.why


@pytest.mark.parametrize("kind", ["pooled", "chunked", "identity", "zero"])
def test_a_cell_without_a_token_interface_is_refused(kind: str) -> None:
    with pytest.raises(OptionError, match=f"cell='gru' with interface='{kind}'"):
        interface(kind, "gru")


@pytest.mark.parametrize("rank", [1, 4])
def test_a_canvas_of_another_rank_has_no_automatic_interface(rank: int) -> None:
    with pytest.raises(InterfaceError, match=f"a canvas with {rank} axes"):
        interface(rank=rank)
    assert interface("identity", rank=rank)[0] == "identity"


# --- readout ------------------------------------------------------------------------------------------------------


def readout(request: str, kind: str, *, residual: bool, regions: int = 4, cell: str | None = None) -> tuple[str, str]:
    allowed = interface_class(kind, cell).readouts_for(16)
    chosen, why = settle_readout(request, interface=kind, allowed=allowed, regions=regions, residual=residual)
    assert (why.about, why.choice) == ("readout", chosen)
    return chosen, why.why


@pytest.mark.parametrize(
    ("kind", "residual", "chosen", "why"),
    [
        ("pooled", True, "sum", "every region adds to its input"),
        ("pooled", False, "last", "an identity path from region input to output is not proven"),
        ("token", True, "sum", "every region adds to its input"),
        ("token", False, "sum", "the only one interface 'token' has"),
        ("zero", False, "sum", "the only one interface 'zero' has"),
        ("identity", True, "last", "the interface's own"),
        ("identity", False, "last", "the interface's own"),
    ],
)
def test_automatic_readout(kind: str, residual: bool, chosen: str, why: str) -> None:
    assert readout("auto", kind, residual=residual, cell="linear" if kind == "token" else None) == (chosen, why)


def test_a_readout_asked_for_is_taken_with_a_note_where_it_is_odd() -> None:
    assert readout("last", "pooled", residual=True) == ("last", "asked for")
    assert readout("sum", "pooled", residual=True) == ("sum", "asked for")
    assert readout("sum", "pooled", residual=False) == ("sum", "asked for; the regions are not proven residual")


def test_one_region_reads_its_end() -> None:
    for request in ("auto", "sum", "last"):
        assert readout(request, "none", residual=True, regions=1) == ("last", "one region")


@pytest.mark.parametrize(("kind", "request_"), [("token", "last"), ("zero", "last"), ("identity", "sum")])
def test_a_readout_that_leaves_parameters_untrained_is_refused(kind: str, request_: str) -> None:
    with pytest.raises(ReadoutError, match="could never get a gradient"):
        readout(request_, kind, residual=True, cell="linear" if kind == "token" else None)


def test_an_unknown_readout_is_refused() -> None:
    with pytest.raises(OptionError, match="readout='mean'"):
        readout("mean", "pooled", residual=True)


# --- identity paths -----------------------------------------------------------------------------------------------


class Between(nn.Module):
    """``function(self, self.start(x))``, then a last layer that makes the end of the path a separator."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = (function,)
        self.start, self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.dropout = nn.LayerNorm(6), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function[0](self, self.start(x)))


def proven(function: Callable[..., Tensor]) -> bool:
    found = find(Between(function).train(), torch.randn(2, 5, 6))
    start, *_, last = found.named("aten.linear")
    end = last.args[0]
    assert isinstance(end, torch.fx.Node)
    return has_identity_path(start, end, memory=found.live.memory)


def written_over(self: Any, x: Tensor) -> Tensor:
    total = x + self.layer(x)
    total[:, :, 0].zero_()
    return total + self.layer(x)


def summed_in_place(self: Any, x: Tensor) -> Tensor:
    total = x + self.layer(x)
    total += self.layer(self.norm(total))
    return total + self.layer(x)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda self, x: x + self.layer(self.norm(x)), True),
        (lambda self, x: self.layer(x) + x, True),
        (lambda self, x: x + self.dropout(self.layer(x)), True),
        (lambda self, x: (x + self.layer(x)) + self.layer(self.norm(x)), True),
        (lambda self, x: x.contiguous().clone().view(2, 5, 6).add_(self.layer(x)), True),
        (lambda self, x: torch.add(x, self.layer(x), alpha=1), True),
        (lambda self, x: self.norm(x + self.layer(x)), False),
        (lambda self, x: torch.relu(x + self.layer(x)), False),
        (lambda self, x: self.layer(x), False),
        (lambda self, x: 0.5 * x + self.layer(x), False),
        (lambda self, x: torch.add(self.layer(x), x, alpha=2), False),
        (lambda self, x: self.dropout(x) + self.layer(x), False),
        (lambda self, x: self.dropout(x + self.layer(x)), False),
        (lambda self, x: x[:, :1] + self.layer(x), False),
        (lambda self, x: x.transpose(0, 1).reshape(2, 5, 6) + self.layer(x), False),
        (lambda self, x: self.layer(x) * x, False),
        (lambda self, x: F.silu(x) + F.gelu(x), False),
        (written_over, False),
        (summed_in_place, True),
    ],
    ids=[
        "pre-norm", "other side", "dropout beside", "two blocks", "copies and views", "add with alpha 1", "post-norm",
        "relu after", "plain", "scaled", "add with alpha", "dropout on the path", "dropout after", "broadcast",
        "permuted", "product", "two branches", "written over", "summed in place",
    ],
)  # fmt: skip
def test_identity_path(function: Callable[..., Tensor], wanted: bool) -> None:
    """Where one is proven, the start is left when the layer of the branch gives zeros."""
    assert proven(function) is wanted
    if wanted:
        model = Between(function)
        nn.init.zeros_(model.layer.weight)
        nn.init.zeros_(model.layer.bias)
        x = torch.randn(2, 5, 6)
        assert torch.equal(function(model, x), x)


# --- leaks --------------------------------------------------------------------------------------------------------

ORDERS = ("position-wise", "causal", "anticausal", "mixed")


@pytest.mark.parametrize("model", ORDERS)
@pytest.mark.parametrize("bounded", ORDERS)
def test_later_positions_may_not_enter_where_the_model_keeps_them_out(model: str, bounded: str) -> None:
    leaks = model in ("position-wise", "causal") and bounded in ("anticausal", "mixed")
    if leaks:
        with pytest.raises(FutureLeakError, match=re.escape(f"whose outputs are {model}")) as caught:
            refuse_leak(interface="pooled", model=model, bounded=bounded)
        assert "interface='pooled'" in caught.value.found
    else:
        refuse_leak(interface="pooled", model=model, bounded=bounded)
