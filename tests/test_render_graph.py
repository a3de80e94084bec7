"""Pictures of analysed models, boxes and layouts."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbi_compile.analysis import Analysis, analyse
from lbi_compile.capture import as_inputs, capture
from lbi_compile.demo_model import CausalTransformer
from lbi_compile.options import Options
from lbi_compile.render.graph import Picture, is_region, picture
from lbi_compile.render.groups import MOST_BOXES, Drawing
from lbi_compile.render.html import page
from lbi_compile.render.labels import fit, text_width
from tests import pictures


def analysed(model: nn.Module, *inputs: Tensor, regions: int) -> Analysis:
    options = Options(regions, 4, "auto", "auto", "auto", "auto", False, 0)
    return analyse(model, capture(model, as_inputs(model, inputs)), options)


class TinyUNet(nn.Module):
    """Three levels; a time embedding that every level reads; a secondary output from the middle."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.time = nn.Linear(3, width)
        self.down = nn.ModuleList(self._level(width, width) for _ in range(3))
        self.up = nn.ModuleList(self._level(2 * width, width) for _ in range(3))
        self.exit = nn.Conv2d(width, 1, 1)
        self.last = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _level(inputs: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = self.time(t)[:, :, None, None]
        x = self.first(x)
        skips = []
        for level in self.down:
            x = level(x) + time
            skips.append(x)
        early = self.exit(x)
        for level in self.up:
            x = level(torch.cat([x, skips.pop()], 1)) + time
        return self.last(x), early


class Conditioned(nn.Module):
    """Residual blocks that all read an embedding; with ``early`` an output is gathered from the first one too."""

    def __init__(self, *, early: bool = False) -> None:
        super().__init__()
        self.stem, self.embed = nn.Linear(5, 32), nn.Embedding(7, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(6))
        self.head = nn.Linear(32, 3)
        self.early = nn.Linear(32, 2) if early else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, e = self.stem(x), self.embed(c)
        seen = []
        for block in self.blocks:
            x = x + block(x + e)
            seen.append(x)
        return self.head(x) if self.early is None else torch.cat([self.head(x), self.early(seen[0])], -1)


@pytest.fixture(scope="module")
def transformer() -> Analysis:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=13, width=16, depth=4, heads=2, length=16)
    return analysed(model, torch.randint(13, (2, 8)), regions=2)


@pytest.fixture(scope="module")
def unet() -> Analysis:
    torch.manual_seed(0)
    return analysed(TinyUNet(), torch.randn(3, 2, 8, 8), torch.randn(3, 3), regions=3)


@pytest.fixture(params=["transformer", "unet"])
def analysis(request) -> Analysis:
    return request.getfixturevalue(request.param)


def drawn_lanes(made: Picture) -> list[set[str]]:
    return [{lane.name for lane in boundary.lanes} for boundary in made.boundaries]


def test_live_nodes_are_drawn_in_their_part(analysis):
    made = picture(analysis)
    live = [node for node in made.nodes if node.kind == "live"]
    assert len(live) == len(analysis.live.live)
    assert [node.part for node in live] == [analysis.where[node] for node in analysis.live.live]
    assert {node.part for node in made.nodes} <= {part.label for part in made.parts}
    assert all(node.part == "prologue" for node in made.nodes if node.kind in ("input", "constant"))


def test_edges_are_those_of_the_graph(analysis):
    made = picture(analysis)
    graph = analysis.capture.graph_module.graph
    drawn = {name: i for i, name in enumerate(n.name for n in graph.nodes if n.name in _names(made, analysis))}
    wanted = {
        (drawn[before.name], drawn[node.name])
        for node in graph.nodes
        if node.name in drawn
        for before in analysis.live.waits[node]
        if before.name in drawn
    }
    assert {(edge.source, edge.target) for edge in made.edges} == wanted
    assert all(edge.source < edge.target for edge in made.edges)


def _names(made: Picture, analysis: Analysis) -> set[str]:
    """Names of the graph's nodes that a picture has, found again by walking back from outputs and live nodes."""
    graph = analysis.capture.graph_module.graph
    wanted = {*analysis.live.live, *graph.output_node().all_input_nodes}
    pending = list(wanted)
    while pending:
        more = {b for b in analysis.live.waits[pending.pop()] if b not in wanted}
        wanted |= more
        pending += more
    some = {n.name for n in wanted if n.op in ("placeholder", "call_function") and analysis.live.kind[n] != "number"}
    assert len(some) == len(made.nodes)
    return some


