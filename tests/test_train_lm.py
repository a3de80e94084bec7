"""The training example: schedule, accumulation, judging, exact resume, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lbi_compile
from lbi_compile.errors import OptionError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_lm
from data import PackageError, Windows
from models import build, preset
from run_folder import CHECKPOINT, CURVES, METRICS, Log, State, draw_curves
from tasks import WordProblem
from training import DENSE, DivergedError, Settings, evaluate, make_model, make_optimizer, rate_at, train

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = Settings(steps=6, batch=2, learning_rate=1e-2, warmup=2, evaluate_every=2, evaluate_on=3)


def dropping():
    """A model that draws random numbers in every forward."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Dropout(0.5), nn.Linear(8, 7))


def windows(seed=0):
    tokens = torch.randint(7, (200,), generator=torch.Generator().manual_seed(seed))
    return Windows(tokens, length=9, seed=seed)


def in_bounds():
    settings = dataclasses.replace(SHORT, interface="token", layers=2, regions=2, r=4, length=9)
    return make_model(settings, torch.randint(7, (2, 9)), vocabulary=7)


def state_of(model, folder):
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in Log(folder).rows()]
    saved = torch.load(folder / CHECKPOINT, weights_only=True)
    saved.pop("seconds")
    return model.state_dict(), rows, saved


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("make", [dropping, in_bounds])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, make):
    """Weights, optimizer, random state and figures are equal bit for bit, wherever the run was stopped or killed."""
    options = {"quiet": True, "checkpoint_every": 2}
    model = make()
    train(model, windows(), windows(1), SHORT, folder=tmp_path / "whole", **options)
    whole = state_of(model, tmp_path / "whole")
    assert [row["step"] for row in whole[1]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]

    parts = tmp_path / "parts"
    train(make(), windows(), windows(1), SHORT, folder=parts, stop_after=1, **options)
    torch.rand(11)
    train(make(), windows(), windows(1), SHORT, folder=parts, stop_after=4, resume=True, **options)
    # killed in step 6: rows of steps after the checkpoint are there, the last one cut off
    with (parts / METRICS).open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    torch.rand(5)
    model = make()
    result = train(model, windows(), windows(1), SHORT, folder=parts, resume=True, **options)
    assert_same(state_of(model, parts), whole)
    assert (result.step, result.held_out) == (6, {k: v for k, v in whole[1][-1].items() if k != "step"})


def test_dropout_matters_in_that_test(tmp_path):
    """Without the random state, the resumed run would be another one."""
    torch.manual_seed(0)
    model, options = dropping(), {"quiet": True}
    train(model, windows(), windows(1), SHORT, folder=tmp_path / "a", **options)
    first = Log(tmp_path / "a").rows()
    model = dropping()
    torch.manual_seed(1)
    train(model, windows(), windows(1), SHORT, folder=tmp_path / "b", **options)
    assert Log(tmp_path / "b").rows() != first


def test_a_finished_run_stays_as_it_is(tmp_path):
    train(dropping(), windows(), windows(1), SHORT, folder=tmp_path, quiet=True)
    before = (tmp_path / METRICS).read_text()
    result = train(dropping(), windows(), windows(1), SHORT, folder=tmp_path, resume=True, quiet=True)
    assert (result.step, result.engine, (tmp_path / METRICS).read_text()) == (6, "", before)
    assert result.held_out["held_out"] == Log(tmp_path).rows()[-1]["held_out"]


