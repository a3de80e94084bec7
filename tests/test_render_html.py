"""The page, the drawing and the Graphviz text: what they hold, that nothing overlaps, that no name can do harm."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from lbi_compile import sources
from lbi_compile.demo_model import CausalTransformer
from lbi_compile.render import dot, html, svg
from lbi_compile.render.graph import Picture, picture
from lbi_compile.render.groups import Drawing
from tests import pictures
from tests.drawn import SVG, Parsed, collisions, rects, texts
from tests.test_render_graph import TinyUNet, analysed

ROOT = Path(__file__).parent.parent
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)",
    "]]><!-- -->",
    "a\x00b\x1b[31m\u202e\ud800",
    "'; DROP TABLE nodes; --\\",
    "層" * 60,
    "model.layers." * 30 + "x",
    "{{script}}",
    "",
)


def evil() -> Picture:
    """A picture in which everything that comes from a model is called something nasty."""
    names = itertools.cycle(EVIL)
    made = pictures.tower(regions=2, layers=12)

    def spoilt(node: Any) -> Any:
        name = next(names)
        scope = tuple(scope._replace(path=f"{scope.path}.{name}", kind=name) for scope in node.scope)
        return dataclasses.replace(
            node, name=name, operator=node.operator if node.operator == "input" else name, scope=scope, module=name,
            shape=name, reads=(name,), reasons=(name,),
        )  # fmt: skip

    lane = dataclasses.replace(made.boundaries[0].lanes[0], name=EVIL[0], shape=EVIL[1], details=(("base", EVIL[2]),))
    return dataclasses.replace(
        made,
        title=EVIL[0],
        summary=tuple((name, EVIL[1]) for name, _ in made.summary),
        nodes=tuple(spoilt(node) for node in made.nodes),
        parts=tuple(dataclasses.replace(part, modules=EVIL) for part in made.parts),
        boundaries=(dataclasses.replace(made.boundaries[0], crossing=EVIL[2], lanes=(lane,)),),
        why=tuple((name, name, name) for name in EVIL),
    )


@pytest.fixture(scope="module")
def transformer() -> Picture:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=13, width=16, depth=8, heads=2, length=16)
    return picture(analysed(model, torch.randint(13, (2, 8)), regions=4))


@pytest.fixture(scope="module")
def unet() -> Picture:
    torch.manual_seed(0)
    return picture(analysed(TinyUNet(), torch.randn(3, 2, 8, 8), torch.randn(3, 3), regions=3))


def from_transformers(name: str, **sizes: Any) -> Picture:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = sources.load(f"hf:{name}", overrides=sizes, length=12)
    return picture(analysed(model, inputs["input_ids"], regions=4))


@pytest.fixture(scope="module")
def gpt2() -> Picture:
    return from_transformers("gpt2", n_layer=8, n_embd=64, n_head=4, vocab_size=256, bos_token_id=1, eos_token_id=1)


@pytest.fixture(scope="module")
def hybrid() -> Picture:
    return from_transformers(
        "nemotron_h", hidden_size=32, intermediate_size=64, vocab_size=128, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=5, chunk_size=8,
        layers_block_type=["mamba", "attention", "mamba", "mlp"] * 2, num_hidden_layers=8,
    )  # fmt: skip


MADE = {
    "tower": pictures.tower,
    "skips": pictures.unet,
    "branches": pictures.branches,
    "unrolled": pictures.unrolled,
    "modules": lambda: pictures.tower(regions=3, layers=60, operators=9),
    "evil": evil,
}


@pytest.fixture(
    params=[
        *MADE,
        "transformer",
        "unet",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("hybrid", marks=pytest.mark.slow),
    ]
)
def made(request) -> Picture:
    return MADE[request.param]() if request.param in MADE else request.getfixturevalue(request.param)


# ---- what is drawn does not overlap ----


def test_labels_do_not_overlap(made):
    drawing = svg.drawing(made)
    assert not collisions(texts(drawing))
    assert not collisions([*rects(drawing, "chip"), *rects(drawing, "frame")])


def test_labels_are_inside_their_boxes(made):
    drawing = svg.drawing(made)
    (whole,) = rects(drawing, "page")
    frames, chips, bands = (rects(drawing, css) for css in ("frame", "chip", "band"))
    labels = texts(drawing)
    assert all(whole.holds(rect) for rect in (*labels, *frames, *chips, *bands))
    for css, homes in (("label", frames), ("note", frames), ("chip-text", chips), ("band-", bands)):
        some = [rect for rect in labels if rect.what.startswith(css)]
        assert some or css == "chip-text"
        assert all(any(home.holds(rect) for home in homes) for rect in some)
    # what a band says is in its gutter, and no box is there
    gutters = [rect for rect in labels if rect.what.startswith(("band-", "border-"))]
    boxes = [*frames[: len(Drawing(made).shown)], *chips]
    assert not any(rect.meets(box) for rect in gutters for box in boxes)


def test_bands_are_in_order_and_hold_their_boxes(made):
    bands = svg.strips(Drawing(made))
    assert [band.title for band in bands] == [part.label for part in made.parts if band_has_nodes(made, part.label)]
    assert all(above.bottom < below.top for above, below in itertools.pairwise(bands))
    borders = [(band.boundary, band.border) for band in bands if band.boundary]
    assert len(borders) == len(made.boundaries)
    drawing = Drawing(made)
    layout = drawing.outer.layout
    home = {band.part: band for band in bands}
    for place, key in enumerate(drawing.shown):
        band, top = home[drawing.boxes[key].part], layout.tops[layout.row[place]]
        assert band.top < top < top + drawing.boxes[key].size[1] < band.bottom


def band_has_nodes(made: Picture, label: str) -> bool:
    return any(node.part == label for node in made.nodes)


def test_edges_pass_no_box(made):
    """Edges are straight down beside boxes and bend in the channels between rows only."""
    drawing = Drawing(made)
    layout = drawing.outer.layout
    heights = {tuple(map(float, (top, top + height))) for top, height in zip(layout.tops, layout.heights, strict=True)}
    for i, _ in enumerate(drawing.outer.edges):
        path = svg.route(drawing, i)
        for curve in re.finditer(r"C\S+ (\S+) \S+ (\S+) (\S+) (\S+?)(?=[VC]|$)", path):
            middle, end = float(curve[1]), float(curve[4])
            assert not any(top < middle < bottom for top, bottom in heights)
            assert any(end == pytest.approx(top, abs=0.1) for top, _ in heights)


def test_lanes_cross_the_borders_of_their_boundaries(unet):
    drawing = Drawing(unet)
    borders = {band.border: len(boundary.lanes) for band, boundary in
               zip([b for b in svg.strips(drawing) if b.boundary], unet.boundaries, strict=True)}  # fmt: skip
    marks: dict[float, set[float]] = {}
    for x, y, _ in svg.crossings(drawing):
        marks.setdefault(y, set()).add(x)
    assert {y: len(xs) for y, xs in marks.items()} == borders
    assert max(borders.values()) > 1


# ---- the page ----


def test_no_name_does_harm():
    text = html.page(evil())
    parsed = Parsed(text)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert not any(key.startswith("on") or key == "style" for _, attributes in parsed.tags for key in attributes)
    assert parsed.inside["h1"] == [EVIL[0]]
    assert EVIL[1] in parsed.inside["dd"]
    assert EVIL[0] in parsed.inside["td"]
    data = json.loads(parsed.inside["script"][0])
    assert EVIL[2] in data["strings"]
    assert "a\ufffdb\ufffd[31m\ufffd\ufffd" in data["strings"]
    assert parsed.inside["script"][1].startswith('"use strict"')
    text.encode()


def test_no_name_spoils_drawing_and_graphviz_text():
    drawing = svg.drawing(evil())
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(drawing).iter()}
    assert tags == {"svg", "style", "defs", "marker", "path", "rect", "text", "g", "title"}
    text = dot.source(evil())
    assert_dot(text)
    (text + drawing).encode()


def assert_dot(text: str) -> dict[str, str]:
    """The statements of a Graphviz text, by a grammar that knows no more than the language needs."""
    quoted = r'"(?:[^"\\\n]|\\["\\n])*"'
    value = rf"(?:{quoted}|[\w.#]+)"
    attributes = rf"\[\w+={value}(?:, \w+={value})*\]"
    lines = text.splitlines()
    assert re.fullmatch(rf"digraph {quoted} \{{", lines[0])
    assert lines[-1] == "}"
    for line in lines[1:-1]:
        assert re.fullmatch(
            rf"\s*(?:(?:graph|node|edge) {attributes};|subgraph {quoted} \{{|\}}|\w+={value}(?:; \w+={value})*;"
            rf"|b\d+ {attributes};|b\d+ -> b\d+(?: {attributes})?;)",
            line,
        ), line
    return {"nodes": str(len(re.findall(r"^\s+b\d+ \[", text, re.M)))}


def test_graphviz_text(made):
    text = dot.source(made)
    drawing = Drawing(made)
    assert assert_dot(text)["nodes"] == str(len(drawing.shown))
    assert text.count("subgraph") == len(svg.strips(drawing))
    assert text.count(" -> ") == len(drawing.outer.edges)
    lanes = sum(how == "lane" for _, _, how in drawing.outer.edges)
    assert text.count('class="lane"') == lanes


def test_page_needs_nothing_else(made):
    text = html.page(made)
    parsed = Parsed(text)
    links = [value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links == ["data:,"]
    script = parsed.inside["script"][1]
    assert set(re.findall(r"https?://[^\"']*", script)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)", parsed.inside["style"][0])
    for word in ("fetch(", "XMLHttpRequest", "import(", "eval(", "innerHTML", "document.write"):
        assert word not in script


def test_policy_allows_this_script_and_style_only():
    parsed = Parsed(html.page(pictures.tower()))
    (policy,) = (a["content"] or "" for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    for name, content in (("script-src", parsed.inside["script"][1]), ("style-src", parsed.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {"base-uri": "'none'", "form-action": "'none'"}


def test_page_says_what_the_plan_says(unet):
    parsed = Parsed(html.page(unet))
    assert parsed.inside["h1"] == [unet.title]
    assert parsed.inside["dd"] == [value for _, value in unet.summary]
    cells = parsed.inside["td"]
    for boundary in unet.boundaries:
        assert boundary.crossing in cells
        for lane in boundary.lanes:
            assert cells.count(lane.name) >= lane.last - lane.first + 1
    for about, choice, why in unet.why:
        assert {about, choice, why} <= set(cells)
    segments = [a for tag, a in parsed.tags if tag == "button" and "data-part" in a]
    parts = [(i, part) for i, part in enumerate(unet.parts) if part.share]
    assert [a["data-part"] for a in segments] == [str(i) for i, _ in parts]
    widths = {
        int(i): float(w) for i, w in re.findall(r"\.share(\d+) \{ flex-grow: ([\d.]+)", parsed.inside["style"][0])
    }
    assert widths == {i: pytest.approx(100 * part.share, abs=1e-3) for i, part in enumerate(unet.parts)}


def test_data_of_the_page(made):
    data = json.loads(Parsed(html.page(made)).inside["script"][0])
    drawing = Drawing(made)
    assert len(data["boxes"]) == len(drawing.boxes)
    for key, inside in (("", data["outer"]), *data["insides"].items()):
        laid = drawing.inside(int(key)).layout if key else drawing.outer.layout
        things = len(inside["x"])
        assert sorted(t for row in inside["rows"] for t in row) == list(range(things))
        assert [edge[0] for edge in inside["edges"]] == [
            u for u, _, _ in (drawing.inside(int(key)) if key else drawing.outer).edges
        ]
        assert all(edge[2] in ("value", "lane", "tap") for edge in inside["edges"])
        assert len(inside["gaps"]) == max(0, len(laid.tops) - 1)
    strings = data["strings"]
    assert [strings[box[0]] for box in data["boxes"]] == [box.label for box in drawing.boxes]
    assert {strings[data["boxes"][key][2]] for key in drawing.shown}


def test_templates_are_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setup["package-data"]["lbi_compile.render"]
    folder = ROOT / "lbi_compile" / "render"
    others = [file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"]
    assert {file.name for file in others} == {"graph.css", "page.css", "page.html", "page.js"}
    assert all(any(file.match(pattern) for pattern in patterns) for file in others)


def test_colours_tell_neighbours_apart():
    colours = [svg.fill(f"region {k}") for k in range(20)]
    assert all(a != b for a, b in itertools.pairwise(colours))
    assert len(set(colours)) == 8
    style = svg.style()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert "#ffffff" in light
    assert ".page { fill: #0d1117; }" in dark
    assert "$" not in style


# ---- in a browser ----


SCALE = "Number(/scale\\((.*)\\)/.exec(document.getElementById('world').getAttribute('transform'))[1])"
GROUP = """(() => { const at = [...document.querySelectorAll('.box.group')].find((g) => {
  const { left, top, right, bottom } = g.getBoundingClientRect();
  const room = document.getElementById('canvas').getBoundingClientRect();
  return g.querySelector('.label').textContent !== 'prologue'
    && left > room.left && top > room.top && right < room.right && bottom < room.bottom; });
  if (!at) return null;
  const { left, top, width, height } = at.querySelector('.frame').getBoundingClientRect();
  return [left + width / 2, top + height / 2, Number(at.dataset.box)]; })()"""
# labels as the browser sets them, against the frames around them
SPILT = """[...document.querySelectorAll('.box, .head')].flatMap((g) => {
  const frame = g.querySelector('.frame, .bar').getBoundingClientRect();
  return [...g.querySelectorAll('.label, .note, .opened')].filter((text) => {
    const { left, right } = text.getBoundingClientRect();
    return left < frame.left - 0.5 || right > frame.right + 0.5; }).map((text) => text.textContent); })"""
MEET = """(() => { const all = [...document.querySelectorAll('#world text')].filter((text) => text.textContent)
    .map((text) => [text.getBoundingClientRect(), text.textContent]);
  const met = [];
  all.forEach(([a, one], i) => all.slice(i + 1).forEach(([b, other]) => {
    const across = a.left < b.right - 1 && b.left < a.right - 1;
    if (across && a.top < b.bottom - 3 && b.top < a.bottom - 3) met.push([one, other]); }));
  return met; })()"""
# boxes, open and closed, that run into each other or into the frame of one beside them
CLASH = """(() => { const frames = [...document.querySelectorAll('.box > .frame, .room')];
  const rects = frames.map((frame) => frame.getBoundingClientRect()), clash = [];
  frames.forEach((one, i) => frames.slice(i + 1).forEach((other, j) => {
    const [a, b] = [rects[i], rects[i + 1 + j]];
    const within = one.parentNode.contains(other) || other.parentNode.contains(one);
    if (!within && a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5)
      clash.push([i, i + 1 + j]); }));
  return clash; })()"""


@pytest.mark.slow
def test_page_in_a_browser(browser, made, tmp_path):
    """It opens without errors and requests, looks as computed, opens and closes a module, zooms and moves."""
    file = tmp_path / "page.html"
    file.write_text(html.page(made), encoding="utf-8")
    browser.open(file)
    assert browser.troubles() == []
    drawing = Drawing(made)
    count = "document.querySelectorAll('.box').length"
    assert browser.js(count) == len(drawing.shown)
    layout, scale = drawing.outer.layout, browser.js(SCALE)
    for place, key in enumerate(drawing.shown):
        frame = f"document.querySelector('[data-box=\"{key}\"] .frame').getBoundingClientRect()"
        first = f"document.querySelector('[data-box=\"{drawing.shown[0]}\"] .frame').getBoundingClientRect()"
        left, top = (browser.js(f"{frame}.{side} - {first}.{side}") / scale for side in ("left", "top"))
        half = drawing.boxes[key].width / 2 - drawing.boxes[drawing.shown[0]].width / 2
        assert left == pytest.approx(layout.x[place] - layout.x[0] - half, abs=0.6)
        assert top == pytest.approx(layout.tops[layout.row[place]] - layout.tops[layout.row[0]], abs=0.6)
    assert browser.js(MEET) == []
    if not any(ord(c) > 0x2FF for box in drawing.boxes for c in box.label):  # the machine may lack a font for those
        assert browser.js(SPILT) == []

    x, y, box = browser.js(GROUP)
    browser.click(x, y)
    assert browser.js(count) == len(drawing.shown) - 1 + len(drawing.boxes[box].items)
    head = f"document.querySelector('.head[data-box=\"{box}\"]')"
    assert browser.js(f"{head}.getAttribute('aria-expanded')") == "true"
    assert browser.js(MEET) == []
    assert browser.js(CLASH) == []
    assert browser.js(f"document.activeElement === {head}")
    browser.press("Enter", windowsVirtualKeyCode=13, text="\r")
    assert browser.js(count) == len(drawing.shown)

    room = browser.js("(({ left, top }) => [left, top])(document.getElementById('canvas').getBoundingClientRect())")
    before = browser.js(SCALE)
    browser.mouse("mouseWheel", room[0] + 200, room[1] + 200, deltaX=0, deltaY=-240)
    assert browser.js(SCALE) > 1.2 * before
    where = "document.querySelector('.band').getBoundingClientRect().left"
    left = browser.js(where)
    browser.mouse("mousePressed", room[0] + 30, room[1] + 300, button="left")
    browser.mouse("mouseMoved", room[0] + 130, room[1] + 320, button="left", buttons=1)
    browser.mouse("mouseReleased", room[0] + 130, room[1] + 320, button="left")
    assert browser.js(where) == pytest.approx(left + 100, abs=1)
    for _ in range(3):  # open everything that can be seen, and what is in it
        if found := browser.js(GROUP):
            browser.click(*found[:2])
    assert browser.js(CLASH) == []
    browser.js("document.getElementById('fit').click()")
    assert browser.js(
        "(() => { const all = document.getElementById('world').getBoundingClientRect(),"
        " room = document.getElementById('canvas').getBoundingClientRect();"
        " return all.top >= room.top - 1 && all.bottom <= room.bottom + 1 && all.right <= room.right + 1; })()"
    )
    assert browser.troubles() == []


@pytest.mark.slow
def test_keys_and_tooltips_in_a_browser(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(html.page(evil()), encoding="utf-8")
    browser.open(file)
    browser.js("document.getElementById('canvas').focus()")
    before = browser.js(SCALE)
    browser.press("+", text="+")
    assert browser.js(SCALE) == pytest.approx(1.25 * before)
    browser.press("0", text="0")
    browser.press("Tab", windowsVirtualKeyCode=9)
    first = browser.js("document.activeElement.dataset.box")
    assert first is not None
    browser.press("ArrowDown", windowsVirtualKeyCode=40)
    assert browser.js("document.activeElement.dataset.box") not in (None, first)
    assert browser.js("document.getElementById('tip').hidden") is False
    assert browser.js("document.activeElement.getAttribute('aria-label')")
    browser.press("Escape", windowsVirtualKeyCode=27)
    assert browser.js("document.getElementById('tip').hidden") is True
    for _ in range(20):
        browser.press("ArrowDown", windowsVirtualKeyCode=40)
        browser.press("Enter", windowsVirtualKeyCode=13, text="\r")
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelectorAll('#tip script, #world script, img').length") == 0
    assert browser.troubles() == []
