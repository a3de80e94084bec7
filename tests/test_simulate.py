"""The discrete-event simulation, on graphs small enough to work out by hand."""

from __future__ import annotations

import math

import pytest

from lbi_compile import OptionError
from lbi_compile.simulate import Graph, Link, simulate

FREE = Link(math.inf, 0.0)


def test_a_device_takes_one_task_at_a_time_and_waiting_is_counted():
    graph = Graph(2, FREE)
    first = graph.compute(0, 2.0)
    graph.compute(0, 3.0, after=[first])
    graph.compute(1, 1.0, after=[first])
    run = simulate(graph)
    assert run.seconds == 5.0
    assert run.busy == (5.0, 1.0)
    assert run.ends == (2.0, 5.0, 3.0)
    assert run.waiting == pytest.approx(0.4)


def test_of_what_is_ready_the_lowest_priority_number_runs_first():
    graph = Graph(1, FREE)
    late = graph.compute(0, 1.0, priority=2)
    early = graph.compute(0, 1.0, priority=1)
    assert simulate(graph).ends[early] == 1.0
    assert simulate(graph).ends[late] == 2.0


def test_what_arrives_when_a_device_gets_free_is_there_to_choose():
    graph = Graph(2, FREE)
    graph.compute(0, 1.0)
    waited = graph.compute(0, 1.0, priority=1)
    urgent = graph.compute(0, 1.0, after=[graph.compute(1, 1.0)])
    ends = simulate(graph).ends
    assert (ends[urgent], ends[waited]) == (2.0, 3.0)


def test_messages_share_a_direction_of_a_link_but_not_their_latency():
    graph = Graph(2, Link(bandwidth=10.0, latency=5.0))
    there = [graph.send(0, 1, 20.0) for _ in range(2)]
    back = graph.send(1, 0, 20.0)
    run = simulate(graph)
    assert [run.ends[task] for task in (*there, back)] == [7.0, 9.0, 7.0]
    assert run.sent == (40.0, 20.0)


def test_nothing_is_sent_to_oneself():
    graph = Graph(1, Link(1.0, 9.0))
    graph.send(0, 0, 100.0)
    assert simulate(graph).seconds == 0.0
    assert simulate(graph).sent == (0.0,)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 13, 16])
def test_collectives_take_what_they_should(n):
    rounds, link = math.ceil(math.log2(n)), Link(1e6, 0.1)

    def seconds(collective: str, *more: int) -> tuple[float, float]:
        graph = Graph(n, link)
        getattr(graph, collective)(2e6, [graph.compute(p, 1.0) for p in range(n)], *more)
        run = simulate(graph)
        return run.seconds - 1.0, sum(run.sent)

    gathered = rounds * 0.1 + (n - 1) / n * 2.0
    assert seconds("all_gather") == pytest.approx((gathered, (n - 1) * 2e6))
    assert seconds("reduce_scatter") == pytest.approx((gathered, (n - 1) * 2e6))
    assert seconds("all_reduce") == pytest.approx((2 * gathered, 2 * (n - 1) * 2e6))
    took, sent = seconds("broadcast", n - 1)
    assert sent == pytest.approx((n - 1) * 2e6)
    # a root that is a power of two away from nobody sends less often than there are rounds
    assert took == pytest.approx(rounds * 2.1) if n & (n - 1) == 0 else took <= rounds * 2.1 + 1e-9


def test_a_collective_waits_for_the_last_device():
    graph = Graph(4, Link(1e6, 0.0))
    done = graph.all_gather(4e6, [graph.compute(p, float(p)) for p in range(4)])
    ends = simulate(graph).ends
    assert all(ends[task] >= 3.0 for task in done)


def test_wrong_graphs_are_refused():
    with pytest.raises(OptionError, match="at least one device"):
        Graph(0, FREE)
    with pytest.raises(OptionError, match="bandwidth"):
        Graph(1, Link(0.0, 0.0))
    with pytest.raises(OptionError, match="added before it"):
        Graph(1, FREE).compute(0, 1.0, after=[0])