def test_a_checkpoint_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    model = dropping()
    state = State(model, make_optimizer(model, SHORT), {})
    state.step = 3
    state.save(tmp_path / CHECKPOINT)

    def breaks(value, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        state.save(tmp_path / CHECKPOINT)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 3


def test_runs_that_must_not_go_on(tmp_path):
    options = {"folder": tmp_path, "quiet": True}
    train(dropping(), windows(), windows(1), SHORT, fingerprint="a", stop_after=2, **options)
    with pytest.raises(OptionError, match="add --resume"):
        train(dropping(), windows(), windows(1), SHORT, fingerprint="a", **options)
    with pytest.raises(OptionError, match=r"data='a' .now 'b'."):
        train(dropping(), windows(), windows(1), SHORT, fingerprint="b", resume=True, **options)
    other = dataclasses.replace(SHORT, seed=1, learning_rate=1.0)
    with pytest.raises(OptionError, match=r"learning_rate=0\.01 .now 1\.0., seed=0 .now 1."):
        train(dropping(), windows(), windows(1), other, fingerprint="a", resume=True, **options)


def test_a_diverged_run_ends(tmp_path):
    model = dropping()
    with torch.no_grad():
        model[2].weight.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"loss nan .* at step 1"):
        train(model, windows(), windows(1), SHORT, folder=tmp_path, quiet=True)
    assert not (tmp_path / CHECKPOINT).exists()


def test_rate():
    settings = Settings(learning_rate=2.0, warmup=10, steps=110, last_rate=0.1)
    rates = [rate_at(step, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_only_matrices_decay():
    model = build("mamba3-mimo", dataclasses.replace(preset("mamba3-mimo"), layers=1))
    pulled, free = make_optimizer(model, Settings(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (pulled["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {names[id(parameter)].removeprefix("blocks.0.branch.") for parameter in pulled["params"]} == {
        "embedding.weight",
        "input.weight",
        "output.weight",
    }
    assert len(pulled["params"]) + len(free["params"]) == len(names)


class Uneven:
    """Sequences of which each has another number of targets."""

    def batch(self, position, size):
        inputs = torch.arange(position, position + size)[:, None] + torch.arange(9)
        targets = (inputs + 1) % 7
        for i, row in enumerate(targets):
            row[: (position + i) % 8] = -100
        return inputs % 7, targets


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """A step's loss is the mean over its targets, however it is put into forwards, and clipping sees all of it."""
    settings = dataclasses.replace(SHORT, steps=3, clip=0.1)
    models, rows = [], []
    for name, batch, accumulate in (("one", 12, 1), ("three", 4, 3)):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7)))
        chosen = dataclasses.replace(settings, batch=batch, accumulate=accumulate)
        train(models[-1], Uneven(), Uneven(), chosen, folder=tmp_path / name, quiet=True)
        rows.append([row for row in Log(tmp_path / name).rows() if "loss" in row])
    for one, three in zip(*rows, strict=True):
        assert one["norm"] > settings.clip
        assert three == pytest.approx(one, rel=1e-5)
    for one, three in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


def test_local_rules_teach_and_are_told_what_they_cannot(tmp_path):
    settings = dataclasses.replace(SHORT, steps=2, layers=2, regions=2, batch=2, accumulate=2, credit="sid")
    example = torch.zeros(2, settings.positions, dtype=torch.long)
    model = make_model(settings, example, vocabulary=20)
    assert model.credit.kind == "sid"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, windows(), windows(1), settings, folder=tmp_path / "run", quiet=True)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(OptionError, match="a compiled model"):
        train(model, windows(), windows(1), settings, folder=tmp_path / "other", quiet=True, run=lambda x: model(x))
    with pytest.raises(OptionError, match="of a dense model"):
        make_model(dataclasses.replace(settings, interface=DENSE), example, vocabulary=20)


def test_judging_counts_tokens_and_their_bytes():
    torch.manual_seed(0)
    model, source = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7)), Uneven()
    lengths = torch.tensor([1, 2, 3, 1, 2, 3, 4])
    inputs, targets = source.batch(0, 5)
    asked = targets >= 0
    losses = F.cross_entropy(model(inputs)[asked], targets[asked], reduction="none")
    size = lengths[targets[asked]].sum().item()
    # five sequences in batches of two: the sixth must not count
    found = evaluate(model, source, dataclasses.replace(SHORT, evaluate_on=5), lengths=lengths)
    assert found == pytest.approx(
        {
            "held_out": losses.mean().item(),
            "accuracy": (model(inputs)[asked].argmax(-1) == targets[asked]).float().mean().item(),
            "nats_per_byte": losses.sum().item() / size,
            "bits_per_byte": losses.sum().item() / size / math.log(2),
        }
    )
    assert set(evaluate(model, source, SHORT)) == {"held_out", "accuracy"}


