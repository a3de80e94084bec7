"""Which nodes of several regions run as one: who may join, who is like whom, who waits for whom, and what pays off."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from lbi_compile.passes.alike import (
    CHAIN,
    PART,
    REGION,
    Group,
    consumers,
    describe_value,
    groups,
    is_forward,
    producer,
    quotient,
    region_label,
    signature,
)

aten = torch.ops.aten


class Joint:
    """A joint graph of square matrices that grows node by node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = torch.empty(4, 4, device="meta")

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        region: int | None = None,
        chain: int = 0,
        part: str = "",
        tag: str | None = "is_forward",
        value: Any = None,
    ) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, 4, device="meta") if value is None else value
        if tag is not None:
            node.meta["partitioner_tag"] = tag
        if region is not None:
            node.meta["custom"] = {CHAIN: chain, REGION: region, **({PART: part} if part else {})}
        return node

    def mm(self, a: fx.Node, region: int | None, **options: Any) -> fx.Node:
        return self.call(aten.mm.default, a, self.x, region=region, **options)

    def groups(self, *results: fx.Node) -> list[dict[int, fx.Node]]:
        self.graph.output(results)
        return [group.members for group in groups(self.graph)]


# --- who a node belongs to ----------------------------------------------------------------------------------------


def test_labels() -> None:
    joint = Joint()
    assert region_label(joint.x) is None
    assert region_label(joint.mm(joint.x, None)) is None
    assert region_label(joint.mm(joint.x, 3, chain=2)) == (2, "", 3)
    assert region_label(joint.mm(joint.x, 0, part="bias")) == (0, "bias", 0)


@pytest.mark.parametrize(
    ("tag", "forward"),
    [("is_forward", True), ("must_be_in_forward", True), ("is_backward", False), ("must_be_in_backward", False)],
)
def test_directions(tag: str, forward: bool) -> None:
    joint = Joint()
    node = joint.mm(joint.x, 0, tag=tag)
    assert is_forward(node) == forward
    other = joint.mm(joint.x, 1, tag=tag)
    joint.graph.output((node, other))
    (group,) = groups(joint.graph)
    assert group.forward == forward
    assert (group.regions, group.first) == ((0, 1), node)


def test_chains_parts_and_directions_are_kept_apart() -> None:
    joint = Joint()
    options: list[dict[str, Any]] = [{}, {"chain": 1}, {"part": "bias"}, {"tag": "is_backward"}]
    nodes = [(joint.mm(joint.x, 0, **some), joint.mm(joint.x, 1, **some)) for some in options]
    assert joint.groups(*(node for pair in nodes for node in pair)) == [{0: a, 1: b} for a, b in nodes]


def test_a_region_alone_has_no_group() -> None:
    joint = Joint()
    a, b = joint.mm(joint.x, 0), joint.mm(joint.x, 0)
    assert joint.groups(a, b) == []


def test_what_is_added_up_within_a_region_belongs_to_it() -> None:
    """Sums carry no label of their own: of one region's values they are its own, of two regions' nobody's."""
    joint = Joint()
    a, b = joint.mm(joint.x, 0), joint.mm(joint.x, 1)
    own = [joint.call(aten.add.Tensor, one, joint.x) for one in (a, b)]  # the input belongs to nobody
    total = joint.call(aten.add.Tensor, *own)
    late = [joint.call(aten.add.Tensor, total, one) for one in (a, b)]
    outside = [joint.call(aten.add.Tensor, joint.x, joint.x) for _ in range(2)]
    products = [joint.call(aten.mul.Tensor, one, joint.x) for one in (a, b)]
    assert joint.groups(*late, *outside, *products) == [{0: a, 1: b}, dict(enumerate(own))]


# --- who may join -------------------------------------------------------------------------------------------------


def _square(*args: Any) -> Any:
    raise AssertionError("never run")


