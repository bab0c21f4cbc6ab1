"""Tables of the README and the model card, made from the repository's records: ``python -m utils pages``.

Where one stands, :mod:`utils.reporting.page_text` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from utils.core.parts import read_part
from utils.core.paths import ROOT, read_json
from utils.core.radii import NORM_SIGNS, radius_label
from utils.evaluation.intervals import binary_caption
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.atlas.chapters import read_chapter
from utils.experiments.budget import ENCODERS, describe_start
from utils.experiments.fold_records import FoldsSummary
from utils.experiments.recipe_records import RecipesSummary
from utils.experiments.recipe_summary import COLUMNS
from utils.experiments.recipe_summary import summary_table as recipes_summary
from utils.experiments.records import display_name, known_titles, title_of
from utils.reporting.atlas_tables import ATLAS_TABLES, vote_table
from utils.reporting.benchmark_tables import (
    attack_speed_table,
    attention_speed_table,
    bad_scans_table,
    gate_attacked_table,
    gate_table,
    heads_table,
    large_set_table,
    leak_table,
    memory_table,
    near_training_table,
    signal_table,
    training_speed_table,
)
from utils.reporting.combinations import combinations_table
from utils.reporting.fold_tables import by_patient_table, folds_table, gains_table, hardening_gains_table
from utils.reporting.markdown import data_and_protocol, markdown
from utils.reporting.page_text import BLOCK, check_markers
from utils.reporting.price import price_sentences
from utils.reporting.robustness_figures import (
    HEADLINE_EPS,
    column_of,
    headline_table,
    question_table,
    recall_table,
    summary_table,
    worst_cases,
)
from utils.training.checkpoints import RECORD
from utils.training.record import ModelRecord, Record, VoteRecord, read_record_file

AnyRecord = Record | SuiteRecord
_IN_WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "calibration_error": "calibration error (less is better)",
}
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "assets/RESULTS.md",
        "assets/ATLAS.md",
        "benchmarks/README.md",
        "checkpoints/MODEL_CARD.md",
        "dataset/README.md",
    )
)


def recipes_table(summary: RecipesSummary) -> str:
    """What :mod:`utils.experiments.recipes` found, with how many images, patients and attacks that was."""
    table = recipes_summary(summary).drop(columns="minutes")
    rows = [[name, *map(str, row)] for name, row in zip(table.index, table.to_numpy())]
    said = "baselines on all test images. *: chosen on validation patients"
    return markdown(["hardening", *table.columns], rows) + f"\n{_budget(summary)}; {said}.\n"


def _budget(summary: RecipesSummary) -> str:
    budget = summary.budget
    return (
        f"{describe_start(summary)}, {summary.data.split_name}: "
        f"{budget.clean_epochs} epochs without attack, then {budget.epochs} of hardening at "
        f"{radius_label(budget.eps)} with {budget.train_steps} steps; {summary.n_images} test images of "
        f"{summary.n_subjects} patients; worst case in L∞ of {', '.join(summary.attacks)}; %, mean ± standard "
        "deviation over seeds"
    )


def trainable_table(summaries: Sequence[RecipesSummary]) -> str:
    """One backbone trained in more or fewer blocks: a summary of :mod:`utils.experiments.recipes` for each part."""
    order, names = {"head": 0, "all": 2}, {"head": "the head", "all": "everything"}
    columns = ["seeds", *(name for name in COLUMNS if not name.startswith("patient AUROC, 1"))]
    rows = []
    for summary in sorted(summaries, key=lambda one: order.get(str(one.budget.trainable), 1)):
        part = str(summary.budget.trainable)
        table = recipes_summary(summary)[columns].head(len(summary.variants))
        cells = [[title.removesuffix(" *"), *map(str, row)] for title, row in zip(table.index, table.to_numpy())]
        rows += [[names.get(part, f"the last {part} blocks"), *own] for own in cells]
    return markdown(["trained", "hardening", *columns], rows) + f"\n{_budget(summaries[0])}.\n"


def headline(records: Sequence[AnyRecord]) -> str:
    """All models and, where the vote's record holds them, the baselines: the numbers that come first."""
    worst = _worst(records)
    votes = [record for record in records if isinstance(record, VoteRecord)]
    baselines = next((record.baselines for record in votes if record.baselines), None)
    questions = sorted({binary_caption(record.metrics[0]) for record in worst.values()})
    said = f"AUROC is by patient, {' or '.join(questions)}"
    said += "; the lowest rows are baselines on the same test images" if baselines else ""
    return _of_frame(headline_table(worst, baselines), "model") + _attacks(worst, said)


