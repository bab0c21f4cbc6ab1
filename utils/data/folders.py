"""What lies in a folder: files that are meant, without what systems leave there, and what they hold by their names."""

from __future__ import annotations

import os
from pathlib import Path

from utils.data.archives import is_system
from utils.data.decode import IMAGE_SUFFIXES


def folders_in(folder: Path) -> list[Path]:
    """Folders directly in a folder, hidden ones left out."""
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name[0] not in "._"]


def files_in(folder: Path, *, deep: bool = True) -> list[Path]:
    """Files that are meant, links followed, in no order.

    Args:
        deep: also those of all folders below.

    Raises:
        ValueError: a folder that cannot be read, or one that is called like an image.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        misnamed = [name for name in folders if is_image(Path(name))]
        if misnamed:
            raise ValueError(f"{Path(place) / misnamed[0]} is a folder called like an image; rename or remove it")
        # a folder that links to one above it would never end
        folders[:] = [f for f in folders if not Path(place).resolve().is_relative_to((Path(place) / f).resolve())]
        folders[:] = [f for f in folders if f[0] not in "._"] if deep else []
        found += [Path(place) / name for name in names if name[0] != "." and not is_system([name])]
    return found


def is_image(path: Path) -> bool:
    """Whether a file's name is that of a picture that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, whatever its name is."""
    if not path.is_file():  # a named pipe would wait for ever
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error
