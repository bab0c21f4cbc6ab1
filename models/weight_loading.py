"""Weights of a file into a classifier: what fits is loaded, what does not is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from models.weight_files import EXTRAS, LAYOUTS, Loaded, WeightsFile, inner_names, listed, read_weights_file


class Classifier(Protocol):
    """What is asked of :class:`models.def_models.MRIClassifier` here."""

    backbone_name: str
    num_classes: int
    backbone: nn.Module

    @property
    def head_name(self) -> str:
        """Attribute path of the final classifier inside ``backbone``."""
        ...

    def adapt(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Foreign weights under the names of ``backbone``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As of any module."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """As of any module."""
        ...

    def get_buffer(self, target: str) -> torch.Tensor:
        """As of any module."""
        ...


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` or ``.pth``/``.pt`` file; no code in it is ever executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of named tensors.
    """
    return read_weights_file(path).tensors


def load_weights(model: Classifier, path: Path, *, classes: Sequence[str] | None = None) -> Loaded:
    """Load a classifier of this project, or a state dict of the same architecture from elsewhere.

    A head is kept where its shapes are the model's; another stays random, and the answer says so.

    Args:
        path: file, or folder of a checkpoint.
        classes: names in the order of the logits; None leaves the order of a kept head unchecked.

    Returns:
        what was loaded, left out and new.

    Raises:
        FileNotFoundError, ValueError: see :func:`models.weight_files.read_weights_file`; also where names, shapes or
            classes differ.
    """
    path = path / "weights.safetensors" if path.is_dir() else path
    file = read_weights_file(path)
    own = model.state_dict()
    names = {name.removeprefix("backbone.") for name in own}
    tensors = inner_names(file.tensors, names, str(path))
    # buffers of our own: the file is a whole classifier of this project
    whole = {"mean", "std"} <= set(tensors) - set(model.backbone.state_dict())
    if whole:
        _check_classes(file, classes, str(path))
        for name in ("mean", "std"):
            _load_buffer(model, name, tensors.pop(name), str(path))
    found = load_backbone(model, tensors, origin=str(path), told=file.classes, classes=classes, need_head=whole)
    if not file.beside:
        return found
    beside = f"The file also holds {listed(file.beside)}, which was not taken."
    return replace(found, remark=" ".join(filter(None, (found.remark, beside))))


def load_exactly(model: Classifier, path: Path) -> None:
    """Load a file that holds each tensor of the model under its own name, and no other.

    Raises:
        FileNotFoundError, ValueError: see :func:`models.weight_files.read_weights_file`; also where names or shapes
            differ.
    """
    try:
        model.load_state_dict(read_weights(path), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"{path} does not fit {model.backbone_name} with {model.num_classes} classes: {reason}"
        ) from error


def load_backbone(
    model: Classifier,
    state: Mapping[str, torch.Tensor],
    *,
    origin: str,
    told: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    keep_head: bool = True,
    need_head: bool = False,
) -> Loaded:
    """Load everything but the head, and the head where it fits; else it keeps its random weights.

    Args:
        state: names as in ``model.backbone``, or as its ``adapt`` knows them.
        origin: for messages.
        told: classes that the weights were trained on, None where that is unknown.
        classes: those that are wanted.
        keep_head: False leaves any head out.
        need_head: refuse weights without a head that fits.

    Returns:
        what was loaded, left out and new.

    Raises:
        ValueError: anything but the head is missing, unknown or of another shape, or the kept head is of other
            classes; the message names a few.
    """
    own = model.backbone.state_dict()
    fails = f"{origin} does not fit {model.backbone_name} with {model.num_classes} classes"
    try:
        adapted = model.adapt(dict(state))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{fails}: {error}") from error
    extras = [name for name in adapted if name not in own and name.startswith(EXTRAS)]
    within = model.head_name + "."
    head = {name: value for name, value in adapted.items() if name.startswith(within)}
    body = {name: value for name, value in adapted.items() if name not in head and name not in extras}
    _check_body(model, body, fails)
    own_head = {name: value for name, value in own.items() if name.startswith(within)}
    made = max(0, len(adapted) - len(state))
    # with other layers between, the same head would mean something else
    fitting = _fitting_head(head, own_head) if keep_head and not made else {}
    if need_head and not fitting:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in head.items()]
        raise ValueError(f"{fails}: its head is {listed(shapes) or 'missing'}; give weights of the same classes")
    if fitting:
        _check_classes(WeightsFile({}, list(told) if told else None), classes, origin)
    model.backbone.load_state_dict(body | fitting, strict=False)
    left = sorted({name.split(".")[0] for name in extras}) + ([] if fitting else list(head))
    remark = _remark(told, classes) if fitting else ""
    if made:
        remark = f"{made} tensors that the file does not hold begin without effect."
    kept = "kept" if fitting else "new"
    return Loaded(origin, len(body | fitting) - made, left, [] if fitting else list(own_head), kept, remark)


