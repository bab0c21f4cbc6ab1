"""Libraries that only some commands need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

SCANS = "env/requirements-scans.txt"


def need(module: str, why: str) -> Any:
    """An optional module.

    Args:
        module: dotted name.
        why: what cannot be done without it, as the start of a sentence.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{why} with {module.split('.')[0]}: pip install -r {SCANS}") from error
