"""Write and read the records of an evaluation: a run can be killed at any time and continued later.

    run.json        what was asked: model, photos, methods, seed, ...
    photos.jsonl    one line per photo: scores and curves of every method
    sanity.jsonl    one line per photo: rank correlations of every method
    mosaics.jsonl   one line per mosaic, which is named by its first photo: shares of every method

A line is on the disk before the next photo begins. One run at a time holds the folder; the ranks of a run append to the
same files, one after the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from daam_vit.files import atomic_write
from daam_vit.locks import hold
from daam_vit.ranks import current_rank, gather
from daam_vit.text import printable
from evaluation.metrics import METRICS, SANITY
from models.schema import parse_json

Values = dict[str, dict[str, dict[str, float]]]
"""Metric -> method -> photo -> value."""

RUN = {
    "model": str, "images": str, "photos": int, "methods": [str], "baselines": [str], "steps": int, "dtype": str,
    "seed": int, "stages": [str],
}  # fmt: skip
"""Schema of `run.json`, see `models.schema`: the entries that a report needs."""
SCORES = {str: (float, None)}
RECORD = {
    "photo": str,
    "name": str,
    "scores": {str: SCORES},
    "curves": {str: {str: [float]}},
    "blocks": ([SCORES], None),
    "methods": {str: {"flip": (float, None), "class": (float, None), "randomised": ([float], None)}},
    "photos": [str],
    "shares": {str: [(float, None)]},
}
"""Schema of a line of `photos.jsonl`, `sanity.jsonl` ("methods") or `mosaics.jsonl` ("photos" and "shares")."""
REQUIRED = {
    "photos.jsonl": ("photo", "name", "scores"),
    "sanity.jsonl": ("photo", "methods"),
    "mosaics.jsonl": ("photo", "photos", "shares"),
}
"""Entries that every line must have."""

# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def check_out(out: Path, images: Path) -> None:
    """Raise an error if a run cannot be written into a folder, which need not exist, or if it holds the photos."""
    with writing(out), suppress(FileNotFoundError, NotADirectoryError):
        out.lstat()  # an error if the name is too long
    if os.path.realpath(out) == os.path.realpath(images):
        raise ValueError("out: it is the folder of the photos; choose another one, or its pictures become photos")
    present = next(path for path in [out.absolute(), *out.absolute().parents] if os.path.lexists(path))
    if not (os.path.isdir(present) and os.access(present, os.W_OK | os.X_OK)):
        what = "cannot be written" if os.path.isdir(present) else "is not a folder"
        raise ValueError(f"out: {printable(str(present), 150)} {what}; choose another folder")


@contextmanager
def running(out: Path, settings: dict, metadata: dict) -> Iterator[dict]:
    """Hold the folder of a run: create it, or continue the run that it holds.

    Args:
        out: the folder.
        settings: decide the results; a run is only continued with the same ones.
        metadata: also written to `run.json`, but not compared.

    Yields:
        `run.json`.

    Raises:
        ValueError: if another process holds the folder, or it holds a run with other settings.
    """
    run = settings | metadata
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with hold(out, "out", "another evaluation"):
        for part in out.glob(".*.????????.part"):  # of a run that was killed: nobody else holds the folder
            if part.is_file():
                part.unlink()
        if (out / "run.json").exists():
            present = read_settings(out)
            different = [key for key, value in settings.items() if present.get(key) != value]
            if different:
                raise ValueError(f"out: {out} holds a run with another {different[0]}; choose another folder")
        with writing(out / "run.json"), atomic_write(out / "run.json") as part:
            part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        yield run


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing, such as a full disk, into one line that names the path."""
    try:
        yield
    except (OSError, RecursionError) as error:  # RecursionError: a thousand nested folders
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"out: {printable(str(path), 150)} cannot be written: {reason}; make room or choose "
            "another folder; what was recorded is complete"
        ) from None


def check_records(out: Path, run: dict, photos: Iterable[str]) -> None:
    """Raise a ValueError if a record in the folder of a run is of another run, or of a photo that is not in `photos`.

    Last lines that a kill left unfinished are cut off.
    """
    known = set(photos)
    for name in REQUIRED:
        for record in repair_records(out / name, run):
            if record["photo"] not in known:
                photo = printable(record["photo"], 80)
                raise ValueError(
                    f"records: {out / name} has {photo}, which is not a photo of this run; delete its line"
                )


def check_ranks(out: Path, settings: dict) -> None:
    """Wait for all ranks; raise a ValueError unless this one has the settings of the first and sees its `run.json`."""
    rank, theirs = current_rank()[0], gather(settings)[0]
    different = [key for key, value in settings.items() if theirs[key] != value]
    if different:
        raise ValueError(f"{different[0]}: rank {rank} has another one than rank 0; all machines need the same files")
    if not (out / "run.json").is_file():
        raise ValueError(
            f"out: rank {rank} finds no run.json in {printable(str(out), 150)}; all machines must share it"
        )


