"""Random modules whose captured graphs are DAGs with all that makes cutting hard, and how pieces of a graph are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lbi_compile._torch import pytree
from lbi_compile.capture import Capture, as_inputs, capture
from lbi_compile.passes.insert import OutputName, Program, insert
from lbi_compile.passes.lanes import cut, main_path
from lbi_compile.passes.liveness import Liveness, liveness
from lbi_compile.passes.separators import Separator, separators
from lbi_compile.verify import relative_errors

WIDTH = 4
KINDS = (
    "linear", "linear", "tanh", "skip", "product", "concatenation", "source", "tied", "weight", "dropout",
    "write", "write", "index", "again", "zeros", "buffer", "alias",
)  # fmt: skip
SEQUENCE = (*KINDS, "norm", "skip", "skip", "attention", "shift", "scale")
QUIET = tuple(kind for kind in KINDS if kind not in ("write", "index", "again", "zeros", "buffer", "alias", "source"))


@dataclass(frozen=True)
class Step:
    """One operator of a random module: its kind, and how far back its two arguments lie."""

    kind: str
    first: int
    second: int


def recipes(kinds: Sequence[str] = KINDS, *, longest: int = 9) -> st.SearchStrategy[list[Step]]:
    """Lists of steps; arguments lie near the end more often than not, so that chains and their cuts appear."""
    back = st.sampled_from([1, 1, 1, 2, 2, 3, 5])
    return st.lists(st.builds(Step, st.sampled_from(list(kinds)), back, back), min_size=2, max_size=longest)


class Dag(nn.Module):
    """``x [B, 4]`` (or ``[B, T, 4]``) to the same shape, built from a recipe; ``tap`` adds the value in the middle.

    Skips, products, concatenations, inputs read again late, one weight shared by all ``"tied"`` steps, weights computed
    from parameters, dropout, writes into views (by ``copy_``, ``add_`` and ``index_put_``) that later reads see by
    another name, memory that starts as a constant, and a buffer that is updated. With positions, some steps mix them.
    """

    def __init__(self, steps: Sequence[Step], *, tap: bool = False) -> None:
        super().__init__()
        self.steps, self.tap = tuple(steps), tap
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in steps)
        self.joins = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in steps)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        values = [self.stem(x)]
        memories: list[Tensor] = []
        for i, step in enumerate(self.steps):
            a = values[-min(step.first, len(values))]
            b = values[-min(step.second, len(values))]
            values.append(self._step(i, step.kind, x, a, b, memories))
        out = torch.tanh(values[-1]) + values[-1]
        return (out, values[len(values) // 2]) if self.tap else out

    def _step(self, i: int, kind: str, x: Tensor, a: Tensor, b: Tensor, memories: list[Tensor]) -> Tensor:
        half = WIDTH // 2
        own, join = self.own[i], self.joins[i]
        assert isinstance(own, nn.Linear)
        if kind == "tanh":
            return torch.tanh(a)
        if kind == "skip":
            return a + own(b)
        if kind == "product":
            return a * torch.sigmoid(b)
        if kind == "concatenation":
            return join(torch.cat([a, b], dim=-1))
        if kind == "source":
            return own(a) + x
        if kind == "tied":
            return self.tied(a)
        if kind == "weight":
            return F.linear(a, self.tied.weight * 0.5 + own.weight.T)
        if kind == "dropout":
            return F.dropout(a, 0.3, self.training)
        if kind in ("write", "index", "zeros"):
            memory = torch.zeros_like(x) if kind == "zeros" else a + 0.5
            if kind == "index":
                memory[..., torch.tensor([0, 2])] = b[..., :half]
            else:
                memory[..., :half].copy_(b[..., half:])
            memories.append(memory)
            return memory + torch.tanh(memory)  # saves nothing for backward that a later write could spoil
        if kind == "again" and memories:
            memories[-1][..., half:].add_(a[..., :half])
            return memories[-1] * 1.0
        if kind == "buffer":
            self.count.add_(a.detach().mean(tuple(range(a.dim() - 1))))
            return a + self.count
        if kind == "alias":
            fresh = own(a)
            torch.relu_(fresh)
            return fresh.view(-1, WIDTH) if a.dim() == 2 else fresh
        if kind == "norm":
            return F.layer_norm(a, (WIDTH,)) + own(b)
        if kind == "scale":
            return a * own.bias
        if kind == "attention" and a.dim() == 3:
            return a + F.scaled_dot_product_attention(own(a), b, a, is_causal=True)
        if kind == "shift" and a.dim() == 3:
            return a + own(F.pad(b, (0, 0, 1, 0))[:, :-1])
        return own(a)


@dataclass
class Found:
    """A captured model with what the first passes say of it."""

    capture: Capture
    live: Liveness
    points: tuple[Separator, ...]

    @property
    def gm(self) -> fx.GraphModule:
        return self.capture.graph_module

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.gm.graph.nodes if node.name == name)

    def named(self, part: str) -> list[fx.Node]:
        """Calls whose operator has ``part`` in its name, in program order."""
        return [n for n in self.gm.graph.nodes if n.op == "call_function" and part in str(n.target)]


def find(model: nn.Module, inputs: Any) -> Found:
    """Capture a model and run liveness and separators on it."""
    found = capture(model, as_inputs(model, inputs))
    live = liveness(found.graph_module)
    return Found(found, live, separators(live))


def split(
    found: Found, canvas: fx.Node, ends: Sequence[fx.Node], finishes: Sequence[fx.Node | None] | None = None
) -> Program:
    """Cut a captured model; its attributes are read from the captured module."""

    def owner(target: str) -> tuple[Any, str]:
        path, _, name = target.rpartition(".")
        return found.gm.get_submodule(path), name

    return insert(
        found.gm,
        live=found.live,
        cut=cut(
            found.live,
            main=main_path(found.live, dict.fromkeys(found.live.live, 1))[1],
            canvas=canvas,
            lanes=[[end] for end in ends[:-1]],
            ends=ends,
        ),
        finishes=finishes or [None] * len(ends),
        owner=owner,
        out_spec=found.capture.out_spec,
    )


def run(program: Program, leaves: Sequence[Any], *, gap: Callable[[str, Tensor], Tensor] = lambda _, x: x) -> list[Any]:
    """Execute the pieces in order; ``gap`` sees the name and value of every gap and says what enters it."""
    values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
    program.prologue.run(values)
    program.stem.run(values)
    lane = values[program.canvas]
    for pieces in program.regions:
        values[pieces.entry] = gap(pieces.entry, lane)
        for other in pieces.gaps:
            if other.entry != pieces.entry:
                values[other.entry] = gap(other.entry, values[other.lane])
        pieces.body.run(values)
        if pieces.finish is not None:
            values[pieces.joint] = gap(pieces.joint, values[pieces.anchor])
            pieces.finish.run(values)
        lane = values[pieces.end]
    values[program.head_entry] = gap(program.head_entry, lane)
    program.head.run(values)
    return [values[leaf.name] if isinstance(leaf, OutputName) else leaf for leaf in program.outputs]


@dataclass
class Trace:
    """All that one call leaves behind: outputs, gradients of every parameter, random state, buffers."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    random: Tensor
    buffers: dict[str, Tensor]

    def differences(self, other: Trace, *, reordered: bool = False) -> list[str]:
        """What is not the same bit for bit.

        Pieces may run independent operators in another order than the program, and then autograd sums their gradients
        in another order; with ``reordered`` gradients may differ by the rounding of that.
        """
        if reordered:
            errors = relative_errors(self.gradients, other.gradients)
            other = replace(
                other, gradients={**other.gradients, **{n: self.gradients[n] for n, e in errors.items() if e < 1e-13}}
            )
        pairs: list[tuple[str, Any, Any]] = [("random state", self.random, other.random)]
        pairs += [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(self.outputs, other.outputs, strict=True))]
        pairs += [(f"gradient of {name}", g, other.gradients[name]) for name, g in self.gradients.items()]
        pairs += [(f"buffer {name}", b, other.buffers[name]) for name, b in self.buffers.items()]
        return [what for what, a, b in pairs if not _same(a, b)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def trace(module: nn.Module, call: Callable[[], Any], leaves: Mapping[str, Tensor] | None = None) -> Trace:
    """Run ``call`` from a fixed seed, take gradients of all its float outputs, and put buffers back as they were.

    Gradients are those of every trainable parameter, and of ``leaves`` that require one.
    """
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(11)
    outputs = pytree.tree_leaves(call())
    random = torch.get_rng_state()
    written = {name: buffer.clone() for name, buffer in module.named_buffers()}
    loss = sum((o.double() ** 2).sum() + o.double().sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
    assert isinstance(loss, Tensor)
    parameters = {**dict(module.named_parameters()), **(leaves or {})}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])
    shown = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
    return Trace(shown, dict(zip(parameters, found, strict=True)), random, written)
