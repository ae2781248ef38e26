"""Tests of `load("hf:...")` with local folders, caches and servers."""

import hashlib
import http.server
import io
import json
import logging
import math
import shutil
import sys
import threading
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants as hub
from PIL import Image
from tiny_checkpoints import refused, same_weights

import models
from models import WeightsUnavailable, load

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "image_size": 32, "patch_size": 8}  # fmt: skip


NAMES = {0: "tench, Tinca tinca", 1: "tabby", 2: "cup"}
CLOSED = "http://127.0.0.1:9"  # nobody listens there


def saved(folder, kind="ViTForImageClassification", processor="ViTImageProcessor", **settings):
    """Write a tiny random model with `save_pretrained`, and its image processor; return the model."""
    import transformers

    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SHAPE, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # tokens and biases start as zeros, which would hide a mix-up
    model.save_pretrained(folder)
    if processor:
        getattr(transformers, processor)(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "ENDPOINT", CLOSED)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersForImageClassification",
        "BeitForImageClassification",
        "ConvNextForImageClassification",  # no ViT: `attention_flow` refuses it, not `load`
    ],
)
def test_a_classifier_of_transformers(tmp_path, kind):
    own = {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1]} if "ConvNext" in kind else {}
    model = saved(tmp_path / "mine", kind, id2label=NAMES, **own)
    loaded = load(f"hf:{tmp_path / 'mine'}")
    assert type(loaded.model) is type(model) and not loaded.model.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images).logits, model(images).logits)
    assert loaded.num_classes == 3 and loaded.class_names == list(NAMES.values()) and loaded.size == (32, 32)
    assert loaded.name == "hf:mine" and loaded.checkpoint == tmp_path / "mine" / "model.safetensors"
    assert loaded.provenance["file"] == "model.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"does not fit ViTForImageClassification: 16 keys without a place \(vit"),
        ({"qkv_bias": False}, r"does not fit ViTForImageClassification: 6 keys without a place \(vit.*bias"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers should be from 1 to 256"),
        ({"num_labels": 10**9}, "config.json: num_labels should be from 0 to 1000000"),
        ({"image_size": [32, 10**9]}, "config.json: image_size should be from 1 to 4096"),
        ({"vision_config": {"patch_size": 0}}, "config.json: patch_size should be from 1 to 4096"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(tmp_path, changes, message):
    saved(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(f"hf:{tmp_path}", message)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 10**9, "width": 5}}, {"size": {"height": -5, "width": 5}}, {"image_mean": [0, 0]},
        {"size": {"height": "a", "width": 5}}, {"image_mean": "x"}, {"image_mean": [math.nan] * 3},
        {"image_std": [0, 0, 0]}, {"image_std": [None]},
    ],
)  # fmt: skip
def test_a_preprocessor_that_no_images_fit(tmp_path, changes):
    saved(tmp_path)
    edit(tmp_path / "preprocessor_config.json", **changes)
    refused(f"hf:{tmp_path}", f"preprocessor_config.json: .*({'|'.join(changes)}).* should be ")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_that_training_code_wrapped(tmp_path, prefix, wrapped):
    state = saved(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    content = {prefix + key: value for key, value in state.items()}
    torch.save({"state_dict": content, "epoch": 3} if wrapped else content, tmp_path / "pytorch_model.bin")
    assert same_weights(load(f"hf:{tmp_path}").model, state)


def test_names_in_errors_are_cut_and_escaped():
    assert len(str(refused("hf:" + "a" * 3000, "is neither a folder nor on the hub"))) < 300
    assert "\0" not in str(refused("hf:a\0b\x1b", r"hf:a\\x00b\\x1b is neither a folder"))


@pytest.mark.parametrize(
    "kind", ["ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"]
)
def test_a_backbone_of_transformers_has_no_pooling_layer(tmp_path, kind):
    model = saved(tmp_path, kind)
    loaded = load(f"hf:{tmp_path}")
    assert type(loaded.model) is type(model) and getattr(loaded.model, "pooler", None) is None
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images).last_hidden_state, model(images).last_hidden_state)
    assert loaded.num_classes == 0 and loaded.class_names is None


def test_the_weights_of_another_task_load_as_a_backbone(tmp_path):
    model = saved(tmp_path, "ViTForMaskedImageModeling")
    loaded = load(f"hf:{tmp_path}")
    assert type(loaded.model).__name__ == "ViTModel" and loaded.num_classes == 0
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.vit.state_dict()[name]), name


