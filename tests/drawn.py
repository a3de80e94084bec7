"""Where a drawing puts its texts and boxes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import NamedTuple
from xml.etree import ElementTree

from lbi_compile.render.groups import CHIP, LABEL, NOTE
from lbi_compile.render.labels import text_width

SVG = "{http://www.w3.org/2000/svg}"


class Rect(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    what: str

    def meets(self, other: Rect) -> bool:
        return (
            self.left < other.right - 0.1
            and other.left < self.right - 0.1
            and self.top < other.bottom - 0.1
            and other.top < self.bottom - 0.1
        )

    def holds(self, other: Rect) -> bool:
        return (
            self.left <= other.left + 0.1
            and self.top <= other.top + 0.1
            and other.right <= self.right + 0.1
            and other.bottom <= self.bottom + 0.1
        )


SIZES = {"label": LABEL, "note": NOTE, "chip-text": CHIP, "title": 16, "facts": 11, "band-title": 13, "band-note": 11,
         "border-text": 10, "key": 11}  # fmt: skip
CENTRED = ("label", "note", "chip-text")


def placed(
    element: ElementTree.Element, x: float = 0, y: float = 0
) -> Iterator[tuple[ElementTree.Element, float, float]]:
    """Every element of a drawing with the shift of all groups around it."""
    if found := re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", "")):
        x, y = x + float(found[1]), y + float(found[2])
    yield element, x, y
    for inner in element:
        yield from placed(inner, x, y)


def texts(drawing: str) -> list[Rect]:
    found = []
    for element, x, y in placed(ElementTree.fromstring(drawing)):
        if element.tag == f"{SVG}text":
            css, text = element.get("class") or "", element.text or ""
            size, wide = SIZES[css], text_width(text, SIZES[css])
            left = x + float(element.get("x", 0)) - (wide / 2 if css in CENTRED else 0)
            line = y + float(element.get("y", 0))
            found.append(Rect(left, line - 0.8 * size, left + wide, line + 0.22 * size, f"{css} {text}"))
    return [rect for rect in found if rect.right > rect.left]


def rects(drawing: str, css: str) -> list[Rect]:
    found = []
    for element, x, y in placed(ElementTree.fromstring(drawing)):
        if element.tag == f"{SVG}rect" and css in (element.get("class") or "").split():
            left, top = x + float(element.get("x", 0)), y + float(element.get("y", 0))
            found.append(
                Rect(left, top, left + float(element.attrib["width"]), top + float(element.attrib["height"]), css)
            )
    return found


def collisions(some: list[Rect]) -> list[tuple[str, str]]:
    some = sorted(some, key=lambda rect: rect.top)
    found = []
    for i, one in enumerate(some):
        for other in itertools.takewhile(lambda rect, end=one.bottom: rect.top < end, some[i + 1 :]):
            if one.meets(other):
                found.append((one.what, other.what))
    return found


class Parsed(HTMLParser):
    """Tags and attributes of a page, and the text of its script, style and table elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "td": [], "h1": [], "dd": [], "button": []}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self._open.append(tag)
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open[-1]][-1] += data
