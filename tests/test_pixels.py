"""Tests of pixels: every Pillow mode becomes RGB; missing values do not decide what the others look like."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from daam_vit.pixels import to_rgb
from tests.tiny_pictures import gradient

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
RAMP = np.linspace(0.2, 0.7, 64, dtype=np.float32).reshape(8, 8)
"""64 floats that become the greys of `stretched(RAMP)`."""


def stretched(values):
    """Return the grey of values that are all data, in plain words: from 0 at the lowest to 255 at the highest."""
    low, high = float(values.min()), float(values.max())
    return np.array([[round((float(v) - low) / (high - low) * 255) for v in row] for row in values])


def grey_of(image):
    rgb = np.asarray(to_rgb(image), int)
    assert np.ptp(rgb, axis=2).max() == 0
    return rgb[..., 0]


def lab(rgb):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")


def tiff(values, nodata):
    """Return a GeoTIFF, opened, that declares a value as missing."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", tiffinfo={42113: nodata})
    return Image.open(file)


def retagged(image, **tags):
    """Return a TIFF, opened, whose numbers have another meaning: t262=0 replaces the value of tag 262."""
    file = io.BytesIO()
    image.save(file, "TIFF", tiffinfo={284: 1, 339: 1})
    data = bytearray(file.getvalue())
    entries = range(struct.unpack_from("<I", data, 4)[0] + 2, len(data) - 12, 12)
    for entry in entries:
        value = tags.pop(f"t{struct.unpack_from('<H', data, entry)[0]}", None)
        if value is not None:
            struct.pack_into("<HIHH", data, entry + 2, 3, 1, value, 0)
    assert not tags, "there is no such tag"
    return Image.open(io.BytesIO(data))


def sixteen_bit_png(values, transparent):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *values.shape[::-1], 16, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)))


COLOUR = {
    "RGB": (lambda rgb: rgb, 0),
    "RGBX": (lambda rgb: rgb.convert("RGBX"), 0),
    "RGBA": (lambda rgb: rgb.convert("RGBA"), 0),
    "RGBa": (lambda rgb: rgb.convert("RGBA").convert("RGBa"), 0),
    "CMYK": (lambda rgb: rgb.convert("CMYK"), 1),
    "YCbCr": (lambda rgb: rgb.convert("YCbCr"), 4),
    "HSV": (lambda rgb: rgb.convert("HSV"), 8),
    "LAB": (lab, 20),
    "P": (lambda rgb: rgb.quantize(256), 12),
    "PA": (lambda rgb: rgb.quantize(256).convert("PA"), 12),
}
"""How to make a colour picture of a mode, and the largest error that the mode itself brings."""


@pytest.mark.parametrize("mode", COLOUR)
def test_colours_stay(mode):
    make, tolerance = COLOUR[mode]
    picture = gradient(24, 16)
    image = make(picture)
    rgb = to_rgb(image)
    assert image.mode == mode and rgb.mode == "RGB" and rgb.size == (24, 16)
    assert np.abs(np.asarray(rgb, int) - np.asarray(picture, int)).max() <= tolerance


def test_lab_from_a_tiff():
    """Lightness of 54 % is the grey 128, and of 100 % white (CIE 1976)."""
    for lightness, grey in ((0, 0), (137, 128), (255, 255)):
        file = io.BytesIO()
        Image.new("LAB", (8, 8), (lightness, 128, 128)).save(file, "TIFF")
        image = Image.open(file)
        assert image.mode == "LAB" and np.abs(np.asarray(to_rgb(image), int) - grey).max() <= 1


GREYS = {
    "1": lambda grey: Image.fromarray(grey > 127),
    "L": Image.fromarray,
    "LA": lambda grey: Image.fromarray(grey).convert("LA"),
    "La": lambda grey: Image.fromarray(grey).convert("LA").convert("La"),
    "I;16": lambda grey: Image.fromarray(grey.astype("<u2") * 257),
    "I;16L": lambda grey: Image.frombytes("I;16L", (8, 8), (grey.astype("<u2") * 257).tobytes()),
    "I;16B": lambda grey: Image.fromarray((grey.astype(">u2") * 257).astype(">u2")),
    "I;16N": lambda grey: Image.frombytes("I;16N", (8, 8), (grey.astype("=u2") * 257).tobytes()),
    "I": lambda grey: Image.fromarray(grey.astype(np.int32) * 1000 - 50_000),
    "F": lambda grey: Image.fromarray(grey.astype(np.float32) / 7 - 3),
}


