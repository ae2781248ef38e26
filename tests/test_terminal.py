"""Output that nobody reads, and signals: in a real process, whose files are complete however its output ends."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from PIL import Image
from scripts import ROOT, no_leftovers

SCRIPT = ROOT / "VIT_DynamicAccumulatedAttentionMap_oneSample.py"
PROGRAM = """
import argparse, sys, time
from pathlib import Path
from tqdm import tqdm
from command_line.terminal import complain, run, say

class Deleted:
    def __del__(self):
        Path("ready").touch()
        time.sleep(60)

def main():
    task = sys.argv[1]
    if task == "help":
        argparse.ArgumentParser(prog="tool").parse_args(["--help"])
    for n in tqdm(range(4)):
        say(*[f"{n} \\x1b[31m 猫 {10**300}"] * 200)
        complain(f"note {n} \\x1b 猫")
        Path(f"{n}.txt").write_text("done")
    if task == "signal":
        from daam_vit.files import atomic_write
        with atomic_write("result") as part:
            part.write_text("half")
            Path("ready").touch()
            time.sleep(60)
    if task == "signal in a deletion":
        Deleted()
        time.sleep(60)
    return 0

run(main)
"""
"""A command that prints more than a pipe holds, beside a progress bar, and writes four files."""


def shell(redirection, folder, task="print", **environment):
    """Run the program in a shell, with its output redirected; the exit code is its own, not that of its reader."""
    (folder / "program").write_text(PROGRAM)
    command = f"{{ '{sys.executable}' program {task}; echo $? > code; }} {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=100)
    return int((folder / "code").read_text()), result.stdout.decode(), result.stderr.decode()


def files(folder):
    return {path.name for path in folder.iterdir()} - {"program", "code", "ready", "log"}


DONE = {f"{n}.txt" for n in range(4)}


@pytest.mark.parametrize(
    "redirection", ["| head -n 1", "2>&1 | head -n 1", "| true", "2>&1 | true", ">&-", "2>&-", "<&-", "<&- >&- 2>&-"]
)
def test_output_that_nobody_reads_stops_nobody(redirection, tmp_path):
    code, out, err = shell(redirection, tmp_path)
    assert code == 0 and files(tmp_path) == DONE and "Traceback" not in err + out, err
    assert out.startswith("0 \\x1b[31m 猫 1") == (redirection in ("| head -n 1", "2>&-", "<&-"))
    assert err.count("note") == (0 if "2>&" in redirection else 4)


@pytest.mark.parametrize("redirection", ["> /dev/full", "> /dev/full 2>&-", "> /dev/full 2> /dev/full"])
def test_output_that_cannot_be_written_is_an_error(redirection, tmp_path):
    code, out, err = shell(redirection, tmp_path)
    assert code == 2 and files(tmp_path) == DONE and not out and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    full = "error: stdout: cannot be written: [Errno 28] No space left on device; files are written all the same"
    assert errors == ([full] if redirection == "> /dev/full" else [])


@pytest.mark.parametrize(("redirection", "expected"), [("| true", 0), (">&-", 0), ("> /dev/full", 2), ("", 0)])
def test_help_that_nobody_reads(redirection, expected, tmp_path):
    code, out, err = shell(redirection, tmp_path, "help")
    assert code == expected and "Traceback" not in err and out.startswith("usage: tool") == (not redirection)


def test_a_terminal_without_the_characters(tmp_path):
    code, out, err = shell("", tmp_path, PYTHONIOENCODING="ascii:strict")
    assert code == 0 and out.isascii() and err.isascii() and out.startswith("0 \\x1b[31m \\u732b 1")
    assert "note 3 \\x1b \\u732b" in err.splitlines()


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        ([signal.SIGTERM], {143}),
        ([signal.SIGHUP], {129}),
        ([signal.SIGINT], {130}),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP], {143, 129, -15, -1}),  # the last two: it had cleaned up
    ],
)
def test_a_signal_cleans_up(sent, codes, tmp_path):
    def listening():  # background processes may ignore them
        for number in sent:
            signal.signal(number, signal.SIG_DFL)

    process = start([sys.executable, "-c", PROGRAM, "signal"], tmp_path, listening)
    wait_for(lambda: (tmp_path / "ready").exists(), process)
    for number in sent:
        process.send_signal(number)
        time.sleep(0.001)
    assert process.wait(timeout=50) in codes
    assert files(tmp_path) == DONE and "Traceback" not in (tmp_path / "log").read_text()


def test_a_signal_while_an_object_is_deleted(tmp_path):
    """Python drops an exception there."""
    listening = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    process = start([sys.executable, "-c", PROGRAM, "signal in a deletion"], tmp_path, listening)
    wait_for(lambda: (tmp_path / "ready").exists(), process)
    process.terminate()
    assert process.wait(timeout=50) == 143
    assert "ignored" not in (tmp_path / "log").read_text()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    process = start(
        [sys.executable, "-c", PROGRAM, "signal"], tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for(lambda: (tmp_path / "ready").exists(), process)
    process.send_signal(signal.SIGHUP)  # as under nohup
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_a_script_that_is_terminated_leaves_whole_results_only(offline, weights, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(100):
        Image.effect_noise((300, 200), n).save(tmp_path / "photos" / f"{n}.png")
    command = [sys.executable, SCRIPT, "--image", tmp_path / "photos", "--checkpoint", weights, "--output-dir", "out"]
    process = start(command, tmp_path, lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL), offline)
    wait_for(lambda: list(tmp_path.glob("out/tiny/[!.]*/flow.json")), process)
    process.terminate()
    assert process.wait(timeout=60) == 143 and no_leftovers(tmp_path)
    assert "Traceback" not in (tmp_path / "log").read_text()
    made = [[p.name for p in folder.rglob("*") if p.is_file()] for folder in (tmp_path / "out" / "tiny").iterdir()]
    whole = [names for names in made if "flow.json" in names]
    assert 1 <= len(whole) < 100 and all(len(names) == 17 for names in whole)
    assert all(names in ([], [".lock"]) for names in made if names not in whole)  # it came while a folder was made


def start(command, folder, preexec, environment=None):
    with open(folder / "log", "w") as log:
        environment = (environment or os.environ) | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=log, preexec_fn=preexec
        )


def wait_for(condition, process):
    end = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
