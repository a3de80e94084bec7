"""kernels/reference.py and kernels/suffix_scan.py against the definition, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi_compile._torch import FakeTensorMode, make_fx
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


@needs_triton
def test_triton_form_on_the_interpreter():
    """float32 and float64; the interpreter is not to be trusted with bfloat16."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_scans"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2 * (2 * 5 * (4 * 3 + 2 * 2) + 1)
    wrong = {key: error for key, error in errors.items() if not error < (1e-5 if "float32" in key else 1e-13)}
    assert not wrong


def spills(R: int, dtype: torch.dtype, *, layout: str, N: int = 8192, shape: Any = None) -> int:
    """Bytes of register spills of the kernel on sm_90, compiled without a GPU and assembled by Triton's own ptxas."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lbi_compile.kernels import suffix_scan as form

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip(f"this triton ships no ptxas at {ptxas}")
    shape = shape or form.launch_shape(N, R, dtype)
    # What Triton specialises to at a launch: strides of 1, and multiples of 16.
    known = {
        "R": R,
        "PADDED": shape.padded,
        "BLOCK": shape.block,
        "HAS_B": True,
        "DESCENDING": layout != "prefix",
        **{"suffix": {"j_kept": 1}, "prefix": {"j_summed": 1}, "strided": {}}[layout],
        **({} if layout == "strided" else {"start_row": 1, "b_row": 1}),
    }
    names = form.scan_kernel.arg_names
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}[dtype]
    kinds = {
        name: "constexpr" if name in known else pointer if name in ("J", "start", "b", "out") else "i32"
        for name in names
    }
    aligned = {"J", "start", "b", "out", *(("j_step", "j_index") if R % 4 == 0 and layout != "strided" else ())}
    compiled = triton.compile(
        ASTSource(
            fn=form.scan_kernel,
            signature=kinds,
            constexprs={(names.index(name),): value for name, value in known.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": shape.warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    (stored,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(stored)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["suffix", "prefix", "strided"])
def test_registers_suffice_on_sm_90(layout, dtype):
    for R in (1, 3, 8, 16, 32, 33, 64):
        assert spills(R, dtype, layout=layout) == 0, R


@needs_triton
@pytest.mark.parametrize("N", [1, 3, 17])
def test_registers_suffice_for_few_indices(N):
    for R in (1, 16, 64):
        assert spills(R, torch.float32, layout="suffix", N=N) == 0, R


@needs_triton
def test_spills_are_seen():
    from lbi_compile.kernels.suffix_scan import LaunchShape

    assert spills(1, torch.float32, layout="suffix", shape=LaunchShape(padded=1, block=4096, warps=4)) > 0


@needs_triton
def test_launch_shapes():
    from lbi_compile.kernels.suffix_scan import launch_shape

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for R in range(1, 65):
            for N in (1, 2, 3, 17, 64, 8192):
                padded, block, warps = launch_shape(N, R, dtype)
                assert R <= padded < 2 * R
                assert block & (block - 1) == 0 < block < 2 * N
                assert warps & (warps - 1) == 0 < warps <= 16