def test_lanes_are_those_of_the_plan(analysis):
    made = picture(analysis)
    assert drawn_lanes(made) == [{point.name for point in points} for points in analysis.plan.crossings]
    assert all(boundary.lanes for boundary in made.boundaries)
    crossing = {edge.source for edge in made.edges if edge.crossing == "lane"}
    assert crossing == {lane.node for boundary in made.boundaries for lane in boundary.lanes}
    assert crossing == {i for i, node in enumerate(made.nodes) if "lane" in node.roles}


def test_no_other_edge_crosses_a_boundary(analysis):
    made = picture(analysis)
    place = {part.label: i for i, part in enumerate(made.parts)}
    for edge in made.edges:
        source, target = made.nodes[edge.source], made.nodes[edge.target]
        if is_region(source.part) and is_region(target.part) and source.part != target.part:
            assert edge.crosses
            assert place[source.part] < place[target.part]
        if source.part == target.part:
            assert not edge.crosses


def test_parts_are_those_of_the_plan(analysis):
    made, plan = picture(analysis), analysis.plan
    labels = ["prologue", "stem", *(f"region {region.index}" for region in plan.regions), "head"]
    assert [part.label for part in made.parts] == labels
    assert [part.flops for part in made.regions] == [region.part.flops for region in plan.regions]
    assert sum(node.flops for node in made.nodes if node.part == "region 1") == plan.regions[1].part.flops


def test_roles_and_reasons_of_a_transformer(transformer):
    made = picture(transformer, engine="scan (asked for)")
    by_role = {role: [node for node in made.nodes if role in node.roles] for role in ("canvas", "finish", "output")}
    assert [node.name for node in by_role["canvas"]] == [transformer.plan.canvas.name]
    finishes = [region.finish.name for region in transformer.plan.regions if region.finish]
    assert [node.name for node in by_role["finish"]] == finishes
    assert [node.module for node in by_role["output"]] == ["head"]
    (canvas,) = by_role["canvas"]
    assert any("before the first heavy step" in reason for reason in canvas.reasons)
    lane = made.nodes[made.boundaries[0].lanes[0].node]
    assert "lane of boundary 1, read by region 1" in lane.reasons
    facts = dict(made.summary)
    assert facts["hash"] == transformer.plan.hash
    assert facts["engine"] == "scan (asked for)"
    assert facts["balance"] == "largest over mean region 1.00"
    assert facts["interface"].startswith("token, linear cell (")


def test_what_is_not_live(transformer):
    made = picture(transformer)
    tokens = [node for node in made.nodes if node.operator == "input"]
    assert [(node.name, node.roles, node.part) for node in tokens] == [("tokens", ("input",), "prologue")]
    position = [node for node in made.nodes if node.module == "position"]
    assert [(node.kind, node.part) for node in position] == [("parameter-only", "stem")]
    linear = next(node for node in made.nodes if node.module == "blocks.0.mlp.0")
    assert linear.reads == ("blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias")
    assert linear.shape == "float32 [B, T, 64]"
    assert [(scope.path, scope.kind) for scope in linear.scope] == [
        ("blocks.0", "TransformerBlock"),
        ("blocks.0.mlp", "Sequential"),
        ("blocks.0.mlp.0", "Linear"),
    ]
    assert not any("assert" in node.operator or node.operator.startswith("aten.sym_size") for node in made.nodes)


def test_lanes_and_taps_of_a_unet(unet):
    made = picture(unet)
    assert max(map(len, drawn_lanes(made))) > 1
    lanes = [lane for boundary in made.boundaries for lane in boundary.lanes]
    assert {name for lane in lanes for name, _ in lane.details} == {"slot", "base"}
    for lane in lanes:
        planned = next(known for known in unet.plan.lanes if known.point.name == lane.name)
        assert (planned.first, planned.last) == (lane.first, lane.last)
        assert lane.readers == tuple(f"region {k}" for k in planned.readers)
        assert dict(lane.details)["slot"] == str(planned.slot)
    (tap,) = [node for node in made.nodes if "tap" in node.roles]
    assert (tap.module, tap.part) == ("exit", "region 1")
    assert tap.roles == ("tap", "output")


