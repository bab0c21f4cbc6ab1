from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_class_folders
from PIL import Image

from utils.data import decode
from utils.data.decode import LARGEST_PIXELS, decode_grey, read_header, to_uint8
from utils.data.raw_images import RawImages
from utils.data.sources import load_source

SIDE = 20


def _picture(seed: int = 0, high: int = 255, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high + 1, (SIDE, SIDE)).astype(dtype)


def _one(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    return decode_grey(path)


def _set(root: Path, pictures: dict) -> RawImages:
    """Load a set of two classes to which some images or arrays were added, by path."""
    write_class_folders(root)
    for name, picture in pictures.items():
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(root / name)
    return load_source(root)


def test_twelve_bits_in_sixteen_keep_their_contrast_and_are_comparable(tmp_path: Path) -> None:
    dark = np.arange(100, 100 + SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
    bright = (dark * 8).clip(max=3983)
    for name, pixels in (("AD/dark.png", dark), ("CN/bright.png", bright)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels).save(tmp_path / name)
    raw = load_source(tmp_path)
    expected = [np.rint((pixels - 100.0) / (3983 - 100) * 255) for pixels in (dark, bright)]
    assert np.array_equal(raw.pixels, np.array(expected, dtype=np.uint8))
    assert raw.info["intensity"] == {"bits": 16, "images": 2, "low": 100, "high": 3983}
    assert any("range of 100 to 3983" in note for note in raw.notes)


def test_one_file_alone_is_scaled_by_its_own_range_or_by_that_of_its_set(tmp_path: Path) -> None:
    pixels = _picture(high=4095, dtype=np.uint16)
    grey = _one(tmp_path / "a.png", Image.fromarray(pixels))
    low, high = float(pixels.min()), float(pixels.max())
    assert np.array_equal(grey, np.rint((pixels - low) / (high - low) * 255)) and len(np.unique(grey)) > 150
    assert np.array_equal(decode_grey(tmp_path / "a.png", intensity=(0, 65535)), np.rint(pixels / 257))


def test_sixteen_bits_beside_eight_are_said(tmp_path: Path) -> None:
    raw = _set(tmp_path, {"Mild_Demented/deep.png": _picture(high=3000, dtype=np.uint16)})
    assert raw.info["intensity"]["images"] == 1
    assert any("The other 6 images have 8 bits" in note for note in raw.notes)


def test_few_bright_pixels_that_take_the_contrast_are_said(tmp_path: Path) -> None:
    deep = {
        f"Mild_Demented/deep{seed}.png": np.random.default_rng(seed).integers(0, 4096, (24, 24)).astype(np.uint16)
        for seed in range(3)
    }
    even = _set(tmp_path / "even", deep)
    deep["Mild_Demented/deep0.png"][0, 0] = 65535
    marked = _set(tmp_path / "marked", deep)
    assert not any("lowest" in note for note in even.notes)
    assert any("99.9 % lie in the lowest 17 of the 256 grey levels" in note for note in marked.notes)


def test_scaling_without_a_range() -> None:
    assert (to_uint8(np.full((2, 2), 40000, np.uint16), (40000, 40000)) == 156).all()
    assert to_uint8(np.array([[0, 10, 20, 60000]], np.uint16), (10, 20)).tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_opaque_alpha_changes_nothing(tmp_path: Path, mode: str) -> None:
    pixels = _picture()
    image = Image.fromarray(pixels).convert(mode)
    raw = _set(tmp_path / "set", {"Mild_Demented/a.png": image})
    assert np.array_equal(_one(tmp_path / "a.png", image), pixels) and "transparent_images" not in raw.info


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_lie_on_black_and_are_counted(tmp_path: Path, mode: str) -> None:
    pixels, alpha = np.full((SIDE, SIDE), 200, np.uint8), np.full((SIDE, SIDE), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    image = Image.fromarray(pixels).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    grey = _one(tmp_path / "a.png", image)
    assert (grey[0] == 0).all() and (grey[1] == 40).all() and (grey[2:] == 200).all()
    raw = _set(tmp_path / "set", {"Mild_Demented/a.png": image})
    assert raw.info == {"transparent_images": 1} and any("1 images have transparent" in note for note in raw.notes)
    # a number of Python: the prepared file is read without executing code, and holds nothing else
    assert type(raw.info["transparent_images"]) is int


@pytest.mark.parametrize("transparency", [None, 2, bytes([255, 255, 0])])
def test_palettes(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, 90, 90, 90, 180, 180, 180])
    image.paste(2, (0, 0, SIDE, 5))
    options = {} if transparency is None else {"transparency": transparency}
    grey = _one(tmp_path / "a.png", image, **options)
    assert (grey[:5] == (180 if transparency is None else 0)).all() and (grey[5:] == 90).all()


def test_a_transparent_grey_level(tmp_path: Path) -> None:
    pixels = np.full((SIDE, SIDE), 70, np.uint8)
    pixels[0] = 9
    grey = _one(tmp_path / "a.png", Image.fromarray(pixels), transparency=9)
    assert (grey[0] == 0).all() and (grey[1:] == 70).all()
    deep = pixels.astype(np.uint16) * 10
    Image.fromarray(deep).save(tmp_path / "b.png", transparency=90)
    assert (decode_grey(tmp_path / "b.png", intensity=(0, 700))[0] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_span_the_whole_range(tmp_path: Path, bits: int) -> None:
    image = Image.fromarray((_picture() > 127).astype(np.uint8) * 255)
    if bits == 1:
        grey = _one(tmp_path / "a.png", image.convert("1"))
    else:
        image.putpalette([value for level in range(256) for value in [level] * 3])
        grey = _one(tmp_path / "a.png", Image.fromarray(_picture() > 127), bits=bits)
    assert np.array_equal(grey, (_picture() > 127) * np.uint8(255))


def test_colours_become_luma_and_are_counted(tmp_path: Path) -> None:
    image = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
    image.paste((255, 0, 0), (0, 0, 4, 4))
    grey = _one(tmp_path / "a.png", image)
    assert (grey[:4, :4] == 76).all() and grey[-1, -1] == 200
    raw = _set(tmp_path / "set", {"Mild_Demented/a.png": image})
    assert raw.info == {"colour_images": 1} and any("1 images have colours" in note for note in raw.notes)
    plain = _set(tmp_path / "plain", {"Mild_Demented/a.png": Image.fromarray(_picture()).convert("RGB")})
    assert plain.info == {}


@pytest.mark.parametrize(("ink", "grey"), [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 0, 0, 102), 153)])
def test_jpegs_for_print(tmp_path: Path, ink: tuple[int, ...], grey: int) -> None:
    found = _one(tmp_path / "a.jpg", Image.new("CMYK", (SIDE, SIDE), ink), quality=100)
    assert np.abs(found.astype(int) - grey).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, np.fliplr),
        (3, lambda stored: np.rot90(stored, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: np.rot90(stored, 2).T),
        (8, np.rot90),
    ],
)
def test_orientation(
    tmp_path: Path, suffix: str, orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    stored = np.zeros((24, 40), np.uint8)
    stored[:8, :16], stored[8:, :16] = 250, 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = _one(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=exif)
    expected = upright(stored)
    assert found.shape == expected.shape == read_header(tmp_path / f"a.{suffix}").shape
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_orientation_stored_behind_the_pixels_of_sixteen_bits(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (24, 40)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert read_header(tmp_path / "a.png").shape == (40, 24)
    low, high = stored.min(), stored.max()
    assert np.array_equal(decode_grey(tmp_path / "a.png"), to_uint8(np.rot90(stored, -1), (low, high)))


def test_turned_images_are_counted_and_keep_their_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("AD", "CN"):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture = Image.fromarray(np.full((24, 40), 50 + 20 * number + len(name) * (name == "AD"), np.uint8))
            picture.save(tmp_path / name / f"{number}.jpg", exif=exif)
    raw = load_source(tmp_path)
    assert raw.pixels.shape == (4, 40, 24) and raw.info == {"turned_images": 4}
    assert any("4 images were turned" in note for note in raw.notes)


def test_the_first_of_several_frames_is_taken_and_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((24, 24), level, np.uint8)) for level in (30, 60, 90)]
    write_class_folders(tmp_path)
    frames[0].save(tmp_path / "Mild_Demented" / "a.png", save_all=True, append_images=frames[1:])
    raw = load_source(tmp_path)
    assert (raw.pixels[raw.paths.index("Mild_Demented/a.png")] == 30).all()
    assert raw.info == {"multi_frame_images": 1} and any("several frames" in note for note in raw.notes)


