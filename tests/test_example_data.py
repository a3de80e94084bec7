"""Text, tokens and windows of the examples, and their tasks against slow solvers."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

from lbi_compile.errors import CorpusError, OptionError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import data
from tasks import ELEMENTS, UNASKED, LastAsked, PointerChasing, TwoHopRecall, WordProblem


def write(folder, **contents):
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_bytes(content)
    return paths


def test_library_is_read_in_a_fixed_order_and_split_by_file(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "site-packages" / "a.py").write_text("not the library")
    (tmp_path / "package" / "a.py").write_text("last")
    (tmp_path / "empty.py").write_text("")
    for i in reversed(range(20)):
        (tmp_path / f"m{i:02}.py").write_text(str(i))
    text = data.library(tmp_path)
    assert text.held_out == (b"9", b"19")
    assert text.train == (*(str(i).encode() for i in range(20) if i % 10 != 9), b"last")
    assert data.library(tmp_path, most=5).train == (b"0", b"1", b"2", b"3")
    assert data.library(tmp_path, most=5).held_out == (b"4",)


def test_library_of_this_python():
    text = data.library(most=200_000)
    assert text == data.library(most=200_000)
    assert 200_000 <= sum(map(len, text.train + text.held_out)) < 400_000
    assert not set(text.train) & set(text.held_out)


def test_no_library(tmp_path):
    with pytest.raises(CorpusError, match="0 Python files"):
        data.library(tmp_path)


def test_files(tmp_path):
    paths = write(tmp_path, b=b"bb", a=b"aa")
    assert data.files(paths).train == (b"bb",)
    assert data.files([tmp_path]).train == (b"aa",)
    one = data.files(write(tmp_path, c=bytes(range(100))))
    assert (len(one.train[0]), one.train[0] + one.held_out[0]) == (90, bytes(range(100)))
    with pytest.raises(CorpusError, match=r"no file .*missing"):
        data.files([tmp_path / "missing.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"no \*\.txt"):
        data.files([tmp_path / "empty"])


def test_bytes():
    tokens = data.corpus(data.Text((b"ab", b"\xff"), (b"c",), ""), data.ByteTokens())
    assert tokens.train.tolist() == [97, 98, 10, 255, 10]
    assert tokens.held_out.tolist() == [99, 10]
    assert (tokens.vocabulary, tokens.lengths.unique().tolist()) == (256, [1])


def test_pairs(tmp_path):
    pytest.importorskip("tokenizers")
    documents = ["the cat, the dog, the naïve 鳥\n".encode() * 20, b"the other \xff"]
    pairs = data.PairTokens.train(documents, 300)
    again = data.PairTokens.train(documents, 300)
    tokens = pairs.encode(documents)
    assert 256 < len(pairs.lengths) <= 300
    assert tokens.tolist() == again.encode(documents).tolist()
    text = "".join(document.decode(errors="replace") + "\n" for document in documents)
    assert pairs.tokenizer.decode(tokens.tolist()) == text
    assert pairs.lengths[tokens].sum() == len(text.encode())
    assert len(tokens) < len(text.encode()) / 2
    pairs.save(tmp_path / "tokenizer.json")
    loaded = data.PairTokens.load(tmp_path / "tokenizer.json")
    assert loaded.encode(documents).tolist() == tokens.tolist()
    with pytest.raises(OptionError, match="100 tokens"):
        data.PairTokens.train(documents, 100)


def test_pairs_hold_what_they_were_not_trained_on():
    pytest.importorskip("tokenizers")
    pairs = data.PairTokens.train([b"aaaa"], 260)
    every = "".join(map(chr, range(1, 0x500))).encode()
    assert pairs.lengths[pairs.encode([every])].sum() == len(every) + 1


def test_fingerprint_tells_data_apart():
    def fingerprint(train, held_out):
        return data.corpus(data.Text((train,), (held_out,), ""), data.ByteTokens()).fingerprint

    assert fingerprint(b"a", b"b") == fingerprint(b"a", b"b")
    assert len({fingerprint(b"a", b"b"), fingerprint(b"b", b"a"), fingerprint(b"a", b"c")}) == 3


def test_missing_package():
    with pytest.raises(data.PackageError, match=r"(?s)no package 'no_such'.*no_such for tests.*pip install no_such"):
        data.package("no_such.part", needed_for="tests")


def test_fineweb_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.PackageError, match="pip install datasets"):
        data.fineweb()


@pytest.mark.filterwarnings("ignore")  # what datasets and its dependencies warn of is theirs
def test_fineweb_from_parquet(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = 205
    columns = {
        "text": [f"page {i} ü" for i in range(count)],
        "id": [f"<urn:uuid:{i}>" for i in range(count)],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": ["https://example.org"] * count,
        "language_score": [0.9] * count,
        "token_count": [3] * count,
    }
    path, other = tmp_path / "pages.parquet", tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    text = data.fineweb([path])
    pages = [f"page {i} ü".encode() for i in range(count)]
    assert text.held_out == (pages[99], pages[199])
    assert text.train == tuple(page for page in pages if page not in text.held_out)
    assert data.fineweb([path], most=25).train == tuple(pages[:2])
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), other)
    with pytest.raises(CorpusError, match="KeyError: 'text'"):
        data.fineweb([other])
    with pytest.raises(CorpusError, match="name parquet files of the same schema"):
        data.fineweb([tmp_path / "missing.parquet"])


def test_windows_cover_an_epoch_once():
    windows = data.Windows(torch.arange(1003), length=10, seed=3)
    assert windows.epoch == 99
    offsets = []
    for epoch in range(3):
        inputs, targets = windows.batch(epoch * windows.epoch, windows.epoch)
        assert torch.equal(targets, inputs + 1)
        starts = inputs[:, 0].sort().values
        assert (starts.diff() == 10).all()
        assert inputs.flatten().unique().numel() == 990
        assert not torch.equal(starts, inputs[:, 0])
        offsets.append(int(starts[0]))
    assert len(set(offsets)) > 1


def test_windows_depend_on_the_position_alone():
    windows, again = (data.Windows(torch.arange(500), length=7, seed=1) for _ in range(2))
    whole = windows.batch(0, 300)[0]  # five epochs
    for position in (299, 5, 140, 0):
        assert torch.equal(again.batch(position, 1)[0], whole[position : position + 1])
    assert torch.equal(torch.cat([again.batch(p, 6)[0] for p in range(0, 300, 6)]), whole)
    assert not torch.equal(data.Windows(torch.arange(500), length=7, seed=2).batch(0, 300)[0], whole)


def test_windows_fit_whatever_the_number_of_tokens():
    for count in range(10, 40):
        windows = data.Windows(torch.arange(count), length=5)
        for epoch in range(20):
            assert windows.batch(epoch * windows.epoch, windows.epoch)[1].max() < count
    with pytest.raises(CorpusError, match="9 tokens"):
        data.Windows(torch.arange(9), length=5)


def solve_pointer_chasing(task, inputs):
    tokens = inputs.tolist()
    mark = tokens.index(task.nodes)
    follows = dict(zip(tokens[:mark:2], tokens[1:mark:2], strict=True))
    answers = [UNASKED] * (mark + 1)
    for start in tokens[mark + 1 :]:
        for _ in range(task.hops):
            start = follows[start]
        answers.append(start)
    return answers


def solve_word_problem(task, inputs):
    things, answers = list("abcde"), []
    numbers = {element: i for i, element in enumerate(itertools.permutations(range(5)))}
    for token in inputs.tolist():
        element = next(element for element, i in numbers.items() if i == token)
        # the thing at place p moves to place element[p]
        moved = list(things)
        for place, thing in enumerate(things):
            moved[element[place]] = thing
        things = moved
        answers.append(numbers[tuple(things.index(thing) for thing in "abcde")])
    return answers


def solve_two_hop_recall(task, inputs):
    tokens = inputs.tolist()
    mark = tokens.index(task.vocabulary - 1)
    pairs = list(zip(tokens[:mark:2], tokens[1:mark:2], strict=True))
    answers = [UNASKED] * (mark + 1)
    for key in tokens[mark + 1 :]:
        (bridge,) = [second for first, second in pairs if first == key]
        (value,) = [second for first, second in pairs if first == bridge]
        answers.append(value)
    return answers


TASKS = [
    (PointerChasing(nodes=7, hops=1, queries=7), solve_pointer_chasing),
    (PointerChasing(nodes=10, hops=5, queries=3), solve_pointer_chasing),
    (WordProblem(letters=20), solve_word_problem),
    (WordProblem(letters=20, swaps=True), solve_word_problem),
    (TwoHopRecall(keys=6, values=4, queries=5), solve_two_hop_recall),
]


@pytest.mark.parametrize(("task", "solve"), TASKS)
def test_task_equals_slow_solver(task, solve):
    inputs, targets = task.batch(0, 50)
    assert inputs.shape == targets.shape == (50, task.length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.min() >= 0
    assert inputs.max() < task.vocabulary
    assert targets.max() < task.vocabulary
    assert targets[targets >= 0].unique().numel() > 3
    for row, expected in zip(inputs, targets, strict=True):
        assert solve(task, row) == expected.tolist()


@pytest.mark.parametrize("task", [task for task, _ in TASKS])
def test_task_depends_on_seed_and_position_alone(task):
    inputs, targets = task.batch(0, 12)
    for position in (7, 0, 11):
        one = task.batch(position, 1)
        assert torch.equal(one[0][0], inputs[position])
        assert torch.equal(one[1][0], targets[position])
    rows = {tuple(row) for row in inputs.tolist()}
    assert len(rows) == 12
    for other in (task.held_out(), dataclasses.replace(task, seed=1)):
        assert not rows & {tuple(row) for row in other.batch(0, 12)[0].tolist()}


@pytest.mark.parametrize("task", [task for task, _ in TASKS])
def test_the_last_answers_alone_are_asked_for(task):
    (inputs, targets), (same, fewer) = task.batch(3, 5), LastAsked(task, 2).batch(3, 5)
    assert torch.equal(inputs, same)
    for row, left in zip(targets.tolist(), fewer.tolist(), strict=True):
        asked = [at for at, target in enumerate(row) if target != UNASKED]
        assert left == [target if at in asked[-2:] else UNASKED for at, target in enumerate(row)]


def test_hops_are_not_answered_by_a_shorter_walk():
    task = PointerChasing(nodes=16, hops=4, queries=16)
    targets, fewer = task.batch(0, 100)[1], dataclasses.replace(task, hops=3).batch(0, 100)[1]
    asked = targets >= 0
    assert (targets == fewer)[asked].float().mean() < 0.15


def test_words_reach_every_element():
    assert len(ELEMENTS) == 120
    assert WordProblem(letters=40, swaps=True).batch(0, 200)[1].unique().numel() == 120
    assert WordProblem(letters=40, swaps=True).batch(0, 20)[0].unique().numel() == 4


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (PointerChasing, {"nodes": 0}),
        (PointerChasing, {"hops": 0}),
        (PointerChasing, {"nodes": 3, "queries": 4}),
        (WordProblem, {"letters": 0}),
        (TwoHopRecall, {"values": 0}),
        (TwoHopRecall, {"keys": 3, "queries": 4}),
    ],
)
def test_sizes_that_make_no_task(task, options):
    with pytest.raises(OptionError):
        task(**options)
