"""Compare explanation methods on a folder of photos: `python -m evaluation --help`."""

from importlib.util import find_spec

from command_line.terminal import complain, run
from evaluation.command import main


def checked_main() -> int:
    """Run the command if the packages that it compares with are installed; return its exit status."""
    for package in ("captum", "pytorch_grad_cam", "scipy"):
        if find_spec(package) is None:
            complain(f"error: {package} is not installed; pip install -e '.[evaluation]'")
            return 2
    return main()


if __name__ == "__main__":
    run(checked_main)
