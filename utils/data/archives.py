"""Find a source and unpack it safely: folders, archives and Kaggle handles alike."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

#: A table of images, which is read as it is.
PARQUET = ".parquet"
#: Files that are a source by themselves, and no archives.
TABLES = (PARQUET, ".csv", ".tsv")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")

#: Images are compressed already: an archive of them unpacks to 1 to 10 times its size, a bomb to 1,000 times.
LARGEST_RATIO = 100
#: Bytes that every archive may unpack to, whatever its ratio: they do no harm.
HARMLESS_BYTES = 64 * 2**20
#: Bytes that no archive may unpack to: 80,000 uncompressed slices of 248 x 496 are 10 GB.
LARGEST_BYTES = 32 * 2**30
#: The largest public sets have some 100,000 slices; more members would fill the memory before anything is read.
LARGEST_COUNT = 500_000

_SYSTEM_FILES = {".ds_store", "thumbs.db", "desktop.ini"}
_SYSTEM_FOLDER = "__macosx"
_CHUNK = 2**20
_OPENERS: dict[bytes, Any] = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
_TAR_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "named pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
_ZIP_KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class DataSource:
    """What is publicly known of a data set: where to get it and what must be in it."""

    title: str
    kaggle: str
    n_images: int
    class_counts: dict[str, int]
    n_subjects: int
    n_synthetic: int
    n_duplicates: int


#: Words for drawn heads, and their contrast.
PHANTOMS = {"phantom": "T1", "phantom-t2": "T2"}

#: Data sets known by name. Counts are of the images as published.
DATA_SOURCES = {
    "alzheimer_mri": DataSource(
        title="Alzheimer MRI Preprocessed Dataset",
        kaggle="sachinkumar413/alzheimer-mri-dataset",
        n_images=6400,
        class_counts={"Non": 3200, "VeryMild": 2240, "Mild": 896, "Moderate": 64},
        n_subjects=200,
        n_synthetic=0,
        n_duplicates=0,
    ),
    "best_alzheimer_mri": DataSource(
        title="Best Alzheimer MRI Dataset",
        kaggle="lukechugh/best-alzheimer-mri-dataset-99-accuracy",
        n_images=11519,
        class_counts={"Non": 3200, "VeryMild": 3008, "Mild": 2739, "Moderate": 2572},
        n_subjects=200,
        n_synthetic=4937,
        n_duplicates=182,
    ),
}


def kaggle_handle(source: str) -> str:
    """The Kaggle handle that a source means which is no path here.

    Raises:
        FileNotFoundError: it means none.
    """
    name = "best_alzheimer_mri" if source == "kaggle" else source
    handle = DATA_SOURCES[name].kaggle if name in DATA_SOURCES else name.removeprefix("kaggle:")
    mistyped = (
        "/" in source
        and not source.startswith("kaggle:")
        and Path(source).parts[:1]
        and Path(Path(source).parts[0]).exists()
    )
    if mistyped or not re.fullmatch(r"[\w-]+/[\w-]+", handle):
        raise FileNotFoundError(
            f"{str(source) or repr(source)} is neither a folder, an archive, a Kaggle handle (owner/data-set), nor a "
            f"word for one: {', '.join(sorted(DATA_SOURCES))} and kaggle download a public set. Check the spelling, or "
            "give the word phantom instead, to try everything without data."
        )
    return handle


def check_source(source: str | Path) -> None:
    """Raise FileNotFoundError, without reading or downloading anything, if ``source`` can mean nothing."""
    if str(source) not in PHANTOMS and not Path(source).expanduser().exists():
        kaggle_handle(str(source))


@contextmanager
def as_folder(source: str | Path) -> Iterator[tuple[Path, int]]:
    """The folder of a source, or its Parquet file, and how many system files of its archive were not unpacked.

    Raises:
        FileNotFoundError: no such folder, file or data set.
        ValueError: see :func:`unpack`.
    """
    path = Path(source).expanduser()
    if (str(source) and path.is_dir()) or (path.is_file() and path.suffix.lower() in TABLES):
        yield path, 0
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="mri_") as target:
            ignored = unpack(path, Path(target))
            yield Path(target), ignored
    else:
        yield _download(str(source)), 0


def _download(source: str) -> Path:
    handle = kaggle_handle(source)
    import kagglehub

    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is not a path here, and Kaggle did not deliver it ({error}). Download "
            f"https://www.kaggle.com/datasets/{handle} in a browser and give the path of the "
            "archive or folder as --source."
        ) from error


def unpack(archive: Path, target: Path) -> int:
    """Unpack the plain files and folders of an archive into the new or empty folder ``target``.

    Every member is looked at before anything is written, so a refused archive leaves ``target``
    empty. Not more is decompressed than the limits of this module allow.

    Returns:
        how many system files (``__MACOSX/``, ``.DS_Store``, ``Thumbs.db``, ``desktop.ini``) were passed over.

    Raises:
        ValueError: no archive of a known kind, damaged, encrypted, too large, or with a member that
            is a link, a device or a pipe, lies outside the archive, or would overwrite another.
    """
    if not archive.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{archive} is not a folder nor one of {', '.join(ARCHIVE_SUFFIXES)}")
    target.mkdir(exist_ok=True)
    limit = largest_unpacked(archive, target)
    try:
        if archive.name.lower().endswith(".zip"):
            return _unpack_zip(archive, target, limit)
        return _unpack_tar(archive, target, limit)
    except (_UnsafeArchive, tarfile.FilterError) as error:
        raise ValueError(
            f"{archive} is not safe to unpack: {error}. Get the archive from its original place again, "
            "or pack it anew with nothing but its images."
        ) from error
    except Exception as error:  # a damaged archive makes the decompressors raise almost anything
        raise ValueError(
            f"{archive} could not be unpacked: {error}. Get it again, or unpack it yourself and give the folder."
        ) from error


def largest_unpacked(archive: Path, target: Path) -> int:
    """Bytes that an archive may unpack to, by its size and by what is free where it goes."""
    harmless = max(HARMLESS_BYTES, LARGEST_RATIO * archive.stat().st_size)
    return min(LARGEST_BYTES, harmless, shutil.disk_usage(target).free)


class _UnsafeArchive(Exception):
    pass


@dataclass(frozen=True)
class _Member:
    """One entry of an archive: its name as stored, what it is, its bytes, and what the library calls it."""

    name: str
    kind: str
    size: int
    item: zipfile.ZipInfo | tarfile.TarInfo

    @property
    def parts(self) -> list[str]:
        return [part for part in self.name.replace("\\", "/").split("/") if part not in ("", ".")]

    @property
    def place(self) -> tuple[str, ...]:
        """Where it would lie on a system that ignores case, accents' form and trailing dots."""
        return tuple(unicodedata.normalize("NFC", part).casefold().rstrip(". ") for part in self.parts)


