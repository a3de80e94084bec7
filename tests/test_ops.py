"""kernels/ops.py: registration, gradients, markers, and what happens where Triton is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lbi_compile._torch import aot_autograd
from lbi_compile.errors import DoubleBackwardError, LBIError, ScanShapeError
from lbi_compile.kernels import ops, reference
from tests.scan_oracle import (
    K_SIZES,
    N_SIZES,
    R_SIZES,
    prefix_definition,
    problem,
    relative_error,
    suffix_definition,
)

lbi = torch.ops.lbi
# torch 2.13 scripts its own forward-mode decompositions when they are first needed.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
SCANS = [
    pytest.param(lbi.suffix_scan, reference.suffix_scan, suffix_definition, id="suffix"),
    pytest.param(lbi.prefix_scan, reference.prefix_scan, prefix_definition, id="prefix"),
]
MARKERS = [pytest.param(lbi.boundary, id="boundary"), pytest.param(lbi.boundary_bwd, id="boundary_bwd")]


def with_grad(*inputs: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.detach().requires_grad_() for x in inputs]


class Record(TorchDispatchMode):
    """The calls of ``torch.ops.lbi`` that reach a kernel, with their plain arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lbi":
            self.calls.append((func._opname, *(x for x in args if isinstance(x, int))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "twin", "definition"), SCANS)
class TestScans:
    @pytest.mark.parametrize("with_b", [True, False])
    def test_opcheck(self, op, twin, definition, with_b):
        J, end, b = problem(3, 2, 4, b=with_b)
        opcheck(op, with_grad(J, end, b))
        opcheck(op, (J.float(), end.float(), b if b is None else b.float()))
        opcheck(op, with_grad(J[:, :1].expand_as(J), end.T.contiguous().T, b))

    def test_forward_and_gradient_at_every_size(self, op, twin, definition):
        for K, N, R in product(K_SIZES, N_SIZES, R_SIZES):
            args = with_grad(*problem(K, N, R))
            out = op(*args)
            assert relative_error(out, twin(*args)) < 1e-12, (K, N, R)
            weight = torch.randn_like(out)
            got, expected = (torch.autograd.grad(y, args, weight) for y in (out, twin(*args)))
            for a, c in zip(got, expected, strict=True):
                assert relative_error(a[None], c[None]) < 1e-11, (K, N, R)

    @pytest.mark.parametrize("with_b", [True, False])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (5, 1, 4)])
    def test_gradcheck(self, op, twin, definition, shape, with_b):
        args = with_grad(*problem(*shape, b=with_b))
        assert torch.autograd.gradcheck(op, args)
        assert torch.autograd.gradgradcheck(op, args)

    def test_gradient_of_some_inputs(self, op, twin, definition):
        J, end, b = problem(3, 2, 4)
        for place in range(3):
            args = [J, end, b]
            args[place] = args[place].clone().requires_grad_()
            got, expected = (torch.autograd.grad(f(*args).sum(), args[place])[0] for f in (op, twin))
            torch.testing.assert_close(got, expected)

    def test_output_is_contiguous_and_no_alias(self, op, twin, definition):
        J, end, b = problem(3, 2, 4)
        out = op(J, end.T.contiguous().T, b)
        assert out.is_contiguous()
        kept = end.clone()
        out.zero_()
        assert torch.equal(end, kept)

    @pytest.mark.parametrize("with_b", [True, False])
    def test_vmap(self, op, twin, definition, with_b):
        for dims in product((0, 2, None), (0, 1, None), (0, 1, None) if with_b else (None,)):
            if dims == (None, None, None):
                continue
            unbatched = [problem(3, 4, 2, b=with_b, seed=seed) for seed in range(5)]
            stacked = [
                sample[0] if dim is None else torch.stack(sample, dim)
                for sample, dim in zip(zip(*unbatched, strict=True), dims, strict=True)
            ]
            got = torch.func.vmap(op, in_dims=dims)(*stacked)
            for i, sample in enumerate(unbatched):
                args = [unbatched[0][j] if dim is None else sample[j] for j, dim in enumerate(dims)]
                torch.testing.assert_close(got[i], twin(*args))

    def test_vmap_of_vmap(self, op, twin, definition):
        Js, ends = torch.randn(2, 3, 4, 5, 2, 2), torch.randn(3, 5, 2)
        got = torch.func.vmap(torch.func.vmap(op, in_dims=(0, 0, None)), in_dims=(0, None, None))(Js, ends, None)
        for i, j in product(range(2), range(3)):
            torch.testing.assert_close(got[i, j], twin(Js[i, j], ends[j]))

    def test_batched_gradients(self, op, twin, definition):
        args = with_grad(*problem(3, 2, 4))
        weights = torch.randn(7, 4, 2, 4, dtype=torch.float64)
        got = torch.autograd.grad(op(*args), args, weights, is_grads_batched=True)
        for i in range(7):
            expected = torch.autograd.grad(twin(*args), args, weights[i])
            for a, c in zip(got, expected, strict=True):
                torch.testing.assert_close(a[i], c)

    @forward_mode
    def test_functorch(self, op, twin, definition):
        J, end, b = problem(3, 2, 4)

        def through(scan):
            return lambda J: scan(J, end, b).sin().sum()

        for transform in (torch.func.grad, torch.func.hessian, lambda f: lambda J: torch.func.jvp(f, (J,), (J,))[1]):
            torch.testing.assert_close(transform(through(op))(J), transform(through(twin))(J))

    @forward_mode
    def test_forward_mode_is_refused_not_dropped(self, op, twin, definition):
        J, end, b = problem(3, 2, 4)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
            op(forward_ad.make_dual(J, J), end, b)

    def test_autocast(self, op, twin, definition):
        args = problem(3, 2, 33, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = op(*args)
        assert got.dtype == torch.float32
        assert torch.equal(got, op(*args))

    def test_flops(self, op, twin, definition):
        with FlopCounterMode(display=False) as counter:
            op(*problem(3, 5, 4))
        assert counter.get_total_flops() == 2 * 3 * 5 * 4 * 4

    def test_compiled_with_a_dynamic_number_of_indices(self, op, twin, definition):
        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g))(graph, example_inputs)

        compiled = torch.compile(lambda J, end, b: op(J * 2, end, b), backend=backend, fullgraph=True, dynamic=True)
        for N in (6, 5, 8):  # the first unlike K and R, or Dynamo would take them for one size
            args = with_grad(*problem(4, N, 3))
            out, expected = compiled(*args), twin(args[0] * 2, *args[1:])
            torch.testing.assert_close(out, expected)
            weight = torch.randn_like(out)
            for a, c in zip(*(torch.autograd.grad(y, args, weight) for y in (out, expected)), strict=True):
                torch.testing.assert_close(a, c)
        assert len(graphs) == 1

    def test_misfits(self, op, twin, definition):
        J, end, b = problem(3, 2, 4)
        for wrong in (
            (J[0], end, b),
            (J[..., :3], end, b),
            (J, end[:1], b),
            (J, end[:, :3], b),
            (J, end[0], b),
            (J, end, b[:2]),
            (J.float(), end, b),
            (J, end, b.float()),
            (J.to("meta"), end, b),
            (J.long(), end.long(), b.long()),
            (J.to(torch.complex64), end.to(torch.complex64), b.to(torch.complex64)),
            (J[..., :0, :0], end[..., :0], b[..., :0]),
        ):
            with pytest.raises(ScanShapeError, match=r"(?s)found: J \[.*expected: J \[K, N, R, R\]") as raised:
                op(*wrong)
            assert isinstance(raised.value, LBIError)


