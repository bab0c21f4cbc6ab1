"""What slices and models of a patient are together: mean, attention, GRU, blend and stack, each attacked as one system.

    python -m utils combine --members efficientnet_128px --data dataset/dataset_variables --out FOLDER

takes the models that ``python -m utils folds --out .../efficientnet_128px`` left in its ``--work`` folder. In each fold
heads are fitted on training patients, blends and stacks on validation patients, and every combination is attacked with
all slices of a patient changed together and the patient's verdict as the target: whether it is ill, at a threshold that
validation patients choose, or which of the classes it has. Each fold leaves a file of the form of
:class:`utils.experiments.fold_records.FoldRecord`, in which a patient stands in the place of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.attacks.suites import SUITES
from utils.core.paths import file_digest, write_json
from utils.core.reproducibility import environment_facts
from utils.data.classes import healthy_place
from utils.data.sets import DataSplits, ImageSet
from utils.data.stacks import patient_stacks
from utils.data.workspace import pick_device
from utils.evaluation.baselines import baseline_answers
from utils.evaluation.by_patient import Blend, MeanOfSlices, Stacked, Verdict
from utils.evaluation.ensemble import fit_weights
from utils.evaluation.metrics import best_threshold, merge_by_patient, predict
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.budget import Budget
from utils.experiments.fold_records import FoldData, FoldModel, FoldRecord, Whose
from utils.experiments.folds import read_fold
from utils.experiments.recipes import EPSILONS
from utils.experiments.records import read_model_record
from utils.experiments.specification import refuse_other
from utils.training.checkpoints import RECORD, WEIGHTS, belong_together, checkpoint_folder, load_checkpoint
from utils.training.pooling import fit_pool, fit_stack, fit_temperature

#: States of a fold's model, by the folder that holds it.
STATES = {"plain": "not hardened", "hardened": "hardened"}


def members_of(work: Path, names: Sequence[str], fold: int, state: str, splits: DataSplits) -> dict[str, MRIClassifier]:
    """Title -> model of a fold, of each of several experiments.

    Args:
        work: the ``--work`` folder of ``python -m utils folds``.
        names: last parts of the ``--out`` folders of the experiments.
        state: key of ``STATES``.
        splits: of :func:`utils.experiments.folds.fold_of`.

    Raises:
        FileNotFoundError: a fold has no model of one of them.
        ValueError: it was trained on other data or other folds.
    """
    found = {}
    for name, folder in member_folders(work, names, fold, state).items():
        try:
            found[name], _ = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        except ValueError as error:
            same = (
                "--n-folds, --seed and --validation-share as the run of `python -m utils folds` that made it had them"
            )
            raise ValueError(f"{error} Or give {same}.") from error
    return found


def member_folders(work: Path, names: Sequence[str], fold: int, state: str) -> dict[str, Path]:
    """Title -> folder of each member of a fold.

    Args:
        work, names, fold, state: see :func:`members_of`.

    Raises:
        FileNotFoundError: a fold has no model of one of them.
        ValueError: one of them is named twice, or has other weights than its record names.
    """
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice} is named twice; each member counts once")
    found = {name: work / name / f"fold{fold}" / state for name in names}
    for name, folder in found.items():
        remedy = (
            f"run `python -m utils folds` with --out .../{name}, which trains what is missing, once "
            f".../{name}/fold{fold}.json is moved away, if it is there"
        )
        if not (checkpoint_folder(folder) / WEIGHTS).is_file() or not (checkpoint_folder(folder) / RECORD).is_file():
            raise FileNotFoundError(f"no model in {folder}; {remedy}")
        if not belong_together(folder):
            raise ValueError(f"the weights in {folder} are not those that the record beside them names; {remedy}")
    return found


def weights_of_members(work: Path, names: Sequence[str], fold: int, state: str) -> dict[str, str]:
    """Title -> SHA-256 of the weights of each member of a fold.

    Args:
        work, names, fold, state: see :func:`members_of`.
    """
    folders = member_folders(work, names, fold, state)
    return {name: file_digest(checkpoint_folder(folder) / WEIGHTS) for name, folder in folders.items()}


def start_of_members(work: Path, names: Sequence[str], fold: int) -> str:
    """From which weights all members once began; ``folds`` where these differ."""
    starts = {read_model_record(work / name / f"fold{fold}" / "plain").trained.start for name in names}
    return starts.pop() if len(starts) == 1 else "folds"


def combinations(
    members: Mapping[str, MRIClassifier], train: ImageSet, validation: ImageSet, *, seed: int, device: torch.device
) -> dict[str, nn.Module]:
    """Name -> model of patients: of each member its mean, attention and GRU, and of several their blend and stack.

    Args:
        train, validation: of :func:`utils.data.stacks.patient_stacks`.
        seed: of the heads.
    """
    found: dict[str, nn.Module] = {}
    for name, model in members.items():
        model.to(device).requires_grad_(False)
        found[f"{name}, mean"] = MeanOfSlices(model).eval()
        for pool in ("attention", "gru"):
            label = pool if pool == "attention" else "GRU"
            found[f"{name}, {label}"] = fit_pool(model, pool, train, validation, seed=seed, device=device)
    if len(members) < 2:
        # one backbone's three readings can still be stacked
        return found | _together(list(found.values()), "its three readings", validation, device)
    means = [found[f"{name}, mean"] for name in members]
    return found | _together(means, "all", validation, device)


def _together(members: list[nn.Module], whose: str, validation: ImageSet, device: torch.device) -> dict[str, nn.Module]:
    answers = [predict(member, validation, batch_size=4, device=device) for member in members]
    shares = fit_weights(torch.stack([own.log_softmax(-1) for own in answers]), validation.labels)
    even = [1 / len(members)] * len(members)
    return {
        f"soft vote of {whose}": Blend(members, even).to(device).eval(),
        f"blend of {whose}": Blend(members, shares).to(device).eval(),
        f"stack of {whose}": Stacked(members, *fit_stack(answers, validation.labels)).to(device).eval(),
    }


def combination_specification(
    names: Sequence[str], state: str, question: str, n_slices: int, suite: str, precision: str, seed: int
) -> dict[str, Any]:
    """Everything that the folds of one combination share, as plain values."""
    told: dict[str, Any] = {"members": list(names), "state": state, "question": question}
    return told | {"n_slices": n_slices, "suite": suite, "precision": precision, "seed": seed}


def verdict_of(model: nn.Module, validation: ImageSet) -> Verdict:
    """A model of patients that only says whether somebody is ill, at the threshold that is best on validation patients.

    Args:
        validation: of :func:`utils.data.stacks.patient_stacks`, with labels of all classes.

    Raises:
        ValueError: no class is known to mean healthy, or validation patients are all ill or all healthy.
    """
    healthy = healthy_place(validation.classes)
    device = next(model.parameters()).device
    chances = 1 - predict(model, validation, batch_size=4, device=device).softmax(1)[:, healthy]
    threshold = best_threshold(chances, validation.labels != healthy)
    return Verdict(model, healthy, min(max(threshold, 1e-3), 1 - 1e-3)).to(device).eval()


def ill_or_not(stacks: ImageSet) -> ImageSet:
    """The same patients with the labels of :func:`verdict_of`: 0 healthy, 1 ill."""
    ill = (stacks.labels != healthy_place(stacks.classes)).long()
    return replace(stacks, labels=ill, classes=["healthy", "ill"])


def refuse_other_combination(
    path: Path, splits: DataSplits, wanted: Mapping[str, Any], members: Mapping[str, str]
) -> None:
    """Refuse a stored fold that is of other members, settings or data.

    Args:
        splits: the fold itself.
        wanted: of :func:`combination_specification`.
        members: of :func:`weights_of_members`; empty where there are none any more.

    Raises:
        ValueError: it is, or it is not whole; the message names it.
    """
    stored, remedy = read_fold(path), "give an --out of another name"
    told = {**stored.specification, "fingerprint": stored.data.fingerprint}
    missing = [name for name in wanted if name not in told]
    if missing:
        raise ValueError(f"{path} is no fold of a combination, it tells no {', '.join(missing)}; {remedy}")
    refuse_other(path, told, {**wanted, "fingerprint": splits.fingerprint}, remedy)
    told, now = ({f"weights of {name}": digest for name, digest in own.items()} for own in (stored.members, members))
    refuse_other(path, told, now, f"a member was trained again since; {remedy}")


def combine_fold(
    splits: DataSplits,
    *,
    work: Path,
    names: Sequence[str],
    state: str,
    question: str,
    n_slices: int,
    suite: str,
    precision: str,
    seed: int,
    target: Path,
) -> None:
    """Fit, measure and attack all combinations of one fold, and write them down.

    Args:
        splits: of :func:`utils.experiments.folds.fold_of`.
        question: ``ill``, or ``classes``: what is asked of a patient, and attacked.
        n_slices: of each patient.
        suite: key of :data:`utils.attacks.suites.SUITES`.
        precision: of the attacks' passes, see :mod:`utils.core.precision`.
        target: JSON file to write.
        work, names, state: see :func:`members_of`.
    """
    device = pick_device()
    members = members_of(work, names, splits.info["fold"], state, splits)
    train, validation, test = (patient_stacks(side, n_slices) for _, side in splits)
    models = combinations(members, train, validation, seed=seed, device=device)
    if question == "ill":
        models = {name: verdict_of(model, validation) for name, model in models.items()}
        validation, test = ill_or_not(validation), ill_or_not(test)
    found = {}
    for name, model in models.items():
        print(f"fold {splits.info['fold']}: {name}", flush=True)
        found[f"{name}, {STATES[state]}"] = _attacked(model, validation, test, suite, precision, seed, device, work)
    first, start = next(iter(members.values())), start_of_members(work, names, splits.info["fold"])
    record = FoldRecord(
        data=FoldData(**splits.info),
        specification=combination_specification(names, state, question, n_slices, suite, precision, seed),
        budget=replace(Budget(), image_size=first.image_size, max_images=len(test), suite=suite, weights=start),
        model={
            "backbone": "+".join(model.backbone_name for model in members.values()),
            "image_size": first.image_size,
        },
        seed=seed,
        epsilons=[0.0, *EPSILONS],
        attacks=[attack.title for attack in SUITES[suite]],
        classes=test.classes,
        validation=Whose.of(validation),
        test=Whose.of(test),
        attacked=Whose.of(test),
        baselines=patient_baselines(splits, ill=question == "ill"),
        models=found,
        members=weights_of_members(work, names, splits.info["fold"], state),
        environment=environment_facts(),
    )
    write_json(target, record.plain())


def patient_baselines(splits: DataSplits, *, ill: bool) -> dict[str, list[list[float]]]:
    """Name -> log-probabilities of each test patient, in the order of the stacks; a baseline reads all slices.

    Args:
        ill: of healthy and ill, else of all classes.
    """
    found = {}
    for name, logits in baseline_answers(splits).items():
        chances, _ = merge_by_patient(logits.softmax(1), splits.test)
        if ill:
            healthy = chances[:, healthy_place(splits.classes)]
            chances = torch.stack([healthy, 1 - healthy], 1)
        found[name] = chances.clamp_min(1e-9).log().tolist()
    return found


def _attacked(
    model: nn.Module,
    validation: ImageSet,
    test: ImageSet,
    suite: str,
    precision: str,
    seed: int,
    device: torch.device,
    work: Path,
) -> FoldModel:
    """What a model of patients says of validation patients, and of test patients without attack and under it."""
    held = predict(model, validation, batch_size=4, device=device)
    curve = robustness_curve(
        model,
        test,
        attack=SUITES[suite],
        epsilons=EPSILONS,
        seed=seed,
        batch_size=4,
        device=device,
        precision=precision,
        cache=work / "combine_cache",
    )
    told = {
        "training": {},
        "temperature": fit_temperature(held, validation.labels),
        "validation": held.tolist(),
        "logits": curve.logits[0].tolist(),
        "attacked": curve.logits.tolist(),
    }
    return FoldModel.model_validate(told)
