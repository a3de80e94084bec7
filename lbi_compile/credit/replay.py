"""Running local objectives one after another in the backward, so that one region's activations are alive at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..errors import DoubleBackwardError


class Surroundings:
    """Random state and autocast as they are now, to run the same code again later; see ``uncached`` for the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.random = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kinds = dict.fromkeys(("cpu", device.type))
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers and autocast are those of before; outside nothing has changed."""
        devices = [self.device] if self.cuda is not None else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            torch.set_rng_state(self.random)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Inside, autocast keeps no casts of parameters: one made without a graph would later be taken for one with."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Aliases:
    """Stand-ins for parameters, so that a nested backward neither fills ``.grad`` nor runs the users' hooks.

    Args:
        places: Module and name of every parameter.
        others: Parameters that are read in another way.
    """

    def __init__(self, places: Sequence[tuple[nn.Module, str]], others: Sequence[Tensor]) -> None:
        own = [(module, name, module._parameters[name]) for module, name in places]
        self.places = [(module, name, p) for module, name, p in own if p is not None and p.requires_grad]
        parameters = {id(p): p for p in [*(p for _, _, p in self.places), *others] if p.requires_grad}
        self.parameters = list(parameters.values())

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[dict[int, Tensor]]:
        """Inside, modules hold a new alias of each parameter; gives them by the identity of the parameter, in order."""
        aliases = {id(p): p.detach().requires_grad_() for p in self.parameters}
        try:
            for module, name, p in self.places:
                module._parameters[name] = aliases[id(p)]  # pyright: ignore[reportArgumentType]  as functional_call does
            yield aliases
        finally:
            for module, name, p in self.places:
                module._parameters[name] = p


class _Later(Function):
    """A number whose gradient is computed when it is asked for, from the tensors it was made of."""

    @staticmethod
    def forward(
        ctx: Any, value: Callable[[], Tensor], gradients: Callable[..., list[Tensor | None]], *tensors: Tensor
    ) -> Tensor:
        # saved although the closures have them: autograd then notices where one was written over in between
        ctx.save_for_backward(*tensors)
        ctx.gradients = gradients
        with uncached():
            return value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                'the gradient of a gradient under schedule="sequential"',
                expected="first derivatives only",
                do='use schedule="parallel", or drop create_graph=True',
            )
        return None, None, *ctx.gradients(grad, ctx.saved_tensors)


def differentiate_later(
    value: Callable[[], Tensor],
    gradients: Callable[[Tensor, Sequence[Tensor]], list[Tensor | None]],
    tensors: Sequence[Tensor],
) -> Tensor:
    """A loss whose backward calls ``gradients``.

    Whatever multiplies the loss (a gradient scaler, a weight) arrives as ``grad`` and passes through the regions, and
    the gradients reach ``tensors`` by way of autograd: hooks, accumulation and reducers see them as any others.

    Args:
        value: Computes the loss, without a graph.
        gradients: ``(grad, tensors)`` to the gradient of each tensor.
        tensors: Everything the loss depends on that needs a gradient.
    """
    return _Later.apply(value, gradients, *tensors)
