"""Closed forms of schedules, held against simulations of what waits for what."""

from __future__ import annotations

import dataclasses
import math

import pytest
import sympy

from lbi_compile import OptionError
from lbi_compile.cost import FORMS, GRAPHS, MEANING, Workload, transformer
from lbi_compile.simulate import Link, simulate

FREE, NVLINK, HOME = Link(1e18, 0.0), Link(3e11, 2e-6), Link(1.25e7, 1e-2)
EXACT = 1e-9


def work(n: int, *, K: int | None = None, M: int = 1, **others: float) -> Workload:
    """A transformer whose interface, stem and steps over latents take time too."""
    rest = {"o": 1e-4, "o_i": 3e-5, "o_c": 1e-5, "w_s": 1e6, "o_s": 1e-4, "J": 2.0, "s": 1e11, **others}
    return transformer(D=64, L=32, T=64, B=16, vocabulary=256, n=n, K=K or n, r=8, M=M, **rest)


def off(name: str, numbers: Workload, link: Link) -> float:
    """How far the form is from the simulation, in seconds over seconds; its other figures have to agree."""
    form, run = FORMS[name](numbers, link), simulate(GRAPHS[name](numbers, link))
    assert form.sent == pytest.approx(sum(run.sent), rel=1e-9)
    assert form.busy * len(run.busy) == pytest.approx(sum(run.busy), rel=1e-9)
    assert form.waiting == pytest.approx(1 - form.busy / form.seconds)
    return form.seconds / run.seconds - 1


def test_every_form_is_written_in_the_letters():
    assert list(FORMS) == list(GRAPHS)
    for form in FORMS.values():
        for part in (form.seconds, form.busy, form.flops, form.sent, form.memory):
            assert part.free_symbols <= set(MEANING), form.name
    letters = {letter.name: letter for letter in MEANING}
    # eight micro-batches through four stages of one second each way, nothing else: 11 turns of 3 seconds
    bare = {"n": 4, "L": 4, "M": 8, "B": 8, "w": 1, "s": 1, "g": 2, "u": 1, "beta": sympy.oo}
    numbers = {letters[name]: bare.get(name, 1 if letters[name].is_integer else 0) for name in letters}
    assert FORMS["gpipe"].seconds.subs(numbers) == 33


@pytest.mark.parametrize("link", [FREE, NVLINK, HOME], ids=["free", "nvlink", "home"])
@pytest.mark.parametrize(("n", "K", "M"), [(1, 1, 1), (1, 4, 1), (2, 4, 1), (4, 4, 4), (4, 8, 2), (3, 6, 1), (8, 8, 1)])
def test_forms_are_exact_where_nothing_is_neglected(n, K, M, link):
    for name in ("one", "data", "chain", "scan", "token", "sid"):
        assert abs(off(name, work(n, K=K, M=M), link)) < EXACT, name
    # only the last device has a head here: messages among the others are over by the time it joins the gather
    assert -EXACT < off("hbll", work(n, K=K, M=M), link) < 0.01


@pytest.mark.parametrize(("n", "M"), [(1, 1), (2, 1), (2, 8), (4, 2), (4, 4), (8, 16)])
def test_pipelines(n, M):
    for name in ("gpipe", "1f1b"):
        for link in (FREE, NVLINK):
            assert abs(off(name, work(n, M=M, w_s=0.0, o_s=0.0, w_h=0.0), link)) < EXACT, name
            # of a stem and a head at both ends, 1F1B hides a part of one, which the form leaves in
            assert -EXACT < off(name, work(n, M=M), link) < (EXACT if name == "gpipe" else 0.06), name
    assert abs(off("gpipe", work(n, M=M, w_s=0.0, o_s=0.0), HOME)) < EXACT
    # where messages are slower than stages they queue up, which the form of 1F1B bounds from below only
    assert -0.2 < off("1f1b", work(n, M=M, w_s=0.0, o_s=0.0), HOME) < 0.02


