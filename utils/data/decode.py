"""Decode pictures to grey uint8 with the values that they mean, one file or a whole set."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from tqdm.auto import tqdm

from utils.data.class_traces import Traits

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")

#: Pixels of the largest picture that is decoded. Slices have fewer than 1024 a side; a small file may claim billions.
LARGEST_PIXELS = 4096 * 4096
#: Bytes of the largest file that is decoded: 16 bits and an alpha channel for every pixel, uncompressed.
LARGEST_FILE = 8 * LARGEST_PIXELS
#: Shortest side in pixels: on less there is no brain to see.
SMALLEST_SIDE = 16

# JPEG rounds the colours of a grey picture by a few levels
_COLOUR_TOLERANCE = 8
_TURNED = range(2, 9)
# a PNG may store its orientation behind its pixels
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"adobe.xmp")
#: Where nearly all pixels are darker than this grey level, hardly any contrast is left.
_DARK = 64
_WORKERS = 4
_BLOCK = 1024

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Header:
    """What a file says of its picture: height and width when upright, 16 bits or 8, turned by EXIF, frames."""

    shape: tuple[int, int]
    deep: bool
    turned: bool
    frames: int


@dataclass(frozen=True)
class Picture:
    """A decoded picture: grey H x W, uint8 or uint16; whether it had colours, and transparent pixels."""

    pixels: np.ndarray
    coloured: bool
    transparent: bool


@dataclass
class Decoded:
    """A decoded set.

    Attributes:
        pixels: uint8 array N x H x W, grey, 0..255.
        notes: what a reader should know of it, one sentence each.
        info: the same as plain values; only what occurs.
        traits: how each image was saved.
    """

    pixels: np.ndarray
    notes: list[str]
    info: dict
    traits: list[Traits] = field(default_factory=list)


def decode_grey(path: Path, *, intensity: tuple[int, int] | None = None) -> np.ndarray:
    """One picture as an upright uint8 H x W array, 0..255.

    Colour becomes luma, transparent pixels lie on black. Of several frames the first is taken.

    Args:
        path: a JPEG, PNG, TIFF, BMP or WebP file.
        intensity: the lowest and highest value of the set that a 16-bit picture belongs to, which
            become 0 and 255; None takes those of the picture itself.

    Raises:
        OSError, ValueError: no complete picture of these formats, no plain file, too large or too small.
    """
    return decode_slice(path, intensity=intensity).pixels


def decode_slice(path: Path, *, intensity: tuple[int, int] | None = None) -> Picture:
    """As :func:`decode_grey`, with what was seen of colours and transparency; ``pixels`` are uint8."""
    with _bombs_raise():
        picture = decode(path)
    pixels = to_uint8(picture.pixels, intensity or _range(picture.pixels))
    return Picture(pixels, picture.coloured, picture.transparent)


def to_uint8(pixels: np.ndarray, intensity: tuple[int, int]) -> np.ndarray:
    """Scale uint16 ``intensity`` (lowest, highest) to 0..255; uint8 stays as it is.

    Where lowest and highest are equal there is no range to scale by: then 65535 becomes 255.
    """
    if pixels.dtype == np.uint8:
        return pixels
    low, high = intensity if intensity[0] < intensity[1] else (0, 65535)
    return np.rint((np.clip(pixels, low, high) - float(low)) * (255 / (high - low))).astype(np.uint8)


def read_header(path: Path) -> Header:
    """What a picture is, without decoding it.

    Raises:
        OSError, ValueError: see :func:`decode_grey`.
    """
    with _open(path) as image:
        orientation = 1
        if image.format != "PNG":
            orientation = _orientation(image)
        elif any(mark in path.read_bytes() for mark in _PNG_ORIENTATION):
            image.load()
            orientation = _orientation(image)
        width, height = image.size if orientation < 5 else image.size[::-1]
        frames = getattr(image, "n_frames", 1)
        return Header((height, width), image.mode.startswith("I"), orientation in _TURNED, frames)


def decode(path: Path) -> Picture:
    """Decode one picture; 16 bits stay 16 bits.

    Raises:
        OSError, ValueError: see :func:`decode_grey`.
    """
    with _open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image) if _orientation(image) in _TURNED else image
        if not image.mode.startswith("I"):
            return _picture(upright)
        # the library turns white-is-zero around for 8 bits alone
        negative = _tiff(image, PHOTOMETRIC_INTERPRETATION, 1) == 0
        return _deep_picture(upright, negative=negative)


def _tiff(image: Image.Image, tag: int, other: Any) -> Any:
    """What a TIFF says of itself; ``other`` where it says nothing, and of other formats."""
    return getattr(image, "tag_v2", {}).get(tag, other)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet, checked for what can be known before."""
    _check_file(path)
    try:
        image = Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"more pixels than the limit of {LARGEST_PIXELS:,}") from error
    with image:
        width, height = image.size
        if width * height > LARGEST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than the limit of {LARGEST_PIXELS:,}")
        if min(width, height) < SMALLEST_SIDE:
            raise ValueError(f"{width} x {height} pixels, but no side may have fewer than {SMALLEST_SIDE}")
        bits = max(_tiff(image, BITSPERSAMPLE, (1,)))
        if bits > 8 and not image.mode.startswith(("I", "F")):
            raise ValueError(
                f"a TIFF with {bits} bits a channel, not plain grey; save it as 16-bit grey or with 8 bits"
            )
        if image.mode == "F":
            raise ValueError("pixels are fractions, whose range is not known; save it as 16-bit grey or with 8 bits")
        yield image