def test_misfit_text():
    J, last, b = problem(3, 2, 4)
    with pytest.raises(ScanShapeError) as raised:
        ops.suffix_scan(J, last[:1].float(), b)
    assert "J [3, 2, 4, 4] torch.float64 on cpu, last [1, 4] torch.float32 on cpu, b [3, 2, 4]" in raised.value.found
    assert "last [N, R]" in raised.value.expected
    assert "cast" in raised.value.do


def test_one_call_reaches_the_kernel_and_its_gradient_is_one_prefix_scan():
    J, last, b = with_grad(*problem(5, 2, 4))
    with Record() as record:
        lam = ops.suffix_scan(J, last, b)
        assert record.calls == [("suffix_scan",)]
        lam.sum().backward()
    assert record.calls == [("suffix_scan",), ("prefix_scan",)]


@pytest.mark.parametrize("op", MARKERS)
class TestMarkers:
    def test_opcheck(self, op):
        for m in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(1, 4).expand(3, 4), torch.randn(2, 3, 4)[:, ::2]):
            # Differentiating boundary_bwd raises on purpose, which opcheck would take for a failure.
            opcheck(op, (m.requires_grad_(op is lbi.boundary), 3, 1))

    def test_copies_with_the_strides_of_its_input(self, op):
        for m in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(2, 4, 3).permute(0, 2, 1), torch.randn(())):
            out = op(m, 0, 0)
            assert torch.equal(out, m)
            assert out.stride() == m.stride()
            assert out.data_ptr() != m.data_ptr()
            assert op(m.to("meta"), 0, 0).stride() == m.stride()

    def test_vmap(self, op):
        m = torch.randn(2, 3, 4)
        for dim in range(3):
            with Record() as record:
                assert torch.equal(torch.func.vmap(op, in_dims=(dim, None, None))(m, 5, 6), m.movedim(dim, 0))
            assert record.calls == [(op.__name__, 5, 6)]

    @forward_mode
    def test_forward_mode(self, op):
        m = torch.randn(3)
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(op(forward_ad.make_dual(m, m + 1), 0, 0))
        assert torch.equal(out.tangent, m + 1)


