"""The verbs of ``python -m utils``, and the one place where they are called."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from utils.commands.boundary import MISUSED

#: Verb -> module with its ``main``, and what it does.
VERBS = {
    "prepare": ("prepare", "decode images, find the patients, split them, check for leaks"),
    "train": ("train", "train or harden one model, in one process or in many"),
    "search": ("search", "search hyperparameters with Optuna"),
    "robustness": ("robustness", "attack a trained model and measure what is left"),
    "spot-check": ("spot_check", "compare trained models with their records"),
    "recipes": ("recipes", "compare ways of hardening over several seeds"),
    "folds": ("folds", "test every patient once: cross-validation by patient"),
    "combine": ("combine", "combine slices and models by patient, and attack each combination"),
    "atlas": ("atlas", "attack a model and its hardened twin in every way, and spoil their scans"),
    "calibrate": ("calibrate", "make trained models ready for scans of one's own"),
    "predict": ("predict", "answer about a slice, a volume or a folder, and say how far to believe it"),
    "reproduce": ("reproduce", "run the notebooks in order"),
    "figures": ("figures", "draw all figures again from their records"),
    "pages": ("pages", "write the tables of the pages again from their records"),
}


def usage() -> str:
    """What ``python -m utils --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {said}" for verb, (_, said) in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m utils VERB ...",
            "",
            *lines,
            "",
            "python -m utils VERB --help lists the options of one. Research code, not for clinical use.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Call the verb that the first argument names; returns the exit status."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, 1)
        meant = f"; did you mean {near[0]}?" if near else ";"
        print(f"error: no verb {verb!r}{meant} there are {', '.join(VERBS)}", file=sys.stderr)
        return MISUSED
    return import_module(f"utils.commands.{VERBS[verb][0]}").main(rest)
