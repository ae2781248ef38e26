"""Regions of annotations: boxes and masks pixel by pixel, the places where they are found, every error."""

import os

import numpy as np
import pytest
from PIL import Image

from evaluation.annotations import find_annotation, region_of

SIZE = (20, 12)  # width, height


def write_xml(path, boxes, size=SIZE, head=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(
        "<object><name>a</name><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        + "</bndbox><part><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>12</ymax></bndbox></part></object>"
        for box in boxes
    )
    width_height = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(f"{head}<annotation>{width_height}{objects}</annotation>")


def plain_region(boxes, size=SIZE):
    """Pixel by pixel, counted from 1, the last one inside."""
    region = np.zeros(size[::-1], bool)
    for y in range(1, size[1] + 1):
        for x in range(1, size[0] + 1):
            region[y - 1, x - 1] = any(a <= x <= c and b <= y <= d for a, b, c, d in boxes)
    return region


@pytest.mark.parametrize("size", [SIZE, None, (0, 0)])
def test_the_union_of_all_boxes_but_not_of_their_parts(tmp_path, size):
    boxes = [(2, 3, 5, 6), (4, 5, 20, 12)]
    write_xml(tmp_path / "a.xml", boxes, size)
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region(boxes))


def test_boxes_are_scaled_with_the_photo(tmp_path):
    write_xml(tmp_path / "a.xml", [(2, 3, 5, 6)])
    region = region_of(tmp_path, "photos", "a.jpg", (60, 24))
    np.testing.assert_array_equal(region, plain_region([(2, 3, 5, 6)]).repeat(2, 0).repeat(3, 1))
    small = region_of(tmp_path, "photos", "a.jpg", (5, 3))  # quarters: every pixel that the box touches
    np.testing.assert_array_equal(small, plain_region([(2, 3, 5, 6)]).reshape(3, 4, 5, 4).any((1, 3)))


def test_boxes_end_at_the_edge_of_the_picture(tmp_path):
    write_xml(tmp_path / "a.xml", [(0, 0, 3, 3), (18, 10, 99, 99)])
    region = region_of(tmp_path, "photos", "a.jpg", SIZE)
    np.testing.assert_array_equal(region, plain_region([(1, 1, 3, 3), (18, 10, 20, 12)]))
    write_xml(tmp_path / "b.xml", [(30, 1, 40, 3), (-9, 1, -4, 3)])
    assert region_of(tmp_path, "photos", "b.jpg", SIZE) is None


def mask_of(region, mode):
    if numbers := {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode):
        return Image.fromarray(region.astype(numbers) * 300)
    grey = Image.fromarray(region.astype(np.uint8) * 255)
    return grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else grey.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr"])
def test_a_mask_is_all_that_is_not_black(tmp_path, mode):
    wanted = plain_region([(3, 2, 9, 7)])
    mask = mask_of(wanted, mode)
    assert mask.mode == mode
    mask.save(tmp_path / "a.png", "TIFF" if mode in ("I", "F", "CMYK", "YCbCr") else "PNG")
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), wanted)
    large = region_of(tmp_path, "photos", "a.jpg", (40, 36))
    np.testing.assert_array_equal(large, wanted.repeat(3, 0).repeat(2, 1))


def test_transparent_pixels_are_no_object(tmp_path):
    pixels = np.full((12, 20, 4), 255, np.uint8)
    pixels[:, :5, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region([(6, 1, 20, 12)]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_colour_that_is_transparent_is_no_object(tmp_path, mode):
    pixels = np.zeros((12, 20), np.uint8)
    pixels[:, 4:] = 2
    pixels[:, 12:] = 1
    mask = Image.fromarray(pixels)
    if mode == "P":
        mask = mask.convert("P")
        mask.putpalette([0, 0, 0] * 256)
    elif mode != "L":
        mask = mask.point(lambda v: 255 * (v == 2)).convert(mode)
    mask.save(tmp_path / "a.png", transparency={"1": 0, "L": 1, "P": 1, "RGB": (0, 0, 0)}[mode])
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region([(5, 1, 12, 12)]))


def test_a_palette_with_transparency(tmp_path):
    index = np.zeros((12, 20), np.uint8)
    index[:, 4:] = 1
    index[:, 12:] = 255
    alpha = np.zeros((12, 20), np.uint8)
    alpha[:6] = 255
    mask = Image.fromarray(index).convert("P").convert("PA")
    mask.putpalette([0, 0, 0] * 256)
    mask.putalpha(Image.fromarray(alpha))
    mask.save(tmp_path / "a.png", "TIFF")
    assert Image.open(tmp_path / "a.png").mode == "PA"
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region([(5, 1, 12, 6)]))


def test_a_number_that_is_missing_is_no_object(tmp_path):
    values = plain_region([(3, 2, 9, 7)]).astype(np.float32)
    values[0] = np.nan
    Image.fromarray(values).save(tmp_path / "a.png", "TIFF")
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region([(3, 2, 9, 7)]))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (5, np.transpose),
     (6, np.rot90), (7, lambda a: np.rot90(a, 2).T), (8, lambda a: np.rot90(a, -1)), (99, lambda a: a)],
)  # fmt: skip
def test_a_mask_is_turned_upright(tmp_path, orientation, turn):
    """`turn` makes the stored picture of the upright one."""
    wanted, exif = plain_region([(3, 2, 9, 5)]), Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(wanted)).astype(np.uint8) * 255).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), wanted)


