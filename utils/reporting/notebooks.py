"""Run the notebooks in order: ``python -m utils reproduce --profile quick``."""

from __future__ import annotations

import argparse
import ast
import base64
import html
import io
import math
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image
from tqdm.auto import tqdm

from utils.attacks.suites import SUITES
from utils.core.checks import whole
from utils.core.paths import DATASET_VARIABLES, ROOT, atomic_write
from utils.core.precision import PRECISIONS
from utils.core.radii import check_eps
from utils.data.archives import check_source
from utils.data.splits import DEFAULT_RATIOS
from utils.evaluation.ensemble import RULES
from utils.reporting.widgets import HEADLESS
from utils.training.augment import Augmentation
from utils.training.config import SAMPLINGS, TrainConfig, parse_assignment
from utils.training.objectives import RECIPES, make_objective

QUICK_FOLDER = ROOT / "quick_run"
FAILED = ROOT / "runs" / "failed"

#: Kernels talk through files of this user. TCP ports, which are all that Windows has, would be open to others here.
TRANSPORT = "tcp" if os.name == "nt" else "ipc"
#: In a kernel, warnings of this project show each time, also where they point at a cell; those of libraries do not.
WARNINGS = (
    "import warnings; warnings.filterwarnings('ignore', category=UserWarning); "
    "warnings.filterwarnings('default', category=UserWarning, module=r'(utils|models)\\.|__main__')"
)

#: What a figure may take in a notebook, so that the longest stays under a megabyte.
FIGURE_BYTES, FIGURE_COLOURS, FIGURE_WIDTH = 80_000, 256, 720

#: Seconds between two looks at the bar of a cell.
BAR_EVERY = 2.0

#: Parameters that have an option of their own, and the option.
_OPTIONS = {"source": "--data", "data_dir": "--data", "out_dir": "--out", "profile": "--profile", "split": "--split"}

#: Parameters that may be paths.
_PATHS = ("weights", "pretrained_model_path", "subjects")

#: Parameters that name one or several of a few things.
_CHOICES = {
    "rule": RULES,
    "attacked_rules": RULES,
    "vote_suite": SUITES,
    "recipe": RECIPES,
    "sampling": SAMPLINGS,
    "precision": PRECISIONS,
}

#: Parameters that are radii or step sizes, in pixels of [0, 1].
_RADII = {"epsilons", "Epsilon", "alphas", "Alpha"}
#: Parameters that count something, and the least of each; 0 means all, or leaves a part out.
_COUNTS = {
    "num_iter": 1,
    "search_epochs": 1,
    "panel_queries": 1,
    "image_size": 32,
    "seed": 0,
    "size": 0,
    "n_trials": 0,
    "max_test_images": 0,
    "panel_images": 0,
    "vote_images": 0,
}

#: What a quick run sets in the notebooks, where they have such a parameter.
QUICK = {
    "source": "phantom",
    "weights": "scratch",
    "image_size": 48,
    "num_epochs": 8,
    "batch_size": 32,
    "search_epochs": 1,
    "search_space": ["weight_decay", "augmentation_strength"],
    "train_steps": 1,
    "validation_images": 16,
    "max_test_images": 40,
    "Epsilon": 3 / 255,
    "num_iter": 5,
    "panel_images": 4,
    "panel_queries": 50,
    "epsilons": [0, 2 / 255, 3 / 255],
    "alphas": [0.0002, 0.001, 0.006],
    "profile": "quick",
}
#: What it sets beyond that in single notebooks; a vision transformer cuts patches of 14 pixels.
_DINO = {"image_size": 56, "learning_rate": 0.001}
_EFFICIENTNET = {"image_size": 56, "batch_size": 16, "augmentation_strength": 0.5}
_HARDEN = {"num_epochs": 4}
QUICK_NOTEBOOK = {
    "dino_v2_model": _DINO | {"num_epochs": 6, "n_trials": 2},
    "dino_v2_model_atk": _HARDEN | _DINO | {"num_epochs": 2, "learning_rate": 0.0005},
    "resnet_model_atk": _HARDEN | {"learning_rate": 0.001},
    "efficientnet_model": _EFFICIENTNET | {"num_epochs": 12, "learning_rate": 0.004},
    "efficientnet_model_atk": _HARDEN | _EFFICIENTNET | {"learning_rate": 0.002},
    "results": {
        "epsilons": [0, 3 / 255],
        "attacked_rules": [],
        "vote_suite": "smoke",
        "vote_images": 8,
        "panel_images": 0,
    },
}
#: Where notebooks run beside each other, the longest first: a last one would have the machine to itself.
LONGEST_FIRST = ("resnet", "dino_v2", "efficientnet")
RESULTS = ROOT / "models" / "results.ipynb"


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
    source = "\n".join(f"{name} = {_written(value)}" for name, value in chosen.items())
    cell = nbformat.v4.new_code_cell(f"{INJECTED}\n{source}", id="injected")
    cell.metadata["tags"] = ["injected-parameters"]
    copied.cells.insert(position + 1, cell)
    return copied


