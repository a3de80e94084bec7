"""What the bench compares: every variant of a scan and of a step gives what its oracle gives, in float64."""

from __future__ import annotations

import pytest
import torch

import lbi_compile
from lbi_compile.bench import cases, hand, hand_token, scan, step
from lbi_compile.bench.compare import OK, Terms
from lbi_compile.errors import EngineError
from lbi_compile.kernels import reference
from lbi_compile.verify import relative_errors

CPU = torch.device("cpu")
TERMS = Terms(rounds=1, device=CPU, dtype=torch.float64)
HAND = {cases.MLP: hand.HandWrittenMLP, cases.TRANSFORMER: hand_token.HandWrittenTransformer}
HERE = {"dtype": torch.float64, "device": CPU}


def case(name: str, regions: int = 3, r: int = 5, **options: object) -> cases.Case:
    size = cases.Size(3, None if name == cases.MLP else 7)
    (made,) = cases.make(name, cases.Shape(2 * regions, 16, regions, r), sizes=[size], **options)
    return made


@pytest.mark.parametrize(("K", "N", "r"), [(1, 2, 3), (6, 5, 4), (7, 1, 1)])
def test_other_ways_to_scan_are_scans(K: int, N: int, r: int):
    given = scan.problem(K=K, N=N, r=r, **HERE)
    expected = reference.suffix_scan(*given)
    torch.testing.assert_close(scan.bmm_loop(*given), expected)
    torch.testing.assert_close(scan.generic_associative_scan(*given), expected)


def test_adjoints_neither_grow_nor_fade():
    given = scan.problem(K=64, N=512, r=8, **HERE)
    lam = reference.suffix_scan(given.J, given.last)
    assert 0.1 < lam[0].square().mean() < 10


def test_scan_cells_cover_the_grid():
    found = scan.cells(K=(2, 3), N=(1,), r=(2, 4), terms=TERMS, only=("bmm loop", "reference", "lbi"))
    assert [(cell.case["K"], cell.case["r"]) for cell in found] == [(2, 2), (2, 4), (3, 2), (3, 4)]
    assert all(cell.ok for cell in found)
    row = found[0].rows[-1]
    assert row.moved == 8 * (2 * 1 * 2 * 2 + 2 * 1 * 2 + 4 * 1 * 2)  # J, b, last and all adjoints


@pytest.mark.slow
@pytest.mark.parametrize("name", [cases.MLP, cases.TRANSFORMER])
def test_every_eager_variant_of_a_step_is_right(name: str):
    cell = step.cell(case(name), terms=TERMS, only=("eager", "dense", "by hand", "chain"))
    assert cell.ok
    assert {row.name: row.status for row in cell.rows} == {row: OK for row in ("eager", "dense", "by hand", "chain")}
    assert all(row.check is not None and row.check.tensors > 15 for row in cell.rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", cases.NAMES)
def test_every_compiled_variant_of_a_step_is_right(name: str):
    cell = step.cell(case(name), terms=TERMS, only=("inductor", "dense ind.", "scan", "parallel", "lbi"))
    assert cell.ok
    assert [row.status for row in cell.rows] == [OK] * (5 if name == cases.MLP else 4)
    assert all(row.compile_seconds for row in cell.rows)
    if name == cases.MLP:
        # the same inputs in every round are no latents known beforehand
        assert "iterations" in cell.rows[3].note
        assert "(1 iterations" not in cell.rows[3].note


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_compiled_baseline_holds_no_marker():
    from torch._inductor.utils import run_and_get_code

    made = case(cases.MLP)
    dense = made.model(**HERE)
    bounded = lbi_compile.transform(dense, made.example(**HERE), regions=made.starts, r=5, interface="pooled")
    setting = step.Setting(made, dense, bounded, made.inputs(**HERE), made.loss(device=CPU))
    run, _ = step._inductor(setting)
    _, code = run_and_get_code(lambda: run(setting.x).sum().backward())
    assert len(code) == 2
    assert not any("lbi.boundary" in text for text in code)


@pytest.mark.parametrize(
    ("name", "regions"), [(cases.MLP, 2), (cases.MLP, 3), (cases.TRANSFORMER, 2), (cases.TRANSFORMER, 4)]
)
def test_the_hand_written_backward_delivers_to_separate_parameters(name: str, regions: int):
    made = case(name, regions)
    dense = made.model(**HERE)
    bounded = lbi_compile.transform(dense, made.example(**HERE), regions=made.starts, r=5, interface=made.interface)
    with torch.no_grad():  # no parameter at a value that hides an error
        for i, parameter in enumerate(bounded.parameters()):
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(i))
            parameter.add_(0.1 * noise)
    x = made.inputs(**HERE)
    net = HAND[name](bounded)
    values = [parameter.data_ptr() for parameter in bounded.parameters()]
    made.loss(device=CPU)(net(x)).backward()
    got = {name: parameter.grad for name, parameter in net.bounded.named_parameters()}
    assert all(parameter.grad is None for parameter in bounded.parameters())
    made.loss(device=CPU)(bounded(x)).backward()
    expected = {name: parameter.grad for name, parameter in bounded.named_parameters()}
    assert max(relative_errors(got, expected).values()) < 1e-12
    assert values == [parameter.data_ptr() for parameter in bounded.parameters()]
    # an optimizer's step on the separate parameters is one on the stacks
    with torch.no_grad():
        for own, other in zip(net.bounded.parameters(), bounded.parameters(), strict=True):
            assert own.grad is not None
            own.sub_(own.grad, alpha=0.1)
            other.sub_(own.grad, alpha=0.1)
    torch.testing.assert_close(net(x), bounded(x))


def test_the_hand_written_backward_refuses_another_model():
    made = case(cases.MLP, r=3)  # too narrow for a norm
    dense = made.model(**HERE)
    bounded = lbi_compile.transform(dense, made.example(**HERE), regions=made.starts, r=3, interface="pooled")
    with pytest.raises(EngineError, match="r = 3"):
        hand.HandWrittenMLP(bounded)
    made = case(cases.TRANSFORMER)
    gated = lbi_compile.transform(made.model(**HERE), made.example(**HERE), regions=made.starts, r=5, cell="gru")
    with pytest.raises(EngineError, match="cell gru"):
        hand_token.HandWrittenTransformer(gated)


def test_a_case_is_the_same_whatever_was_drawn_before():
    made = case(cases.TRANSFORMER)
    state = torch.get_rng_state()
    first = made.model(**HERE)
    torch.testing.assert_close(torch.get_rng_state(), state)
    torch.rand(3)
    torch.testing.assert_close(dict(made.model(**HERE).named_parameters()), dict(first.named_parameters()))
    assert torch.equal(made.inputs(**HERE), made.inputs(**HERE))


def test_deep_cases_keep_to_one_scale():
    (made,) = cases.make(cases.MLP, cases.Shape(256, 16, 8, 4), sizes=[cases.Size(64)])
    out = made.model(**HERE)(made.inputs(**HERE))
    assert 0.05 < out.std() < 5
