"""Write the tables of the pages anew, from their records."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from utils.commands.boundary import command
from utils.core.paths import ROOT, atomic_write_all
from utils.reporting.gallery import write_gallery
from utils.reporting.page_text import read_page
from utils.reporting.pages import DOCUMENTS, rebuilt


def _write(text: str, target: Path) -> None:
    target.write_text(text, "utf-8")


@command("python -m utils pages")
def main() -> None:
    """Write the tables of README.md, assets/RESULTS.md and the other pages anew, and the gallery assets/index.html."""
    texts = {path: rebuilt(read_page(path), page=path.name) for path in DOCUMENTS}
    write_gallery(ROOT)
    atomic_write_all({path: partial(_write, text) for path, text in texts.items()})