def _written(value: Any) -> str:
    """A value as somebody would type it: radii as fractions of 255."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    levels = 255 * value if isinstance(value, float) else 0
    typed = 0 < levels <= 32 and math.isclose(levels, round(2 * levels) / 2, rel_tol=1e-12)
    return f"{levels:g} / 255" if typed and f"{levels:g}" in (f"{levels:.1f}", f"{levels:.0f}") else repr(value)


#: First line of the cell that holds a run's values.
INJECTED = "# this run's values, set from the command line; they replace those above, until this cell is deleted"


class _Client(NotebookClient):
    """Passes on what cells print and how far their bars are, so that a long training can be watched."""

    live: ClassVar[set[_Client]] = set()

    def __init__(self, notebook: nbformat.NotebookNode, bar: tqdm, sockets: Path, **options: Any) -> None:
        super().__init__(notebook, on_cell_executed=self._count, kernel_name="python3", **options)
        self.bar, self.sockets, self.told = bar, sockets, 0.0

    def create_kernel_manager(self) -> Any:
        """A kernel that is reached through the folder ``sockets``, which only this user may open."""
        manager = super().create_kernel_manager()
        if TRANSPORT == "ipc":
            manager.transport, manager.ip = TRANSPORT, str(self.sockets / "kernel")
        return manager

    def _count(self, cell: nbformat.NotebookNode, **_: Any) -> None:
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(cell.cell_type == "code")

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            name = self.resources["metadata"]["name"]
            for line in msg["content"]["text"].rstrip().splitlines():
                tqdm.write(f"{name} | {line}")
        if msg["msg_type"] == "comm_msg":
            self._tell(msg["content"]["data"].get("state", {}).get("value"))
        return super().process_message(msg, cell, cell_index)

    def _tell(self, value: Any) -> None:
        """Put the right half of a cell's own bar, which is a widget's text, behind the notebook's."""
        if isinstance(value, str) and "[" in value and time.monotonic() - self.told >= BAR_EVERY:
            self.told = time.monotonic()
            self.bar.set_postfix_str(" ".join(html.unescape(value).split()))

    @classmethod
    def stop_all(cls) -> None:
        """End the kernels of all notebooks that other threads are running."""
        for client in list(cls.live):
            if client.km and client.km.has_kernel:
                client.km.provisioner.process.kill()


def execute(path: Path, values: dict[str, Any], target: Path, *, threads: int | None = None) -> None:
    """Run one notebook with ``values`` as parameters and write it, with outputs, to ``target``.

    Where a cell failed, what ran is written too, but never over the notebook itself. The cell with the values stays in
    the notebook, so that what is shown is what ran; a next run replaces it.

    Args:
        threads: CPU threads that its kernel may use; None leaves that to torch.

    Raises:
        RuntimeError: a cell failed or the kernel died; the message names notebook and error.
    """
    notebook = inject(nbformat.read(path, as_version=4), values)
    code = sum(cell.cell_type == "code" for cell in notebook.cells)
    environment = os.environ | {HEADLESS: "1"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tqdm(total=code, desc=path.stem, unit="cell") as bar, TemporaryDirectory(prefix="mri_") as sockets:
        client = _Client(
            notebook,
            bar,
            Path(sockets),
            timeout=None,
            extra_arguments=[f"--IPKernelApp.exec_lines={WARNINGS}"],
            resources={"metadata": {"path": str(path.parent), "name": path.stem}},
        )
        _Client.live.add(client)
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            failed = FAILED / path.name if target == path else target
            _write(notebook, failed)
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"{path.name} stopped: {reason}. See {failed}") from error
        except DeadKernelError as error:
            raise RuntimeError(f"{path.name} stopped: its kernel died, often for lack of memory") from error
        finally:
            _Client.live.discard(client)
    _write(notebook, target)


