"""A bounded model is called as the module it was made from: arguments, results, gradients of inputs, grad modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import FutureLeakError, PlanError, transform
from tests import cases
from tests.models import CausalTransformer
from tests.small_models import gradients, mlp, same, seeded, small

# -- arguments and results


class Options(nn.Module):
    """Takes tensors, numbers, flags and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: float | None = 2.0, *, flip: bool = False
    ) -> dict[str, Any]:
        if shift is not None:
            x = x + shift
        if scale is not None:
            x = x * scale
        out = self.inner(x)
        return {"out": -out if flip else out, "parts": (out, [x]), "scale": scale, "nothing": None}


def flat(result: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.5},
        {"scale": 3},
        {"scale": None},
        {"shift": None},
        {"shift": torch.linspace(-1, 1, 25).view(5, 5)},
        {"shift": torch.linspace(-1, 1, 5)},
        {"flip": True},
        {"flip": True, "shift": torch.ones(5, 5), "scale": -1.0},
    ],
    ids=lambda options: "-".join(f"{k}={list(v.shape) if isinstance(v, Tensor) else v}" for k, v in options.items()),
)
def test_arguments_that_are_not_the_example_ones(options):
    model, x = Options(), torch.randn(5, 5)
    bounded = transform(model, x, regions=3, interface="identity")
    got, expected = bounded(x, **options), model(x, **options)
    assert list(got) == list(expected)
    assert (got["scale"], got["nothing"], type(got["parts"])) == (expected["scale"], None, tuple)
    assert type(got["scale"]) is type(expected["scale"])
    assert torch.equal(got["out"], expected["out"])
    assert torch.equal(got["parts"][0], expected["parts"][0])
    assert torch.equal(got["parts"][1][0], expected["parts"][1][0])
    again = bounded(x, **options)
    assert torch.equal(again["out"], got["out"])
    assert len(bounded.programs) == (1 if options in ({}, {"shift": None}) else 2)


def test_positions_and_names_are_one_call():
    model, x, shift = Options(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, shift), regions=2, r=4)
    out = bounded(x, shift)["out"]
    for got in (bounded(x, shift=shift), bounded(shift=shift, x=x), bounded(x=x, shift=shift)):
        assert torch.equal(got["out"], out)
    assert len(bounded.programs) == 1


def test_the_forms_of_example_inputs_make_one_plan():
    model, x, shift = Options(), torch.randn(5, 5), torch.randn(5, 5)
    forms = [(x, shift), [x, shift], {"x": x, "shift": shift}, {"shift": shift, "x": x}, ((x,), {"shift": shift})]
    made = [transform(model, form, regions=2, r=4) for form in forms]
    assert len({bounded.plan.hash for bounded in made}) == 1
    assert len({str(bounded.programs[0]) for bounded in made}) == 1
    assert lbi_compile.plan(model, x, regions=2, r=4) == lbi_compile.plan(model, (x,), regions=2, r=4)


def test_a_forward_with_nameless_arguments():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, *parts: Tensor, factor: float = 1.0, **more: Tensor) -> Tensor:
            return self.inner(factor * sum(parts) + sum(2 * more[name] for name in more))

    model, x, y = Summed(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, y), regions=3, interface="identity")
    for size in (5, 7):
        x, y = torch.randn(size, 5), torch.randn(size, 5)
        assert torch.equal(bounded(x, y), model(x, y))
    assert len(bounded.programs) == 1
    assert torch.equal(bounded(x), model(x))
    assert torch.equal(bounded(x, x, factor=0.5), model(x, x, factor=0.5))
    assert torch.equal(bounded(x, extra=y), model(x, extra=y))


def test_a_forward_with_positional_only_arguments():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, /, y: Tensor) -> Tensor:
            return self.inner(x - y)

    model, x, y = Pair(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, y), regions=3, interface="identity")
    x, y = torch.randn(7, 5), torch.randn(7, 5)
    assert torch.equal(bounded(x, y), model(x, y))
    assert torch.equal(bounded(x, y=y), model(x, y))


def test_two_lengths_that_are_equal_by_chance():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.inner(x + context.mean(1, keepdim=True))

    model = Reader()
    bounded = transform(model, (torch.randn(3, 4, 5), torch.randn(3, 4, 5)), regions=3, interface="identity")
    for batch, here, there in ((3, 4, 6), (2, 7, 4)):
        x, context = torch.randn(batch, here, 5), torch.randn(batch, there, 5)
        assert torch.equal(bounded(x, context), model(x, context))
    assert len(bounded.programs) == 1


def test_the_callers_tensors_get_no_marks():
    model, x = Options(), torch.randn(5, 5)
    shift = torch.randn(5)  # as long as the batch, by chance
    bounded = transform(model, (x, shift), regions=2, r=4)
    bounded(x, shift)
    assert vars(x) == vars(shift) == {}


def test_another_argument_may_not_move_the_boundaries():
    """The sums of this model stand at its top, so that one more of them would make each name mean the next one."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = self.stem(x)
            if shift is not None:
                x = x + shift
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model, x, shift = Flat(), torch.randn(5, 5), torch.randn(5, 8)
    bounded = transform(model, x, regions=4, interface="identity")
    assert [point.name for point in bounded.plan.boundaries] == [f"<model>:add[{k}]" for k in range(3)]
    with pytest.raises(PlanError, match=r"blocks\.0.* region 1 of this capture, but in region 0 of the plan"):
        bounded(x, shift)
    assert torch.equal(bounded(x), model(x))
    assert torch.equal(transform(model, (x, shift), regions=4, interface="identity")(x, shift), model(x, shift))


class OwnLoss(nn.Module):
    """Gives the last logits, or with targets all of them and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=3)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.inner(tokens)
        if targets is None:
            return logits[:, -1:], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("targets", [True, False])
