"""``bench parallel``: ranks that agree with one process, bytes that agree with the forms, and links that are slow."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from lbi_compile import OptionError, cli
from lbi_compile.bench import parallel, parallel_view, slowlink
from lbi_compile.bench.parallel import Sizes
from lbi_compile.cost import Estimate, transformer
from lbi_compile.render.text import plain

SMALL = Sizes("lm", layers=4, width=32, length=16, classes=256, regions=4, r=4)


@pytest.mark.slow
def test_gradients_agree_and_bytes_are_those_of_the_forms():
    names = ["token", "sid", "ddp", "gpipe", "1f1b"]
    (meeting,) = parallel.run(SMALL, ranks=2, batches=[2], names=names, micro_batches=[1, 2], rounds=1)
    assert meeting.ok
    lines = {line.name: line for line in meeting.lines}
    assert set(lines) >= {"LBI token", "SID", "DDP", "GPipe, 1 micro", "GPipe, 2 micro", "1F1B, 2 micro"}
    for line in meeting.lines:
        assert line.seconds is not None
        assert line.sent == pytest.approx(line.form_sent), line.name
        if line.baseline:
            assert line.predicted is not None
            assert line.ratio is not None
    # a gather of z and one of b, both of B T r numbers for each region; two reductions of B T D
    assert lines["LBI token"].sent == 2 * (4 * 2 * 16 * 4 * 4) + 2 * (2 * 2 * 16 * 32 * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "readout", "head"),
    [("classifier", "sum", "all"), ("classifier", "last", "all"), ("lean", "last", "last")],
)
def test_classifier_with_pooled_latents_on_four_ranks(kind, readout, head):
    sizes = Sizes(kind, layers=4, width=32, length=16, classes=10, regions=4, r=4, readout=readout)
    for ranks in (2, 4):
        (meeting,) = parallel.run(sizes, ranks=ranks, batches=[4], names=["pooled", "sid"], rounds=1, head=head)
        assert meeting.ok
        for line in meeting.lines:
            if readout == "sum" or ranks == 2:  # rings count a broadcast once, trees once for every receiver
                assert line.sent == pytest.approx(line.form_sent), line.name


@pytest.mark.slow
@pytest.mark.skipif(slowlink.why_not() is not None, reason=str(slowlink.why_not()))
def test_a_limited_link_is_slow_and_goes_away():
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    sizes = Sizes("classifier", layers=4, width=64, length=128, classes=10, regions=4, r=4)
    given: dict = {"ranks": 2, "batches": [4], "names": ["sid", "gpipe"], "rounds": 3}
    with slowlink.limited(2, 100) as places:
        slow, free = parallel.run(sizes, **given, places=places, speeds=[100, None])
    assert slow.ok
    assert free.ok
    assert (slow.mbit, free.mbit) == (100, None)
    assert free.link.bandwidth > 4 * slow.link.bandwidth
    # 12.5 MB/s less what TCP and Ethernet wrap around it
    assert 8e6 < slow.link.bandwidth < 14e6
    sent = {line.name: (line.sent, line.seconds.median) for line in slow.lines if line.seconds is not None}
    size, seconds = sent["GPipe, 1 micro"]
    assert seconds > size / 12.5e6
    assert sent["SID"][0] < size / 10  # beliefs of ten classes, and the gradients of a small stem
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == before


_ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 5555)) as server, server.accept()[0] as client:
    while client.recv(1):
        client.sendall(b".")
"""
_ASK = """
import socket, sys, time
for _ in range(200):
    try:
        there = socket.create_connection((sys.argv[1], 5555))
        break
    except OSError:
        time.sleep(0.1)
there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
start = time.perf_counter()
for _ in range(5):
    there.sendall(b".")
    there.recv(1)
print(time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(slowlink.why_not() is not None, reason=str(slowlink.why_not()))
@pytest.mark.parametrize("mbit", [None, 100.0])
def test_messages_are_held_back(mbit):
    with slowlink.limited(2, mbit, 0.03) as (here, there):
        echo = subprocess.Popen([*here.prefix, sys.executable, "-c", _ECHO, here.address])
        try:
            asked = [*there.prefix, sys.executable, "-c", _ASK, here.address]
            took = float(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout)
        finally:
            echo.kill()
            echo.wait()
    assert took >= 5 * 2 * 0.03
    with slowlink.limited(2, mbit) as (here, there):
        assert here.address != there.address


def test_no_speed_where_a_gradient_is_wrong():
    work = transformer(D=32, L=4, T=16, B=2, vocabulary=256, n=2, K=4, r=4)
    numbers = dataclasses.asdict(work)
    contestants = [
        {"name": "dense, one process", "form": "one", "baseline": "", "error": 0.0, "sent": 0.0},
        {"name": "GPipe, 1 micro", "form": "gpipe", "baseline": "dense, one process", "error": 0.5, "sent": 1.0},
    ]
    for one in contestants:
        one |= {"micro_batches": 1, "head_on_last": False, "seconds": [1.0, 2.0]}
    cell: dict = {
        "samples": 2,
        "mbit": None,
        "link": {"bandwidth": 1e9, "latency": 1e-4},
        "crowding": 1.5,
        "contestants": contestants,
        "workloads": {"token": numbers},
    }
    meeting = parallel.meeting(cell, 2)
    assert not meeting.ok
    assert all(line.seconds is None and line.ratio is None for line in meeting.lines)
    contestants[1]["error"] = 1e-7
    contestants[1]["seconds"] = [0.5, 4.0]
    meeting = parallel.meeting(cell, 2)
    line = meeting.lines[1]
    assert line.ratio is not None
    assert line.ratio.all == (2.0, 0.5)
    settings = {**SMALL._asdict(), "ranks": 2, "rounds": 2}
    for one in contestants:
        one["seconds"] = [3 * second for second in one["seconds"]]
    slow = dataclasses.replace(parallel.meeting(cell, 2), mbit=100.0, delay=0.02)
    record = parallel_view.Record(
        "lbi-compile bench parallel lm", "now", {"processor": "X", "cores": 2}, {}, settings, (meeting, slow)
    )
    page = plain(parallel_view.RecordView(record), 80)
    assert max(map(len, page.splitlines())) <= 80
    assert "2 samples, links limited to 100 Mb/s, 20.0 ms later" in page
    assert "what a step loses by links limited to 100 Mb/s" in page
    assert "+200%  +200% to +200%" in page
    assert "0.50-2.00" in page
    assert "!=" in page


def test_crowding_counts_where_ranks_compute_at_the_same_time():
    def crowded(busy: float) -> float:
        return parallel.crowded(Estimate(seconds=2.0, busy=busy, flops=0.0, sent=0.0, memory=0.0), 2, 1.5)

    assert crowded(2.0) == 3.0
    assert crowded(1.0) == 2.0  # in turns
    assert 2.0 < crowded(1.5) < 3.0


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(OptionError, match="nonsense"):
        parallel.run(SMALL, ranks=2, batches=[1], names=["nonsense"])
    with pytest.raises(OptionError, match="say --readout last"):
        parallel.run(SMALL, ranks=2, batches=[1], names=["token"], head="last")
    with pytest.raises(OptionError, match="5 ranks"):
        parallel.run(SMALL, ranks=5, batches=[1], names=["token"])
    assert cli.main(["bench", "parallel", "lm", "--layers", "6", "--regions", "4"]) == 2
    assert "6 layers and 4 regions" in capsys.readouterr().err
    assert cli.main(["bench", "parallel", "lm", "--json", str(tmp_path / "no" / "out.json")]) == 2


@pytest.mark.slow
def test_a_rank_that_fails_is_named():
    with pytest.raises(OptionError, match=r"rank \d ended with 1: .*FutureLeakError"):
        parallel.run(SMALL, ranks=2, batches=[1], names=["pooled"])


def test_record_is_json(tmp_path):
    meeting = parallel.Meeting(2, parallel.Link(1e9, 1e-4), 1.0, ())
    record = parallel_view.Record("lbi-compile", "now", {"cores": 2}, {"torch": "2"}, {}, (meeting,))
    record.write(tmp_path / "out.json")
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["ok"] is True
    assert read["meetings"][0]["samples"] == 2