def run(steps: list[tuple[Path, dict[str, Any]]], *, out: Path | None, jobs: int) -> None:
    """Execute notebooks, ``jobs`` at once, each after those whose results it needs.

    Raises:
        RuntimeError: the first failure; the notebooks that run beside it are stopped.
    """
    if jobs > 1:
        steps = sorted(steps, key=lambda step: (_stage(step[0]), _turn(step[0])))
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    futures: dict[Path, Future] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for path, values in steps:
            needed = [future for other, future in futures.items() if _needs(path, other)]
            target = out / "notebooks" / path.name if out else path
            alone = _stage(path) in (0, 3)
            futures[path] = pool.submit(_execute_after, needed, path, values, target, None if alone else threads)
        failed: list[BaseException] = []
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            failed = [error for error in (future.exception() for future in done) if error]
        finally:
            for future in futures.values():
                future.cancel()
            _Client.stop_all()
    if failed:
        raise failed[0]


def _execute_after(needed: list[Future], path: Path, values: dict[str, Any], target: Path, threads: int | None) -> None:
    # what is needed was handed to the pool before, so somebody is at work on it already
    if all(future.exception() is None for future in needed):
        execute(path, values, target, threads=threads)


def _stage(path: Path) -> int:
    """0 data, 1 clean models, 2 hardening, 3 results."""
    if path.parent.name == "dataset":
        return 0
    return 3 if path == RESULTS else 1 + path.stem.endswith("_atk")


def _turn(path: Path) -> int:
    """Place within a stage; models that are not known come first."""
    name = path.stem.removesuffix("_atk").removesuffix("_model")
    return LONGEST_FIRST.index(name) + 1 if name in LONGEST_FIRST else 0


def _needs(path: Path, earlier: Path) -> bool:
    """Whether one notebook reads what an earlier one wrote."""
    if _stage(path) == 2 and _stage(earlier) == 1:
        return path.stem == f"{earlier.stem}_atk"
    return _stage(path) > _stage(earlier)


def _write(notebook: nbformat.NotebookNode, target: Path) -> None:
    tidy(notebook)
    if target.is_relative_to(ROOT):
        _name_paths_from(target.parent, notebook)
    atomic_write(target, lambda file: nbformat.write(notebook, file))


def _name_paths_from(folder: Path, notebook: nbformat.NotebookNode) -> None:
    """Injected paths inside the repository, seen from ``folder``, where Jupyter opens the notebook in any clone.

    Of a file elsewhere only the name is left: its folder is this machine's affair.
    """
    inside = rf"(?<='){re.escape(repr(str(ROOT))[1:-1])}(?=[/\\'])"
    there = Path(os.path.relpath(ROOT, folder)).as_posix()
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(inside, there, cell.source)
            cell.source = re.sub(r"'((?:/|[A-Za-z]:\\\\)[^'\n]+)'", _without_folder, cell.source)


