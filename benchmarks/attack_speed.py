"""Seconds of our attacks beside those of other libraries, at equal strength.

    python -m benchmarks.attack_speed --root quick_run

measures the models in ``ROOT/checkpoints`` on test images of ``ROOT/data``. All contenders get the same images, radii,
steps and restarts, take turns in one process, and the accuracy that each leaves stands beside its time: speed that is
bought by a weaker attack shows, and so does how many images went through the model. ``--rows grid`` measures a whole
evaluation, a suite at every radius of the grid. ART and Foolbox take part where ``env/requirements-benchmarks.txt`` is
installed, bfloat16 on CPUs that have it, compiled models with ``--compile``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.measure import FOLDER, Measured, bars, progress, save, take_turns, timed
from utils.attacks.attack import Attack
from utils.attacks.gradient import default_alpha, pgd
from utils.attacks.suites import GRID, SUITES
from utils.core.modes import attack_mode
from utils.core.paths import read_json, write_json
from utils.core.precision import emulates_bf16
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataSplits, ImageSet, load_splits
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.attacker import predict_batch
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import HARDENED, display_name
from utils.reporting.benchmark_tables import attack_conditions
from utils.training.checkpoints import WEIGHTS, load_checkpoint

EPS = 2 / 255
BATCH = 32
MODELS = [title + suffix for title in ("DINOv2", "EfficientNetB0", "ResNet34") for suffix in ("", HARDENED)]
OURS, BF16, FUSED, LOOP = "ours", "ours, bf16", "ours, compiled", "ours, every image"
BEST_OTHER = "torchattacks"
LIBRARIES = (BEST_OTHER, "Foolbox", "ART")
RADII = sorted(set(GRID) - {0.0})
ROWS = ("PGD-10", "PGD-50x5", "suite", "grid")
Contender = Callable[[], float]
AttackFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pgd_contenders(
    model: nn.Module,
    images: ImageSet,
    steps: int,
    restarts: int,
    device: str,
    libraries: Sequence[str],
    batch_size: int = BATCH,
) -> dict[str, Contender]:
    """Accuracy left by PGD: ours as we evaluate (only on images that still stand), ours on every image, and others."""
    attack = Attack("pgd", steps=steps, restarts=restarts, stop_when_fooled=True)
    ours = partial(pgd, model, eps=EPS, steps=steps, restarts=restarts)
    others = {LOOP: ours, **_others(model, steps, restarts, device, libraries)}
    left = {name: partial(_accuracy_left, model, images, [[run]], device, batch_size) for name, run in others.items()}
    return {**_as_evaluated(model, images, [attack], [EPS], device, batch_size), **left}


def suite_contenders(
    model: nn.Module, images: ImageSet, suite: str, epsilons: Sequence[float], device: str, batch_size: int = BATCH
) -> dict[str, Contender]:
    """Accuracy left by a suite, mean over growing radii: as we evaluate, and attack by attack on every image."""
    every = [replace(attack, stop_when_fooled=False) for attack in SUITES[suite]]
    radii = [[partial(attack, model, eps=eps) for attack in every] for eps in epsilons]
    loop = partial(_accuracy_left, model, images, radii, device, batch_size)
    return {**_as_evaluated(model, images, SUITES[suite], epsilons, device, batch_size), LOOP: loop}


def _as_evaluated(
    model: nn.Module,
    images: ImageSet,
    attacks: Sequence[Attack],
    epsilons: Sequence[float],
    device: str,
    batch_size: int = BATCH,
) -> dict[str, Contender]:
    def left(**special: Any) -> float:
        curve = robustness_curve(
            model, images, attack=attacks, epsilons=epsilons, batch_size=batch_size, device=device, **special
        )
        return mean(curve.robust_accuracy[1:])  # the first is without attack

    bf16 = {} if emulates_bf16(device) else {BF16: partial(left, precision="bf16")}
    return {OURS: left, **bf16, FUSED: partial(left, compiled=True)}


def counted(model: nn.Module, run: Contender) -> Callable[[], tuple[float, int]]:
    """``run`` that also returns how many images it sent through ``model``, compiled passes left out."""

    def both() -> tuple[float, int]:
        sizes: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        try:
            return run(), sum(sizes)
        finally:
            hook.remove()

    return both


def _accuracy_left(
    model: nn.Module, images: ImageSet, radii: Sequence[Sequence[AttackFunction]], device: str, batch_size: int
) -> float:
    """Share of images right without attack and after all attacks of a radius and of those before it, mean over radii.

    All attacks see all images.
    """
    standing = []
    for pixels, labels in images.batches(batch_size, device):
        alive = predict_batch(model, pixels).argmax(1) == labels
        for attacks in radii:
            for attack in attacks:
                alive = alive & (predict_batch(model, attack(pixels, labels).detach()).argmax(1) == labels)
            standing.append(alive)
    return torch.cat(standing).double().mean().item()


def _others(
    model: nn.Module, steps: int, restarts: int, device: str, libraries: Sequence[str]
) -> dict[str, AttackFunction]:
    """PGD of other libraries at the same radius and step size, each sample keeping a start that fooled the model."""
    alpha = default_alpha(EPS, steps)
    makers = {BEST_OTHER: _torchattacks, "Foolbox": _foolbox, "ART": _art}
    needs = {BEST_OTHER: "torchattacks", "Foolbox": "foolbox", "ART": "art"}
    return {
        name: partial(_restarted, model, make(model, steps, alpha, device), restarts)
        for name, make in makers.items()
        if name in libraries and find_spec(needs[name])
    }


def _restarted(
    model: nn.Module, attack: AttackFunction, restarts: int, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    result = attack(images, labels)
    for _ in range(restarts - 1):
        again = attack(images, labels)
        fooled = predict_batch(model, again).argmax(1) != labels
        result[fooled] = again[fooled]
    return result


def _torchattacks(model: nn.Module, steps: int, alpha: float, device: str) -> AttackFunction:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=steps)


def _foolbox(model: nn.Module, steps: int, alpha: float, device: str) -> AttackFunction:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=alpha, steps=steps, random_start=True)
    return lambda images, labels: attack(wrapped, images, labels, epsilons=EPS)[1]


def _art(model: nn.Module, steps: int, alpha: float, device: str) -> AttackFunction:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        options = {"loss": nn.CrossEntropyLoss(), "input_shape": tuple(images.shape[1:]), "clip_values": (0.0, 1.0)}
        kind = "cpu" if device == "cpu" else "gpu"
        wrapped = PyTorchClassifier(model, nb_classes=model.num_classes, device_type=kind, **options)
        sizes = {"eps": EPS, "eps_step": alpha, "max_iter": steps, "num_random_init": 1, "batch_size": BATCH}
        found = ProjectedGradientDescentPyTorch(wrapped, **sizes, verbose=False).generate(
            images.cpu().numpy(), labels.cpu().numpy()
        )
        return torch.from_numpy(found).to(images)

    return attack


def _row(found: Mapping[str, Measured], base: str) -> dict[str, Any]:
    return {
        name: {
            "seconds": own.median,
            "turns": own.seconds,
            "times_faster": found[base].median / own.median,
            "robust_accuracy": own.results[-1][0],
            "peak_mib": own.peak_mib,
            # what a compiled model sees is not counted
            "image_passes": None if name == FUSED else own.results[-1][1],
        }
        for name, own in found.items()
    }


def _taking_part(
    model: nn.Module, runs: Mapping[str, Contender], compiled: bool
) -> dict[str, Callable[[], tuple[float, int]]]:
    return {name: counted(model, run) for name, run in runs.items() if compiled or name != FUSED}


def _compile_now(model: nn.Module, images: ImageSet, device: str) -> float:
    """Seconds of compiling, before any turn as it is once for an evaluation of hours.

    Gradients, and answers without them.
    """
    warm = [Attack("pgd", steps=1, restarts=2, stop_when_fooled=True)]
    return timed(_as_evaluated(model, images, warm, [EPS], device)[FUSED])[0]


def measure_model(folder: Path, splits: DataSplits, args: argparse.Namespace) -> dict[str, Any]:
    """All comparisons on one trained model; each row is relative to the last contender that every machine has."""
    device = str(pick_device())
    model, _ = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
    model.to(device)
    compiling = _compile_now(model, splits.test.balanced_subset(2 * args.batch_size), device) if args.compile else None
    many, few = (splits.test.balanced_subset(n) for n in (args.images, args.few_images))
    suite = partial(suite_contenders, model, few, args.suite, batch_size=args.batch_size)
    against = partial(pgd_contenders, model, device=device, batch_size=args.batch_size)
    grid = f"eps {255 * RADII[0]:g} to {255 * RADII[-1]:g}/255"
    rows = {
        "PGD-10": ("PGD-10", against(images=many, steps=10, restarts=1, libraries=LIBRARIES), args.repeats, BEST_OTHER),
        "PGD-50x5": ("PGD-50x5", against(images=few, steps=50, restarts=5, libraries=[BEST_OTHER]), 0, BEST_OTHER),
        "suite": (f"suite {args.suite}", suite(epsilons=[EPS], device=device), 0, LOOP),
        "grid": (f"suite {args.suite}, {grid}", suite(epsilons=RADII, device=device), 0, LOOP),
    }
    chosen = [rows[name] for name in args.rows]
    # torchattacks leaves models in train mode, which the next contender must not meet
    with attack_mode(model):
        found = {
            title: _row(take_turns(_taking_part(model, runs, args.compile), repeats), base)
            for title, runs, repeats, base in chosen
        }
    return {
        "rows": found,
        "compile_seconds": compiling,
        "image_size": model.image_size,
        "images": {title: len(many if title == "PGD-10" else few) for title in found},
        "hardened": folder.name.endswith(HARDENED),
    }


def _once(folder: Path, splits: DataSplits, args: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure_model`, unless an interrupted benchmark of the same things has left it in ``ROOT/benchmarks``."""
    settings = {name: getattr(args, name) for name in ("rows", "images", "few_images", "suite", "repeats", "compile")}
    settings |= {"eps": EPS, "batch": args.batch_size, "threads": torch.get_num_threads(), "data": splits.fingerprint}
    facts = environment_facts() | {"created": ""}
    settings |= {"weights": (folder / WEIGHTS).stat().st_mtime_ns, "environment": facts}
    target = args.root / "benchmarks" / f"{args.name}_{folder.name}.json"
    left = read_json(target) if target.is_file() else {}
    if left.get("settings") != settings:
        left = {"settings": settings, "found": measure_model(folder, splits, args)}
        write_json(target, left)
    return left["found"]


