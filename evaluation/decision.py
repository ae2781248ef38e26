"""What is explained: the class of every photo, how probable it is, and the score whose gradient explains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from daam_core import features
from memorybank import MemoryBank, Vote
from models import LoadedModel

BATCH = 8
"""Images that the model sees at once; on a CPU larger batches are slower, since their activations leave the cache."""


@dataclass(frozen=True)
class Decision:
    """The decision of a model with a classifier; or of one without, by the vote of its neighbours in a bank."""

    loaded: LoadedModel
    bank: MemoryBank | None = None
    """For a model without a classifier."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of their votes."""
    target_k: int = 200
    """Neighbours among which those of the second class are looked for."""

    def outputs(self, images: Tensor) -> Tensor:
        """`(B, num_classes)` scores, or with a bank the `(B, D)` features; differentiable."""
        if self.bank is not None:
            return features(self.loaded.model, images)
        output = self.loaded.model(images)
        return getattr(output, "logits", output)  # transformers

    def shares(self, images: Tensor) -> Tensor:
        """`(B, num_classes)`: probabilities, or shares of the votes, 0..1; without a graph."""
        with torch.inference_mode():
            outputs = torch.cat([self.outputs(part) for part in images.split(BATCH)]).float()
            if self.bank is None:
                return outputs.softmax(1)
            votes = self._vote(outputs, self.k).votes
            return votes / votes.sum(1, keepdim=True)

    def seeds(self, images: Tensor, classes: Tensor) -> Tensor:
        """What is sent back from the outputs to explain `classes` `(B,)`: one-hot rows `(B, num_classes)`, or with a
        bank the dimension-wise importance `(B, D)`.

        Raises:
            ValueError: when no neighbour is of that class.
        """
        if self.bank is None:
            return F.one_hot(classes, self.loaded.num_classes).to(images)
        with torch.no_grad():
            outputs = torch.cat([self.outputs(part) for part in images.split(BATCH)])
        vote = self._vote(outputs.float(), self.k)
        if not (vote.labels == classes.unsqueeze(1)).any(1).all():
            vote = self._vote(outputs.float(), self.target_k)
        return self.bank.importance_of(outputs, vote, classes).to(outputs, copy=True)  # no tensor of inference mode

    def second(self, images: Tensor, classes: Tensor) -> Tensor | None:
        """`(B,)`: the most probable class beside `classes`, with a bank by the votes of `target_k` neighbours; None
        where an image has none."""
        if self.bank is None:
            shares = self.shares(images)
        else:
            with torch.inference_mode():
                shares = self._vote(self.outputs(images).float(), self.target_k).votes
        others = shares.scatter(1, classes.unsqueeze(1), -1)
        return others.argmax(1) if (others.amax(1) > 0).all() else None

    def class_name(self, index: int) -> str:
        names = self.loaded.class_names if self.bank is None else self.bank.class_names
        return names[index].split(", ")[0] if names else f"class {index}"

    def _vote(self, outputs: Tensor, k: int) -> Vote:
        return self.bank.classify(outputs, min(k, len(self.bank.labels)), self.temperature)