def test_a_mask_with_broken_metadata(tmp_path):
    Image.new("L", SIZE, 255).save(tmp_path / "a.png", exif=b"Exif\0\0no block")
    assert region_of(tmp_path, "photos", "a.jpg", SIZE).all()


def test_the_void_border_of_voc_is_no_object_and_a_dark_palette_is(tmp_path):
    index = np.zeros((12, 20), np.uint8)
    index[2:8, 3:9] = 255
    index[3:7, 4:8] = 1
    mask = Image.fromarray(index).convert("P")
    mask.putpalette([0] * 768)
    mask.save(tmp_path / "a.png")
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), index == 1)


def test_places_of_annotations(tmp_path):
    photo = "cup/image.1.jpg"
    assert find_annotation(tmp_path, "photos", photo) is None
    assert region_of(tmp_path, "photos", photo, SIZE) is None
    names = ["image.1.png", "image.1.xml", "cup/image.1.png", "cup/image.1.xml"]  # from the last choice to the first
    for name in names:
        write_xml(tmp_path / name, [])
        assert find_annotation(tmp_path, "photos", photo) == tmp_path / name


def test_no_object_is_no_region(tmp_path):
    write_xml(tmp_path / "a.xml", [])
    Image.new("L", SIZE).save(tmp_path / "b.png")
    assert region_of(tmp_path, "photos", "a.jpg", SIZE) is None
    assert region_of(tmp_path, "photos", "b.jpg", SIZE) is None


@pytest.mark.parametrize("photo", ["cup/a.png", "a.png"])
def test_a_photo_is_not_its_own_mask(tmp_path, photo):
    (tmp_path / photo).parent.mkdir(exist_ok=True)
    Image.new("RGB", SIZE, "white").save(tmp_path / photo)
    assert region_of(tmp_path, tmp_path, photo, SIZE) is None
    assert region_of(tmp_path / "cup" / "..", tmp_path, photo, SIZE) is None
    write_xml((tmp_path / photo).with_suffix(".xml"), [(1, 1, 2, 2)])
    np.testing.assert_array_equal(region_of(tmp_path, tmp_path, photo, SIZE), plain_region([(1, 1, 2, 2)]))


def one_line(error, *words):
    message = str(error.value)
    assert message.startswith("annotations: ") and "\n" not in message and all(word in message for word in words), (
        message
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation><object>",
        "<annotation><size><width>wide</width></size></annotation>",
        "<annotation><object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax></bndbox></object></annotation>",
        '<?xml version="1.0" encoding="no-such"?><annotation/>',
    ],
)
def test_a_damaged_xml(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError) as error:
        region_of(tmp_path, "photos", "a.jpg", SIZE)
    one_line(error, "a.xml is damaged", "repair or remove it")


@pytest.mark.parametrize(
    "box",
    [(5, 1, 2, 3), (1, 3, 2, 2), ("inf", 1, "inf", 3), ("-inf", 1, 3, 3), (1, 1, "nan", 3), ("1e308", 1, "1e308", 3)],
)
def test_a_box_with_swapped_sides(tmp_path, box):
    write_xml(tmp_path / "a.xml", [box])
    with pytest.raises(ValueError) as error:
        region_of(tmp_path, "photos", "a.jpg", SIZE)
    one_line(error, "a.xml is damaged", "its sides are swapped")


def test_a_box_that_is_far_too_large(tmp_path):
    write_xml(tmp_path / "a.xml", [("-1e300", 2, "1e300", 3)])
    np.testing.assert_array_equal(region_of(tmp_path, "photos", "a.jpg", SIZE), plain_region([(1, 2, 20, 3)]))
    write_xml(tmp_path / "a.xml", [("1e300", 2, "1e301", 3)])
    assert region_of(tmp_path, "photos", "a.jpg", SIZE) is None


@pytest.mark.parametrize("side", [-1, 10**400, "9" * 5000, "nan", "1e3"])
def test_a_photo_of_impossible_size(tmp_path, side):
    write_xml(tmp_path / "a.xml", [(1, 1, 2, 2)], (side, 12))
    with pytest.raises(ValueError) as error:
        region_of(tmp_path, "photos", "a.jpg", SIZE)
    one_line(error, "a.xml is damaged", "repair or remove it")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("suffix", [".xml", ".png"])
def test_an_annotation_that_is_not_a_file(tmp_path, suffix):
    """A pipe would be read for ever."""
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=rf"^annotations: .*a{suffix} is not a file; remove it$"):
        region_of(tmp_path, "photos", "a.jpg", SIZE)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError) as error:
        region_of(tmp_path, "photos", "a.jpg", SIZE)
    one_line(error, "a.xml", "DOCTYPE")


def test_a_damaged_mask(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n"
    for damaged in (b"", b"no picture", whole[: len(whole) // 2], program):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            region_of(tmp_path, "photos", "a.jpg", SIZE)
        one_line(error, "a.png is damaged")


def test_an_annotation_from_before_the_photo_was_rotated(tmp_path):
    write_xml(tmp_path / "a.xml", [(1, 1, 2, 2)], SIZE[::-1])
    Image.new("L", SIZE[::-1], 255).save(tmp_path / "b.png")
    for photo in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError) as error:
            region_of(tmp_path, "photos", photo, SIZE)
        one_line(error, "12 x 20", "20 x 12", "EXIF")
