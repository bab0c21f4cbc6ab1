"""Records of trained models, and the tables that are made from them and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from models.def_models import BACKBONES, MRIClassifier
from utils.core.parts import plain
from utils.core.paths import write_json
from utils.core.radii import radius_label
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataFacts, DataSplits
from utils.data.workspace import Workspace
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.ensemble import Vote
from utils.evaluation.metrics import Levels
from utils.training.checkpoints import (
    RECORD,
    checkpoint_folder,
    clear_resume_state,
    hold,
    load_checkpoint,
    read_record,
    save_checkpoint,
)
from utils.training.config import TrainConfig
from utils.training.loop import TrainResult
from utils.training.objectives import Standard
from utils.training.record import (
    SCHEMA,
    Environment,
    MemberTraining,
    ModelRecord,
    Record,
    RuleScores,
    VoteFacts,
    VoteRecord,
    parse_record,
)

ENSEMBLE = "Ensemble"
HARDENED = "_atk"


def save_trained(
    model: MRIClassifier,
    folder: Path,
    *,
    splits: DataSplits,
    result: TrainResult,
    config: TrainConfig,
    objective: Standard | None = None,
    start: str = "scratch",
    note: str = "",
    specification: Mapping[str, Any] | None = None,
) -> ModelRecord:
    """Write weights and record of a finished training, and drop its resume state.

    Args:
        start: where the weights came from: ``scratch``, ``pretrained`` or a path, which is recorded by its
            name alone if it is absolute.
        note: what must be said wherever the numbers are shown.
        specification: plain settings that are not in ``config`` or ``objective``, by which the run is known again.

    Returns:
        the record.

    Raises:
        BlockingIOError: another process is training into ``folder``.
    """
    record = {
        "classes": splits.classes,
        "data": splits.info,
        "note": note,
        "training": {
            "objective": (objective or Standard()).as_dict(),
            "config": config.as_dict(),
            "start": Path(start).name if Path(start).is_absolute() else start,
            "best_epoch": result.best_epoch,
            "selected_by": result.selected_by,
            "seconds": result.seconds,
            "history": result.history,
            **({"specification": dict(specification)} if specification else {}),
        },
        "environment": environment_facts(),
    }
    with hold(folder):
        save_checkpoint(model, record, folder)
        # until both files are in place, the same training can be started again and finishes them
        clear_resume_state(folder)
    return read_model_record(folder)


def read_model_record(folder: str | Path) -> ModelRecord:
    """The record of a trained model.

    Raises:
        FileNotFoundError, ValueError: see :func:`utils.training.checkpoints.read_record`; also that of a vote.
    """
    record = read_record(folder)
    if isinstance(record, VoteRecord):
        raise ValueError(f"{folder} holds the record of a vote, not of a model")
    return record


def update_record(folder: Path, **entries: Any) -> ModelRecord | VoteRecord:
    """Add or replace entries of a checkpoint's record, and return it.

    Args:
        entries: parts of a record (see :mod:`utils.training.record`) as types or as plain values.

    Raises:
        ValueError: an entry is none; the file is as it was.
    """
    path = checkpoint_folder(folder) / RECORD
    changed = read_record(folder).plain() | {name: plain(value) for name, value in entries.items()}
    record = parse_record(changed | {"schema_version": SCHEMA}, path)
    write_json(path, record.plain())
    return record


def check_against_record(metrics: Levels, record: Record) -> None:
    """Make sure that a loaded model still scores what its record says.

    Half a point is allowed, because other hardware rounds otherwise. A record over another number
    of images cannot be compared and passes.

    Raises:
        ValueError: it does not; the message gives both numbers.
    """
    found, stored = metrics.image, (record.test or metrics).image
    if found and stored and found.n == stored.n and abs(found.accuracy - stored.accuracy) > 0.005:
        raise ValueError(
            f"this model scores {found.accuracy:.2%} on the test images, but its record says "
            f"{stored.accuracy:.2%}: the weights or the data are not those of the record. Train it again."
        )


def parameter_table(model: MRIClassifier) -> pd.DataFrame:
    """Trainable and frozen parameters of each block, in millions."""
    backbone = BACKBONES[model.backbone_name]
    parts = {f"block {number}": block for number, block in enumerate(model.blocks, start=1)}
    parts["head"] = model.backbone.get_submodule(backbone.head)
    rows = {}
    for name, part in parts.items():
        counts = {True: 0, False: 0}
        for parameter in part.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        rows[name] = {"trainable (M)": counts[True] / 1e6, "frozen (M)": counts[False] / 1e6}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.loc["total"] = table.sum()
    return table.round(3)


def score_table(metrics: Levels) -> pd.DataFrame:
    """What :func:`utils.evaluation.metrics.evaluate` found, images and patients side by side."""
    shown = {
        "n": "n",
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced accuracy",
        "macro_f1": "macro F1",
        "auroc": "AUROC (macro, one against the rest)",
        "calibration_error": "calibration error",
    }
    columns = {}
    for level in ("image", "patient"):
        found = metrics.of(level)
        if found:
            column = {label: getattr(found, key) for key, label in shown.items()}
            column |= {f"recall {name}": value for name, value in found.recall.items()}
            columns[f"by {level}"] = column
    return pd.DataFrame(columns).map(_readable)


def _readable(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return str(int(value)) if value > 1 else f"{value:.3f}"


def robustness_table(curves: Mapping[str, RobustnessCurve]) -> pd.DataFrame:
    """Robust accuracy in percent, a row a radius, a column a curve."""
    columns = {
        display_name(name): pd.Series([100 * value for value in curve.robust_accuracy], index=curve.epsilons)
        for name, curve in curves.items()
    }
    table = pd.DataFrame(columns).sort_index().round(1)
    table.index = list(map(radius_label, table.index))
    return table.rename_axis("eps")


def title_of(record: Record) -> str:
    """Folder name of the model that a record describes."""
    if not isinstance(record, ModelRecord):
        return ENSEMBLE
    return BACKBONES[record.model.backbone].title + (HARDENED if record.trained.objective.hardens else "")


def known_titles() -> list[str]:
    """Folder names of all models, each clean one before its hardened twin, and of the vote."""
    return [backbone.title + suffix for backbone in BACKBONES.values() for suffix in ("", HARDENED)] + [ENSEMBLE]


def display_name(title: str) -> str:
    """A folder name, or a text with such names, in words for figures and tables.

    >>> display_name("ResNet34_atk"), display_name("PGD-20 from DINOv2_atk")
    ('ResNet34, hardened', 'PGD-20 from DINOv2, hardened')
    """
    return re.sub(rf"{HARDENED}\b", ", hardened", title)


def trained_models(workspace: Workspace) -> dict[str, ModelRecord]:
    """Title -> record of every trained model of a workspace, each clean one before its hardened twin."""
    titles = known_titles()[:-1]
    found = [title for title in titles if (workspace.checkpoint(title) / RECORD).is_file()]
    return {title: read_model_record(workspace.checkpoint(title)) for title in found}


def comparison_table(records: Mapping[str, Record | RuleScores]) -> pd.DataFrame:
    """A row a model: test images, accuracies in percent, and robust accuracy a column for each attack and radius.

    Args:
        records: name -> record with ``test`` and ``robustness``.

    Raises:
        ValueError: a record has no attack results, or they are over another number of images than the others'.
    """
    rows, counts = {}, {}
    for name, record in records.items():
        if not record.robustness or record.test is None or record.test.image is None:
            raise ValueError(f"the record of {name} has no attack results; run its _atk notebook to the end")
        image, patient = record.test.image, record.test.patient
        counts[name] = image.n
        row = {"clean": image.accuracy, "clean, balanced": image.balanced_accuracy}
        row["clean, by patient"] = patient.accuracy if patient else float("nan")
        for attack, curve in sorted(record.robustness.items()):
            for eps, value in zip(curve.epsilons, curve.robust_accuracy):
                if eps:
                    row[f"{attack}, {radius_label(eps)}"] = value
        rows[name] = row
    if len(set(counts.values())) > 1:
        raise ValueError(f"these results are over different numbers of test images: {counts}; attack them all again")
    table = (100 * pd.DataFrame.from_dict(rows, orient="index")).round(1)
    table.insert(0, "images", list(counts.values()))
    return table.rename(index=display_name)


def load_members(workspace: Workspace, titles: list[str], **fits: Any) -> dict[str, MRIClassifier]:
    """Trained models by title, in eval mode; ``fits`` as in :func:`utils.training.checkpoints.load_checkpoint`."""
    return {title: load_checkpoint(workspace.checkpoint(title), **fits)[0] for title in titles}


def load_vote(workspace: Workspace, record: VoteRecord, **fits: Any) -> Vote:
    """The vote that a record of :func:`save_vote` describes, from its members' checkpoints."""
    vote = record.vote
    members = load_members(workspace, vote.members, **fits)
    return Vote(list(members.values()), rule=vote.rule, weights=vote.weights.get(vote.rule))


