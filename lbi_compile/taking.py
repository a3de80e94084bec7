"""A bounded model says what it takes: the class it gets has a ``forward`` with the model's own signature.

Programs around a model read its signature: a trainer drops the columns of its data that ``forward`` does not name,
an exporter names inputs and their dynamic axes after it.
"""

from __future__ import annotations

import inspect
import types
from inspect import Parameter

from torch import nn


def taking(kind: type[nn.Module], model: nn.Module) -> type[nn.Module]:
    """The class ``kind``, with the signature of ``model.forward`` on its own ``forward``.

    Args:
        kind: A module class whose ``forward`` takes anything.
        model: The module whose arguments it passes on.

    Returns:
        A subclass under the same name. It stands nowhere to be imported from, so its objects are pickled as ``kind``.

    Example:
        >>> import inspect, torch
        >>> class Any(torch.nn.Module):
        ...     def forward(self, *args): return args
        >>> inspect.signature(taking(Any, torch.nn.Linear(1, 1))().forward)
        <Signature (input: 'Tensor') -> 'Tensor'>
    """
    signature = inspect.signature(model.forward)
    own = Parameter("self" if "self" not in signature.parameters else "_self", Parameter.POSITIONAL_ONLY)
    generic = kind.forward
    # the same code object: whoever traces the call sees no frame in between, and caches by code are shared
    forward = types.FunctionType(
        generic.__code__, generic.__globals__, generic.__name__, generic.__defaults__, generic.__closure__
    )
    forward.__doc__, forward.__module__, forward.__qualname__ = generic.__doc__, kind.__module__, generic.__qualname__
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # pyright: ignore[reportFunctionMemberAccess]
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "forward": forward})
