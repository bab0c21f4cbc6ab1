"""Write the tables of the pages anew, from their records."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from utils.commands.boundary import command
from utils.core.paths import ROOT, atomic_write_all
from utils.reporting.gallery import write_gallery
from utils.reporting.pages import DOCUMENTS, rebuilt


def _write(text: str, target: Path) -> None:
    target.write_text(text, "utf-8")


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    names = ", ".join(str(path.relative_to(ROOT)) for path in DOCUMENTS)
    argparse.ArgumentParser(
        prog="python -m utils pages", description=f"Write the tables of {names} and the gallery assets/index.html anew."
    ).parse_args(arguments)
    texts = {path: rebuilt(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    write_gallery(ROOT)
    atomic_write_all({path: partial(_write, text) for path, text in texts.items()})
    return 0
