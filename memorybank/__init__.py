"""Query a memory bank: features of labelled images, whose nearest neighbours classify and explain another image.

    bank = MemoryBank.load("memorybank/embedded")
    vote = bank.classify(features)                                       # features (B, D)
    flow = attention_flow(model, images, importance=bank.importance)     # explains a model without a classifier

This is non-parametric instance discrimination (Wu, Xiong, Yu, Lin, CVPR 2018, https://arxiv.org/abs/1805.01978), as in
the k-NN evaluation of DINO (https://github.com/facebookresearch/dino, eval_knn.py). A bank is a folder:

    trainfeat.pth       (M, D)  float16 or float32, rows L2-normalised; saved by torch or numpy
    trainlabels.pth     (M,)    integers, the class of every row
    testfeat.pth, testlabels.pth    the same for other images; read by the evaluation only
    bank.json           model, checkpoint, transform, class names, files, counts, versions; absent in DINO's banks

`memorybank.build` makes a bank from a folder of images. The command is `python -m memorybank build | eval | info`.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor

from daam_core import dimension_importance, neighbour_votes
from daam_vit.arguments import check_integer, check_number, check_type
from daam_vit.inputs import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    check_directions,
    check_indices,
    check_shapes,
    check_tensor,
    unusual_kind,
)
from daam_vit.text import printable
from memorybank.files import read_metadata, read_pair, shown
from memorybank.search import mean_rows, nearest_rows
from models.weights import usable_device

__all__ = ["MIN_TEMPERATURE", "MemoryBank", "Vote", "read_pair"]

EMBEDDED_BANK = Path(__file__).parent / "embedded"
"""Folder of the bank that is stored in the repository."""
IMAGENET = "ImageNet2012"
"""Name of the folder in `memorybank/DINO` whose banks `<model>` have no bank.json and hold ImageNet."""


@dataclass(frozen=True)
class Vote:
    """Votes of the k nearest neighbours of B features, on the device of the features."""

    prediction: Tensor
    """`(B,)` int64: the class with the largest sum of votes."""
    votes: Tensor
    """`(B, K)` float32: sum of exp(similarity / temperature) over the neighbours of each of the K classes."""
    neighbours: Tensor
    """`(B, k)` int64: rows of the bank, the most similar first."""
    similarities: Tensor
    """`(B, k)` float32: cosines with the neighbours, -1..1."""
    labels: Tensor
    """`(B, k)` int64: classes of the neighbours."""


@dataclass(frozen=True)
class MemoryBank:
    """A memory bank; `MemoryBank.load` opens one."""

    directory: Path
    """The folder of the bank."""
    features: Tensor
    """`(M, D)` float16 or float32, rows L2-normalised; memory-mapped on the CPU."""
    labels: Tensor
    """`(M,)` int64, the class of every row."""
    class_names: list[str] | None
    """One name per class; None if they are unknown."""
    files: list[str] | None
    """The image of every row, as listed in bank.json; None if they are unknown. `file` returns the path."""
    metadata: dict
    """Content of bank.json; empty if there is none."""

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> MemoryBank:
        """Open the training features and labels of a bank, and check all of them once.

        Args:
            directory: the folder of the bank.
            device: the device of the features; on the CPU they are memory-mapped and read when they are needed.

        Raises:
            TypeError: if `directory` is no path.
            ValueError: if a file is missing or damaged or holds more than tensors, a row is not finite or not
                L2-normalised, features, labels and bank.json do not agree, or the device cannot be used.
        """
        check_type("bank", directory, (str, os.PathLike), "a folder")
        directory, device = Path(directory), usable_device(device)
        if not os.path.isdir(directory):
            folder = shown(directory)
            raise ValueError(
                f"bank: there is no folder {folder}; build one: "
                f"python -m memorybank build --model NAME --train FOLDER --out {folder}"
            )
        metadata = read_metadata(directory)
        features, labels = read_pair(directory, "train")
        names = metadata.get("class_names")
        if not metadata and _is_imagenet(directory, labels):
            names = ImageNetInfo().label_descriptions()
        files = metadata.get("train", {}).get("files")
        bank = cls(directory, features.to(device), labels.to(device), names, files, metadata)
        bank._check_split("train", labels)
        return bank

    def read_test(self) -> tuple[Tensor, Tensor] | None:
        """Return features `(N, D)` and labels `(N,)` of the test pair, on the CPU; None if the bank has none.

        Raises:
            ValueError: as in `load`; also if the pair does not fit the training features.
        """
        if not any((self.directory / name).is_file() for name in ("testfeat.pth", "testlabels.pth")):
            return None
        features, labels = read_pair(self.directory, "test")
        widths = features.shape[1], self.features.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(
                f"bank: {shown(self.directory / 'testfeat.pth')} has features of width {widths[0]}, "
                f"those of the train pair have {widths[1]}; build the bank again"
            )
        self._check_split("test", labels)
        return features, labels

    def _check_split(self, split: str, labels: Tensor) -> None:
        """Raise a ValueError unless the labels of a split fit the classes and what bank.json says."""
        classes = self.num_classes
        if labels.max() >= classes:
            file = shown(self.directory / f"{split}labels.pth")
            raise ValueError(f"bank: {file} has the label {labels.max()}, but there are {classes} classes")
        said, json = self.metadata.get(split, {}), shown(self.directory / "bank.json")
        count, files = said.get("count", len(labels)), said.get("files")
        if count != len(labels):
            raise ValueError(f"bank: {json}: {split}.count is {count} for {len(labels)} features")
        if files is not None and len(files) != len(labels):
            raise ValueError(f"bank: {json} lists {len(files)} files for {len(labels)} features")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1 if self.class_names is None else len(self.class_names)

    def file(self, row: int) -> Path | None:
        """Return the image of a row, which may have been deleted; None if it is unknown."""
        row = check_integer("row", row, 0, len(self.labels) - 1)
        return self.directory / self.metadata["train"].get("folder", "") / self.files[row] if self.files else None

    def class_name(self, label: int) -> str:
        """Return the name of a class, or "class LABEL" if the names are unknown."""
        label = check_integer("label", label, 0, self.num_classes - 1)
        return f"class {label}" if self.class_names is None else self.class_names[label]

    def check_model(self, name: str, width: int, weights: str) -> None:
        """Raise a ValueError unless the bank was built with this model.

        Without bank.json only the width of the features is compared.

        Args:
            name: name of the model, `LoadedModel.name`.
            width: D, width of its features.
            weights: hash of its weights, `models.weights_sha256`.
        """
        rebuild = f"build one with it: python -m memorybank build --model {name} --train FOLDER --out DIR"
        theirs, file = self.metadata.get("model", name), (self.metadata.get("checkpoint") or {}).get("file")
        if self.metadata.get("weights_sha256", weights) != weights:
            another = f"the model {printable(theirs, 80)}, not with {name}"
            other = f"other weights of {name}" if theirs == name else another
            other += f" ({printable(file, 80)})" if file else ""
            raise ValueError(f"bank: {shown(self.directory)} was built with {other}; {rebuild}")
        if width != self.features.shape[1]:
            raise ValueError(
                f"bank: {shown(self.directory)} has features of width {self.features.shape[1]}, "
                f"those of {name} have {width}; {rebuild}"
            )

    @torch.inference_mode()
    def nearest(self, features: Tensor, k: int = 20) -> tuple[Tensor, Tensor]:
        """Find the k rows of the bank with the largest cosine, exactly, in one pass over the bank.

        Args:
            features: `(B, D)`, or `(D,)` for one feature; they need not be normalised.
            k: number of rows.

        Returns:
            Cosines `(B, k)` float32, the largest first, and rows `(B, k)` int64, on the device of the features.

        Raises:
            TypeError: if `features` is not a tensor, or k is not an integer.
            ValueError: if the width differs, a feature is zero, a feature or the bank is not finite, or k is not
                in 1..M.
        """
        query, rows = self._queries(features), len(self.features)  # (B, D)
        if (k := check_integer("k", k, 1)) > rows:
            raise ValueError(f"k: expected 1 to {rows}, the number of features in {shown(self.directory)}, got {k}")
        cosines, nearest = nearest_rows(self.features, query, k)  # (B, k) twice
        self._check_finite(cosines)
        return cosines.to(features.device), nearest.to(features.device)

    def _queries(self, features: Tensor) -> Tensor:
        """Return features, `(B, D)` or `(D,)`, L2-normalised on the device of the bank: `(B, D)` float32."""
        check_tensor("features", features, "a tensor (B, D)")
        width = self.features.shape[1]
        query = features if features.ndim == 2 else features.unsqueeze(0)
        if query.ndim != 2 or query.shape[1] != width or not len(query):
            raise ValueError(f"features: expected (B, {width}), the width of the bank, got {tuple(features.shape)}")
        check_directions(query)
        return F.normalize(query.to(self.features.device, torch.float32), dim=1)

    @torch.inference_mode()
    def classify(self, features: Tensor, k: int = 20, temperature: float = 0.07) -> Vote:
        """Classify features by the votes of their k nearest neighbours, exp(cosine / temperature) each.

        Args:
            features: `(B, D)`, or `(D,)` for one feature.
            k: number of neighbours that vote.
            temperature: the lower, the more the nearest neighbours count.

        Raises:
            ValueError: as in `nearest`; also if the temperature is below `MIN_TEMPERATURE`.
        """
        return self.vote(*self.nearest(features, k), temperature)

    def vote(self, similarities: Tensor, neighbours: Tensor, temperature: float = 0.07) -> Vote:
        """Count the votes of neighbours that `nearest` has found: similarities and rows, both `(B, k)`."""
        check_shapes("B k, B k", similarities=similarities, neighbours=neighbours)
        neighbours = check_indices("neighbours", neighbours, len(self.labels), "rows")
        labels = self.labels[neighbours.to(self.labels.device)].to(neighbours.device)
        votes = neighbour_votes(similarities, labels, self.num_classes, temperature)
        return Vote(votes.argmax(1), votes, neighbours, similarities, labels)

    @torch.inference_mode()
    def importance(
        self,
        features: Tensor,
        k: int = 20,
        temperature: float = 0.07,
        target: int | Tensor | None = None,
        target_k: int = 200,
    ) -> Tensor:
        """Compute the importance of every dimension of a feature, Eqs. 7 and 8, for `attention_flow(importance=...)`.

        The result is that of `daam_core.neighbour_importance`, for banks that do not fit into memory and for any class.

        Args:
            features: `(B, D)`, or `(D,)` for one feature.
            k: number of neighbours that vote; the importance comes from those of the winning class.
            temperature: temperature of the votes.
            target: another class to explain, one for all images or `(B,)`.
            target_k: number of neighbours among which those of `target` are searched; all if the bank has fewer.

        Returns:
            `(B, D)` float32, 0..1, on the device of the features.

        Raises:
            ValueError: as in `classify`; also if `target` is out of range or no neighbour belongs to it.
        """
        if target is None:
            vote = self.classify(features, k, temperature)
            return self.importance_of(features, vote, vote.prediction)
        k = min(max(k, check_integer("target_k", target_k, 1)), len(self.labels))
        return self.importance_of(features, self.classify(features, k, temperature), target)

    @torch.inference_mode()
    def importance_of(self, features: Tensor, vote: Vote, classes: int | Tensor) -> Tensor:
        """Compute `importance` from the neighbours of a `Vote`, for one class or classes `(B,)`."""
        check_type("vote", vote, Vote, "a Vote")
        check_tensor("features", features, "a tensor (B, D)")
        chosen = self._classes(classes, len(vote.labels)).to(vote.labels.device)
        mine = vote.labels == chosen.unsqueeze(1)  # (B, k)
        if not mine.any(1).all():
            b = int(mine.any(1).logical_not().nonzero()[0])
            counts = Counter(vote.labels[b].tolist())
            most = ", ".join(f"{n} {printable(self.class_name(c), 80)}" for c, n in counts.most_common(3))
            raise ValueError(
                f"target: none of the {mine.shape[1]} nearest neighbours belongs to the class "
                f"{printable(self.class_name(int(chosen[b])), 80)}; they are {most}{', ...' * (len(counts) > 3)}: "
                f"name one of them, or search more neighbours"
            )
        f = F.normalize(features.float().reshape(len(mine), -1), dim=1)
        rows = (n[m].to(self.features.device) for n, m in zip(vote.neighbours, mine))
        return dimension_importance(f, (self.features[n] for n in rows))  # one image at a time, to save memory

    @torch.inference_mode()
    def log_odds(
        self, features: Tensor, k: int = 20, temperature: float = 0.07, target: int | Tensor | None = None
    ) -> Tensor:
        """Compute the gradient of the log-odds of a class, for `attention_flow(importance=..., variant="relevance")`.

        All rows z of the bank vote, not only the nearest: those of the class for it, the others against it. With the
        length of the feature f as a constant, as the relevance flow takes the scale of a normalisation,

            Y = log sum_in exp(cos / T) - log sum_out exp(cos / T),    cos = f . z / |f|
            dY/df = (sum_in w z - sum_out w z) / (T |f|),              w = softmax(cos / T) within each sum

        With |f| as a variable, the part of dY/df along f would be missing, and so f . dY/df, the relevance that is
        sent back, would be zero.

        Args:
            features: `(B, D)`, or `(D,)` for one feature; they need not be normalised.
            k: number of neighbours that decide on the class, as in `classify`; without effect if `target` is passed.
            temperature: T; the lower, the more the nearest rows of each of the two sums count.
            target: the class, one for all images or `(B,)`; None for the class that `classify` predicts.

        Returns:
            `(B, D)` float32, on the device of the features.

        Raises:
            TypeError: as in `nearest`; also if the temperature is not a number.
            ValueError: as in `classify`; also if `target` is out of range, or no row or every row belongs to it.
        """
        f = self._queries(features)  # (B, D)
        check_number("temperature", temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
        classes = self.classify(features, k, temperature).prediction if target is None else target
        classes = self._classes(classes, len(f)).to(self.labels.device)  # (B,)
        self._check_sides(classes)
        inside, outside = mean_rows(self.features, self.labels, f, classes, temperature)  # (B, D) twice
        length = features.to(f).view_as(f).norm(dim=1, keepdim=True)  # (B, 1)
        gradient = (inside - outside) / (temperature * length)  # (B, D)
        self._check_finite(gradient)
        return gradient.to(features.device)

    def _check_sides(self, classes: Tensor) -> None:
        """Raise a ValueError unless the bank has rows of each of the classes, and rows of others."""
        counts = self.labels.bincount(minlength=self.num_classes)[classes]  # (B,)
        for c, count in zip(classes.tolist(), counts.tolist()):
            bank, name = shown(self.directory), printable(self.class_name(c), 80)
            if not count:
                raise ValueError(f"target: {bank} has no feature of the class {name}; name another class")
            if count == len(self.labels):
                raise ValueError(
                    f"bank: {bank} has features of the class {name} only, so that there are no odds; "
                    f"build one of two classes or more"
                )

    def _check_finite(self, values: Tensor) -> None:
        """Raise a ValueError unless what was computed from the rows of the bank is finite."""
        if not values.isfinite().all():
            raise ValueError(f"bank: {shown(self.directory)} has NaN or infinite values; build it again")

    def _classes(self, target: int | Tensor, batch: int) -> Tensor:
        try:
            classes = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            classes = torch.empty(0)
        no_index = classes.dtype == torch.bool or classes.is_floating_point() or unusual_kind(classes)
        classes = classes if no_index else classes.long()  # torch compares no unsigned integers
        if no_index or classes.shape not in ((), (batch,)):
            got = printable(repr(target), 80)
            raise ValueError(f"target: expected one class index, or {batch}, one per feature, got {got}")
        wrong = classes[(classes < 0) | (classes >= self.num_classes)].flatten().tolist()
        if wrong:
            raise ValueError(
                f"target: class {wrong[0]} is out of range; the bank has {self.num_classes} classes, from 0 on"
            )
        return classes.expand(batch)


def _is_imagenet(directory: Path, labels: Tensor) -> bool:
    """Return whether a bank has 1,000 classes and lies in a folder called `IMAGENET`."""
    return labels.max() == 999 and IMAGENET in Path(os.path.abspath(directory)).parts