REFUSED = {
    "strides": (aten.as_strided.default, lambda x: (x, [4, 4], [4, 1])),
    "python": (_square, lambda x: (x,)),
    "own operators": (torch.ops.lbi.suffix_scan.default, lambda x: (x, x)),
    "random": (aten.bernoulli.default, lambda x: (x,)),
    "writing": (aten.relu_.default, lambda x: (x,)),
    "of no tensor": (aten.zeros.default, lambda _: ([4, 4],)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operators_that_stay_alone(name: str) -> None:
    joint = Joint()
    target, args = REFUSED[name]
    a, b = (joint.mm(joint.x, k) for k in range(2))
    odd = [joint.call(target, *args(one), region=k) for k, one in enumerate((a, b))]
    assert joint.groups(*odd) == [{0: a, 1: b}]


@pytest.mark.parametrize(
    ("value", "joins"),
    [
        (torch.empty(4), True),
        ((torch.empty(4), torch.empty(3)), True),
        ((torch.empty(4), None), True),
        ((torch.empty(4), 3), False),
        (3, False),
        ((), False),
    ],
)
def test_values_that_can_be_batched(value: Any, joins: bool) -> None:
    joint = Joint()
    nodes = [joint.call(aten.mm.default, joint.x, joint.x, region=k, value=value) for k in range(2)]
    assert joint.groups(*nodes) == ([dict(enumerate(nodes))] if joins else [])


def test_a_node_without_a_value_stays_alone() -> None:
    joint = Joint()
    nodes = [joint.mm(joint.x, k) for k in range(3)]
    del nodes[1].meta["val"]
    assert joint.groups(*nodes) == [{0: nodes[0], 2: nodes[2]}]


def test_an_input_with_a_label_is_no_operator() -> None:
    joint = Joint()
    inputs = []
    for k in range(2):
        inputs.append(joint.graph.placeholder(f"y{k}"))
        inputs[k].meta.update(val=torch.empty(4, 4, device="meta"), custom={CHAIN: 0, REGION: k})
    nodes = [joint.mm(one, k) for k, one in enumerate(inputs)]
    assert joint.groups(*nodes) == [dict(enumerate(nodes))]


# --- who is like whom ---------------------------------------------------------------------------------------------


def test_signatures() -> None:
    joint = Joint()
    wide = joint.call(aten.mm.default, joint.x, joint.x, value=torch.empty(4, 5))
    double = joint.call(aten.mm.default, joint.x, joint.x, value=torch.empty(4, 5, dtype=torch.double))
    base = signature(joint.call(aten.sum.dim_IntList, joint.x, [0]))
    assert base == signature(joint.call(aten.sum.dim_IntList, joint.mm(joint.x, 1), [0]))
    for other in (
        joint.call(aten.mean.dim, joint.x, [0]),
        joint.call(aten.sum.dim_IntList, joint.x, [1]),
        joint.call(aten.sum.dim_IntList, joint.x, [False]),
        joint.call(aten.sum.dim_IntList, wide, [0]),
        joint.call(aten.sum.dim_IntList, joint.x, [0], value=torch.empty(4, 5)),
    ):
        assert signature(other) != base
    assert signature(joint.call(aten.relu.default, wide)) != signature(joint.call(aten.relu.default, double))
    keyword = joint.graph.call_function(aten.sum.dim_IntList, (joint.x, [0]), {"keepdim": True})
    keyword.meta["val"] = torch.empty(4, 4, device="meta")
    assert signature(keyword) != base


def test_values_in_words() -> None:
    assert describe_value(torch.empty(2, 3)) == "['2', '3'] torch.float32 cpu"
    assert describe_value((torch.empty(2), [None, 3])) == "(['2'] torch.float32 cpu, (None, 3))"


def test_producers_and_consumers_look_through_picked_outputs() -> None:
    joint = Joint()
    pair = joint.call(aten.aminmax.default, joint.x, value=(torch.empty(4), torch.empty(4)))
    first = joint.call(operator.getitem, pair, 0)
    readers = [joint.mm(first, 0), joint.mm(first, 1), joint.call(aten.relu.default, pair)]
    assert producer(first) is pair
    assert producer(readers[0]) is readers[0]
    assert list(consumers(pair)) == readers


def chain(joint: Joint, region: int, names: str) -> list[fx.Node]:
    """A chain of a region: m is a product, t, s, c are pointwise."""
    targets = {"t": aten.tanh.default, "s": aten.sin.default, "c": aten.cos.default}
    node, found = joint.x, []
    for name in names:
        node = joint.mm(node, region) if name == "m" else joint.call(targets[name], node, region=region)
        found.append(node)
    return found


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        (("mt", "mt", "mt"), ["012", "012"]),
        (("mtm", "m", "m"), ["012"]),  # most regions have a single product, though one has more
        (("mtms", "mtm", "mtm"), ["012", "012", "012"]),
        (("mt", "mtsm", "mts"), ["012", "012", "12"]),  # no two are alike: in line with the longest
        (("mt", "mts", "mt", "mts"), ["0123", "0123", "13"]),  # of lists that as many have, the longest
        (("mmt", "mmt", "mst"), ["012", "01", "012"]),
    ],
)
def test_regions_are_brought_in_line(regions: tuple[str, ...], expected: list[str]) -> None:
    joint = Joint()
    chains = [chain(joint, k, names) for k, names in enumerate(regions)]
    found = joint.groups(*(one[-1] for one in chains))
    assert ["".join(map(str, members)) for members in found] == expected
    for members in found:
        assert len({node.target for node in members.values()}) == 1
        assert all(node in chains[k] for k, node in members.items())