def test_judging_takes_no_more_windows_than_there_are():
    model, source = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7)), windows()
    every = evaluate(model, source, dataclasses.replace(SHORT, evaluate_on=source.epoch, batch=4))
    assert evaluate(model, source, dataclasses.replace(SHORT, evaluate_on=1000, batch=4)) == every


def test_a_task_is_learned(tmp_path):
    """The first product of a word is its first letter: the loss falls below that of guessing."""
    task = WordProblem(letters=4)
    settings = dataclasses.replace(
        SHORT, steps=40, batch=32, warmup=5, layers=2, interface=DENSE, evaluate_every=40, evaluate_on=64
    )
    model = make_model(settings, task.batch(0, 2)[0], vocabulary=task.vocabulary)
    train(model, task, task.held_out(), settings, folder=tmp_path, quiet=True)
    assert Log(tmp_path).rows()[-1]["held_out"] < math.log(120) - 0.3


def test_seed_decides_weights_of_every_arm():
    example = torch.randint(7, (2, 9))
    dense = dataclasses.replace(SHORT, interface=DENSE, layers=2)
    first, again = (make_model(dense, example, vocabulary=7).state_dict() for _ in range(2))
    assert_same(first, again)
    other = make_model(dataclasses.replace(dense, seed=1), example, vocabulary=7).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    train(dropping(), windows(), windows(1), SHORT, folder=tmp_path, quiet=True)
    assert draw_curves(tmp_path) == tmp_path / CURVES
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")


def test_curves_without_their_package(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PackageError, match="pip install matplotlib"):
        draw_curves(tmp_path)


def options(text):
    return train_lm.parser().parse_args(text.split())


@pytest.mark.parametrize(
    ("text", "interface", "layers"),
    [
        ("", "auto", None),
        ("--interface token --layers 3", "token", 3),
        ("--layers-shallow", DENSE, 2),
        ("--layers-shallow 3 --interface dense", DENSE, 3),
        ("mamba2 --size paper --layers-shallow", DENSE, 2),
        ("--regions 2 --layers-shallow", DENSE, 4),
    ],
)
def test_arms_of_the_command_line(text, interface, layers):
    settings = train_lm.read_settings(options(text), torch.device("cpu"))
    assert (settings.interface, settings.layers, settings.bf16) == (interface, layers, False)


def test_options_that_contradict_each_other(capsys):
    assert train_lm.main(["--layers-shallow", "--interface", "token"]) == 2
    assert train_lm.main(["--layers-shallow", "--layers", "2"]) == 2
    assert capsys.readouterr().err.count("leave the other out") == 2


def test_every_setting_has_its_option():
    parsed = vars(options("--precision bf16"))
    assert {field.name for field in dataclasses.fields(Settings)} - {"bf16"} <= parsed.keys()
    assert train_lm.read_settings(options("--precision bf16"), torch.device("cpu")) == Settings(bf16=True)


