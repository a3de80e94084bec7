"""The example models: every block against its recurrence step by step, capture, and the bounded model."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lbi_compile
from lbi_compile.capture import as_inputs, capture
from lbi_compile.errors import OptionError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from models import ARCHITECTURES, PRESETS, build, preset
from models.common import RMSNorm, chunked_scan
from models.mamba2 import Mamba2, initial_step_bias
from models.mamba3 import SLOWEST, Mamba3
from models.transformer import BASE, Attention, SwiGLU

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# nodes of a tiny model with eight layers: no loop over positions or chunks is unrolled into the graph
MOST_NODES = {"transformer": 550, "mamba2": 1000, "mamba3": 1500, "mamba3-mimo": 1600, "hybrid": 1300}


def small(architecture, **changes):
    """A model of four layers that still has several chunks of positions at T = 24."""
    size = dataclasses.replace(preset(architecture), layers=4, width=16, heads=2, state=8, head_width=8, chunk=8)
    return build(architecture, dataclasses.replace(size, **changes), vocabulary=32)


def noisy(module):
    """The module in float64, with every parameter moved off its initial value."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def recurrence(query, key, value, log_decay, weight, later):
    """The state after every step, one step after the other; keys and queries per head, `[B, T, H, M, S]`."""
    batch, length, heads, _, size = key.shape
    state = torch.zeros(batch, heads, size, value.shape[-1], dtype=value.dtype)
    outputs = []
    for t in range(length):
        if t:
            state = state + later[:, t - 1, :, None, None] * torch.einsum(
                "bhms,bhmp->bhsp", key[:, t - 1], value[:, t - 1]
            )
        state = log_decay[:, t, :, None, None].exp() * state
        state = state + weight[:, t, :, None, None] * torch.einsum("bhms,bhmp->bhsp", key[:, t], value[:, t])
        outputs.append(torch.einsum("bhms,bhsp->bhmp", query[:, t], state))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("length", "chunk"), [(13, 4), (8, 4), (3, 5), (1, 2), (5, 1)])
def test_scan_equals_recurrence(length, chunk, ranks, groups):
    heads, double = 3, {"dtype": torch.float64}
    query, key = torch.randn(2, 2, length, groups, ranks, 5, **double)
    value = torch.randn(2, length, heads, ranks, 7, **double)
    log_decay = -torch.rand(2, length, heads, **double)
    weight, later = torch.rand(2, 2, length, heads, **double)
    leaves = [x.clone().requires_grad_() for x in (query, key, value, log_decay, weight, later)]
    query, key, value, log_decay, weight, later = leaves
    got = chunked_scan(query, key, value, log_decay=log_decay, weight=weight, later=later, chunk=chunk)
    shape = (-1, -1, heads, -1, -1)
    expected = recurrence(query.expand(shape), key.expand(shape), value, log_decay, weight, later)
    torch.testing.assert_close(got, expected, **EXACT)
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(expected, leaves, grad, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **EXACT)


def test_scan_of_one_weight_equals_zero_later():
    query, key, value = torch.randn(3, 2, 9, 3, 1, 4, dtype=torch.float64)
    log_decay, weight = -torch.rand(2, 9, 3, dtype=torch.float64), torch.rand(2, 9, 3, dtype=torch.float64)
    one = chunked_scan(query, key, value, log_decay=log_decay, weight=weight, chunk=4)
    two = chunked_scan(query, key, value, log_decay=log_decay, weight=weight, later=torch.zeros_like(weight), chunk=4)
    torch.testing.assert_close(one, two, **EXACT)


def test_scan_survives_strong_decay():
    """Where a chunk forgets all, no exponential of the other sign overflows, forward or backward."""
    query, key, value = torch.randn(3, 1, 12, 1, 1, 4)
    log_decay = torch.full((1, 12, 1), -200.0, requires_grad=True)
    y = chunked_scan(query, key, value, log_decay=log_decay, weight=torch.ones(1, 12, 1), chunk=4)
    torch.testing.assert_close(y, (query * key).sum(-1, keepdim=True) * value)
    (grad,) = torch.autograd.grad(y.sum(), log_decay)
    assert grad.isfinite().all()


