"""Find image files and read them as RGB, whatever their format; errors are one line."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Collection
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from daam_vit.pixels import to_rgb
from daam_vit.text import printable

MIN_SIDE = 8
"""Pixels; an image with a shorter side is refused."""
NAME_LIMIT = 300
"""Characters of a path in an error; a longer one is cut."""
FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "ICO", "ICNS", "PSD", "DDS",
    "SGI", "QOI", "PCD", "PCX", "SUN", "XBM", "XPM", "TGA",
)  # fmt: skip
"""Raster formats, by names of Pillow; TGA has no signature and comes last. Others need another program (EPS),
hold scientific data or videos, or cannot be read without a plugin."""
HEIF_EXTENSIONS = {".heic", ".heif", ".hif"}
"""Extensions of photos that can only be read with the package pillow-heif."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation, except 1, needs to be upright."""

# Pillow refuses a PNG if one text or colour profile has more than 1 MB; all of them together may have 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def find_images(path: str | Path) -> list[Path]:
    """Return `[path]` for a file, or the sorted image files of a folder, without its sub-folders.

    Raises:
        ValueError: if the path does not exist or cannot be read, or the folder has no images or cannot be listed.
    """
    path = Path(path)
    name = printable(str(path), NAME_LIMIT)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise ValueError(f"image: there is no file {name}; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"image: {name} {_reason(error, path)}") from None
    if not is_folder:
        return [path]
    files = sorted(list_folder(path, "image")[0])
    if not files:
        raise ValueError(f"image: the folder {name} has no images; folders in it are not searched")
    return files


def walk_images(folder: str | Path, argument: str = "image", without: Collection[Path] = ()) -> list[Path]:
    """Return the sorted image files of a folder and its sub-folders; links to folders are followed.

    No folder is entered twice, and no link is followed to a folder that holds `folder` itself. Hidden files and folders
    are skipped.

    Args:
        folder: an existing folder; it may be hidden.
        argument: the argument that names it, for the error.
        without: real paths of folders to skip, with all that is in them. One that holds `folder` itself is ignored.

    Raises:
        ValueError: if a folder cannot be listed.
    """
    folder = Path(folder)
    root = folder.resolve()
    skipped = {*without} - {root, *root.parents}
    seen = {*root.parents, *(path.resolve() for path in folder.absolute().parents)} - {root}
    files, folders, links = [], [folder], []
    while folders or links:  # links last, so that a file has the path without one
        current = folders.pop() if folders else links.pop(0)
        real = current.resolve()
        if real in seen or not skipped.isdisjoint([real, *real.parents]):
            continue
        seen.add(real)
        images, below = list_folder(current, argument)
        files += images
        for path in below:
            (links if path.is_symlink() else folders).append(path)
    return sorted(files)


def list_folder(folder: Path, argument: str) -> tuple[list[Path], list[Path]]:
    """Return the image files and the folders in a folder, sorted and without hidden ones.

    Links count as their targets; special files and broken links count as files.

    Args:
        folder: the folder.
        argument: the argument that names it, for the error.

    Raises:
        ValueError: if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        name, reason = printable(str(error.filename or folder), NAME_LIMIT), error.strerror or error
        raise ValueError(f"{argument}: {name} cannot be listed: {reason}; check its permissions") from None
    files = [folder / name for name, is_folder in visible if not is_folder and looks_like_image(name)]
    return files, [folder / name for name, is_folder in visible if is_folder]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def looks_like_image(name: str) -> bool:
    """Return True for the name of a visible file with an extension of a format that `read_image` reads."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions() -> set[str]:
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | HEIF_EXTENSIONS


def read_image(path: str | Path) -> Image.Image:
    """Read the first frame of an image as RGB, upright.

    The EXIF orientation is applied, transparency becomes white, and 16 bits are scaled to 8; see `to_rgb`.

    Raises:
        ValueError: if the file is missing, special, empty, damaged or not an image, if it is HEIC and pillow-heif is
            not installed, or if the image is smaller than `MIN_SIDE` or larger than Pillow's limit.
    """
    path = Path(path)
    try:
        special = _SPECIAL_FILES.get(stat.S_IFMT(path.stat().st_mode))  # before opening: a pipe would wait for ever
        if special:
            raise _Refused(f"is {special}, not an image file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open(path) as file:
                image = to_rgb(file)
                image = _upright(image, _orientation(file))  # now, as Pillow has turned a TIFF while it was loaded
        if min(image.size) < MIN_SIDE:
            size = f"{image.width} x {image.height}"
            raise _Refused(f"has {size} pixels; the minimum is {MIN_SIDE} x {MIN_SIDE}")
    except Exception as error:  # Pillow's decoders raise many kinds of errors for a damaged file
        raise ValueError(f"image: {printable(str(path), NAME_LIMIT)} {_reason(error, path)}") from None
    return image


class _Refused(ValueError):
    """An error whose text completes the name of the file."""


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more than {Image.MAX_IMAGE_PIXELS // 1_000_000} million pixels; scale it down"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "is empty" if path.stat().st_size == 0 else "is not an image that Pillow can read"
    if "MAX_TEXT" in str(error):
        return f"has more than {PngImagePlugin.MAX_TEXT_MEMORY // 2**20} MB of metadata; save it without"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return f"cannot be read: {printable(text.removeprefix('image: ') or type(error).__name__, NAME_LIMIT)}"


def _open(path: Path) -> Image.Image:
    Image.init()
    try:
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        raise _Refused("is HEIC, which needs the package pillow-heif; pip install -e '.[heif]'") from None
    return Image.open(path, formats=["HEIF"])


def _orientation(file: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, or 1 if it has none that can be read."""
    if file.format == "HEIF":  # its decoder turns the image; the EXIF block may repeat the same turn
        return 1
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds of errors for a broken block
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # they still have the orientation
        image.info.pop(key, None)
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def resize_longest_side(
    image: Image.Image, side: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels; the other has at least 1."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * pixels)) for pixels in image.size], resampling)