def _check_file(path: Path) -> None:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("no plain file but a folder, pipe, socket or device")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"the name ends in none of {' '.join(IMAGE_SUFFIXES)}")
    if facts.st_size > LARGEST_FILE:
        raise ValueError(f"{facts.st_size:,} bytes, more than the limit of {LARGEST_FILE:,}")
    with path.open("rb") as file:
        start = file.read(26)
    # bit depth and colour type of a PNG; the library would drop the low eight bits unseen
    if start.startswith(b"\x89PNG") and start[24:25] == b"\x10" and start[25:26] != b"\x00":
        raise ValueError("a PNG with 16 bits a channel that is not plain grey; save it as 16-bit grey or with 8 bits")


@contextmanager
def _bombs_raise() -> Iterator[None]:
    """PIL only warns of pictures between one and two times its own limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _deep_picture(image: Image.Image, *, negative: bool = False) -> Picture:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"pixels from {values.min()} to {values.max()} do not fit 16 bits; save it as 16-bit grey")
    pixels = 65535 - values.astype(np.uint16) if negative else values.astype(np.uint16)
    hidden = pixels == image.info.get("transparency", -1)
    pixels[hidden] = 0
    return Picture(pixels, coloured=False, transparent=bool(hidden.any()))


def _picture(image: Image.Image) -> Picture:
    transparent = False
    if image.has_transparency_data:
        image, transparent = _on_black(image)
    coloured = image.mode not in ("1", "L") and _is_coloured(image)
    return Picture(np.asarray(image.convert("L")), coloured, transparent)


def _on_black(image: Image.Image) -> tuple[Image.Image, bool]:
    full = image.convert("RGBA")
    alpha = full.getchannel("A")
    return Image.composite(full.convert("RGB"), Image.new("RGB", full.size), alpha), bool(np.asarray(alpha).min() < 255)


def _is_coloured(image: Image.Image) -> bool:
    red, green, blue = image.convert("RGB").split()
    return any(
        np.asarray(ImageChops.difference(one, other)).max() > _COLOUR_TOLERANCE
        for one, other in ((red, green), (green, blue), (red, blue))
    )


def decode_all(folder: Path, paths: list[str], size: int | None) -> Decoded:
    """Decode a set into one array; no picture is held beside it but those being decoded.

    Args:
        folder: where the paths start.
        paths: N paths of image files below ``folder``.
        size: side of the squares that all are fitted into; None takes the most common size.

    Raises:
        ValueError: a file that cannot be read, with its name, or more memory needed than there is.
    """
    with _bombs_raise():
        headers = _each(folder, paths, lambda _, path: read_header(path), "look at")
        shape = (size, size) if size else Counter(header.shape for header in headers).most_common(1)[0][0]
        _check_memory(len(paths), shape)
        deep = [path for path, header in zip(paths, headers) if header.deep]
        intensity = _common_range(folder, deep, of=len(paths)) if deep else (0, 255)
        pixels = np.empty((len(paths), *shape), dtype=np.uint8)

        def fill(index: int, path: Path) -> tuple[bool, bool]:
            picture = decode(path)
            pixels[index] = fit_into(to_uint8(picture.pixels, intensity), shape)
            return picture.coloured, picture.transparent

        seen = _each(folder, paths, fill, "decode")
    decoded = Decoded(pixels, [], {}, [_traits(path, header) for path, header in zip(paths, headers)])
    _note_sizes(decoded, headers, shape)
    _note_intensity(decoded, headers, intensity)
    _note_colours(decoded, sum(coloured for coloured, _ in seen), sum(hidden for _, hidden in seen))
    _note_turns(decoded, headers)
    return decoded


def _traits(path: str, header: Header) -> Traits:
    height, width = header.shape
    suffix = Path(path).suffix.lower().removeprefix(".").replace("jpeg", "jpg").replace("tiff", "tif")
    return Traits(f"{width} x {height} pixels", f"{16 if header.deep else 8} bits", suffix.upper())


def _each(
    folder: Path, paths: list[str], work: Callable[[int, Path], _Found], verb: str, *, of: int = 0
) -> list[_Found]:
    """Results for all files, by a few threads; PIL releases the interpreter lock while it works. ``of``: in the set."""
    bad: list[str] = []

    def one(index: int) -> _Found | None:
        try:
            return work(index, folder / paths[index])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{paths[index]} ({error})")
            return None

    found: list[_Found] = []
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool, tqdm(total=len(paths), desc=verb, leave=False) as progress:
        # a block at a time, for a million waiting tasks would take more memory than their pictures
        for start in range(0, len(paths), _BLOCK):
            read = pool.map(one, range(start, min(start + _BLOCK, len(paths))))
            found += [entry for entry in read if entry is not None]
            progress.update(len(found) - progress.n)
    if bad:
        shown = "; ".join(sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {of or len(paths)} files under {folder} are not readable JPEG, PNG, TIFF, BMP or WebP "
            f"images: {shown}. Replace or remove them, then run this again."
        )
    return found


def _common_range(folder: Path, paths: list[str], *, of: int) -> tuple[int, int]:
    ranges = _each(folder, paths, lambda _, path: _range(decode(path).pixels), "measure", of=of)
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _range(pixels: np.ndarray) -> tuple[int, int]:
    return int(pixels.min()), int(pixels.max())


def _check_memory(count: int, shape: tuple[int, int]) -> None:
    needed = count * shape[0] * shape[1]
    if not hasattr(os, "sysconf"):  # Windows
        return
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ValueError(
            f"{count:,} images of {shape[0]}x{shape[1]} pixels need {needed / 2**30:.1f} GiB, and this machine "
            f"has {present / 2**30:.1f}. Store them smaller, for example with --size 128."
        )


def _note_sizes(decoded: Decoded, headers: list[Header], shape: tuple[int, int]) -> None:
    sizes = len({header.shape for header in headers})
    if sizes > 1:
        decoded.notes.append(f"{sizes} image sizes were found; all were fitted into {shape[0]}x{shape[1]}.")


def _note_intensity(decoded: Decoded, headers: list[Header], intensity: tuple[int, int]) -> None:
    deep = np.array([header.deep for header in headers])
    if not deep.all() and (top := _common_top(decoded.pixels, ~deep)) < _DARK:
        decoded.notes.append(
            f"Of the 8-bit images' pixels 99.9 % lie in the lowest {top + 1} of the 256 grey levels; they were kept as "
            "they are, nearly black. If white is less than 255 in these files, scale them and prepare again."
        )
    if not deep.any():
        return
    low, high = intensity
    count = int(deep.sum())
    decoded.info["intensity"] = {"bits": 16, "images": count, "low": low, "high": high}
    decoded.notes.append(f"{count} images have 16 bits; their common range of {low} to {high} was scaled to 0 to 255.")
    if not deep.all():
        decoded.notes.append(
            f"The other {len(deep) - count} images have 8 bits and were kept: brightness cannot be compared "
            "between the two kinds, and a classifier may tell them apart by it."
        )
    if low < high and (top := _common_top(decoded.pixels, deep)) < _DARK:
        decoded.notes.append(
            f"Of the 16-bit images' pixels 99.9 % lie in the lowest {top + 1} of the 256 grey levels, since a few "
            f"reach {high}: clip those in the files and prepare again for more contrast."
        )


def _common_top(pixels: np.ndarray, chosen: np.ndarray) -> int:
    """The grey level that 99.9 % of the chosen images' pixels do not exceed."""
    counts = np.zeros(256, dtype=np.int64)
    for index in np.flatnonzero(chosen):
        counts += np.bincount(pixels[index].ravel(), minlength=256)
    return int(np.searchsorted(np.cumsum(counts), 0.999 * counts.sum()))