def _look_at(members: Iterable[_Member], limit: int) -> tuple[list[_Member], int]:
    """The members to unpack, and the number of system files; every member is checked first."""
    looked_at, total = [], 0
    for member in members:
        _check_member(member)
        total += member.size
        if total > limit:
            raise _UnsafeArchive(_too_large(limit))
        looked_at.append(member)
        if len(looked_at) > LARGEST_COUNT:
            raise _UnsafeArchive(f"it has more than {LARGEST_COUNT:,} members")
    _check_places(looked_at)
    wanted = [member for member in looked_at if not is_system(member.parts)]
    return wanted, sum(member.kind == "file" for member in looked_at) - sum(m.kind == "file" for m in wanted)


def is_system(parts: Iterable[str]) -> bool:
    """Whether a file of this path was left by an operating system and is nobody's data."""
    lower = [part.lower() for part in parts]
    name = lower[-1] if lower else ""
    return _SYSTEM_FOLDER in lower or name in _SYSTEM_FILES or name.startswith("._")


def _check_member(member: _Member) -> None:
    if member.kind not in ("file", "folder"):
        raise _UnsafeArchive(f"its member {member.name!r} is a {member.kind}, no plain file or folder")
    if member.size < 0:
        raise _UnsafeArchive(f"its member {member.name!r} has a negative size")
    raw = member.name.replace("\\", "/").split("/")
    climbs = any(part not in ("", ".") and not part.strip(". ") for part in raw)
    drive = ":" in raw[0] or any(re.match("[A-Za-z]:", part) for part in raw)
    if (raw[0] == "" and len(raw) > 1) or climbs or drive:
        raise _UnsafeArchive(f"its member {member.name!r} would land outside the target folder")
    if "\0" in member.name or (member.kind == "file" and not member.parts):
        raise _UnsafeArchive(f"its member {member.name!r} has a name that no file can have")


