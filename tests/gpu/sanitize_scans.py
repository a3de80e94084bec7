"""Every Triton form once, small: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitize_scans`` and its like.

Small, since a sanitizer slows kernels down a hundredfold. Run it from the root of the repository with each of the tools
``memcheck``, ``racecheck``, ``initcheck`` and ``synccheck``, and with ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, so that a
read behind the end of a tensor is not a read of its neighbour. Exits with 1 where a result is wrong.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from lbi_compile.kernels import reference, suffix_scan
from lbi_compile.kernels.forms import Form
from tests.scan_oracle import problem, relative_error


def main() -> int:
    wrong = 0
    scans = ((suffix_scan.suffix_scan, reference.suffix_scan), (suffix_scan.prefix_scan, reference.prefix_scan))
    for R, dtype, (scan, twin) in product((1, 3, 16, 33, 64), (torch.float32, torch.bfloat16, torch.float64), scans):
        J, end, b = (x.cuda() for x in problem(5, 3, R, dtype=dtype) if x is not None)
        S = 9
        many, many_b = end[:, None].expand(3, S, R), b[:, :, None].expand(5, 3, S, R)
        runs = (
            ("vector", (J, end, b), {"form": Form("vector")}),
            ("vector, no b", (J, end, None), {"form": Form("vector")}),
            ("vector, one J for all", (J[:, :1].expand_as(J), end, b), {"form": Form("vector")}),
            ("vector, strided", (J.mT.contiguous().mT, end, b), {"form": Form("vector")}),
            ("chunked", (J, end, b), {"form": Form("chunked", 2)}),
            ("chunked, no b", (J, end, None), {"form": Form("chunked", 2)}),
            ("chunked, walked", (J * 1e30, end, None), {"form": Form("chunked", 2)}),
            ("rows", (J, many, many_b), {}),
            ("rows, no b", (J, many, None), {}),
        )
        for name, args, options in runs:
            if name == "chunked, walked" and dtype != torch.float64:
                continue  # the result itself would overflow
            got = scan(*args, **options)
            exact = twin(*(x if x is None else x.double().cpu() for x in args))
            bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
            error = relative_error(got.flatten(1), exact.flatten(1))
            if not error < bound:
                wrong += 1
                print(f"{scan.__name__}, {name}, R={R}, {dtype}: error {error:.1e}")
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    sys.exit(main())
