"""Query a memory bank: features of labelled images, whose nearest neighbours classify and explain another image.

    bank = MemoryBank.load("memorybank/embedded")
    vote = bank.classify(features)                                       # features (B, D)
    flow = attention_flow(model, images, importance=bank.importance)     # explains a model without a classifier

This is non-parametric instance discrimination (Wu, Xiong, Yu, Lin, CVPR 2018, https://arxiv.org/abs/1805.01978), as in
the k-NN evaluation of DINO (https://github.com/facebookresearch/dino, eval_knn.py). A bank is a folder:

    trainfeat.pth       (M, D)  float16 or float32, rows L2-normalised
    trainlabels.pth     (M,)    integers, the class of every row
    testfeat.pth, testlabels.pth    the same for other images; read by the evaluation only
    bank.json           model, checkpoint, transform, class names, files, counts, versions; absent in DINO's banks

`memorybank.build` makes a bank from a folder of images. The command is `python -m memorybank build | eval | info`.
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

from daam_core import dimension_importance, neighbour_votes
from models.weights import first_line

__all__ = ["MemoryBank", "Vote", "read_pair"]

EMBEDDED_BANK = Path(__file__).parent / "embedded"
"""Folder of the bank that is stored in the repository."""
TILE, SLAB = 4096, 64
"""Rows that become float32 at once (6 MB at D = 384), and rows of each matrix product in a batched product.

The products are small so that they run on all cores; one large product with a single query would run on one."""
MIN_TEMPERATURE = 0.02
"""Lowest temperature, at which exp(1 / 0.02) is still far below the largest float32."""
MAX_CLASSES = 1_000_000
"""Number of classes; a label beyond it is treated as corruption."""
SPAN = 1 << 22
"""Similarities that are computed before the best are selected (16 MB)."""


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
        """Open the training features and labels of a bank.

        Args:
            directory: the folder of the bank.
            device: the device of the features; on the CPU they are memory-mapped and read when they are needed.

        Raises:
            ValueError: if a file is missing or damaged or holds more than tensors, or if features, labels and bank.json
                do not agree.
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
        """Number of classes."""
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def file(self, row: int) -> Path | None:
        """Return the image of a row, which may have been deleted; None if it is unknown."""
        return self.directory / self.metadata["train"].get("folder", "") / self.files[row] if self.files else None

    def class_name(self, label: int) -> str:
        """Return the name of a class, or "class LABEL" if the names are unknown."""
        return self.class_names[label] if self.class_names else f"class {label}"

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
            other = f"other weights of {name}" if theirs == name else f"the model {theirs}, not with {name}"
            raise ValueError(f"bank: {self.directory} was built with {other}{f' ({file})' * bool(file)}; {rebuild}")
        if width != self.features.shape[1]:
            raise ValueError(
                f"bank: {self.directory} has features of width {self.features.shape[1]}, "
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
            ValueError: if the width differs, a feature or the bank is not finite, or k is not in 1..M.
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
        if not torch.isfinite(best).all():  # topk treats NaN as the largest value
            raise ValueError(f"bank: {self.directory / 'trainfeat.pth'} has NaN or infinite values; build it again")
        return best.T.to(features.device), index.T.to(features.device)

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
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected at least {MIN_TEMPERATURE}, got {temperature}")
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
        k = min(max(k, target_k), len(self.labels))
        return self.importance_of(features, self.classify(features, k, temperature), target)

    @torch.inference_mode()
    def importance_of(self, features: Tensor, vote: Vote, classes: int | Tensor) -> Tensor:
        """Compute `importance` from the neighbours of a `Vote`, for one class or classes `(B,)`."""
        chosen = self._classes(classes, len(vote.labels)).to(vote.labels.device)
        mine = vote.labels == chosen.unsqueeze(1)  # (B, k)
        if not mine.any(1).all():
            b = int(mine.any(1).logical_not().nonzero()[0])
            counts = Counter(vote.labels[b].tolist())
            most = ", ".join(f"{n} {self.class_name(c)}" for c, n in counts.most_common(3))
            raise ValueError(
                f"target: none of the {mine.shape[1]} nearest neighbours belongs to the class "
                f"{self.class_name(int(chosen[b]))}; they are {most}{', ...' * (len(counts) > 3)}: "
                f"name one of them, or search more neighbours"
            )
        f = F.normalize(features.float().reshape(len(mine), -1), dim=1)
        rows = (n[m].to(self.features.device) for n, m in zip(vote.neighbours, mine))
        return dimension_importance(f, (self.features[n] for n in rows))  # one image at a time, to save memory

    def _classes(self, target: int | Tensor, batch: int) -> Tensor:
        try:
            classes = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError):
            classes = torch.empty(0)
        if classes.is_floating_point() or classes.shape not in ((), (batch,)):
            raise ValueError(f"target: expected one class index, or {batch}, one per feature, got {target!r}")
        wrong = classes[(classes < 0) | (classes >= self.num_classes)].flatten().tolist()
        if wrong:
            raise ValueError(
                f"target: class {wrong[0]} is out of range; the bank has {self.num_classes} classes, from 0 on"
            )
        return classes.long().expand(batch)


def read_pair(directory: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Return features `(M, D)`, memory-mapped, and labels `(M,)` int64 of a split, "train" or "test".

    Raises:
        ValueError: if a file is missing or damaged or holds more than tensors, or the two do not fit each other.
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
        except RuntimeError:  # files of torch 1.5 or earlier are not archives and cannot be mapped
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"bank: {path} is damaged, or holds more than tensors and is not loaded") from error
    except Exception as error:  # torch and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"bank: {path} cannot be read: {first_line(error)}") from error
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
    """Return whether a bank without class names has 1,000 classes and a path with ImageNet in it."""
    return labels.max() == 999 and any("imagenet" in part.lower() for part in directory.absolute().parts)
