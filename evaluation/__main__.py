"""Compare explanation methods on a folder of photos: `python -m evaluation --help`."""

import sys

from command_line.options import run

try:
    from evaluation.command import main
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed; pip install -e '.[evaluation]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    run(main)
