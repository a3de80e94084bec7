"""The drawing of a partition as one HTML file: it fetches nothing, and its policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from lbi_compile.quantities import count

from . import svg
from .graph import Picture
from .groups import BADGE, BOX_HEIGHT, CHIP_GAP, CHIP_HEIGHT, INNER, LABEL, OUTER, Box, Drawing, Inside
from .labels import clean, text_width
from .text import layers

_HEAD, _PAD = 26.0, 16.0


def page(picture: Picture) -> str:
    """The picture as a page that a browser shows from the file alone.

    Example:
        >>> Path("model.html").write_text(page(picture(analysis)), encoding="utf-8")  # doctest: +SKIP
    """
    made = Drawing(picture)
    style = "\n".join((svg.style(), _file("page.css"), *_widths(picture)))
    script = _file("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = {
        "policy": policy,
        "title": _safe(picture.title),
        "style": style,
        "facts": "".join(f"<div><dt>{_safe(n)}</dt><dd>{_safe(v)}</dd></div>" for n, v in picture.summary),
        "balance": "".join(_segments(picture)),
        "defs": svg.tips(),
        "legend": "".join(
            f'<li title="{_safe(meaning)}"><svg width="26" height="16" viewBox="-1 -9 26 18" aria-hidden="true">'
            f"{mark}</svg>{_safe(text)}</li>"
            for mark, text, meaning in svg.keys(picture)
        ),
        "tables": "\n".join(_tables(picture)),
        "data": _script_json(_data(made)),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda field: filled[field[1]], _file("page.html"))


@cache
def _file(name: str) -> str:
    return resources.files("lbi_compile.render").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _safe(text: str) -> str:
    return escape(clean(text))


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element: no tag can end it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _widths(picture: Picture) -> Iterator[str]:
    # the policy allows no style attributes
    for i, part in enumerate(picture.parts):
        yield f".share{i} {{ flex-grow: {100 * part.share:.3f}; }}"


def _segments(picture: Picture) -> Iterator[str]:
    for i, part in enumerate(picture.parts):
        if part.share:
            name, share = _safe(part.label), f"{100 * part.share:.1f}%"
            yield (
                f'<button type="button" class="share{i} {svg.color(part.label)}" data-part="{i}" '
                f'title="{name}: {share}, {count(part.flops)} FLOPs"><span>{name} <i>{share}</i></span></button>'
            )


def _tables(picture: Picture) -> Iterator[str]:
    if picture.boundaries:
        extra = list(dict.fromkeys(n for b in picture.boundaries for lane in b.lanes for n, _ in lane.details))
        rows: list[Sequence[tuple[str, str]]] = []
        for boundary in picture.boundaries:
            for i, lane in enumerate(boundary.lanes):
                details = dict(lane.details)
                rows.append(
                    [
                        ("number", "" if i else str(boundary.index)),
                        ("name", lane.name),
                        ("name", lane.shape),
                        ("", f"{lane.source} to {layers(lane.readers)}"),
                        *(("name", details.get(name, "")) for name in extra),
                        ("", "" if i else boundary.crossing),
                    ]
                )
        yield _table("Boundaries", ["#k", "lane", "shape", "from, to", *extra, "what crosses now"], rows)
    yield _table(
        "Parts",
        ["part", "layers", "#nodes", "#params", "#FLOPs", "#share"],
        [
            [
                (f"short swatch:{svg.color(part.label)}", part.label),
                ("name", _some(layers(part.modules))),
                ("number", str(part.nodes)),
                ("number", count(part.parameters)),
                ("number", count(part.flops)),
                ("number", f"{100 * part.share:.1f}%"),
            ]
            for part in picture.parts
        ],
    )
    yield _table("Why", ["about", "choice", "reason"], [[("", a), ("name", b), ("", c)] for a, b, c in picture.why])


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table with a title; a head that starts with ``#`` is one of numbers."""
    top = "".join(
        f'<th scope="col" class="number">{_safe(head[1:])}</th>'
        if head[0] == "#"
        else f'<th scope="col">{_safe(head)}</th>'
        for head in heads
    )
    body = "\n".join(f"<tr>{''.join(_cell(css, text) for css, text in row)}</tr>" for row in rows)
    return f"<div><h2>{_safe(title)}</h2><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _some(listed: str, most: int = 8) -> str:
    """The first of a list of names."""
    names = listed.split(", ")
    return listed if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def _cell(css: str, text: str) -> str:
    css, _, color = css.partition(" swatch:")
    swatch = f'<span class="swatch {color}"></span>' if color else ""
    shown = _safe(text)
    if css == "name":  # long names break at their dots, not in the middle of a word
        shown = re.sub(r"(?<=[.:_,])(?=\w)", "<wbr>", shown)
    return f'<td class="{css}">{swatch}{shown}</td>' if css else f"<td>{shown}</td>"


class _Strings:
    """Every text once."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(clean(text), len(self.index))


def _data(made: Drawing) -> dict[str, Any]:
    """What the script of the page draws."""
    strings = _Strings()
    boxes = [_box(made, box, strings) for box in made.boxes]
    return {
        "strings": list(strings.index),
        "boxes": boxes,
        "parts": [clean(part.label) for part in made.picture.parts],
        "outer": {
            **_inside(made.outer),
            "bands": made.outer.layout.bands,
            "borders": made.outer.layout.borders,
        },
        "insides": {key: _inside(made.inside(key)) for key, box in enumerate(made.boxes) if box.items},
        "strips": [
            {"part": s.part, "css": s.css, "title": clean(s.title), "notes": s.notes, "boundary": s.boundary}
            for s in svg.strips(made)
        ],
        "glyphs": svg.GLYPHS,
        "sizes": {
            "height": BOX_HEIGHT,
            "gutter": svg.GUTTER,
            "margin": svg.MARGIN,
            "bandPad": svg.BAND_PAD,
            "badge": BADGE,
            "chip": CHIP_HEIGHT,
            "chipGap": CHIP_GAP,
            "letter": text_width("m", LABEL),
            "small": text_width("m", 10),
            "head": _HEAD,
            "pad": _PAD,
            "outer": {"column": OUTER.column, "bend": OUTER.bend},
            "inner": {"column": INNER.column, "bend": INNER.bend},
        },
    }


def _box(made: Drawing, box: Box, strings: _Strings) -> list[Any]:
    record: list[Any] = [
        strings(box.label),
        strings(box.note),
        strings(box.name),
        strings(box.kind),
        box.part,
        box.width,
        box.chip_width,
        [strings(chip) for chip in box.chips],
        box.roles,
        len(box.nodes),
        box.flops,
    ]
    if box.node is None:
        return record
    node = made.picture.nodes[box.node]
    form = "input" if node.operator == "input" else "made-of-parameters" if node.kind == "parameter-only" else ""
    return [
        *record,
        strings(node.shape),
        strings(node.operator),
        [strings(name) for name in node.reads],
        [strings(reason) for reason in node.reasons],
        strings(form),
    ]


def _inside(inside: Inside) -> dict[str, Any]:
    layout = inside.layout
    gaps = [
        round(below - top - height, 1)
        for top, height, below in zip(layout.tops, layout.heights, layout.tops[1:], strict=False)
    ]
    return {
        "items": inside.items,
        "rows": layout.rows,
        "x": layout.x,
        "gaps": gaps,
        "ways": inside.ways,
        "edges": [
            [u, v, how if how in ("lane", "tap") else "value", *bends]
            for (u, v, how), bends in zip(inside.edges, layout.bends, strict=True)
        ],
    }
