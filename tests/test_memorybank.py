"""The memory bank: votes and importance against plain loops, files, builds that are shared and killed, every error."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from tiny_banks import BACKBONE, rows, write_bank

import memorybank
from daam_core import attention_flow
from memorybank import MemoryBank
from memorybank.__main__ import main
from memorybank.build import build
from models import load, sha256, weights_sha256
from models.images import read_image

ROOT = Path(__file__).resolve().parent.parent
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth", "bank.json")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    labels = torch.tensor([i * i % 7 % 4 for i in range(90)])
    folder = write_bank(tmp_path_factory.mktemp("bank") / "b", rows(90, 12), labels, class_names=["a", "b", "c", "d"])
    return MemoryBank.load(folder)


# Votes and importance, written as the definition has them -------------------------------------------------------------


def plain_neighbours(bank, feature, k):
    f = [x / math.sqrt(sum(y * y for y in feature)) for x in feature]
    found = []
    for row, (z, label) in enumerate(zip(bank.features.double().tolist(), bank.labels.tolist())):
        found.append((sum(a * b for a, b in zip(f, z)), row, label, [a * b for a, b in zip(f, z)]))
    return sorted(found, reverse=True)[:k]


def plain_votes(bank, feature, k, temperature):
    votes = [0.0] * 4
    for cosine, _, label, _ in plain_neighbours(bank, feature, k):
        votes[label] += math.exp(cosine / temperature)
    return votes


def plain_importance(bank, feature, c, k):
    products = [p for _, _, label, p in plain_neighbours(bank, feature, k) if label == c]
    p = [sum(column) / len(products) for column in zip(*products)]
    if total := abs(sum(p)):
        p = [x / total for x in p]
    return [(x - min(p)) / (max(p) - min(p)) if max(p) > min(p) else 1.0 for x in p]


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (7, 0.5), (90, 1.0)])
def test_votes_and_importance_are_those_of_the_plain_loop(bank, k, temperature):
    features = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    vote = bank.classify(features, k, temperature)
    importance = bank.importance(features, k, temperature)
    assert vote.votes.shape == (6, 4) and vote.neighbours.shape == vote.similarities.shape == vote.labels.shape == (
        6,
        k,
    )
    for b, feature in enumerate(features.double().tolist()):
        nearest = plain_neighbours(bank, feature, k)
        votes = plain_votes(bank, feature, k, temperature)
        assert vote.neighbours[b].tolist() == [row for _, row, _, _ in nearest]
        assert vote.labels[b].tolist() == [label for _, _, label, _ in nearest]
        np.testing.assert_allclose(vote.similarities[b], [cosine for cosine, *_ in nearest], atol=1e-6)
        np.testing.assert_allclose(vote.votes[b], votes, rtol=1e-5)
        c = votes.index(max(votes))
        assert vote.prediction[b] == c
        np.testing.assert_allclose(importance[b], plain_importance(bank, feature, c, k), atol=1e-5)


def test_a_class_named_by_hand(bank):
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([2, 0, 1])
    for target_k, looked_at in ((40, 40), (200, 90), (5, 20)):  # never fewer than those that vote
        importance = bank.importance(features, target=targets, target_k=target_k)
        for b, feature in enumerate(features.double().tolist()):
            expected = plain_importance(bank, feature, int(targets[b]), looked_at)
            np.testing.assert_allclose(importance[b], expected, atol=1e-5)
    one = bank.importance(features, target=2)
    assert torch.equal(one[0], bank.importance(features, target=targets)[0]) and not torch.equal(one[1], importance[1])
    predicted = bank.classify(features).prediction
    assert not torch.equal(bank.importance(features), bank.importance(features, target=(predicted + 1) % 4))


def test_one_feature_is_a_batch_of_one(bank):
    features = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    assert bank.importance(features[0]).shape == (1, 12) and bank.classify(features[0]).votes.shape == (1, 4)
    torch.testing.assert_close(bank.importance(features[0]), bank.importance(features)[:1])
    torch.testing.assert_close(bank.importance(features.half()), bank.importance(features.half().float()))


@pytest.mark.parametrize(
    ("feature", "neighbour", "expected"),
    [
        ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),  # p is constant
        ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),  # p is zero
        ([1.0, 1.0], [1.0, -1.0], [1.0, 0.0]),  # p sums to zero, and is left as it is
        ([1.0, 1.0], [-0.6, -0.8], [1.0, 0.0]),  # a negative sum: divided by its absolute value
    ],
)
def test_degenerate_importance(tmp_path, feature, neighbour, expected):
    z = torch.nn.functional.normalize(torch.tensor([neighbour]), dim=1)
    bank = MemoryBank.load(write_bank(tmp_path, z, torch.tensor([0])))
    assert bank.importance(torch.tensor([feature]), k=1).tolist() == [expected]


def test_the_flow_takes_the_importance_of_the_bank(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **BACKBONE).eval()
    bank = MemoryBank.load(write_bank(tmp_path, rows(50, 48), torch.arange(50) % 3))
    images = torch.randn(2, 3, 32, 32)
    flow = attention_flow(model, images, importance=bank.importance)
    with torch.no_grad():
        features = model(images)
    expected = attention_flow(model, images, importance=bank.importance(features))
    torch.testing.assert_close(flow.accumulated, expected.accumulated)
    assert flow.accumulated.max() > 0


# The query: exact, in little memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 20, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_nearest_is_exact_over_many_tiles(tmp_path, monkeypatch, dtype, k, batch):
    monkeypatch.setattr(memorybank, "TILE", 8)
    monkeypatch.setattr(memorybank, "SLAB", 2)
    monkeypatch.setattr(memorybank, "SPAN", 60)  # spans of 56 and 16 rows: fewer than k
    bank = MemoryBank.load(write_bank(tmp_path, rows(1003, 16).to(dtype), torch.zeros(1003, dtype=torch.long)))
    query = rows(batch, 16, seed=1)
    similarities, neighbours = bank.nearest(query, k)
    expected = (query.double() @ bank.features.double().T).topk(k)
    assert torch.equal(neighbours, expected.indices)
    torch.testing.assert_close(similarities.double(), expected.values, atol=1e-6, rtol=0)


MEMORY = """
import sys, torch
from benchmarks.memory_bank import Watch
from memorybank import MemoryBank

