"""Where the command line takes models and inputs from."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lbi_compile.errors import ExampleInputsError, ModelSourceError
from lbi_compile.sources import config_inputs, load, parse_override

MODELS = """
import torch
from dataclasses import dataclass
from torch import nn

@dataclass
class Config:
    vocab_size: int = 11

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()

class Dummy(nn.Module):
    dummy_inputs = {"x": torch.zeros(2, 3)}

class Nothing(nn.Module):
    pass

def with_inputs():
    return nn.Linear(3, 3), torch.zeros(2, 3)

def failing():
    raise RuntimeError("no such weights")

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "zoo_models.py"
    path.write_text(MODELS)
    return path


def test_file_with_inputs(file):
    model, inputs = load(f"{file}:with_inputs")
    assert isinstance(model, nn.Linear)
    assert inputs.shape == (2, 3)


def test_file_with_config_gets_random_tokens(file):
    _, inputs = load(f"{file}:Text", batch=5, length=7)
    assert inputs["input_ids"].shape == (5, 7)
    assert 0 <= inputs["input_ids"].min() <= inputs["input_ids"].max() < 11


def test_models_that_bring_inputs_are_left_to_transform(file):
    assert load(f"{file}:Dummy").inputs is None


def test_module_in_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load("zoo_models:Dummy").model, nn.Module)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch", "'torch'"),
        (":make", "':make'"),
        ("torch.nn:", "'torch.nn:'"),
        ("no_such_package.models:make", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("no_such_file.py:make", "no_such_file.py, which is no file"),
        ("{file}:missing", "which is missing"),
        ("{file}:number", "which is a int"),
        ("{file}:failing", "RuntimeError: no such weights"),
        ("hf:gtp2", "does not know"),
    ],
)
def test_bad_sources_say_what_is_wrong(source, found, file):
    with pytest.raises(ModelSourceError) as caught:
        load(source.format(file=file))
    assert found in str(caught.value)


def test_broken_file_names_its_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n1 / 0\n")
    with pytest.raises(ModelSourceError, match="ZeroDivisionError"):
        load(f"{path}:make")


def test_no_inputs_anywhere(file):
    with pytest.raises(ExampleInputsError, match=r"\(model, example_inputs\)"):
        load(f"{file}:Nothing")


def test_overrides_belong_to_transformers(file):
    with pytest.raises(ModelSourceError, match="--set"):
        load(f"{file}:with_inputs", overrides={"n_layer": 2})


def test_close_names_are_offered():
    with pytest.raises(ModelSourceError, match="try gpt2"):
        load("hf:gtp2")


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelSourceError, match=r"pip install 'lbi-compile\[examples\]'"):
        load("hf:gpt2")


@pytest.mark.parametrize(
    ("name", "small", "head", "inputs"),
    [
        ("gpt2", {"n_layer": 1, "n_embd": 8, "n_head": 2}, "GPT2LMHeadModel", {"input_ids": (2, 6)}),
        (
            "bert",
            {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8},
            "BertForMaskedLM",
            {"input_ids": (2, 6)},
        ),
        (
            "t5",
            {"num_layers": 1, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8},
            "T5ForConditionalGeneration",
            {"input_ids": (2, 6), "decoder_input_ids": (2, 6)},
        ),
        (
            "vit",
            {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "image_size": 32},
            "ViTForImageClassification",
            {"pixel_values": (2, 3, 32, 32)},
        ),
    ],
)
def test_transformers_models_run_on_their_inputs(name, small, head, inputs):
    model, made = load(f"hf:{name}", overrides=small, length=6)
    assert type(model).__name__ == head
    assert {key: tuple(value.shape) for key, value in made.items()} == inputs
    with torch.no_grad():
        assert model(**made).logits.isfinite().all()


def test_wrong_override_says_which_model():
    with pytest.raises(ModelSourceError, match="building gpt2"):
        load("hf:gpt2", overrides={"n_embd": 10, "n_head": 3})


def test_inputs_need_a_vocabulary_or_an_image_size():
    with pytest.raises(ExampleInputsError):
        config_inputs(None, batch=2, length=3)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("n_layer=4", ("n_layer", 4)),
        ("tie=true", ("tie", True)),
        ("act=relu", ("act", "relu")),
        ("sizes=[1, 2]", ("sizes", [1, 2])),
        ("eps=1e-5", ("eps", 1e-5)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_parse_override(text, pair):
    assert parse_override(text) == pair


@pytest.mark.parametrize("text", ["n_layer", "=4", ""])
def test_parse_override_refuses(text):
    with pytest.raises(ValueError, match="is not name=value"):
        parse_override(text)
