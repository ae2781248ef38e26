"""The memory bank: features of labelled images, and what their nearest neighbours say about another one.

    bank = MemoryBank.load("memorybank/embedded")
    vote = bank.classify(features)                                       # features (B, D)
    flow = attention_flow(model, images, importance=bank.importance)     # explains a model that has no classifier

Non-parametric instance discrimination (Wu, Xiong, Yu, Lin, CVPR 2018, https://arxiv.org/abs/1805.01978) as the k-NN
evaluation of DINO uses it (https://github.com/facebookresearch/dino, eval_knn.py). A bank is a folder:

    trainfeat.pth       (M, D)  float16 or float32, rows L2-normalised
    trainlabels.pth     (M,)    integers, the class of every row
    testfeat.pth, testlabels.pth    the same of other images; only the evaluation reads them
    bank.json           model, checkpoint, transform, class names, files, counts, versions; banks of DINO have none

`memorybank.build` makes one of a folder of images; on the command line, `python -m memorybank build | eval | info`.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor

__all__ = ["MemoryBank", "Vote", "read_pair"]

TILE, SLAB = 4096, 64
"""Rows that are widened to float32 at once, 6 MB at D = 384, and rows of one product in a batch of them: with small
products all cores take part, which a single product with one query would leave to one."""
MIN_TEMPERATURE = 0.02
"""The least temperature: exp(1 / 0.02) is still far from the limit of float32."""
MAX_CLASSES = 1_000_000
"""A larger label is taken for damage."""
SPAN = 1 << 22
"""Similarities that are gathered before the best of them are picked: 16 MB."""


@dataclass(frozen=True)
class Vote:
    """What the k nearest neighbours say about B features; on the device of the features."""

    prediction: Tensor
    """`(B,)` int64: the class with the largest sum of votes."""
    votes: Tensor
    """`(B, K)` float32: the sum of exp(similarity / temperature) over the neighbours of every class."""
    neighbours: Tensor
    """`(B, k)` int64: rows of the bank, the most similar first."""
    similarities: Tensor
    """`(B, k)` float32: their cosines, -1..1."""
    labels: Tensor
    """`(B, k)` int64: their classes."""


@dataclass(frozen=True)
class MemoryBank:
    """A bank that `MemoryBank.load` has opened."""

    directory: Path
    features: Tensor
    """`(M, D)` float16 or float32, rows L2-normalised; mapped from the file, or on the device asked for."""
    labels: Tensor
    """`(M,)` int64."""
    class_names: list[str] | None
    """One name a class; None where they are not known."""
    files: list[str] | None
    """The image of every row, as bank.json lists it; `file` gives its path. None where they are not known."""
    metadata: dict
    """What bank.json says; empty without one."""

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> MemoryBank:
        """Map the train pair of a bank into memory.

        Args:
            directory: the folder of the bank.
            device: where the features go; on the CPU they stay in the file and are read as they are needed.

        Raises:
            ValueError: when a file is missing or damaged, holds more than tensors, or features and labels do not fit
                each other or bank.json.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(
                f"bank: there is no folder {directory}; build one: "
                f"python -m memorybank build --model NAME --train FOLDER --out {directory}"
            )
        metadata = _read_json(directory / "bank.json")
        features, labels = read_pair(directory, "train")
        names = metadata.get("class_names")
        if names is None and _is_imagenet(directory, labels):
            names = ImageNetInfo().label_descriptions()
        if names is not None and labels.max() >= len(names):
            raise ValueError(
                f"bank: {directory / 'trainlabels.pth'} has the label {labels.max()}, "
                f"but there are {len(names)} classes"
            )
        files = metadata.get("train", {}).get("files")
        if files is not None and len(files) != len(labels):
            raise ValueError(f"bank: {directory / 'bank.json'} lists {len(files)} files for {len(labels)} features")
        return cls(directory, features.to(device), labels.to(device), names, files, metadata)

    @property
    def num_classes(self) -> int:
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def file(self, row: int) -> Path | None:
        """The image of a row, None where it is not known; it need not be there any more."""
        return self.directory / self.metadata["train"].get("folder", "") / self.files[row] if self.files else None

    def class_name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else f"class {label}"

    def check_model(self, name: str, width: int, weights: str) -> None:
        """Raise a ValueError unless the bank belongs to this model; one without bank.json is known by its width only.

        Args:
            name: the model's, as `models.load` gives it.
            width: of its features, D.
            weights: `models.weights_sha256`.
        """
        rebuild = f"build one with it: python -m memorybank build --model {name} --train FOLDER --out DIR"
        theirs, file = self.metadata.get("model", name), (self.metadata.get("checkpoint") or {}).get("file")
        if self.metadata.get("weights_sha256", weights) != weights:
            other = f"other weights of {name}" if theirs == name else f"the model {theirs}, not with {name}"
            raise ValueError(f"bank: {self.directory} was built with {other}{f' ({file})' * bool(file)}; {rebuild}")
        if width != self.features.shape[1]:
            raise ValueError(
                f"bank: {self.directory} has features of width {self.features.shape[1]}, "
                f"those of {name} have {width}; {rebuild}"
            )

    @torch.inference_mode()
    def nearest(self, features: Tensor, k: int = 20) -> tuple[Tensor, Tensor]:
        """The k rows of the bank with the largest cosine, exactly, in one pass over the bank.

        Args:
            features: `(B, D)`, or `(D,)` for one; need not be normalised.
            k: how many.

        Returns:
            similarities `(B, k)` float32, the largest first, and rows `(B, k)` int64, on the device of the features.

        Raises:
            ValueError: when the width differs, a feature or the bank is not finite, or k is not in 1..M.
        """
        rows, width = self.features.shape
        query = features if features.ndim == 2 else features.unsqueeze(0)
        if query.ndim != 2 or query.shape[1] != width or not len(query):
            raise ValueError(f"features: expected (B, {width}), the width of the bank, got {tuple(features.shape)}")
        if not torch.isfinite(query).all():
            raise ValueError("features: have NaN or infinite values")
        if not 1 <= k <= rows:
            raise ValueError(f"k: expected 1 to {rows}, the number of features in {self.directory}, got {k}")
        query = F.normalize(query.to(self.features.device, torch.float32), dim=1)
        batch = len(query)
        span = max(TILE, min(SPAN // batch, rows + TILE - 1) // TILE * TILE)
        tile, cosines = query.new_empty(TILE // SLAB, SLAB, width), query.new_empty(span // SLAB, SLAB, batch)
        queries = query.T.expand(len(tile), width, batch)
        best, index = query.new_empty(0, batch), query.new_empty(0, batch, dtype=torch.long)
        for start in range(0, rows, span):
            part = self.features[start : start + span]
            for i in range(0, len(part), TILE):
                some = part[i : i + TILE]
                tile.view(TILE, width)[: len(some)] = some
                torch.bmm(tile, queries, out=cosines[i // SLAB : (i + TILE) // SLAB])
            top, place = cosines.view(span, batch)[: len(part)].topk(min(k, len(part)), dim=0)
            best, index = torch.cat([best, top]), torch.cat([index, place + start])
            best, place = best.topk(min(k, len(best)), dim=0)
            index = index.gather(0, place)
        if not torch.isfinite(best).all():  # NaN is the largest of all to topk
            raise ValueError(f"bank: {self.directory / 'trainfeat.pth'} has NaN or infinite values; build it again")
        return best.T.to(features.device), index.T.to(features.device)

    @torch.inference_mode()
    def classify(self, features: Tensor, k: int = 20, temperature: float = 0.07) -> Vote:
        """The class of every feature, by the vote of its k nearest neighbours; each has exp(cosine / temperature).

        Args:
            features: `(B, D)`, or `(D,)` for one.
            k: neighbours that vote.
            temperature: the smaller, the more the nearest count.

        Raises:
            ValueError: as `nearest`; when the temperature is below `MIN_TEMPERATURE`.
        """
        return self.vote(*self.nearest(features, k), temperature)

    def vote(self, similarities: Tensor, neighbours: Tensor, temperature: float = 0.07) -> Vote:
        """The vote of neighbours that are known: both `(B, k)`, from `nearest`."""
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected at least {MIN_TEMPERATURE}, got {temperature}")
        labels = self.labels[neighbours.to(self.labels.device)].to(neighbours.device)
        weights = (similarities / temperature).exp()
        votes = weights.new_zeros(len(weights), self.num_classes).scatter_add_(1, labels, weights)
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
        """How much every dimension of the feature speaks for its class: for `attention_flow(importance=...)`.

            p = mean over the neighbours z of class c of f * z     elementwise, f normalised
            p = p / |sum p|                                        where the sum is not 0
            importance = (p - min p) / (max p - min p)             ones where p is constant

        Args:
            features: `(B, D)`, or `(D,)` for one.
            k: neighbours that vote on c; those of class c among them make the importance.
            temperature: of the vote.
            target: the class c, named by hand: one for all or `(B,)`; its neighbours are looked for among `target_k`.
            target_k: how many neighbours to look through for a class named by hand; all of a smaller bank.

        Returns:
            `(B, D)` float32, 0..1, on the device of the features.

        Raises:
            ValueError: as `classify`; when the class is out of range, or none of the neighbours is of the class named.
        """
        if target is None:
            vote = self.classify(features, k, temperature)
            return self.importance_of(features, vote, vote.prediction)
        k = min(max(k, target_k), len(self.labels))
        return self.importance_of(features, self.classify(features, k, temperature), target)

    @torch.inference_mode()
    def importance_of(self, features: Tensor, vote: Vote, classes: int | Tensor) -> Tensor:
        """`importance`, from neighbours that are known and for the classes that they shall speak for, one or `(B,)`."""
        chosen = self._classes(classes, len(vote.labels)).to(vote.labels.device)
        mine = vote.labels == chosen.unsqueeze(1)  # (B, k)
        if not mine.any(1).all():
            b = int(mine.any(1).logical_not().nonzero()[0])
            counts = Counter(vote.labels[b].tolist())
            most = ", ".join(f"{n} {self.class_name(c)}" for c, n in counts.most_common(3))
            raise ValueError(
                f"target: none of the {mine.shape[1]} nearest neighbours is of the class "
                f"{self.class_name(int(chosen[b]))}; they are {most}{', ...' * (len(counts) > 3)}: "
                f"name one of them, or look at more neighbours"
            )
        f = F.normalize(features.float().reshape(len(mine), -1), dim=1)
        p = torch.stack(
            [
                row * self.features[n[m].to(self.features.device)].float().mean(0).to(row.device)
                for row, n, m in zip(f, vote.neighbours, mine)
            ]
        )
        total = p.sum(1, keepdim=True).abs()
        p = p / torch.where(total > 0, total, 1)
        low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
        return torch.where(high > low, (p - low) / torch.where(high > low, high - low, 1), 1)

    def _classes(self, target: int | Tensor, batch: int) -> Tensor:
        try:
            classes = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError):
            classes = torch.empty(0)
        if classes.is_floating_point() or classes.shape not in ((), (batch,)):
            raise ValueError(f"target: expected a class index or one for each of {batch} features, got {target!r}")
        wrong = classes[(classes < 0) | (classes >= self.num_classes)].flatten().tolist()
        if wrong:
            raise ValueError(
                f"target: class {wrong[0]} is out of range; the bank has {self.num_classes} classes, from 0 on"
            )
        return classes.long().expand(batch)


def read_pair(directory: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Features `(M, D)`, mapped from their file, and labels `(M,)` int64 of "train" or "test".

    Raises:
        ValueError: when a file is missing, damaged or holds more than tensors, or the two do not fit each other.
    """
    paths = [Path(directory, f"{split}{kind}.pth") for kind in ("feat", "labels")]
    features, labels = map(_read_tensor, paths)
    if features.ndim != 2 or not features.numel() or features.dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"bank: {paths[0]} should hold features (M, D), float16 or float32, "
            f"but has {tuple(features.shape)} {features.dtype}"
        )
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"bank: {paths[1]} should hold integers (M,), but has {tuple(labels.shape)} {labels.dtype}")
    if len(labels) != len(features):
        raise ValueError(f"bank: {paths[1]} has {len(labels)} labels for {len(features)} features")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        wrong = min(labels.min().item(), 0) or labels.max().item()
        raise ValueError(f"bank: {paths[1]} has the label {wrong}; expected 0 to {MAX_CLASSES - 1}")
    sample = features[:: max(1, len(features) // 256)].float()
    if not torch.isfinite(sample).all():
        raise ValueError(f"bank: {paths[0]} has NaN or infinite values; build it again")
    if ((sample.norm(dim=1) - 1).abs() > 0.01).any():
        raise ValueError(f"bank: the rows of {paths[0]} are not L2-normalised; divide each by its norm")
    return features, labels.long()


def _read_tensor(path: Path) -> Tensor:
    if not path.is_file():
        raise ValueError(f"bank: there is no file {path}")
    try:
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # saved by torch 1.5 or earlier: no archive, cannot be mapped
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"bank: {path} is damaged, or holds more than tensors and is not loaded") from error
    except Exception as error:  # torch and zipfile raise a dozen kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"bank: {path} cannot be read: {reason}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"bank: {path} should hold a tensor, but has a {type(tensor).__name__}")
    return tensor


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"bank: {path} cannot be read as JSON: {error}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("train", {}), dict):
        raise ValueError(f"bank: {path} does not describe a bank")
    return metadata


def _is_imagenet(directory: Path, labels: Tensor) -> bool:
    """A bank that does not name its classes, but has a thousand of them and lies in a folder ...ImageNet..."""
    return labels.max() == 999 and any("imagenet" in part.lower() for part in directory.absolute().parts)
