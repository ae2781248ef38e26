"""Measure where the time of the first picture goes: the supervised script from its start to the GIF, part by part.

    HF_ENDPOINT=http://127.0.0.1:9 python benchmarks/startup.py

Every round starts two processes in turn: Python with nothing to do, and Python that imports and runs the script and
measures each part. The parts follow one another and do not overlap. At most 1 second is allowed until the GIF is there,
beyond the imports of torch and timm, the model, the flow and the logit lens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPT = "VIT_DynamicAccumulatedAttentionMap_oneSample"
PHOTO = ROOT / ".img" / "coffee.png"
FUNCTIONS = {
    "load_model": "load the model", "read_image": "read the photo", "attention_flow": "flow",
    "lens_outputs": "read every block", "evolution": "describe the evolution", "manifest": "describe the run",
    "save_result": "draw and write",
}  # fmt: skip
"""Global names of the script that are measured."""
NEEDED = ("import torch", "import timm", "load the model", "flow", "read every block")


def parts(arguments: list[str]) -> dict[str, float]:
    """Run the script in this process and return the seconds of every part."""
    seconds: dict[str, float] = {}

    def timed(part: str, function: Callable) -> Callable:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[part] = seconds.get(part, 0) + time.perf_counter() - began

        return run

    for module in ("torch", "timm", SCRIPT):
        timed("import the rest" if module == SCRIPT else f"import {module}", importlib.import_module)(module)
    script = sys.modules[SCRIPT]
    for name, part in FUNCTIONS.items():
        setattr(script, name, timed(part, getattr(script, name)))
    if timed("main", script.main)(arguments):
        sys.exit(2)
    seconds["options and the like"] = seconds.pop("main") - sum(seconds[part] for part in FUNCTIONS.values())
    return seconds


def main() -> None:
    """Run the rounds and report them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_small_patch14_caltech101")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", metavar="FILE", help=argparse.SUPPRESS)  # measure them in this process
    options = parser.parse_args()
    if not 1 <= options.rounds <= 1000:
        parser.exit(2, f"error: rounds: expected 1 to 1000, got {options.rounds}\n")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--image", str(PHOTO), "--model", options.model, "--output-dir", folder]
        if options.parts:
            arguments[-1] = str(Path(options.parts).parent)
            Path(options.parts).write_text(json.dumps(parts(arguments)))
            return

        def seconds(*command: str) -> float:
            began = time.perf_counter()
            if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
                sys.exit(2)  # it said why
            return time.perf_counter() - began

        rounds = []
        for _ in range(options.rounds):
            file = Path(folder, "parts.json")
            start = {"start and end of Python": seconds("-c", "pass")}
            began = time.time()
            whole = seconds(__file__, "--model", options.model, "--parts", str(file))
            (gif,) = Path(folder).rglob("flow.gif")
            measured = start | json.loads(file.read_text())
            needed = sum(measured[part] for part in NEEDED)
            measured["end of the process"] = whole - sum(measured.values())
            measured["from the start until the GIF is there"] = until = gif.stat().st_ctime - began  # its last renaming
            measured["beyond torch, timm, model, flow, lens"] = until - needed
            rounds.append(measured)
    report(options.model, rounds)


def report(model: str, rounds: list[dict[str, float]]) -> None:
    """Print median, minimum and maximum of every part."""
    from command_line.terminal import say  # not above: it imports what is measured

    say(f"{model}, Python {platform.python_version()}, {os.cpu_count()} CPUs, {len(rounds)} rounds; seconds")
    for part in rounds[0]:
        values = [measured[part] for measured in rounds]
        say(f"  {part:<36}{statistics.median(values):7.3f}  ({min(values):.3f} to {max(values):.3f})")
    beyond = statistics.median(measured["beyond torch, timm, model, flow, lens"] for measured in rounds)
    say(f"  {'within 1 second' if beyond <= 1 else 'more than 1 second'}")


if __name__ == "__main__":
    main()