def _png_header(width: int, height: int, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [4097, 9500, 13_000, 60_000])
def test_a_picture_too_large_is_refused_from_its_header(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "Mild_Demented" / "vast.png").write_bytes(_png_header(side, side))
    monkeypatch.setattr(decode, "decode", lambda path: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"Mild_Demented/vast\.png.*limit of {LARGEST_PIXELS:,}"):
        load_source(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="more"):
        decode_grey(tmp_path / "Mild_Demented" / "vast.png")


@pytest.mark.parametrize("size", [(1, 1), (15, 200), (200, 1)])
def test_a_picture_too_small_is_named(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"tiny\.png \({size[0]} x {size[1]} pixels.*fewer than 16"):
        _set(tmp_path, {"Mild_Demented/tiny.png": Image.new("L", size)})


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_sixteen_bits_a_channel_are_not_cut_to_eight_unseen(tmp_path: Path, colour: int) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "Mild_Demented" / "a.png").write_bytes(_png_header(20, 20, bits=16, colour=colour))
    with pytest.raises(ValueError, match=r"a\.png.*16 bits a channel"):
        load_source(tmp_path)


def test_pipes_sockets_and_devices_are_named_and_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_class_folders(tmp_path) / "Mild_Demented"
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    monkeypatch.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        with pytest.raises(ValueError, match=r"3 of 9 files.*device\.png.*pipe\.png.*socket\.png \(no plain file"):
            load_source(tmp_path)
    with pytest.raises(ValueError, match="no plain file"):
        decode_grey(folder / "pipe.png")


