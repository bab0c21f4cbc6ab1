"""Finished batches of an evaluation on disk, so that a killed one goes on where it stopped.

A folder's name is a digest of everything that the numbers depend on: weights and structure of the models,
attacks, radii, images, labels, seed. A changed setting reads another folder and never a stale one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.core.paths import atomic_write, write_json
from utils.data.sets import ImageSet

#: Raised whenever what is stored, or how an attack works, changes.
PROTOCOL = 6


def describe_module(model: nn.Module, known: dict[int, bytes] | None = None) -> str:
    """Digest of a model: its weights, everything else that its modules hold, and the code of their forward passes.

    Tensors outside the state dictionary, settings in lists or dictionaries, functions that a module was given and a
    ``forward`` that was edited or replaced all change what the model answers, so all of them change the digest. The
    same model has the same digest in every process.

    Args:
        known: digests of modules, tensors and classes by their identity, which is read and added to. Of models that
            share parts each part is then read once; valid only while none of them changes.
    """
    return _module(model, {} if known is None else known).hex()[:16]


def _module(module: nn.Module, known: dict[int, bytes]) -> bytes:
    """The digest of a module with all modules inside it."""
    if id(module) in known:
        return known[id(module)]
    digest = hashlib.sha256(f"{type(module).__module__}{type(module).__qualname__}".encode())
    own = {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING and "hook" not in key}
    # without their handles' numbers, which differ from process to process
    own["hooks"] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    for entry in sorted(own.items()):
        _add(digest, entry, ())
    for key, tensor in (*module._buffers.items(), *module._parameters.items()):
        digest.update(f"{key}:".encode() + _known(known, tensor, tensor))
    for kind in type(module).__mro__:
        if not _is_library(kind):
            digest.update(_known(known, kind, {k: v for k, v in vars(kind).items() if not k.startswith("__")}))
    for key, child in module._modules.items():
        digest.update(f"{key}:".encode() + (b"nothing" if child is None else _module(child, known)))
    known[id(module)] = digest.digest()
    return known[id(module)]


def _known(known: dict[int, bytes], whose: object, value: Any) -> bytes:
    """The digest of a value that belongs to ``whose``, from ``known`` if it is there."""
    if id(whose) not in known:
        digest = hashlib.sha256()
        _add(digest, value, ())
        known[id(whose)] = digest.digest()
    return known[id(whose)]


#: What torch keeps in a module for itself; buffers and parameters are added by themselves, and modes do not count.
_BOOKKEEPING = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
#: Their code is told by the version that the key holds anyway.
_LIBRARIES = ("builtins", "torch", "torchvision", "timm")
#: What may stand in a global name that a function uses, and change what it answers.
_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None))
#: Values that are nothing but what ``repr`` says of them.
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _is_library(owner: type | FunctionType) -> bool:
    return (owner.__module__ or "").split(".")[0] in _LIBRARIES


def _names_used(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up."""
    inner = (_names_used(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _globals_used(function: FunctionType) -> dict[str, Any]:
    """Functions and plain values behind the global names that a function uses; a library's own are not looked at."""
    known = {name: function.__globals__.get(name) for name in sorted(_names_used(function.__code__))}
    return {name: value for name, value in known.items() if isinstance(value, (FunctionType, *_PLAIN))}


def _add(digest: Any, value: Any, seen: tuple[int, ...]) -> None:
    """Add a value with all that it is made of, and nothing that differs from process to process."""
    if type(value) in _SCALARS:  # most values are; the questions below take longer
        digest.update(f"{type(value).__qualname__}{value!r}".encode())
        return
    if id(value) in seen:
        return
    seen = (*seen, id(value))
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _add_all(digest, [part for key, own in value.items() for part in (str(key), own)], seen)
    elif isinstance(value, (list, tuple)):
        _add_all(digest, value, seen)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, partial):
        _add_all(digest, [value.func, value.args, value.keywords], seen)
    elif isinstance(value, (MethodType, staticmethod, classmethod)):
        _add(digest, value.__func__, seen)
    elif isinstance(value, property):
        _add(digest, value.fget, seen)
    elif isinstance(value, FunctionType) and _is_library(value):
        digest.update(f"{value.__module__}{value.__qualname__}".encode())
    elif isinstance(value, FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, closure, _globals_used(value)]
        _add_all(digest, parts, seen)
    elif isinstance(value, CodeType):
        _add_all(digest, [value.co_code, value.co_names, value.co_consts], seen)
    elif isinstance(value, (*_SCALARS, Enum, Path)):
        digest.update(repr(value).encode())
    elif isinstance(value, (nn.Module, type)):
        digest.update(f"{value.__module__ if isinstance(value, type) else type(value).__module__}".encode())
    elif hasattr(value, "__dict__"):
        _add(digest, dict(sorted(vars(value).items())), seen)


def _add_all(digest: Any, values: Sequence[Any], seen: tuple[int, ...]) -> None:
    digest.update(str(len(values)).encode())
    for value in values:
        _add(digest, value, seen)


def describe_images(images: ImageSet) -> str:
    """Digest of pixels, labels and patients."""
    digest = hashlib.sha256(repr(images.classes).encode())
    for tensor in (images.images, images.labels, images.subjects):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


class AttackCache:
    """One evaluation's batches: ``<folder>/<key>/<name>.safetensors``.

    Args:
        folder: holds many evaluations; None keeps nothing.
        settings: plain values that the numbers depend on.

    Attributes:
        begun: whether an earlier run of the same settings has been here.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        text = json.dumps({"protocol": PROTOCOL, "torch": torch.__version__, **settings}, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:20]
        self.folder = None if folder is None else Path(folder) / self.key
        self.begun = self.folder is not None and (self.folder / "key.json").is_file()
        if self.folder is not None and not self.begun:
            write_json(self.folder / "key.json", json.loads(text))

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """What :meth:`save` wrote, or None.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
        if self.folder is None or not self._path(self.folder, name).is_file():
            return None
        try:
            return load_file(self._path(self.folder, name))
        except Exception as error:
            path = self._path(self.folder, name)
            raise ValueError(f"{path} is damaged ({error}); delete it and run this again") from error

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one batch, whole or not at all."""
        if self.folder is not None:
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            atomic_write(self._path(self.folder, name), lambda path: save_file(plain, path))

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"


def describe_subject(model: nn.Module, surrogates: Mapping[str, nn.Module], images: ImageSet) -> dict[str, Any]:
    """Digests of what an evaluation attacks and by whose gradients: models, by name, and images."""
    known: dict[int, bytes] = {}
    models = {name: describe_module(one, known) for name, one in {"": model, **surrogates}.items()}
    return {"models": models, "images": describe_images(images)}
