"""Fixtures of several test files."""

import pytest
from tiny_models import random_images, tiny_vit


@pytest.fixture
def model():
    return tiny_vit()


@pytest.fixture
def images():
    return random_images(2, 3, 32, 32)
