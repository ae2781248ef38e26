"""Loop over the photos of a call: read them in batches, and report every error as one line on stderr."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from torch import Tensor
from tqdm import tqdm

from command_line.names import file_name, result_names, shorten
from command_line.options import check_output_dir
from command_line.terminal import complain
from daam_core import UnsupportedModel
from daam_vit.ranks import current_rank, gather, shared
from daam_vit.text import printable
from models import LoadedModel
from models.images import find_images, read_image
from models.weights import first_line

OUT_OF_MEMORY = "out of memory|ALLOC_FAILED|allocate memory|not enough memory|Insufficient memory"
"""Messages of CUDA and MPS, cuBLAS, the CPU, Windows and OpenCV."""
FROM_DATA = (ValueError, OverflowError, cv2.error)
"""Errors of drawing that a photo causes, such as one with more pixels in a row than OpenCV can count."""
MAX_ERROR = 600
"""Largest number of characters of an error."""


@dataclass(frozen=True)
class Photo:
    """One photo of a batch."""

    file: Path
    index: int
    """Position in the batch."""
    folder: Path
    """Folder of its results, without the name of a class. No two photos of a call share one."""


@dataclass(frozen=True)
class Batch:
    """Photos that the model sees at once."""

    photos: list[Photo]
    images: Tensor
    """`(B, 3, H, W)`, on the device of the model."""


class Photos:
    """Photos that --image names, in batches of --batch.

        photos = Photos(options)
        with photos.reporting():
            loaded = load(...)
            for batch in photos.batches(loaded):
                with photos.explaining(batch):
                    flow = attention_flow(loaded.model, batch.images)
                    for photo in batch.photos:
                        with photos.saving(photo):
                            ...  # read_image(photo.file), flow.accumulated[photo.index] -> photo.folder
        return photos.exit_code

    An error is reported, and the other photos are still explained. Batches hold the input of the model only: a photo is
    read again when it is drawn, so that no more than one is in memory. Under `torchrun` the ranks share the batches of
    the files that the first one finds.
    """

    def __init__(self, options: argparse.Namespace):
        """Find the files; report missing paths, folders without images, and an output folder that is not writable."""
        self.options = options
        self.errors = 0
        files: list[Path] = []
        try:
            check_output_dir(options.output_dir)
            images = options.image
        except ValueError as error:
            self.report(error)
            images = []
        for path in images:
            try:
                files += find_images(path)
            except (ValueError, OSError) as error:
                self.report(error)
        self.files: list[Path] = gather(_without_repetitions(files))[0]  # folders may differ, or change meanwhile
        self._names = dict(zip(self.files, result_names(self.files)))
        self._again: list[list[Path]] = []
        self._bar = tqdm(disable=True)
        self._device: torch.device | None = None
        self._batch_size = 0

    @property
    def exit_code(self) -> int:
        """0, or 2 after an error."""
        return 2 if self.errors else 0

    def report(self, error: Exception, file: Path | None = None) -> None:
        """Print an error as one line that names the file, and count it."""
        self.errors += 1
        text = first_line(error) if isinstance(error, cv2.error) else str(error) or type(error).__name__
        where = f" ({printable(str(file), 300)})" if file and str(file) not in text else ""
        complain(f"error: {printable(text, MAX_ERROR)}{where}")

    def batches(self, loaded: LoadedModel) -> Iterator[Batch]:
        """Read the photos and yield them batch by batch, with a progress bar; report files that cannot be read."""
        self._device = next(loaded.model.parameters()).device
        rank, ranks = current_rank()
        self._bar = tqdm(total=len(self.files), unit="image", disable=len(self.files) == 1 or rank > 0)
        size = min(self.options.batch, math.ceil(len(self.files) / ranks))
        starts = range(0, len(self.files), size)
        for _, start in shared(starts, "images"):
            self._bar.update(start - self._bar.n)  # the other ranks took those before
            self._again = [self.files[start : start + size]]
            while self._again:
                if batch := self._read(self._again.pop(0), loaded):
                    yield batch

    def _read(self, files: list[Path], loaded: LoadedModel) -> Batch | None:
        images: dict[Path, Tensor] = {}
        for file in files:
            try:
                images[file] = loaded.transform(read_image(file))
            except ValueError as error:
                self.report(error)
                self._bar.update()
            self._batch_size = len(images)
        if not images:
            return None
        place = Path(self.options.output_dir, shorten(file_name(loaded.name)))
        photos = [Photo(file, i, place / self._names[file]) for i, file in enumerate(images)]
        return Batch(photos, torch.stack([*images.values()]).to(self._device))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an error that ends the call: the model cannot be loaded or explained, or memory runs out."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.report(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self._device is None:
                self.report(ValueError("model: it needs more memory than there is; try a smaller one, or --device cpu"))
                return
            photos = f"{self._batch_size} photos at once need" if self._batch_size > 1 else "one photo needs"
            advice = "try a smaller --batch, --memory low or --dtype bfloat16"
            self.report(ValueError(f"batch: {photos} more memory than {self._device} has; {advice}"))
        finally:
            self._bar.close()

    @contextmanager
    def explaining(self, batch: Batch) -> Iterator[None]:
        """Report an error of a single photo; after an error of several, `batches` yields them again one by one."""
        try:
            yield
        except UnsupportedModel:
            raise
        except ValueError as error:
            if len(batch.photos) == 1:
                self.report(error, batch.photos[0].file)
                self._bar.update()
            else:
                self._again += [[photo.file] for photo in batch.photos]

    @contextmanager
    def saving(self, photo: Photo) -> Iterator[None]:
        """Report an error of drawing or writing the results of a photo."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                error = ValueError("size: its frames need more memory than there is; try --size 1024")
            elif isinstance(error, OSError):
                error = ValueError(f"output-dir: the results cannot be written: {error}")
            elif not isinstance(error, FROM_DATA):
                raise
            self.report(error, photo.file)
        self._bar.update()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of Python, torch or OpenCV says that memory ran out."""
    return isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None


def _without_repetitions(files: list[Path]) -> list[Path]:
    """Return every file once, however its path is spelled; a link and its target are two files."""
    folders = {folder: folder.resolve() for folder in dict.fromkeys(file.parent for file in files)}
    different: dict[Path, Path] = {}
    for file in files:
        different.setdefault(folders[file.parent] / file.name, file)
    return list(different.values())
