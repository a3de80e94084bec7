"""The soft-label cross entropy against its definition; run as a program it prints the errors of the Triton form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lbi_compile.kernels import soft_cross_entropy_reference as reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
WEIGHTS = {"hard": 0.5, "flat": 0.01, "soft": 0.4}


def problem(N: int, C: int, *, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, prior and classes; the first row's class is ignored, the second row's prior is one-hot."""
    generator = torch.Generator().manual_seed(N * C)
    draw = torch.randn(2, N, C, generator=generator, dtype=torch.float64)
    prior = (2 * draw[1]).softmax(-1)
    if N > 1:
        prior[1] = F.one_hot(torch.tensor(C // 2), C)
    index = torch.randint(0, C, (N,), generator=generator)
    index[0] = -100
    return (scale * draw[0]).to(dtype), prior.to(dtype), index


def definition(
    logits: Tensor, *, prior: Tensor | None, index: Tensor | None, hard: float, flat: float, soft: float
) -> tuple[Tensor, Tensor]:
    """Row losses and the gradient of their sum, weighted by 1, 2, ...; row by row in float64, by the formula."""
    losses, gradients = [], []
    for n, row in enumerate(logits.double()):
        if index is not None and index[n] < 0:
            losses.append(0.0)
            gradients.append(torch.zeros_like(row))
            continue
        z = row - row.max()
        log_p = z - z.exp().sum().log()
        t = torch.full_like(row, flat)
        loss = -flat * log_p.sum() if flat else torch.zeros((), dtype=torch.float64)
        if index is not None and hard:
            t[index[n]] += hard
            loss = loss - hard * log_p[index[n]]
        if prior is not None and soft:
            q = prior[n].double()
            t = t + soft * q
            loss = loss + soft * sum(v * (v.log() - log_p[c]) for c, v in enumerate(q) if v > 0)
        losses.append(float(loss))
        gradients.append((n + 1) * (t.sum() * log_p.exp() - t))
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)


def measure(form: Callable[..., Tensor], logits: Tensor, **given: Any) -> tuple[float, float, Tensor, Tensor]:
    """Largest errors of loss and gradient, relative to the largest value above 1, and the two themselves."""
    weights = {"hard": 0.0, "flat": 0.0, "soft": 0.0, "prior": None, "index": None, **given}
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    got = form(leaf, **weights)
    (got * torch.arange(1, len(got) + 1, dtype=got.dtype)).sum().backward()
    assert leaf.grad is not None
    got, (loss, gradient) = got.detach(), definition(logits, **weights)
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in ((got, loss), (leaf.grad, gradient))]
    return errors[0], errors[1], got, leaf.grad


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for N, C in ((1, 2), (3, 10), (2, 4100)):
        logits, prior, index = problem(N, C, dtype=dtype)
        yield f"all {N} {C}", logits, {"prior": prior, "index": index, **WEIGHTS}
        yield f"hard {N} {C}", logits, {"index": index, "hard": 1.0}
        yield f"soft {N} {C}", logits, {"prior": prior, "soft": 0.7}
        yield f"flat {N} {C}", logits, {"flat": 0.3}
        yield f"transposed {N} {C}", logits.T.contiguous().T, {"prior": prior.T.contiguous().T, "soft": 0.7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_the_definition(dtype):
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    for name, logits, given in cases(dtype):
        loss, gradient, got, _ = measure(reference.soft_cross_entropy, logits, **given)
        assert got.dtype == dtype, name
        assert loss < limit, (name, loss)
        assert gradient < limit, (name, gradient)


def test_reference_is_torch_cross_entropy():
    logits, prior, index = problem(6, 7)
    every, C = reference.soft_cross_entropy, logits.shape[1]
    torch.testing.assert_close(every(logits, index=index, hard=1.0), F.cross_entropy(logits, index, reduction="none"))
    smooth = F.cross_entropy(logits, index, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(every(logits, index=index, hard=0.8, flat=0.2 / C), smooth)
    divergence = F.kl_div(logits.log_softmax(-1), prior, reduction="none").sum(-1)
    torch.testing.assert_close(every(logits, prior=prior, soft=1.0), divergence)


def test_reference_gradient():
    logits, prior, index = problem(3, 5)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reference.soft_cross_entropy(x, prior=prior, index=index, **WEIGHTS), leaf
    )


def extremes(form: Callable[..., Tensor]) -> None:
    """One-hot targets on logits that overflow, and classes that are masked out."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, -float("inf"), 1.0], [3e38, 0.0, -3e38]], dtype=torch.float32)
    one_hot = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    leaf = logits.clone().requires_grad_()
    loss = form(leaf, prior=one_hot, index=torch.tensor([0, 0, 0]), hard=0.5, soft=0.5)
    loss.sum().backward()
    expected = torch.tensor([0.0, float(torch.tensor(1 + torch.e).log()), 0.0])
    torch.testing.assert_close(loss.detach(), expected)
    p = torch.tensor([[1.0, 0, 0], [1 / (1 + torch.e), 0, torch.e / (1 + torch.e)], [1.0, 0, 0]])
    torch.testing.assert_close(leaf.grad, p - one_hot)
    # a target where the model allows none: infinite, and no number in another row is touched
    loss = form(logits, index=torch.tensor([0, 1, 0]), hard=1.0)
    assert loss.isinf().tolist() == [False, True, False]


def test_reference_at_extremes():
    extremes(reference.soft_cross_entropy)


def test_low_precision_rounds_its_inputs_only():
    logits, prior, index = problem(5, 300, dtype=torch.bfloat16)
    loss, gradient, got, grad = measure(reference.soft_cross_entropy, logits, prior=prior, index=index, **WEIGHTS)
    assert got.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert loss < 1e-4
    assert gradient < 5 * 2**-8  # one rounding of the gradient of the fifth row


@needs_triton
@pytest.mark.slow
def test_triton_form_on_the_interpreter():
    """float32; the interpreter is not to be trusted with bfloat16."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_soft_cross_entropy"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2 * 3 * 5
    assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_triton_form_compiles_without_a_gpu(kernel, dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lbi_compile.kernels import soft_cross_entropy as form

    fn = getattr(form, kernel)
    known = {"HAS_PRIOR": True, "HAS_INDEX": True, "BLOCK": 4096, "logits_class": 1, "prior_class": 1}
    pointers = {"logits": dtype, "prior": "fp32", "index": "i64", "out": dtype}
    pointers |= dict.fromkeys(("loss", "lse", "mass", "grad"), "fp32")
    kinds = {
        name: "constexpr"
        if name in known
        else f"*{pointers[name]}"
        if name in pointers
        else "fp32"
        if name in ("hard", "flat", "soft")
        else "i32"
        for name in fn.arg_names
    }
    compiled = triton.compile(
        ASTSource(
            fn=fn, signature=kinds, constexprs={(fn.arg_names.index(name),): value for name, value in known.items()}
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": form._warps(4096)},
    )
    assert len(compiled.asm["cubin"]) > 1000


def main() -> None:
    warnings.simplefilter("error")
    # the interpreter computes with NumPy, which warns of what `where` drops afterwards
    warnings.filterwarnings("ignore", "(invalid value|divide by zero|overflow) encountered", RuntimeWarning)
    torch.set_num_threads(1)
    from lbi_compile.errors import DoubleBackwardError
    from lbi_compile.kernels import soft_cross_entropy as form

    errors = {}
    for name, logits, given in cases(torch.float32):
        loss, gradient, got, _ = measure(form.soft_cross_entropy, logits, **given)
        assert got.dtype == torch.float32
        errors |= {f"loss {name}": loss, f"gradient {name}": gradient}
    extremes(form.soft_cross_entropy)
    logits, _, index = problem(3, 5, dtype=torch.float32)
    index[1] = 5
    assert form.soft_cross_entropy(logits, index=index, hard=1.0).isnan().tolist() == [False, True, False]
    logits[0] = float("nan")  # the row that is not counted
    leaf = logits.requires_grad_()
    form.soft_cross_entropy(leaf, index=torch.tensor([-100, 0, 1]), hard=1.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert form.soft_cross_entropy(torch.empty(0, 4), flat=1.0).shape == (0,)
    try:
        torch.autograd.grad(form.soft_cross_entropy(leaf[1:], flat=1.0).sum(), leaf, create_graph=True)
    except DoubleBackwardError:
        pass
    else:
        raise AssertionError("a second derivative was taken")
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
