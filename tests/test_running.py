"""Running a captured program: what is marked, what is put in place of latents, and regions evaluated at a guess."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lbi_compile import BoundedModule
from lbi_compile.interfaces import Latents
from lbi_compile.passes.alike import CHAIN, REGION
from lbi_compile.passes.insert import Program
from lbi_compile.running import each, evaluate, evaluate_traced, first_latent, run
from tests.small_models import small

lbi = torch.ops.lbi


@pytest.fixture
def bounded() -> tuple[BoundedModule, Program, Tensor]:
    """A bounded model of three regions in float64, its program and its input."""
    model, x, found = small(regions=3)
    del model
    found, x = found.double(), x.double()
    found(x)
    (program,) = found._programs.values()
    return found, program, x


def calls(gm: torch.fx.GraphModule, target: Any) -> list[tuple[Any, ...]]:
    """What the calls of an operator were given beside tensors."""
    return [node.args[len(node.all_input_nodes) :] for node in gm.graph.find_nodes(op="call_function", target=target)]


def upwards(node: Any) -> Any:
    """The node that a copy is of."""
    while node.target is torch.ops.aten.detach.default:
        node = node.args[0]
    return node


def test_every_latent_that_enters_a_region_is_marked_by_the_number_of_the_region(
    bounded: tuple[BoundedModule, Program, Tensor],
):
    module, program, x = bounded
    marked = make_fx(lambda x: run(module, program, [x], marked=True, taps=False)[0])(x)
    assert calls(marked, lbi.boundary.default) == [(k, module._chain) for k in range(3)]
    plain = make_fx(lambda x: run(module, program, [x], marked=False, taps=False)[0])(x)
    assert calls(plain, lbi.boundary.default) == []


def test_taps_are_given_where_they_are_asked_for(bounded: tuple[BoundedModule, Program, Tensor]):
    module, program, x = bounded
    (out,), hs, ms = run(module, program, [x], marked=False, taps=True)
    assert (len(hs), len(ms)) == (3, 3)
    assert torch.equal(out, module(x))
    assert run(module, program, [x], marked=False, taps=False)[1:] == ((), ())


def test_pins_stand_in_for_the_latents_that_regions_read(bounded: tuple[BoundedModule, Program, Tensor]):
    module, program, x = bounded
    (out,), _, ms = run(module, program, [x], marked=False, taps=True)
    latents = torch.stack(ms[1:])
    (same,), _, _ = run(module, program, [x], marked=False, taps=False, pins=latents)
    torch.testing.assert_close(same, out, rtol=0, atol=1e-14)
    (_,), _, pinned = run(
        module, program, [x], marked=False, taps=True, pins=latents + torch.tensor([1.0, 2.0])[:, None, None]
    )
    assert torch.equal(pinned[1], latents[0] + 1)
    assert torch.equal(pinned[2], latents[1] + 2)


def test_latents_are_altered_by_the_number_of_the_region_that_reads_them(
    bounded: tuple[BoundedModule, Program, Tensor],
):
    module, program, x = bounded
    seen: list[int] = []

    def alter(k: int, m: Tensor) -> Tensor:
        seen.append(k)
        return m * 0 + k

    _, _, ms = run(module, program, [x], marked=False, taps=True, alter=alter)
    assert seen == [1, 2]
    assert [float(m.detach().unique()) for m in ms[1:]] == [1.0, 2.0]


def test_a_function_of_a_latent_is_one_of_both_where_two_cross():
    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert each(torch.neg, one).item() == -1
    both = each(torch.neg, Latents(one, two))
    assert (both.token.item(), both.chunk.item()) == (-1, -2)
    alone = each(torch.neg, Latents(None, two))
    assert (alone.token, alone.chunk.item()) == (None, -2)


def test_regions_are_evaluated_each_at_its_own_guess(bounded: tuple[BoundedModule, Program, Tensor]):
    """The right latents are a fixed point; what region k gives hangs on the guess before it alone."""
    module, program, x = bounded
    _, _, ms = run(module, program, [x], marked=False, taps=True)
    latents = torch.stack(ms[1:])
    torch.testing.assert_close(evaluate(module, program, [x], latents), latents, rtol=0, atol=1e-14)
    other = evaluate(module, program, [x], latents + 1)
    torch.testing.assert_close(other[0], latents[0], rtol=0, atol=1e-14)
    assert not torch.allclose(other[1], latents[1])
    m, canvas = first_latent(module, program, [x])
    torch.testing.assert_close(m, latents[0], rtol=0, atol=1e-14)
    assert canvas.shape == (5, 8)


def test_places_of_jacobians_bear_the_marks_of_what_they_lie_between(bounded: tuple[BoundedModule, Program, Tensor]):
    module, program, x = bounded
    guess = torch.zeros(2, 5, 4, dtype=torch.double)

    def traced(x: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate_traced(module, program, [x], guess)

    gm = make_fx(traced, tracing_mode="fake", _allow_non_fake_inputs=True)(x, guess)
    ((k, chain),) = calls(gm, lbi.jacobian.default)
    assert k == 1
    assert chain < 0 <= module._chain  # a chain of its own, apart from those of the backward
    assert calls(gm, lbi.boundary.default) == [(2, chain), (3, chain)]
    (slot,) = gm.graph.find_nodes(op="call_function", target=lbi.jacobian.default)
    before, after = gm.graph.find_nodes(op="call_function", target=lbi.boundary.default)
    assert [upwards(node) for node in slot.args[:2]] == [after, before]
    assert [value.shape for value in (node.meta["val"] for node in gm.graph.output_node().all_input_nodes)] == [
        (2, 5, 4),
        (1, 5, 4, 4),
    ]


def test_nodes_are_labelled_by_region_where_a_compiler_reads_the_marks(
    bounded: tuple[BoundedModule, Program, Tensor], monkeypatch: pytest.MonkeyPatch
):
    module, program, x = bounded
    labels: list[dict[str, int]] = []

    def annotated(label: dict[str, int]) -> contextlib.AbstractContextManager[None]:
        labels.append(label)
        return contextlib.nullcontext()

    monkeypatch.setattr("lbi_compile.running.annotated", annotated)
    run(module, program, [x], marked=True, taps=False)
    assert labels == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    run(module, program, [x], marked=False, taps=False)
    assert labels == []
    run(module, program, [x], marked=True, taps=False)
    assert labels == [{CHAIN: module._chain, REGION: k} for k in range(3)]
