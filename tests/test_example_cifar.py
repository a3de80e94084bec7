"""CIFAR from small files of the published formats: both versions, splits, wrong classes, and files that are none."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import numpy
import pytest
import torch

from lbi_compile.errors import CorpusError, OptionError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import local_credit
from cifar import PIXELS, CifarPictures, read_binary, read_pickle
from result_rows import Rows

TEN = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def pictures(count, seed, classes=10):
    draw = numpy.random.default_rng(seed)
    return draw.integers(0, 256, (count, PIXELS), dtype=numpy.uint8), draw.integers(0, classes, count).tolist()


def as_published(x, y):
    """The bytes of a batch as Python 2 and its numpy wrote them, opcode by opcode."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    number = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNN"
    number += 2 * (b"J" + struct.pack("<i", -1)) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    array += b"(K\x01K" + bytes([len(x)]) + b"M" + struct.pack("<H", PIXELS) + b"\x86" + number + b"\x89"
    array += b"T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([one]) for one in y) + b"e"
    names = b"](" + short(b"leptodactylus_pentadactylus_s_000004.png") + b"e"
    parts = [(b"batch_label", short(b"training batch 1 of 5")), (b"labels", labels), (b"data", array)]
    return b"\x80\x02}(" + b"".join(short(key) + value for key, value in [*parts, (b"filenames", names)]) + b"u."


def by_python(x, y, labels=b"labels"):
    return pickle.dumps({labels: y, b"data": x}, protocol=2)


def binary(x, y, coarse=False):
    return b"".join((b"\x07" if coarse else b"") + bytes([one]) + row.tobytes() for row, one in zip(x, y, strict=True))


def written(folder, write, suffix="", names=TEN, classes=10, count=20):
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        (folder / f"{name}{suffix}").write_bytes(write(*pictures(count, seed, classes)))
    return folder


@pytest.mark.parametrize("write", [as_published, by_python])
def test_a_pickle_is_read_as_numpy_reads_it(tmp_path, write):
    x, y = pictures(5, 3)
    path = tmp_path / "data_batch_1"
    path.write_bytes(write(x, y))
    known = pickle.loads(path.read_bytes(), encoding="bytes")
    found = read_pickle(path)
    assert found.x.dtype == torch.uint8
    assert torch.equal(found.x, torch.from_numpy(known[b"data"]))
    assert found.y.tolist() == known[b"labels"] == y


def test_a_binary_is_read(tmp_path):
    x, y = pictures(5, 3)
    for coarse in (False, True):
        (tmp_path / "it.bin").write_bytes(binary(x, y, coarse))
        found = read_binary(tmp_path / "it.bin", before=2 if coarse else 1)
        assert torch.equal(found.x, torch.from_numpy(x))
        assert found.y.tolist() == y


class _Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "data_batch_1"
    x, y = pictures(2, 0)
    path.write_bytes(pickle.dumps({b"data": x, b"labels": y, b"filenames": _Harm(mark)}, protocol=2))
    with pytest.raises(CorpusError, match="no part of pictures and classes"):
        read_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # it would have been
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({b"labels": [1]}),
        by_python(numpy.zeros((2, 7), numpy.uint8), [1, 2]), by_python(numpy.zeros((2, PIXELS), numpy.uint8), [1]),
        by_python(numpy.zeros((1, PIXELS), object), [1]), by_python(numpy.zeros((1, PIXELS), numpy.float32), [1]),
        by_python(numpy.zeros((1, PIXELS), numpy.uint8), ["cat"]),
    ],
)  # fmt: skip
def test_pickles_that_are_no_batch(tmp_path, content):
    (tmp_path / "it").write_bytes(content)
    with pytest.raises(CorpusError):
        read_pickle(tmp_path / "it")


@pytest.mark.parametrize("content", [b"", bytes(PIXELS), bytes(PIXELS + 2)])
def test_binaries_that_are_no_batch(tmp_path, content):
    (tmp_path / "it.bin").write_bytes(content)
    with pytest.raises(CorpusError):
        read_binary(tmp_path / "it.bin")


def test_splits(tmp_path):
    made = [written(tmp_path / "py", as_published), written(tmp_path / "bin", binary, ".bin")]
    tasks = [CifarPictures(folder=folder) for folder in made]
    assert [(task.classes, task.features, task.name) for task in tasks] == 2 * [(10, PIXELS, "cifar-10")]
    for name, count in (("train", 90), ("validation", 10), ("test", 20)):
        a, b = (task.split(name) for task in tasks)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert a.x.shape == (count, PIXELS)
    train = tasks[0].split("train")
    torch.testing.assert_close(train.x.mean(0), torch.zeros(PIXELS), rtol=0, atol=1e-5)
    every = torch.cat([tasks[0]._read(name).x for name in ("train", "validation", "test")])
    assert len(every.unique(dim=0)) == 120
    wrong = CifarPictures(folder=made[0], wrong=0.4, seed=2)
    assert 0.2 < float((wrong.split("train").y != train.y).double().mean()) < 0.6
    assert torch.equal(wrong.split("test").y, tasks[0].split("test").y)


def test_hundred_classes(tmp_path):
    made = [
        written(tmp_path / "py", lambda x, y: by_python(x, y, b"fine_labels"), names=["train", "test"], classes=100),
        written(tmp_path / "bin", lambda x, y: binary(x, y, True), ".bin", names=["train", "test"], classes=100),
    ]
    tasks = [CifarPictures(folder=folder) for folder in made]
    assert [task.name for task in tasks] == ["cifar-100", "cifar-100"]
    assert torch.equal(tasks[0].split("train").y, tasks[1].split("train").y)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CorpusError, match="no CIFAR"):
        CifarPictures(folder=tmp_path)
    folder = written(tmp_path / "py", by_python)
    with pytest.raises(OptionError):
        CifarPictures(folder=folder, wrong=1.0)
    (folder / "test_batch").write_bytes(by_python(pictures(1, 0)[0], [10]))
    with pytest.raises(CorpusError, match="from 0 to 9"):
        CifarPictures(folder=folder).split("test")


def test_the_comparison_on_cifar(tmp_path, capsys):
    folder = written(tmp_path / "py", as_published, count=4)
    command = ["--cifar", str(folder), "--width", "8", "--depth", "2", "--steps", "1", "--batch", "4"]
    command += ["--seeds", "1", "--wrong", "0", "--arms", "bp0", "--out", str(tmp_path / "out")]
    assert local_credit.main(command) == 0
    rows = Rows(tmp_path / "out" / "rows.jsonl", command="").all()
    assert {row["what"]["task"] for row in rows} == {"cifar-10"}
    assert local_credit.main([*command, "--cifar", str(tmp_path)]) == 2
    assert "no CIFAR" in capsys.readouterr().err
