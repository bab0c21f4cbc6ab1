"""A search on disk that several workers share and that no kill, full disk or left-over lock stops."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

#: Every entry of a journal begins so.
_ENTRY = b'{"op_code"'
WORKER = "worker"


class _HeldByTheSystem:
    """A lock that ends with its process, on every system; optuna's own ones are links or files that a kill leaves."""

    def __init__(self, journal: Path) -> None:
        self._lock = FileLock(f"{journal}.guard")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_journal(path: str | Path) -> JournalStorage:
    """The storage in a journal file, mended where a kill or a full disk left half an entry.

    Raises:
        IsADirectoryError: a folder has that name.
        ValueError: the file is not a journal; the message names it, and the line where that is known.
    """
    journal = Path(path).expanduser().resolve()
    if journal.is_dir():
        raise IsADirectoryError(f"{journal} is a folder; name a journal file in it")
    journal.parent.mkdir(parents=True, exist_ok=True)
    lock = _HeldByTheSystem(journal)
    lock.acquire()
    try:
        if journal.is_file():
            _mend(journal)
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))  # type: ignore[arg-type]
    except (AssertionError, KeyError) as error:  # what optuna raises at entries of a kind that it does not know
        raise ValueError(f"{journal} holds an entry that is none of a search; use another journal file") from error


def _mend(journal: Path) -> None:
    """Take half-written entries out, without moving a byte that another worker may be about to read."""
    content = journal.read_bytes()
    start, torn = 0, []
    with journal.open("r+b") as opened:
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not _is_entry(line):
                whole = _entry_at_the_end(line)
                if whole is None and (start + len(line) < len(content) or not _begins_an_entry(line)):
                    raise ValueError(
                        f"{journal}, line {number}: this is no entry of a search; use another journal file"
                    )
                torn.append(line if whole is None else line[:whole])
                if whole is None:
                    opened.truncate(start)
                else:
                    # somebody wrote on behind the half: blanks are nothing in JSON, and all places stay
                    opened.seek(start)
                    opened.write(b" " * whole)
            start += len(line)
    if torn:
        with journal.with_name(f"{journal.name}.torn").open("ab") as rest:
            rest.write(b"\n".join(torn) + b"\n")
        warnings.warn(
            f"{journal} had {len(torn)} half-written entries, of a killed process or a full disk; they are in "
            f"{journal.name}.torn and the search goes on without them",
            stacklevel=3,
        )


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
        return line.endswith(b"\n") and {"op_code", "worker_id"} <= entry.keys()
    except (ValueError, AttributeError):
        return False


def _begins_an_entry(line: bytes) -> bool:
    """Whether it is what a kill or a full disk leaves of one, and no line of somebody's other file."""
    if line.endswith(b"\n"):
        return False
    return line.startswith(_ENTRY) or _ENTRY.startswith(line) or not line.strip(b"\0")


def _entry_at_the_end(line: bytes) -> int | None:
    """Where a whole entry begins that was written behind half of another one."""
    place = line.rfind(_ENTRY)
    return place if place > 0 and _is_entry(line[place:]) else None


@contextmanager
def at_work(journal: str | Path | None, worker: int) -> Iterator[None]:
    """Inside, this process is worker number ``worker`` of a journal; ends with the process, however it ends.

    Raises:
        ValueError: another process has that number.
    """
    if journal is None:
        yield
        return
    lock = _of_worker(journal, worker)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"worker {worker} is at work on {journal} already; give this process another --worker"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _of_worker(journal: str | Path, worker: int) -> FileLock:
    return FileLock(f"{Path(journal).expanduser().resolve()}.worker{worker}")


def try_again(study: optuna.Study, journal: str | Path | None, worker: int) -> list[int]:
    """End the trials of workers that are dead, and queue again those whose parameters were given.

    Args:
        worker: of this process, which has just begun and so has no trial of its own.

    Returns:
        numbers of the trials that were ended.
    """
    dead = [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        if _is_dead(trial, journal, worker)
    ]
    for trial in dead:
        study.tell(trial.number, state=TrialState.FAIL)
        if "fixed_params" in trial.system_attrs:
            study.enqueue_trial(trial.system_attrs["fixed_params"])
    return [trial.number for trial in dead]


def _is_dead(trial: FrozenTrial, journal: str | Path | None, worker: int) -> bool:
    owner = trial.user_attrs.get(WORKER)
    if journal is None or owner == worker:
        return True
    # one that was killed before it could sign is dead if nobody else is at work
    others = [owner] if owner is not None else _workers_of(journal) - {worker}
    return not any(_holds(journal, other) for other in others)


def _workers_of(journal: str | Path) -> set[int]:
    place = Path(journal).expanduser().resolve()
    numbers = (file.name.rsplit("worker", 1)[1] for file in place.parent.glob(f"{place.name}.worker*"))
    return {int(number) for number in numbers if number.isdigit()}


def _holds(journal: str | Path, worker: int) -> bool:
    lock = _of_worker(journal, worker)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