def test_features_are_what_the_classifier_reads(tmp_path):
    model = saved(tmp_path)
    features = load(f"hf:{tmp_path}").features(images := torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(model.classifier(features), model(images).logits)


def test_labels_without_names_are_no_class_names(tmp_path):
    saved(tmp_path, num_labels=5)
    loaded = load(f"hf:{tmp_path}")
    assert loaded.num_classes == 5 and loaded.class_names is None


def test_half_precision_becomes_float32_and_attention_is_fused(tmp_path):
    saved(tmp_path).half().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", _attn_implementation="eager")
    model = load(f"hf:{tmp_path}").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_a_load_is_silent_and_leaves_transformers_as_it_was(tmp_path, capfd, request):
    import transformers

    saved(tmp_path, "ViTForMaskedImageModeling")  # its decoder is not wanted, of which transformers would tell
    told = transformers.utils.logging
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("transformers").addHandler(handler)
    request.addfinalizer(partial(logging.getLogger("transformers").removeHandler, handler))
    request.addfinalizer(partial(told.set_verbosity, told.get_verbosity()))
    told.set_verbosity_info()
    bars = told.is_progress_bar_enabled()
    capfd.readouterr()
    load(f"hf:{tmp_path}")
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")
    assert told.get_verbosity() == logging.INFO and told.is_progress_bar_enabled() == bars


def test_parts_of_the_weights(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    loaded = load(f"hf:{tmp_path}")
    assert loaded.checkpoint.name == "model.safetensors.index.json"
    joined = b"".join(part.read_bytes() for part in parts)
    assert loaded.provenance == {"file": loaded.checkpoint.name, "sha256": hashlib.sha256(joined).hexdigest()}
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)
    parts[0].unlink()
    refused(f"hf:{tmp_path}", "has no model.safetensors or pytorch_model.bin, or not all of its parts")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(f"hf:{tmp_path}", "index.json is not an index of weights")


def test_weights_that_torch_saved(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load(f"hf:{tmp_path}")
    assert loaded.checkpoint.name == "pytorch_model.bin"
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran while a model was loaded",))


def test_no_code_of_a_model_is_run(tmp_path, capfd):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict() | {"classifier.bias": Malicious()}, tmp_path / "pytorch_model.bin")
    refused(f"hf:{tmp_path}", "cannot be loaded: ")
    (tmp_path / "own.py").write_text("print('code ran while a model was loaded')")
    edit(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    refused(f"hf:{tmp_path}", "cannot be loaded: .*custom code")
    assert "code ran" not in capfd.readouterr().out


def without(*keys):
    def change(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state = {key: value for key, value in state.items() if not key.startswith(keys)}
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("classifier."),
            r"does not fit ViTForImageClassification: "
            r"2 keys missing \(classifier.bias, classifier.weight\)",
        ),
        (without("vit.encoder", "vit.layers", "vit.layernorm"), r"keys missing \((\S+, ){3}\.\.\.\)"),
        (
            lambda folder: edit(folder / "config.json", id2label={"0": "a", "1": "b"}),
            r"2 keys of another shape \(classifier.bias, classifier.weight\)",
        ),
        (
            lambda folder: edit(folder / "config.json", architectures=["MyForImageClassification"]),
            "has no MyForImageClassification",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {}}'
            ),
            "it is a timm model; name it vit_tiny_patch16_224",
        ),
        (lambda folder: edit(folder / "config.json", model_type="nothing"), "cannot be loaded: "),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: "),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded: "),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path, change, message):
    saved(tmp_path / "mine", num_labels=3)
    change(tmp_path / "mine")
    assert str(refused(f"hf:{tmp_path / 'mine'}", message)).startswith("model: hf:mine ")


def test_a_model_that_takes_no_images(tmp_path):
    import transformers

    own = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**own), add_pooling_layer=False).save_pretrained(tmp_path)
    refused(f"hf:{tmp_path}", "says the image size")


def test_transformers_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("hf:some/vit", r'^model: hf:some/vit needs the package transformers; pip install -e "\.\[huggingface\]"$')


def test_a_checkpoint_beside_a_folder(tmp_path):
    refused(f"hf:{tmp_path}", "^checkpoint: hf: models bring .*; pass their folder as hf:PATH$", tmp_path / "w.pth")


# Images ---------------------------------------------------------------------------------------------------------------


def test_the_transform_does_what_the_image_processor_does(tmp_path):
    import transformers

    saved(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 48, "width": 32}, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (6, 5, 3), np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    loaded = load(f"hf:{tmp_path}")
    assert loaded.size == (48, 32)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    difference = (loaded.transform(picture) - theirs) * torch.tensor([0.5, 0.6, 0.7])[:, None, None] * 255
    assert difference.abs().max() < 1.5  # two ways to round to 8 bits


CROPPED = {
    "crop_size": 24, "size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "resample": 3,
}  # fmt: skip
"""Settings in the format of the oldest models on the hub."""


@pytest.mark.parametrize(
    ("settings", "size", "mean", "std"),
    [
        (CROPPED, 24, 0.485, 0.229),
        (CROPPED | {"do_center_crop": False}, 28, 0.485, 0.229),
        (
            CROPPED | {"feature_extractor_type": None, "image_processor_type": "BitImageProcessor",
                       "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}},
            24, 0.485, 0.229,
        ),
        ({"size": 40, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, "do_normalize": False}, 40, 0, 1),
        ({"size": {"shortest_edge": 20}, "do_center_crop": False, "image_processor_type": "BitImageProcessor",
          "image_mean": [0.4] * 3, "image_std": [0.2] * 3}, 20, 0.4, 0.2),
        (None, 32, 0.5, 0.5),
    ],
)  # fmt: skip
def test_the_whole_picture_in_the_size_of_the_crop(tmp_path, settings, size, mean, std):
    saved(tmp_path, processor=None)
    if settings:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load(f"hf:{tmp_path}")
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (150, 0, 300, 100))  # the right half is white
    tensor = loaded.transform(picture)
    assert loaded.size == (size, size) and tensor.shape == (3, size, size)
    torch.testing.assert_close(tensor[0, :, 0], torch.full((size,), (0 - mean) / std))
    torch.testing.assert_close(tensor[0, :, -1], torch.full((size,), (1 - mean) / std))
    assert (tensor[0, 0] > (0.5 - mean) / std).sum() == size // 2  # nothing was cropped


