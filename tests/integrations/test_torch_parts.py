"""Parts of torch around a bounded model: mixed precision, recomputation, optimizers, export, compiled modes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from lbi_compile import BatchCouplingError, BoundedModule, ExampleInputsError, NotBuiltError, transform
from tests.models import ResidualMLP
from tests.small_models import close, gradients, mlp, same, small


def steps(bounded: BoundedModule, x: torch.Tensor, count: int, *, scale: bool = True, poison: int = -1) -> list[float]:
    """Train with bfloat16 and loss scaling; the loss of step ``poison`` is infinite."""
    optimizer = torch.optim.SGD(bounded.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scale)
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = bounded(x).float().square().mean()
        scaler.scale(loss * (float("inf") if step == poison else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(bounded.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("engine", ["autograd", "chain", pytest.param("scan", marks=pytest.mark.slow)])
def test_autocast_and_loss_scaling(engine):
    _, x, bounded = small(backward=engine)
    plain = copy.deepcopy(bounded)
    scaled = steps(bounded, x, 3)
    assert bounded.engine.name == engine
    # a power of two scales without rounding
    assert scaled == steps(plain, x, 3, scale=False)
    assert scaled[-1] < scaled[0]


def test_a_step_with_infinite_gradients_is_skipped():
    _, x, bounded = small(backward="autograd")
    losses = steps(bounded, x, 3, poison=1)
    assert losses[0] > losses[1] == losses[2]


class Checkpointed(ResidualMLP):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@pytest.mark.parametrize("engine", ["autograd", pytest.param("scan", marks=pytest.mark.slow)])
def test_checkpoint_inside_regions(engine):
    plain = ResidualMLP(5, width=8, depth=3, classes=3).double()
    recomputing = Checkpointed(5, width=8, depth=3, classes=3).double()
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(5, 5, dtype=torch.float64)
    made = [transform(model, x, regions=3, r=4, backward=engine) for model in (plain, recomputing)]
    outs = [bounded(x) for bounded in made]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)
    close(gradients(made[0], outs[0]), gradients(made[1], outs[1]))
    assert made[1].engine.name == engine


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_fused_and_foreach_optimizers_with_a_schedule(options):
    _, x, bounded = small(backward="autograd")
    bounded.double()
    x, twin = x.double(), copy.deepcopy(bounded)
    for module, how in ((bounded, options), (twin, {"foreach": False})):
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2, **how)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
            schedule.step()
    named = dict(twin.named_parameters())
    for name, p in bounded.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-10, atol=1e-12, msg=name)


def test_a_bounded_model_says_what_it_takes():
    model, x, bounded = small()
    twin = copy.deepcopy(bounded)
    for made in (bounded, twin):
        assert inspect.signature(made.forward) == inspect.signature(model.forward)
        assert type(made).__name__ == "BoundedModule"
        assert isinstance(made, BoundedModule)
    assert same(gradients(bounded, bounded(x)), gradients(twin, twin(x)))
    with pytest.raises(ExampleInputsError, match="missing 1 required"):
        bounded()


def test_export_for_inference():
    _, x, bounded = small()
    bounded.eval()
    with pytest.raises(NotBuiltError, match="called in evaluation mode"):
        torch.export.export(bounded, (x,))
    with torch.no_grad():
        bounded(x)
        program = torch.export.export(bounded, (x,), dynamic_shapes={"x": {0: Dim.DYNAMIC}})
        other = torch.randn(7, 5)
        assert torch.equal(program.module()(other), bounded(other))
    assert not any("lbi" in str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "lbi"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modes_of_torch_compile(mode, backend):
    torch.use_deterministic_algorithms(False)  # autotuning refuses it
    _, x, bounded = small()
    bounded.double()
    x = x.double()
    with bounded.with_engine("autograd"):
        expected = gradients(bounded, bounded(x))
    compiled = torch.compile(bounded, backend=backend, mode=mode)
    close(gradients(bounded, compiled(x)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestQuantisation:
    def prepared(self) -> tuple[nn.Module, torch.Tensor]:
        from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

        model, x = mlp().train(), torch.randn(5, 5)
        model.qconfig = get_default_qat_qconfig("fbgemm")
        prepare_qat(model, inplace=True)
        model(x)
        return model, x

    def test_quantisation_aware_training_is_exact_as_a_chain(self):
        model, x = self.prepared()
        state = copy.deepcopy(model.state_dict())
        bounded = transform(model, x, regions=3, r=4)
        found = {}
        for engine in ("autograd", "chain"):
            model.load_state_dict(state)
            with bounded.with_engine(engine):
                found[engine] = gradients(bounded, bounded(x)), copy.deepcopy(model.state_dict())
        assert same(found["autograd"][0], found["chain"][0])
        seen = [{name: v for name, v in each.items() if "max_val" in name} for _, each in found.values()]
        assert seen[0]
        assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
        # the ranges of activations are learnt from bounded calls too
        assert any(not torch.equal(seen[0][name], state[name]) for name in seen[0])

    def test_and_refused_by_the_scan_since_ranges_mix_samples(self):
        model, x = self.prepared()
        with pytest.raises(BatchCouplingError, match="fake_quant"):
            transform(model, x, regions=3, r=4, backward="scan")

    def test_a_quantised_model_runs_as_it_did(self):
        model, x = mlp().eval(), torch.randn(5, 5)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        bounded = transform(quantised, x, regions=3, interface="identity")
        with torch.no_grad():
            assert torch.equal(bounded(x), quantised(x))
