"""Build the notebooks from the templates: ``python -m models.templates.build``.

Edit the templates, not the notebooks. Outputs of cells whose source did not change are kept.
"""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

TEMPLATES = Path(__file__).resolve().parent
ROOT = TEMPLATES.parent.parent

#: Where the repository is published, as https://github.com/<owner>/<name>. Without it the notebooks have no badge, and
#: the setup cell asks for the address.
REPOSITORY = ""

#: Stands above the parameters, for whoever opens a notebook that was executed.
INJECTED = (
    "Change what you like and run all cells. A copy that was run from the command line has one more cell below, with "
    "the values of that run: delete it, or it replaces yours."
)

#: Tag of a cell that is shown folded.
FOLDED = "hide-input"

#: Name of the notebooks -> what takes the place of the marks in the templates.
MODELS = {
    "dino_v2": {
        "BACKBONE": "dino_v2",
        "TITLE": "DINOv2",
        "RATE": "0.0001",
        "ATK_RATE": "0.0001",
    },
    "resnet": {
        "BACKBONE": "resnet34",
        "TITLE": "ResNet34",
        "RATE": "0.001",
        "ATK_RATE": "0.0005",
    },
    "efficientnet": {
        "BACKBONE": "efficientnet_b0",
        "TITLE": "EfficientNetB0",
        "RATE": "0.001",
        "ATK_RATE": "0.0005",
    },
}


def notebooks() -> dict[Path, nbformat.NotebookNode]:
    """Path -> freshly built notebook without outputs, for every notebook that has a template."""
    built = {ROOT / "dataset" / "prepare_dataset.ipynb": _read("prepare_dataset", {}, "dataset/prepare_dataset")}
    for name, marks in MODELS.items():
        for template in ("model", "model_atk"):
            stem = f"models/{name}_{template}"
            built[ROOT / f"{stem}.ipynb"] = _read(template, marks | {"NOTEBOOK": name}, stem)
    for name in ("results", "attack_atlas", "predict"):
        built[ROOT / "models" / f"{name}.ipynb"] = _read(name, {}, f"models/{name}")
    return built


def badge(stem: str) -> str:
    """Markdown of the badge that opens a notebook on Colab; "" while there is no address for it to open."""
    if not REPOSITORY:
        return ""
    place = REPOSITORY.replace("https://github.com/", "") + f"/blob/main/{stem}.ipynb"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})](https://colab.research.google.com/github/{place})"


def _read(template: str, marks: dict[str, str], stem: str) -> nbformat.NotebookNode:
    text = (TEMPLATES / f"{template}.py").read_text(encoding="utf-8")
    setup = (TEMPLATES / "setup.py").read_text(encoding="utf-8")
    marks = {"SETUP": setup, "INJECTED": INJECTED, "REPOSITORY": REPOSITORY, "BADGE": badge(stem), **marks}
    if not marks["BADGE"]:
        text = text.replace("# __BADGE__\n#\n", "")
    for mark, value in marks.items():
        text = text.replace(f"__{mark}__", value)
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if FOLDED in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
    return notebook


def _with_outputs(notebook: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A built notebook with the outputs of the one that was stored, and with the values that it ran with."""
    names = [cell.id for cell in notebook.cells]
    ran_with = [cell for cell in stored.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    combined = combine_inputs_with_outputs(notebook, stored)
    for cell, name in zip(combined.cells, names):
        cell.id = name  # a cell that moved brings its old one
    place = max(
        (i for i, cell in enumerate(combined.cells) if "parameters" in cell.metadata.get("tags", [])), default=-1
    )
    combined.cells[place + 1 : place + 1] = ran_with
    return combined


def main() -> None:
    """Write every notebook, keeping outputs."""
    for path, notebook in notebooks().items():
        if path.is_file():
            notebook = _with_outputs(notebook, nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
