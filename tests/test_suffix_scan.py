"""kernels/reference.py and kernels/suffix_scan.py against the definition, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lbi_compile._torch import FakeTensorMode
from lbi_compile.kernels import reference
from tests.scan_oracle import (
    K_SIZES,
    N_SIZES,
    R_SIZES,
    prefix_definition,
    problem,
    relative_error,
    suffix_definition,
)

SCANS = [
    pytest.param(reference.suffix_scan, suffix_definition, id="suffix"),
    pytest.param(reference.prefix_scan, prefix_definition, id="prefix"),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(("scan", "definition"), SCANS)
@pytest.mark.parametrize("with_b", [True, False])
@pytest.mark.parametrize("R", R_SIZES)
def test_reference_is_the_definition(scan, definition, R, with_b):
    for K in K_SIZES:
        for N in N_SIZES:
            J, end, b = problem(K, N, R, b=with_b)
            got = scan(J, end, b)
            assert got.shape == (K + 1, N, R)
            assert relative_error(got, definition(J, end, b)) < 1e-12, (K, N)


@pytest.mark.parametrize(("scan", "definition"), SCANS)
def test_nothing_to_scan(scan, definition):
    J, end, b = problem(0, 3, 4)
    assert torch.equal(scan(J, end, b), end[None])
    J, end, b = problem(2, 0, 4)
    assert scan(J, end, b).shape == (3, 0, 4)


def test_adjoints_are_gradients_of_a_chain():
    J, last, b = problem(5, 3, 4)
    assert b is not None
    m, loss = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.zeros(())
    latents = [m]
    for k in range(5):
        loss = loss + (b[k] * latents[-1]).sum()
        latents.append(torch.einsum("nij,nj->ni", J[k], latents[-1]))
    loss = loss + (last * latents[-1]).sum()
    adjoints = torch.autograd.grad(loss, latents)
    assert relative_error(reference.suffix_scan(J, last, b), torch.stack(adjoints)) < 1e-13


def test_the_oracle_tells_mistakes_apart():
    J, last, b = problem(5, 3, 4)
    exact = suffix_definition(J, last, b)
    wrong = {
        "J instead of its transpose": reference.suffix_scan(J.mT, last, b),
        "b dropped": reference.suffix_scan(J, last, None),
        "Jacobians in reverse order": reference.suffix_scan(J.flip(0), last, b),
        "b one step late": reference.suffix_scan(J, last, None if b is None else b.roll(1, 0)),
        "the other direction": reference.prefix_scan(J, last, b).flip(0),
    }
    assert {name: relative_error(got, exact) > 0.1 for name, got in wrong.items()} == dict.fromkeys(wrong, True)
    assert relative_error(torch.full_like(exact, float("nan")), exact) == float("inf")


@pytest.mark.parametrize(("scan", "definition"), SCANS)
@pytest.mark.parametrize("R", [3, 16, 17])
def test_strided_inputs(scan, definition, R):
    J, end, b = problem(5, 6, R)
    assert b is not None
    for name, args in {
        "transposed J": (J.mT.contiguous().mT, end, b),
        "sliced": (J[::2, 1::2], end[1::2], b[::2, 1::2]),
        "steps innermost": (J.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), end.T.contiguous().T, b),
        "one Jacobian for all": (J[:, :1].expand(5, 6, R, R), end, b),
        "one end for all": (J, end[:1].expand(6, R), b[:, :1].expand(5, 6, R)),
        "one index": (J[:, :1], end[:1], b[:, :1]),
    }.items():
        assert relative_error(scan(*args), definition(*args)) < 1e-13, name


@pytest.mark.parametrize(("scan", "definition"), SCANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [4, 33])
def test_low_precision_rounds_only_its_output(scan, definition, dtype, R):
    J, end, b = problem(37, 3, R, dtype=dtype)
    got, exact = scan(J, end, b), definition(J, end, b)
    assert got.dtype == dtype
    # One rounding, plus 37 steps of float32 relative to the largest value; accumulating in bfloat16 misses this widely.
    slack = 1e-5 * exact.abs().amax((1, 2), keepdim=True)
    assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()


def test_autocast_does_not_reach_in():
    for R in (4, 33):
        J, last, b = problem(5, 3, R, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = reference.suffix_scan(J, last, b), reference.suffix_scan(J[:, :1].expand_as(J), last, b)
        plain = reference.suffix_scan(J, last, b), reference.suffix_scan(J[:, :1].expand_as(J), last, b)
        assert all(torch.equal(a, c) for a, c in zip(got, plain, strict=True))


@pytest.mark.parametrize(("scan", "definition"), SCANS)
@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 1, 1), (1, 2, 17)])
def test_reference_gradient(scan, definition, shape):
    inputs = [x.requires_grad_() for x in problem(*shape) if x is not None]
    assert torch.autograd.gradcheck(scan, inputs, fast_mode=shape[-1] > 4)


@pytest.mark.parametrize(("scan", "definition"), SCANS)
@pytest.mark.parametrize("R", [4, 33])
def test_symbolic_number_of_indices(scan, definition, R):
    traced = make_fx(scan, tracing_mode="symbolic")(*problem(3, 5, R))
    J, end, b = problem(3, 7, R)
    assert relative_error(traced(J, end, b), definition(J, end, b)) < 1e-13
    with FakeTensorMode() as mode:
        fake = scan(*(mode.from_tensor(x) for x in (J, end, b) if x is not None))
    assert fake.shape == (4, 7, R)
    assert fake.dtype == torch.float64


def interpreted(amount: str) -> dict[str, dict[str, float]]:
    """What ``tests/interpreted_scans.py`` prints; the interpreter is not to be trusted with less than float32."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_scans", amount],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of triton 3.6 cannot loop to a bound known at run time under numpy 2.4")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def too_large(errors: dict[str, float]) -> dict[str, float]:
    return {key: error for key, error in errors.items() if not error < (1e-5 if "float32" in key else 1e-13)}


@pytest.mark.slow
@needs_triton
def test_triton_forms_on_the_interpreter():
    said = interpreted("few")
    assert len(said["errors"]) == 2 * ((2 * 2 + 1) * 2 * 5 + 5) + 2 * 3 * 2 * 2
    assert len(said["guarded"]) == 8 + 1
    assert not too_large(said["errors"])
    assert not too_large(said["guarded"])
    # The guard is what the last line rests on.
    assert len(too_large(said["bare"])) == 1


@pytest.mark.slow
@needs_triton
def test_triton_forms_at_every_size_on_the_interpreter():
    said = interpreted("many")
    assert len(said["errors"]) > 500
    assert len(said["guarded"]) == 2 + 1
    assert not too_large(said["errors"])
    assert not too_large(said["guarded"])
