"""The eager default and backend ``lbi``: what they share with plain PyTorch, and what they record."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from lbi_compile import _torch, backend
from lbi_compile.backend import eager_backend, last_record
from lbi_compile.errors import EngineError, OptionError
from lbi_compile.passes import scan_backward
from lbi_compile.passes.scan_backward import ScanRecord
from tests.marked import EXACT, Token, mark, pooled_attention, pooled_mlp, step

BATCHES = (3, 5, 9)


@pytest.fixture(autouse=True)
def no_graphs_yet():
    torch._dynamo.utils.counters.clear()


def eager(module: nn.Module) -> tuple[Any, ScanRecord]:
    record = ScanRecord()
    return torch.compile(module, backend=eager_backend(record), dynamic=True, fullgraph=True), record


def flat(batch: int) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.double)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_graph_can_run_backward_twice_with_a_dynamic_batch():
    module = pooled_mlp(2).double()
    compiled, _ = eager(module)
    for batch in BATCHES[:2]:
        x = flat(batch)
        once = step(module, module, x)
        module.zero_grad()
        torch.manual_seed(3)
        loss = compiled(x).square().sum()
        for times in (1, 2):
            loss.backward(retain_graph=times == 1)
        for parameter, gradient in zip(module.parameters(), once.gradients[1:], strict=True):
            torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert graphs() == 1


def test_saved_tensors_die_where_they_are_used_last():
    class Masks(TorchDispatchMode):
        """Counts at each operator of a backward the dropout masks that are still alive."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, weakref.ref[Tensor]] = {}
            self.alive = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for x in args:
                if isinstance(x, Tensor) and x.dtype == torch.bool:
                    self.seen[id(x)] = weakref.ref(x)
            if func is not torch.ops.aten.detach.default:  # autograd storing the gradients, after the graph
                self.alive = sum(mask() is not None for mask in self.seen.values())
            return func(*args, **(kwargs or {}))

    module = pooled_mlp(3).double()
    compiled, _ = eager(module)
    masks = Masks()
    step(compiled, module, flat(3), watch=masks)
    assert len(masks.seen) == 4  # one a region, and one tensor of all for the Jacobians
    assert masks.alive == 0


def test_two_forwards_before_their_backwards():
    module = pooled_mlp(2).double()
    compiled, _ = eager(module)
    inputs = flat(3), flat(4)
    gradients = []
    for call in (module, compiled):
        module.zero_grad()
        torch.manual_seed(5)
        outputs = [call(x) for x in inputs]
        for power, y in enumerate(outputs, 2):
            y.pow(power).sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=EXACT, atol=EXACT)


def test_the_record_follows_what_ran_last():
    module = pooled_mlp(2).double()
    compiled, record = eager(module)
    x = flat(3)
    assert record.status == "none"
    for _ in range(2):
        compiled(x)
        assert (record.status, record.scans, record.jacobians) == ("scan", 1, 2)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.manual_seed(1)
                expected = module(x)
                torch.manual_seed(1)
                assert torch.equal(compiled(x), expected)
            assert (record.status, record.scans) == ("inference", 0)
    module.eval()
    assert torch.equal(compiled(x), module(x))
    assert record.status == "scan"


def test_second_derivatives_are_refused():
    module = pooled_mlp(2, p=0.0).double()
    compiled, _ = eager(module)
    x = flat(3).requires_grad_()
    (g,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_marked_latents_that_are_returned_alias_nothing():
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            m = mark(x, 0)
            n = self.a(m)
            p = mark(n, 1)
            return m, n, p, self.b(p)

    module = Taps()
    compiled, record = eager(module)
    x = torch.randn(3, 4, requires_grad=True)
    m, n, p, _ = compiled(x)
    assert record.jacobians == 1
    assert len({t.data_ptr() for t in (x, m, n, p)}) == 4
    with torch.no_grad():
        p.zero_()
    torch.testing.assert_close(n, module.a(x))
    torch.testing.assert_close(m, x)


def test_errors_reach_the_caller_and_the_record():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first = mark(self.a(x), 0)
            return mark(self.c(mark(self.b(first), 1)) + first, 2)

    compiled, record = eager(Skip())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(torch.randn(3, 6))
    assert isinstance(caught.value.inner_exception, EngineError)
    assert record.error is caught.value.inner_exception
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Skip(), backend="lbi")(torch.randn(3, 6))
    assert last_record().error is caught.value.inner_exception
    assert last_record().status == "failed"


def test_the_backend_is_found_by_name():
    assert "lbi" in torch._dynamo.list_backends()