def test_a_folder_called_like_an_image_is_named(tmp_path: Path) -> None:
    (write_class_folders(tmp_path) / "Mild_Demented" / "x.PNG").mkdir()
    with pytest.raises(ValueError, match=r"x\.PNG is a folder"):
        load_source(tmp_path)


def test_more_than_the_memory_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path)
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(ValueError, match="6 images of 32x32 pixels need .* GiB.*--size 128"):
        load_source(tmp_path, size=32)


MEASURE = """
import resource, sys
from utils.data.sources import load_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
raw = load_source(sys.argv[1], size=32)
print(len(raw), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the peak is KiB on Linux")
def test_memory_is_that_of_the_stored_size_and_not_of_the_files(tmp_path: Path) -> None:
    for label, name in enumerate(("AD", "CN")):
        (tmp_path / name).mkdir()
        for number in range(60):
            image = Image.new("L", (1024, 1024), number + 100 * label)
            image.save(tmp_path / name / f"{number}.png", compress_level=1)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    count, peak = map(int, output.split())
    assert count == 120 and peak < 60 * 1024  # KiB; the files' pixels are 120 MiB


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".bmp", ".webp", ".png"])
def test_the_same_slice_reads_alike_from_every_format_that_loses_nothing(tmp_path: Path, suffix: str) -> None:
    pixels = _picture()
    options = {"lossless": True} if suffix == ".webp" else {}
    assert np.array_equal(_one(tmp_path / f"a{suffix}", Image.fromarray(pixels), **options), pixels)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_tiffs_keep_their_bits_in_either_byte_order(tmp_path: Path, order: str) -> None:
    pixels = _picture(high=4095, dtype=np.uint16)
    Image.fromarray(pixels.astype(order)).save(tmp_path / "deep.tif")
    assert np.array_equal(decode_grey(tmp_path / "deep.tif", intensity=(0, 65535)), np.rint(pixels / 257))


def _tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A little-endian TIFF of uint16 pixels H x W x C, uncompressed: 0 white is zero, 1 black is zero, 2 colour."""
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    bits = 16 if channels == 1 else 8 + len(data)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height)]
    entries += [(279, 4, 1, len(data))]
    after = struct.pack(f"<{channels}H", *[16] * channels)
    folder = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(after)) + data + after + folder


def test_a_deep_tiff_whose_white_is_zero_is_no_negative(tmp_path: Path) -> None:
    pixels = _picture(high=4095, dtype=np.uint16)
    (tmp_path / "black.tif").write_bytes(_tiff(pixels[..., None], 1))
    (tmp_path / "white.tif").write_bytes(_tiff(65535 - pixels[..., None], 0))
    found = [decode_grey(tmp_path / name, intensity=(0, 4095)) for name in ("black.tif", "white.tif")]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], np.rint(pixels / 4095 * 255))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_tiff_of_sixteen_bits_a_channel_is_not_cut_to_eight_unseen(tmp_path: Path, channels: int) -> None:
    pixels = np.repeat(_picture(high=1023, dtype=np.uint16)[..., None], channels, axis=2)
    (tmp_path / "deep.tif").write_bytes(_tiff(pixels, 2))
    for read in (decode_grey, read_header):
        with pytest.raises(ValueError, match="16 bits a channel, not plain grey; save it as"):
            read(tmp_path / "deep.tif")


@pytest.mark.parametrize("white", [1, 15, 63])
def test_eight_bits_that_are_nearly_black_are_said(tmp_path: Path, white: int) -> None:
    for number, folder in enumerate(("AD", "CN")):
        (tmp_path / folder).mkdir()
        Image.fromarray(_picture(number, high=white)).save(tmp_path / folder / "a.png")
    assert any(f"lowest {white + 1} of the 256 grey levels" in note for note in load_source(tmp_path).notes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((24, 24), 0.5, np.float32), "fractions, whose range is not known"),
        (np.full((24, 24), 70_000, np.int32), "70000 do not fit 16 bits"),
        (np.full((24, 24), -5, np.int32), "-5 to -5 do not fit 16 bits"),
    ],
)
def test_tiffs_whose_values_have_no_place_in_sixteen_bits_are_refused(tmp_path: Path, values, said: str) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=said):
        decode_grey(tmp_path / "odd.tif")


def test_a_tiff_of_several_pages_is_noticed(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(_picture()) for _ in range(3))
    (tmp_path / "Mild_Demented").mkdir(parents=True)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    assert read_header(tmp_path / "stack.tif").frames == 3


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(b"RIFF\x10\x00\x00\x00WEBPnothing more")
    with pytest.raises((OSError, ValueError)):
        decode_grey(tmp_path / "a.webp")