@pytest.mark.parametrize("mode", GREYS)
def test_greys_stay(mode):
    image = GREYS[mode](GREY)
    expected = {"1": (GREY > 127) * 255, "I": stretched(GREY), "F": stretched(GREY)}.get(mode, GREY)
    assert image.mode == mode
    assert np.abs(grey_of(image) - expected).max() == 0


def test_every_mode_of_pillow_is_tested():
    assert set(Image.MODES) <= {*COLOUR, *GREYS}


def test_sixteen_bits_are_scaled_by_the_white_of_the_format():
    values = np.arange(0, 65536, 1024).reshape(8, 8)
    expected = [[round(int(v) / 257) for v in row] for row in values]
    assert np.array_equal(grey_of(Image.fromarray(values.astype(np.uint16))), expected)
    dark = np.where(values < 30_000, values, 0)  # not stretched, although no pixel is white
    for maximum in (65535, 1023):
        scaled = np.round(dark / 65535 * maximum).astype(">u2")
        pgm = Image.open(io.BytesIO(b"P5 8 8 %d\n" % maximum + scaled.tobytes()))
        assert pgm.mode == "I"
        assert np.abs(grey_of(pgm) - dark / 257).max() <= 0.63


SIXTEEN = GREY.astype(np.uint16) * 257
ABOVE_INT32 = GREY.astype(np.uint32) * 16_777_216
TWELVE = np.frombuffer(
    b"".join((4097 * round(int(a) * 4095 / 255)).to_bytes(3, "big") for a in GREY[:, ::2].flat), np.uint8
)


@pytest.mark.parametrize(
    ("file", "greys"),
    [
        (retagged(Image.fromarray(65535 - SIXTEEN), t262=0), GREY),
        (retagged(Image.fromarray((-RAMP).astype(np.float32)), t262=0), stretched(RAMP)),
        (retagged(Image.fromarray(255 - GREY), t262=0), GREY),
        (retagged(Image.fromarray(GREY - np.uint8(128)), t339=2), stretched(GREY)),
        (retagged(Image.fromarray(ABOVE_INT32.view(np.int32)), t339=1), stretched(GREY)),
        (retagged(Image.fromarray(TWELVE.reshape(8, 12)), t256=8, t258=12), np.repeat(GREY[:, ::2], 2, axis=1)),
    ],
    ids=["white is 0", "white is low", "white is 0, 8 bits", "signed", "unsigned", "12 bits"],
)
def test_numbers_mean_what_the_tags_of_a_tiff_say(file, greys):
    assert np.array_equal(grey_of(file), greys)


def test_planes_that_pillow_mixes_up():
    image = Image.new("RGB", (8, 8))
    image.tag_v2 = {258: (16, 16, 16), 259: 1, 284: 2}
    with pytest.raises(ValueError, match="^image: its 16-bit planes are not compressed, which Pillow cannot read; "):
        to_rgb(image)


TRANSPARENT = {
    "LA": lambda colour, alpha: Image.merge("LA", (colour.convert("L"), alpha)),
    "La": lambda colour, alpha: Image.merge("LA", (colour.convert("L"), alpha)).convert("La"),
    "RGBA": lambda colour, alpha: Image.merge("RGBA", (*colour.split(), alpha)),
    "RGBa": lambda colour, alpha: Image.merge("RGBA", (*colour.split(), alpha)).convert("RGBa"),
    "PA": lambda colour, alpha: with_alpha(colour.quantize(256).convert("PA"), alpha),
}


def with_alpha(image, alpha):
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_shows_white(mode):
    picture = gradient(24, 16)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1)))
    image = TRANSPARENT[mode](picture, alpha)
    share = np.asarray(alpha, float)[..., None] / 255
    shown = np.asarray(picture if "L" not in mode else picture.convert("L").convert("RGB"), float)
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image)) - (shown * share + 255 * (1 - share))).max() <= (12 if mode == "PA" else 2)


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (Image.fromarray(GREY), 40),
        (Image.fromarray(GREY).convert("RGB"), (40, 40, 40)),
        (Image.fromarray(GREY).convert("P"), 40),
        (Image.fromarray(GREY).convert("P"), bytes(0 if value == 40 else 255 for value in range(256))),
    ],
    ids=["grey", "colour", "palette", "palette with alpha"],
)
def test_a_transparent_value_shows_white(image, transparent):
    file = io.BytesIO()
    image.save(file, "PNG", transparency=transparent)
    assert np.array_equal(grey_of(Image.open(file)), np.where(GREY == 40, 255, GREY))


