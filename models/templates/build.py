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

#: Name of the notebooks -> what takes the place of the marks in the templates.
MODELS = {
    "resnet": {"BACKBONE": "resnet34", "TITLE": "ResNet34", "NOTEBOOK": "resnet"},
}
_CLEAN_MINUTES = "about one minute an epoch on two CPU cores at 64 pixels with the patient split; a GPU is faster."
_ATK_MINUTES = (
    "about three minutes an epoch of hardening and twenty minutes of attacks on two CPU cores at 64 pixels with the\n"
    "#   patient split; a GPU is faster."
)


def notebooks() -> dict[Path, nbformat.NotebookNode]:
    """Path -> freshly built notebook without outputs, for every notebook that has a template."""
    built = {ROOT / "dataset" / "prepare_dataset.ipynb": _read("prepare_dataset", {})}
    for name, marks in MODELS.items():
        built[ROOT / "models" / f"{name}_model.ipynb"] = _read("model", marks | {"MINUTES": _CLEAN_MINUTES})
        built[ROOT / "models" / f"{name}_model_atk.ipynb"] = _read("model_atk", marks | {"MINUTES": _ATK_MINUTES})
    return built


def _read(template: str, marks: dict[str, str]) -> nbformat.NotebookNode:
    text = (TEMPLATES / f"{template}.py").read_text(encoding="utf-8")
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
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
    return notebook


def main() -> None:
    """Write every notebook, keeping outputs."""
    for path, notebook in notebooks().items():
        if path.is_file():
            notebook = combine_inputs_with_outputs(notebook, nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
