"""Seeds, and the facts that every record carries about how it was made."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.paths import ROOT
from utils.core.processes import world_size

_RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "accelerate", "timm", "torchattacks")
#: What decides a result, as git names it.
_CODE = ("*.py", "env", "pyproject.toml", ":(exclude)tests")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all ``parts`` and on nothing else.

    Deriving the seed of each step from (seed, epoch, step) instead of carrying generator state
    along makes a resumed run draw exactly what an uninterrupted one does.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded from ``parts``; see :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def hardware() -> str:
    """The device that torch computes on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU {_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str:
    """Commit of the checkout, with ``+changes`` where code was edited; ``unknown`` without git.

    Weights, records, figures, data and executed notebooks do not count: runs write them themselves.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "-uno", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment_facts() -> dict[str, Any]:
    """Versions, hardware, commit and time, for a record."""
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _RECORDED_PACKAGES},
        "hardware": hardware(),
        "processes": world_size(),
        "commit": git_commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