def test_a_transparent_value_of_16_bits_shows_white():
    values = GREY.astype(int) * 257
    assert np.array_equal(grey_of(sixteen_bit_png(values, 40 * 257)), np.where(GREY == 40, 255, GREY))


MISSING = {
    "NaN": [np.nan],
    "infinity": [np.inf, -np.inf],
    "lowest float": [np.finfo(np.float32).min],
    "-3.4e38": [-3.4e38],
    "-9999": [-9999],
    "1e20": [1e20],
    "both sides": [-9999, 1e20],
    "both limits": [-3.4e38, 3.4e38],
    "together": [np.nan, -9999, np.inf],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 8, 24])
@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_missing_values_do_not_change_the_others(missing, count):
    """They are black, be it one pixel or a third of all."""
    values, places = RAMP.copy(), np.arange(count)
    values.flat[10 + places] = np.resize(missing, count)
    gone = np.isin(np.arange(64), 10 + places).reshape(8, 8)
    gone &= ~np.isin(values, RAMP)
    assert np.array_equal(grey_of(Image.fromarray(values)), np.where(gone, 0, stretched(RAMP)))


def test_missing_integers_do_not_change_the_others():
    values = GREY.astype(np.int32) * 10
    values[3] = -(2**31)
    assert np.array_equal(grey_of(Image.fromarray(values)), np.where(values < 0, 0, stretched(GREY)))


@pytest.mark.parametrize("missing", [-9999, -32768])
def test_customary_values_need_a_smaller_gap(missing):
    """Heights of up to 3,000 m, with holes."""
    heights = (RAMP * 6000 - 1200).astype(np.float32)
    values = heights.copy()
    values[5] = missing
    assert np.array_equal(grey_of(Image.fromarray(values)), np.where(values == missing, 0, stretched(heights)))
    values[5] = -9998  # may be a height
    assert np.array_equal(grey_of(Image.fromarray(values)), stretched(values))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3.4028234663852886e+38", -3.4028234663852886e38),
        ("-3.40282e+38", -3.4028234663852886e38),  # as some programs shorten it
        ("0", 0),
        ("0.1\0", 0.1),
        ("nan", np.nan),
        ("-1.7976931348623157e+308", -np.inf),  # of 64 bits, in a file of 32
    ],
)
def test_a_declared_missing_value_does_not_change_the_others(text, value):
    values = RAMP.copy()
    values[2, 1:4] = value
    assert np.array_equal(grey_of(tiff(values, text)), np.where(values == RAMP, stretched(RAMP), 0))


@pytest.mark.parametrize("text", ["none", "", "1e999"])
def test_a_declared_value_that_is_no_number_is_ignored(text):
    assert np.array_equal(grey_of(tiff(RAMP, text)), stretched(RAMP))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [
        np.where(RAMP > 0.5, 1, -9999),
        np.linspace(-3.4e38, 3.4e38, 64).reshape(8, 8),
        RAMP * 1e-30,
        np.where(RAMP > 0.699, RAMP + 4.5, RAMP),  # 9 times the range of the others
        np.linspace(-9999, 9999, 64).reshape(8, 8),
    ],
    ids=["two values", "limits of float", "tiny", "bright spot", "no gap"],
)
def test_values_that_are_data_are_kept(values):
    values = values.astype(np.float32)
    assert np.array_equal(grey_of(Image.fromarray(values)), stretched(values))


@pytest.mark.filterwarnings("error")
def test_a_flat_picture_is_black():
    assert grey_of(Image.fromarray(np.full((8, 8), 5, np.float32))).max() == 0


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((8, 8), np.nan, np.float32)),
        Image.fromarray(np.full((8, 8), -np.inf, np.float32)),
        tiff(np.full((8, 8), 7, np.float32), "7"),
    ],
    ids=["NaN", "infinity", "declared"],
)
def test_a_picture_without_data_is_an_error(image):
    with pytest.raises(ValueError, match=r"^image: all pixels are NaN, infinite or declared as missing; pass another"):
        to_rgb(image)


def test_icons_change_their_mode_while_they_are_loaded():
    grey = np.full((128, 128), 100, np.uint8)
    for picture in (Image.fromarray(grey).convert("P"), Image.fromarray(grey.astype(np.uint16) * 257)):
        file = io.BytesIO()
        picture.save(file, "ICNS")
        image = Image.open(file)
        assert image.mode == "RGBA"
        assert (grey_of(image) == 100).all()
        assert image.mode == picture.mode