def test_command_line(tmp_path):
    """As a script, dense, on a text file: it prints lines where no terminal is, and the loss falls."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = f"--text {text} --interface dense --layers 1 --length 32 --steps 40 --warmup 2 --batch 8 --evaluate-on 8"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_lm.py", *command.split(), "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("step ") == 20
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 5
    assert losses[-1] < 2.5
    assert f"bits_per_byte: {rows[-1]['held_out'] / math.log(2):.4g}" in done.stdout


def test_pairs_on_the_command_line(tmp_path):
    """A run that goes on keeps its tokens; bits per byte count the bytes of the text, not the tokens."""
    pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = f"--text {text} --bpe 280 --interface dense --layers 1 --length 16 --steps 4 --batch 2 --out {tmp_path}"
    assert train_lm.main([*command.split(), "--stop-after", "2"]) == 0
    assert train_lm.main([*command.split(), "--resume"]) == 0
    last = Log(tmp_path).rows()[-1]
    assert last["step"] == 4
    assert last["bits_per_byte"] < last["held_out"] / math.log(2) / 1.5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["transformer", "mamba3"])
@pytest.mark.parametrize("interface", ["token", "chunked", "zero", "self"])
def test_bounded_models_learn(tmp_path, architecture, interface, capsys):
    command = f"{architecture} --interface {interface} --layers 4 --regions 2 --length 32 --steps 30 --batch 8"
    assert train_lm.main([*command.split(), "--warmup", "3", "--bytes", "200000", "--out", str(tmp_path)]) == 0
    losses = [row["loss"] for row in Log(tmp_path / "run").rows() if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert "engine: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("interface", [DENSE, "token"])
def test_compiled(tmp_path, interface):
    """The compiled run has the losses of the plain one."""
    command = f"--interface {interface} --layers 2 --regions 2 --length 16 --steps 5 --batch 4 --bytes 200000"
    assert train_lm.main([*command.split(), "--out", str(tmp_path / "plain")]) == 0
    assert train_lm.main([*command.split(), "--out", str(tmp_path / "fast"), "--compile"]) == 0
    plain, fast = ([r["loss"] for r in Log(tmp_path / n).rows() if "loss" in r] for n in ("plain", "fast"))
    assert fast == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_bf16(tmp_path):
    """Autocast changes the loss by little, and what is kept stays float32."""
    for name, bf16 in (("wide", False), ("narrow", True)):
        settings = dataclasses.replace(SHORT, architecture="mamba3", layers=1, interface=DENSE, bf16=bf16)
        model = make_model(settings, torch.zeros(2, 9).long(), vocabulary=7)
        train(model, windows(), windows(1), settings, folder=tmp_path / name, quiet=True)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    wide, narrow = (Log(tmp_path / name).rows() for name in ("wide", "narrow"))
    assert wide != narrow
    assert narrow[0]["loss"] == pytest.approx(wide[0]["loss"], rel=0.02)


def test_a_bounded_model_shares_the_seeded_weights():
    """Bounded and dense arms of one seed start from the same weights."""
    example = torch.randint(7, (2, 9))
    dense = make_model(dataclasses.replace(SHORT, interface=DENSE, layers=2), example, vocabulary=7)
    bounded = in_bounds()
    assert isinstance(bounded, lbi_compile.BoundedModule)
    for name, parameter in dense.named_parameters():
        assert torch.equal(bounded.get_parameter(name), parameter)


def test_norms_of_jacobians_are_recorded_and_disturb_nothing(tmp_path):
    settings = dataclasses.replace(SHORT, layers=3, regions=3, interface="token", cell="linear", r=4)
    ended = []
    for name, every in (("with", 2), ("without", 0)):
        model = make_model(settings, torch.zeros(2, 9).long(), vocabulary=7)
        train(model, windows(), windows(1), settings, folder=tmp_path / name, norms_every=every, quiet=True)
        ended.append(model)
    for (key, a), (_, b) in zip(*(model.state_dict().items() for model in ended), strict=True):
        assert torch.equal(a, b), key
    told = {row["step"]: row["jacobians"] for row in Log(tmp_path / "with").rows() if "jacobians" in row}
    assert list(told) == [2, 4, 6]
    cell = ended[0].interface.get_parameter("cells.1.A").detach()
    assert told[6]["latent"]["norms"] == pytest.approx([float(torch.linalg.matrix_norm(cell, 2))], rel=1e-5)
    assert told[2]["latent"]["norms"] != told[6]["latent"]["norms"]
    dense = make_model(dataclasses.replace(settings, interface=DENSE), torch.zeros(2, 9).long(), vocabulary=7)
    with pytest.raises(OptionError, match="norms of interface Jacobians"):
        train(dense, windows(), windows(1), settings, folder=tmp_path / "dense", norms_every=2, quiet=True)
