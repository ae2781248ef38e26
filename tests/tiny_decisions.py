"""Decisions of small models, for the tests of the evaluation: by a classifier, or by a memory bank."""

import torch
from tiny_banks import rows, write_bank
from tiny_models import random_images

from evaluation.decision import Decision
from evaluation.explained import Explained
from memorybank import MemoryBank
from models import LoadedModel


def decision_of(model, bank=None, **options):
    """Return the decision of a model, with or without a bank."""
    classes = 0 if bank else 5
    return Decision(LoadedModel("tiny", model, None, (32, 32), classes, None, None), bank, **options)


def explained_of(model, images=None, **options):
    """Explain the classes 3 and 1 of two images, or class 3 of one."""
    images = random_images(2, 3, 32, 32) if images is None else images
    classes = torch.tensor([3, 1])[: len(images)]
    return Explained(decision_of(model), images, classes, ["a", "b"][: len(images)], **options)


def small_bank(folder):
    """Return a bank of 60 random features, 24 wide, of 4 classes."""
    return MemoryBank.load(write_bank(folder, rows(60, 24), torch.arange(60) % 4))
