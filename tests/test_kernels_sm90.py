"""Every variant of the scan kernels compiled for sm_90 without a GPU: no spills, few registers, loads ahead of time."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lbi_compile.kernels import chunked_form, rows_form, vector_form

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="this triton ships no ptxas")

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int32: "*i32"}
ORDERS = ("row", "column", "any")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WIDTHS = (1, 3, 4, 8, 16, 17, 32, 33, 64)
KERNELS = ("vector", "shared", "rows", "maps", "ends")
# Four warps in each quarter of a multiprocessor, half of what 128 registers allow; 255 is the end.
MANY_REGISTERS = 168


class Built(NamedTuple):
    """What ptxas says, and the PTX."""

    spilled: int
    registers: int
    ptx: str

    @property
    def copies(self) -> set[int]:
        """Bytes of the copies that run ahead of time."""
        return {
            int(size, 16)
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", self.ptx)
        }


def build(
    fn: Any, pointers: dict[str, torch.dtype], known: dict[str, Any], *, aligned: Iterable[str], warps: int
) -> Built:
    """Compile as a launch would: ``known`` are compile-time values, ``aligned`` integers are multiples of 16."""
    names = fn.arg_names
    kinds = {
        name: "constexpr" if name in known else POINTERS[pointers[name]] if name in pointers else "i32"
        for name in names
    }
    compiled = triton.compile(
        ASTSource(
            fn=fn,
            signature=kinds,
            constexprs={(names.index(name),): value for name, value in known.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        said = subprocess.run(
            [PTXAS, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    (stored,) = re.findall(r"(\d+) bytes spill stores", said)
    (used,) = re.findall(r"Used (\d+) registers", said)
    return Built(int(stored), int(used), compiled.asm["ptx"])


def variant(kernel: str, R: int, dtype: torch.dtype, order: str, *, b: bool = True, N: int = 8192) -> Built:
    """One kernel as its form launches it; ``order`` ``"row"`` is a suffix scan, ``"column"`` a prefix scan."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    common = {"R": R, "ORDER": order, "DESCENDING": order != "column"}
    near = {} if order == "any" else {"start_row": 1, "b_row": 1}
    steps = ("j_step", "j_index") if R % 4 == 0 and order != "any" else ()
    inputs = {"J": dtype, "start": dtype, "b": dtype}
    if kernel in ("vector", "shared"):
        shape = vector_form.launch_shape(N, R, dtype)
        known = {
            **common,
            **near,
            "PADDED": shape.padded,
            "BLOCK": shape.block,
            "HAS_B": b,
            "STAGES": vector_form.STAGES,
        }
        known["SHARED"] = kernel == "shared"
        return build(vector_form.scan_kernel, {**inputs, "out": dtype}, known, aligned=steps, warps=shape.warps)
    rows = rows_form.rows_shape(R + b if kernel != "rows" else R, R, dtype)
    if kernel == "rows":
        known = {**common, **near, "PADDED": rows.padded, "ROWS": rows.rows, "HAS_B": b, "STAGES": vector_form.STAGES}
        return build(rows_form.rows_kernel, {**inputs, "out": dtype}, known, aligned=steps, warps=rows.warps)
    known = {**common, **near, "PADDED": rows.padded}
    if kernel == "maps":
        del inputs["start"]
        known.pop("start_row", None)
        known |= {"ROWS": rows.rows, "ROWS_ALL": R + b, "STAGES": vector_form.STAGES, "RANGE": chunked_form._RANGE}
        pointers = {**inputs, "maps": exact, "sound": torch.int32}
        return build(chunked_form.chunk_maps_kernel, pointers, known, aligned=steps, warps=rows.warps)
    blocks = triton.cdiv(R + b, rows.rows)
    known |= {"BLOCKS": blocks, "BLOCKS_PADDED": vector_form.power_of_two(blocks), "HAS_B": b}
    known["CANCELLED"] = chunked_form._CANCELLED[exact]
    pointers = {**inputs, "maps": exact, "sound": torch.int32, "ends": exact}
    warps = chunked_form.ends_warps(R, exact)
    return build(chunked_form.chunk_ends_kernel, pointers, known, aligned=steps, warps=warps)


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_suffice(kernel):
    for R, dtype, order in ((4, torch.float32, "row"), (16, torch.bfloat16, "column"), (32, torch.float32, "any")):
        built = variant(kernel, R, dtype, order)
        assert built.spilled == 0, (R, dtype, order)
        assert built.registers <= MANY_REGISTERS, (R, dtype, order)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_suffice_for_every_variant(kernel, order, dtype):
    worst = (0, 0)
    for R, b in (*((R, True) for R in WIDTHS), (16, False)):
        built = variant(kernel, R, dtype, order, b=b)
        assert built.spilled <= (0 if R <= 32 else 16), (R, b)  # one double at 33 and 64
        worst = max(worst, (built.registers, R))
    assert worst[0] <= MANY_REGISTERS, worst


@pytest.mark.slow
@pytest.mark.parametrize("N", [1, 3, 17])
def test_registers_suffice_for_few_indices(N):
    for R, dtype in product((1, 16, 64), DTYPES):
        assert variant("vector", R, dtype, "row", N=N).spilled == 0, (R, dtype)


def test_jacobians_are_copied_ahead_16_bytes_at_a_time():
    for R, dtype, order in ((4, torch.float32, "row"), (8, torch.bfloat16, "column"), (16, torch.bfloat16, "row")):
        assert 16 in variant("vector", R, dtype, order).copies, (R, dtype, order)
    # Rows of three numbers start anywhere: four bytes at a time, but still ahead.
    assert variant("vector", 3, torch.float32, "row").copies == {4}
    # What the README says of two-byte elements that are not neighbours.
    assert variant("vector", 4, torch.bfloat16, "any").copies == set()


def test_products_are_plain_float32():
    ptx = variant("maps", 32, torch.float32, "row").ptx
    assert "fma.rn.f32" in ptx
    assert "mma." not in ptx
    assert "tf32" not in ptx


def test_spills_are_seen(monkeypatch):
    crowded = vector_form.LaunchShape(padded=1, block=4096, warps=4)
    monkeypatch.setattr(vector_form, "launch_shape", lambda *_: crowded)
    assert variant("vector", 1, torch.float32, "row").spilled > 0