def test_what_the_head_reads_past_a_boundary_is_a_tap():
    made = picture(analysed(Conditioned(early=True), torch.randn(4, 5), torch.arange(4), regions=3))
    taps = [edge for edge in made.edges if edge.crossing == "tap"]
    assert taps
    last = made.regions[-1].label
    past = [e for e in made.edges if made.nodes[e.target].part == "head" and is_region(made.nodes[e.source].part)]
    common = [edge for edge in past if "shared" in made.nodes[edge.source].roles]
    assert taps == [edge for edge in past if made.nodes[edge.source].part != last and edge not in common]
    assert {edge.source for edge in taps} == {i for i, node in enumerate(made.nodes) if "tap" in node.roles}


def test_shared_sources():
    analysis = analysed(Conditioned(), torch.randn(4, 5), torch.arange(4), regions=3)
    made = picture(analysis)
    names = {point.name for point in analysis.plan.shared}
    assert names == {"embed:embedding[0]"}
    assert {node.name for node in made.nodes if "shared" in node.roles} == names
    (source,) = [i for i, node in enumerate(made.nodes) if node.name in names]
    readers = [edge for edge in made.edges if edge.source == source]
    assert {made.nodes[edge.target].part for edge in readers} == {"region 0", "region 1", "region 2"}
    assert [edge.crossing for edge in readers if made.nodes[edge.target].part != "region 0"] == ["shared"] * 4
    assert "embedding" in {chip for box in Drawing(made).boxes for chip in box.chips}


def test_one_region_has_no_boundary():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    made = picture(analysed(model, torch.randn(2, 3), regions=1))
    assert not made.boundaries
    assert not any(edge.crosses for edge in made.edges)
    assert Drawing(made).outer.layout.rows


# ---- boxes ----

SYNTHETIC = {
    "tower": lambda: pictures.tower(),
    "unet": lambda: pictures.unet(),
    "unrolled": lambda: pictures.unrolled(steps=60),
    "tangle": lambda: pictures.tangle(200, lambda i: f"region {i // 50}", path=lambda i: f"loop.{i // 7}"),
}


@pytest.fixture(params=SYNTHETIC)
def drawing(request) -> Drawing:
    return Drawing(SYNTHETIC[request.param]())


def everything(drawing: Drawing) -> list[int]:
    """All boxes that are shown when every group is open."""
    pending, seen = list(drawing.shown), []
    while pending:
        box = pending.pop()
        seen.append(box)
        pending += drawing.boxes[box].items
    return seen


def test_every_operator_is_in_one_box(drawing):
    found = [drawing.boxes[box].node for box in everything(drawing) if drawing.boxes[box].node is not None]
    assert sorted(found) == list(range(len(drawing.picture.nodes)))
    for key in everything(drawing):
        box = drawing.boxes[key]
        if box.items:
            assert len(box.items) > 1 or box.label == "prologue"
            assert sorted(box.nodes) == sorted(n for item in box.items for n in drawing.boxes[item].nodes)
            assert {drawing.picture.nodes[n].part for n in box.nodes} == {drawing.picture.parts[box.part].label}


def test_edges_lead_from_operator_to_operator_through_the_boxes(drawing):
    """Walking the drawn edges, in and out of boxes, from each operator finds exactly the operators that read it."""
    insides = {None: drawing.outer}
    insides |= {box: drawing.inside(box) for box in everything(drawing) if drawing.boxes[box].items}
    parent = {item: home for home, inside in insides.items() for item in inside.items}
    after: dict[tuple[int | None, int], set[tuple[int | None, int]]] = {}
    for home, inside in insides.items():
        thing = dict(enumerate(inside.items)) | {way: -2 for way in inside.ways[1:] if way is not None}
        thing |= {way: -1 for way in inside.ways[:1] if way is not None}
        for u, v, _ in inside.edges:
            after.setdefault((home, thing[u]), set()).add((home, thing[v]))

    def first_boxes(read: int) -> set[int]:
        """Operators and boxes that an operator's value may reach: boxes forget which of their operators reads what."""
        box = next(key for key in everything(drawing) if drawing.boxes[key].node == read)
        pending, reached = [(parent[box], box)], set()
        while pending:
            for home, there in after.get(pending.pop(), ()):
                if there == -2:
                    pending.append((parent[home], home))
                else:
                    inner = [(there, -1)] if drawing.boxes[there].items else []
                    reached |= set() if inner else {drawing.boxes[there].node}
                    pending += inner
        return reached

    readers: dict[int, set[int]] = {}
    for edge in drawing._edges:
        readers.setdefault(edge.source, set()).add(edge.target)
    for read, wanted in itertools.islice(readers.items(), 60):
        assert wanted <= first_boxes(read)


