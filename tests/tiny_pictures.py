"""Small flows and pictures to draw, and functions that look at the result."""

import numpy as np
from PIL import Image


def random_flow(blocks=12, h=4, w=4):
    """Return running sums of random maps, `(L, h, w)` float32."""
    return np.random.default_rng(h * w).gamma(1, 1, (blocks, h, w)).astype(np.float32).cumsum(0)


def random_picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def solid(colour, size=(40, 20)):
    return Image.new("RGB", size, colour)


def box(page, colour):
    """Return top, left, height and width of the only rectangle of this colour on the page."""
    ys, xs = np.nonzero((np.asarray(page) == colour).all(2))
    top, left, height, width = ys.min(), xs.min(), np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) == height * width
    return int(top), int(left), int(height), int(width)


def read_gif(path):
    """Return all frames as RGB arrays, and their durations."""
    with Image.open(path) as gif:
        frames, durations = [], []
        for b in range(gif.n_frames):
            gif.seek(b)
            frames.append(np.asarray(gif.convert("RGB"), np.float32))
            durations.append(gif.info["duration"])
    return frames, durations


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def gradient(width, height):
    """Return a picture whose colour differs at every edge and corner, so that a turn or flip of it shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.stack([40 + 200 * x, 30 + 180 * y, 200 - 150 * x * y], 2).astype(np.uint8))
