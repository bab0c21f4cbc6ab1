"""Run the notebooks in order: ``python -m utils.reproduce --profile quick``."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from utils.paths import DATASET_VARIABLES, ROOT, atomic_write
from utils.sources import check_source
from utils.splits import DEFAULT_RATIOS, PROTOCOLS
from utils.workspace import PROFILES

QUICK_FOLDER = ROOT / "quick_run"
FAILED = ROOT / "runs" / "failed"

_CONSTANT_NODES = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Load,
    ast.BinOp,
    ast.Div,
    ast.UnaryOp,
    ast.USub,
)

#: Parameters that have an option of their own, and the option.
_OPTIONS = {"source": "--data", "data_dir": "--data", "out_dir": "--out", "profile": "--profile", "split": "--split"}

#: What a quick run sets in the notebooks, where they have such a parameter.
QUICK = {
    "source": "phantom",
    "image_size": 64,
    "num_epochs": 8,
    "batch_size": 32,
    "train_steps": 2,
    "max_test_images": 48,
    "num_iter": 10,
    "epsilons": [0, 1 / 255, 2 / 255, 4 / 255, 8 / 255],
    "alphas": [0.0001, 0.0005, 0.002],
    "profile": "quick",
}
#: What a quick run sets in the hardening notebooks alone.
QUICK_ATK = {"num_epochs": 4}


def model_notebooks() -> dict[str, list[Path]]:
    """Model name -> its notebooks in the order in which they must run."""
    found = {}
    for path in sorted((ROOT / "models").glob("*_model.ipynb")):
        name = path.name.removesuffix("_model.ipynb")
        attack = path.with_name(f"{name}_model_atk.ipynb")
        found[name] = [path, *([attack] if attack.is_file() else [])]
    return found


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Names and values of the cell tagged ``parameters``.

    Raises:
        ValueError: the notebook has no such cell, or it assigns anything but constants.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"expected one cell tagged 'parameters', found {len(cells)}")
    values: dict[str, Any] = {}
    for node in ast.parse(cells[0].source).body:
        if not isinstance(node, ast.Assign) or any(isinstance(n, ast.Call | ast.Attribute) for n in ast.walk(node)):
            raise ValueError(f"the parameters cell may only assign constants, not: {ast.unparse(node)}")
        exec(compile(ast.Module([node], []), "parameters", "exec"), {}, values)  # constants only, checked above
    return values


def without_injected(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without what an earlier run injected."""
    copied = nbformat.from_dict(notebook)
    copied.cells = [cell for cell in copied.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    return copied


def inject(notebook: nbformat.NotebookNode, values: dict[str, Any]) -> nbformat.NotebookNode:
    """A copy with a cell after the parameters that sets those of ``values`` that the notebook has."""
    copied = without_injected(notebook)
    known = parameters_of(copied)
    chosen = {name: value for name, value in values.items() if name in known}
    position = next(i for i, cell in enumerate(copied.cells) if "parameters" in cell.metadata.get("tags", []))
    source = "\n".join(f"{name} = {value!r}" for name, value in chosen.items())
    cell = nbformat.v4.new_code_cell(f"# set from the command line\n{source}", id="injected")
    cell.metadata["tags"] = ["injected-parameters"]
    copied.cells.insert(position + 1, cell)
    return copied


class _Client(NotebookClient):
    """Passes on what cells print, so that a long training can be watched."""

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            for line in msg["content"]["text"].rstrip().splitlines():
                tqdm.write(f"    {line}")
        return super().process_message(msg, cell, cell_index)


def execute(path: Path, values: dict[str, Any], target: Path) -> None:
    """Run one notebook with ``values`` as parameters and write it, with outputs, to ``target``.

    Where a cell failed, what ran is written too, but never over the notebook itself. A notebook
    that is written over itself does not keep the injected cell; its first output names the values.

    Raises:
        RuntimeError: a cell failed; the message names notebook, cell and error.
    """
    notebook = inject(nbformat.read(path, as_version=4), values)
    code = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=code, desc=path.stem, unit="cell") as bar:
        client = _Client(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_executed=lambda cell, **_: bar.update(cell.cell_type == "code"),
        )
        try:
            client.execute(env=os.environ | {"PYTHONWARNINGS": "default::UserWarning:utils"})
        except CellExecutionError as error:
            failed = FAILED / path.name if target == path else target
            _write(notebook, failed)
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"{path.name} stopped: {reason}. See {failed}") from error
    _write(without_injected(notebook) if target == path else notebook, target)


def _write(notebook: nbformat.NotebookNode, target: Path) -> None:
    tidy(notebook)
    atomic_write(target, lambda file: nbformat.write(notebook, file))


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what only lives with the kernel or on this machine: widgets, progress bars, times, paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in cell.outputs if not _fleeting(output)]
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", output.text.replace(f"{ROOT}/", ""))


