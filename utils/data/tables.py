"""Parquet tables of images, as the Hugging Face hub keeps them: written out as class folders and read like those."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from utils.data.archives import LARGEST_BYTES, PARQUET
from utils.data.classes import check_class_name
from utils.data.decode import IMAGE_SUFFIXES
from utils.data.extras import need

#: Parts of a hub's file names, such as ``train-00000-of-00001.parquet``, and the folder that says the same.
_SPLITS = {"train": "train", "validation": "val", "valid": "val", "test": "test"}
_ROWS = 256
_SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif", b"BM": ".bmp"}


def tables_in(place: Path) -> list[Path]:
    """A Parquet file itself, or those of a folder and all below it; none of a folder that holds images, too."""
    if place.is_file():
        return [place] if place.suffix.lower() == PARQUET else []
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return []
    return [path for path in files if path.suffix.lower() == PARQUET]


@contextmanager
def class_folders(place: Path) -> Iterator[Path]:
    """A folder of class folders with the images of the Parquet tables in ``place``; ``place`` where there are none.

    Names that the table tells of its images are kept, for they may name the patient.

    Raises:
        ModuleNotFoundError: pyarrow is not installed; the message says how.
        ValueError: a table without images or labels; the message names it and its columns.
    """
    tables = tables_in(place)
    if not tables:
        yield place
        return
    with TemporaryDirectory() as folder:
        left = LARGEST_BYTES
        for table in tables:
            left -= _write_images(table, Path(folder), left)
        yield Path(folder)


def _write_images(table: Path, folder: Path, left: int) -> int:
    """Write the images of a table, of at most ``left`` bytes, and return how many bytes they took."""
    parquet = need("pyarrow.parquet", f"{table} is a Parquet table, which is read")
    try:
        file = parquet.ParquetFile(table)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(f"{table} is not a readable Parquet table ({error}); get it again") from error
    image, label = _columns(table, file)
    names = _class_names(file, label)
    split = next((own for word, own in _SPLITS.items() if table.name.lower().startswith(word)), "")
    row = written = 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=[image, label]):
        rows = batch.to_pylist()
        taken = Counter(_told_name(own[image]) for own in rows)
        for own in rows:
            content, told = _bytes_of(own[image]), _told_name(own[image])
            value = own[label]
            if content is None or value is None:
                raise ValueError(f"{table}: row {row} has no {'image' if content is None else 'label'}")
            written += len(content)
            if written > left:
                raise ValueError(f"{table} holds more than {LARGEST_BYTES:,} bytes of images; give a part of it")
            target = (
                folder
                / split
                / _class_name(table, names, value)
                / (told if told and taken[told] == 1 else f"{table.stem}_{row:06d}")
            )
            if not target.suffix:
                target = target.with_name(target.name + _suffix(content))
            while target.exists():
                target = target.with_name(f"{table.stem}_{row:06d}_{target.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            row += 1
    return written


def _class_name(table: Path, names: list[str], value: Any) -> str:
    if names and isinstance(value, int) and not 0 <= value < len(names):
        raise ValueError(f"{table} has the label {value}, and tells the names of 0 to {len(names) - 1} only")
    return check_class_name(names[value] if names and isinstance(value, int) else str(value), str(table))


def _columns(table: Path, file: Any) -> tuple[str, str]:
    """Names of the column of images and of that of labels."""
    import pyarrow

    schema = file.schema_arrow
    images = [
        field.name
        for field in schema
        if pyarrow.types.is_binary(field.type)
        or pyarrow.types.is_large_binary(field.type)
        or (pyarrow.types.is_struct(field.type) and "bytes" in [own.name for own in field.type])
    ]
    labels = [
        field.name
        for field in schema
        if field.name.lower() in ("label", "labels", "class", "diagnosis", "group")
        and (pyarrow.types.is_integer(field.type) or pyarrow.types.is_string(field.type))
    ]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{table} must have one column of image bytes and one column label, and has {found}; write its images into "
            "one folder a class and give their parent"
        )
    return images[0], labels[0]


def _class_names(file: Any, label: str) -> list[str]:
    """What the hub's numbers stand for; nothing where the table does not tell."""
    told = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = told.get("info", {}).get("features", {}).get(label, {}).get("names", [])
    return [str(name) for name in names] if isinstance(names, list) else []


def _bytes_of(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


def _told_name(value: Any) -> str:
    """The name that a row tells of its image, without folders; "" where it tells none."""
    told = value.get("path") if isinstance(value, dict) else None
    name = PurePosixPath(str(told or "").replace("\\", "/")).name
    return "" if name.startswith((".", "_")) else name


def _suffix(content: bytes) -> str:
    return next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), ".webp")
