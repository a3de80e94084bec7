"""CUDA graphs: a variant is recorded once and replayed, so that launching costs it next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .compare import Contender
from .measure import Timed

_WARM_UP = 3


def _warm(run: Callable[[], Any]) -> None:
    """Runs on another stream first, as a capture demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def contender(part: str, run: Callable[[], Tensor], *, moved: int) -> Contender:
    """One function without arguments, recorded; the tensor it gave is written anew by each replay."""
    _warm(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(_: Any = None) -> None:
        graph.replay()

    def tensors() -> Mapping[str, Tensor]:
        graph.replay()
        return {"adjoints": out}

    return Contender({part: Timed(replay)}, tensors, replay, moved)


def training_step(loss: Callable[[], Tensor], named: Mapping[str, Parameter], clear: Callable[[], None]) -> Contender:
    """Forward and backward recorded as two graphs on one memory pool; gradients stay where the recording put them."""

    def step() -> None:
        clear()
        loss().backward()

    _warm(step)
    clear()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        value = loss()
    with torch.cuda.graph(backward, pool=forward.pool()):
        value.backward()
    gradients = {name: parameter.grad for name, parameter in named.items()}
    clear()

    def both(_: Any = None) -> None:
        forward.replay()
        backward.replay()

    def tensors() -> Mapping[str, Tensor | None]:
        both()
        return {"loss": value.detach(), **gradients}

    parts = {
        "forward": Timed(lambda _: forward.replay()),
        "backward": Timed(lambda _: backward.replay(), setup=forward.replay),
        "step": Timed(both),
    }
    return Contender(parts, tensors, both)