def _check_body(model: Classifier, body: Mapping[str, torch.Tensor], fails: str) -> None:
    """Raise ValueError if a tensor outside the head is missing, unknown or of another shape."""
    head = model.head_name + "."
    own = {name: value for name, value in model.backbone.state_dict().items() if not name.startswith(head)}
    # files of before 2018 do not count batches, and torch starts the count itself
    missing = [name for name in own if name not in body and not name.endswith("num_batches_tracked")]
    unknown = [name for name in body if name not in own]
    other = [
        f"{name} {tuple(body[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in body and body[name].shape != value.shape
    ]
    floats = {name for name, value in own.items() if value.is_floating_point()}
    whole = sorted(name for name in floats & set(body) if not body[name].is_floating_point())
    if whole:
        raise ValueError(f"{fails}: {listed(whole)} are whole numbers, such as of a quantised model")
    if any(".attention.attention.query." in name for name in unknown):
        raise ValueError(f"{fails}: its names are Hugging Face's; take the weights under the names of timm or facebook")
    if missing or unknown or other:
        raise ValueError(
            f"{fails}: missing {missing[:5]}, unknown {unknown[:5]}, of another shape {other[:3]}; known are: {LAYOUTS}"
        )


def _fitting_head(head: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``head`` under the names of ``own`` where all shapes agree, else nothing.

    A single linear layer may have another name: people put a Dropout before it, or take one away.
    """
    if len(own) == len(head) == 2:
        ends = {name.rsplit(".", 1)[-1]: value for name, value in head.items()}
        head = {name: ends.get(name.rsplit(".", 1)[-1], torch.empty(0)) for name in own}
    fits = set(head) == set(own) and all(head[name].shape == value.shape for name, value in own.items())
    return dict(head) if fits else {}


def _load_buffer(model: Classifier, name: str, value: torch.Tensor, origin: str) -> None:
    buffer = model.get_buffer(name)
    if value.shape != buffer.shape:
        raise ValueError(f"{origin} holds a {name} of shape {tuple(value.shape)}, not {tuple(buffer.shape)}")
    if name == "std" and not (value > 0).all():
        raise ValueError(f"{origin} holds a std of {value.flatten().tolist()}, by which images would be divided")
    buffer.copy_(value)


def _check_classes(file: WeightsFile, wanted: Sequence[str] | None, origin: str) -> None:
    if file.classes and wanted is not None and list(file.classes) != list(wanted):
        raise ValueError(
            f"the head of {origin} was trained with the classes {', '.join(file.classes)}, in this order, but wanted "
            f"are {', '.join(wanted)}; prepare the data with the same classes in the same order, or leave the head out"
        )


def _remark(told: Sequence[str] | None, wanted: Sequence[str] | None) -> str:
    """What is uncertain about a head that is kept."""
    if told and wanted is not None:
        return ""
    order = f" It must be: {', '.join(wanted)}." if wanted is not None else ""
    stored = f" The weights were trained with: {', '.join(told)}." if told else ""
    return f"The order of the head's classes is unchecked.{stored}{order}"