def speed_figure(content: Mapping[str, Any]) -> Figure:
    """How many times faster than the slow way each evaluation was, by model."""
    models = content["models"]
    ratios = {
        f"{title}, against {_slow_way(row)}": {
            display_name(name).replace(", ", ",\n"): {
                who: own["rows"][title][who]["times_faster"] for who in (OURS, BF16, FUSED) if who in row
            }
            for name, own in models.items()
        }
        for title, row in next(iter(models.values()))["rows"].items()
    }
    title = "How much faster evaluations are than the slow way"
    return bars(ratios, ylabel="times faster", title=title, note=attack_conditions(content), log=True)


def _slow_way(row: Mapping[str, Any]) -> str:
    return BEST_OTHER if BEST_OTHER in row else "each attack on every image"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    models = [folder for folder in sorted((args.root / "checkpoints").glob("*")) if folder.name in args.models]
    if not models:
        print(f"error: no models {', '.join(args.models)} in {args.root / 'checkpoints'}", file=sys.stderr)
        return 1
    splits = load_splits(Workspace.open(str(args.root), data_dir=args.data).data_dir)
    found = {folder.name: _once(folder, splits, args) for folder in progress(models, "attack speed")}
    content = {"eps": EPS, "batch_size": args.batch_size, "data": splits.info, "models": found}
    save(args.name, content, speed_figure(content), args.out)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack_speed", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, required=True, help="holds checkpoints/ and data/, as quick_run does")
    add("--data", default="", help="folder of prepared *_set.pt; default: ROOT/data")
    add("--models", nargs="+", default=MODELS)
    add("--rows", nargs="+", choices=ROWS, default=ROWS[:-1], help="what to measure (default: all but the grid)")
    add("--images", type=int, default=64, help="test images of PGD-10 (default 64)")
    add("--few-images", type=int, default=16, help="of all others (default 16)")
    add("--suite", choices=SUITES, default="standard")
    add("--batch-size", type=int, default=BATCH, help=f"images a pass (default {BATCH})")
    add("--repeats", type=int, default=5, help="turns of PGD-10 (default 5); the others take one")
    add("--compile", action="store_true", help="compiled models take part as well")
    add("--name", default="attack_speed", help="of the files")
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
