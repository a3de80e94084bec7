"""Training programs around a bounded model: Accelerate, the Trainer of transformers, Lightning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lbi_compile import BoundedModule, transform
from tests.small_models import mlp, small

DATA = TensorDataset(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.ones(20, 3))


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    _, _, bounded = small(backward="autograd")
    optimizer = torch.optim.SGD(bounded.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer, loader, schedule = accelerator.prepare(
        bounded, optimizer, DataLoader(DATA, batch_size=10), schedule
    )
    expected = torch.autograd.grad((bounded(DATA.tensors[0]) - 1).square().mean(), list(bounded.parameters()))
    before = [p.detach().clone() for p in bounded.parameters()]
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward((prepared(x) - y).square().mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    # two batches of half the data make one step along the gradient of all of it
    for p, old, grad in zip(bounded.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p, old - 0.1 * grad, rtol=1e-5, atol=1e-6)
    assert accelerator.unwrap_model(prepared) is bounded
    kept = bounded.stem.weight.detach().clone()
    accelerator.save_state(tmp_path)
    nn.init.zeros_(bounded.stem.weight)
    accelerator.load_state(tmp_path)
    assert torch.equal(bounded.stem.weight, kept)
    assert not any(path.suffix in (".bin", ".pt") for path in tmp_path.glob("model*"))


def language_model(*, tied: bool) -> tuple[BoundedModule, Tensor]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, use_cache=False, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tokens = torch.randint(16, (8, 8))
    inputs = {"input_ids": tokens[:4], "labels": tokens[:4]}
    model = transformers.GPT2LMHeadModel(config)
    return transform(model, inputs, regions=2, r=4, backward="autograd"), tokens


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_trainer_of_transformers(tmp_path, tied):
    bounded, tokens = language_model(tied=tied)
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    class WholeTrainer(Trainer):
        """Writes tied weights twice; the Trainer refuses shared ones in a model that is no PreTrainedModel."""

        def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
            super()._save(output_dir, {name: value.clone() for name, value in self.model.state_dict().items()})

    data = [{"input_ids": row, "labels": row, "of_no_use": torch.zeros(())} for row in tokens]

    def train(model: nn.Module, steps: int, resume: Path | None = None) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            use_cpu=True, logging_steps=1, save_steps=2, eval_strategy="steps", eval_steps=2, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = (WholeTrainer if tied else Trainer)(
            model=model, args=arguments, train_dataset=data, eval_dataset=data
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    trainer = train(bounded, 4)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert all(torch.isfinite(torch.tensor(float(loss))) for loss in losses)
    assert [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]

    again, _ = language_model(tied=tied)
    again.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    bounded.eval(), again.eval()
    assert torch.equal(again(tokens).logits, bounded(tokens).logits)
    resumed, _ = language_model(tied=tied)
    assert train(resumed, 6, tmp_path / "checkpoint-2").state.global_step == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Fit(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    _, _, bounded = small(backward="autograd")
    trainer = lightning.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=True,
        default_root_dir=tmp_path, gradient_clip_val=1.0,
    )  # fmt: skip
    loader = DataLoader(DATA, batch_size=10)
    before = (bounded(DATA.tensors[0]) - 1).square().mean()
    trainer.fit(Fit(bounded), loader, loader)
    assert trainer.callback_metrics["val_loss"] < before
    _, x, other = small(backward="autograd")
    Fit.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, net=other)
    assert torch.equal(other(x), bounded(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_is_a_model():
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Whole(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.example_input_array = mlp(), torch.randn(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Whole()
    bounded = transform(module, regions=3, r=4)
    assert bounded(module.example_input_array).shape == (3, 3)
    assert bounded.net.stem.weight is module.net.stem.weight