def _fleeting(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr" and "Warning" not in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def plan(args: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    """Notebooks to run, each with its parameters.

    Raises:
        ValueError: an unknown model, or a ``--set`` name that no chosen notebook has.
    """
    available = model_notebooks()
    models = args.models or list(available)
    unknown = [name for name in models if name not in available]
    if unknown:
        raise ValueError(f"no notebooks for {', '.join(unknown)}; available: {', '.join(available)}")
    shared = dict(QUICK) if args.profile == "quick" else {}
    split = args.split or "patient"
    shared |= {"profile": args.profile, "out_dir": str(args.out) if args.out else "", "split": split}
    shared["ratios"] = list(DEFAULT_RATIOS[split])
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    chosen = dict(_assignment(text) for text in args.set)
    chosen_atk = dict(_assignment(text) for text in args.set_atk)
    steps = []
    data = _data(args)
    if prepared(data):
        shared["data_dir"] = str(Path(data).resolve())
    else:
        check_source(data)
        shared["source"] = str(Path(data).resolve()) if Path(data).exists() else data
        steps.append((ROOT / "dataset" / "prepare_dataset.ipynb", shared | chosen))
    for name in models:
        for path in available[name]:
            attacks = path.stem.endswith("_atk")
            own = QUICK_ATK if args.profile == "quick" and attacks else {}
            steps.append((path, shared | own | chosen | (chosen_atk if attacks else {})))
    for option, settings, suffix in (("--set", chosen, ""), ("--set-atk", chosen_atk, "_atk")):
        known: dict[str, Any] = {}
        for path, _ in steps:
            if path.stem.endswith(suffix):
                known |= parameters_of(nbformat.read(path, as_version=4))
        for name, value in settings.items():
            _check_setting(f"{option} {name}", name, value, known)
    return steps


def _data(args: argparse.Namespace) -> str:
    if args.data == "":
        raise ValueError("--data is empty; give a path, a Kaggle handle or phantom")
    data = args.data or ("phantom" if args.profile == "quick" else str(DATASET_VARIABLES))
    if not args.data and args.profile == "full" and not prepared(data):
        raise ValueError(f"no prepared data in {DATASET_VARIABLES}; say with --data where the images are")
    if args.split and prepared(data):
        raise ValueError(f"{data} is split already; leave out --split, or give the images as --data")
    return data


def _check_setting(label: str, name: str, value: Any, known: dict[str, Any]) -> None:
    """Refuse now what would stop a notebook after hours."""
    if name in _OPTIONS:
        raise ValueError(f"{label}: use {_OPTIONS[name]} instead")
    if name not in known:
        raise ValueError(f"{label}: no chosen notebook has this parameter; known: {', '.join(sorted(known))}")
    default = known[name]
    kinds = {bool: bool, int: int, float: (int, float), list: (list, tuple), str: (str, int)}[type(default)]
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"{label}={value}: expected a value like {default!r}")
    if isinstance(default, list) and not all(isinstance(entry, int | float) for entry in value):
        raise ValueError(f"{label}={value}: expected numbers like {default!r}")
    radii = value if isinstance(value, list | tuple) else [value]
    if name in ("epsilons", "Epsilon", "alphas", "Alpha") and not all(0 <= radius <= 1 for radius in radii):
        raise ValueError(f"{label}={value}: pixel units are in [0, 1]; for k grey levels give k/255")


def prepared(data: str) -> bool:
    """True where ``data`` is a folder that ``utils.prepare`` wrote."""
    return (Path(data) / "train_set.pt").is_file()


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set needs name=value, not {text!r}")
    try:
        tree = ast.parse(value, mode="eval")
        if any(not isinstance(node, _CONSTANT_NODES) for node in ast.walk(tree)):
            return name, value
        return name, eval(compile(tree, "--set", "eval"), {"__builtins__": {}})  # constants and / only
    except (ValueError, SyntaxError):
        return name, value


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.reproduce", description=__doc__.split(":")[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"default: {' '.join(model_notebooks())}")
    parser.add_argument(
        "--data",
        help="folder, archive, Kaggle handle, phantom, or a folder of prepared *_set.pt; "
        "default: phantom, or with --profile full what dataset/dataset_variables holds",
    )
    parser.add_argument("--split", choices=PROTOCOLS, help="default: patient")
    parser.add_argument("--out", type=Path, help="default: quick_run/, or with --profile full the repository itself")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebooks")
    parser.add_argument(
        "--set-atk",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the same, for the hardening notebooks only",
    )
    args = parser.parse_args(arguments)
    if args.out is None and args.profile == "quick":
        args.out = QUICK_FOLDER
    args.out = args.out.expanduser().resolve() if args.out else None
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _arguments(arguments)
    begun = time.perf_counter()
    try:
        steps = plan(args)
        print(f"{len(steps)} notebooks, profile {args.profile}, results in {args.out or ROOT}")
        for path, values in steps:
            target = args.out / "notebooks" / path.name if args.out else path
            execute(path, values, target)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    minutes = (time.perf_counter() - begun) / 60
    folder = args.out or ROOT
    print(f"done in {minutes:.1f} minutes. Figures: {folder / 'assets'}  notebooks: {args.out or ROOT / 'models'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
