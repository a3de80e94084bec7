"""Casts: give readers of a value that was cast to its own dtype the value back.

Contract: a freshly exported graph in, changed in place; what it computes at the dtypes of the capture stays the same.
"""

from __future__ import annotations

from torch import fx

from lbi_compile.passes.names import module_path


def untangle_casts(gm: fx.GraphModule) -> None:
    """Undo what the exporter makes of casts that change nothing.

    Such a cast gives its argument itself, so the exporter takes every later read of the argument for one of the cast. A
    norm that computes in float32 then stands in the residual stream of a float32 model, and of no other: a plan could
    not be found again in another dtype. A cast of a value from outside of its module is meant for that module; readers
    outside get the value.

    Args:
        gm: Captured graph; ``node.meta`` holds values and modules.
    """
    for node in gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name != "aten::to" or not isinstance(node.args[0], fx.Node):
            continue
        value, place = node.args[0], module_path(node)
        before, after = value.meta["val"], node.meta["val"]
        same = (before.dtype, before.device) == (after.dtype, after.device)
        copies = True in (*node.args[1:], *node.kwargs.values())
        if not same or copies or not place or _is_inside(value, place):
            continue
        for user in [user for user in node.users if not _is_inside(user, place)]:
            user.replace_input_with(node, value)
    gm.graph.lint()
    gm.recompile()


def _is_inside(node: fx.Node, place: str) -> bool:
    path = module_path(node)
    return path == place or path.startswith(place + ".")
