"""The decision to explain: the class of every photo, its probability, and the gradient sent back from the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from command_line.results import short
from daam_core import features, score_gradient
from daam_vit.libraries import scores
from memorybank import MemoryBank, Vote
from models import LoadedModel

BATCH = 8
"""Images in one forward; larger batches are slower on a CPU, as their activations do not fit into its cache."""


@dataclass(frozen=True)
class Decision:
    """The decision of a model: by its classifier or, if it has none, by the nearest neighbours in a memory bank."""

    loaded: LoadedModel
    bank: MemoryBank | None = None
    """The memory bank of a model without a classifier."""
    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """Temperature of their votes."""
    target_k: int = 200
    """Number of neighbours to search for those of another class."""

    def outputs(self, images: Tensor) -> Tensor:
        """Return the scores `(B, num_classes)`, or with a bank the features `(B, D)`; differentiable."""
        if self.bank is not None:
            return features(self.loaded.model, images)
        return scores(self.loaded.model, images)

    def shares(self, images: Tensor) -> Tensor:
        """Return probabilities, or with a bank shares of the votes, `(B, num_classes)` in 0..1; without graph."""
        with torch.inference_mode():
            outputs = torch.cat([self.outputs(part) for part in images.split(BATCH)]).float()
            if self.bank is None:
                return outputs.softmax(1)
            votes = self._vote(outputs, self.k).votes
            return votes / votes.sum(1, keepdim=True)

    def grad_outputs(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the gradient to send back from the outputs to explain `classes`.

        Args:
            images: `(B, 3, H, W)`.
            classes: `(B,)`.

        Returns:
            One-hot rows `(B, num_classes)`, or with a bank the importance of the dimensions `(B, D)`.

        Raises:
            ValueError: if no neighbour belongs to the class.
        """
        if self.bank is None:
            return F.one_hot(classes, self.loaded.num_classes).to(images)
        with torch.no_grad():
            outputs = torch.cat([self.outputs(part) for part in images.split(BATCH)])
        vote = self._vote(outputs.float(), self.k)
        if not (vote.labels == classes.unsqueeze(1)).any(1).all():
            vote = self._vote(outputs.float(), self.target_k)
        return self.bank.importance_of(outputs, vote, classes).to(outputs, copy=True)  # not an inference tensor

    def log_odds(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the gradient to send back from the outputs for the log-odds of `classes`; as `grad_outputs`."""
        with torch.no_grad():
            outputs = torch.cat([self.outputs(part) for part in images.split(BATCH)])
        if self.bank is None:
            return score_gradient(outputs, classes, "log_odds").to(images)
        return self.bank.log_odds(outputs, temperature=self.temperature, target=classes).to(outputs, copy=True)

    def second(self, images: Tensor, classes: Tensor) -> Tensor | None:
        """Return the most probable class other than `classes`, `(B,)`; None if an image has no other class.

        With a bank, `target_k` neighbours vote.
        """
        if self.bank is None:
            shares = self.shares(images)
        else:
            with torch.inference_mode():
                shares = self._vote(self.outputs(images).float(), self.target_k).votes
        others = shares.scatter(1, classes.unsqueeze(1), -1)
        return others.argmax(1) if (others.amax(1) > 0).all() else None

    def class_name(self, index: int) -> str:
        """Return the name of a class, without its synonyms."""
        names = self.loaded.class_names if self.bank is None else self.bank.class_names
        return short(names[index]) if names else f"class {index}"

    def _vote(self, outputs: Tensor, k: int) -> Vote:
        return self.bank.classify(outputs, min(k, len(self.bank.labels)), self.temperature)
