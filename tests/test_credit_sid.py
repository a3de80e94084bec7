"""SID: closed forms of its objective, regions that learn alone, targets as cross_entropy takes them, other models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lbi_compile import SID, OptionError, transform
from lbi_compile.capture import Inputs
from lbi_compile.credit.check import crossings, local_checks, nodes_behind, region_calls
from lbi_compile.credit.losses import forward_divergence, reverse_divergence
from lbi_compile.credit.targets import Targets
from tests.credit_models import (
    CLASSES,
    both_schedules,
    bound,
    gpt2,
    gradients,
    largest_difference,
    parameters_behind,
    recurrent,
)


def one_hot(y):
    return F.one_hot(y, CLASSES).double()


# -- closed forms


@pytest.mark.parametrize("update", ["replace", "add"])
@pytest.mark.parametrize(
    ("schedule", "alpha"), [("parallel", 0.5), ("parallel", (0.9, 0.5, 0.3, 0.2)), ("sequential", 0.3)]
)
def test_logit_gradient_of_every_module(schedule, alpha, update, monkeypatch):
    bounded, x, y = bound(SID(alpha=alpha, schedule=schedule, update=update))
    seen = {}
    refined = type(bounded.credit).refined

    def watched(self, logits, belief):
        out, k = refined(self, logits, belief), watched.calls % 4
        watched.calls += 1
        if out.requires_grad:
            out.retain_grad()
            seen[k] = out
        return out

    watched.calls = 0
    monkeypatch.setattr(type(bounded.credit), "refined", watched)
    bounded.local_loss(x, target=y).backward()
    alphas = alpha if isinstance(alpha, tuple) else (alpha,) * 4
    before = torch.full((len(y), CLASSES), 1 / CLASSES, dtype=torch.float64)
    assert sorted(seen) == [0, 1, 2, 3]
    for k in range(4):
        p = seen[k].softmax(-1).detach()
        expected = p - (alphas[k] * one_hot(y) + (1 - alphas[k]) * before)
        assert float((seen[k].grad * len(y) - expected).abs().max()) < 1e-12
        before = p


def fitted(divergence, prior, targets, alpha):
    """Logits that minimise the row losses, by Newton steps."""
    z = torch.zeros_like(prior)
    for _ in range(30):
        jacobian = torch.autograd.functional.hessian(lambda v: divergence(v, prior, targets, alpha).sum(), z).squeeze()
        slope = torch.autograd.functional.jacobian(lambda v: divergence(v, prior, targets, alpha).sum(), z)
        z = z - slope @ torch.linalg.pinv(jacobian)
    return z.softmax(-1)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_cascade_converges_at_the_closed_rate(alpha):
    y = torch.tensor([2])
    ones = torch.ones(1, dtype=torch.float64)
    targets = Targets(y, None, ones, ones.sum(), 0.0)
    p = torch.full((1, CLASSES), 1 / CLASSES, dtype=torch.float64)
    start = float(1 - p[0, 2])
    for i in range(1, 5):
        p = fitted(forward_divergence, p, targets, alpha)
        assert abs(float(1 - p[0, 2]) - start * (1 - alpha) ** i) < 1e-10


def test_minimiser_of_the_reverse_divergence():
    y, q = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).double(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double()
    ones = torch.ones(1, dtype=torch.float64)
    p = fitted(reverse_divergence, q.log(), Targets(None, y, ones, ones.sum(), 0.0), 0.3)
    expected = y**0.3 * q**0.7
    torch.testing.assert_close(p, expected / expected.sum())


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_divergences_by_definition(prior, dense):
    torch.manual_seed(1)
    logits, q = torch.randn(3, 5).double(), torch.randn(3, 5).double().softmax(-1)
    index, ones = torch.tensor([0, 3, 1]), torch.ones(3, dtype=torch.float64)
    smooth = Targets(index, None, ones, ones.sum(), 0.2)
    y = smooth.distribution(5)
    targets = Targets(None, y, ones, ones.sum(), 0.0) if dense else smooth
    p, given, q = logits.softmax(-1), q if prior else None, q if prior else torch.full_like(q, 1 / 5)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    got = forward_divergence(logits, given, targets, 0.3)
    torch.testing.assert_close(got, 0.3 * kl(y, p) + 0.7 * kl(q, p))
    got = reverse_divergence(logits, None if given is None else given.log(), targets, 0.3)
    torch.testing.assert_close(got, 0.3 * kl(p, y) + 0.7 * kl(p, q))


# -- independence of the regions


def test_no_gradient_crosses_a_boundary_but_through_the_canvas():
    bounded, x, y = bound("sid")
    with region_calls(bounded) as calls:
        loss = bounded.local_loss(x, target=y)
    assert [k for k, *_ in calls] == [0, 1, 2, 3]
    assert crossings(calls) == []
    for k, canvas, _, _, _, h in calls:
        entry = {f"lbi.tables.{k - 1}"} if k else set()
        own = {name for name, _ in bounded.named_parameters() if name.startswith(f"blocks.{k}.")}
        assert parameters_behind(h, bounded, stop=canvas) == own | entry
        assert canvas.grad_fn in nodes_behind(loss)
    # the same walk on the plain forward, which is differentiated end to end, does find every region before
    with region_calls(bounded) as calls:
        bounded(x)
    assert (3, 0) in crossings(calls)


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
def test_checks(schedule):
    bounded, x, _ = bound(SID(schedule=schedule))
    checks = {check.name: check for check in local_checks(bounded, Inputs((), {"x": x}))}
    assert checks["local gradients"].ok
    assert checks["local gradients"].detail.startswith("4 regions")
    assert checks["no target in the forward"].ok
    assert checks["dependency depth"].detail.startswith("4 of 4 steps")


def test_regions_learn_as_they_would_alone():
    bounded, x, y = bound(SID(alpha=0.4))
    with region_calls(bounded) as calls:
        together = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    credit = bounded.credit
    canvas_gradient = 0.0
    for k, canvas, m, values, pieces, _ in calls:
        prior = torch.full((len(y), CLASSES), 1 / CLASSES, dtype=torch.float64) if m is None else m
        bounded.zero_grad()
        alone = canvas.detach().requires_grad_()
        values = {name: alone if value is canvas else value for name, value in values.items()}
        _, h, _ = bounded.regions[k](alone, m, values, pieces)
        head = credit.heads[k] if k < 3 else None
        norm = [bounded.norm.weight, bounded.norm.bias] if head is None else [head.norm_weight, head.norm_bias]
        line = [bounded.head.weight, bounded.head.bias] if head is None else [head.head_weight, head.head_bias]
        logits = F.linear(F.layer_norm(h, (8,), *norm), *line)
        F.cross_entropy(logits, 0.4 * one_hot(y) + 0.6 * prior).backward()
        canvas_gradient = canvas_gradient + alone.grad
        own = [name for name, p in bounded.named_parameters() if p.grad is not None]
        assert f"blocks.{k}.norm.weight" in own
        for name in own:
            assert float((bounded.get_parameter(name).grad - together[name]).abs().max()) < 1e-12
    # what the stem gets is the sum of what the regions hand to the canvas
    torch.testing.assert_close(canvas_gradient.T @ x, together["stem.weight"], rtol=0, atol=1e-12)


def test_beliefs_do_not_depend_on_targets():
    bounded, x, y = bound("sid")
    found = []
    for target in (y, y.flip(0)):
        with region_calls(bounded) as calls:
            bounded.local_loss(x, target=target)
        found.append([m for _, _, m, *_ in calls] + [bounded(x)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        _, taps = bounded.forward_regions(x)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(taps.m, found[0], strict=False))


# -- targets


def test_one_region_with_alpha_one_is_the_model_under_cross_entropy():
    bounded, x, y = bound(SID(alpha=1.0), regions=1)
    got = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert largest_difference(got, gradients(bounded, lambda: F.cross_entropy(bounded(x), y))) < 1e-12


def test_rows_that_are_ignored_change_nothing():
    bounded, x, y = bound("sid")
    few = gradients(bounded, lambda: bounded.local_loss(x[:4], target=y[:4]))
    target = torch.cat([y[:4], torch.tensor([-100, -100])])
    assert largest_difference(few, gradients(bounded, lambda: bounded.local_loss(x, target=target))) < 1e-12


# -- options


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"alpha": 1.5}, {"alpha": ()}, {"kl": "both"}, {"kl": "reverse"}, {"readout": "last"},
     {"update": "sum"}, {"refresh": 0}, {"refresh": 2, "readout": "private"}, {"schedule": "scan"},
     {"belief": "token"}],
)  # fmt: skip
def test_options_that_do_not_exist(options):
    with pytest.raises(OptionError):
        SID(**options)


@pytest.mark.parametrize(
    "options",
    [{}, {"readout": "shared"}, {"readout": "private"}, {"belief": "embedding"}, {"alpha": 1.0}, {"update": "add"}],
)
def test_every_parameter_gets_a_gradient(options):
    bounded, x, y = bound(SID(**options))
    found = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert [name for name, g in found.items() if g is None or not g.any()] == []


def test_plain_forward_is_the_last_module():
    bounded, x, _ = bound("sid")
    out, taps = bounded.forward_regions(x)
    assert torch.equal(out, bounded(x))
    torch.testing.assert_close(out, bounded.head(bounded.norm(taps.h[-1])))
    assert taps.m[0] is None
    assert [m.shape for m in taps.m[1:]] == [(6, CLASSES)] * 3
    torch.testing.assert_close(taps.m[2].sum(-1), torch.ones(6, dtype=torch.float64))


def test_beliefs_that_are_multiplied():
    bounded, x, y = bound(SID(update="add", alpha=0.4))
    credit = bounded.credit
    with torch.no_grad():
        out, taps = bounded.forward_regions(x)
    belief = torch.zeros(6, CLASSES, dtype=torch.float64)  # the logarithm of what is even, up to a constant
    expected = 0.0
    for k, h in enumerate(taps.h):
        head = credit.heads[k] if k < 3 else None
        norm = [bounded.norm.weight, bounded.norm.bias] if head is None else [head.norm_weight, head.norm_bias]
        line = [bounded.head.weight, bounded.head.bias] if head is None else [head.head_weight, head.head_bias]
        after = belief + F.linear(F.layer_norm(h, (8,), *norm), *line)
        p, before = after.log_softmax(-1), belief.log_softmax(-1)
        expected = expected - (0.4 * one_hot(y) * p).sum(-1).mean() + 0.6 * (before.exp() * (before - p)).sum(-1).mean()
        belief = p
        if k < 3:
            torch.testing.assert_close(taps.m[k + 1], p)
    torch.testing.assert_close(out.log_softmax(-1), belief)
    torch.testing.assert_close(bounded.local_loss(x, target=y), expected)


def test_beliefs_of_positions_are_multiplied():
    tokens = torch.randint(0, 40, (2, 9))
    bounded = transform(gpt2(40), {"input_ids": tokens}, regions=3, credit=SID(update="add"))
    out, taps = bounded.forward_regions(input_ids=tokens)
    own = bounded.lm_head(bounded.transformer.ln_f(taps.h[-1]))
    torch.testing.assert_close(out.logits, own + taps.m[-1])
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(bounded(input_ids=changed).logits[:, :5], out.logits[:, :5])
    found = both_schedules(bounded, lambda: bounded.local_loss(input_ids=tokens, target=tokens))
    assert largest_difference(*found) < 1e-12


def test_a_loop_that_hands_the_optimizer_a_closure():
    bounded, x, y = bound("sid", fresh=True)
    optimizer = torch.optim.LBFGS(bounded.parameters(), max_iter=4)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = bounded.local_loss(x, target=y)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert len(losses) > 10
    assert losses[-1] < 0.7 * losses[0]


def test_descent_is_measured():
    bounded, x, y = bound(SID(check=True, alpha=0.5), fresh=True)
    optimizer = torch.optim.Adam(bounded.parameters(), lr=1e-2)
    for _ in range(30):
        loss = bounded.local_loss(x, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share, batches = bounded.credit.descent
    assert batches == 30
    assert len(share) == 4
    assert share[0] > 0.8
    # by the formula, on one more batch
    bounded.credit.reset_descent()
    with region_calls(bounded) as calls:
        bounded.local_loss(x, target=y)
    beliefs = [*[m for _, _, m, *_ in calls][1:], bounded(x).softmax(-1)]
    before, held = torch.full_like(beliefs[0], 1 / CLASSES), []
    for p in beliefs:
        d, d_before = (-q.gather(1, y[:, None]).log().mean() for q in (p, before))
        delta = (before * (before / p).log()).sum(-1).mean()
        held.append(float(d <= d_before - delta))
        before = p
    assert bounded.credit.descent == (tuple(held), 1)


def test_refresh_of_a_shared_readout():
    bounded, x, y = bound(SID(readout="shared", refresh=2), fresh=True)
    first = bounded.head.weight.detach().clone()
    copies = []
    for _ in range(4):
        bounded.local_loss(x, target=y).backward()
        copies.append(bounded.credit.heads[0].head_weight.clone())
        with torch.no_grad():
            bounded.head.weight.add_(1.0)
    assert [float((copy - first).mean().round()) for copy in copies] == [0.0, 0.0, 2.0, 2.0]
    with region_calls(bounded) as calls:
        bounded.local_loss(x, target=y)
    assert "lbi.heads.0.head_weight" not in dict(bounded.named_parameters())
    assert len(calls) == 4


def test_state_and_copies():
    bounded, x, y = bound("sid")
    twin = copy.deepcopy(bounded)
    assert torch.equal(bounded(x), twin(x))
    a = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert largest_difference(a, gradients(twin, lambda: twin.local_loss(x, target=y))) == 0
    other, _, _ = bound("sid", fresh=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    other.load_state_dict(bounded.state_dict())
    assert torch.equal(bounded(x), other(x))
    assert "credit" in str(bounded.plan.why)


# -- other models


def test_language_model_with_expected_embedding_and_shared_head():
    model = gpt2(300)
    tokens = torch.randint(0, 300, (2, 9))
    x, y = {"input_ids": tokens[:, :-1]}, tokens[:, 1:].clone()
    bounded = transform(model, x, regions=3, credit=SID(alpha=0.25))
    credit = bounded.credit
    assert model.get_parameter(credit.embedding) is model.transformer.wte.weight
    assert (credit.readout, credit.belief, len(credit.heads), len(credit.tables)) == ("shared", "embedding", 0, 0)

    # the loss by hand
    logits, taps = bounded.forward_regions(**x)
    before, expected = torch.full((2, 8, 300), 1 / 300, dtype=torch.float64), 0.0
    for h in taps.h:
        p = model.lm_head(model.transformer.ln_f(h)).softmax(-1)
        target = 0.25 * F.one_hot(y, 300) + 0.75 * before
        entropy = 0.75 * (before * before.log()).sum(-1).mean()
        expected = expected - (target * p.log()).sum(-1).mean() + entropy
        before = p
    torch.testing.assert_close(bounded.local_loss(**x, target=y), expected)

    # no position sees a later one, by way of a belief either
    changed = tokens[:, :-1].clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(bounded(input_ids=changed).logits[:, :5], logits.logits[:, :5])

    y[0, :3] = -100
    assert largest_difference(*both_schedules(bounded, lambda: bounded.local_loss(**x, target=y))) < 1e-12
    optimizer = torch.optim.Adam(bounded.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = bounded.local_loss(**x, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


def test_recurrent_net():
    model, x, y = recurrent()
    bounded = transform(model, x, regions=4, credit="sid")
    assert len(bounded.regions) == 4
    with region_calls(bounded) as calls:
        found = gradients(bounded, lambda: bounded.local_loss(x, target=y))
    assert crossings(calls) == []
    assert [name for name, g in found.items() if g is None] == []
    assert bounded(x).shape == (5, CLASSES)
