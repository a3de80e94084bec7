"""Boxes: a picture's operators collected by the modules that ran them, so that a page shows few boxes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from math import ceil

from .graph import PROLOGUE, ROLES, STEM, Edge, Node, Picture, Scope
from .labels import fit, text_width
from .layout import Layout, Spacing, layered

# pixels
LABEL, NOTE, CHIP = 12.0, 10.0, 9.0
BOX_HEIGHT, NARROWEST, WIDEST, PADDING = 38.0, 76.0, 264.0, 10.0
BADGE, CHIP_HEIGHT, CHIP_GAP, LONGEST_CHIP = 15.0, 15.0, 8.0, 72.0
OUTER = Spacing(row=26, band=58, column=22, bend=14)
INNER = Spacing(row=24, band=24, column=20, bend=12)

MOST_BOXES = 250
FEWEST_BOXES = 12
_MOST_INSIDE, _RUNS = 40, 24
_MOST_CHIPS = 2
_IN, _OUT = -1, -2
_STRONGEST = ["", "shared", "tap", "lane"]


@dataclass
class Group:
    """A module call, a run of neighbours, or a whole part.

    Attributes:
        scope: The call; ``None`` for a part or a run.
        label: What it is called where it has no ``scope``.
        items: Groups and operators (as indices of nodes) in program order.
    """

    scope: Scope | None
    label: str
    items: list[Group | int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Box:
    """One box of the drawing.

    Attributes:
        label: First line, cut to the box.
        note: Second line, cut to the box.
        name: In full what ``label`` says.
        kind: Class of the module; empty for operators and runs.
        part: Index of its part.
        node: The operator it stands for; ``None`` for a group.
        nodes: Operators inside, itself for an operator.
        items: Boxes inside, by index into ``Drawing.boxes``.
        flops: Of all of them.
        roles: Marks of all of them: keys of ``ROLES`` but ``input``, which has a shape of its own.
        chips: What it reads from everywhere, in a few letters each.
        width: Of the box alone.
        chip_width: Of the chips at its left; 0 without chips.
    """

    label: str
    note: str
    name: str
    kind: str
    part: int
    node: int | None
    nodes: tuple[int, ...]
    items: tuple[int, ...]
    flops: int
    roles: tuple[str, ...]
    chips: tuple[str, ...]
    width: float
    chip_width: float

    @property
    def size(self) -> tuple[float, float]:
        """Width and height with the chips; the box is in the middle of it."""
        return self.width + 2 * (self.chip_width + CHIP_GAP if self.chips else 0.0), BOX_HEIGHT


@dataclass(frozen=True, slots=True)
class Inside:
    """What is in a box, or in the whole drawing.

    Attributes:
        items: Boxes, by index into ``Drawing.boxes``.
        ways: Numbers, as boxes of ``layout``, of the way into the box and the way out of it; ``None`` where no edge
            leads there.
        edges: Source, target and crossing of each edge, by boxes of ``layout``.
        layout: Its boxes are ``items``, then the ways.
    """

    items: tuple[int, ...]
    ways: tuple[int | None, int | None]
    edges: tuple[tuple[int, int, str], ...]
    layout: Layout


class Drawing:
    """A picture with its operators in nested boxes.

    Args:
        picture: The picture.
        most: Boxes that are shown at first, at most.

    Attributes:
        boxes: All boxes.
        shown: Those shown at first, in program order.
    """

    def __init__(self, picture: Picture, *, most: int = MOST_BOXES) -> None:
        self.picture = picture
        self.boxes: list[Box] = []
        self._part = {part.label: i for i, part in enumerate(picture.parts)}
        self._chips, self._edges = _chips(picture)
        self._parent: dict[int, int] = {}
        self._box_of: dict[int, int] = {}
        shown = [self._box(item, picture.nodes, None) for item in _first_sight(picture, most)]
        self.shown = tuple(sorted(shown, key=lambda box: (self.boxes[box].part, min(self.boxes[box].nodes))))

    @cached_property
    def outer(self) -> Inside:
        """The drawing at first sight."""
        return self._laid_out(None, self.shown, OUTER, [self.boxes[box].part for box in self.shown])

    def inside(self, box: int) -> Inside:
        """What is in a group."""
        items = self.boxes[box].items
        return self._laid_out(box, items, INNER, [1] * len(items))

    def _laid_out(self, home: int | None, items: tuple[int, ...], spacing: Spacing, bands: Sequence[int]) -> Inside:
        edges = self._all_edges.get(home, {})
        used = [way for way in (_IN, _OUT) if any(way in edge for edge in edges)]
        thing = {key: i for i, key in enumerate((*items, *used))}
        found = tuple((thing[u], thing[v], how) for (u, v), how in edges.items())
        layout = layered(
            [*(self.boxes[item].size for item in items), *((0.0, 0.0) for _ in used)],
            [(u, v) for u, v, _ in found],
            bands=[*bands, *(0 if way == _IN else 2 for way in used)],
            weights=[*(len(self.boxes[item].nodes) for item in items), *(1 for _ in used)],
            spacing=spacing,
        )
        return Inside(items, (thing.get(_IN), thing.get(_OUT)), found, layout)

    def _box(self, item: Group | int, nodes: Sequence[Node], within: Scope | None) -> int:
        if isinstance(item, int):
            return self._add(self._operator(item, within), ())
        items = tuple(self._box(one, nodes, item.scope or within) for one in item.items)
        return self._add(self._group(item, items, within), items)

    def _add(self, box: Box, items: Sequence[int]) -> int:
        self.boxes.append(box)
        key = len(self.boxes) - 1
        self._parent.update(dict.fromkeys(items, key))
        if box.node is not None:
            self._box_of[box.node] = key
        return key

    def _operator(self, index: int, within: Scope | None) -> Box:
        node = self.picture.nodes[index]
        operator = node.operator.removeprefix("aten.")
        sizes = node.shape.partition(" ")[2]
        # an operator that is all of a module goes by the name of the module
        own = node.scope[-1] if node.scope and (within is None or node.scope[-1] != within) else None
        alone = own is not None and own.path in self._alone
        label = _alone(own, within) if alone and own else node.name if node.operator == "input" else operator
        note = f"{operator} {sizes}" if alone else sizes or "several values"
        kind = own.kind if alone and own else ""
        return self._made(label, note, node.name, kind, (index,), (), index)

    @cached_property
    def _alone(self) -> frozenset[str]:
        """Paths of module calls that run one drawn operator."""
        seen: dict[str, int] = {}
        for node in self.picture.nodes:
            for scope in node.scope:
                seen[scope.path] = seen.get(scope.path, 0) + 1
        return frozenset(path for path, many in seen.items() if many == 1)

    def _group(self, group: Group, items: Sequence[int], within: Scope | None) -> Box:
        nodes = tuple(node for item in items for node in self.boxes[item].nodes)
        kind = group.scope.kind if group.scope else ""
        label = _relative(group.scope.path, within) if group.scope else group.label
        name = group.scope.path if group.scope else group.label
        facts = [kind, f"{len(nodes)} op{'' if len(nodes) == 1 else 's'}"]
        return self._made(label, " · ".join(filter(None, facts)), name, kind, nodes, items, None)

    def _made(
        self,
        label: str,
        note: str,
        name: str,
        kind: str,
        nodes: tuple[int, ...],
        items: Sequence[int],
        node: int | None,
    ) -> Box:
        found = {role for i in nodes for role in self.picture.nodes[i].roles}
        roles = tuple(role for role in ROLES if role in found and role != "input")
        chips = list(dict.fromkeys(chip for i in nodes for chip in self._chips.get(i, ())))
        if len(chips) > _MOST_CHIPS:
            chips[_MOST_CHIPS - 1 :] = [f"+{len(chips) - _MOST_CHIPS + 1} more"]
        shown = tuple(fit(chip, LONGEST_CHIP - 8, CHIP) for chip in chips)
        badges = BADGE * len(roles)
        lines = text_width(label, LABEL) + badges, text_width(note, NOTE)
        width = min(WIDEST, max(NARROWEST, ceil(max(lines) + 2 * PADDING)))
        free = width - 2 * PADDING
        return Box(
            label=fit(label, free - badges, LABEL, keep_end="." in label),
            note=fit(note, free, NOTE),
            name=name,
            kind=kind,
            part=self._part[self.picture.nodes[nodes[0]].part],
            node=node,
            nodes=nodes,
            items=tuple(items),
            flops=sum(self.picture.nodes[i].flops for i in nodes),
            roles=roles,
            chips=shown,
            width=width,
            chip_width=max((ceil(text_width(chip, CHIP)) + 8 for chip in shown), default=0.0),
        )

    @cached_property
    def _all_edges(self) -> dict[int | None, dict[tuple[int, int], str]]:
        """Edges by the box they are drawn in: where their ends part, and from there to each end."""
        found: dict[int | None, dict[tuple[int, int], str]] = {None: {}}

        def add(home: int | None, edge: tuple[int, int], how: str) -> None:
            there = found.setdefault(home, {})
            there[edge] = max(there.get(edge, ""), how, key=_STRONGEST.index)

        for edge in self._edges:
            above, below = self._line(edge.source), self._line(edge.target)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(above, below, strict=False)))
            add(above[same - 1] if same else None, (above[same], below[same]), edge.crossing)
            for outer, inner in pairwise(above[same:]):
                add(outer, (inner, _OUT), edge.crossing)
            for outer, inner in pairwise(below[same:]):
                add(outer, (_IN, inner), edge.crossing)
        return found

    def _line(self, node: int) -> list[int]:
        """The boxes around a node, outermost first, and its own."""
        line = [self._box_of[node]]
        while line[-1] in self._parent:
            line.append(self._parent[line[-1]])
        return line[::-1]


def _chips(picture: Picture) -> tuple[dict[int, tuple[str, ...]], tuple[Edge, ...]]:
    """What every node reads that every region may read, as labels, and the edges that are drawn as lines."""
    chips: dict[int, tuple[str, ...]] = {}
    lines: list[Edge] = []
    for edge in picture.edges:
        if is_chip(picture, edge):
            chips[edge.target] = (*chips.get(edge.target, ()), _chip(picture.nodes[edge.source]))
        else:
            lines.append(edge)
    return chips, tuple(lines)


def is_chip(picture: Picture, edge: Edge) -> bool:
    """The edge reads a value that every region may read: a label at the reader says so in place of a long line."""
    source, target = picture.nodes[edge.source], picture.nodes[edge.target]
    far = source.part == PROLOGUE and target.part not in (PROLOGUE, STEM) and "canvas" not in source.roles
    return far or edge.crossing == "shared"


def _chip(source: Node) -> str:
    if source.operator == "input":
        return source.name
    if "canvas" in source.roles or source.part == PROLOGUE:
        return "canvas" if "canvas" in source.roles else PROLOGUE
    return source.operator.removeprefix("aten.")


def _part_tree(picture: Picture, part: str, wrappers: frozenset[str]) -> list[Group | int]:
    """The groups and operators of a part, as the modules called each other."""
    root, known = Group(None, part), dict[tuple[int, str], Group]()
    for i, node in enumerate(picture.nodes):
        if node.part != part:
            continue
        at = root
        for scope in node.scope:
            key = (id(at), scope.path)
            if key not in known:
                known[key] = Group(scope, scope.path)
                at.items.append(known[key])
            at = known[key]
        at.items.append(i)
    if part == PROLOGUE:
        inputs = [i for i in root.items if isinstance(i, int) and picture.nodes[i].operator == "input"]
        root.items = [*inputs, *_whole([item for item in root.items if item not in inputs], PROLOGUE)]
    return [_plain(item, picture) for item in _unwrapped(root.items, wrappers)]


def _whole(items: list[Group | int], label: str) -> list[Group | int]:
    return [Group(None, label, items)] if items else []


def _wrappers(picture: Picture) -> frozenset[str]:
    """Calls that run through most of the model, such as that of the model itself: not what a person wants to see."""
    seen: dict[str, set[str]] = {}
    for node in picture.nodes:
        for scope in node.scope:
            seen.setdefault(scope.path, set()).add(node.part)
    return frozenset(path for path, parts in seen.items() if len(parts - {PROLOGUE}) > 2)


def _unwrapped(items: list[Group | int], wrappers: frozenset[str]) -> Iterator[Group | int]:
    for item in items:
        if isinstance(item, Group) and item.scope and item.scope.path in wrappers:
            yield from _unwrapped(item.items, wrappers)
        else:
            yield item


def _plain(item: Group | int, picture: Picture) -> Group | int:
    """A group without groups of one, and with no more inside than a person can look at."""
    if isinstance(item, int):
        return item
    items = [_plain(one, picture) for one in item.items]
    if len(items) == 1 and item.label != PROLOGUE:
        return items[0]
    return Group(item.scope, item.label, _runs(items, picture, _RUNS) if len(items) > _MOST_INSIDE else items)


def _runs(items: list[Group | int], picture: Picture, most: int) -> list[Group | int]:
    """Neighbours together, in at most ``most`` runs of nearly equal length."""
    many = min(most, -(-len(items) // 2))
    cuts = [len(items) * i // many for i in range(many + 1)]
    runs: list[Group | int] = []
    for start, end in pairwise(cuts):
        inner = items[start:end]
        label = f"{_item_name(inner[0], picture)} … {_item_name(inner[-1], picture)}"
        inner = _runs(inner, picture, _RUNS) if len(inner) > _MOST_INSIDE else inner
        runs.append(Group(None, label, inner) if len(inner) > 1 else inner[0])
    return runs


def _item_name(item: Group | int, picture: Picture) -> str:
    if isinstance(item, int):
        return picture.nodes[item].operator.removeprefix("aten.")
    return _relative(item.scope.path, None) if item.scope else item.label.partition(" … ")[0]


def _first_sight(picture: Picture, most: int) -> list[Group | int]:
    """What is shown at first: as few levels of modules as give a picture of every part."""
    wrappers = _wrappers(picture)
    trees = [_part_tree(picture, part.label, wrappers) for part in picture.parts]
    kept: set[str] = set()
    while sum(map(len, trees)) < max(FEWEST_BOXES, 1.5 * len(trees)):
        # all modules of a class go together: of those with the most work inside, to see it at equal detail everywhere
        inside: dict[str, int] = {}
        for item in (item for tree in trees for item in tree):
            if isinstance(item, Group) and item.label != PROLOGUE:
                inside[_sort(item)] = inside.get(_sort(item), 0) + _operators(item)
        if not inside.keys() - kept:
            break
        chosen = max(inside.keys() - kept, key=lambda sort: (inside[sort], sort))
        deeper = [list(_opened(tree, chosen)) for tree in trees]
        if sum(map(len, deeper)) > most:
            kept.add(chosen)
        else:
            trees = deeper
    if sum(map(len, trees)) > most:
        # runs say little each, so a page of them is enough
        few = most // 3
        each = max((n for n in range(1, few) if sum(min(n, len(tree)) for tree in trees) <= few), default=1)
        trees = [_runs(tree, picture, each) if len(tree) > each else tree for tree in trees]
    return [item for tree in trees for item in tree]


def _opened(tree: list[Group | int], sort: str) -> Iterator[Group | int]:
    for item in tree:
        yield from item.items if isinstance(item, Group) and _sort(item) == sort else [item]


def _sort(group: Group) -> str:
    return group.scope.kind if group.scope else group.label


def _operators(item: Group | int) -> int:
    return 1 if isinstance(item, int) else sum(map(_operators, item.items))


def _alone(scope: Scope, within: Scope | None) -> str:
    label = _relative(scope.path, within)
    return f"{label} {scope.kind}" if label.isdigit() else label


def _relative(path: str, within: Scope | None) -> str:
    """A module's path as seen from another one; the exporter numbers repeated calls of one module."""
    path, _, call = path.partition("@")
    outer = within.path.partition("@")[0] + "." if within else ""
    return path.removeprefix(outer) + (f" (call {int(call) + 1})" if call.isdigit() else "")