# --- who waits for whom -------------------------------------------------------------------------------------------


def test_members_that_wait_for_others_are_split_off() -> None:
    """Two run before a sum of theirs, two after it: two groups, which wait for each other in one direction."""
    joint = Joint()
    early = [joint.mm(joint.x, k) for k in range(2)]
    both = joint.call(aten.maximum.default, *early)
    late = [joint.mm(both, k) for k in (2, 3)]
    assert joint.groups(*late) == [{0: early[0], 1: early[1]}, {2: late[0], 3: late[1]}]


def test_a_member_that_waits_alone_is_dropped() -> None:
    joint = Joint()
    early = [joint.mm(joint.x, k) for k in range(2)]
    late = joint.mm(early[0], 2)
    assert joint.groups(early[1], late) == [dict(enumerate(early))]


def test_members_are_split_by_what_they_wait_for_in_their_own_group() -> None:
    """Products 2 and 3 both wait for product 0; that one of them also waits for another group parts them not."""
    joint = Joint()
    others = [joint.call(aten.addmm.default, joint.x, joint.x, joint.x, region=k) for k in range(2)]
    waiting = joint.call(aten.addmm.default, others[0], joint.x, joint.x, region=2)
    early = [joint.mm(joint.x, k) for k in range(2)]
    late = [joint.mm(joint.call(aten.maximum.default, early[0], others[0]), 2), joint.mm(early[0], 3)]
    found = joint.groups(waiting, early[1], *late)
    assert found == [dict(enumerate(others)), dict(enumerate(early)), {2: late[0], 3: late[1]}]


