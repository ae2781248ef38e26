"""Fixtures of several test files; one thread for each of pytest's processes, which share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the scripts that tests start

import pytest
from tiny_models import random_images, tiny_vit


@pytest.fixture
def model():
    return tiny_vit()


@pytest.fixture
def images():
    return random_images(2, 3, 32, 32)