def price(records: Sequence[AnyRecord]) -> str:
    """What hardening and voting cost, as a list of sentences."""
    return "".join(f"- {sentence}\n" for sentence in price_sentences(_titled(records)))


def trained(records: Sequence[AnyRecord]) -> str:
    """How each model was trained."""
    rows = {display_name(title): _training(record) for title, record in _models(records).items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return _of_frame(table, "model") + f"\n{data_and_protocol(records)}; {_trained_on(records)}.\n"


def _models(records: Sequence[AnyRecord]) -> dict[str, ModelRecord]:
    titled = _titled(records).items()
    return {title: record for title, record in titled if isinstance(record, ModelRecord) and record.training}


def _trained_on(records: Sequence[AnyRecord]) -> str:
    """The machine of all models, or each machine with its models."""
    machines: dict[str, list[str]] = {}
    for title, record in _models(records).items():
        hardware = record.environment.hardware if record.environment else "unknown"
        machines.setdefault(hardware, []).append(display_name(title))
    if len(machines) == 1:
        return next(iter(machines))
    return "; ".join(f"{', '.join(titles)}: {machine}" for machine, titles in machines.items())


def _training(record: ModelRecord) -> dict[str, Any]:
    own = record.trained
    objective, config = own.objective, own.config
    decay = f", x {config.layer_decay} a block" if config.layer_decay != 1 else ""
    return {
        "input": f"{record.model.image_size} px",
        "begins with": ENCODERS.get(Path(own.start).name, own.start),
        "attack": f"{radius_label(objective.eps)}, {_steps(objective.steps)}" if objective.hardens else "none",
        "epoch kept": f"{own.best_epoch + 1} of {len(own.history)}",
        "learning rate": f"{config.learning_rate:.2g}{decay}",
        "precision": config.precision,
        "seed": config.seed,
        "minutes": f"{own.seconds / 60:.0f}",
    }


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def worst_case_table(records: Sequence[AnyRecord]) -> str:
    """Robust accuracy of all models at every radius."""
    worst = _worst(records)
    return _of_frame(summary_table(worst), "model") + _attacks(worst)


def suites_table(records: Sequence[SuiteRecord]) -> str:
    """What several suites leave of the same images: a row a model, the suites beside each other at each radius.

    Raises:
        ValueError: suites of other images or radii among them.
    """
    epsilons, counts = records[0].curve.epsilons, records[0].curve.n_images
    if any(one.curve.epsilons != epsilons or one.curve.n_images != counts for one in records):
        raise ValueError("these suites were not run on the same images at the same radii")
    by_suite: dict[str, dict[str, SuiteRecord]] = {}
    for record in records:
        by_suite.setdefault(record.suite or "notebooks", {})[record.title] = record
    header = ["model", "no attack", *(f"{radius_label(eps)}, {suite}" for eps in epsilons[1:] for suite in by_suite)]
    rows = []
    for title in sorted({record.title for record in records}, key=known_titles().index):
        own = [suite[title].curve.robust_accuracy if title in suite else None for suite in by_suite.values()]
        clean = next(shares[0] for shares in own if shares)
        cells = [shares[step] if shares else None for step in range(1, len(epsilons)) for shares in own]
        rows.append([display_name(title), *("-" if cell is None else f"{100 * cell:.1f}" for cell in (clean, *cells))])
    made = "; ".join(f"{suite}: {_names(next(iter(own.values())))}" for suite, own in by_suite.items())
    whom = f"the same {counts} test images of {records[0].curve.n_subjects} patients"
    return markdown(header, rows) + f"\n{data_and_protocol(records)}; robust accuracy (L∞) on {whom}, %; {made}.\n"


def _names(record: SuiteRecord) -> str:
    return ", ".join(display_name(one.title) for one in record.curve.attacks)


def recalls(records: Sequence[AnyRecord]) -> str:
    """Recall of each class without attack and at 1/255."""
    worst = _worst(records)
    return _of_frame(recall_table(worst), "model") + _attacks(worst, unit="%")


def questions(record: AnyRecord) -> str:
    """Four, three and two classes, by image and by patient, of one model, at the radii of the headline, or at all."""
    worst = _worst([record])
    table = question_table(next(iter(worst.values()))).reset_index()
    radii = {column_of(eps) for eps in HEADLINE_EPS}
    shown = (table[table["eps"].isin(radii)] if radii <= set(table["eps"]) else table).rename(columns=_IN_WORDS)
    return markdown(list(shown.columns), shown.astype(str).to_numpy().tolist()) + _attacks(worst)


def vote(record: AnyRecord) -> str:
    """A vote under each attack alone and under all, of its own record or of a suite's."""
    return vote_table(next(iter(_worst([record]).values())))


def sweeps(records: Sequence[Record]) -> str:
    """Robust accuracy of all models under each attack of the notebooks alone, a column a radius."""
    rows, counts = {}, set()
    for title, record in _titled(records).items():
        for attack, curve in sorted(record.robustness.items()):
            counts.add(f"{curve.n_images} test images of {curve.n_subjects} patients")
            rows[f"{display_name(title)}, {attack}"] = {
                level: f"{100 * value:.1f}" for level, value in zip(curve.labels, curve.robust_accuracy)
            }
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("-")
    return (
        _of_frame(table, "model, attack")
        + f"\n{data_and_protocol(records)}, {' or '.join(sorted(counts))}; radii in L∞; %.\n"
    )


def _worst(records: Sequence[AnyRecord]) -> dict[str, SuiteRecord]:
    """Title -> worst case, of records of models or of :mod:`utils.evaluation.robustness`."""
    titled = _titled(records)
    suites = {title: record for title, record in titled.items() if isinstance(record, SuiteRecord)}
    return suites | worst_cases({title: own for title, own in titled.items() if isinstance(own, Record)})


R = TypeVar("R", bound="Record | SuiteRecord")


def _titled(records: Sequence[R]) -> dict[str, R]:
    """Title -> record, in the order of all tables."""
    order = known_titles()
    named = {one.title if isinstance(one, SuiteRecord) else title_of(one): one for one in records}
    return dict(sorted(named.items(), key=lambda item: order.index(item[0])))


def _of_frame(table: pd.DataFrame, first: str) -> str:
    return markdown(
        [first, *table.columns], [[name, *map(str, row)] for name, row in zip(table.index, table.to_numpy())]
    )


def _attacks(worst: Mapping[str, SuiteRecord], said: str = "", unit: str = "%, 95 % intervals over patients") -> str:
    """Which attacks a table's worst cases are over, and on how many images."""
    by_attacks: dict[str, list[str]] = {}
    for title, record in worst.items():
        curve = record.curve
        names = "; ".join(display_name(one.title) for one in curve.attacks)
        suite = f"suite {record.suite} ({names})" if record.suite else f"the notebooks' attacks ({names})"
        over = f"{suite} on {curve.n_images} test images of {curve.n_subjects} patients"
        by_attacks.setdefault(over, []).append(display_name(title))
    most, *others = sorted(by_attacks, key=lambda over: -len(by_attacks[over]))
    parts = [most, *(f"of {', '.join(by_attacks[over])}: {over}" for over in others)]
    untargeted = [display_name(title) for title, record in worst.items() if not _targeted(record)]
    if untargeted:
        whose = "all" if len(untargeted) == len(worst) else f"those of {', '.join(untargeted)}"
        parts.append(f"no targeted attack was made, so {whose} are upper bounds, which such an attack can lower")
    parts += [said] if said else []
    norms = " or ".join(dict.fromkeys(NORM_SIGNS[record.curve.threat.norm] for record in worst.values()))
    return f"\n{data_and_protocol(list(worst.values()))}; worst case in {norms} of {'; '.join(parts)}; {unit}.\n"


def _targeted(record: SuiteRecord) -> bool:
    names = [one.title.lower() for one in record.curve.attacks]
    return any("apgd-t" in name or "autoattack" in name or "targeted" in name for name in names)


#: Tables of one record of a model or a suite, and of several of them.
_OF_A_MODEL: dict[str, Callable[[Any], str]] = {"questions": questions, "vote": vote}
_OF_MODELS: dict[str, Callable[[Any], str]] = {
    "headline": headline,
    "trained": trained,
    "worst_case": worst_case_table,
    "suites": suites_table,
    "sweeps": sweeps,
    "recalls": recalls,
    "price": price,
}
KINDS: dict[str, Callable[[Any], str]] = {
    "leak": leak_table,
    "recipes": recipes_table,
    "folds": folds_table,
    "combinations": combinations_table,
    "by_patient": by_patient_table,
    "gains": gains_table,
    "hardening_gains": hardening_gains_table,
    "signal": signal_table,
    "trainable": trainable_table,
    "attack_speed": attack_speed_table,
    "training_speed": training_speed_table,
    "attention_speed": attention_speed_table,
    "memory": memory_table,
    "gate": gate_table,
    "gate_attacked": gate_attacked_table,
    "bad_scans": bad_scans_table,
    "heads": heads_table,
    "large_set": large_set_table,
    "near_training": near_training_table,
    **_OF_A_MODEL,
    **_OF_MODELS,
    **ATLAS_TABLES,
}


def _read(kind: str, path: Path) -> Any:
    """A record as the type that a kind of table takes."""
    if kind in ("folds", "combinations", "by_patient", "gains", "hardening_gains"):
        return read_part(FoldsSummary, path, "make it again from its folds")
    if kind in ("recipes", "trainable"):
        return read_part(RecipesSummary, path, "make it again from its runs")
    if kind in ATLAS_TABLES:
        return read_chapter(path.parent, path.stem)
    if kind not in _OF_A_MODEL | _OF_MODELS:
        return read_json(path)
    if path.name == RECORD:
        return read_record_file(path)
    return read_part(SuiteRecord, path, "run the suite again")


def rebuilt(text: str, root: Path = ROOT, page: str = "the page") -> str:
    """``text`` with each of its tables made again from its record.

    Args:
        page: its name, for messages.

    Raises:
        ValueError: a marker without its other one, or badly written; a kind of table that does not exist; a record that
            does not exist, is not whole, or tells not what the table shows. The message names page and line.
    """
    check_markers(text, page)

    def replace(block: re.Match[str]) -> str:
        begin, kind, record, _, end = block.groups()
        where = f"{page}, line {1 + text.count(chr(10), 0, block.start())}, table {kind} {record}"
        try:
            return begin + _table(kind, record, root) + end
        except (LookupError, TypeError, AttributeError) as error:
            told = f"the record does not tell what the table shows ({type(error).__name__}: {error})"
            raise ValueError(f"{where}: {told}; restore it, or run again the command that made it") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error

    return BLOCK.sub(replace, text)


def _table(kind: str, record: str, root: Path) -> str:
    if kind not in KINDS:
        raise ValueError(f"no table {kind!r}; known: {', '.join(KINDS)}")
    found = []
    for pattern in record.split():
        paths = sorted(root.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"no record {pattern} in {root}")
        found += [_read(kind, path) for path in paths]
    several = kind in _OF_MODELS or "*" in record or " " in record
    return KINDS[kind](found if several else found[0])
