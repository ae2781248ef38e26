"""Processes of `torchrun` that share the work of a command: in real processes, of which some fail or die."""

import re
import threading

import pytest
from filelock import FileLock
from scripts import ROOT, torchrun

from daam_vit.ranks import claim, current_rank, gather, leave, on_first, process_group, shared
from evaluation.records import append_record, read_records

PROGRAM = """
import os, signal, sys
from pathlib import Path
from command_line.terminal import complain, run
from daam_vit.ranks import barrier, current_rank, gather, on_first, process_group, shared

def main():
    rank, ranks = current_rank()
    with process_group() as same:
        assert same == rank
    assert on_first(lambda: rank) == 0 and on_first(lambda: "x") == "x"
    assert gather(rank * 10) == [10 * r for r in range(ranks)]
    taken = gather([(place, item) for place, item in shared("abcdefghij", "letters")])
    assert sorted(sum(taken, [])) == list(enumerate("abcdefghij"))
    assert not list(shared("abc", "letters")) and len(sum(gather([*shared("abc", "more")]), [])) == 3
    complain("said by all")
    if rank == 1:
        complain("said by one")
        if sys.argv[1] == "fails":
            complain("error: no more room")
            return 2
        if sys.argv[1] == "option":
            sys.exit(2)
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if sys.argv[1] == "last":
            return 2
    if sys.argv[1] == "last":
        return 0
    try:
        barrier()
    except ValueError as error:
        complain(f"error: {error}")
        return 2
    Path(f"finished {rank}").touch()
    return 0

rank = os.environ["RANK"]
try:
    run(main)
except SystemExit as stop:
    Path(f"code {rank}").write_text(str(stop.code))
"""
DEAD = "error: torchrun: another process has ended; repeat the command, which continues"


@pytest.mark.parametrize(
    ("task", "codes", "errors", "finished"),
    [
        ("works", [0, 0, 0], [], 3),
        ("last", [2, 2, 2], [], 0),  # as after a photo that cannot be read, while the others still work
        ("fails", [2, 2, 2], ["error: no more room"], 0),
        ("option", [2, 2, 2], [], 0),
        ("dies", [2, None, 2], [DEAD], 0),
        ("signal", [2, 143, 2], [DEAD], 0),
    ],
)
def test_ranks_share_work_and_leave_together(task, codes, errors, finished, tmp_path, offline):
    """Nobody waits for ever, every line is said once, and all have the largest exit code."""
    (tmp_path / "program").write_text(PROGRAM)
    result = torchrun("program", task, ranks=3, env=offline | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    found = [path.read_text() if (path := tmp_path / f"code {r}").exists() else None for r in range(3)]
    if task in ("dies", "signal"):  # torchrun may have ended the others before they see it
        found = ["2" if code in ("143", None) and r != 1 else code for r, code in enumerate(found)]
        said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert said in ([], errors)
    else:
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == errors
    assert found == [None if code is None else str(code) for code in codes], result.stderr
    assert len(re.findall("^said by all$", result.stderr, re.MULTILINE)) == 1
    assert len(re.findall("^said by one$", result.stderr, re.MULTILINE)) == 1
    assert len(list(tmp_path.glob("finished *"))) == finished


def test_a_single_process_needs_no_group(monkeypatch):
    """Nor does one in whose environment some other launcher left its variables: it would wait for ever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with process_group() as rank:
        assert rank == 0 and current_rank() == (0, 1)
        assert gather("a") == ["a"] and on_first(lambda: 3) == 3 and leave(2) == 2 and leave(0) == 0
        assert list(shared("abc", "work")) == [(0, "a"), (1, "b"), (2, "c")]
        assert claim("a line") and claim("a line")


def test_one_process_at_a_time_appends_a_record(tmp_path):
    file = tmp_path / "photos.jsonl"
    append_record(file, {"photo": "a", "name": "cup", "scores": {}})
    with open(file, "ab") as lines:
        lines.write(b'{"photo": "b", "na')  # by a rank that died, while the others go on
    record = {"photo": "ä", "name": "x" * 100_000, "scores": {}}
    writer = threading.Thread(target=append_record, args=(file, record))
    with FileLock(tmp_path / ".records.lock"):
        before = file.read_bytes()
        writer.start()
        writer.join(0.5)
        assert writer.is_alive() and file.read_bytes() == before
    writer.join()
    assert [found["photo"] for found in read_records(file)] == ["a", "ä"] and file.read_bytes().count(b"\n") == 2
