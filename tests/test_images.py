"""Tests of images: formats, orientation, damaged and special files, folders."""

import os
import shutil
import socket
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from models.images import find_images, looks_like_image, read_image, resize_longest_side, walk_images
from tests.tiny_pictures import gradient

TURNED = {
    0: np.asarray,  # no orientation
    1: np.asarray,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
    9: np.asarray,
}
"""What each EXIF orientation does with an array, by the rows and columns of the EXIF standard."""
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tif", "lzw.tif"])
def test_orientation_is_applied_once(tmp_path, suffix):
    picture, file = gradient(48, 32), tmp_path / f"turned.{suffix}"
    if suffix == "avif" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow does not read AVIF")
    for orientation, turned in TURNED.items():
        if suffix == "lzw.tif" and orientation not in range(1, 9):
            continue  # libtiff does not write them
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(file, exif=exif, **({"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}))
        image = read_image(file)
        expected = turned(np.asarray(picture, int))
        assert np.asarray(image).shape == expected.shape and np.abs(np.asarray(image) - expected).mean() < 4
        assert image.getexif().get(0x0112, 1) == 1  # so that nobody turns it again


@pytest.mark.parametrize("kind", ["XMP of JPEG", "XMP of WebP", "XMP of PNG", "raw profile of PNG"])
def test_orientation_from_elsewhere(tmp_path, kind):
    """ImageMagick writes the EXIF block of a PNG as text."""
    file, text, exif = tmp_path / f"turned.{kind[-4:].strip().lower()}", PngImagePlugin.PngInfo(), Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    if kind == "raw profile of PNG":
        text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    elif kind == "XMP of PNG":
        text.add_itxt("XML:com.adobe.xmp", XMP)
    gradient(48, 32).save(file, **({"pnginfo": text} if "PNG" in kind else {"xmp": XMP.encode()}))
    with Image.open(file) as opened:
        if 0x0112 not in opened.getexif():
            pytest.skip("this Pillow does not look there")
    image = read_image(file)
    assert image.size == (32, 48) and image.getexif().get(0x0112, 1) == 1


def exif_block(kind, count, value, tag=0x0112):
    """Return an EXIF block with one tag, whatever its type."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, tag, kind, count) + value + bytes(4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "block",
    [
        exif_block(2, 2, b"6\0\0\0"),
        exif_block(7, 4, b"\6\0\0\0"),
        exif_block(3, 1, bytes(4)),
        exif_block(3, 1, b"\x63\0\0\0"),
        exif_block(99, 1, b"\6\0\0\0"),
        exif_block(5, 1, b"\xff\xff\xff\0"),
        exif_block(3, 2**31, b"\6\0\0\0"),
        exif_block(3, 1, b"")[:20],
        exif_block(2, 4, b"\xff\xfe\0\0", tag=0x010F),
        b"Exif\0\0" + bytes(range(60)),
        b"no EXIF",
    ],
    ids=["text", "bytes", "0", "99", "odd type", "outside", "too many", "cut", "odd maker", "no TIFF", "no header"],
)
def test_odd_orientations_mean_upright(tmp_path, suffix, block):
    gradient(48, 32).save(tmp_path / f"odd.{suffix}", exif=block)
    image = read_image(tmp_path / f"odd.{suffix}")
    assert image.size == (48, 32) and np.abs(np.asarray(image, int) - np.asarray(gradient(48, 32), int)).mean() < 4


def test_odd_tags_beside_the_orientation(tmp_path):
    """The block could not be written again, but nobody has to."""
    tags = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0") + struct.pack("<HHI4s", 0x011A, 2, 2, b"x\0\0\0")
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    gradient(48, 32).save(tmp_path / "odd.jpg", exif=block)
    with pytest.raises(Exception), Image.open(tmp_path / "odd.jpg") as file:  # noqa: B017 - any kind of error
        file.getexif().tobytes()
    assert read_image(tmp_path / "odd.jpg").size == (32, 48)


@pytest.mark.parametrize("kind", ["compressed text", "international text", "colour profile"])
def test_png_with_much_metadata(tmp_path, kind):
    long, text = "x" * 3_000_000, PngImagePlugin.PngInfo()
    if kind == "compressed text":
        text.add_text("prompt", long, zip=True)
    elif kind == "international text":
        text.add_itxt("prompt", long, zip=True)
    profile = {"icc_profile": long.encode()} if kind == "colour profile" else {}
    picture().save(tmp_path / "long.png", pnginfo=text, **profile)
    assert near(read_image(tmp_path / "long.png"), picture(), 0)


def test_png_with_too_much_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 2**21, zip=True)
    picture().save(tmp_path / "long.png", pnginfo=text)
    with pytest.raises(ValueError, match=r"long.png has more than 64 MB of metadata; save it without$"):
        read_image(tmp_path / "long.png")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\nshowpage\n"),
        ("pdf", b"%PDF-1.4\n"),
        ("h5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
        ("mpg", b"\0\0\1\xb3\x02\x80\x1e" + bytes(100)),
        ("wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(100)),
        ("fits", b"SIMPLE  =                    T" + b" " * 3000),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"/>'),
        ("mp4", b"\0\0\0\x20ftypisom" + bytes(100)),
    ],
)
def test_files_that_are_no_photos(tmp_path, monkeypatch, suffix, content):
    """Their names are left out; their content is refused, whatever the name, and no program is started for it."""

    def start(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", start)
    assert not looks_like_image(f"photo.{suffix}")
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"photo.png is not an image that Pillow can read$"):
        read_image(tmp_path / "photo.png")


@pytest.mark.parametrize(
    "name", ["a.jpg", "A.JPEG", "a.png", "a.webp", "a.tiff", "a.bmp", "a.gif", "a.pgm", "a.heic", "a.HIF"]
)
def test_names_of_photos(name):
    assert looks_like_image(name) and not looks_like_image(f".{name}") and not looks_like_image(f"{name}.txt")


@pytest.mark.parametrize("name", ["a", "jpg", "", ".jpg", "a.fit", "a.hdf", "a.ps", "a.txt", "a.png.part"])
def test_names_that_are_no_photos(name):
    assert not looks_like_image(name)


@pytest.mark.parametrize("orientation", TURNED)
def test_heic_is_turned_once(tmp_path, orientation):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the package pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    picture, exif = gradient(96, 64), Image.Exif()
    exif[0x0112] = orientation
    for name in ("photo.heic", "photo.jpg"):  # phones and chats rename
        picture.save(tmp_path / name, "HEIF", exif=exif.tobytes())
        expected = TURNED[orientation](np.asarray(picture, int))
        image = np.asarray(read_image(tmp_path / name), int)
        assert image.shape == expected.shape and np.abs(image - expected).mean() < 4


def test_other_kinds_of_heif(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the package pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    picture = gradient(96, 64)
    for xmp in (XMP, "<tiff:Orientation>6\n</tiff:Orientation>"):  # pillow-heif does not remove the second
        picture.save(tmp_path / "xmp.heic", xmp=xmp.encode())
        assert read_image(tmp_path / "xmp.heic").size == (64, 96)
    Image.new("RGBA", (96, 64), (255, 0, 0, 0)).save(tmp_path / "clear.heif")
    assert min(read_image(tmp_path / "clear.heif").getpixel((9, 9))) > 250
    picture.save(tmp_path / "whole.heic")
    content = (tmp_path / "whole.heic").read_bytes()
    (tmp_path / "mif1.hif").write_bytes(content.replace(b"ftypheic", b"ftypmif1", 1))  # a brand that AVIF has, too
    assert near(read_image(tmp_path / "mif1.hif"), read_image(tmp_path / "whole.heic"), 0)
    (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.heic is not an image that Pillow can read"):
        read_image(tmp_path / "cut.heic")


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_heic_without_its_package(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(
        ValueError, match=rf"{name} is HEIC, which needs the package pillow-heif; pip install -e '.\[heif\]'"
    ):
        read_image(tmp_path / name)


def test_the_first_frame_of_an_animation(tmp_path):
    first, second = gradient(40, 30), gradient(40, 30).transpose(Image.Transpose.ROTATE_180)
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        first.save(tmp_path / f"film.{suffix}", save_all=True, append_images=[second], **options)
        assert near(read_image(tmp_path / f"film.{suffix}"), first, 0)


def test_float_and_32_bit_images_are_stretched(tmp_path):
    values = np.linspace(-3, 9, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert read_image(tmp_path / "float.tif").getextrema() == ((0, 255),) * 3
    values[:] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"^image: .*nan.tif cannot be read: all pixels are NaN, infinite or declared"):
        read_image(tmp_path / "nan.tif")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.jpg", lambda p: None, "does not exist"),
        ("text.jpg", lambda p: p.write_text("hello"), "is not an image that Pillow can read"),
        ("zero.jpg", lambda p: p.write_bytes(b""), "is empty"),
        ("one.png", lambda p: Image.new("RGB", (1, 1)).save(p), "has 1 x 1 pixels; the minimum is 8 x 8"),
        ("folder.png", lambda p: p.mkdir(), "is a folder, not an image file"),
        ("pipe.png", lambda p: os.mkfifo(p), "is a named pipe, not an image file"),
        ("link.png", lambda p: (os.mkfifo(p.parent / "pipe"), p.symlink_to("pipe")), "is a named pipe, not an image"),
        ("broken.png", lambda p: p.symlink_to("gone"), "does not exist"),
        ("loop.png", lambda p: p.symlink_to("loop.png"), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_bad_images(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"image: {tmp_path / name}") and "\n" not in str(error.value)


def test_sockets_and_devices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        with pytest.raises(ValueError, match="^image: socket.png is a socket, not an image file$"):
            read_image("socket.png")
    with pytest.raises(ValueError, match="^image: /dev/zero is a device, not an image file$"):
        read_image("/dev/zero")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 5000 + ".png", "cannot be read: File name too long"),
        ("a/" * 3000 + "b.png", "cannot be read: File name too long"),
        ("a\0b.png", r"a\\x00b.png cannot be read: embedded null byte"),
        ("a\ud800b.png", r"a\\ud800b.png cannot be read: .*surrogates not allowed"),
        ("\x1b[2J\n\u202eb.png", r"\\x1b\[2J\\n\\u202eb.png"),
    ],
    ids=["long name", "long path", "NUL", "surrogate", "controls"],
)
def test_names_that_no_file_has(name, message):
    for read in (read_image, find_images):
        with pytest.raises(ValueError, match=message) as error:
            read(name)
        text = str(error.value)
        assert len(text) < 400 and text.isprintable()


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
    with pytest.raises(ValueError, match="image: the folder .* has no images; folders in it are not searched$"):
        find_images(tmp_path)
    for name in ("b.JPG", "a.png", ".hidden.png"):
        picture().convert("RGB").save(tmp_path / name, "PNG")
    (tmp_path / "c.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "b.JPG"]
    assert find_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    shutil.rmtree(tmp_path / "c.png")
    with pytest.raises(ValueError, match="image: there is no file .*; check the path$"):
        find_images(tmp_path / "gone")


def tree(folder, *names):
    """Write small pictures; a name with "->" becomes a link."""
    for name in names:
        name, _, target = name.partition(" -> ")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (folder / name).symlink_to(target)
        else:
            Image.new("L", (8, 8)).save(folder / name, "PNG")
    return folder


def found(folder, **options):
    return [path.relative_to(folder).as_posix() for path in walk_images(folder, **options)]


def test_walk_images_finds_what_is_below(tmp_path):
    names = ["a.png", "b/c/d.JPG", "b/e.png", "b.d/f.webp"]
    hidden = [".h.png", ".ipynb_checkpoints/a.png", ".Trash-1000/files/a.png", "b/._e.png", "b/.git/x.png"]
    tree(tmp_path / "photos", *names, *hidden, "notes.txt", "data.h5", "film.mpg")
    assert found(tmp_path / "photos") == ["a.png", "b/c/d.JPG", "b/e.png", "b.d/f.webp"]
    assert found(tree(tmp_path / ".img", "a.png")) == ["a.png"]  # named, so wanted
    (tmp_path / "empty").mkdir()
    assert found(tmp_path / "empty") == []


def test_walk_images_lists_what_is_no_regular_file(tmp_path):
    """Whoever reads them says why they are left out."""
    tree(tmp_path, "gone.png -> nowhere", "loop.png -> loop.png", "self -> self", "folder.png/a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert found(tmp_path) == ["folder.png/a.png", "gone.png", "loop.png", "pipe.png"]
    assert [p.name for p in find_images(tmp_path)] == ["gone.png", "loop.png", "pipe.png"]


@pytest.mark.parametrize(
    "link", ["up -> ..", "b/up -> ..", "b/up -> ../..", "b/self -> .", "b/c/up -> ../../..", "root -> /"]
)
def test_links_upwards_end(tmp_path, link):
    tree(tmp_path, "other/x.png", "photos/a.png", "photos/b/c/d.png", f"photos/{link}")
    assert found(tmp_path / "photos") == ["a.png", "b/c/d.png"]


def test_links_to_files_and_folders_are_followed(tmp_path):
    tree(tmp_path, "elsewhere/x.png", "elsewhere/deep/y.png", "single.png", ".hidden/z.png")
    photos = tree(
        tmp_path / "photos", "a -> ../elsewhere", "b -> ../single.png", "c.png -> ../single.png", "d -> ../.hidden"
    )
    assert found(photos) == ["a/deep/y.png", "a/x.png", "c.png", "d/z.png"]
    for link in (tmp_path / "link", tmp_path / "photos" / "e"):
        link.symlink_to(tmp_path / "photos")
        assert found(link) == found(photos)


def test_no_folder_is_found_twice(tmp_path):
    """The path without a link wins, whatever the order of names; two links into each other end."""
    tree(tmp_path, "photos/a_link -> run", "photos/run/a.png", "photos/z_link -> run", "photos/run/back -> ../../out")
    tree(tmp_path, "out/b.png", "out/back -> ../photos/run", "photos/to_out -> ../out")
    assert found(tmp_path / "photos") == ["run/a.png", "to_out/b.png"]


def test_classes_are_scanned_one_by_one(tmp_path):
    """A class that is a link does not bring in the data set to which one of its own links leads."""
    tree(tmp_path, "data/dog/d.png", "data/cat -> ../far/cats", "far/cats/c.png", "far/cats/set -> ../../data")
    tree(tmp_path, "far/other.png", "far/cats/up -> ..", "extra/e.png", "far/cats/more -> ../../extra")
    assert found(tmp_path / "data" / "cat") == ["c.png", "more/e.png"]
    assert found(tmp_path / "data" / "dog") == ["d.png"]


def test_folders_to_skip(tmp_path):
    photos = tree(tmp_path / "photos", "a.png", "out/x/b.png", "boxes/c.png", "deep/out/d.png", "link -> out/x")
    without = [photos / "out", photos / "deep" / ".." / "boxes", tmp_path / "gone"]
    assert found(photos, without=[path.resolve() for path in without]) == ["a.png", "deep/out/d.png"]
    everything = ["a.png", "boxes/c.png", "deep/out/d.png", "out/x/b.png"]
    assert found(photos, without=[photos, tmp_path]) == found(photos) == everything


@pytest.mark.parametrize("walk", [walk_images, find_images])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, walk):
    tree(tmp_path, "a.png", "locked/b.png")
    locked, scandir = tmp_path / "locked" if walk is walk_images else tmp_path, os.scandir

    def refuse(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=rf"^image: {locked} cannot be listed: Permission denied; check its permissions$"
    ):
        walk(tmp_path)
    if walk is walk_images:
        with pytest.raises(ValueError, match="^train: "):
            walk_images(tmp_path, "train")
