"""Run as a process with ``TRITON_INTERPRET=1``: prints the error of the Triton scans on CPU tensors as JSON.

Triton decides when a kernel is decorated whether it is interpreted, so this cannot happen inside a test process. The
one argument is ``few`` or ``many``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.utils.deterministic
from torch import Tensor

from lbi_compile.kernels import chunked_form, reference, suffix_scan
from lbi_compile.kernels.forms import Form
from tests.scan_oracle import (
    R_SIZES,
    hard_problems,
    prefix_definition,
    problem,
    relative_error,
    suffix_definition,
)

VECTOR = Form("vector")
SCANS = (
    ("suffix", suffix_scan.suffix_scan, suffix_definition, reference.suffix_scan),
    ("prefix", suffix_scan.prefix_scan, prefix_definition, reference.prefix_scan),
)


def cases(many: bool) -> Iterator[tuple[str, Form, Tensor, Tensor, Tensor | None]]:
    """Name, form and arguments; a chunk that divides K, one that does not, and one longer than K."""
    for R in R_SIZES if many else (1, 3, 16):
        sizes = ((1, 3), (2, 17), (5, 1)) if R < 33 else ((1, 3), (2, 1))
        for K, N in sizes if many else ((3, 2),):
            for dtype in (torch.float32, torch.float64) if many or R < 16 else (torch.float32,):
                J, end, b = problem(K, N, R, dtype=dtype)
                assert b is not None
                forms = (VECTOR, Form("chunked", 2)) if K > 1 else (VECTOR,)
                for form in forms:
                    name = f"{dtype} {form.name} K={K} N={N} R={R}"
                    yield f"{name} plain", form, J, end, b
                    yield f"{name} no b", form, J, end, None
                    yield f"{name} transposed", form, J.mT.contiguous().mT, end.T.contiguous().T, b
                    yield f"{name} one J for all", form, J[:, :1].expand_as(J), end, b[:, :1].expand_as(b)
                    gaps = (torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (J, end, b))
                    yield f"{name} gaps", form, *gaps
    for chunk in (0, 4, 8, 37, 64):
        form = Form("chunked", chunk) if chunk else VECTOR
        yield f"torch.float32 {form.name} K=37 chunk={chunk}", form, *problem(37, 2, 4, dtype=torch.float32)


def many_vectors(many: bool) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Name and arguments with several vectors per index: fewer, as many and more than a program holds."""
    for R, S in ((3, 1), (4, 9), (16, 16), *(((33, 5), (64, 3), (1, 17)) if many else ())):
        for dtype in (torch.float32, torch.float64):
            J, _, _ = problem(3, 2, R, dtype=dtype)
            end, b = torch.randn(2, S, R, dtype=dtype), torch.randn(3, 2, S, R, dtype=dtype)
            yield f"{dtype} K=3 N=2 R={R} S={S}", J, end, b
            yield f"{dtype} K=3 N=2 R={R} S={S} no b, strided", J.mT.contiguous().mT, end.mT.contiguous().mT, None


def main(many: bool) -> None:
    warnings.simplefilter("error")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    errors: dict[str, float] = {}
    for name, form, J, end, b in cases(many):
        for direction, scan, definition, _ in SCANS:
            got = scan(J, end, b, form=form)
            assert got.is_contiguous()
            assert got.dtype == J.dtype
            errors[f"{direction} {name}"] = relative_error(got, definition(J, end, b))
    for name, J, end, b in many_vectors(many):
        for direction, scan, _, oracle in SCANS:
            exact = oracle(J.double(), end.double(), None if b is None else b.double())
            errors[f"{direction} {name}"] = relative_error(scan(J, end, b).flatten(1, 2), exact.flatten(1, 2))
    J, end, b = problem(0, 2, 3)
    assert suffix_scan.suffix_scan(J, end, b, form=VECTOR).equal(end[None])
    assert suffix_scan.suffix_scan(*problem(2, 0, 3)).shape == (3, 0, 3)
    print(json.dumps({"errors": errors, **hard(4096 if many else 64)}))


def hard(K: int) -> dict[str, dict[str, float]]:
    """Errors where products of Jacobians misbehave, with the guard of the chunked form and without."""
    guarded, bare = {}, {}
    form = Form("chunked", 32)
    # Triton computes with numpy here, which warns where products leave the range: that is what is looked for.
    warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
    for name, J, last, b in hard_problems(K):
        if K > 64 and name not in ("overflow of a product", "growth that b cancels"):
            continue
        exact = reference.suffix_scan(J.double(), last.double(), None if b is None else b.double())
        guarded[f"torch.float32 {name}"] = _row_error(suffix_scan.suffix_scan(J, last, b, form=form), exact)
        if name != "growth that b cancels":
            continue
        mirrored = J.mT.flip(0), last, None if b is None else b.flip(0)
        guarded[f"torch.float32 {name}, prefix"] = _row_error(
            suffix_scan.prefix_scan(*mirrored, form=form).flip(0), exact
        )
        if K <= 64:
            kept, chunked_form._CANCELLED = chunked_form._CANCELLED, {torch.float32: 1e30}
            bare[f"torch.float32 {name}"] = _row_error(suffix_scan.suffix_scan(J, last, b, form=form), exact)
            chunked_form._CANCELLED = kept
    return {"guarded": guarded, "bare": bare}


def _row_error(got: Tensor, exact: Tensor) -> float:
    """As ``relative_error``, but one index at a time: a failure of one must not hide behind the size of another."""
    return max(relative_error(got[:, n], exact[:, n]) for n in range(got.shape[1]))


if __name__ == "__main__":
    main(sys.argv[1] == "many")