@pytest.mark.slow
def test_inductor():
    module = pooled_mlp(2).double()
    options = {"fallback_random": True}  # eager's random numbers, so that dropout masks are equal
    compiled = torch.compile(module, backend="lbi", dynamic=True, fullgraph=True, options=options)
    x = flat(BATCHES[0])
    expected = step(module, module, x)
    found, code = run_and_get_code(lambda: step(compiled, module, x))
    assert [text.count("torch.ops.lbi.suffix_scan.default(") for text in code] == [0, 1]
    assert found.error(expected) <= EXACT
    for batch in BATCHES[1:]:
        x = flat(batch)
        expected, found = step(module, module, x), step(compiled, module, x)
        torch.testing.assert_close(found.output, expected.output, rtol=EXACT, atol=EXACT)
        assert torch.equal(found.random, expected.random)
        assert found.error(expected) <= EXACT
    loss = compiled(x.requires_grad_()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert graphs() == 1
    assert (last_record().status, last_record().scans, last_record().jacobians) == ("scan", 1, 2)
    assert torch._inductor.config.joint_custom_pre_pass is None


def test_inductor_without_markers():
    module = nn.Linear(6, 4)
    compiled = torch.compile(module, backend="lbi")
    x = torch.randn(3, 6)
    expected, found = step(module, module, x), step(compiled, module, x)
    assert found.error(expected) < 1e-5
    assert (last_record().status, last_record().inserted) == ("plain", 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    assert last_record().status == "inference"


@pytest.mark.parametrize(
    ("module", "batches"),
    [
        (Token("gru"), [(3, 7), (5, 11)]),
        (Token("linear"), [(3, 7), (5, 11)]),
        (pooled_attention(), [(3, 7), (5, 11)]),
        (pooled_attention(p=0.1, masked=True), [(3, 7), (5, 11)]),
        (pooled_mlp(3, aux=(1, 2)), [(3,), (5,)]),
        (pooled_mlp(3, checkpoint=True), [(3,), (5,)]),
    ],
    ids=["gru", "linear", "attention", "attention with dropout and mask", "auxiliary", "checkpoint"],
)
@pytest.mark.slow
def test_inductor_on_other_models(module: nn.Module, batches: list[tuple[int, ...]]):
    module = module.double()
    compiled = torch.compile(module, backend="lbi", dynamic=True, fullgraph=True, options={"fallback_random": True})
    for shape in batches:
        x = torch.randn(*shape, 6, dtype=torch.double)
        assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
    assert graphs() == 1
    assert last_record().status == "scan"
    assert last_record().shared == (2 if isinstance(module, Token) and "GRU" not in str(module) else 0)


@pytest.mark.slow
def test_bf16_autocast_under_inductor_is_as_exact_as_its_autograd():
    module = pooled_mlp(3, p=0.0)
    marked = torch.compile(module, backend="lbi", dynamic=True)
    chain = torch.compile(module, backend="inductor", dynamic=True)
    errors: dict[str, list[float]] = {"lbi": [], "inductor": []}
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(16, 6)
        exact = step(module.double(), module, x.double())
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            errors["lbi"].append(step(marked, module, x).error(exact))
            errors["inductor"].append(step(chain, module, x).error(exact))
    median = {name: sorted(values)[2] for name, values in errors.items()}
    assert 0 < median["lbi"] <= 1.5 * median["inductor"]


@pytest.mark.parametrize("arguments", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}])
def test_mode_and_options_reach_inductor(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, Any]] = []

    def compile_with_inductor(gm: torch.fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
        seen.append(options)
        return gm.forward

    monkeypatch.setattr(_torch, "compile_with_inductor", compile_with_inductor)
    torch.compile(nn.Linear(6, 4), backend="lbi", **arguments)(torch.randn(3, 6))
    (options,) = seen
    assert options["max_autotune"] is True
    assert options.get("coordinate_descent_tuning", False) == ("mode" in arguments)
    assert options["joint_custom_pre_pass"].uuid()


def test_an_unknown_option_is_refused():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Unexpected optimization option no_such"):
        torch.compile(nn.Linear(6, 4), backend="lbi", options={"no_such": 1})(torch.randn(3, 6))


def test_the_place_of_the_rewrite_cannot_be_taken():
    class Other:
        def __call__(self, graph: Any) -> None: ...

    with torch._inductor.config.patch(joint_custom_pre_pass=Other()), pytest.raises(OptionError) as caught:
        backend.lbi(torch.fx.symbolic_trace(nn.ReLU()), [torch.randn(3)])
    assert "joint_custom_pre_pass is set" in caught.value.found
    assert "joint_custom_post_pass" in caught.value.do


def passes_behind(*names: str) -> set[str]:
    """Files of these passes and of all passes that they import."""
    place = Path(str(scan_backward.__file__)).parent
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            imports = re.findall(r"^from lbi_compile\.passes\.(\w+) import", (place / name).read_text(), re.MULTILINE)
            left += [f"{module}.py" for module in imports]
    return found


def test_every_pass_that_the_rewrite_imports_is_a_source_of_it():
    files = {Path(name).name for name in backend.rewrite_sources()}
    assert passes_behind("scan_backward.py", "batch_regions.py") <= files


def test_caches_depend_on_the_source_of_the_rewrite(tmp_path: Path):
    files = [Path(name) for name in backend.rewrite_sources()]
    assert {file.name for file in files} >= {"scan_backward.py", "jacobian_slices.py", "batch_cotangents.py"}
    copies = [tmp_path / file.name for file in files]
    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes())
    seen = set()
    for copy in copies:
        copy.write_text(copy.read_text() + "\n# changed\n")
        folder = tmp_path / copy.stem
        folder.mkdir()
        fresh = tuple(str(folder / c.name) for c in copies)
        for name, c in zip(fresh, copies, strict=True):
            Path(name).write_bytes(c.read_bytes())
        seen.add(_torch.graph_pass(lambda graph: None, fresh).uuid())
    assert len(seen) == len(copies)