def _note_colours(decoded: Decoded, coloured: int, transparent: int) -> None:
    if coloured:
        decoded.info["colour_images"] = coloured
        decoded.notes.append(f"{coloured} images have colours; their luma was taken.")
    if transparent:
        decoded.info["transparent_images"] = transparent
        decoded.notes.append(f"{transparent} images have transparent pixels; they were laid on black.")


def _note_turns(decoded: Decoded, headers: list[Header]) -> None:
    turned = sum(header.turned for header in headers)
    if turned:
        decoded.info["turned_images"] = turned
        decoded.notes.append(f"{turned} images were turned or flipped as their EXIF orientation says.")
    several = sum(header.frames > 1 for header in headers)
    if several:
        decoded.info["multi_frame_images"] = several
        decoded.notes.append(f"{several} images have several frames; the first was taken.")


def fit_into(picture: np.ndarray, shape: tuple[int, int], *, stretch: bool = False) -> np.ndarray:
    """A uint8 picture H x W in another shape, with its aspect ratio and black borders, or stretched."""
    if picture.shape == shape:
        return picture
    scales = [wanted / own for wanted, own in zip(shape, picture.shape)]
    if not stretch:
        scales = [min(scales)] * 2
    height, width = (max(1, round(scale * side)) for scale, side in zip(scales, picture.shape))
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.zeros(shape, dtype=np.uint8)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return canvas