def append_record(file: Path, record: dict) -> None:
    """Append a line to a file; it is on the disk when this returns. Several processes may do so."""
    with writing(file), _alone(file), open(file, "a+b") as lines:
        _cut_off(lines)
        lines.write(json.dumps(record).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def repair_records(file: Path, run: dict | None = None) -> list[dict]:
    """Return the records of a file, empty if there is none; cut off a last line that a kill left unfinished."""
    if not file.exists():
        return []
    _check_regular(file)
    with writing(file), _alone(file), open(file, "r+b") as lines:
        _cut_off(lines)
    return read_records(file, run)


def _alone(file: Path) -> FileLock:
    """Return a lock for writing records: long lines of several processes may mix, above all in a network folder."""
    return FileLock(file.with_name(".records.lock"))


def _cut_off(lines: BinaryIO) -> None:
    """Cut off a last line that a process which was killed left unfinished."""
    if lines.seek(0, os.SEEK_END):
        lines.seek(-1, os.SEEK_END)
        if lines.read() != b"\n":
            lines.seek(0)
            lines.truncate(lines.read().rfind(b"\n") + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_records(path: str | Path, run: dict | None = None) -> list[dict]:
    """Return the records of a file, one JSON object with a "photo" per line; skip an unfinished last line.

    Args:
        path: `photos.jsonl`, `sanity.jsonl` or `mosaics.jsonl`.
        run: `run.json`; the records must be of this run.

    Raises:
        ValueError: if any other line is not such a record.
    """
    records = []
    _check_regular(Path(path))
    *whole, rest = Path(path).read_bytes().split(b"\n")  # no newline follows `rest`
    for number, line in enumerate([*whole, rest], 1):
        unfinished = number > len(whole)
        source = f"records: line {number} of {path}"
        try:
            record = parse_json(line, RECORD, source, REQUIRED.get(Path(path).name, ("photo",)))
            if run is not None:
                _check_run(record, run, source)
        except ValueError as error:
            if unfinished:
                break
            raise ValueError(f"{str(error).removesuffix('; write it again')}; delete the line") from None
        records.append(record)
    return records


def _check_run(record: dict, run: dict, source: str) -> None:
    """Raise a ValueError if a record is of a run with other methods, steps or stages, or a number is impossible."""
    lengths = {"scores": 0, "curves": run["steps"] + 1, "methods": len(run["stages"]), "shares": 4}
    for entry, length in lengths.items():
        for method, values in record.get(entry, {}).items():
            place = printable(f"{entry}.{method}", 80)
            if method not in run["methods"]:
                raise ValueError(f"{source} is of another run, which has {place}")
            lists = [values] if isinstance(values, list) else values.values()
            wrong = [value for value in lists if isinstance(value, list) and len(value) != length]
            if wrong:
                raise ValueError(f"{source} is of another run: {place} has {len(wrong[0])} values, not {length}")
    for entry in (*lengths, "blocks"):
        impossible = [number for number in _numbers(record.get(entry)) if abs(number) > 1.001]  # they were rounded
        if impossible:
            raise ValueError(f"{source}: {entry} has {impossible[0]:.4g}, but shares and correlations are -1 to 1")


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in a value that was parsed from JSON."""
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _numbers(entry)
    elif value is not None:
        yield value


def _check_regular(file: Path) -> None:
    """Raise a ValueError for a folder, or for a pipe, which would be read for ever."""
    if file.exists() and not file.is_file():
        raise ValueError(f"records: {file} is not a file; move it away")


def read_run(directory: str | Path) -> tuple[dict, list[dict], list[dict], list[dict]]:
    """Return `run.json` and the records of all files in `REQUIRED`; the last one of every photo or mosaic counts.

    Raises:
        ValueError: if there is no run, no photo is done, or a file is damaged or of another run.
        TypeError: if `directory` is not a path.
    """
    run = read_settings(directory)
    files = [Path(directory, name) for name in REQUIRED]
    read = [{r["photo"]: r for r in read_records(path, run)} if path.exists() else {} for path in files]
    photos, sanity, mosaics = ([records[name] for name in sorted(records)] for records in read)
    if not photos:
        raise ValueError(f"directory: no photo in {directory} is done; let the evaluation run longer")
    return run, photos, sanity, mosaics


def read_settings(directory: str | Path) -> dict:
    """Return the content of `run.json`.

    Raises:
        ValueError: if it is missing or damaged.
        TypeError: if `directory` is not a path.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
    file, source = Path(directory, "run.json"), f"directory: {Path(directory, 'run.json')}"
    if not os.path.isfile(file):
        raise ValueError(f"directory: {directory} has no run.json; choose the folder of an evaluation")
    try:
        run: dict[str, Any] = parse_json(file.read_bytes(), RUN, source, tuple(RUN))
        if not run["methods"]:
            raise ValueError(f"{source}: methods is empty")
        for name, least in {"seed": 0, "steps": 2}.items():
            if run[name] < least:
                raise ValueError(f"{source}: {name} should be at least {least}, got {run[name]}")
    except ValueError as error:
        reason = str(error).removesuffix("; write it again")
        raise ValueError(f"{reason}; run the evaluation again in another folder") from None
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


def mosaic_values(mosaics: Iterable[dict], methods: Sequence[str]) -> Values:
    """Return the shares in the records of `mosaics.jsonl`, each the mean over the classes that could be explained."""

    def mean(shares: list[float | None]) -> float | None:
        known = [share for share in shares if share is not None]
        return math.fsum(known) / len(known) if known else None

    return _nested(
        ("pointing", method, record["photo"], mean(record["shares"].get(method, [])))
        for method in methods
        for record in mosaics
    )


def _nested(cells: Iterable[tuple[str, str, str, float | None]]) -> Values:
    """Nest values by metric, method and photo; leave out those that are missing or not finite."""
    values: Values = {}
    for metric, method, photo, value in cells:
        if value is not None and math.isfinite(value):
            values.setdefault(metric, {}).setdefault(method, {})[photo] = float(value)
    return values
