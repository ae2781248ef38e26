"""Run the scripts in the tests, without network: as a subprocess, or in this process, which is faster."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python does not print by default."""


def offline_environment(home):
    """Environment variables of a hub that refuses every connection, and of an empty cache."""
    return os.environ | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}


def run(script, *options, env, **more):
    """Run a script, or a module with "-m", as a user does."""
    command = [sys.executable, *map(str, [script, *options])]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **more)


def torchrun(*program, ranks=2, env, **more):
    """Run a script or a module in several processes that share its work."""
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *program)
    return run("-m", *command, env=env | {"OMP_NUM_THREADS": "1"}, **more)


def call(main, capfd, *options):
    """Run the `main` of a script in this process; the result is that of `run`, warnings on stderr included."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for category in HIDDEN:
            warnings.simplefilter("ignore", category)
        try:
            code = main([*map(str, options)])
        except SystemExit as stop:
            code = stop.code
    out, err = capfd.readouterr()
    return SimpleNamespace(returncode=code, stdout=out, stderr=err + "".join(f"{w.message}\n" for w in caught))


def one_line_error(result, *texts):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    assert all(text in lines[0] for text in texts), lines[0]


def no_leftovers(folder):
    return not [path for path in Path(folder).rglob("*") if path.name.endswith(".part")]