def test_a_model_with_its_own_loss(regions, targets):
    model, tokens = OwnLoss(), torch.randint(11, (2, 8))
    example = (tokens, tokens) if targets else tokens
    bounded = transform(model, example, regions=regions, interface="identity")
    for call in ((tokens,), (tokens, tokens)):
        (got, loss), (expected, expected_loss) = bounded(*call), model(*call)
        assert torch.equal(got, expected)
        assert (loss is None) if expected_loss is None else torch.equal(loss, expected_loss)


def test_a_leak_that_only_other_arguments_show():
    """Without targets only the last logit comes out, for which a pooled latent sees no later position."""
    model, tokens = OwnLoss(), torch.randint(11, (2, 8))
    bounded = transform(model, tokens, regions=3, r=4)
    assert bounded.plan.interface == "pooled"
    for _ in range(2):
        with pytest.raises(FutureLeakError, match="'pooled'"):
            bounded(tokens, tokens)
    assert transform(model, (tokens, tokens), regions=3, r=4).plan.interface == "token"
    allowed = transform(model, tokens, regions=3, r=4, allow_leak=True)
    assert allowed(tokens, tokens)[0].shape == (2, 8, 11)


def test_nested_inputs():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.inner(batch["x"] + batch["more"][1])

    model, x = Nested(), torch.randn(5, 5)
    bounded = transform(model, ({"x": x, "more": (3, x)},), regions=3, interface="identity")
    x = torch.randn(7, 5)
    batch = {"x": x, "more": (3, 2 * x)}
    assert torch.equal(bounded(batch), model(batch))
    assert torch.equal(bounded(dict(reversed(batch.items()))), model(batch))


@pytest.mark.parametrize("backward", ["autograd", "chain"])
def test_gradients_of_inputs(backward):
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    for bounded in (
        transform(model, x, regions=3, interface="identity", backward=backward),
        transform(model, x.clone().requires_grad_(), regions=1, backward=backward),
    ):
        wanted = x.clone().requires_grad_()
        bounded(wanted).square().sum().backward()
        expected = x.clone().requires_grad_()
        model(expected).square().sum().backward()
        torch.testing.assert_close(wanted.grad, expected.grad, rtol=1e-12, atol=1e-14)
        assert not bounded.requires_grad_(False)(x).requires_grad
        assert bounded(wanted).requires_grad  # frozen, it still hands gradients to its input
        bounded.requires_grad_(True)


def test_gradients_of_inputs_under_the_scan():
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    bounded = transform(model, x, regions=3, interface="identity", backward="scan")
    wanted, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    bounded(wanted).square().sum().backward()
    assert (bounded.engine.name, bounded.engine.jacobians) == ("scan", 2)
    assert vars(wanted) == {}  # Dynamo's marks are gone
    model(expected).square().sum().backward()
    torch.testing.assert_close(wanted.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_hugging_face_outputs_and_labels():
    model, x = cases.gpt2(depth=2)
    tokens = x["input_ids"]
    bounded = transform(model.eval(), x, regions=2, r=4)
    out, expected = bounded(tokens), model(tokens, use_cache=False)
    assert type(out) is type(expected)
    assert list(out) == list(expected) == ["logits"]
    assert model.config.use_cache is True
    with_loss = bounded(input_ids=tokens, labels=tokens)
    assert list(with_loss) == ["loss", "logits"]
    assert torch.equal(with_loss.logits, out.logits)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(with_loss.loss, loss)
    with_loss.loss.backward()
    assert all(p.grad is not None for p in bounded.parameters())
    row = bounded(tokens, return_dict=False)
    assert type(row) is tuple
    assert torch.equal(row[0], out.logits)
    assert bounded(tokens[:1, :4]).logits.shape == (1, 4, 32)
    assert len(bounded.programs) == 3


# -- grad modes and autocast


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    _, x, bounded = small()
    out = bounded(x)
    with mode():
        quiet, (hidden, taps) = bounded(x), bounded.forward_regions(x)
    assert torch.equal(quiet, out)
    assert torch.equal(hidden, out)
    assert not quiet.requires_grad
    assert not any(h.requires_grad for h in taps.h)
    assert bounded.engine.name == "none"
    assert bounded(x).requires_grad


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_where_the_first_call_happens_does_not_matter(context, name):
    """Neither the captured program nor the interface parameters take anything from the context of that call."""
    model, x = cases.MODELS[name]()
    expected = transform(copy.deepcopy(model), x, regions=3, r=4)
    lazy = transform(model, regions=3, r=4)
    with context():
        lazy(x)
        early = transform(model, x.clone(), regions=3, r=4)
    reference = seeded(lambda: expected(x))
    for bounded in (lazy, early):
        out = seeded(lambda bounded=bounded: bounded(x))
        assert out.dtype == torch.float32
        assert torch.equal(out, reference)
        assert same(gradients(bounded, out), gradients(expected, seeded(lambda: expected(x))))
        assert all(p.requires_grad and not p.is_inference() for p in bounded.parameters())


def test_programs_can_be_read():
    _, x, bounded = small()
    bounded.eval()(x)
    assert len(bounded.programs) == 2
    for program in bounded.programs:
        text = str(program)
        parts = ["prologue", "stem", "region 0 body", "region 1 body", "region 2 body", "head"]
        assert [line[2:] for line in text.splitlines() if line.startswith("# ")] == parts
        assert text.count("torch.ops.aten.linear.default") == 2 + 2 * 3