def _without_folder(quoted: re.Match[str]) -> str:
    return repr(Path(quoted[1]).name) if Path(quoted[1]).is_file() else quoted[0]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Lighten figures, and drop what only lives with the kernel or on this machine: widgets, bars, times, paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in cell.outputs if not _fleeting(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = _lighter(output.data)
                if output.output_type == "stream":
                    output.text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", output.text.replace(f"{ROOT}/", ""))


def _lighter(data: dict[str, Any]) -> dict[str, Any]:
    """Outputs with a figure in fewer colours, or a JPEG where that is not enough; ``assets/`` holds it whole."""
    figure = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    packed, kind = io.BytesIO(), "image/png"
    # not the median cut, which gives thin lines the colours of the areas around them
    colours = len(figure.getcolors(FIGURE_COLOURS) or range(FIGURE_COLOURS))
    few = figure.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(packed, "PNG", optimize=True)
    if len(packed.getvalue()) > FIGURE_BYTES:
        packed, kind = io.BytesIO(), "image/jpeg"
        figure.thumbnail((FIGURE_WIDTH, figure.height))
        figure.save(packed, "JPEG", quality=65, optimize=True)
    others = {mime: content for mime, content in data.items() if mime != "image/png"}
    return {kind: base64.b64encode(packed.getvalue()).decode(), **others}


def _fleeting(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr" and "Warning" not in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def plan(args: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    """Notebooks to run, each with its parameters.

    Raises:
        ValueError: an unknown model, options that exclude each other, or a ``--set`` name that no chosen notebook has.
    """
    available = model_notebooks()
    models = [] if args.only_results else args.models or list(available)
    if args.only_results and (args.models or args.skip_results):
        raise ValueError("--only-results leaves neither models to run nor results to skip")
    unknown = [name for name in models if name not in available]
    if unknown:
        raise ValueError(f"no notebooks for {', '.join(unknown)}; available: {', '.join(available)}")
    shared, quick = (dict(QUICK), QUICK_NOTEBOOK) if args.profile == "quick" else ({}, {})
    split = args.split or "patient"
    shared |= {"profile": args.profile, "out_dir": str(args.out) if args.out else "", "split": split}
    shared["ratios"] = list(DEFAULT_RATIOS[split])
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {args.jobs}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    chosen, chosen_atk = (dict(map(_assigned, texts)) for texts in (args.set, args.set_atk))
    steps = []
    data = _data(args)
    if prepared(data):
        shared["data_dir"] = str(Path(data).resolve())
    else:
        check_source(data)
        shared["source"] = str(Path(data).resolve()) if Path(data).exists() else data
        steps.append((ROOT / "dataset" / "prepare_dataset.ipynb", shared | chosen))
    if args.only_results and steps:
        raise ValueError(f"--only-results needs the data that the models were trained on, not {data}")
    for name in models:
        for path in available[name]:
            attacks = path.stem.endswith("_atk")
            steps.append((path, shared | quick.get(path.stem, {}) | chosen | (chosen_atk if attacks else {})))
    if RESULTS.is_file() and not args.skip_results:
        steps.append((RESULTS, shared | quick.get(RESULTS.stem, {}) | chosen))
    for option, settings, suffix in (("--set", chosen, ""), ("--set-atk", chosen_atk, "_atk")):
        known: dict[str, Any] = {}
        for path, _ in steps:
            if path.stem.endswith(suffix):
                known |= parameters_of(nbformat.read(path, as_version=4))
        for name, value in settings.items():
            _check_setting(f"{option} {name}", name, value, known)
    for path, values in steps:
        own = parameters_of(nbformat.read(path, as_version=4))
        try:
            check_parameters(own | {name: value for name, value in values.items() if name in own})
        except ValueError as error:
            raise ValueError(f"{path.stem}: {error}") from error
    return steps


def _assigned(text: str) -> tuple[str, Any]:
    """Name and value of an assignment; a path is made whole, because notebooks run in another folder."""
    name, value = parse_assignment(text)
    here = name in _PATHS and str(value) and Path(str(value)).expanduser().exists()
    return name, str(Path(value).expanduser().resolve()) if here else value


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
    if isinstance(default, list):
        kinds = (int, float) if default and not isinstance(default[0], str) else (str,)
        if not all(isinstance(entry, kinds) for entry in value):
            raise ValueError(f"{label}={value}: expected {'names' if str in kinds else 'numbers'} like {default!r}")
    entries = value if isinstance(value, list | tuple) else [value]
    wrong = [entry for entry in entries if name in _CHOICES and entry not in _CHOICES[name]]
    if wrong:
        raise ValueError(f"{label}: no {wrong[0]!r}; choose from {', '.join(_CHOICES[name])}")
    if name in _RADII and not all(0 <= radius <= 1 for radius in entries):
        raise ValueError(f"{label}={value}: pixel units are in [0, 1]; for k grey levels give k/255")


def check_parameters(values: Mapping[str, Any]) -> None:
    """Build of a notebook's parameters what its cells will build, so that none of them stops it after hours.

    Raises:
        ValueError: a value out of its range; the message names the parameter.
    """
    for name, least in _COUNTS.items():
        if name in values:
            whole(name, values[name], least)
    for name in _RADII & set(values):
        for eps in values[name] if isinstance(values[name], (list, tuple)) else [values[name]]:
            check_eps(eps)
    if "num_epochs" in values:
        known = {field.name for field in fields(TrainConfig)} - {"augmentation"}
        augmentation = Augmentation(strength=values["augmentation_strength"], scanner=values["scanner"])
        TrainConfig(**{name: values[name] for name in known & set(values)}, augmentation=augmentation)
    if "recipe" in values:
        make_objective(
            values["recipe"],
            eps=values["Epsilon"],
            alpha=values["Alpha"] or None,
            steps=values["train_steps"],
            curriculum=values["curriculum"],
            adv_weight=values["adv_weight"],
            beta=values["beta"] or None,
        )


def prepared(data: str) -> bool:
    """True where ``data`` is a folder that ``utils.data.preparation`` wrote."""
    return (Path(data) / "train_set.pt").is_file()