def test_marker_marks_the_gradient_too():
    m = torch.randn(3, 4, requires_grad=True)
    with Record() as record:
        (ops.boundary(m * 2, 3, 7) ** 2).sum().backward()
    assert record.calls == [("boundary", 3, 7), ("boundary_bwd", 3, 7)]
    torch.testing.assert_close(m.grad, 8 * m.detach())


def test_markers_stand_in_the_compiled_graphs():
    seen = {}

    def keep(name):
        def compiler(graph, _):
            seen[name] = [node for node in graph.graph.nodes if "lbi" in str(node.target)]
            return make_boxed_func(graph)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    m = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(lambda m: ops.boundary(m.sin(), 2, 9).cos(), backend=backend, fullgraph=True)
    compiled(m).sum().backward()
    for name, op in (("forward", lbi.boundary.default), ("backward", lbi.boundary_bwd.default)):
        (node,) = seen[name]
        assert (node.target, *node.args[1:]) == (op, 2, 9)
    torch.testing.assert_close(m.grad, -m.detach().sin().sin() * m.detach().cos())


def test_double_backward_is_refused():
    m = torch.randn(3, requires_grad=True)
    (first,) = torch.autograd.grad((ops.boundary(m, 2, 0) ** 3).sum(), m, create_graph=True)
    torch.testing.assert_close(first, 3 * m**2)
    with pytest.raises(DoubleBackwardError, match="boundary 2") as raised:
        first.sum().backward()
    assert "create_graph" in raised.value.do


def test_marker_batched_gradients():
    m = torch.randn(3, requires_grad=True)
    (got,) = torch.autograd.grad(ops.boundary(m.sin(), 0, 0), m, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(got, m.detach().cos().diag())


@forward_mode
def test_marker_under_functorch():
    def f(m):
        return (ops.boundary(m.sin(), 0, 0) ** 2).sum()

    m = torch.randn(3)
    torch.testing.assert_close(torch.func.grad(f)(m), torch.sin(2 * m))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(m.expand(2, 3)), torch.sin(2 * m).expand(2, 3))
    torch.testing.assert_close(torch.func.jvp(f, (m,), (torch.ones(3),))[1], torch.sin(2 * m).sum())
    torch.testing.assert_close(torch.func.hessian(f)(m), (2 * torch.cos(2 * m)).diag())


def test_marker_without_grad():
    m = torch.randn(3, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not ops.boundary(m, 0, 0).requires_grad


WITHOUT_TRITON = """
import sys, warnings
{break_triton}
sys.modules["transformers"] = None
warnings.simplefilter("error")
import torch
import lbi_compile
from lbi_compile.kernels import ops, reference
assert "lbi_compile.kernels.suffix_scan" not in sys.modules
J, last, b = (torch.randn(*size, dtype=torch.float64) for size in ((3, 2, 4, 4), (2, 4), (3, 2, 4)))
expected = reference.suffix_scan(J, last, b)
assert torch.allclose(ops.suffix_scan(J, last, b), expected)
on_cuda = ops._on_cuda("suffix_scan", "last")  # never asks where its tensors are
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert all(torch.equal(on_cuda(J, last, b), expected) for _ in range(3))
(warning,) = caught
assert warning.category is RuntimeWarning
print(warning.message)
"""


@pytest.mark.parametrize(
    ("break_triton", "said"),
    [
        pytest.param("sys.modules['triton'] = None", "import of triton halted", marks=pytest.mark.slow),
        ("sys.path.insert(0, {folder!r})", "libtriton.so: bad"),
    ],
    ids=["missing", "broken"],
)
def test_without_triton(tmp_path, break_triton, said):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: bad')")
    script = WITHOUT_TRITON.format(break_triton=break_triton.format(folder=str(tmp_path)))
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "plain torch operators" in done.stdout


@pytest.mark.slow
def test_under_inductor():
    args = with_grad(*problem(4, 5, 3))

    def f(J, last, b):
        return ops.boundary(lbi.suffix_scan(J.sin(), last * 2, b).mT, 0, 0).cos()

    torch.compile(f, fullgraph=True)(*args).sum().backward()
    got = [x.grad for x in args]
    for a, c in zip(got, torch.autograd.grad(f(*args).sum(), args), strict=True):
        torch.testing.assert_close(a, c)