def save_vote(
    workspace: Workspace,
    *,
    splits: DataSplits,
    rule: str,
    members: Mapping[str, ModelRecord],
    rules: Mapping[str, RuleScores],
    weights: list[float],
    note: str = "",
) -> VoteRecord:
    """Write the record of the votes over ``members`` and return it.

    Args:
        rule: the vote that counts as the ensemble, chosen before its test scores were seen.
        members: title -> record.
        rules: rule -> ``test`` and ``robustness`` of that vote.
        weights: of the members in the weighted vote.
    """
    curves = {f"{title}, {name}": curve for title, own in members.items() for name, curve in own.robustness.items()}
    curves |= {
        f"{other} vote, {name}": curve
        for other, found in rules.items()
        for name, curve in found.robustness.items()
        if other != rule
    }
    training = {
        title: MemberTraining(history=own.trained.history, best_epoch=own.trained.best_epoch)
        for title, own in members.items()
    }
    vote = VoteFacts(
        rule=rule,
        members=list(members),
        weights={"weighted": weights},
        rules=dict(rules),
        training=training,
        robustness={name: curve for name, curve in curves.items() if "PGD" in name},
    )
    path = workspace.checkpoint(ENSEMBLE) / RECORD
    record = VoteRecord(
        schema_version=SCHEMA,
        vote=vote,
        classes=splits.classes,
        data=DataFacts(**splits.info),
        note=note,
        test=rules[rule].test,
        robustness=rules[rule].robustness,
        worst_case=rules[rule].worst_case,
        environment=Environment(**environment_facts()),
    )
    write_json(path, record.plain())
    return record
