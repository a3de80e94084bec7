"""Models named on a command line: where they come from, and inputs to try them on."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .capture import default_inputs
from .errors import ExampleInputsError, ModelSourceError

FORMS = "package.module:callable, path.py:callable (its code is run), or hf:NAME (transformers, random weights)"


class Loaded(NamedTuple):
    """A model and what to call it with.

    Attributes:
        model: What the source gave; nothing is checked yet.
        inputs: Example inputs in one of the forms ``transform`` takes.
    """

    model: Any
    inputs: Any


def load(source: str, *, overrides: Mapping[str, Any] | None = None, batch: int = 2, length: int = 32) -> Loaded:
    """Make the model a command line names.

    A callable returns a model, or ``(model, example_inputs)``; a model alone brings ``example_input_array`` or
    ``dummy_inputs``, else a ``config`` from which random inputs are made.

    Args:
        source: One of ``package.module:callable``, ``path.py:callable``, ``hf:NAME``.
        overrides: Fields of the transformers configuration, ``hf:`` only.
        batch: Samples in random inputs.
        length: Positions in random inputs.

    Raises:
        ModelSourceError: The source cannot be read, or its code fails.
        ExampleInputsError: The model brings no inputs and no configuration to make them from.

    Example:
        >>> model, inputs = load("hf:gpt2", overrides={"n_layer": 4, "n_embd": 64, "n_head": 4})  # doctest: +SKIP
    """
    kind, _, name = source.rpartition(":")
    if not kind or not name:
        raise ModelSourceError(repr(source), expected=FORMS, do="name the callable after a colon, as in models.py:make")
    if kind == "hf":
        model = _transformers_model(name, dict(overrides or {}))
        return Loaded(model, config_inputs(model.config, batch=batch, length=length))
    if overrides:
        raise ModelSourceError(
            f"--set with {source!r}", expected="--set with an hf: source", do="set it in the callable itself"
        )
    made = _call(source, _attribute(kind, name))
    if isinstance(made, tuple) and len(made) == 2:
        return Loaded(*made)
    if not isinstance(made, nn.Module) or default_inputs(made) is not None:
        return Loaded(made, None)
    return Loaded(made, config_inputs(getattr(made, "config", None), batch=batch, length=length))


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``name=value``; the value is read as JSON where it is JSON, else it is text.

    Example:
        >>> parse_override("n_layer=4"), parse_override("activation_function=relu")
        (('n_layer', 4), ('activation_function', 'relu'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def config_inputs(config: Any, *, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs that suit a transformers-like configuration.

    Returns:
        ``input_ids`` ``[B, T]`` (and ``decoder_input_ids`` for an encoder-decoder) where it has a vocabulary, or
        ``pixel_values`` ``[B, C, H, W]`` where it has an image size.

    Raises:
        ExampleInputsError: It has neither.
    """
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary:
        names = ["input_ids"] + ["decoder_input_ids"] * bool(getattr(config, "is_encoder_decoder", False))
        return {name: torch.randint(vocabulary, (batch, length)) for name in names}
    side = getattr(config, "image_size", None)
    if side:
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), height, width)}
    raise ExampleInputsError(
        "a model with no example_input_array, no dummy_inputs and no config with a vocab_size or an image_size",
        expected="one set of inputs the model can run on",
        do="let the callable return (model, example_inputs)",
    )


def _attribute(kind: str, name: str) -> Any:
    module = _file_module(kind) if kind.endswith(".py") else _named_module(kind)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ModelSourceError(
            f"{kind}:{name}, which is {'missing' if found is None else f'a {type(found).__name__}'}",
            expected="a callable that returns a model, or (model, example_inputs)",
            do="write one: def make(): return MyModel(), torch.randn(2, 16)",
        )
    return found


def _named_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script has its own folder there, not the caller's
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _failed(f"import {name}", error) from error


def _file_module(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise ModelSourceError(f"{path}, which is no file", expected=FORMS, do="look at the path")
    spec = importlib.util.spec_from_file_location(f"_lbi_source_{file.stem}", file)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(f"running {path}", error) from error
    return module


def _call(source: str, make: Any) -> Any:
    try:
        return make()
    except Exception as error:
        raise _failed(f"calling {source}", error) from error


def _failed(what: str, error: Exception) -> ModelSourceError:
    return ModelSourceError(
        f"{what} raised {type(error).__name__}: {error}",
        expected=FORMS,
        do="make it run in Python first; the callable gets no arguments",
    )


def _transformers_model(name: str, overrides: dict[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelSourceError(
            f"hf:{name} without transformers installed",
            expected="the transformers package",
            do="pip install 'lbi-compile[examples]'",
        ) from error
    if name not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(name, list(transformers.CONFIG_MAPPING), n=5)
        raise ModelSourceError(
            f"hf:{name}, which transformers {transformers.__version__} does not know",
            expected="the model_type of a transformers configuration, such as gpt2, llama, bert or vit",
            do=f"try {', '.join(close)}" if close else "look through transformers.CONFIG_MAPPING",
        )
    try:
        config = transformers.AutoConfig.for_model(name, **overrides)
        return _auto_class(transformers, config).from_config(config)
    except Exception as error:
        raise _failed(f"building {name} with {overrides or 'its default configuration'}", error) from error


def _auto_class(transformers: ModuleType, config: Any) -> Any:
    """The auto class that gives this configuration an output worth training on, else the bare model."""
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    for mapping, auto in (
        (transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.AutoModelForImageClassification),
    ):
        if type(config) in mapping:
            return auto
    return transformers.AutoModel