def test_first_sight_is_small(drawing):
    assert len(drawing.shown) <= MOST_BOXES
    assert len({drawing.boxes[box].part for box in drawing.shown}) == len({n.part for n in drawing.picture.nodes})


large = pytest.mark.parametrize(
    "make",
    [
        lambda: pictures.tower(regions=8, layers=96, operators=52),
        lambda: pictures.unet(levels=60, operators=40),
        lambda: pictures.unrolled(),
        lambda: pictures.tangle(5000, lambda i: f"region {i // 1250}", reach=400, path=lambda i: f"loop.{i // 20}"),
    ],
    ids=["tower", "unet", "unrolled", "tangle"],
)


@large
def test_five_thousand_nodes(make):
    made = make()
    assert 4700 < len(made.nodes) < 5100
    drawing = Drawing(made)
    assert len(drawing.outer.items) <= MOST_BOXES
    assert len(page(made)) < 3_000_000
    assert max(len(box.items) for box in drawing.boxes) <= 40


@pytest.mark.slow
@large
def test_five_thousand_nodes_take_seconds(make):
    made = make()
    start = time.process_time()
    assert Drawing(made).outer
    assert time.process_time() - start < 2
    assert page(made)
    assert time.process_time() - start < 5


def test_many_regions_show_one_box_each():
    made = Drawing(pictures.tower(regions=100, layers=200, operators=3), most=120)
    assert len(made.shown) == 100 + 3


def test_modules_of_one_class_open_together():
    """So few layers say too little, so they are opened, all of them."""
    made = Drawing(pictures.tower(regions=2, layers=4))
    labels = [made.boxes[box].label for box in made.shown]
    assert labels == ["tokens", "prologue", "model.embed"] + [
        name for i in range(4) for name in ("linear", f"model.layers.{i}.mixer", "add")
    ] + ["model.norm", "head"]


def test_repeated_calls_of_a_module_are_told_apart():
    nodes = [pictures.node("stem", "model") for _ in range(12)]
    for path in ("model.shared", "model.shared@1"):
        nodes += [pictures.node("region 0", "model", path), pictures.node("region 0", "model", path)]
    made = Drawing(pictures.picture(nodes, [(i, i + 1) for i in range(15)], regions=1))
    groups = [box for box in made.boxes if box.items]
    assert [box.label for box in groups] == ["model.shared", "model.shared (call 2)"]


def test_common_values_become_chips():
    made = pictures.tower()
    drawing = Drawing(made)
    layers = [drawing.boxes[box] for box in drawing.shown if drawing.boxes[box].label.startswith("model.layers")]
    assert [box.chips for box in layers] == [("prologue",)] * 8
    assert not any(made.nodes[edge.source].part == "prologue" and made.nodes[edge.target].part != "stem"
                   for edge in drawing._edges)  # fmt: skip
    nodes = [pictures.node("prologue", operator="aten.x", name=str(i), kind="input") for i in range(4)]
    nodes = [dataclasses.replace(node, operator="input", name=f"mask{i}") for i, node in enumerate(nodes)]
    nodes += [pictures.node("stem"), pictures.node("region 0")]
    crowded = Drawing(pictures.picture(nodes, [*((i, 5, "shared") for i in range(4)), (4, 5)], regions=1))
    assert next(box for box in crowded.boxes if box.node == 5).chips == ("mask0", "+3 more")


# ---- labels ----


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.floats(0, 300), st.booleans())
def test_fitted_text_fits(text, width, keep_end):
    fitted = fit(text, width, 10, keep_end=keep_end)
    assert text_width(fitted, 10) <= max(width, text_width("…", 10)) + 1e-9
    assert fitted.isprintable()
    if text.isprintable() and text_width(text, 10) <= width:
        assert fitted == text
