"""Weights and the record of how they came about; both are read without executing code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file

from models.def_models import MRIClassifier
from models.weight_loading import load_exactly
from utils.core.paths import atomic_write, atomic_write_all, file_digest, remove_unfinished
from utils.core.processes import is_main
from utils.training.record import SCHEMA, ModelRecord, VoteRecord, read_record_file

WEIGHTS = "weights.safetensors"
RECORD = "record.json"
RESUME = Path("resume") / "state.pt"
#: Key of the record under which the SHA-256 of the weights file stands.
DIGEST = "weights_sha256"
#: What the state of an unfinished training holds beside its settings.
_STATE = ("progress", "model", "optimizer", "best", "average")

#: By process, too: notebook_launcher forks, and a lock is not inherited.
_LOCKS: dict[tuple[int, Path], FileLock] = {}


@contextmanager
def hold(folder: str | Path | None) -> Iterator[None]:
    """Inside, no other process trains into ``folder``; the system lets go of it when this process ends.

    Of several processes of one launch only the first holds it. A process may hold a folder several times.

    Raises:
        BlockingIOError: another process holds it.
    """
    if folder is None or not is_main():
        yield
        return
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the folder: nothing in it has to outlive a training
    lock = _LOCKS.setdefault((os.getpid(), folder), FileLock(folder.parent / f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another process is training into {folder}; wait until it ends, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(model: MRIClassifier, record: dict[str, Any], folder: Path) -> None:
    """Write ``weights.safetensors`` and ``record.json`` together, or neither.

    The record is put in place last and names the SHA-256 of the weights, so that :func:`load_checkpoint` notices a
    pair that a kill between the two has parted.

    A tensor that half precision holds exactly, as :func:`utils.training.loop.train` leaves those it trained, takes half
    the space; no other is changed.

    Args:
        record: plain values; architecture and classes are added here.
    """
    folder = Path(folder)
    state = {name: _storable(value) for name, value in model.state_dict().items()}
    record = {"schema_version": SCHEMA, "model": describe_model(model), **record}
    json.dumps(record, allow_nan=False)  # what cannot be written is refused before the weights are
    # one entry: safetensors writes several in an order that changes from run to run
    told = {"classes": record["classes"]} if "classes" in record else {}
    header = {"model": json.dumps({**record["model"], **told})}
    digest = {}

    def write_weights(path: Path) -> None:
        save_file(state, path, metadata=header)
        digest[DIGEST] = file_digest(path)

    def write_record(path: Path) -> None:
        path.write_text(json.dumps({**record, **digest}, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    atomic_write_all({folder / WEIGHTS: write_weights, folder / RECORD: write_record})


def _storable(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    exact = value.is_floating_point() and torch.equal(value.half().to(value.dtype), value)
    return value.half() if exact else value.clone()


def rounded_to_half(value: torch.Tensor) -> torch.Tensor:
    """``value`` as half precision holds it, in its own dtype; whole numbers and what overflows stay as they are."""
    half = value.half().to(value.dtype) if value.is_floating_point() else value
    return half if half.isfinite().all() else value


def describe_model(model: MRIClassifier) -> dict[str, Any]:
    """What must be equal for weights to fit."""
    return {
        "backbone": model.backbone_name,
        "num_classes": model.num_classes,
        "image_size": model.image_size,
    }


def load_checkpoint(
    folder: str | Path,
    *,
    backbone: str | None = None,
    classes: list[str] | None = None,
    fingerprint: str | None = None,
) -> tuple[MRIClassifier, ModelRecord]:
    """Rebuild a model from its folder, in eval mode on the CPU.

    Args:
        folder: holds ``weights.safetensors`` and ``record.json``; the path of the weights does too.
        backbone: if given, must be the model's key in ``BACKBONES``.
        classes: if given, must be those the model was trained on.
        fingerprint: if given, must be that of the data the model was trained on; a model tested
            on another split may have seen the test patients.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights, record, classes or data do not fit; the message says which.
    """
    record, weights = read_record(folder), checkpoint_folder(folder) / WEIGHTS
    if isinstance(record, VoteRecord):
        raise ValueError(f"{folder} holds the record of a vote; load its members instead")
    own = record.model
    if backbone is not None and own.backbone != backbone:
        raise ValueError(f"{folder} holds a model of backbone {own.backbone}, not {backbone}; set BACKBONE or the path")
    model = MRIClassifier(own.backbone, num_classes=own.num_classes, image_size=own.image_size)
    _check_header(weights, record)
    _check_digest(weights, record)
    load_exactly(model, weights)
    for what, told, wanted in (
        ("classes", record.classes or None, classes),
        ("data fingerprint", record.data.fingerprint if record.data else None, fingerprint),
    ):
        if wanted is not None and told != wanted:
            raise ValueError(
                f"{folder} was trained with {what} {told}, but the data here have {wanted}. Prepare the "
                "data with the same source, split and seed, or train this model again."
            )
    return model.eval(), record


def load_trainable(folder: str | Path, *, trainable: str | int = "all", **fits: Any) -> MRIClassifier:
    """The model of :func:`load_checkpoint`, ready to be trained further.

    Args:
        trainable: see :meth:`models.def_models.MRIClassifier.freeze`.
        fits: ``backbone``, ``classes`` and ``fingerprint`` of :func:`load_checkpoint`.
    """
    return load_checkpoint(folder, **fits)[0].freeze(trainable)


def checkpoint_folder(path: str | Path) -> Path:
    """The folder itself, also where the path of its weights is given."""
    path = Path(path).expanduser()
    return path.parent if path.name == WEIGHTS else path


def read_record(folder: str | Path) -> ModelRecord | VoteRecord:
    """The record of a checkpoint folder.

    Raises:
        FileNotFoundError: no checkpoint there; the message says how to make one.
        ValueError: the record is not one of ours.
    """
    path = checkpoint_folder(folder) / RECORD
    if Path(folder).is_file() and not path.is_file():
        raise FileNotFoundError(
            f"{folder} is a file of weights without a {RECORD}; make a model of it first: "
            f"python -m utils train --weights {folder}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no trained model in {folder} (no {RECORD}). Run the model's notebook with "
            "load_existing_params = False first, or python -m utils train."
        )
    return read_record_file(path)


def _check_header(weights: Path, record: ModelRecord) -> None:
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist; the folder's record.json does")
    try:
        with safe_open(weights, "pt") as opened:
            own = json.loads((opened.metadata() or {}).get("model", "null")) or {}
    except Exception as error:
        raise ValueError(f"{weights} is not a readable safetensors file ({error})") from error
    classes = own.pop("classes", record.classes)
    if own != record.model.plain() or classes != record.classes:
        described = {**record.model.plain(), "classes": record.classes}
        raise ValueError(
            f"{weights} holds {own | {'classes': classes}}, but its record.json describes {described}: one is of "
            "another training. Restore both, or train this model again."
        )


def is_trained(folder: str | Path) -> bool:
    """Whether a folder holds weights and the record that belongs to them."""
    return (checkpoint_folder(folder) / RECORD).is_file() and belong_together(folder)


def trained_before(folder: str | Path) -> bool:
    """Whether a folder holds a finished model; what a run that was killed at its very end left beside it is removed."""
    there = is_trained(folder)
    if there:
        clear_resume_state(Path(folder))
    return there


def belong_together(folder: str | Path) -> bool:
    """Whether the weights in a checkpoint folder are those that its record names; older records name none."""
    record, weights = read_record(folder), checkpoint_folder(folder) / WEIGHTS
    named = record.weights_sha256 if isinstance(record, ModelRecord) else None
    return named is None or (weights.is_file() and file_digest(weights) == named)


def _check_digest(weights: Path, record: ModelRecord) -> None:
    if record.weights_sha256 and file_digest(weights) != record.weights_sha256:
        raise ValueError(
            f"{weights} is not the file that the record beside it names (SHA-256 {record.weights_sha256[:12]}…): a run "
            "was stopped while it replaced the model, or one of the two files was changed. Start that training "
            "again, it finishes what it began; or put both files of one run back"
        )


def save_resume_state(state: dict[str, Any], folder: Path) -> None:
    """Write the state of an unfinished training run, atomically."""
    atomic_write(Path(folder) / RESUME, lambda path: torch.save(state, path))


def load_resume_state(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """State of an unfinished run with the same settings, or None where there is none.

    Raises:
        ValueError: the state is damaged or belongs to other settings; the message names the file.
    """
    path = Path(folder) / RESUME
    remove_unfinished(path.parent)
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own, _ = state["config"], [state[key] for key in _STATE]
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ValueError(f"{path} is not a readable training state ({error!r}); delete it to start over") from error
    changed = [key for key in config if own.get(key) != config[key]]
    if changed:
        raise ValueError(
            f"{path} is of an unfinished run with other settings ({', '.join(changed)}). Use the same "
            "settings to go on with it, or delete it to start over."
        )
    return state


def clear_resume_state(folder: Path) -> None:
    """Remove the state of a run that is finished, and what a killed process left half written."""
    shutil.rmtree((Path(folder) / RESUME).parent, ignore_errors=True)
