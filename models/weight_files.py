"""Weights from outside: read without executing code, and their names brought to those of a model here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

#: Keys under which training scripts store the weights, the first that is there counts.
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student", "state_dict_ema", "model_ema")
#: What wrappers such as DataParallel, torch.compile, Lightning or DINOv2's trainer write before each name.
PREFIXES = ("module", "model", "net", "backbone", "pretrained", "encoder", "teacher", "student")
#: Parts of training scripts and of other tasks that no classifier here has.
EXTRAS = ("mask_token", "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "depth_head.", "linear_head.")
_COUNTERS = ("n_averaged",)
LAYOUTS = (
    "a checkpoint of this project; a torchvision, timm or facebook DINOv2 state dict of this architecture, bare or in "
    f"{', '.join(WRAPPERS[:5])}, with prefixes such as module., _orig_mod., backbone., pretrained."
)


@dataclass(frozen=True)
class WeightsFile:
    """Named tensors of a file, and what it tells about their classes.

    Attributes:
        tensors: floating ones in float32.
        classes: class names in the order of the head's outputs; None where the file does not tell.
        beside: names of other sets of weights in the file, which were not taken.
    """

    tensors: dict[str, torch.Tensor]
    classes: list[str] | None = None
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """What :func:`models.weight_loading.load_weights` took from a file.

    Attributes:
        origin: path, or where else the weights came from.
        n_tensors: how many were loaded.
        left_out: names that were not, shortened to their first part where there are many.
        new: names of the model that keep their random start.
        head: ``kept`` or ``new``.
        remark: what is uncertain, or nothing.
    """

    origin: str
    n_tensors: int
    left_out: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    head: str = "new"
    remark: str = ""

    def __str__(self) -> str:
        parts = [f"{self.n_tensors} tensors from {self.origin}", f"head {self.head}"]
        parts += [f"left out: {listed(self.left_out)}"] if self.left_out else []
        parts += [f"new (random): {listed(self.new)}"] if self.new else []
        return "; ".join(parts) + (f". {self.remark}" if self.remark else "")


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weights_file(path: Path) -> WeightsFile:
    """Read a ``.safetensors`` or ``.pth``/``.pt`` file; no code in it is ever executed.

    Wrappers (``WRAPPERS``) around the state dict are opened. Class names come from the file or from the
    ``record.json`` beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of named tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist; use a path, 'pretrained' or 'scratch'")
    try:
        content, classes = _read_safetensors(path) if _is_safetensors(path) else (_read_pickle(path), None)
    except Exception as error:  # damaged files make torch raise almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in reason or "weights only" in reason.lower():  # torch advises to execute what the file says
            reason = "it is damaged, empty, or holds objects beside its tensors"
        raise ValueError(
            f"{path} holds no plain named tensors that could be read without executing code ({reason}); "
            "save model.state_dict() with torch.save or safetensors"
        ) from error
    state, told, beside = _unwrap(content, path)
    _check_tensors(state, path)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return WeightsFile(tensors, classes or told or _recorded_classes(path), beside)


def _check_tensors(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse what no layer here computes with.

    Raises:
        ValueError: a tensor without values, compressed, complex or quantised, or with NaN or infinite ones, or a
            variance below 0; the message names it.
    """
    for name, value in state.items():
        wrong = ""
        if value.is_meta:
            wrong = "has no values (it lies on the device meta)"
        elif value.layout != torch.strided or value.is_quantized or value.is_complex():
            kind = "quantised" if value.is_quantized else "complex" if value.is_complex() else "sparse"
            wrong = f"is {kind}; save plain numbers"
        elif value.is_floating_point() and not value.isfinite().all():
            wrong = "holds NaN or infinite values, as of a training that diverged"
        elif name.endswith("running_var") and len(value) and value.min() < 0:
            wrong = f"holds a variance of {float(value.min()):g}"
        if wrong:
            raise ValueError(f"{path}: {name} {wrong}")


def square_grid(positions: torch.Tensor) -> torch.Tensor:
    """Position embeddings 1 x (1 + N) x D of a vision transformer, as they are.

    Raises:
        ValueError: no class token before a square grid of N patches.
    """
    patches = positions.shape[1] - 1 if positions.ndim == 3 and len(positions) == 1 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"its pos_embed {tuple(positions.shape)} is no class token before a square grid of patches")
    return positions


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one, by its beginning: a length in eight bytes, then a JSON object."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    with safe_open(path, "pt") as opened:
        header = opened.metadata() or {}
    described = _parsed(header.get("model", ""))  # our own files tell them beside the architecture
    told = _parsed(header.get("classes", "")) or (described.get("classes") if isinstance(described, dict) else None)
    return load_file(path), _names(told)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # somebody else's words
        return None


def _read_pickle(path: Path) -> Any:
    # training scripts store their arguments beside the weights; a Namespace only holds values
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, "cpu", weights_only=True)


def _unwrap(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str] | None, list[str]]:
    """The state dict inside of wrappers, class names beside it, and names of other weights beside it."""
    classes, beside = None, []
    while isinstance(content, Mapping):
        classes = classes or _told_classes(content)
        inner = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        beside += inner[1:]
        content = content[inner[0]]
    plain = isinstance(content, Mapping) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not plain or not content:
        found = f"keys {listed(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} holds no plain named tensors ({found or 'nothing'}); known are: {LAYOUTS}")
    return {str(name): value for name, value in content.items()}, classes, beside


def _told_classes(content: Mapping[str, Any]) -> list[str] | None:
    index = content.get("class_to_idx")
    if isinstance(index, Mapping) and index and all(isinstance(place, int) for place in index.values()):
        return [str(name) for name in sorted(index, key=index.__getitem__)]
    back = content.get("idx_to_class")
    if isinstance(back, Mapping) and back and all(isinstance(place, int) for place in back):
        return [str(back[place]) for place in sorted(back)]
    return next(filter(None, (_names(content.get(key)) for key in ("classes", "class_names"))), None)


def _names(value: Any) -> list[str] | None:
    """``value`` where it is a list of words."""
    words = isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)
    return list(value) if words else None


def _recorded_classes(path: Path) -> list[str] | None:
    """Classes in a ``record.json`` beside the file."""
    try:
        record = json.loads((path.parent / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _names(record.get("classes")) if isinstance(record, dict) else None


def inner_names(tensors: Mapping[str, torch.Tensor], own: Collection[str], origin: str) -> dict[str, torch.Tensor]:
    """``tensors`` without what wrappers wrote before their names.

    Args:
        own: names of the model; none of these is shortened.

    Raises:
        ValueError: two names become one.
    """
    students = any("teacher" in name.split(".") for name in tensors)
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name in _COUNTERS or (students and "student" in name.split(".")):
            continue  # where both are stored, the teacher is the model
        short = _shortened(name, own)
        if short in found:
            raise ValueError(f"{origin} holds two tensors {short}; store the state dict of one model alone")
        found[short] = value
    return found


def _shortened(name: str, own: Collection[str]) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while ".".join(parts) not in own and len(parts) > 1 and parts[0] in PREFIXES:
        del parts[0]
    return ".".join(parts)
