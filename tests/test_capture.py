"""Capture: which axes stay dynamic, how calls are named, what is left as it was, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from lbi_compile._torch import pytree
from lbi_compile.capture import Capture, Inputs, as_inputs, bind, capture, default_inputs, signature
from lbi_compile.errors import (
    DataDependentControlFlowError,
    ExampleInputsError,
)
from tests.models import BatchNormMLP, CausalTransformer, ResidualMLP, VisionTransformer
from tests.untouched import differences, snapshot


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def capturing(model: nn.Module, inputs: Any, **options: Any) -> Capture:
    return capture(model, as_inputs(model, inputs), **options)


def shapes(found: Capture) -> dict[str, list[int | str]]:
    """Sizes of the graph's inputs; a dynamic one is ``"?"``."""
    values = {str(n.target): n.meta.get("val") for n in found.graph_module.graph.find_nodes(op="placeholder")}
    return {
        name: ["?" if isinstance(size, torch.SymInt) else size for size in value.shape]
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def rerun(found: Capture, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The captured graph, called as the model is."""
    inputs = bind(signature(model), args, kwargs)
    return found.graph_module(*inputs.args, **inputs.kwargs)


# --- the ladder ---------------------------------------------------------------------------------------------------


def tiny_transformer() -> nn.Module:
    return CausalTransformer(vocabulary=11, length=16, width=8, depth=1, heads=2)


def test_batch_and_sequence_of_a_transformer_stay_dynamic() -> None:
    model = tiny_transformer()
    found = capturing(model, torch.randint(0, 11, (2, 5)))
    assert (found.dynamic, found.refused) == (("batch", "sequence"), ())
    assert shapes(found) == {"tokens": ["?", "?"]}
    for size in ((4, 5), (1, 9), (3, 16)):
        tokens = torch.randint(0, 11, size)
        assert torch.equal(rerun(found, model, tokens), model(tokens))


@pytest.mark.parametrize(
    ("make", "example", "wanted"),
    [
        (lambda: ResidualMLP(6, width=8, depth=1, classes=3), torch.randn(3, 6), ["?", 6]),
        (lambda: VisionTransformer(width=8, depth=1, heads=2), torch.randn(3, 1, 8, 8), ["?", 1, 8, 8]),
    ],
    ids=["features", "images"],
)
def test_features_and_images_have_a_dynamic_batch_only(
    make: Callable[[], nn.Module], example: Tensor, wanted: list[Any]
) -> None:
    """A float matrix and four axes are no sequences, so the first rung asks for nothing that could be refused."""
    model = make()
    found = capturing(model, example)
    assert (found.dynamic, found.refused) == (("batch",), ())
    assert list(shapes(found).values()) == [wanted]
    other = torch.randn(7, *example.shape[1:])
    torch.testing.assert_close(rerun(found, model, other), model(other))


class Loop(Layer):
    """A recurrent net as a Python loop over time."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.layer(x[:, t] + state))
        return state


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("make", [Loop, Lstm])
def test_a_loop_over_time_keeps_its_length(make: type[nn.Module]) -> None:
    model, x = make(), torch.randn(3, 5, 4)
    found = capturing(model, x)
    assert found.dynamic == ("batch",)
    assert shapes(found) == {"x": ["?", 5, 4]}
    assert [rung for rung, _ in found.refused] == ["batch+sequence"]
    assert "size()[1]" in found.refused[0][1]
    other = torch.randn(7, 5, 4)
    assert torch.equal(rerun(found, model, other), model(other))


class FixedBatch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return sum((self.layer(row) for row in x), torch.zeros(4))  # pyright: ignore[reportReturnType]


def test_a_loop_over_the_batch_is_captured_as_it_is() -> None:
    found = capturing(FixedBatch(), torch.randn(3, 4))
    assert found.dynamic == ()
    assert shapes(found) == {"x": [3, 4]}
    assert [rung for rung, _ in found.refused] == ["batch+sequence"]  # without a sequence the second rung is the same


def test_only_the_rungs_asked_for_are_tried() -> None:
    found = capturing(tiny_transformer(), torch.randint(0, 11, (2, 5)), ladder=(("batch",), ()))
    assert (found.dynamic, shapes(found)) == (("batch",), {"tokens": ["?", 5]})


def test_a_batch_of_one_is_repeated() -> None:
    """The exporter takes a size of one for a constant."""
    found = capturing(tiny_transformer(), torch.randint(0, 11, (1, 5)))
    assert found.dynamic == ("batch", "sequence")
    (tokens,) = found.inputs.leaves
    assert tokens.shape == (2, 5)
    assert torch.equal(tokens[0], tokens[1])


class Scaled(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


def test_only_what_has_the_batch_axis_is_repeated() -> None:
    model = Scaled()
    found = capturing(model, (torch.randn(1, 4), torch.randn(4)))
    assert shapes(found) == {"x": ["?", 4], "scale": [4]}
    args = (torch.randn(5, 4), torch.randn(4))
    assert torch.equal(rerun(found, model, *args), model(*args))


def test_equal_sizes_by_chance_are_not_tied() -> None:
    """A matrix ``[T, T]`` with T equal to the batch size is no batch of rows."""

    class Mixed(Layer):
        def forward(self, x: Tensor, mix: Tensor) -> Tensor:
            return mix @ self.layer(x)

    model = Mixed()
    found = capturing(model, (torch.randn(5, 5, 4), torch.randn(5, 5)))
    assert found.dynamic[0] == "batch"
    args = (torch.randn(2, 5, 4), torch.randn(5, 5))
    torch.testing.assert_close(rerun(found, model, *args), model(*args))


# --- calls --------------------------------------------------------------------------------------------------------


class Everything(Layer):
    def forward(
        self, x: Tensor, bias: Tensor | None = None, scale: float | None = 2.0, *, mask: Tensor | None = None
    ) -> dict[str, Any]:
        y = self.layer(x)
        y = y if bias is None else y + bias
        y = y * (0.5 if scale is None else scale)
        return {"y": y if mask is None else y * mask, "scale": scale, "none": None, "list": [y.sum(-1), (y,)]}


X = torch.linspace(-1, 1, 12).reshape(3, 4)

CALLS: list[tuple[Any, list[str]]] = [
    (X, ["x"]),
    ((X,), ["x"]),
    ([X], ["x"]),
    ({"x": X}, ["x"]),
    ((X, X + 1), ["x", "bias"]),
    ((X, None, 3.0), ["x", "scale"]),
    (((X,), {"mask": X > 0}), ["x", "mask"]),
    (((X, X + 1), {"scale": None}), ["x", "bias", "scale"]),
    ({"mask": X > 0, "scale": 1.0, "x": X, "bias": None}, ["x", "scale", "mask"]),
]


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(*inputs.args, **inputs.kwargs)


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    pairs = zip(left[0], right[0], strict=True)
    return left[1] == right[1] and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(("example", "names"), CALLS, ids=range(len(CALLS)))
def test_every_form_of_example_inputs(example: Any, names: list[str]) -> None:
    """Named in the order of the forward, with only those ``None`` left out that are the default anyway."""
    model = Everything()
    inputs = as_inputs(model, example)
    assert (inputs.args, list(inputs.kwargs)) == ((), names)
    found = capture(model, inputs)
    flat = [n.meta.get("val") for n in found.graph_module.graph.find_nodes(op="placeholder")]
    assert len(flat) == len(inputs.leaves)
    wanted = call(model, inputs)
    assert same(call(found.graph_module, inputs), wanted)
    assert found.out_spec == pytree.tree_flatten(wanted)[1]


def test_equal_calls_look_equal() -> None:
    form = signature(Everything())
    first = bind(form, (X,), {"mask": X > 0, "bias": None})
    second = bind(form, (), {"mask": X > 0, "x": X})
    assert list(first.kwargs) == list(second.kwargs) == ["x", "mask"]


def test_an_argument_given_twice_is_refused() -> None:
    with pytest.raises(ExampleInputsError, match="the argument x by position and by name"):
        as_inputs(Everything(), ((X,), {"x": X}))


class Rest(Layer):
    def forward(self, *xs: Tensor, gain: float = 1.0) -> Tensor:
        return self.layer(sum(xs)) * gain


class FirstAndRest(Layer):
    def forward(self, x: Tensor, *xs: Tensor) -> Tensor:
        return self.layer(x) + sum(xs)


class ByPosition(Layer):
    def forward(self, x: Tensor, /, y: Tensor) -> Tensor:
        return self.layer(x) + y


@pytest.mark.parametrize("make", [Rest, FirstAndRest, ByPosition])
def test_arguments_without_names(make: type[nn.Module]) -> None:
    model = make()
    inputs = as_inputs(model, (X, X + 1))
    assert (len(inputs.args), inputs.kwargs) == (2, {})
    found = capture(model, inputs)
    assert found.dynamic == ("batch",)
    assert set(map(tuple, shapes(found).values())) == {("?", 4)}
    other = (torch.randn(5, 4), torch.randn(5, 4))
    assert torch.equal(rerun(found, model, *other), model(*other))


def test_keywords_after_arguments_without_names() -> None:
    model = Rest()
    found = capturing(model, ((X, X), {"gain": 3.0}))
    assert torch.equal(rerun(found, model, X, X + 1, gain=3.0), model(X, X + 1, gain=3.0))


class Keywords(Layer):
    def forward(self, **batch: Tensor) -> Tensor:
        return self.layer(batch["x"]) + batch["y"]


def test_tensors_in_free_keywords_are_captured_at_fixed_sizes() -> None:
    """The exporter cannot be told about their axes; the reason is kept."""
    model = Keywords()
    found = capturing(model, {"x": X, "y": X + 1})
    assert (found.dynamic, shapes(found)) == ((), {"x": [3, 4], "y": [3, 4]})
    assert len(found.refused) == 1
    assert torch.equal(rerun(found, model, x=X, y=X), model(x=X, y=X))


def test_one_tensor_for_two_arguments_is_two_inputs() -> None:
    model = FirstAndRest()
    found = capturing(model, (X, X))
    assert torch.equal(rerun(found, model, X, X + 1), model(X, X + 1))


class Nested(Layer):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.layer(batch["x"]) + batch["more"][0] * batch["gain"]


def test_inputs_inside_a_dictionary() -> None:
    model = Nested()
    batch = {"x": X, "more": [X + 1], "gain": 2.0}
    found = capturing(model, (batch,))
    assert found.dynamic == ("batch",)
    other = {"x": torch.randn(5, 4), "more": [torch.randn(5, 4)], "gain": 2.0}
    assert torch.equal(rerun(found, model, other), model(other))


def test_inputs_that_require_a_gradient_get_one() -> None:
    model, x = Layer(), torch.randn(1, 4, requires_grad=True)
    found = capturing(model, x)
    assert found.inputs.leaves[0].requires_grad
    other = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(rerun(found, model, other).sum(), other)
    assert torch.equal(gradient, model.layer.weight.sum(0).expand(3, 4))


class Lightning(Layer):
    example_input_array = X


class Hugging(Layer):
    dummy_inputs = {"x": X}  # noqa: RUF012


def test_a_model_may_bring_its_own_inputs() -> None:
    assert default_inputs(Layer()) is None
    for model in (Lightning(), Hugging()):
        assert as_inputs(model, None).kwargs["x"] is X
    with pytest.raises(ExampleInputsError, match="neither example_input_array nor dummy_inputs"):
        as_inputs(Layer(), None)


@pytest.mark.parametrize("example", [3, "x", object()], ids=["number", "text", "object"])
def test_another_form_is_refused(example: Any) -> None:
    with pytest.raises(ExampleInputsError, match=f"example_inputs of type {type(example).__name__}"):
        as_inputs(Layer(), example)


# --- outputs, names and constants ---------------------------------------------------------------------------------


def gpt2(**options: Any) -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


def test_a_model_output_comes_back_as_one() -> None:
    model = gpt2().eval()
    tokens = torch.randint(0, 11, (2, 5))
    found = capturing(model, {"input_ids": tokens})
    assert found.dynamic == ("batch", "sequence")
    other = torch.randint(0, 11, (3, 7))
    got = rerun(found, model, input_ids=other)
    assert isinstance(got, CausalLMOutputWithCrossAttentions)
    assert torch.equal(got.logits, model(input_ids=other, use_cache=False).logits)
    assert got.past_key_values is None


def test_tied_names_are_kept_and_parameters_are_the_models_own() -> None:
    model = gpt2()
    found = capturing(model, {"input_ids": torch.randint(0, 11, (2, 5))})
    own = dict(model.named_parameters(remove_duplicate=False))
    assert own["lm_head.weight"] is own["transformer.wte.weight"]
    graph = dict(found.graph_module.named_parameters(remove_duplicate=False))
    read = {str(n.target) for n in found.graph_module.graph.find_nodes(op="get_attr")}
    assert read & set(own)
    assert all(graph[name] is own[name] for name in read & set(own))
    buffers = dict(model.named_buffers())
    assert all(found.graph_module.get_buffer(name) is buffers[name] for name in read & set(buffers))


class Constants(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.table


def test_constants_made_in_the_forward_belong_to_the_graph() -> None:
    model = Constants()
    found = capturing(model, X)
    assert torch.equal(rerun(found, model, X), model(X))
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    assert differences(snapshot(model), model) == []


def test_training_and_evaluation_are_captured_as_they_are() -> None:
    model = ResidualMLP(4, width=4, depth=1, classes=2, dropout=0.5)
    both = {training: capturing(model.train(training), X) for training in (True, False)}
    for training, found in both.items():
        model.train(training)
        torch.manual_seed(3)
        wanted = model(X)
        torch.manual_seed(3)
        assert torch.equal(rerun(found, model, X), wanted)
    torch.manual_seed(3)
    assert not torch.equal(rerun(both[True], model, X), rerun(both[False], model, X))


# --- left as it was -----------------------------------------------------------------------------------------------


class Keeps(BatchNormMLP):
    """Keeps its last value as an attribute, replaces a buffer, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__(4, width=4, depth=2, classes=2, dropout=0.5)
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.blocks[0].kept = out  # type: ignore[union-attr]
        self.last.copy_(out.detach().mean(0))  # type: ignore[operator]
        return out


def test_model_and_random_state_are_as_before() -> None:
    model = Keeps()
    model.blocks[1].eval()
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"attribute self\.blocks\.0\.kept was assigned during export"):
        found = capturing(model, X)
    assert differences(before, model) == []
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    rerun(found, model, X)
    model(X)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert "state" in differences(before, model)  # that is: the comparison sees a forward


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_failed_capture_leaves_the_model_as_before_too() -> None:
    class Fails(Keeps):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if bool(out.sum() > 0) else -out

    model = Fails()
    before = snapshot(model)
    with pytest.raises(DataDependentControlFlowError):
        capturing(model, X)
    assert differences(before, model) == []


def test_caching_is_off_inside_and_restored_in_every_configuration() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    configs = [module.config for module in (model, model.encoder, model.decoder)]
    before = [config.use_cache for config in configs]
    assert before[0]
    tokens = torch.randint(1, 11, (2, 5))
    found = capturing(model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :3]})
    assert [config.use_cache for config in configs] == before
    assert "past_key_values" not in rerun(found, model, input_ids=tokens, decoder_input_ids=tokens[:, :3])


def test_the_graph_draws_what_the_model_draws() -> None:
    model = ResidualMLP(4, width=4, depth=2, classes=2, dropout=0.5).train()
    found = capturing(model, X)
    states = []
    for run in (model, lambda x: rerun(found, model, x)):
        torch.manual_seed(5)
        states.append((run(X), torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_conditions_of_the_first_call_are_not_baked_in(context: Callable[[], Any]) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = capturing(model, x)
    with context():
        found = capturing(model, x.clone())
    assert torch.is_grad_enabled()
    calls = [[str(n.target) for n in c.graph_module.graph.nodes if n.op == "call_function"] for c in (plain, found)]
    assert calls[0] == calls[1]
    out = rerun(found, model, x)
    assert out.requires_grad
    assert torch.equal(out, rerun(plain, model, x))


def test_a_model_on_the_meta_device_is_captured_without_memory() -> None:
    with torch.device("meta"):
        model = CausalTransformer(vocabulary=50_000, length=4096, width=8192, depth=1, heads=64)
        tokens = torch.zeros(2, 128, dtype=torch.long)
    found = capturing(model, tokens)
    assert found.dynamic == ("batch", "sequence")
    assert all(p.is_meta for p in found.graph_module.parameters())
    assert found.inputs.leaves[0].is_meta


def test_capture_may_be_repeated_and_the_model_copied() -> None:
    model = tiny_transformer()
    tokens = torch.randint(0, 11, (2, 5))
    first, second = (capturing(model, tokens) for _ in range(2))
    assert first.graph_module.code == second.graph_module.code
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), rerun(first, model, tokens))


# --- refusals -----------------------------------------------------------------------------------------------------
