"""The drawing of a partition as one SVG file: regions as bands from top to bottom, separators on their borders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from string import Template

from lbi_compile.quantities import count

from .graph import PROLOGUE, ROLES, PartCounts, Picture, is_region
from .groups import BADGE, BOX_HEIGHT, CHIP_GAP, CHIP_HEIGHT, LABEL, Box, Drawing, is_chip
from .labels import clean, fit, text_width

GUTTER, MARGIN, BAND_PAD = 196.0, 24.0, 18.0
_WIDEST_TITLE = 900.0
# the light scheme of Paul Tol: distinct to the colour-blind, and dark text stands on each of them
_PALETTE = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00")
# shapes around the origin, ten pixels wide, so that nobody needs colours to tell them apart
GLYPHS = {
    "canvas": "M-4.5-4.5h9v9h-9z",
    "shared": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "lane": "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "finish": "M-5-4.2h10L0 5z",
    "tap": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "output": "M-5 0-2.5-4.5h5L5 0 2.5 4.5h-5z",
}
_LIGHT = {
    "page": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "edge": "#818b98", "box": "#ffffff", "outline": "#6e7781",
    "chip": "#eaeef2", "room": "#ffffff", "bar": "#eaeef2",
    "rest": "#afb8c1", "lane": "#b34700", "tap": "#0072b2", "band": "0.26",
}  # fmt: skip
_DARK = {
    "page": "#0d1117", "ink": "#e6edf3", "muted": "#a5aeb8", "edge": "#7d8590", "box": "#161b22", "outline": "#8b949e",
    "chip": "#30363d", "room": "#12171e", "bar": "#2a313a",
    "rest": "#6e7681", "lane": "#ff9e4a", "tap": "#56b4e9", "band": "0.20",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Strip:
    """One band of the drawing.

    Attributes:
        part: Index of the part.
        top, bottom: Its borders.
        css: Class of its colour.
        title: First line in the gutter.
        notes: Further lines.
        border: Middle of the gap below it; ``None`` for the last.
        boundary: Line in that gap; empty where no boundary is there.
    """

    part: int
    top: float
    bottom: float
    css: str
    title: str
    notes: tuple[str, ...]
    border: float | None
    boundary: str


def drawing(picture: Picture) -> str:
    """The picture as a standalone SVG file.

    Example:
        >>> Path("model.svg").write_text(drawing(picture(analysis)))  # doctest: +SKIP
    """
    return "\n".join(_lines(Drawing(picture))) + "\n"


@cache
def style() -> str:
    """The style of the drawing, light and dark."""
    rules = Template(resources.files("lbi_compile.render").joinpath("graph.css").read_text(encoding="utf-8"))
    light, dark = rules.substitute(_LIGHT), rules.substitute(_DARK)
    changed = "".join(
        line + "\n" for line, other in zip(dark.splitlines(), light.splitlines(), strict=True) if line != other
    )
    regions = "".join(f".c{i} {{ fill: {color}; background: {color}; }}\n" for i, color in enumerate(_PALETTE))
    return f"{light}{regions}@media (prefers-color-scheme: dark) {{\n{changed}}}\n"


def color(label: str) -> str:
    """Class of a part's colour.

    Example:
        >>> color("region 9"), color("head")
        ('c1', 'rest')
    """
    return f"c{int(label.rpartition(' ')[2]) % len(_PALETTE)}" if is_region(label) else "rest"


def fill(label: str) -> str:
    """A part's colour.

    Example:
        >>> fill("region 9"), fill("head")
        ('#ee8866', '#afb8c1')
    """
    css = color(label)
    return _LIGHT["rest"] if css == "rest" else _PALETTE[int(css[1:])]


def strips(made: Drawing) -> tuple[Strip, ...]:
    """The bands from top to bottom; a part without boxes has none."""
    picture, layout = made.picture, made.outer.layout
    found = []
    for i, (part, rows) in enumerate(zip(picture.parts, layout.bands, strict=False)):
        if rows is None:
            continue
        top, bottom = layout.tops[rows[0]] - BAND_PAD, layout.tops[rows[1]] + layout.heights[rows[1]] + BAND_PAD
        row = layout.borders[i]
        found.append(
            Strip(
                part=i,
                top=top,
                bottom=bottom,
                css=color(part.label),
                title=part.label,
                notes=_notes(part),
                border=None if row is None else layout.tops[row],
                boundary=_boundary(picture, part.label),
            )
        )
    return tuple(found)


def _notes(part: PartCounts) -> tuple[str, ...]:
    if part.label == PROLOGUE:
        return ("run once, without grad",)
    return f"{100 * part.share:.1f}% · {count(part.flops)} FLOPs", f"{count(part.parameters)} parameters"


def _boundary(picture: Picture, above: str) -> str:
    for boundary in picture.boundaries:
        if above == f"region {boundary.index - 1}":
            lanes = len(boundary.lanes)
            return f"boundary {boundary.index}: {lanes} lane{'' if lanes == 1 else 's'}"
    return ""


def route(made: Drawing, edge: int) -> str:
    """The path of an edge of the outer drawing: down through the channels between rows, straight past each row."""
    inside = made.outer
    layout, (source, target, _) = inside.layout, inside.edges[edge]
    stops = (source, *layout.bends[edge], target)
    if layout.row[source] > layout.row[target]:
        stops = stops[::-1]
    points = [(layout.x[stop], layout.tops[layout.row[stop]], layout.heights[layout.row[stop]]) for stop in stops]
    x, top, height = points[0]
    path, at = f"M{x:g} {top + height:g}", top + height
    for i, (right, top, height) in enumerate(points[1:], start=2):
        middle = (at + top) / 2
        path += f"V{top:g}" if right == x else f"C{x:g} {middle:g} {right:g} {middle:g} {right:g} {top:g}"
        x, at = right, top
        if i < len(points) and height:
            at = top + height
            path += f"V{at:g}"
    return path


def crossings(made: Drawing) -> Iterator[tuple[float, float, str]]:
    """Where lanes cross borders: place, and the name of the box they come from."""
    inside, seen = made.outer, set[int]()
    layout = inside.layout
    rows = {layout.borders[s.part] for s in strips(made) if s.boundary}
    for (source, _, how), bends in zip(inside.edges, layout.bends, strict=True):
        for bend in bends if how == "lane" else ():
            if layout.row[bend] in rows and bend not in seen:
                seen.add(bend)
                yield layout.x[bend], layout.tops[layout.row[bend]], made.boxes[inside.items[source]].name


def _lines(made: Drawing) -> Iterator[str]:
    picture, layout = made.picture, made.outer.layout
    bands = strips(made)
    head = 64.0
    left, inner = GUTTER + 2 * MARGIN, max(layout.width, 320.0)
    titles = max(text_width(picture.title, 16), text_width(_facts(picture), 11))
    inner = max(inner, min(titles, _WIDEST_TITLE) - left)
    width = left + inner + 2 * MARGIN
    down = head + MARGIN + BAND_PAD
    legend = list(_legend(picture, width - 2 * MARGIN))
    lowest = down + layout.height + BAND_PAD + MARGIN
    height = lowest + 20.0 * (1 + max((row for _, row, _, _ in legend), default=0)) + MARGIN
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_safe("partition of " + picture.title)}">'
    )
    yield f"<style>{style()}</style>"
    yield f"<defs>{tips()}</defs>"
    yield f'<rect class="page" width="{width:g}" height="{height:g}"/>'
    yield _text("title", MARGIN, 34, fit(picture.title, width - 2 * MARGIN, 16))
    yield _text("facts", MARGIN, 54, fit(_facts(picture), width - 2 * MARGIN, 11))
    yield f'<g transform="translate({left:g} {down:g})">'
    for band in bands:
        yield from _band(band, -GUTTER - MARGIN, GUTTER + inner + 2 * MARGIN)
    shift = round((inner - layout.width) / 2, 1)
    yield f'<g transform="translate({shift:g} 0)">'
    for i, (source, target, how) in enumerate(made.outer.edges):
        css = how if how in ("lane", "tap") else "value"
        end = "start" if layout.row[source] > layout.row[target] else "end"
        yield f'<path class="edge {css}" marker-{end}="url(#tip-{css})" d="{route(made, i)}"/>'
    for x, y, name in crossings(made):
        yield (
            f'<path class="crossing" transform="translate({x:g} {y:g})" d="{GLYPHS["lane"]}">'
            f"<title>{_safe('lane from ' + name)}</title></path>"
        )
    for place, key in enumerate(made.outer.items):
        yield from _box(made, made.boxes[key], layout.x[place], layout.tops[layout.row[place]])
    yield "</g></g>"
    yield f'<g transform="translate({MARGIN:g} {lowest + 12:g})">'
    for x, row, mark, text in legend:
        yield f'<g transform="translate({x:g} {20 * row})">{mark}{_text("key", 30, 4, text)}</g>'
    yield "</g></svg>"


def _facts(picture: Picture) -> str:
    facts = dict(picture.summary)
    named = ("regions", "interface", "credit", "readout", "hash")
    return " · ".join(f"{name} {facts[name].partition(' (')[0]}" for name in named if name in facts)


def tips() -> str:
    """Arrow heads, for a ``defs`` element."""
    shape = '<path class="tip {0}" d="M0 0 8 4 0 8z"/>'
    made = "".join(
        f'<marker id="tip-{css}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse">{shape.format(css)}</marker>'
        for css in ("value", "lane", "tap")
    )
    return made


def _band(band: Strip, x: float, width: float) -> Iterator[str]:
    height = band.bottom - band.top
    yield f'<rect class="band {band.css}" x="{x:g}" y="{band.top:g}" width="{width:g}" height="{height:g}" rx="8"/>'
    yield f'<rect class="strip {band.css}" x="{x:g}" y="{band.top:g}" width="8" height="{height:g}" rx="3"/>'
    yield _text("band-title", x + 20, band.top + 22, band.title)
    for i, note in enumerate(band.notes):
        yield _text("band-note", x + 20, band.top + 39 + 15 * i, fit(note, GUTTER - 20, 11))
    if band.boundary and band.border is not None:
        yield _text("border-text", x + 20, band.border + 3.5, band.boundary)
        start = x + 20 + text_width(band.boundary, 10) + 8
        yield f'<path class="border" d="M{start:g} {band.border:g}H{x + width:g}"/>'


def _box(made: Drawing, box: Box, x: float, y: float) -> Iterator[str]:
    left, width = -box.width / 2, box.width
    node = None if box.node is None else made.picture.nodes[box.node]
    round_by = BOX_HEIGHT / 2 if node and node.operator == "input" else 3 if node else 8
    dashed = " made-of-parameters" if node and node.kind == "parameter-only" else ""
    title = _safe("\n".join(box_text(made, box)))
    yield f'<g class="box" transform="translate({x:g} {y:g})"><title>{title}</title>'
    size = f'width="{width:g}" height="{BOX_HEIGHT:g}" rx="{round_by:g}"'
    if box.items:
        yield f'<rect class="behind" x="{left + 4:g}" y="4" {size}/>'
    yield f'<rect class="frame{dashed}" x="{left:g}" y="0" {size}/>'
    shift = BADGE * len(box.roles) / 2
    yield _text("label", -shift, 16, box.label)
    yield _text("note", 0, 30, box.note)
    end = text_width(box.label, LABEL) / 2 - shift
    for i, role in enumerate(box.roles):
        yield f'<path class="badge" transform="translate({end + BADGE * (i + 0.7):g} 12)" d="{GLYPHS[role]}"/>'
    top = BOX_HEIGHT / 2 - CHIP_HEIGHT * len(box.chips) / 2
    for i, chip in enumerate(box.chips):
        yield from _chip(chip, left - CHIP_GAP - box.chip_width, top + CHIP_HEIGHT * i + 1, box.chip_width)
    yield "</g>"


def _chip(text: str, x: float, y: float, width: float) -> Iterator[str]:
    height = CHIP_HEIGHT - 2
    yield f'<path class="stub" d="M{x + width:g} {y + height / 2:g}h{CHIP_GAP:g}"/>'
    yield f'<rect class="chip" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    yield _text("chip-text", x + width / 2, y + height - 3.5, text)


def box_text(made: Drawing, box: Box) -> list[str]:
    """Everything about a box, as lines."""
    if box.node is None:
        inside = [made.picture.nodes[i] for i in box.nodes]
        reasons = dict.fromkeys(why for node in inside if node.roles for why in node.reasons)
        lines = [box.name, box.kind, f"{len(inside)} operators, {count(box.flops)} FLOPs", *reasons]
    else:
        node = made.picture.nodes[box.node]
        work = f"{count(node.flops)} FLOPs" if node.flops else ""
        lines = [node.name, node.operator, node.shape, work, *node.reasons]
    return [line for line in lines if line]


def _legend(picture: Picture, width: float) -> Iterator[tuple[float, int, str, str]]:
    """Place, row, mark and text of every entry that the picture needs."""
    x, row = 0.0, 0
    for mark, text, _ in keys(picture):
        wide = 30 + text_width(text, 11) + 26
        if x and x + wide > width:
            x, row = 0.0, row + 1
        yield x, row, mark, text
        x += wide


def keys(picture: Picture) -> Iterator[tuple[str, str, str]]:
    """Marks, 22 pixels wide, what they stand for, and what that means: those that the picture has."""
    roles = {role for node in picture.nodes for role in node.roles}
    crossing = {edge.crossing for edge in picture.edges}
    yield '<rect class="frame" x="0" y="-6" width="22" height="12" rx="2"/>', "operator", "one operator of the program"
    yield (
        '<rect class="behind" x="3" y="-4" width="20" height="12" rx="4"/>'
        '<rect class="frame" x="0" y="-7" width="20" height="12" rx="4"/>',
        "module",
        "all operators of one call of a module",
    )
    for role, meaning in ROLES.items():
        if role in roles and role in GLYPHS:
            short = "shared source" if role == "shared" else role
            yield f'<path class="badge" transform="translate(11 0)" d="{GLYPHS[role]}"/>', short, meaning
    yield '<path class="edge value" d="M0 0H22"/>', "read by", "the lower box reads a value of the upper one"
    if "lane" in crossing:
        yield '<path class="edge lane" d="M0 0H22"/>', "through a latent", "crosses a boundary, from now on as a latent"
    if "tap" in crossing:
        yield '<path class="edge tap" d="M0 0H22"/>', "to the head", "read past a boundary by the head or the output"
    if any(is_chip(picture, edge) for edge in picture.edges):
        mark = '<rect class="chip" x="2" y="-6" width="18" height="12" rx="6"/>'
        yield mark, "reads a common value", "a value that every region may read"


def _text(css: str, x: float, y: float, text: str) -> str:
    return f'<text class="{css}" x="{x:g}" y="{y:g}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    return escape("\n".join(clean(line) for line in text.split("\n")))
