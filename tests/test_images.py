"""Tests of images: colour modes, damaged files, folders."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from models.images import find_images, read_image, resize_longest_side


def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize((40, 30), Image.Resampling.BILINEAR)


def near(a, b, tolerance):
    return a.size == b.size and np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= tolerance


def test_colour_modes_show_the_same_picture(tmp_path):
    rgb, grey = picture(), picture().convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cases = {
        "rgb.png": (rgb, rgb, 0),
        "grey.png": (grey, grey.convert("RGB"), 0),
        "sixteen.png": (sixteen, grey.convert("RGB"), 0),
        "sixteen.tif": (sixteen, grey.convert("RGB"), 0),
        "palette.png": (rgb.quantize(64), rgb.quantize(64).convert("RGB"), 0),
        "rgba.png": (rgb.convert("RGBA"), rgb, 0),
        "grey_alpha.png": (grey.convert("LA"), grey.convert("RGB"), 0),
        "cmyk.jpg": (rgb.convert("CMYK"), rgb, 40),
        "one_bit.png": (grey.convert("1"), grey.convert("1").convert("RGB"), 0),
    }
    for name, (stored, expected, tolerance) in cases.items():
        stored.save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and near(image, expected, tolerance), name


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture().save(tmp_path / "turned.png", exif=exif)
    assert near(read_image(tmp_path / "turned.png"), picture().transpose(Image.Transpose.ROTATE_270), 0)


def test_float_and_32_bit_images_are_stretched(tmp_path):
    values = np.linspace(-3, 9, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert read_image(tmp_path / "float.tif").getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.jpg", lambda p: None, "does not exist"),
        ("text.jpg", lambda p: p.write_text("hello"), "is not an image that Pillow can read"),
        ("zero.jpg", lambda p: p.write_bytes(b""), "is empty"),
        ("one.png", lambda p: Image.new("RGB", (1, 1)).save(p), "has 1 x 1 pixels; the minimum is 8 x 8"),
        ("folder.png", lambda p: p.mkdir(), "is a folder, not an image file"),
    ],
)
def test_bad_images(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"image: {tmp_path / name}") and "\n" not in str(error.value)


def test_truncated_jpeg(tmp_path):
    picture().resize((400, 300)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read: .*truncated"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("times", [1.5, 3])  # Pillow warns above its limit and refuses above twice that
def test_decompression_bomb(tmp_path, monkeypatch, times):
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 * 300 / times))
    with pytest.raises(ValueError, match="million pixels; scale it down"):
        read_image(tmp_path / "bomb.png")


def test_resize_longest_side():
    """The same as Pillow's `contain`, except that no side becomes 0 pixels."""
    for size in ((600, 400), (401, 600), (20, 20)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        expected = ImageOps.contain(image, (320, 320), Image.Resampling.BICUBIC)
        assert resize_longest_side(image, 320).size == expected.size and np.array_equal(
            resize_longest_side(image, 320), expected
        )
    assert resize_longest_side(Image.new("RGB", (8, 6000)), 320).size == (1, 320)


def test_find_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="image: the folder .* has no images"):
        find_images(tmp_path)
    for name in ("b.JPG", "a.png", ".hidden.png"):
        picture().convert("RGB").save(tmp_path / name, "PNG")
    (tmp_path / "c.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "b.JPG"]
    assert find_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    shutil.rmtree(tmp_path / "c.png")
    with pytest.raises(ValueError, match="image: there is no file"):
        find_images(tmp_path / "gone")
