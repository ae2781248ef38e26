"""Write and read the records of an evaluation: a run can be killed at any time and continued later.

    run.json        what was asked: model, photos, methods, seed, ...
    photos.jsonl    one line per photo: scores and curves of every method
    sanity.jsonl    one line per photo: rank correlations of every method

A line is on the disk before the next photo begins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from daam_vit.files import atomic_write
from evaluation.metrics import METRICS, SANITY

Values = dict[str, dict[str, dict[str, float]]]
"""Metric -> method -> photo -> value."""


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def begin_run(out: Path, settings: dict, metadata: dict) -> None:
    """Create the folder of a run, or continue the run that it holds.

    Args:
        out: the folder.
        settings: decide the results; a run is only continued with the same ones.
        metadata: also written to `run.json`, but not compared.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / "run.json").is_file():
        present = read_settings(out)
        different = [key for key, value in settings.items() if present.get(key) != value]
        if different:
            raise ValueError(f"out: {out} holds a run with another {different[0]}; choose another folder")
    with atomic_write(out / "run.json") as part:
        part.write_text(json.dumps(settings | metadata, indent=2) + "\n", encoding="utf-8")


def append_record(file: Path, record: dict) -> None:
    """Append a line to a file; it is on the disk when this returns."""
    with open(file, "ab") as lines:
        lines.write(json.dumps(record).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def repair_records(file: Path) -> list[dict]:
    """Return the records of a file, empty if there is none; cut off a last line that a kill left unfinished."""
    if not file.is_file():
        return []
    with open(file, "r+b") as lines:
        lines.truncate(lines.read().rfind(b"\n") + 1)
    return read_records(file)


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[dict]:
    """Return the records of a file, one JSON object with a "photo" per line; skip an unfinished last line.

    Raises:
        ValueError: if any other line is not a record.
    """
    records = []
    *whole, rest = Path(path).read_bytes().split(b"\n")  # no newline follows `rest`
    for number, line in enumerate([*whole, rest], 1):
        unfinished = number > len(whole)
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("photo"), str):
                raise ValueError
        except ValueError:  # also if it is not UTF-8
            if unfinished:
                break
            raise ValueError(f"records: line {number} of {path} is not the record of a photo; delete it") from None
        records.append(record)
    return records


def read_run(directory: str | Path) -> tuple[dict, list[dict], list[dict]]:
    """Return `run.json` and the records of `photos.jsonl` and `sanity.jsonl`; the last one of every photo counts.

    Raises:
        ValueError: if there is no run, no photo is done, or a file is damaged.
    """
    directory = Path(directory)
    run = read_settings(directory)
    files = [directory / "photos.jsonl", directory / "sanity.jsonl"]
    photos, sanity = ({r["photo"]: r for r in read_records(path)} if path.exists() else {} for path in files)
    if not photos:
        raise ValueError(f"directory: no photo in {directory} is done; let the evaluation run longer")
    return run, list(photos.values()), list(sanity.values())


def read_settings(directory: str | Path) -> dict:
    """Return the content of `run.json`.

    Raises:
        ValueError: if it is missing or damaged.
    """
    file = Path(directory, "run.json")
    try:
        run = json.loads(file.read_bytes())
        if not isinstance(run, dict):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"directory: {directory} has no run.json; choose the folder of an evaluation") from None
    except ValueError:
        raise ValueError(f"directory: {file} is damaged; run the evaluation again in another folder") from None
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


def photo_values(photos: Iterable[dict], methods: Sequence[str]) -> Values:
    """Return the scores in the records of `photos.jsonl`."""
    return _nested(
        (metric, method, record["photo"], record["scores"].get(method, {}).get(metric))
        for metric in METRICS
        for method in methods
        for record in photos
    )


def block_values(photos: Iterable[dict]) -> Values:
    """Return the scores of the accumulated maps A_1 ... A_L, as methods named "block 1" ... "block L"."""
    return _nested(
        (metric, f"block {b}", record["photo"], scores.get(metric))
        for metric in METRICS
        for record in photos
        for b, scores in enumerate(record.get("blocks") or (), 1)
    )


def sanity_values(sanity: Iterable[dict], methods: Sequence[str]) -> Values:
    """Return the correlations in the records of `sanity.jsonl`.

    Only the last randomised stage counts, without its sign: an inverted map depends on the original as much as a copy.
    """

    def value(correlations: dict, metric: str) -> float | None:
        if metric == "randomised":
            return abs(correlations[metric][-1]) if correlations.get(metric) else None
        return correlations.get(metric)

    return _nested(
        (metric, method, record["photo"], value(record["methods"].get(method, {}), metric))
        for metric in SANITY
        for method in methods
        for record in sanity
    )


def _nested(cells: Iterable[tuple[str, str, str, float | None]]) -> Values:
    """Nest values by metric, method and photo; leave out those that are missing or not finite."""
    values: Values = {}
    for metric, method, photo, value in cells:
        if value is not None and math.isfinite(value):
            values.setdefault(metric, {}).setdefault(method, {})[photo] = float(value)
    return values
