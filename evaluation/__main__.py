"""Compare explanation methods on a folder of photos: `python -m evaluation --help`."""

import sys
from importlib.util import find_spec

from command_line.terminal import run
from evaluation.command import main

if __name__ == "__main__":
    for package in ("captum", "pytorch_grad_cam", "scipy"):
        if find_spec(package) is None:
            print(f"error: {package} is not installed; pip install -e '.[evaluation]'", file=sys.stderr)
            sys.exit(2)
    run(main)
