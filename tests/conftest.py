"""Fixtures of several test files; one thread for each of pytest's processes, which share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the scripts that tests start

import json
from functools import partial

import pytest
import safetensors.torch
from scripts import call, offline_environment
from tiny_models import random_images, tiny_vit


@pytest.fixture
def model():
    return tiny_vit()


@pytest.fixture
def images():
    return random_images(2, 3, 32, 32)


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """Environment variables without a model hub and with an empty cache."""
    return offline_environment(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def explain(capfd):
    """Run the supervised script in this process."""
    import VIT_DynamicAccumulatedAttentionMap_oneSample as script

    return partial(call, script.main, capfd)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoint of a small classifier of three classes, with its metadata."""
    import timm
    import torch

    torch.manual_seed(0)
    file, name = tmp_path_factory.mktemp("weights") / "tiny.safetensors", "vit_tiny_patch16_224"
    metadata = {"architecture": name, "class_names": json.dumps(["cat", "dog", "jack-o'-lantern / pumpkin"])}
    safetensors.torch.save_file(timm.create_model(name, num_classes=3).state_dict(), file, metadata)
    return file
