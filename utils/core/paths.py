"""Where things live, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RAW_DATASET = ROOT / "dataset" / "raw_dataset"
DATASET_VARIABLES = ROOT / "dataset" / "dataset_variables"
ASSETS = ROOT / "assets"
CHECKPOINTS = ROOT / "checkpoints"

Writer = Callable[[Path], Any]

#: This machine in the names of unfinished files: only here does a process number mean something.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
#: An unfinished file is named after its target, the machine and the process that writes it.
_UNFINISHED = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)\.[^.]+\.tmp")
#: A list of numbers as ``json`` indents it; a string has no line breaks, so none is taken for one.
_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\deE]+,?\s+)+)\]")
#: Seconds after which an unfinished file of another machine, or of an older version, is nobody's any more.
_ABANDONED = 24 * 3600.0


def atomic_write_all(writers: Mapping[Path, Writer]) -> None:
    """Write several files so that either all of them are replaced or none is touched.

    Every writer first fills a temporary file beside its target; only when all have succeeded
    are the targets replaced by renames, in the order given. What a killed process left half written in the
    same folders is removed.

    Args:
        writers: target path -> function that writes its content to the path it is given.

    Raises:
        OSError: a file could not be written (full disk, no permission). Earlier files are intact.
    """
    pending: list[tuple[Path, Path]] = []
    try:
        for target in writers:
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
        for target, write in writers.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(target.parent)
            prefix = f".{target.name}.{_HOST}-{os.getpid()}."
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".tmp")
            os.close(handle)
            pending.append((Path(name), target))
            write(Path(name))
        for temporary, target in pending:
            temporary.chmod(0o644)
            temporary.replace(target)
    except Exception as error:
        # torch and safetensors report a full disk as RuntimeError, so every kind is renamed here
        names = ", ".join(str(target) for target in writers)
        raise OSError(
            f"could not write {names}: {error}. Files that were there before are unchanged; "
            "free some disk space or choose another folder, then run this again."
        ) from error
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove files that :func:`atomic_write_all` was killed over; those of a process that still writes stay."""
    for path in Path(folder).glob(".*.tmp"):
        found = _UNFINISHED.fullmatch(path.name)
        if found and _is_abandoned(path, *found.groups()):
            with suppress(OSError):  # what cannot be removed is no reason not to write
                path.unlink()


def _is_abandoned(path: Path, host: str, process: str) -> bool:
    if host == _HOST and not psutil.pid_exists(int(process)):
        return True
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except FileNotFoundError:
        return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        FileNotFoundError: no such file.
    """
    with Path(path).open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(target: Path, write: Writer) -> None:
    """Write one file whole or not at all; see :func:`atomic_write_all`."""
    atomic_write_all({Path(target): write})


def check_writable(target: Path) -> None:
    """Make sure, before any long work, that a file can be written to ``target``.

    Raises:
        OSError: it is a folder, or its folder cannot be made or written to.
    """
    if Path(target).is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file")
    folder = Path(target).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"\0" * 4096)
            trial.flush()
    except OSError as error:
        raise OSError(f"{target} cannot be written ({error.strerror or error}); choose another place") from error


def check_folder(folder: Path) -> None:
    """As :func:`check_writable` for a folder that is yet to be made, and without making it.

    Raises:
        OSError: a file is in its way, or nothing may be written there.
    """
    place = next(own for own in (Path(folder).absolute(), *Path(folder).absolute().parents) if own.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made, for {place} is a file; choose another folder")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{folder} cannot be made, for nothing may be written to {place}; choose another folder")


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, atomically, a list of numbers on one line. NaN and infinity are refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    atomic_write(Path(target), lambda path: path.write_text(text, encoding="utf-8"))


def _no_number(name: str) -> None:
    """Refuse what Python's own reader takes, and :func:`write_json` never writes."""
    raise ValueError(f"{name} is no number")


def read_json(source: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder, or not JSON; the message names it.
    """
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder, where a file of that name belongs; move it away")
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(
            f"{source} is not readable JSON ({error}); restore it, or delete it and run what made it again"
        ) from error