def test_a_picked_output_does_not_hide_that_members_wait() -> None:
    joint = Joint()
    pair = (torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta"))
    first = joint.call(aten.aminmax.default, joint.x, region=0, value=pair)
    second = joint.call(aten.aminmax.default, joint.call(operator.getitem, first, 0), region=1, value=pair)
    third = joint.call(aten.aminmax.default, joint.call(operator.getitem, second, 0), region=2, value=pair)
    assert joint.groups(third) == []


def test_one_of_two_crossed_groups_is_split_and_the_other_kept() -> None:
    """Sines wait for the product of region 0, whose group waits for a sine: parting the products unties that."""
    joint = Joint()
    first = joint.mm(joint.x, 0)
    sines = [joint.call(aten.sin.default, first, region=k) for k in range(3)]
    rest = [joint.mm(sines[0], k) for k in (1, 2)]
    cosines = [
        joint.call(aten.mul.Tensor, *pair, region=k) for k, pair in enumerate(zip(sines, (first, *rest), strict=True))
    ]
    found = joint.groups(*cosines)
    assert {1: rest[0], 2: rest[1]} in found
    assert not any(first in members.values() for members in found)


def test_random_numbers_are_drawn_in_the_order_of_the_program() -> None:
    """Products before and after a draw: as one they run at one time, so the draws between them keep their order."""
    joint = Joint()
    draws = [joint.call(aten.bernoulli.default, joint.x) for _ in range(3)]
    joint.graph.output(tuple(draws))
    order = list(quotient(joint.graph, []))
    assert [node for node in order if node in draws] == draws


def test_groups_that_random_draws_put_in_a_circle_are_given_up() -> None:
    joint = Joint()
    a = joint.mm(joint.x, 0)
    first = joint.call(aten.bernoulli.default, a)  # waits for one product
    second = joint.call(aten.bernoulli.default, joint.x)
    b = joint.mm(second, 1)  # and the other product waits for a draw after that one
    assert joint.groups(first, b) == []


def test_the_quotient_has_a_group_in_place_of_its_members() -> None:
    joint = Joint()
    a, b = joint.mm(joint.x, 0), joint.mm(joint.x, 1)
    total = joint.call(aten.maximum.default, a, b)
    output = joint.graph.output(total)
    group = Group({0: a, 1: b}, forward=True)
    assert list(quotient(joint.graph, [group])) == [joint.x, group, total, output]


# --- what pays off ------------------------------------------------------------------------------------------------

UNHEAVY = aten.tanh.default


@pytest.mark.parametrize(
    ("target", "tag", "pays"),
    [
        (aten.mm.default, "is_forward", True),
        (aten.mm.default, "is_backward", True),
        (UNHEAVY, "is_forward", False),
        (UNHEAVY, "is_backward", True),
        (aten.t.default, "is_forward", False),
        (aten.t.default, "is_backward", False),
    ],
)
def test_copies_pay_off_for_products_and_in_a_backward(target: Any, tag: str, pays: bool) -> None:
    joint = Joint()
    args = (joint.x, joint.x) if target is aten.mm.default else (joint.x,)
    nodes = [joint.call(target, *args, region=k, tag=tag) for k in range(2)]
    assert joint.groups(*nodes) == ([dict(enumerate(nodes))] if pays else [])


def test_what_stands_beside_a_batched_operator_is_batched() -> None:
    joint = Joint()
    before = [joint.call(UNHEAVY, joint.x, region=k) for k in range(2)]
    middle = [joint.mm(one, k) for k, one in enumerate(before)]
    after = [joint.call(aten.sin.default, one, region=k) for k, one in enumerate(middle)]
    lists = (before, middle, after)
    assert joint.groups(*after) == [dict(enumerate(one)) for one in lists]


def test_a_value_that_others_read_too_is_not_copied_for_one_reader() -> None:
    joint = Joint()
    before = [joint.call(UNHEAVY, joint.x, region=k) for k in range(2)]
    middle = [joint.mm(one, k) for k, one in enumerate(before)]
    assert joint.groups(*middle, before[1]) == [dict(enumerate(middle))]


def test_what_pays_off_only_beside_a_group_that_does_not_is_dropped_too() -> None:
    joint = Joint()
    first = [joint.call(UNHEAVY, joint.x, region=k) for k in range(2)]
    second = [joint.call(aten.sin.default, one, region=k) for k, one in enumerate(first)]
    assert joint.groups(*second, *first) == []
    picked = Joint()
    first = [picked.call(UNHEAVY, picked.x, region=k) for k in range(2)]
    second = [picked.call(aten.sin.default, one, region=k) for k, one in enumerate(first)]
    assert picked.groups(*second) == [dict(enumerate(one)) for one in (first, second)]
