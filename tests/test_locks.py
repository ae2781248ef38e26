"""Tests of the lock of a folder: whoever comes second is told who holds it."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from daam_vit.locks import hold

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from daam_vit.locks import hold
with hold(Path(sys.argv[1]), "out", "another run"):
    print("held", flush=True)
    time.sleep(60)
"""

another_run = partial(hold, argument="out", what="another run")
refused = partial(pytest.raises, ValueError)


def test_a_folder_is_held_once_and_given_back(tmp_path):
    for _ in range(2):
        with another_run(tmp_path):
            with refused(match=f"^out: another run is .*, by process {os.getpid()} on "), another_run(tmp_path):
                pass
            assert (tmp_path / ".holder").is_file()  # the second one took nothing away
        assert not (tmp_path / ".holder").exists()
    with pytest.raises(ZeroDivisionError), another_run(tmp_path):
        _ = 1 / 0
    with another_run(tmp_path):
        pass


def test_the_lock_ends_with_the_process_however_it_ends(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with refused(match=f"by process {process.pid} on .*; wait for it, or pass another folder$"), another_run(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with another_run(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".holder").read_text()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def acquire(self, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with refused(match="^out: .* is on a file system without locks; pass another folder$"), another_run(tmp_path):
        pass
