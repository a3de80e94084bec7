"""HBLL: the tree, the product of Gaussians, no label in the forward, regions that learn alone, paths of fewer hops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbi_compile import HBLL, InterfaceError, OptionError, transform
from lbi_compile.capture import Inputs
from lbi_compile.credit.base import Pass
from lbi_compile.credit.check import Depth, crossings, local_checks, nodes_behind, region_calls, steps
from lbi_compile.credit.hbll import Hbll
from lbi_compile.credit.hops import label_codes
from lbi_compile.credit.tree import check_tiling, fuse, levels, spans, tiling
from lbi_compile.interfaces import Draw
from tests.credit_models import (
    CLASSES,
    bound,
    gpt2,
    gradients,
    largest_difference,
    parameters_behind,
    recurrent,
)

# -- the tree


@pytest.mark.parametrize("regions", [1, 2, 3, 4, 5, 7, 8, 12, 31, 64])
def test_tree(regions):
    made = levels(regions)
    assert len(made) == math.ceil(math.log2(regions)) + 1
    assert len(set(spans(regions))) == len(spans(regions)) == 2 * regions - 1
    assert {(k, k + 1) for k in range(regions)} <= set(spans(regions))
    for hops in range(1, regions + 1):
        tiles = tiling(regions, hops)
        assert len(tiles) == hops
        assert check_tiling(regions, tiles) == tiles
    for level in range(len(made)) if regions == 2 ** (len(made) - 1) else ():
        assert tiling(regions, 2**level) == tuple(made[level])


@pytest.mark.parametrize(
    "given", [[], [(0, 4)], [(0, 3), (3, 8)], [(0, 4), (4, 6)], [(4, 8), (0, 4)], [(0, 8), (4, 8)]]
)
def test_tilings_that_are_none(given):
    with pytest.raises(OptionError):
        check_tiling(8, given)


@pytest.mark.parametrize("hops", [0, 9, True, 2.0])
def test_numbers_of_hops_that_do_not_exist(hops):
    with pytest.raises(OptionError):
        tiling(8, hops)


def test_fusion_is_the_product_of_gaussians():
    torch.manual_seed(0)
    a, b, one, other = (torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(4))
    mean, precision = fuse(a, one, b, other)
    # by the densities, on a grid: their product, normalised, has this mean and this variance in every dim
    grid = torch.linspace(-12, 14, 200001, dtype=torch.float64)[:, None]
    product = torch.exp(-one / 2 * (grid - a) ** 2 - other / 2 * (grid - b) ** 2)
    product = product / product.sum(0)
    torch.testing.assert_close(mean, (grid * product).sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(1 / precision, ((grid - mean) ** 2 * product).sum(0), rtol=1e-8, atol=1e-8)


def test_posteriors_lie_between_the_ends():
    bounded, _, y = bound(HBLL(), depth=4)
    credit = bounded.credit
    start = torch.randn(6, 6).double()
    at = type("At", (), {})
    at.canvas = torch.zeros(6, 8).double()
    targets = credit.read_targets(y, at)
    found = credit.posteriors(start, targets)
    code = credit.codes[y]
    there = credit.hop((0, 2), start)
    torch.testing.assert_close(found[2], (there / 2 + code / 2) / (1 / 2 + 1 / 2))
    torch.testing.assert_close(found[1], (credit.hop((0, 1), start) + found[2]) / 2)
    torch.testing.assert_close(found[3], (credit.hop((2, 3), found[2]) + code) / 2)
    assert found[0] is start
    assert torch.equal(found[4], code)


@pytest.mark.parametrize(("classes", "r"), [(10, 32), (5, 6), (6, 6), (300, 8), (3, 1)])
def test_label_codes(classes, r):
    draw = Draw(0, like=torch.zeros(1).double(), scale=1.0)
    codes = label_codes(draw, classes, r)
    assert codes.shape == (classes, r)
    if r > 1:
        torch.testing.assert_close(codes.mean(-1), torch.zeros(classes).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(codes.square().mean(-1), torch.ones(classes).double())
    if classes < r:
        torch.testing.assert_close(codes @ codes.T, r * torch.eye(classes).double())


# -- no label in the forward


@pytest.mark.parametrize(
    "credit",
    [HBLL(), HBLL(precisions="learned", feedback="learned"), HBLL(latent="state"), HBLL(hops="canvas", sweeps=2)],
)
def test_nothing_a_region_reads_depends_on_targets(credit):
    bounded, x, y = bound(credit, dropout=0.1)
    found = []
    for target in (y, y.flip(0), torch.zeros_like(y)):
        torch.manual_seed(3)
        with region_calls(bounded) as calls:
            bounded.local_loss(x, target=target)
            outs = [bounded.forward_path(x, hops=hops) for hops in (1, 2, 4)]
        found.append([m for _, _, m, *_ in calls] + [h for *_, h in calls] + outs)
    assert len(found[0]) > 8
    for others in found[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_region_that_is_fed_posteriors_is_noticed(monkeypatch):
    bounded, x, y = bound(HBLL(sweeps=0))
    monkeypatch.setattr(type(bounded.credit), "leaf_inputs", lambda self, proposals, posteriors: posteriors[:-1])
    found = []
    for target in (y, y.flip(0)):
        with region_calls(bounded) as calls:
            bounded.local_loss(x, target=target)
        found.append([m for _, _, m, *_ in calls])
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- independence


def test_no_gradient_crosses_a_boundary_but_through_the_canvas():
    bounded, x, y = bound(HBLL(sweeps=1))
    with region_calls(bounded) as calls:
        loss = bounded.local_loss(x, target=y)
    learns = [call for call in calls if call[-1].requires_grad]
    assert [k for k, *_ in learns] == [0, 1, 2, 3]
    assert crossings(learns) == []
    for k, canvas, _, _, _, h in learns:
        entry = {name for name, _ in bounded.named_parameters() if name.startswith(f"lbi.decoders.{k}.")}
        own = {name for name, _ in bounded.named_parameters() if name.startswith(f"blocks.{k}.")}
        assert parameters_behind(h, bounded, stop=canvas) == own | entry
        assert canvas.grad_fn in nodes_behind(loss)
    with region_calls(bounded) as calls:
        bounded(x)
    assert (3, 0) in crossings(calls)


@pytest.mark.parametrize("tied", [False, True])
def test_regions_learn_as_they_would_alone(tied):
    bounded, x, y = bound(HBLL(sweeps=2, match=0.7, tied=tied))
    credit = bounded.credit
    seen = {}
    leaf = type(credit).leaf

    def noted(self, k, m, posterior, at, targets):
        seen[k] = (m, posterior)
        return leaf(self, k, m, posterior, at, targets)

    with pytest.MonkeyPatch.context() as patch, region_calls(bounded) as calls:
        patch.setattr(type(credit), "leaf", noted)
        together = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    calls = [call for call in calls if call[-1].requires_grad]
    for k, canvas, m, values, pieces, _ in calls:
        assert m is seen[k][0]
        assert not m.requires_grad
        assert not seen[k][1].requires_grad
        alone = canvas.detach().requires_grad_()
        values = {name: alone if value is canvas else value for name, value in values.items()}
        bounded.zero_grad()
        after, h, _ = bounded.regions[k](alone, m, values, pieces)
        loss = F.cross_entropy(credit.readers[k + 1](after), y) + 0.7 / 2 * F.mse_loss(after, seen[k][1])
        if k == 3:
            loss = loss + F.cross_entropy(bounded.head(bounded.norm(h)), y)
        loss.backward()
        own = {f"blocks.{k}.branch.0.weight", f"blocks.{k}.norm.bias"}
        own |= set() if tied else {f"lbi.encoders.{k}.out.weight"}
        own |= {f"lbi.decoders.{k}.out.weight"} if k and not tied else set()
        own |= {"head.weight", "norm.weight"} if k == 3 else set()
        for name in own:
            assert float((bounded.get_parameter(name).grad - together[name]).abs().max()) < 1e-12, name


@pytest.mark.parametrize("regions", [4, 6, 16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("learned", [False, True])
def test_dependency_depth(regions, learned):
    """The most steps that wait for each other: encoder, hops and regions forward, and one backward."""
    K = math.ceil(math.log2(regions))
    rule = HBLL(
        sweeps=K, feedback="learned" if learned else "identity", precisions="learned" if learned else "fixed",
        hops="canvas" if learned else "latent",
    )  # fmt: skip
    bounded, x, y = bound(rule, depth=regions)
    bounded.local_loss(x, target=y)
    with region_calls(bounded) as calls, Depth(steps(bounded)) as depth:
        loss = bounded.local_loss(x, target=y)
        forward = depth.of(loss)
    assert depth.calls > regions * K
    learns = [call for call in calls if call[-1].requires_grad]
    assert crossings(learns) == []  # so that the backward of no region waits for that of another one
    assert 2 * K <= forward + 1 <= 2 * K + 2
    with Depth(steps(bounded)) as depth:
        out = bounded(x)
        assert depth.of(out) == regions + 1  # the plain forward is a chain


def test_checks():
    bounded, x, _ = bound(HBLL(sweeps=1))
    inputs = Inputs((), {"x": x})
    before = {name: buffer.clone() for name, buffer in bounded.named_buffers()}
    bounded.zero_grad()
    checks = {check.name: check for check in local_checks(bounded, inputs)}
    assert checks["local gradients"].ok
    assert checks["no target in the forward"].ok
    assert checks["dependency depth"].detail.startswith("4 of 22 steps")
    assert all(torch.equal(buffer, before[name]) for name, buffer in bounded.named_buffers())
    assert all(p.grad is None for p in bounded.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hbll, "leaf_inputs", lambda self, proposals, posteriors: posteriors[:-1])
        checks = {check.name: check for check in local_checks(bounded, inputs)}
        assert checks["no target in the forward"].ok is False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hbll, "leaf_inputs", lambda self, proposals, posteriors: self._undetached(proposals))
        patch.setattr(Hbll, "_undetached", _through_a_region(bounded, x), raising=False)
        checks = {check.name: check for check in local_checks(bounded, inputs)}
        assert checks["local gradients"].ok is False


def _through_a_region(bounded, x):
    """Feeds region 1 with what region 0 emits, its graph included."""

    def fed(self, proposals):
        at = Pass(bounded, bounded.programs[0], [x])
        emitted, _ = at.region(0, proposals[0])
        return [proposals[0], emitted, *proposals[2:]]

    return fed


# -- paths


def test_paths():
    bounded, x, _ = bound(HBLL(), depth=4)
    credit = bounded.credit
    assert torch.equal(bounded.forward_path(x, hops=4), bounded(x))
    start = credit.start(type("At", (), {"canvas": bounded.stem(x)}))
    torch.testing.assert_close(bounded.forward_path(x, hops=1), credit.readers[4](credit.hop((0, 4), start)))
    by_hand = credit.readers[4](credit.hop((2, 4), credit.hop((0, 2), start)))
    torch.testing.assert_close(bounded.forward_path(x, hops=2), by_hand)
    assert torch.equal(bounded.forward_path(x, spans=[(0, 2), (2, 4)]), bounded.forward_path(x, hops=2))
    with region_calls(bounded) as calls:
        bounded.forward_path(x, spans=[(0, 2), (2, 3), (3, 4)])
    assert [k for k, *_ in calls] == [2, 3]
    outs = [bounded.forward_path(x, hops=hops) for hops in (1, 2, 3, 4)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outs, 2))
    for wrong in ({}, {"hops": 5}, {"hops": 2, "spans": [(0, 4)]}, {"spans": [(0, 3), (3, 4)]}):
        with pytest.raises(OptionError):
            bounded.forward_path(x, **wrong)


@pytest.mark.parametrize("hops", ["latent", "canvas"])
def test_maps_learn_from_what_paths_feed_them(hops, monkeypatch):
    bounded, x, y = bound(HBLL(hops=hops, sweeps=3), depth=4)
    credit, seen = bounded.credit, {}
    jump = type(credit).jump

    def noted(self, span, m, beside, *rest):
        seen[span] = (m, beside)
        return jump(self, span, m, beside, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(credit), "jump", noted)
        bounded.local_loss(x, target=y)
    canvas = bounded.stem(x)
    beside = None if hops == "latent" else F.layer_norm(canvas, (8,))
    start = credit.start(type("At", (), {"canvas": canvas}))
    torch.testing.assert_close(seen[2, 4][0], credit.hop((0, 2), start, beside))
    assert not seen[2, 4][0].requires_grad
    assert seen[0, 4][0].requires_grad  # the way to the encoder
    for span, (_, given) in seen.items():
        assert (given is None) is (hops == "latent"), span
    expected = credit.readers[4](credit.hop((2, 4), credit.hop((0, 2), start, beside), beside))
    torch.testing.assert_close(bounded.forward_path(x, hops=2), expected)


def test_every_level_is_swept():
    bounded, x, _ = bound(HBLL(sweeps=3), depth=8)
    credit = bounded.credit
    start = credit.start(type("At", (), {"canvas": bounded.stem(x)}))
    leapt = credit.leap(start)
    begins = credit.begin(leapt, [torch.zeros_like(start)] * 8, None, 3)
    assert len(begins) == 15
    m = start
    for a, b in ((0, 2), (2, 4), (4, 6), (6, 8)):  # the path of four hops
        torch.testing.assert_close(begins[a, b], m)
        m = credit.hop((a, b), m)
    torch.testing.assert_close(begins[4, 8], credit.hop((0, 4), start))
    for k in range(8):
        assert begins[k, k + 1] is leapt[k]
    # three regions: the second span of a level begins where a region leads
    bounded, x, _ = bound(HBLL(sweeps=1), depth=3)
    credit, proposals = bounded.credit, [torch.full((6, 6), float(k)).double() for k in range(3)]
    begins = credit.begin(credit.leap(proposals[0]), proposals, None, 1)
    assert begins[1, 3] is proposals[1]


# -- options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precisions": "learned"},
        {"feedback": "learned", "precisions": "learned"},
        {"tied": True},
        {"latent": "state"},
        {"hops": "canvas"},
        {"readout": "shared"},
    ],
)
def test_every_parameter_gets_a_gradient(options):
    bounded, x, y = bound(HBLL(**options))
    found = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert [name for name, g in found.items() if g is None or not g.any()] == []


@pytest.mark.parametrize(
    "options",
    [
        {"latent": "belief"},
        {"sweeps": -1},
        {"sweeps": "all"},
        {"match": -1.0},
        {"precisions": 1},
        {"feedback": ""},
        {"hops": "input"},
    ],
)
def test_options_that_do_not_exist(options):
    with pytest.raises(OptionError):
        HBLL(**options)


def test_learned_precisions_are_those_of_what_regions_emit():
    bounded, x, y = bound(HBLL(precisions="learned", sweeps=0), fresh=True)
    credit = bounded.credit
    own = list(credit.forward_precisions.parameters()) + list(credit.feedback_precisions.parameters())
    optimizer = torch.optim.Adam(own, lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        bounded.local_loss(x, target=y).backward()
        optimizer.step()
    with region_calls(bounded) as calls:
        bounded.local_loss(x, target=y)
    emitted = [credit.after(k, m, h) for k, _, m, _, _, h in calls]
    there = credit.hop((2, 3), calls[2][2])
    variance = (there - emitted[2]).square().mean()
    torch.testing.assert_close(credit.precision((2, 3), back=False), 1 / variance, rtol=0.02, atol=0)


def test_statistics_are_updated_once():
    bounded, x, y = bound(HBLL(sweeps=2), norm=True)
    bounded.local_loss(x, target=y)
    assert int(dict(bounded.named_buffers())["blocks.1.norm.num_batches_tracked"]) == 1


def test_autocast_loses_no_gradient():
    bounded, x, y = bound(HBLL(sweeps=2), fresh=True)
    bounded.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(bounded, lambda: bounded.local_loss(x.float(), target=y))
    assert [name for name, g in found.items() if g is None or not g.any()] == []


def test_sweeps_are_drawn_in_training_only():
    bounded, x, y = bound(HBLL(), fresh=True)

    def count():
        with region_calls(bounded) as calls:
            bounded.local_loss(x, target=y)
        return len(calls) - 4

    assert {count() for _ in range(40)} == {0, 3, 6}
    bounded.eval()
    assert {count() for _ in range(3)} == {6}


def test_rows_that_are_ignored_change_no_region():
    bounded, x, y = bound(HBLL(sweeps=0))
    few = gradients(bounded, lambda: bounded.local_loss(x[:4], target=y[:4]))
    target = torch.cat([y[:4], torch.tensor([-100, -100])])
    more = gradients(bounded, lambda: bounded.local_loss(x, target=target))
    own = [name for name in few if name.startswith(("blocks.", "head.", "norm."))]
    assert len(own) > 20
    assert max(float((few[name] - more[name]).abs().max()) for name in own) < 1e-12


# -- other models


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"latent": "state", "tied": True}])
def test_recurrent_net(options):
    model, x, y = recurrent()
    bounded = transform(model, x, regions=4, r=5, credit=HBLL(sweeps=1, **options))
    with region_calls(bounded) as calls:
        found = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert crossings([call for call in calls if call[-1].requires_grad]) == []
    assert [name for name, g in found.items() if g is None] == []
    assert bounded(x).shape == bounded.forward_path(x, hops=2).shape == (5, CLASSES)


def test_language_model():
    model = gpt2(40)
    tokens = torch.randint(0, 40, (2, 9))
    x, y = {"input_ids": tokens[:, :-1]}, tokens[:, 1:].clone()
    y[0, :3] = -100
    bounded = transform(model, x, regions=3, r=8, credit=HBLL(sweeps=1))
    optimizer = torch.optim.Adam(bounded.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = bounded.local_loss(**x, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    changed = tokens[:, :-1].clone()
    changed[:, 5:] = 0
    for hops in (1, 2, 3):
        before, after = (bounded.forward_path(ids, hops=hops).logits for ids in (tokens[:, :-1], changed))
        assert before.shape == (2, 8, 40)
        torch.testing.assert_close(before[:, :5], after[:, :5])


def test_state_latent_needs_a_state():
    from tests.models import VisionTransformer

    model = VisionTransformer(width=8, heads=2, depth=2)
    with pytest.raises(InterfaceError, match="bottleneck"):
        transform(model, torch.randn(2, 1, 8, 8), regions=2, credit=HBLL(latent="state"))


def test_images():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    ).double()  # fmt: skip
    x, y = torch.randn(3, 1, 6, 6).double(), torch.randint(0, CLASSES, (3,))
    for credit in ("sid", "hbll"):
        bounded = transform(model, x, regions=3, r=5, credit=credit)
        found = gradients(bounded, lambda b=bounded: b.local_loss(x, target=y))
        assert [name for name, g in found.items() if g is None] == []
        assert bounded(x).shape == (3, CLASSES)
    assert largest_difference(found, found) == 0
