"""The self-supervised script from end to end, without network: as a subprocess, and in this process."""

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scripts import ROOT, call, no_leftovers, one_line_error, run
from tiny_banks import BACKBONE, rows, write_bank
from tiny_checkpoints import by_facebook
from tiny_models import build as build_random
from tiny_models import tiny_timm

import DINO_DAAM_Visualization_oneSample as script
import VIT_DynamicAccumulatedAttentionMap_oneSample as supervised_script
from command_line.results import SIGNED
from daam_core import attention_flow
from memorybank import MemoryBank
from memorybank.__main__ import main as memorybank_main
from memorybank.build import build
from models import load
from models.images import read_image

SCRIPT = ROOT / "DINO_DAAM_Visualization_oneSample.py"
EMBEDDED = "vit_small_patch14_selfsupervised"
BANK = ROOT / "memorybank" / "embedded"
LIME = (50, 205, 50)


@pytest.fixture
def explain(capfd):
    """Run the script in this process."""
    return partial(call, script.main, capfd)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    arguments = BACKBONE | {"num_classes": 3}  # the script ignores the classifier
    state = timm.create_model("vit_tiny_patch16_224", **arguments).state_dict()
    metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(arguments)}
    safetensors.torch.save_file(state, file, metadata)
    return file


@pytest.fixture(scope="module")
def own_bank(weights, tmp_path_factory):
    """Build a bank of 24 pictures; a third of them are crops of the photo that is explained."""
    folder = tmp_path_factory.mktemp("own")
    photo, rng = Image.open(ROOT / ".img" / "coffee.png"), np.random.default_rng(0)
    for n in range(8):
        for name in ("coffee", "noise", "grey"):
            (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
            picture = photo.crop((5 * n, 5 * n, 600 - 5 * n, 400 - 5 * n))
            if name == "noise":
                picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
            elif name == "grey":
                picture = Image.new("RGB", (40, 30), (100 + n, 100, 100))
            picture.save(folder / "photos" / name / f"{n}.png")
    build(load(None, weights), folder / "photos", folder / "bank", workers=0)
    return folder


def results(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_default_run_without_weights_and_bank(offline, tmp_path):
    result = run(SCRIPT, "--output-dir", tmp_path, env=offline, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    reason = "there is no memory bank memorybank/DINO/ImageNet2012/vit_small_patch8_224.dino"
    assert result.stderr.splitlines() == [f"{reason}; using the embedded {EMBEDDED} and its bank instead"]
    printed = result.stdout.splitlines()
    assert printed[0].endswith("coffee.png")
    assert re.search(r"^ +[0-9.]+% of the votes, [ 0-9]+ of 20 neighbours +[0-9]+  cup$", printed[1])

    folder = tmp_path / EMBEDDED / "coffee-cup"
    frames = {f"frames/block_{b:02d}.png" for b in range(1, 13)}
    assert (
        results(folder)
        == {"flow.gif", "flow.json", "maps.npz", "sheet.png", "evolution.png", "neighbours.png"} | frames
    )
    assert no_leftovers(tmp_path)
    with Image.open(folder / "flow.gif") as gif:
        assert gif.n_frames == 12 and gif.size == (600, 400)

    flow, maps = json.loads((folder / "flow.json").read_text()), np.load(folder / "maps.npz")
    bank, loaded = MemoryBank.load(BANK), load(EMBEDDED)
    images = loaded.transform(read_image(ROOT / ".img" / "coffee.png")).unsqueeze(0)
    with torch.no_grad():
        feature = loaded.features(images)
    expected = attention_flow(loaded.model, images, importance=bank.importance(feature))
    np.testing.assert_allclose(
        maps["accumulated"], expected.accumulated[0], atol=1e-4 * float(expected.accumulated.max())
    )
    np.testing.assert_allclose(maps["output"], feature[0], atol=1e-4)
    vote = bank.classify(feature)
    assert [n["row"] for n in flow["neighbours"]] == vote.neighbours[0].tolist()
    assert flow["target"] == flow["top5"][0] | {"requested": None} and flow["target"]["name"] == "cup"
    assert flow["target"]["vote"] == pytest.approx(float(vote.votes.max() / vote.votes.sum()), abs=1e-4)
    assert sum(c["neighbours"] for c in flow["top5"]) <= 20 == len(flow["neighbours"])
    features, formed = [], flow["evolution"]
    for block in loaded.model.blocks:
        block.register_forward_hook(lambda module, args, output: features.append(loaded.model.norm(output)[:, 0]))
    with torch.no_grad():
        loaded.model(images)
    votes = bank.classify(torch.cat(features)).votes  # (12, 101)
    votes = votes / votes.sum(1, keepdim=True)
    c, second = (flow["top5"][i]["index"] for i in (0, 1))
    assert formed["runner_up"]["index"] == second and "vote of the neighbours" in formed["reading"]
    for block, row in zip(formed["blocks"], votes, strict=True):
        assert block["vote"] == {str(k): pytest.approx(row[k].item(), abs=1e-3) for k in (c, second)}
        assert block["leader"]["vote"] == pytest.approx(row.max().item(), abs=1e-3)
    assert formed["blocks"][-1]["vote"][str(c)] == pytest.approx(flow["target"]["vote"], abs=1e-3)
    assert sum(block["share"][str(c)] for block in formed["blocks"]) == pytest.approx(1)
    assert [block["leader"]["index"] == c for block in formed["blocks"]].index(True) + 1 == formed["leads_from"]
    file = ROOT / "pretrainedmodels" / f"{EMBEDDED}.safetensors"
    assert flow["checkpoint"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert flow["bank"] == {
        "folder": str(BANK), "features": len(bank.labels), "k": 20, "temperature": 0.07, "target_k": 200,
    }  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    """Copy the repository without its large files."""
    root = tmp_path / "repository"
    for name in ("command_line", "models", "memorybank", ".img"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "embedded", "*.gif"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    (root / "pretrainedmodels").mkdir()
    return root


def published_bank(root):
    """Write the four files of DINO's eval_knn.py: float32, 1000 classes, no bank.json."""
    folder = root / "memorybank" / "DINO" / "ImageNet2012" / "vit_small_patch8_224.dino"
    write_bank(folder, rows(2000, 384), torch.arange(2000) % 1000)
    return write_bank(folder, rows(10, 384, seed=1), torch.arange(10), "test")


def test_the_published_checkpoint_and_bank_are_found(offline, repository, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch8_224.dino").eval()
    teacher = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    teacher |= {"module.head.mlp.0.weight": torch.zeros(3, 3), "module.head.last_layer.weight_g": torch.zeros(3)}
    torch.save({"student": {}, "teacher": teacher}, repository / "pretrainedmodels" / "dino_deitsmall8_pretrain.pth")
    folder = published_bank(repository)
    options = ("--output-dir", tmp_path / "out", "--image", ".img/flower.jpg")
    result = run(repository / SCRIPT.name, *options, env=offline, cwd=repository)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    made = next((tmp_path / "out" / "vit_small_patch8_224.dino").iterdir())
    flow, maps = json.loads((made / "flow.json").read_text()), np.load(made / "maps.npz")
    assert maps["block_maps"].shape == (12, 28, 28) and flow["checkpoint"]["file"] == "dino_deitsmall8_pretrain.pth"

    bank = MemoryBank.load(folder)
    images = load(
        "vit_small_patch8_224.dino", repository / "pretrainedmodels" / "dino_deitsmall8_pretrain.pth"
    ).transform(read_image(ROOT / ".img" / "flower.jpg"))[None]
    expected = attention_flow(model, images, importance=bank.importance)
    np.testing.assert_allclose(
        maps["accumulated"], expected.accumulated[0], atol=1e-4 * float(expected.accumulated.max())
    )
    c = bank.classify(expected.output).prediction.item()
    assert flow["target"]["index"] == c and flow["target"]["name"] == bank.class_names[c]
    with Image.open(made / "neighbours.png") as picture:  # no files: the names of the 20 are written
        assert picture.size[1] > 4 * 150 and LIME in {colour for _, colour in picture.getcolors(1 << 20)}


def test_a_bank_without_weights(offline, repository, tmp_path):
    """The bank of the default is there, but its weights and the hub are not."""
    published_bank(repository)
    shutil.copytree(BANK, repository / "memorybank" / "embedded")
    (repository / "pretrainedmodels" / f"{EMBEDDED}.safetensors").symlink_to(
        ROOT / "pretrainedmodels" / f"{EMBEDDED}.safetensors"
    )
    result = run(repository / SCRIPT.name, "--output-dir", tmp_path / "out", env=offline)
    assert result.returncode == 0, result.stderr
    reason = "the weights of vit_small_patch8_224.dino are not cached and http://127.0.0.1:9 cannot be reached"
    assert result.stderr.splitlines() == [f"{reason}; using the embedded {EMBEDDED} and its bank instead"]
    assert (tmp_path / "out" / EMBEDDED / "coffee-cup" / "flow.gif").is_file()


def test_own_bank(offline, explain, weights, own_bank, tmp_path):
    options = ["--checkpoint", weights, "--bank", own_bank / "bank", "--k", 8, "--output-dir", tmp_path]
    result = run(SCRIPT, *options, env=offline)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "tiny" / "coffee-coffee"
    flow = json.loads((folder / "flow.json").read_text())
    assert flow["target"] == {"index": 0, "name": "coffee", "vote": 1, "neighbours": 8, "requested": None}
    assert {Path(n["file"]).parent for n in flow["neighbours"]} == {own_bank / "photos" / "coffee"}
    assert {"neighbours.png", "sheet.png", "frames/block_02.png"} <= results(folder)
    with Image.open(folder / "neighbours.png") as page:
        tile = np.asarray(page.crop((345, 70, 485, 160)), float)  # inside the first picture
        nearest = Image.open(flow["neighbours"][0]["file"]).resize((150, 100), Image.Resampling.LANCZOS)
    assert np.abs(tile - np.asarray(nearest.crop((5, 3, 145, 93)), float)).mean() < 12

    result = explain(*options, "--target", "Noise", "--target-k", 24)
    assert result.returncode == 0, result.stderr
    named = json.loads((tmp_path / "tiny" / "coffee-noise" / "flow.json").read_text())
    assert named["target"]["name"] == "noise" and named["top5"][0]["name"] == "coffee"
    assert [n["name"] for n in named["neighbours"]] == ["noise"] * 8
    maps = [np.load(tmp_path / "tiny" / f"coffee-{name}" / "maps.npz") for name in ("coffee", "noise")]
    assert not np.allclose(maps[0]["accumulated"], maps[1]["accumulated"])
    np.testing.assert_allclose(maps[0]["output"], maps[1]["output"], rtol=1e-5)


def test_several_classes(explain, weights, own_bank, tmp_path):
    """Classes by name, and the N classes with the most votes, of which there may be fewer."""
    options = ["--checkpoint", weights, "--bank", own_bank / "bank", "--size", 64, "--output-dir", tmp_path]
    made = {}
    for name, more in {
        "coffee-coffee": ("--target", "coffee"),
        "coffee-noise": ("--target", "noise"),
        "coffee-noise-coffee": ("--target", "noise", "coffee"),
    }.items():
        result = explain(*options, "--k", 8, *more)
        assert result.returncode == 0, result.stderr
        made[name] = np.load(tmp_path / "tiny" / name / "maps.npz")
    assert made["coffee-noise-coffee"]["block_maps"].shape == (2, *made["coffee-noise"]["block_maps"].shape)
    for k, name in enumerate(("coffee-noise", "coffee-coffee")):
        for key in ("block_maps", "accumulated"):
            wanted = made[name][key]
            np.testing.assert_allclose(made["coffee-noise-coffee"][key][k], wanted, atol=1e-4 * wanted.max())
    assert made["coffee-noise-coffee"]["output"].shape == made["coffee-noise"]["output"].shape == (48,)
    flow = json.loads((tmp_path / "tiny" / "coffee-noise-coffee" / "flow.json").read_text())
    assert [(c["name"], c["neighbours"]) for c in flow["targets"]] == [("noise", 0), ("coffee", 8)]
    assert {n["name"] for n in flow["neighbours"]} == {"noise", "coffee"}
    last = flow["evolution"]["blocks"][-1]
    assert last["vote"] == {"2": 0, "0": pytest.approx(1)} and flow["evolution"]["runner_up"] is None  # no votes for it
    assert list(last["share"]) == ["2", "0"] and flow["evolution"]["leads_from"] is not None

    result = explain(*options, "--k", 8, "--target", "top3", "--output-dir", tmp_path / "few")
    assert result.returncode == 0, result.stderr
    flow = json.loads((tmp_path / "few" / "tiny" / "coffee-coffee" / "flow.json").read_text())
    assert flow["target"]["name"] == "coffee" and flow["target"]["requested"] == "top3" and "targets" not in flow

    photos = [own_bank / "photos" / name / "0.png" for name in ("coffee", "noise")]
    result = explain("--image", *photos, *options, "--k", 24, "--target", "top2", "--output-dir", tmp_path / "all")
    assert result.returncode == 0, result.stderr
    for name in ("coffee", "noise"):
        file = next(f for f in (tmp_path / "all").rglob("flow.json") if f"{name}/0.png" in f.read_text()[:2000])
        flow = json.loads(file.read_text())
        assert [c["name"] for c in flow["targets"]] == [c["name"] for c in flow["top5"][:2]]
        assert flow["targets"][0]["name"] == name
        assert (
            np.load(file.with_name("maps.npz"))["accumulated"].shape == made["coffee-noise-coffee"]["accumulated"].shape
        )


def test_relevance_of_a_folder(offline, weights, own_bank, tmp_path):
    photos = [own_bank / "photos" / name / "5.png" for name in ("coffee", "noise")]
    options = ("--checkpoint", weights, "--bank", own_bank / "bank", "--k", 3, "--target-k", 3, "--size", 64)
    more = ("--variant", "relevance", "--target", "noise", "grey", "--output-dir", tmp_path)
    result = run(SCRIPT, "--image", *photos, *options, *more, env=offline, cwd=tmp_path)
    assert result.returncode == 0 and "error" not in result.stderr, result.stderr
    loaded, bank = load(None, weights), MemoryBank.load(own_bank / "bank")
    files = sorted(tmp_path.rglob("flow.json"))
    assert len(files) == 2 and all(file.parent.name.endswith("-noise-grey-relevance") for file in files)
    for file in files:
        flow, maps = json.loads(file.read_text()), np.load(file.with_name("maps.npz"))
        image = loaded.transform(read_image(flow["image"]["file"])).unsqueeze(0)
        for k, index in enumerate((2, 1)):  # noise, grey
            expected = attention_flow(
                loaded.model, image, importance=lambda f, c=index: bank.log_odds(f, target=c), variant="relevance"
            )
            wanted = expected.accumulated[0].numpy()
            np.testing.assert_allclose(maps["accumulated"][k], wanted, atol=1e-3 * np.abs(wanted).max())
            assert flow["class_share"][str(index)] == pytest.approx(expected.class_share[0].tolist(), abs=1e-3)
        assert flow["settings"]["score"] == "log_odds" and flow["method"].endswith("relevance, log-odds of the class")
        assert flow["evolution"]["reading"].endswith(SIGNED)
        # the class has no votes, and is explained: the neighbours are those of the photo, of another class
        name = Path(flow["image"]["file"]).parent.name
        assert [n["name"] for n in flow["neighbours"]] == [name] * 3
        with Image.open(file.with_name("neighbours.png")) as page:
            framed = LIME in {colour for _, colour in page.convert("RGB").getcolors(1 << 20)}
        assert framed == (name == "noise")


def test_log_odds_by_every_variant(explain, weights, own_bank, tmp_path):
    options = ("--checkpoint", weights, "--bank", own_bank / "bank", "--k", 24, "--size", 64, "--output-dir", tmp_path)
    loaded, bank = load(None, weights), MemoryBank.load(own_bank / "bank")
    image = loaded.transform(read_image(ROOT / ".img" / "coffee.png")).unsqueeze(0)
    for variant, ending in {"paper": "-log_odds", "signed": "-signed-log_odds", "relevance": "-relevance"}.items():
        result = explain(*options, "--variant", variant, "--score", "log_odds", "--temperature", 0.1)
        assert result.returncode == 0, result.stderr
        expected = attention_flow(
            loaded.model, image, importance=lambda f: bank.log_odds(f, 24, 0.1), variant=variant
        ).accumulated[0].numpy()  # fmt: skip
        saved = np.load(tmp_path / "tiny" / f"coffee-coffee{ending}" / "maps.npz")["accumulated"]
        np.testing.assert_allclose(saved, expected, atol=1e-3 * np.abs(expected).max())
    result = explain(*options, "--variant", "relevance", "--target", "top3")
    assert result.returncode == 0, result.stderr
    (file,) = (file for file in tmp_path.rglob("flow.json") if "targets" in json.loads(file.read_text()))
    flow = json.loads(file.read_text())
    assert [*map(int, flow["class_share"])] == [c["index"] for c in flow["targets"]] and len(flow["targets"]) == 3


def test_fewer_classes_with_votes_than_asked_for(explain, weights, own_bank, tmp_path):
    options = ("--checkpoint", weights, "--bank", own_bank / "bank", "--k", 3, "--size", 64, "--output-dir", tmp_path)
    assert explain(*options, "--variant", "relevance", "--target", "top3").returncode == 0
    flow = json.loads((tmp_path / "tiny" / "coffee-coffee-relevance" / "flow.json").read_text())
    assert list(flow["class_share"]) == ["0"] and len(flow["class_share"]["0"]) == flow["blocks"] == 2


def test_relevance_of_a_class_without_features(explain, weights, own_bank, tmp_path):
    bank = shutil.copytree(own_bank / "bank", tmp_path / "bank")
    metadata = json.loads((bank / "bank.json").read_text())
    metadata["class_names"].append("unicorn")
    (bank / "bank.json").write_text(json.dumps(metadata))
    options = ("--checkpoint", weights, "--bank", bank, "--k", 8, "--output-dir", tmp_path / "out")
    result = explain(*options, "--variant", "relevance", "--target", "unicorn")
    one_line_error(result, "target: ", "has no feature of the class unicorn; name another class")
    assert not (tmp_path / "out").exists()


def test_a_photo_that_cannot_be_explained_does_not_stop_the_others(explain, weights, own_bank, tmp_path):
    photos = [own_bank / "photos" / name / "3.png" for name in ("coffee", "noise", "grey")]
    options = ("--bank", own_bank / "bank", "--k", 2, "--target-k", 2, "--target", "noise", "--size", 64)
    result = explain("--image", *photos, "--checkpoint", weights, *options, "--output-dir", tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 2, result.stderr
    for name, line in zip(("coffee", "grey"), errors):
        assert line.startswith("error: target: none of the 2 nearest neighbours belongs to the class noise; ")
        assert line.endswith(f"({own_bank / 'photos' / name / '3.png'})")
    assert "3/3" in result.stderr
    flows = list(tmp_path.rglob("flow.json"))
    assert len(flows) == 1 and json.loads(flows[0].read_text())["image"]["file"] == str(photos[1])


def test_the_bank_names_the_model(explain, tmp_path):
    bank = shutil.copytree(BANK, tmp_path / "mine")
    options = ["--bank", bank, "--target", "cup", "--size", "model", "--output-dir", tmp_path / "out"]
    result = explain(*options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (tmp_path / "out" / EMBEDDED / "coffee-cup" / "flow.gif").is_file()


def test_the_bank_names_the_architecture_of_a_checkpoint(explain, own_bank, weights, tmp_path):
    """The checkpoint does not name its architecture."""
    bank = shutil.copytree(own_bank / "bank", tmp_path / "bank")
    metadata = json.loads((bank / "bank.json").read_text())
    (bank / "bank.json").write_text(json.dumps(metadata | {"model": "vit_tiny_patch16_224", "weights_sha256": "other"}))
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "mine.pth")
    options = ["--bank", bank, "--checkpoint", tmp_path / "mine.pth", "--output-dir", tmp_path / "out"]
    one_line_error(explain(*options), "was built with other weights of vit_tiny_patch16_224 (tiny.safetensors)")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--bank", "gone"], ["bank: there is no folder gone; build one: python -m memorybank build"]),
        (["--bank", "other"], ["features of width 5, those of tiny have 48; build one with it"]),
        (["--bank", "wrong"], ["was built with the model somebody's, not with tiny"]),
        (["--k", "25"], ["k: the bank has 24 features, got 25; pass a smaller --k"]),
        (["--k", "0"], ["--k: expected 1 to"]),
        (["--temperature", "0"], ["--temperature: expected 0.02 to 100, got 0"]),
        (["--target", "nois"], ["target: no class is called 'nois'; near names: noise"]),
        (["--target", "3"], ["target: class 3 is out of range; there are 3 classes"]),
        (["--target", "noise", "--k", "2", "--target-k", "2"],
         ["target: none of the 2 nearest neighbours belongs to the class noise; they are 2 coffee"]),
        (["--model", "resnet10t", "--checkpoint", "resnet.pth", "--bank", "wide"],
         ["model: ResNet has no attention that DAAM can see"]),
        (["--image", "gone.jpg"], ["image: there is no file gone.jpg"]),
        (["--model", "vit_small_patch8_224.dino", "--bank", None, "--checkpoint", None],
         ["there is no memory bank memorybank/DINO/ImageNet2012/vit_small_patch8_224.dino"]),
        (["--checkpoint", None, "--bank", "wrong"],
         ["checkpoint: the bank wrong was built with mine.pth; pass it with --checkpoint"]),
        (["--checkpoint", None, "--bank", "gone"], ["bank: there is no folder gone"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if value[0].startswith("--") else "",
)  # fmt: skip
def test_bad_options(explain, weights, own_bank, tmp_path, options, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bank(tmp_path / "other", rows(30, 5), torch.zeros(30).long())
    write_bank(tmp_path / "wrong", rows(30, 48), torch.zeros(30).long(), model="somebody's",
               checkpoint={"file": "mine.pth"}, weights_sha256="1")  # fmt: skip
    if "resnet.pth" in options:
        torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "resnet.pth")
        write_bank(tmp_path / "wide", rows(30, 512), torch.zeros(30).long())
    given = {"--checkpoint": weights, "--bank": own_bank / "bank", "--k": 8} | dict(zip(options[::2], options[1::2]))
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    one_line_error(explain(*words, "--output-dir", "out"), *texts)
    assert not (tmp_path / "out").exists()


def test_a_default_that_was_named_is_not_replaced(offline, tmp_path):
    bank = write_bank(tmp_path / "bank", rows(30, 48), torch.zeros(30).long(), model="somebody's")
    result = run(SCRIPT, "--model", "vit_small_patch8_224.dino", "--bank", bank, env=offline, cwd=tmp_path)
    one_line_error(result, "model: the weights of vit_small_patch8_224.dino are not cached")
    assert not (tmp_path / "results").exists()


def test_defaults_of_the_options():
    options = vars(script.parse_options([]))
    assert [options[name] for name in ("k", "temperature", "target_k", "batch", "size")] == [20, 0.07, 200, 16, "image"]
    assert [options[name] for name in ("variant", "score")] == ["paper", "importance"]


def test_the_supervised_script_names_this_one(capfd, tmp_path):
    result = call(supervised_script.main, capfd, "--model", EMBEDDED, "--output-dir", tmp_path)
    one_line_error(result, "has no classifier", f"{SCRIPT.name} explains such models")


# ----------------------------------------------------------------------------------------------------------------------
# Other families
# ----------------------------------------------------------------------------------------------------------------------


def test_xcit_in_the_layout_of_dino(own_bank, explain, capfd, tmp_path):
    """A bank is built with a training checkpoint of DINO, and the script explains two class-attention blocks."""
    name = "xcit_nano_12_p16_224"
    teacher = by_facebook(tiny_timm(name, num_classes=0).state_dict())
    teacher = {f"module.backbone.{key}": value for key, value in teacher.items()}
    teacher |= {"module.head.mlp.0.weight": torch.zeros(8, 128), "module.head.last_layer.weight_v": torch.zeros(9, 8)}
    torch.save({"student": teacher, "teacher": teacher, "epoch": 300}, tmp_path / "dino_xcit.pth")
    options = ("--model", name, "--checkpoint", tmp_path / "dino_xcit.pth")
    folders = ("--train", own_bank / "photos", "--out", tmp_path / "bank", "--workers", 0)
    built = call(memorybank_main, capfd, "build", *options, *folders)
    assert built.returncode == 0, built.stderr

    result = explain(*options, "--bank", tmp_path / "bank", "--output-dir", tmp_path / "out", "--k", 5)
    assert result.returncode == 0, result.stderr
    assert "(class token, 2 class-attention blocks) -> " in result.stdout
    folder = next((tmp_path / "out" / name).glob("coffee-*"))
    flow, maps = json.loads((folder / "flow.json").read_text()), np.load(folder / "maps.npz")
    assert flow["decomposed"] == "class token, 2 class-attention blocks" and flow["grid"] == [14, 14]
    assert maps["block_maps"].shape == (2, 14, 14) and (maps["block_maps"] > 0).any()
    with Image.open(folder / "flow.gif") as gif:
        assert gif.n_frames == 2

    loaded, bank = load(name, tmp_path / "dino_xcit.pth"), MemoryBank.load(tmp_path / "bank")
    images = loaded.transform(read_image(ROOT / ".img" / "coffee.png")).unsqueeze(0)
    expected = attention_flow(loaded.model, images, importance=lambda f: bank.importance(f, k=5))
    np.testing.assert_allclose(
        maps["accumulated"], expected.accumulated[0], atol=1e-4 * float(expected.accumulated.max())
    )


def test_transformers_model_and_its_bank(offline, own_bank, explain, tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    build_random(transformers.Dinov2Model, config).save_pretrained(tmp_path / "mine")
    model = f"hf:{tmp_path / 'mine'}"
    options = ("--train", own_bank / "photos", "--out", tmp_path / "bank", "--workers", 0)
    result = run("-m", "memorybank", "build", "--model", model, *options, env=offline, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    result = explain("--model", model, "--bank", tmp_path / "bank", "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    flow = json.loads(next(tmp_path.rglob("flow.json")).read_text())
    assert flow["model"] == "hf:mine" and flow["grid"] == [4, 4] and flow["decomposed"] == "class token, 3 blocks"
    assert flow["versions"]["transformers"] == transformers.__version__
    result = explain("--bank", tmp_path / "bank")
    one_line_error(result, "model: the bank", "was built with a folder mine; pass it with --model hf:PATH")
