"""Measure the robustness of a trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter

from utils.attacks.attack import Attack
from utils.attacks.library import LIBRARY
from utils.attacks.suites import Threat, check_suite
from utils.attacks.targets import parse_target
from utils.commands.boundary import command
from utils.core.checks import LARGEST_SEED, whole
from utils.core.parts import read_part
from utils.core.paths import check_writable, write_json
from utils.core.processes import is_main, join_others
from utils.core.radii import CHECK_EPS, GRIDS, parse_radius, radius_label
from utils.data.sets import DataSplits, load_splits
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.robustness import PANEL_IMAGES, SuiteRecord, evaluate_robustness, record_path
from utils.experiments.records import load_vote
from utils.training.checkpoints import checkpoint_folder, load_checkpoint, read_record
from utils.training.record import ModelRecord, VoteRecord

#: Of one attack, where nothing else is said.
STEPS, RESTARTS = 20, 1


@command("python -m utils robustness")
def main(
    *,
    model: str,
    data: Path | None = None,
    root: Path | None = None,
    suite: str = "standard",
    attack: str = "",
    steps: int = STEPS,
    restarts: int = RESTARTS,
    option: tuple[str, ...] = (),
    epsilons: tuple[str, ...] = (),
    norm: Literal["linf", "l2", "l0"] = "linf",
    untied: int | None = None,
    max_images: int | None = None,
    panel_images: int = PANEL_IMAGES,
    check_eps: Annotated[str | None, Parameter(alias="--panel-eps")] = None,
    batch_size: int = 64,
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    compile: bool = False,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Attack a trained model with a suite of attacks and write what is left, with intervals and gradient checks.

    Args:
        model: folder in checkpoints/, Ensemble too, or a path.
        data: folder of prepared *_set.pt; without it dataset/dataset_variables.
        root: holds checkpoints/; without it this repository.
        suite: which attacks: smoke, quick, brief, targeted, standard (to publish) or full.
        attack: one attack instead of a suite, such as ifgsm, pgd_t, MIFGSM or OnePixel; a wrong name shows all.
        steps: of that attack; queries of square; epochs over training images of universal.
        restarts: of that attack.
        option: what only that attack knows, as NAME=VALUE: target=healthy, part=ventricles, mask=FILE, images=512.
        epsilons: radii, such as 1/255 or 0.005, or L2 lengths, or numbers of pixels; without it the norm's grid.
        norm: of the radii.
        untied: attack three colour planes of this side instead of the grey image.
        max_images: attack so many test images, spread over patients; without it all.
        panel_images: images of the gradient checks; 0 leaves them out.
        check_eps: radius of the gradient checks; without it 2/255, or L2 1.
        batch_size: images a pass.
        precision: of the attacks' passes; answers count in float32.
        compile: fuse the attacks' passes first; takes a minute, pays on EfficientNet.
        seed: of the random starts.
        out: file to write; without it beside the model's record.
    """
    join_others()
    threat = Threat(norm=norm, size=untied)
    radii = [parse_radius(text, norm) for text in epsilons] or list(GRIDS[norm])
    check_radius = CHECK_EPS[norm] if check_eps is None else parse_radius(check_eps, norm)
    _check(suite, panel_images, batch_size, seed, max_images)
    workspace = Workspace.open(str(root or ""), data_dir=str(data or ""))
    folder = checkpoint_folder(model if Path(model).is_dir() else workspace.checkpoint(model))
    stored = read_record(folder)
    single = _attack(attack, steps, restarts, option, norm, stored.classes or ())
    target = out or record_path(folder, _name(attack, steps, restarts, option) if attack else suite, threat, max_images)
    _refuse_other(target, attack or suite, threat, radii, seed)
    splits, device = load_splits(workspace.data_dir), pick_device()
    classifier = _load(workspace, folder, stored, splits).to(device)
    test = splits.test.balanced_subset(max_images) if max_images else splits.test
    what = f"{single.title if single else f'suite {suite}'}, {threat.title}"
    print(f"{folder.name}, {what}, {len(test)} test images on {device}", flush=True)
    found = evaluate_robustness(
        classifier,
        test,
        suite=suite,
        attack=single,
        epsilons=radii,
        names=stored.vote.members if isinstance(stored, VoteRecord) else (),
        threat=threat,
        panel_images=panel_images,
        panel_eps=check_radius,
        seed=seed,
        batch_size=batch_size,
        device=device,
        precision=precision,
        compiled=compile,
        cache=workspace.attack_cache,
        fit_on=splits.train,
    )
    own = {"title": folder.name, "classes": splits.classes, "data": splits.info, "note": stored.note}
    if is_main():
        write_json(target, own | found.plain())
        print(target)


def _refuse_other(target: Path, suite: str, threat: Threat, radii: Sequence[float], seed: int) -> None:
    """A measurement by other attacks, at other radii or of another seed is not replaced by this one."""
    check_writable(target)
    if not target.is_file():
        return
    known = read_part(SuiteRecord, target, "delete it, or name another file with --out")
    measured, other = known.curve, [f"seed {known.seed}"] if known.seed != seed else []
    if known.suite not in (None, suite):
        other.append(f"{known.suite}")
    if measured.threat.title != threat.title:
        other.append(measured.threat.title)
    if measured.epsilons != sorted({0.0, *radii}):
        other.append(f"radii {', '.join(radius_label(eps, measured.threat.norm) for eps in measured.epsilons if eps)}")
    if other:
        raise FileExistsError(
            f"{target} holds a measurement with {' and '.join(other)}; name another file with --out, or delete it"
        )


def _check(suite: str, panel_images: int, batch_size: int, seed: int, max_images: int | None) -> None:
    """Now, and not after hours of attacks."""
    check_suite(suite)
    whole("--panel-images", panel_images, 0)
    whole("--batch-size", batch_size, 1)
    whole("--seed", seed, 0, LARGEST_SEED)
    if max_images is not None:
        whole("--max-images", max_images, 1)


def _attack(
    name: str, steps: int, restarts: int, option: Sequence[str], norm: str, classes: Sequence[str]
) -> Attack | None:
    """The attack that somebody typed; None where none was.

    Raises:
        ValueError: no such attack, one of another norm, or an option that is none of NAME=VALUE or that it does not
            take.
    """
    if not name:
        if option or (steps, restarts) != (STEPS, RESTARTS):
            raise ValueError("--option, --steps and --restarts are of one attack: name it with --attack")
        return None
    options: dict[str, Any] = {}
    for text in option:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--option must be NAME=VALUE, such as target=healthy, not {text!r}")
        options[key] = parse_target(value, classes) if key == "target" else _value(value)
    found = Attack(name, steps=steps, restarts=restarts, options=options)
    found.check_norm(norm)
    return found


def _name(attack: str, steps: int, restarts: int, option: Sequence[str]) -> str:
    """Of the file, told apart by all that was typed, also on disks that do not tell ``PGD`` from ``pgd``."""
    own = [attack, *(["torchattacks"] if attack in LIBRARY else []), str(steps)]
    own += [f"x{restarts}"] if restarts > 1 else []
    return "-".join([*own, *(re.sub(r"[^A-Za-z0-9.]+", "-", text) for text in option)])


def _value(text: str) -> Any:
    """A number, true, false, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load(workspace: Workspace, folder: Path, stored: ModelRecord | VoteRecord, splits: DataSplits) -> torch.nn.Module:
    if isinstance(stored, VoteRecord):
        return load_vote(workspace, stored, classes=splits.classes, fingerprint=splits.fingerprint)
    return load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)[0]