def turned(x, angle, pairs):
    """Complex rotation of the pairs of axes that `pairs` names."""
    first, second = pairs
    x = x.clone()
    number = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angle), angle)
    x[..., first], x[..., second] = number.real, number.imag
    return x


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_step_by_step(kv_heads):
    width, heads, size, length = 16, 4, 4, 6
    attention = noisy(Attention(width, heads=heads, kv_heads=kv_heads))
    x = torch.randn(2, length, width, dtype=torch.float64)
    pairs = (torch.arange(size // 2), torch.arange(size // 2, size))
    angle = torch.tensor([BASE ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float32).double()
    keys, values, outputs = [], [], []
    for t in range(length):
        query = turned((x[:, t] @ attention.query.weight.T).unflatten(-1, (heads, size)), t * angle, pairs)
        keys.append(turned((x[:, t] @ attention.key.weight.T).unflatten(-1, (kv_heads, size)), t * angle, pairs))
        values.append((x[:, t] @ attention.value.weight.T).unflatten(-1, (kv_heads, size)))
        mixed = []
        for head in range(heads):
            at = head * kv_heads // heads
            scores = torch.stack([(query[:, head] * key[:, at]).sum(-1) for key in keys], -1) / math.sqrt(size)
            mixed.append(torch.einsum("bt,tbp->bp", scores.softmax(-1), torch.stack([v[:, at] for v in values])))
        outputs.append(torch.cat(mixed, -1) @ attention.output.weight.T)
    torch.testing.assert_close(attention(x), torch.stack(outputs, 1), **EXACT)


def test_norm_and_mlp():
    norm, mlp = noisy(RMSNorm(6, eps=1e-3)), noisy(SwiGLU(6, hidden=9))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight, **EXACT)
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.output.weight.T, **EXACT)


def test_step_bias_starts_in_range():
    step = F.softplus(initial_step_bias(1000))
    assert step.min() > 0.999e-3
    assert step.max() < 0.1001
    assert (step < 1e-2).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_step_by_step(groups):
    width, size, head_width, length = 8, 6, 4, 11
    mixer = noisy(Mamba2(width, state=size, head_width=head_width, groups=groups, chunk=4))
    heads, inner = 4, 16
    x = torch.randn(2, length, width, dtype=torch.float64)
    seen = torch.zeros(2, 4, inner + 2 * groups * size, dtype=torch.float64)  # the last four positions, oldest first
    state = torch.zeros(2, heads, size, head_width, dtype=torch.float64)
    kernel, outputs = mixer.convolution.weight[:, 0], []
    assert mixer.convolution.bias is not None
    for t in range(length):
        z, new, step = (x[:, t] @ mixer.input.weight.T).split([inner, seen.shape[-1], heads], -1)
        seen = torch.cat((seen[:, 1:], new[:, None]), 1)
        mixed = torch.einsum("bkc,ck->bc", seen, kernel) + mixer.convolution.bias
        value, key, query = F.silu(mixed).split([inner, groups * size, groups * size], -1)
        value = value.unflatten(-1, (heads, head_width))
        key, query = (
            torch.stack([part.unflatten(-1, (groups, size))[:, head * groups // heads] for head in range(heads)], 1)
            for part in (key, query)
        )
        step = F.softplus(step + mixer.step_bias)
        decay = (-mixer.log_rate.exp() * step).exp()
        state = decay[..., None, None] * state + step[..., None, None] * key[..., :, None] * value[..., None, :]
        y = (query[..., None, :] @ state)[..., 0, :] + mixer.skip[:, None] * value
        outputs.append(mixer.norm(y.flatten(1) * F.silu(z)) @ mixer.output.weight.T)
    torch.testing.assert_close(mixer(x), torch.stack(outputs, 1), **EXACT)


def test_mamba2_equals_that_of_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=16, state_size=8, head_dim=8, num_heads=4, n_groups=1, expand=2, conv_kernel=4, chunk_size=4
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2(16, state=8, head_width=8, chunk=4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.load_state_dict(
        {
            "A_log": ours.log_rate,
            "dt_bias": ours.step_bias,
            "D": ours.skip,
            "conv1d.weight": ours.convolution.weight,
            "conv1d.bias": ours.convolution.bias,
            "in_proj.weight": ours.input.weight,
            "norm.weight": ours.norm.weight,
            "out_proj.weight": ours.output.weight,
        }
    )
    x = torch.randn(2, 11, 16)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("ranks", [1, 3])
def test_mamba3_step_by_step(ranks):
    width, size, head_width, length = 8, 8, 4, 11
    mixer = noisy(Mamba3(width, state=size, head_width=head_width, ranks=ranks, chunk=4))
    heads, inner = 4, 16
    pairs = (torch.arange(0, size // 2, 2), torch.arange(1, size // 2, 2))
    x = torch.randn(2, length, width, dtype=torch.float64)
    state = torch.zeros(2, heads, size, head_width, dtype=torch.float64)
    angle = torch.zeros(2, heads, 1, size // 4, dtype=torch.float64)
    before, outputs = torch.zeros_like(state), []
    for t in range(length):
        parts = [inner, inner, ranks * size, ranks * size, heads, heads, heads, size // 4]
        z, value, key, query, step, mix, rate, turn = (x[:, t] @ mixer.input.weight.T).split(parts, -1)
        step, mix, rate = F.softplus(step + mixer.step_bias), mix.sigmoid(), (-F.softplus(rate)).clamp(max=SLOWEST)
        angle = angle + math.pi * turn.tanh()[:, None, None] * step[..., None, None]
        key = turned(mixer.key_norm(key.unflatten(-1, (1, ranks, size))) + mixer.key_bias, angle, pairs)
        query = turned(mixer.query_norm(query.unflatten(-1, (1, ranks, size))) + mixer.query_bias, angle, pairs)
        value, z = value.unflatten(-1, (heads, 1, head_width)), z.unflatten(-1, (heads, 1, head_width))
        if ranks > 1:
            value, z = value * mixer.value_scale, z * mixer.gate_scale
        now = torch.einsum("bhms,bhmp->bhsp", key, value)
        alpha = (rate * step).exp()
        beta, gamma = (1 - mix) * step * alpha, mix * step
        state = sum(c[..., None, None] * part for c, part in ((alpha, state), (beta, before), (gamma, now)))
        before = now
        y = (torch.einsum("bhms,bhsp->bhmp", query, state) + mixer.skip[:, None, None] * value) * F.silu(z)
        y = (y * mixer.output_scale).sum(2) if ranks > 1 else y[:, :, 0]
        outputs.append(y.flatten(1) @ mixer.output.weight.T)
    torch.testing.assert_close(mixer(x), torch.stack(outputs, 1), **EXACT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_position_sees_a_later_one(architecture):
    model = noisy(small(architecture))
    x = torch.randn(1, 21, 16, dtype=torch.float64, requires_grad=True)
    y = x
    for block in model.blocks:
        y = block(y)
    for position in (0, 6, 7, 8, 15):
        (grad,) = torch.autograd.grad(y[0, position].sum(), x, retain_graph=True)
        assert grad[0, position + 1 :].count_nonzero() == 0
        assert (grad[0, : position + 1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("transformer", 1),
        ("mamba2", 1),
        ("mamba3", 1),
        pytest.param("mamba3-mimo", 1, marks=pytest.mark.slow),
        pytest.param("hybrid", 4, marks=pytest.mark.slow),
    ],
)
def test_capture_with_any_batch_and_length(architecture, layers):
    model = small(architecture, layers=layers)
    tokens = torch.randint(32, (2, 24))
    found = capture(model, as_inputs(model, tokens))
    for shape in ((2, 24), (3, 24), (1, 9), (5, 33)):
        other = torch.randint(32, shape)
        torch.testing.assert_close(found.graph_module(tokens=other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paper_sizes(architecture):
    """Block parameters of the paper's models lie between 47 and 61 million."""
    with torch.device("meta"):
        model = build(architecture, preset(architecture, "paper"), vocabulary=32_000)
    count = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert 47e6 <= count <= 61e6
    for size in PRESETS["paper"].values():
        assert size.layers % size.regions == 0


def test_hybrid_has_attention_in_every_fourth_block():
    kinds = [any(isinstance(m, Attention) for m in block.modules()) for block in small("hybrid", layers=8).blocks]
    assert kinds == [False, False, False, True] * 2


def test_start_predicts_evenly():
    """At the start the loss is near that of the even distribution, whatever the depth."""
    for architecture in ARCHITECTURES:
        model = build(architecture, preset(architecture))
        tokens = torch.randint(256, (2, 33))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(256), abs=0.6)


def test_names_that_do_not_exist():
    with pytest.raises(OptionError, match="architecture 'rnn'"):
        preset("rnn")
    with pytest.raises(OptionError, match="of size 'huge'"):
        preset("mamba2", "huge")
    with pytest.raises(OptionError, match="architecture 'rnn'"):
        build("rnn", preset("mamba2"))


def bounded(model, length, regions, interface):
    tokens = torch.randint(32, (2, length))
    made = lbi_compile.transform(model, tokens, regions=regions, r=16, interface=interface)
    report = lbi_compile.verify(made, tokens)
    assert report.ok, report
    assert report.leak is False
    return made


def test_bounded():
    made = bounded(small("transformer", layers=2), 24, 2, "token")
    assert (made.plan.interface, made.plan.readout) == ("token", "sum")


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["token", "chunked"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bounded_in_four_regions(architecture, interface):
    made = bounded(small(architecture), 40, 4, interface)
    assert (made.plan.interface, made.plan.readout) == (interface, "sum")
    assert len(made.plan.regions) == 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_loop_is_unrolled(architecture):
    """A tiny model has few nodes, and as many at any length."""
    model = build(architecture, preset(architecture))
    graph = capture(model, as_inputs(model, torch.randint(256, (2, 128)))).graph_module.graph
    assert len(graph.nodes) <= MOST_NODES[architecture]
