"""Talk to the terminal: escape names, survive a closed pipe, and clean up after a kill."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from daam_vit.ranks import OthersLeft, claim, leave, process_group
from daam_vit.text import printable

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


def say(*lines: str) -> None:
    """Print lines on stdout, beside a progress bar; control characters are escaped."""
    tqdm.write("".join(f"{printable(line)}\n" for line in lines), file=sys.stdout, end="")


def complain(message: object) -> None:
    """Print one line on stderr, beside a progress bar; control characters are escaped.

    A line that another rank has printed is not printed again.
    """
    line = printable(str(message))
    if claim(line):
        tqdm.write(f"{line}\n", file=sys.stderr, end="")


def run(main: Callable[[], int]) -> None:
    """Call `main` and exit with the code that it returns, or with 128 and the number of the signal that ended it.

    Under `torchrun`, which ends all ranks as soon as one of them fails, the ranks exit together, with the largest code.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # names need not fit the encoding of the terminal, and lines of several ranks should not mix
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    try:
        with process_group():
            code = _leave_together(main)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as stop:  # a signal, or another rank has left
        code = stop.code
    sys.stdout.flush()
    if sys.stdout.error is not None:
        complain(f"error: stdout: cannot be written: {sys.stdout.error}; files are written all the same")
        code = code or 2
    sys.exit(code)


def _leave_together(main: Callable[[], int]) -> int:
    """Call `main`, and wait for the other ranks, except after a signal; return the largest exit code."""
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code or 0
        if code >= 128 or isinstance(stop, OthersLeft):
            raise
    return leave(code)


class _Stream:
    """A text stream whose output is dropped once it cannot be written, because the reader left or the disk is full."""

    error: OSError | None = None
    """The first error other than a closed pipe."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, method: Callable, *arguments: str) -> int | None:
        try:
            return method(*arguments)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = self.error or error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Open the streams that the caller closed, so that no other file gets their descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)


def _leave(number: int, frame: object) -> None:
    """End the process by an exception, so that temporary files are deleted; ignore further signals meanwhile."""
    for each in _SIGNALS:
        signal.signal(each, lambda *_: None)  # SIG_IGN would print a traceback if the next one is already there

    def swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal again if it came while an object was deleted, where Python drops exceptions."""
        if isinstance(unraisable.exc_value, SystemExit):
            signal.signal(number, _leave)
            threading.Timer(0.01, os.kill, [os.getpid(), number]).start()
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = swallowed
    sys.exit(128 + number)
