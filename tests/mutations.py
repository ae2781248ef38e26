"""Spoil good inputs for the fuzz test, by bytes and by structure; a seed decides what is done."""

import copy
import signal
from contextlib import contextmanager

WRONG = [
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "\x1b[31m", "../up", "猫", [], {}, [[]], {"a": None}, [1, "2"],
]  # fmt: skip
"""Values that take the place of others in a structure."""


def spoil_bytes(data, random):
    """Flip, cut, repeat, swap, overwrite or insert bytes, up to four times; half of the time among the first 200."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if not data:
            break
        near = len(data) if random.random() < 0.5 else min(len(data), 200)
        i, length = random.randrange(near), random.choice([1, 1, 2, 4, 16, 200])
        match random.randrange(6):
            case 0:
                data[i] ^= 1 << random.randrange(8)
            case 1:
                del data[i : random.choice([i + length, len(data)])]
            case 2:
                data[i:i] = data[i : i + length]
            case 3:
                j = random.randrange(len(data))
                data[i : i + length], data[j : j + length] = data[j : j + length], data[i : i + length]
            case 4:
                data[i : i + length] = random.choice([b"\0", b"\xff", b"\x7f"]) * length
            case 5:
                data[i:i] = random.randbytes(length)
    return bytes(data)


def spoil_structure(value, random):
    """Replace, drop, rename, repeat or nest one entry of nested dicts and lists; the original stays as it is."""
    root = [copy.deepcopy(value)]
    container, key = root, 0
    while isinstance(container[key], (dict, list)) and container[key] and random.random() < 0.75:
        container = container[key]
        key = random.choice(list(container)) if isinstance(container, dict) else random.randrange(len(container))
    match random.randrange(6):
        case 0 | 1 | 2:
            container[key] = random.choice(WRONG)
        case 3 if container is not root:
            del container[key]
        case 4 if isinstance(container, dict):
            container[f"{key}{random.choice(['', ' ', '.x', '猫'])}"] = container.pop(key)
        case 4 if container is not root:
            container.append(container[key])
        case _:
            for _ in range(random.choice([1, 3, 400])):
                container[key] = random.choice([[container[key]], {"a": container[key]}])
    return root[0]


@contextmanager
def within(seconds):
    """Fail instead of hanging."""

    def fail(number, frame):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
