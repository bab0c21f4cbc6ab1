"""Which notebooks are run, with which parameters; everything that would stop one after hours is refused here."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import nbformat

from utils.attacks.suites import SUITES
from utils.core.checks import whole
from utils.core.paths import DATASET_VARIABLES, ROOT
from utils.core.precision import PRECISIONS
from utils.core.radii import check_eps
from utils.data.archives import check_source
from utils.data.splits import DEFAULT_RATIOS
from utils.evaluation.ensemble import RULES
from utils.training.augment import Augmentation
from utils.training.config import SAMPLINGS, TrainConfig, parse_assignment
from utils.training.objectives import RECIPES, make_objective

QUICK_FOLDER = ROOT / "quick_run"
RESULTS = ROOT / "models" / "results.ipynb"
ATLAS = ROOT / "models" / "attack_atlas.ipynb"
#: Whose two models the atlas attacks.
ATLAS_OF = "efficientnet"

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
    "seed": 0,
    "size": 0,
    "n_trials": 0,
    "max_test_images": 0,
    "panel_images": 0,
    "vote_images": 0,
}

#: What a quick run sets in the notebooks, where they have such a parameter.
QUICK: dict[str, Any] = {
    "source": "phantom",
    "weights": "scratch",
    "slices_per_patient": 0,
    "image_size": 48,
    "num_epochs": 5,
    "batch_size": 32,
    "search_epochs": 1,
    "search_space": ["weight_decay", "augmentation_strength"],
    "train_steps": 1,
    "validation_images": 16,
    "max_test_images": 24,
    "Epsilon": 3 / 255,
    "num_iter": 3,
    "panel_images": 4,
    "panel_queries": 30,
    "epsilons": [0, 2 / 255, 3 / 255],
    "alphas": [0.0002, 0.001, 0.006],
    "profile": "quick",
}
#: What it sets beyond that in single notebooks; a vision transformer cuts patches of 14 pixels.
_DINO = {"image_size": 42, "learning_rate": 0.001}
_RESNET = {"image_size": 32}
_EFFICIENTNET = {"image_size": 56, "batch_size": 16, "augmentation_strength": 0.5}
_HARDEN = {"num_epochs": 3}
QUICK_NOTEBOOK: dict[str, dict[str, Any]] = {
    "dino_v2_model": _DINO | {"n_trials": 2},
    "dino_v2_model_atk": _HARDEN | _DINO | {"num_epochs": 2, "learning_rate": 0.0005},
    "resnet_model": _RESNET,
    "resnet_model_atk": _HARDEN | _RESNET | {"learning_rate": 0.001},
    "efficientnet_model": _EFFICIENTNET | {"num_epochs": 8, "learning_rate": 0.003},
    "efficientnet_model_atk": _HARDEN | _EFFICIENTNET | {"learning_rate": 0.002},
    "results": {
        "epsilons": [0, 3 / 255],
        "attacked_rules": [],
        "vote_suite": "smoke",
        "vote_images": 4,
        "panel_images": 0,
    },
}


@dataclass(frozen=True)
class Order:
    """What ``python -m utils reproduce`` is asked for.

    Attributes:
        profile: quick shows that everything works; full trains and attacks at full size.
        models: names of the model notebooks, such as resnet; without it all.
        data: folder, archive, Kaggle handle, phantom, or a folder of prepared *_set.pt; without it phantom, or with
            --profile full what dataset/dataset_variables holds.
        skip_results: leave results.ipynb and attack_atlas.ipynb out.
        only_results: run results.ipynb alone, on models trained before.
        split: of data that are not prepared yet; without it patient.
        out: folder of notebooks, figures and weights; without it quick_run/, or with --profile full the repository.
        set: parameters of the notebooks as NAME=VALUE, such as num_epochs=20 or Epsilon=2/255.
        set_atk: the same, for the hardening notebooks only.
        jobs: notebooks that run at once and share the CPU threads; without it 1, or with --profile quick one a model.
    """

    profile: Literal["quick", "full"] = "quick"
    models: tuple[str, ...] = ()
    data: str | None = None
    skip_results: bool = False
    only_results: bool = False
    split: Literal["patient", "published", "random"] | None = None
    out: Path | None = None
    set: tuple[str, ...] = ()
    set_atk: tuple[str, ...] = ()
    jobs: int | None = None

    def filled(self) -> Order:
        """The same with a folder and a number of jobs where they were left out."""
        quick = self.profile == "quick"
        folder = QUICK_FOLDER if self.out is None and quick else self.out
        at_once = max(1, min(len(self.models or model_notebooks()), os.cpu_count() or 1)) if quick else 1
        return replace(
            self,
            out=folder.expanduser().resolve() if folder else None,
            jobs=at_once if self.jobs is None else self.jobs,
        )


def model_notebooks() -> dict[str, list[Path]]:
    """Model name -> its notebooks in the order in which they must run."""
    found = {}
    for path in sorted((ROOT / "models").glob("*_model.ipynb")):
        name = path.name.removesuffix("_model.ipynb")
        attack = path.with_name(f"{name}_model_atk.ipynb")
        found[name] = [path, *([attack] if attack.is_file() else [])]
    return found


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Names and values of the cells tagged ``parameters``: what a reader changes, and all others.

    Raises:
        ValueError: the notebook has no such cell, or one assigns a name twice or anything but constants.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        raise ValueError("expected a cell tagged 'parameters', found none")
    values: dict[str, Any] = {}
    for node in ast.parse("\n".join(cell.source for cell in cells)).body:
        if not isinstance(node, ast.Assign) or any(isinstance(n, ast.Call | ast.Attribute) for n in ast.walk(node)):
            raise ValueError(f"the parameters cell may only assign constants, not: {ast.unparse(node)}")
        again = [name.id for name in node.targets if isinstance(name, ast.Name) and name.id in values]
        if again:
            raise ValueError(f"the parameters cells assign {again[0]} twice, so that one of its values would not count")
        exec(compile(ast.Module([node], []), "parameters", "exec"), {}, values)  # constants only, checked above
    return values


def plan(order: Order) -> list[tuple[Path, dict[str, Any]]]:
    """Notebooks to run, each with its parameters.

    Raises:
        ValueError: an unknown model, options that exclude each other, or a ``--set`` name that no chosen notebook has.
    """
    available = model_notebooks()
    models = [] if order.only_results else list(order.models) or list(available)
    if order.only_results and (order.models or order.skip_results):
        raise ValueError("--only-results leaves neither models to run nor results to skip")
    unknown = [name for name in models if name not in available]
    if unknown:
        raise ValueError(f"no notebooks for {', '.join(unknown)}; available: {', '.join(available)}")
    shared: dict[str, Any] = dict(QUICK) if order.profile == "quick" else {}
    quick: dict[str, dict[str, Any]] = QUICK_NOTEBOOK if order.profile == "quick" else {}
    split = order.split or "patient"
    shared |= {"profile": order.profile, "out_dir": str(order.out) if order.out else "", "split": split}
    shared["ratios"] = list(DEFAULT_RATIOS[split])
    whole("--jobs", order.jobs, 1)
    if order.out and order.out.exists() and not order.out.is_dir():
        raise ValueError(f"--out {order.out} is a file; give a folder")
    chosen, chosen_atk = (dict(map(_assigned, texts)) for texts in (order.set, order.set_atk))
    steps = []
    data = _data(order)
    if prepared(data):
        shared["data_dir"] = str(Path(data).resolve())
    else:
        check_source(data)
        shared["source"] = str(Path(data).resolve()) if Path(data).exists() else data
        steps.append((ROOT / "dataset" / "prepare_dataset.ipynb", shared | chosen))
    if order.only_results and steps:
        raise ValueError(f"--only-results needs the data that the models were trained on, not {data}")
    for name in models:
        for path in available[name]:
            attacks = path.stem.endswith("_atk")
            steps.append((path, shared | quick.get(path.stem, {}) | chosen | (chosen_atk if attacks else {})))
    if RESULTS.is_file() and not order.skip_results:
        steps.append((RESULTS, shared | quick.get(RESULTS.stem, {}) | chosen))
    # at full size it is an hour and a half of its own, and a command: python -m utils atlas
    drawn = (order.profile, data, split) == ("quick", "phantom", "patient")
    if ATLAS.is_file() and drawn and ATLAS_OF in models and not order.skip_results:
        steps.append((ATLAS, shared | chosen))
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


def _data(order: Order) -> str:
    if order.data == "":
        raise ValueError("--data is empty; give a path, a Kaggle handle or phantom")
    data = order.data or ("phantom" if order.profile == "quick" else str(DATASET_VARIABLES))
    if not order.data and order.profile == "full" and not prepared(data):
        raise ValueError(f"no prepared data in {DATASET_VARIABLES}; say with --data where the images are")
    if order.split and prepared(data):
        raise ValueError(f"{data} is split already; leave out --split, or give the images as --data")
    return data


def _check_setting(label: str, name: str, value: Any, known: dict[str, Any]) -> None:
    """Refuse now what would stop a notebook after hours."""
    if name in _OPTIONS:
        raise ValueError(f"{label}: use {_OPTIONS[name]} instead")
    if name not in known:
        raise ValueError(f"{label}: no chosen notebook has this parameter; known: {', '.join(sorted(known))}")
    default = known[name]
    kinds: Any = {bool: bool, int: int, float: (int, float), list: (list, tuple), str: (str, int)}[type(default)]
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
    if values.get("image_size"):  # 0 leaves it to the device
        whole("image_size", values["image_size"], 32)
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