@pytest.mark.parametrize("name", ["token", "scan", "chain", "sid", "hbll", "gpipe", "1f1b", "data"])
def test_messages_that_cross_take_turns(name):
    """Two devices whose transport sends one way at a time; a third has a link of its own to each."""
    once, turns = Link(1.25e5, 1e-3), Link(1.25e5, 1e-3, crossing=2.0)
    for n, M in ((2, 4), (3, 1)):
        numbers = work(n, K=2 * n, M=M, w_s=0.0, o_s=0.0, w_h=0.0)
        # a queue of messages is bounded from below, as above
        assert -0.1 < off(name, numbers, turns) < 0.01
        assert name == "1f1b" or off(name, numbers, turns) > -EXACT
        slower = FORMS[name](numbers, turns).seconds - FORMS[name](numbers, once).seconds
        each = numbers.B * numbers.T * numbers.r * 4 / 1.25e5  # seconds of what one region says
        pooled = numbers.B * (numbers.r**2 + numbers.r) * 4 / 1.25e5
        message = numbers.B * numbers.T * numbers.D * 4 / M / 1.25e5
        # of four parts of a gather, each device sends two; of four micro-batches' messages each way, three cross
        more = {"token": 2 * 2 * each, "scan": pooled, "hbll": 3 * 2 * each, "1f1b": 3 * message}
        assert slower == pytest.approx(more.get(name, 0.0) if n == 2 else 0.0, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zero_bubble(n):
    bare = {"o": 0.0, "w_s": 0.0, "o_s": 0.0, "w_h": 0.0}
    for M in (1, 2, n):
        assert abs(off("zero-bubble", work(n, M=M, **bare), FREE)) < EXACT
    # with more micro-batches the published bubble is a bound, and the simulated order leaves up to two W more of it
    assert -0.08 < off("zero-bubble", work(n, M=16, **bare), FREE) <= EXACT
    assert FORMS["zero-bubble"](work(n, M=16), FREE).seconds < FORMS["1f1b"](work(n, M=16), FREE).seconds


@pytest.mark.parametrize("link", [NVLINK, HOME], ids=["nvlink", "home"])
def test_last_readout_is_bounded_from_above(link):
    """Forms take the broadcast of the readout as waited for by all; the device that has it goes ahead."""
    for n, K in ((2, 4), (4, 4), (8, 16)):
        assert -EXACT < off("scan", work(n, K=K, rho=0.0), link) < 0.2
        assert -EXACT < off("chain", work(n, K=K, rho=0.0), link) < 0.6


@pytest.mark.parametrize("link", [FREE, NVLINK, HOME], ids=["free", "nvlink", "home"])
@pytest.mark.parametrize(("n", "K", "M"), [(1, 4, 1), (2, 4, 1), (4, 4, 4), (4, 8, 2), (3, 6, 1), (8, 8, 1)])
def test_head_on_the_last_device(n, K, M, link):
    """Of the loss, nearly nothing is waited for but a message."""
    numbers = work(n, K=K, M=M, rho=0.0, eta=1.0)
    for name in ("chain", "scan"):
        # the device that has the loss does not wait until the others have it, which forms take as waited for
        message = math.ceil(math.log2(n)) * (link.latency + 4 / link.bandwidth) / FORMS[name](numbers, link).seconds
        assert -EXACT < off(name, numbers, link) < message * 1.5 + EXACT, name
        everywhere = dataclasses.replace(numbers, eta=0.0)
        assert FORMS[name](numbers, link).sent <= FORMS[name](everywhere, link).sent
        assert FORMS[name](numbers, HOME).seconds <= FORMS[name](everywhere, HOME).seconds
    with pytest.raises(OptionError, match="reads all regions"):
        work(n, K=K, eta=1.0)


def test_uneven_regions_and_stages_are_bounded_from_above():
    numbers = work(4, K=4, M=4)
    shares = (0.4, 0.2, 0.2, 0.2)
    numbers = dataclasses.replace(numbers, u=max(shares) * 4)
    for name in ("gpipe", "1f1b", "token", "scan", "chain", "sid", "hbll"):
        even = simulate(GRAPHS[name](numbers, NVLINK)).seconds
        uneven = simulate(GRAPHS[name](numbers, NVLINK, shares)).seconds
        assert even < uneven <= FORMS[name](numbers, NVLINK).seconds * (1 + EXACT), name
    with pytest.raises(OptionError, match="sum to 1"):
        GRAPHS["token"](numbers, NVLINK, (0.5, 0.5))


def test_a_thousand_devices():
    numbers = dataclasses.replace(work(1), n=1024, K=1024, L=1024, M=8, B=1024)
    for name in ("1f1b", "token", "scan"):
        assert abs(off(name, numbers, Link(5e10, 1e-6))) < 0.02, name


def test_known_sizes():
    # GPT-2 small: 7.2e9 FLOPs of its layers a token, forward, twelve layers, 124M parameters
    gpt2 = transformer(D=768, L=12, T=1024, B=1, vocabulary=50257, n=1)
    assert gpt2.parameters == pytest.approx(124.4e6, rel=0.01)
    assert gpt2.L * gpt2.w / 1024 == pytest.approx(2 * 85e6 + 12 * 4 * 1024 * 768, rel=0.01)
    # pooled, r=16, K=8, B=8, float32: seven Jacobians of every sample
    numbers = Workload(K=8, r=16, B=8, T=1, D=64, L=8, n=8, s=1e9, w=1e6, p=0.0, rho=1.0)
    back = FORMS["scan"](numbers, NVLINK).sent - FORMS["chain"](numbers, NVLINK).sent + 7 * 8 * 16 * 4
    padding, b = 8 * 16 * 16 * 4, 8 * 8 * 16 * 4  # the last device has no Jacobian
    assert back / 7 == 57_344 + padding + b
    assert FORMS["data"](dataclasses.replace(numbers, p=100.0), NVLINK).sent == 2 * 7 * 800 * 4


def test_jacobians_pay_with_many_devices_only():
    """With one micro-batch the scan beats the chain with more than 1 + x (r + 1) - 1 / g devices: five here."""

    def gain(n: int) -> float:
        # products take all the time, so that r cotangents cost r times one
        numbers = work(n, K=n, o=0.0, o_i=0.0, o_c=0.0, w_h=0.0, w_s=0.0, o_s=0.0, s=1e9)
        return FORMS["chain"](numbers, FREE).seconds / FORMS["scan"](numbers, FREE).seconds

    assert gain(4) < 1
    assert gain(5) == pytest.approx(1, abs=0.02)
    assert gain(8) > 1
    assert gain(16) > gain(8)


def test_what_cannot_be_is_refused_and_why():
    assert "some would have none" in (FORMS["data"].refuses(work(32)) or "")
    assert "64 stages of 32 layers" in (FORMS["gpipe"].refuses(work(64, K=32)) or "")
    assert "some would have none" in (FORMS["token"].refuses(work(8, K=4)) or "")
    assert "no positions" in (FORMS["token"].refuses(dataclasses.replace(work(2), T=1)) or "")
    assert "32 micro-batches of 16 samples" in (FORMS["scan"].refuses(work(2, M=32)) or "")
    assert FORMS["one"].refuses(work(64, K=32)) is None
    for wrong in ({"K": 0}, {"w": -1.0}, {"o": math.nan}, {"B": 2.5}, {"s": 0.0}):
        with pytest.raises(OptionError, match=f"found: {next(iter(wrong))}="):
            Workload(**{**dataclasses.asdict(work(1)), **wrong})
