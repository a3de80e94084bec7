"""Run as a process with ``TRITON_INTERPRET=1``: prints the error of the Triton scans on CPU tensors as JSON.

Triton decides when a kernel is decorated whether it is interpreted, so this cannot happen inside a test process.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import torch
import torch.utils.deterministic
from torch import Tensor

from lbi_compile.kernels import suffix_scan as form
from tests.scan_oracle import R_SIZES, prefix_definition, problem, relative_error, suffix_definition


def cases() -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    for R in R_SIZES:
        for K, N in ((1, 3), (2, 17), (5, 1)) if R < 33 else ((1, 3), (2, 1)):
            for dtype in (torch.float32, torch.float64):
                J, end, b = problem(K, N, R, dtype=dtype)
                assert b is not None
                name = f"{dtype} K={K} N={N} R={R}"
                yield f"{name} plain", J, end, b
                yield f"{name} no b", J, end, None
                yield f"{name} transposed", J.mT.contiguous().mT, end.T.contiguous().T, b
                yield f"{name} one J for all", J[:, :1].expand_as(J), end, b[:, :1].expand_as(b)
                yield (
                    f"{name} gaps",
                    *(torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (J, end, b)),
                )
    yield "torch.float32 K=37", *problem(37, 2, 4, dtype=torch.float32)


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    errors = {}
    for name, J, end, b in cases():
        for direction, scan, definition in (
            ("suffix", form.suffix_scan, suffix_definition),
            ("prefix", form.prefix_scan, prefix_definition),
        ):
            got = scan(J, end, b)
            assert got.is_contiguous()
            assert got.dtype == J.dtype
            errors[f"{direction} {name}"] = relative_error(got, definition(J, end, b))
    J, end, b = problem(0, 2, 3)
    assert form.suffix_scan(J, end, b).equal(end[None])
    assert form.suffix_scan(*problem(2, 0, 3)).shape == (3, 0, 3)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
