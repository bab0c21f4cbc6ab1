"""The leak audit of a data set as record and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.core.paths import read_json, write_json
from utils.core.reproducibility import environment_facts
from utils.reporting.plots import plot_leak_audit
from utils.reporting.style import save_figure


def save_audit(found: dict[str, Any], folder: Path, *, note: str = "") -> Figure:
    """Write ``leak_audit.json`` and ``leak_audit.png`` and return the figure.

    Raises:
        FileExistsError: the folder holds the audit of another source, which tables may be made from.
    """
    target = Path(folder) / "leak_audit.json"
    _refuse_other_source(target, found["data"]["source"])
    record = {
        "note": note,
        "data": found["data"],
        "splits": [one.as_dict() for one in found["audits"]],
        "patient_grouped_five_fold_accuracy": found["cross_validation"],
        "environment": environment_facts(),
    }
    figure = plot_leak_audit(found["audits"], note=note)
    write_json(target, record)
    save_figure(figure, target.with_suffix(".png"))
    return figure


def _refuse_other_source(target: Path, source: str) -> None:
    stored = read_json(target)["data"]["source"] if target.is_file() else source
    if stored != source:
        raise FileExistsError(
            f"{target} is the audit of {stored}; give {source} a folder of its own, or remove the file first"
        )