# The hub --------------------------------------------------------------------------------------------------------------


def cached(folder, tmp_path, repository="some/vit", revision="main", commit="0" * 40):
    """Write what a download of a folder by huggingface_hub leaves behind."""
    cache = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / revision).write_text(commit)
    return shutil.copytree(folder, cache / "snapshots" / commit)


def test_a_cached_model_is_used_without_asking_the_network(tmp_path, monkeypatch):
    model = saved(tmp_path / "mine", num_labels=3)
    snapshot = cached(tmp_path / "mine", tmp_path)
    other = saved(tmp_path / "other", num_labels=4)
    cached(tmp_path / "other", tmp_path, revision="v2", commit="1" * 40)
    monkeypatch.setattr(models.transformers_models, "require_server", lambda *_: pytest.fail("the network was asked"))
    loaded = load("hf:some/vit")
    assert loaded.name == "hf:some/vit" and loaded.checkpoint == snapshot / "model.safetensors"
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)
    loaded = load("hf:some/vit@v2")
    assert loaded.name == "hf:some/vit@v2" and loaded.num_classes == 4
    assert torch.equal(loaded.model.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "preprocessor_config.json", "everything"])
def test_a_cache_that_lacks_something_and_no_network(tmp_path, lacking):
    if lacking != "everything":
        saved(tmp_path / "mine")
        (cached(tmp_path / "mine", tmp_path) / lacking).unlink()
    error = refused("hf:some/vit", f"the weights of hf:some/vit are not cached and {CLOSED} cannot be reached")
    assert isinstance(error, WeightsUnavailable)


def test_a_cache_that_knows_that_there_is_no_image_processor(tmp_path):
    saved(tmp_path / "mine", processor=None)
    cached(tmp_path / "mine", tmp_path)
    refused("hf:some/vit", "cannot be reached")
    note = tmp_path / "hub" / "models--some--vit" / ".no_exist" / ("0" * 40) / "preprocessor_config.json"
    note.parent.mkdir(parents=True)
    note.touch()
    assert load("hf:some/vit").size == (32, 32)


@pytest.mark.parametrize("name", ["", "no/such/folder", "./gone", "a b", "-x"])
def test_neither_a_folder_nor_a_name_of_the_hub(name):
    refused(f"hf:{name}", "is neither a folder nor on the hub, where names are like google/vit-base-patch16-224")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub whose repository some/vit is the folder `site`; other repositories are gated or do not exist."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def answer(self):
            repository, _, file = self.path.strip("/").partition("/resolve/main/")
            path = tmp_path / "site" / file
            problem = {"": None, "some/vit": None, "some/gated": "GatedRepo"}.get(repository, "RepoNotFound")
            if repository == "some/vit" and not path.is_file():
                problem = "EntryNotFound"
            body = path.read_bytes() if repository == "some/vit" and not problem else b""
            self.send_response({None: 200, "GatedRepo": 403}.get(problem, 404))
            for key, value in {"X-Error-Code": problem, "X-Repo-Commit": "2" * 40, "ETag": f'"{file}"'}.items():
                if value:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub, "ENDPOINT", url)
        for module in (hub, huggingface_hub.file_download):  # older versions have it in both
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_what_is_not_cached_is_fetched_once(tmp_path, monkeypatch, server, weights):
    processor = None if weights == "pytorch_model.bin" else "ViTImageProcessor"  # a cache knows what is not there, too
    model = saved(tmp_path / "site", processor=processor)
    if weights != "model.safetensors":
        (tmp_path / "site" / "model.safetensors").unlink()
    if weights == "pytorch_model.bin":
        torch.save(model.state_dict(), tmp_path / "site" / weights)
    else:
        model.save_pretrained(tmp_path / "site", max_shard_size="20KB" if "index" in weights else "1GB")
    loaded = load("hf:some/vit")
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight) and loaded.checkpoint.name == weights
    monkeypatch.setattr(hub, "ENDPOINT", CLOSED)
    assert load("hf:some/vit").checkpoint == loaded.checkpoint


def test_what_the_hub_does_not_have(tmp_path, server):
    (tmp_path / "site").mkdir()
    refused("hf:no/model", "is neither a folder nor on the hub")
    refused("hf:some/vit", "hf:some/vit has no config.json, so it is not a transformers model")
    assert isinstance(refused("hf:some/gated", "is gated; accept its terms"), WeightsUnavailable)