bank = MemoryBank.load(sys.argv[1])
torch.bmm(torch.randn(4, 64, 64), torch.randn(4, 64, 64))  # whatever a first product takes
with Watch() as watch:
    for batch in (1, 64):
        bank.importance(torch.randn(batch, 384))
print(watch.extra / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
def test_a_query_never_holds_the_bank(tmp_path):
    """A float16 bank of 115 MB, and of 230 MB once widened."""
    folder = write_bank(tmp_path, rows(150_000, 384).half(), torch.arange(150_000) % 1000)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, folder], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 80


# Files that people have -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bank_of_eval_knn_loads_as_it_is(tmp_path, zipped):
    """float32, no bank.json; torch 1.5 and earlier wrote no archive, which cannot be mapped."""
    folder = tmp_path / "ImageNet2012" / "model"
    folder.mkdir(parents=True)
    tensors = {"trainfeat": rows(1003, 8), "trainlabels": torch.arange(1003) % 1000}
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth", _use_new_zipfile_serialization=zipped)
    bank = MemoryBank.load(folder)
    assert torch.equal(bank.features, tensors["trainfeat"]) and torch.equal(bank.labels, tensors["trainlabels"])
    assert bank.files is None and bank.metadata == {} and bank.num_classes == 1000
    assert bank.class_name(281).startswith("tabby")
    bank.check_model("any", 8, "any")

    elsewhere = MemoryBank.load(shutil.copytree(folder, tmp_path / "other"))
    assert elsewhere.class_names is None and elsewhere.class_name(281) == "class 281"


