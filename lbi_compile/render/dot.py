"""The drawing of a partition as Graphviz text, one cluster for each part."""

from __future__ import annotations

from collections.abc import Iterator

from .graph import Picture
from .groups import Box, Drawing
from .labels import clean
from .svg import box_text, fill

_SHAPES = {"input": "ellipse", "group": "folder", "operator": "box"}
_EDGES = {
    "lane": 'color="#b34700", penwidth=2.5, class="lane"',
    "tap": 'color="#0072b2", style=dotted, class="tap"',
}


def source(picture: Picture) -> str:
    """The picture in the language of Graphviz, with the boxes of the page at first sight.

    Example:
        >>> Path("model.dot").write_text(source(picture(analysis)), encoding="utf-8")  # doctest: +SKIP
    """
    return "\n".join(_lines(Drawing(picture))) + "\n"


def _lines(made: Drawing) -> Iterator[str]:
    yield f"digraph {_quoted(made.picture.title)} {{"
    yield '  graph [rankdir=TB, fontname="monospace", newrank=true, compound=true];'
    yield '  node [fontname="monospace", fontsize=11, style=filled, fillcolor=white, margin="0.12,0.06"];'
    yield '  edge [color="#818b98", arrowsize=0.7];'
    for i, part in enumerate(made.picture.parts):
        shown = [key for key in made.shown if made.boxes[key].part == i]
        if shown:
            yield f"  subgraph {_quoted(f'cluster_{i}')} {{"
            label = f"{part.label}  {100 * part.share:.1f}%"
            yield f'    label={_quoted(label)}; labeljust=l; style=filled; color="{fill(part.label)}40";'
            for key in shown:
                yield f"    b{key} [{_attributes(made, made.boxes[key])}];"
            yield "  }"
    items = made.outer.items
    for u, v, how in made.outer.edges:
        style = f" [{_EDGES[how]}]" if how in _EDGES else ""
        yield f"  b{items[u]} -> b{items[v]}{style};"
    yield "}"


def _attributes(made: Drawing, box: Box) -> str:
    node = None if box.node is None else made.picture.nodes[box.node]
    kind = "group" if node is None else "input" if node.operator == "input" else "operator"
    lines = [box.name if node is None else box.label, box.note, ", ".join(box.roles)]
    lines += [f"reads {', '.join(box.chips)}"] if box.chips else []
    text, tooltip = (_quoted("\n".join(some)) for some in (filter(None, lines), box_text(made, box)))
    return f"label={text}, shape={_SHAPES[kind]}, tooltip={tooltip}"


def _quoted(text: str) -> str:
    """A string of the language; Graphviz would read names as escapes otherwise."""
    lines = (clean(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n"))
    return '"' + "\\n".join(lines) + '"'