def _check_places(members: list[_Member]) -> None:
    """No file twice, and no file where a folder must be; systems differ in which of them would win."""
    files: dict[tuple[str, ...], str] = {}
    for member in members:
        if member.kind == "file" and files.setdefault(member.place, member.name) is not member.name:
            raise _UnsafeArchive(f"its members {files[member.place]!r} and {member.name!r} are the same file")
    for member in members:
        place = member.place
        own = len(place) + (member.kind == "folder")
        taken = next((files[place[:end]] for end in range(1, own) if place[:end] in files), None)
        if taken is not None:
            raise _UnsafeArchive(f"its member {taken!r} is a file, but {member.name!r} needs a folder there")


def _too_large(limit: int) -> str:
    return (
        f"it unpacks to more than {limit / 2**20:,.0f} MiB, the limit for its size and for the free disk space "
        f"(images grow less than {LARGEST_RATIO}-fold)"
    )


def _unpack_zip(archive: Path, target: Path, limit: int) -> int:
    with zipfile.ZipFile(archive) as opened:
        wanted, ignored = _look_at(map(_zip_member, opened.infolist()), limit)
        left = limit
        for member in wanted:
            place = target.joinpath(*member.parts)
            folder = place if member.kind == "folder" else place.parent
            folder.mkdir(parents=True, exist_ok=True)
            if member.kind == "file":
                left -= _write(opened, member, place, left)
    return ignored


def _zip_member(item: zipfile.ZipInfo) -> _Member:
    # the library cuts .filename at a NUL
    name = item.orig_filename
    if item.flag_bits & 1:
        raise ValueError(f"its member {name!r} is encrypted with a password")
    mode = stat.S_IFMT(item.external_attr >> 16)
    is_folder = name.endswith(("/", "\\")) or (mode == stat.S_IFDIR and not item.file_size)
    kind = "folder" if is_folder else "file"
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = _ZIP_KINDS.get(mode, "special file")
    return _Member(name, kind, item.file_size, item)


def _write(opened: zipfile.ZipFile, member: _Member, place: Path, left: int) -> int:
    """Write one file and return its bytes: those really read, for a header may lie."""
    written = 0
    with opened.open(cast(zipfile.ZipInfo, member.item)) as stream, place.open("xb") as file:
        while chunk := stream.read(_CHUNK):
            written += len(chunk)
            if written > min(left, member.size):
                raise _UnsafeArchive(f"its member {member.name!r} is larger than its header says")
            file.write(chunk)
    return written


def _unpack_tar(archive: Path, target: Path, limit: int) -> int:
    with (
        _decompressed(archive) as stream,
        tarfile.open(fileobj=cast(BinaryIO, _Bounded(stream, limit)), mode="r:") as opened,
    ):
        wanted, ignored = _look_at(map(_tar_member, opened), limit)
        _check_end(opened)
        opened.extractall(target, members=[cast(tarfile.TarInfo, member.item) for member in wanted], filter="data")
    return ignored


def _tar_member(item: tarfile.TarInfo) -> _Member:
    kind = "sparse file" if item.issparse() else _TAR_KINDS.get(item.type, "special file")
    return _Member(item.name, kind, item.size, item)


def _decompressed(archive: Path) -> BinaryIO:
    with archive.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), Path.open)
    return opener(archive, "rb")


class _Bounded:
    """A decompressed tar that is not decompressed beyond ``limit`` bytes, whatever its headers say."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream = stream
        self.limit = limit

    def tell(self) -> int:
        return self.stream.tell()

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.limit:
            raise _UnsafeArchive(_too_large(self.limit))
        return self.stream.seek(position)

    def read(self, size: int) -> bytes:
        # tarfile reads files by small pieces, but a header as a whole and into memory
        if not 0 <= size <= _CHUNK:
            raise _UnsafeArchive(f"one of its headers claims {size:,} bytes")
        if self.tell() > self.limit:
            raise _UnsafeArchive(_too_large(self.limit))
        return self.stream.read(size)


def _check_end(opened: tarfile.TarFile) -> None:
    """Tarfile takes a broken header for the end of the archive; the real end is all zeros."""
    opened.fileobj.seek(opened.offset)
    length = 0
    while chunk := opened.fileobj.read(_CHUNK):
        length += len(chunk)
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("it is damaged or cut short")
    if length < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is damaged or cut short")
