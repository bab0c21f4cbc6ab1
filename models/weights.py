"""Weights from elsewhere: which tensors of a file belong to a network, however the file wraps and names them.

Known layouts are our own checkpoints; state dictionaries of torchvision and timm, with or without a head; the DINOv2
checkpoints of Facebook and of Depth-Anything-V2; and any of them inside a dictionary such as ``{"state_dict": ...}`` or
under prefixes such as ``module.``, ``_orig_mod.`` and ``backbone.``. No code in a file is ever executed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

State = dict[str, torch.Tensor]

#: Dictionaries in which a file may keep its tensors, the better ones first: a teacher is what DINO publishes.
WRAPPERS = ("teacher", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "encoder", "student")
#: Parts of a name that training wrappers of torch put in, wherever they stand.
_WRAPPED = {"module", "_orig_mod"}
#: Tokens that the DINOv2 of this project does not have.
REGISTERS = {"register_tokens", "reg_token"}
KNOWN = "known are our own checkpoints, torchvision's and timm's state dictionaries and DINOv2's as published"


@dataclass(frozen=True)
class Loaded:
    """What a file gave to a model.

    Attributes:
        origin: the file, or in words where the weights come from.
        count: tensors taken over.
        head: whether the classifier's head was among them.
        left_out: names in the file that nothing was made of.
        unsure: what has to be known and the file does not tell, or nothing.
    """

    origin: str
    count: int
    head: bool
    left_out: tuple[str, ...] = ()
    unsure: str = ""

    def __str__(self) -> str:
        """One line: loaded, left out, new."""
        head = "with its head" if self.head else "the head is new"
        left = f"; left out: {_few(self.left_out)}" if self.left_out else ""
        unsure = f"; {self.unsure}" if self.unsure else ""
        return f"{self.origin}: {self.count} tensors loaded, {head}{left}{unsure}"


def _few(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    groups = Counter(name.split(".")[0] for name in names)
    shown = [name if times == 1 else f"{name} ({times} tensors)" for name, times in groups.most_common(most)]
    return ", ".join(shown) + (f" and {len(groups) - most} more" if len(groups) > most else "")


def read_weights(path: Path) -> State:
    """Tensors of a ``.safetensors`` or ``.pth``/``.pt`` file, out of whatever dictionary holds them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of named tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist; use a path, 'pretrained' or 'scratch'")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ValueError(f"{path} holds no plain named tensors ({error})") from error
    state = _unwrap(content)
    if not state:
        raise ValueError(f"{path} holds no plain named tensors; {KNOWN}")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _unwrap(content: Any) -> State:
    if not isinstance(content, Mapping):
        return {}
    for name in WRAPPERS:
        if isinstance(content.get(name), Mapping) and (inner := _unwrap(content[name])):
            return inner
    return {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def classes_of(path: Path) -> list[str] | None:
    """Class names, in label order, that a file or the record beside it tells of its head; None where neither does."""
    record = path.with_name("record.json")
    told = _told(_header(path)) or _told(record.read_text(encoding="utf-8") if record.is_file() else "{}")
    return [str(name) for name in told] if isinstance(told, list) else None


def _header(path: Path) -> str:
    """What our own checkpoints say of themselves inside the file, as JSON."""
    if path.suffix != ".safetensors":
        return "{}"
    with safe_open(path, "pt") as opened:
        return (opened.metadata() or {}).get("model", "{}")


def _told(text: str) -> Any:
    try:
        return json.loads(text).get("classes")
    except (ValueError, AttributeError):
        return None  # somebody else's file


def unprefixed(
    state: State, wanted: Mapping[str, Any], rename: Callable[[str], str] = lambda name: name
) -> tuple[State, State, str]:
    """The tensors of ``state`` under their names in ``wanted``, the rest under its own, and the prefix between.

    The prefix is the one that stands before most of the names that mean wanted ones.

    Args:
        wanted: names of the network's tensors.
        rename: from a foreign name to one of the network's; names that it does not know it gives back.
    """
    plain = {_plain_name(key): value for key, value in state.items()}
    prefixes = Counter(key[: len(key) - len(end)] for key in plain for end in _endings(key) if rename(end) in wanted)
    prefix = max(prefixes, key=lambda one: (prefixes[one], -len(one)), default="")
    own = {rename(key[len(prefix) :]): value for key, value in plain.items() if key.startswith(prefix)}
    rest = {key: value for key, value in plain.items() if not key.startswith(prefix)}
    return own, rest, prefix


def _plain_name(key: str) -> str:
    """Without training wrappers, and without the chunks in which DINOv2 trains: ``blocks.1.7.norm1`` is in block 7."""
    name = ".".join(part for part in key.split(".") if part not in _WRAPPED)
    return re.sub(r"\bblocks\.\d+\.(\d+)\.(?=norm|attn|ls\d|mlp)", r"blocks.\1.", name)


def _endings(key: str) -> list[str]:
    """``a.b.c``, ``b.c`` and ``c`` of ``a.b.c``."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


#: Parts of a block in timm's EfficientNet, and where torchvision has them: without and with an expansion before.
_TIMM_BLOCKS = (
    {
        "conv_dw": "0.0",
        "bn1": "0.1",
        "se.conv_reduce": "1.fc1",
        "se.conv_expand": "1.fc2",
        "conv_pw": "2.0",
        "bn2": "2.1",
    },
    {
        "conv_pw": "0.0",
        "bn1": "0.1",
        "conv_dw": "1.0",
        "bn2": "1.1",
        "se.conv_reduce": "2.fc1",
        "se.conv_expand": "2.fc2",
        "conv_pwl": "3.0",
        "bn3": "3.1",
    },
)
_TIMM_ENDS = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}


def from_timm_efficientnet(name: str) -> str:
    """torchvision's name of a tensor in timm's ``efficientnet_b0``; other names as they are.

    >>> from_timm_efficientnet("blocks.2.0.conv_pwl.weight")
    'features.3.0.block.3.0.weight'
    """
    part, _, kind = name.rpartition(".")
    if part in _TIMM_ENDS:
        return f"{_TIMM_ENDS[part]}.{kind}"
    found = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", part)
    if found is None:
        return name
    stage = int(found[1])
    place = _TIMM_BLOCKS[stage > 0].get(found[3])
    return name if place is None else f"features.{stage + 1}.{found[2]}.block.{place}.{kind}"