def test_integer_labels_of_any_width(tmp_path):
    bank = MemoryBank.load(write_bank(tmp_path, rows(5, 4), torch.tensor([0, 1, 2, 1, 0], dtype=torch.int32)))
    assert bank.labels.dtype == torch.int64 and bank.classify(rows(2, 4), k=5).votes.shape == (2, 3)


class Evil:
    def __reduce__(self):
        return print, ("was run",)


def bad(name, value, **metadata):
    """A writer of a good bank in which one file is replaced."""

    def write(folder):
        write_bank(folder, rows(6, 4), torch.arange(6) % 3, **metadata)
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is None:
            (folder / name).unlink()
        else:
            torch.save(value, folder / name)

    return write


NAN = rows(6, 4).index_fill(0, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "bank: there is no folder .*; build one: python -m memorybank build --model NAME"),
        (bad("trainfeat.pth", None), "bank: there is no file .*trainfeat.pth"),
        (bad("trainlabels.pth", None), "bank: there is no file .*trainlabels.pth"),
        (bad("trainfeat.pth", Evil()), "trainfeat.pth is damaged, or holds more than tensors and is not loaded"),
        (bad("trainfeat.pth", b"text"), "bank: .*trainfeat.pth (is damaged|cannot be read)"),
        (bad("trainfeat.pth", b""), "bank: .*trainfeat.pth cannot be read"),
        (bad("trainfeat.pth", {"features": rows(6, 4)}), "trainfeat.pth should hold a tensor, but has a dict"),
        (bad("trainfeat.pth", rows(6, 4)[0]), r"should hold features \(M, D\), float16 or float32, but has \(4,\)"),
        (bad("trainfeat.pth", rows(6, 4).double()), "float16 or float32, but has .* torch.float64"),
        (bad("trainfeat.pth", NAN), "trainfeat.pth has NaN or infinite values; build it again"),
        (bad("trainfeat.pth", 2 * rows(6, 4)), "the rows of .*trainfeat.pth are not L2-normalised"),
        (bad("trainlabels.pth", torch.zeros(5).long()), "trainlabels.pth has 5 labels for 6 features"),
        (bad("trainlabels.pth", torch.zeros(6)), r"should hold integers \(M,\), but has \(6,\) torch.float32"),
        (bad("trainlabels.pth", torch.arange(6) - 1), "trainlabels.pth has the label -1; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6) << 40), "trainlabels.pth has the label .*; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6), class_names=list("abc")), "has the label 5, but there are 3 classes"),
        (bad("bank.json", b"{"), "bank.json cannot be read as JSON"),
        (bad("bank.json", b"[]"), "bank.json does not describe a bank"),
        (bad("x", b"", train={"folder": ".", "files": ["a.jpg"]}), "bank.json lists 1 files for 6 features"),
    ],
)  # fmt: skip
def test_damaged_banks(tmp_path, capsys, write, message):
    write(tmp_path / "b")
    with pytest.raises(ValueError, match=message) as error:
        MemoryBank.load(tmp_path / "b")
    assert "\n" not in str(error.value) and "was run" not in capsys.readouterr().out
    assert main(["info", str(tmp_path / "b")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_nan_between_the_rows_that_are_looked_at_is_found_by_the_query(tmp_path):
    features = rows(3000, 4)
    features[7] = torch.nan
    bank = MemoryBank.load(write_bank(tmp_path, features, torch.zeros(3000).long()))
    with pytest.raises(ValueError, match="trainfeat.pth has NaN or infinite values"):
        bank.nearest(rows(1, 4), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.classify(rows(2, 5)), r"features: expected \(B, 12\), the width of the bank, got \(2, 5\)"),
        (lambda b: b.classify(rows(2, 12)[None]), r"features: expected \(B, 12\), .* got \(1, 2, 12\)"),
        (lambda b: b.classify(rows(2, 12) / 0), "features: have NaN or infinite values"),
        (lambda b: b.classify(rows(2, 12), k=91), "k: expected 1 to 90, the number of features in .*, got 91"),
        (lambda b: b.classify(rows(2, 12), k=0), "k: expected 1 to 90"),
        (lambda b: b.classify(rows(2, 12), temperature=0), "temperature: expected at least 0.02, got 0"),
        (lambda b: b.classify(rows(2, 12)[:0]), r"features: expected \(B, 12\), .* got \(0, 12\)"),
        (lambda b: b.importance(rows(2, 12), target="a"), "target: expected a class index or one for each of 2"),
        (lambda b: b.importance(rows(2, 12), target=4), "target: class 4 is out of range; the bank has 4 classes"),
        (lambda b: b.importance(rows(2, 12), target=torch.tensor([0, -1])), "target: class -1 is out of range"),
        (lambda b: b.importance(rows(2, 12), target=torch.zeros(3).long()), "target: .* index or one for each of 2"),
        (lambda b: b.importance(rows(2, 12), target=1.5), "target: expected a class index"),
        (lambda b: b.importance(b.features[:1], k=1, target=3, target_k=2),
         "target: none of the 2 nearest neighbours is of the class d; they are .*: name one of them, or look at more"),
        (lambda b: b.check_model("other", 13, "x"), "features of width 12, those of other have 13; build one with it"),
    ],
)  # fmt: skip
def test_bad_queries(bank, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(bank)
    assert "\n" not in str(error.value)


def test_the_bank_of_another_model(tmp_path):
    folder = write_bank(tmp_path, rows(6, 4), torch.arange(6), model="mine", weights_sha256="1234")
    bank = MemoryBank.load(folder)
    bank.check_model("mine", 4, "1234")
    bank.check_model("the same weights under another name", 4, "1234")
    with pytest.raises(ValueError, match="was built with the model mine, not with other; build one with it: .* other"):
        bank.check_model("other", 4, "5678")
    with pytest.raises(ValueError, match="was built with other weights of mine"):
        bank.check_model("mine", 4, "5678")


# Building -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = timm.create_model("vit_tiny_patch16_224", **BACKBONE).state_dict()
    safetensors.torch.save_file(
        state, file, {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(BACKBONE)}
    )
    return file


def photo(path, seed):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (24 + seed % 5, 30, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder that nobody prepared: 44 + 11 photos, and what else lies in folders."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(44):
        photo(folder / "train" / ("cat", "Dog", "a b")[n % 3] / ("deep/er" if n % 4 == 0 else ".") / f"{n}.png", n)
    for n in range(11):
        photo(folder / "test" / ("Dog", "cat")[n % 2] / f"{n}.JPG", 100 + n)
    train = folder / "train"
    (train / "cat" / "notes.txt").write_text("left out")
    (train / "cat" / "broken.jpg").write_text("not an image")
    (train / "Dog" / "._1.png").write_text("hidden")
    photo(train / ".hidden" / "x.png", 1)
    (train / "empty").mkdir()
    photo(train / "beside.png", 2)
    return folder


def command(checkpoint, photos, out, *more):
    return [
        "build", "--checkpoint", checkpoint, "--train", photos / "train", "--test", photos / "test", "--out", out,
        "--batch-size", 4, "--workers", 1, "--device", "cpu", *more,
    ]  # fmt: skip


def start(*arguments, ranks=0, **options):
    program = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "memorybank"]
        if ranks
        else ["-m", "memorybank"]
    )
    words = list(map(str, [sys.executable, *program, *arguments]))
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # torchrun gives every rank one thread; a single process has all
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def built(checkpoint, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("banks") / "one"
    code, printed, err = finish(start(*command(checkpoint, photos, out)))
    assert code == 0, err
    return out, printed, err


def contents(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES if name != "bank.json"}


def test_build(built, checkpoint, photos):
    """Against a plain loop: read, transform, forward, normalise, in the order of classes and files."""
    out, printed, err = built
    bank, loaded = MemoryBank.load(out), load(None, checkpoint)
    assert bank.class_names == ["Dog", "a b", "cat"] and bank.features.dtype == torch.float16
    assert len(bank.labels) == 44 and all(bank.file(row).is_file() for row in range(44))
    assert [Path(f) for f in bank.files] == sorted(map(Path, bank.files))  # the classes are in this order, too
    assert [bank.class_names[k] for k in bank.labels] == [file.split("/")[0] for file in bank.files]
    with torch.no_grad():
        for row, stored in enumerate(bank.features):
            feature = loaded.model(loaded.transform(read_image(bank.file(row))).unsqueeze(0))[0]
            torch.testing.assert_close(stored.float(), feature / feature.norm(), atol=1e-3, rtol=0)
    features, labels = memorybank.read_pair(out, "test")
    assert features.shape == (11, 48) and labels.tolist() == [0] * 6 + [2] * 5

    said = bank.metadata
    assert said["model"] == "tiny" and said["checkpoint"] == {"file": checkpoint.name, "sha256": sha256(checkpoint)}
    assert said["weights_sha256"] == weights_sha256(loaded.model) and said["versions"]["timm"] == timm.__version__
    assert said["train"]["count"] == 44 and said["test"]["count"] == 11 and said["test"]["unreadable"] == {}
    assert list(said["train"]["unreadable"]) == ["cat/broken.jpg"]
    assert "train: left out 1 images that cannot be read:\n" in printed and "broken.jpg is not an image" in printed
    assert "44 x 48, float16" in printed and "img/s" in err
    contents(out)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(built, checkpoint, photos, tmp_path, ranks):
    code, printed, err = finish(start(*command(checkpoint, photos, tmp_path / "b"), ranks=ranks))
    assert code == 0, err
    assert contents(tmp_path / "b") == contents(built[0])
    assert printed.count("44 x 48") == 1  # one rank speaks


def wait_for_parts(out, count, process):
    deadline = time.monotonic() + 120
    while len(list(out.glob(".building/train-*.pt"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def many(checkpoint, photos, tmp_path_factory):
    """20 x 46 photos, one of each 46 broken, and what an undisturbed build makes of them."""
    folder = tmp_path_factory.mktemp("many")
    for n in range(20):
        shutil.copytree(photos / "train", folder / "train" / f"class {n:02d}")
    shutil.copytree(photos / "test" / "cat", folder / "test" / "class 01")
    code, _, err = finish(start(*command(checkpoint, folder, folder / "bank")))
    assert code == 0, err
    assert len(MemoryBank.load(folder / "bank").labels) == 20 * 45
    return folder


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_killed_build_goes_on(checkpoint, many, tmp_path, ranks):
    """kill -9 in the middle, of the process or of one of two ranks; then the same command, in one process."""
    out = tmp_path / "out"
    process = start(*command(checkpoint, many, out), ranks=ranks, start_new_session=True)
    wait_for_parts(out, 6, process)
    if ranks:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert finish(process)[0] != 0
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not [p for p in out.iterdir() if p.name != ".building"]
    parts = {p: p.stat().st_mtime_ns for p in out.glob(".building/train-*.pt")}
    assert 6 <= len(parts) < 920 / 4

    process = start(*command(checkpoint, many, out))
    while f"going on after {4 * len(parts)} of 920 images" not in (line := process.stderr.readline()):
        assert line
    assert {p: p.stat().st_mtime_ns for p in parts} == parts
    assert finish(process)[0] == 0
    assert contents(out) == contents(many / "bank")


def test_the_parts_of_another_build_are_not_mixed_in(checkpoint, photos, tmp_path):
    loaded = load(None, checkpoint)
    with pytest.raises(ValueError, match="train: .*broken.jpg is not an image"):
        build(loaded, photos / "train", tmp_path / "b", batch_size=4, workers=0, strict=True)
    before = {p: p.read_bytes() for p in (tmp_path / "b").rglob("*.pt")}
    others = {"dtype": "float32", "batch_size": 5, "test": photos / "test"}
    for key, value in others.items():
        message = f"out: .*building holds a build that was not finished, of another {key}; delete"
        with pytest.raises(ValueError, match=message):
            build(loaded, photos / "train", tmp_path / "b", **({"batch_size": 4, "workers": 0} | {key: value}))
    assert before == {p: p.read_bytes() for p in (tmp_path / "b").rglob("*.pt")} and before


@pytest.mark.parametrize("step", range(1, 10))
def test_a_build_may_be_killed_at_every_step_of_its_end(built, checkpoint, photos, tmp_path, monkeypatch, step):
    """An older bank lies there; at every moment there is that one, none, or the new one, and never a mixture."""
    out = tmp_path / "b"
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    build(loaded, photos / "test", out, dtype="float32", workers=0)
    older = (out / "trainfeat.pth").read_bytes()
    steps = iter(range(1, 100))

    def killed(do):
        def once(*arguments, **more):
            if out in Path(arguments[-1]).parents and Path(arguments[-1]).suffix != ".pt" and next(steps) == step:
                raise KeyboardInterrupt
            return do(*arguments, **more)

        return once

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed(os.replace))  # step 1: the plan; then four files and bank.json
        patch.setattr("shutil.rmtree", killed(shutil.rmtree))
        try:
            build(loaded, photos / "train", out, **settings)
        except KeyboardInterrupt:
            assert step <= 7
        else:
            assert step > 7
    try:
        features = (out / "trainfeat.pth").read_bytes()
        bank = MemoryBank.load(out)
    except (FileNotFoundError, ValueError):
        assert 2 <= step <= 3
    else:
        assert len(bank.labels) == (11 if features == older else 44)
    build(loaded, photos / "train", out, **settings)
    assert contents(out) == contents(built[0])


def test_a_damaged_part_is_computed_again(built, checkpoint, photos, tmp_path, monkeypatch):
    """As after a power cut."""
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("memorybank.build._finish", lambda *arguments: 1 / 0)  # stands for the kill
        with pytest.raises(ZeroDivisionError):
            build(loaded, photos / "train", tmp_path / "b", **settings)
    (tmp_path / "b" / ".building" / "train-000000.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match="out: .*train-000000.pt was damaged and is deleted; run the same command again"
    ):
        build(loaded, photos / "train", tmp_path / "b", **settings)
    build(loaded, photos / "train", tmp_path / "b", **settings)
    assert contents(tmp_path / "b") == contents(built[0])


def test_parts_without_a_plan_belong_to_nobody(built, checkpoint, photos, tmp_path):
    """Of a build that was killed while it cleaned up."""
    loaded = load(None, checkpoint)
    (tmp_path / "b" / ".building").mkdir(parents=True)
    stray = {"features": torch.zeros(4, 48).half(), "unreadable": {}}
    torch.save(stray, tmp_path / "b" / ".building" / "train-000000.pt")
    build(loaded, photos / "train", tmp_path / "b", photos / "test", batch_size=4, workers=0)
    assert contents(tmp_path / "b") == contents(built[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_two_builds_do_not_meet(checkpoint, photos, tmp_path):
    import fcntl

    (tmp_path / "b" / ".building").mkdir(parents=True)
    folder = os.open(tmp_path / "b" / ".building", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="out: another build is at work in .*building"):
        build(load(None, checkpoint), photos / "train", tmp_path / "b", workers=0)
    os.close(folder)
    build(load(None, checkpoint), photos / "train", tmp_path / "b", workers=0)


def test_other_images_under_the_same_names_are_another_build(checkpoint, photos, tmp_path):
    loaded, settings = load(None, checkpoint), {"batch_size": 4, "workers": 0, "strict": True}
    with pytest.raises(ValueError, match="broken.jpg"):
        build(loaded, photos / "train", tmp_path / "b", **settings)
    mine = shutil.copytree(photos / "train", tmp_path / "mine")
    photo(mine / "Dog" / "1.png", 77)
    with pytest.raises(ValueError, match="a build that was not finished, of another train"):
        build(loaded, mine, tmp_path / "b", **settings)


def test_a_new_bank_replaces_an_old_one_whole(built, checkpoint, photos, tmp_path):
    out = shutil.copytree(built[0], tmp_path / "b")
    build(load(None, checkpoint), photos / "test", out, dtype="float32", workers=0)
    assert sorted(p.name for p in out.iterdir()) == ["bank.json", "trainfeat.pth", "trainlabels.pth"]
    bank = MemoryBank.load(out)
    assert bank.features.dtype == torch.float32 and len(bank.labels) == 11 and bank.class_names == ["Dog", "cat"]


def test_odd_names_and_links_to_nothing(checkpoint, tmp_path):
    photo(tmp_path / "train" / "Café" / "a\udce9.png", 1)  # bytes that are no UTF-8
    (tmp_path / "train" / "Café" / "gone.png").symlink_to("nowhere")
    bank = build(load(None, checkpoint), tmp_path / "train", tmp_path / "b", workers=0)
    assert list(bank["train"]["unreadable"]) == ["Café/gone.png"]
    loaded = MemoryBank.load(tmp_path / "b")
    assert loaded.class_names == ["Café"] and loaded.file(0).is_file()


def test_imagenet_folders_get_their_names(checkpoint, tmp_path):
    for n, name in enumerate(("n02123045", "n01440764")):
        photo(tmp_path / "train" / name / "x.png", n)
    bank = build(load(None, checkpoint), tmp_path / "train", tmp_path / "b", workers=0)
    assert [name.split(",")[0] for name in bank["class_names"]] == ["tench", "tabby"]


def test_the_folder_is_kept_as_it_was_given(checkpoint, photos, tmp_path, monkeypatch):
    shutil.copytree(photos / "test", tmp_path / "mine" / "photos")
    monkeypatch.chdir(tmp_path / "mine")
    assert build(load(None, checkpoint), "photos", "banks/b", workers=0)["train"]["folder"] == "../../photos"
    monkeypatch.chdir(tmp_path)
    bank = MemoryBank.load("mine/banks/b")
    assert all(bank.file(row).is_file() for row in range(len(bank.labels)))
    assert build(load(None, checkpoint), photos / "test", "c", workers=0)["train"]["folder"] == str(photos / "test")


def flat(tmp_path):
    photo(tmp_path / "train" / "1.png", 1)


def unreadable(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_text("no")


def strangers(tmp_path):
    photo(tmp_path / "train" / "a" / "1.png", 1)
    photo(tmp_path / "test" / "b" / "1.png", 1)


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        (lambda tmp_path: None, [], "train: there is no folder .*train"),
        (flat, [], "train: .*train has no images; it should have one sub-folder a class"),
        (unreadable, [], "train: none of the 1 images can be read: .*1.png is not an image"),
        (unreadable, ["--strict"], "train: .*1.png is not an image that Pillow can read"),
        (strangers, ["--test", "test"], "test: the class 'b' is not among the sub-folders of train"),
        (strangers, ["--test", "gone"], "test: there is no folder gone"),
        (strangers, ["--checkpoint", "gone.pth", "--model", "vit_tiny_patch16_224"], "checkpoint: there is no file"),
        (strangers, ["--device", "abacus"], "device: 'abacus' cannot be used"),
        (strangers, ["--checkpoint", "nan.safetensors"], "model: the feature of .*1.png is not finite"),
    ],
)  # fmt: skip
def test_builds_that_cannot_be(checkpoint, tmp_path, monkeypatch, capsys, prepare, more, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    if "nan.safetensors" in more:
        state = {k: v / 0 if k == "norm.weight" else v for k, v in safetensors.torch.load_file(checkpoint).items()}
        metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(BACKBONE)}
        safetensors.torch.save_file(state, "nan.safetensors", metadata)
    arguments = ["build", "--checkpoint", str(checkpoint), "--train", "train", "--out", "out", "--workers", "0", *more]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), lines
    assert not list(tmp_path.glob("out/*.pth"))


def test_strict_minds_what_was_left_out_before_it_was_killed(checkpoint, photos, tmp_path, monkeypatch):
    loaded, settings = load(None, checkpoint), {"batch_size": 4, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("memorybank.build._finish", lambda *arguments: 1 / 0)  # stands for the kill
        with pytest.raises(ZeroDivisionError):
            build(loaded, photos / "train", tmp_path / "b", **settings)
    parts = set((tmp_path / "b").rglob("train-*.pt"))
    with pytest.raises(ValueError, match="train: .*broken.jpg is not an image"):
        build(loaded, photos / "train", tmp_path / "b", strict=True, **settings)
    assert len(parts - set((tmp_path / "b").rglob("train-*.pt"))) == 1  # tried again when somebody has repaired it
    assert build(loaded, photos / "train", tmp_path / "b", **settings)["train"]["count"] == 44


@pytest.mark.parametrize(
    "options", [[], ["build"], ["build", "--train", "t"], ["eval"], ["what"], ["eval", "b", "--k", "0"]]
)
def test_bad_command_lines(capsys, options):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2 and "--help shows the options" in capsys.readouterr().err


def test_build_without_a_model(capsys):
    assert main(["build", "--train", "t", "--out", "o"]) == 2
    assert capsys.readouterr().err.startswith("error: model: name one with --model, or give a --checkpoint that names")


# eval and info --------------------------------------------------------------------------------------------------------


def test_eval(tmp_path, capsys):
    """Of 300 test images; top-1 and top-5 as plain loops count them."""
    centres = 0.7 * rows(20, 6, seed=5)
    train, test = (torch.arange(n) % 20 for n in (150, 300))
    z, f = (torch.nn.functional.normalize(centres[y] + rows(len(y), 6, s), dim=1) for y, s in ((train, 6), (test, 7)))
    write_bank(tmp_path, z, train)
    write_bank(tmp_path, f, test, "test")
    assert main(["eval", str(tmp_path), "--k", "200", "10", "20", "100", "20"]) == 0
    printed = capsys.readouterr().out
    for k in (10, 20, 100):
        hits = [0, 0]
        for feature, label in zip(f.double(), test.tolist()):
            cosine = (z.double() @ feature).tolist()
            votes = [0.0] * 20
            for i in sorted(range(150), key=lambda i: -cosine[i])[:k]:
                votes[train[i]] += math.exp(cosine[i] / 0.07)
            order = sorted(range(20), key=lambda c: -votes[c])
            hits[0] += order[0] == label
            hits[1] += label in order[:5] and votes[label] > 0
        assert 0.1 < hits[0] / 300 < hits[1] / 300 < 1
        assert f"k = {k:<4} top-1 {hits[0] / 3:6.2f} %   top-5 {hits[1] / 3:6.2f} %" in printed
    assert "k = 200  the bank has 150 features" in printed


@pytest.mark.parametrize(
    ("write", "more", "message"),
    [
        (lambda b: None, [], "bank: .* has no test pair; build it with --test FOLDER"),
        (lambda b: write_bank(b, rows(5, 3), torch.zeros(5).long(), "test"), ["--k", "2"], r"expected \(B, 4\)"),
        (lambda b: write_bank(b, rows(5, 4), torch.full((5,), 9), "test"), [], "has the label 9, but there are 3"),
        (lambda b: write_bank(b, rows(5, 4), torch.zeros(4).long(), "test"), [], "testlabels.pth has 4 labels for 5"),
        (lambda b: write_bank(b, rows(5, 4), torch.zeros(5).long(), "test"), ["--k", "7"], "k: expected 1 to 6"),
    ],
)  # fmt: skip
def test_bad_evaluations(tmp_path, capsys, write, more, message):
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 3)
    write(tmp_path)
    assert main(["eval", str(tmp_path), *more]) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_info(built, capsys):
    assert main(["info", str(built[0])]) == 0
    printed = capsys.readouterr().out
    for text in (
        "tiny",
        "44 x 48, float16",
        "3, of 14 to 15 images",
        "11 images",
        "sha256",
        "timm " + timm.__version__,
    ):
        assert text in printed
