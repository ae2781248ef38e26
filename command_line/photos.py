"""The loop over the photos: read them in batches, and report what cannot be read or explained."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from command_line.results import file_name, result_names
from daam_core import UnsupportedModel
from models.images import find_images, read_image

OUT_OF_MEMORY = "out of memory|ALLOC_FAILED|allocate memory|not enough memory"  # CUDA and MPS, cuBLAS, CPU, Windows


def explain_photos(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], tuple],
    explain: Callable[..., tuple],
    save: Callable[..., None],
) -> int:
    """Explain every photo that the options name; what cannot be done is a line on stderr, the others are still done.

    The model sees --batch photos at once. They are read again one by one to be drawn, so that no more than one of them
    is held.

    Args:
        options: of `flow_options`.
        prepare: options -> (loaded model, ...), what every photo needs; called when there are photos.
        explain: (images (B, 3, H, W), *prepared, options) -> what `save` needs.
        save: (file, folder, index, *explained, *prepared, options) -> None, writes the results of one photo of the
            batch; `folder` has no class yet.

    Returns:
        The exit code.
    """
    failures = 0

    def failed(error: Exception, file: Path | None = None) -> None:
        nonlocal failures
        failures += 1
        tqdm.write(f"error: {error}" + (f" ({file})" if file and str(file) not in str(error) else ""), file=sys.stderr)

    files: list[Path] = []
    for path in options.image:
        try:
            files += find_images(path)
        except (ValueError, OSError) as error:
            failed(error)
    files = list(dict.fromkeys(files))
    if not files:
        return 2
    try:
        prepared = prepare(options)
    except (ValueError, OSError) as error:
        failed(error)
        return 2
    loaded, place = prepared[0], Path(options.output_dir, file_name(prepared[0].name))
    device = next(loaded.model.parameters()).device

    def explain_batch(batch: dict[Path, Tensor]) -> None:
        try:
            with precision(device, options.dtype):
                explained = explain(torch.stack([*batch.values()]).to(device), *prepared, options)
        except UnsupportedModel:
            raise
        except ValueError as error:
            if len(batch) == 1:
                failed(error, *batch)
                bar.update()
            else:
                for file, images in batch.items():  # to see whose fault it is
                    explain_batch({file: images})
            return
        for index, file in enumerate(batch):
            try:
                save(file, place / names[file], index, *explained, *prepared, options)
            except (ValueError, OSError) as error:
                failed(error, file)
            except MemoryError:
                failed(ValueError("size: its frames need more memory than there is; try --size 1024"), file)
            bar.update()

    names = dict(zip(files, result_names(files)))
    with tqdm(total=len(files), unit="image", disable=len(files) == 1) as bar:
        try:
            for start in range(0, len(files), options.batch):
                batch = {}
                for file in files[start : start + options.batch]:
                    try:
                        batch[file] = loaded.transform(read_image(file))
                    except ValueError as error:
                        failed(error)
                        bar.update()
                if batch:
                    explain_batch(batch)
        except UnsupportedModel as error:
            failed(error)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                raise
            photos = f"{len(batch)} photos at once need" if len(batch) > 1 else "one photo needs"
            failed(ValueError(
                f"batch: {photos} more memory than {device} has; try a smaller --batch, --memory low or --size 1024"
            ))  # fmt: skip
    return 2 if failures else 0


def precision(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    """Where the model computes in that dtype."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))
