"""The README's tables, made from the records in the repository: ``python -m utils.readme`` writes them anew.

A table stands between ``<!-- table KIND RECORD -->`` and ``<!-- end -->``; a ``*`` in RECORD makes one of several.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.compare_recipes import COLUMNS, describe_start, summary_table
from utils.paths import ROOT, atomic_write, read_json

README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- table (\w+) (\S+) -->\n)(.*?)(<!-- end -->)", re.S)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def leak_table(record: Mapping[str, Any]) -> str:
    """Nearest neighbour on two splits, from ``leak_audit.json``."""
    rows = {
        "accuracy on the test images": "accuracy",
        "the nearest training image is of the same patient": "same_patient",
        "always answering the most frequent class": "majority",
    }
    names = {"published": "published split", "patient": "split by patient"}
    header = ["raw-pixel 1-nearest-neighbour", *(names[split["protocol"]] for split in record["splits"])]
    cells = [[label, *(f"{100 * split[key]:.1f} %" for split in record["splits"])] for label, key in rows.items()]
    return markdown(header, cells)


def recipes_table(summary: Mapping[str, Any]) -> str:
    """What :mod:`utils.compare_recipes` found, with how many images, patients and attacks that was."""
    table = summary_table(summary).drop(columns="minutes")
    rows = [[name, *map(str, row)] for name, row in zip(table.index, table.to_numpy())]
    said = "baselines on all test images. *: chosen on validation patients"
    return markdown(["hardening", *table.columns], rows) + f"\n{_budget(summary)}; {said}.\n"


def _budget(summary: Mapping[str, Any]) -> str:
    budget = summary["budget"]
    return (
        f"{describe_start(summary)}, {summary['data']['protocol']} split: "
        f"{budget['clean_epochs']} epochs without attack, then {budget['epochs']} of hardening at "
        f"{255 * budget['eps']:.3g}/255 with {budget['train_steps']} steps; {summary['n_images']} test images of "
        f"{summary['n_subjects']} patients; worst case of {', '.join(summary['attacks'])}; %, mean ± standard "
        "deviation over seeds"
    )


def trainable_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One backbone trained in more or fewer of its blocks: a summary of :mod:`utils.compare_recipes` for each part."""
    order, names = {"head": 0, "all": 2}, {"head": "the head", "all": "everything"}
    columns = ["seeds", *(name for name in COLUMNS if not name.startswith("patient AUROC, 1"))]
    rows = []
    for summary in sorted(summaries, key=lambda one: order.get(one["budget"]["trainable"], 1)):
        part = summary["budget"]["trainable"]
        table = summary_table(summary)[columns].head(len(summary["variants"]))
        cells = [[title.removesuffix(" *"), *map(str, row)] for title, row in zip(table.index, table.to_numpy())]
        rows += [[names.get(part, f"the last {part} blocks"), *own] for own in cells]
    return markdown(["trained", "hardening", *columns], rows) + f"\n{_budget(summaries[0])}.\n"


def folds_table(summary: Mapping[str, Any]) -> str:
    """What :mod:`utils.cross_validate` found over all folds, beside the baselines."""
    places = {"": ("4 classes", "image", "accuracy"), ", balanced": ("4 classes", "image", "balanced_accuracy")}
    places |= {", AUROC by patient": ("binary", "patient", "auroc")}
    levels = [f"{255 * eps:.3g}/255" for eps in summary["epsilons"][1:]]
    rows = []
    for name, row in summary["rows"].items():
        attacked = row["attacked"]["metrics"][1:] if "attacked" in row else [None] * len(levels)
        cells = [_with_interval(found, *place) for found in (row["metrics"][0], *attacked) for place in places.values()]
        by_fold = np.array(row["auroc_by_fold"][0], dtype=float) * 100
        rows.append([name, *cells, f"{by_fold.mean():.1f} ± {by_fold.std():.1f}"])
    header = [f"{level}{what}" for level in ("clean", *levels) for what in places]
    budget = summary["budget"]
    said = (
        f"\n{describe_start(summary)}, {len(summary['folds'])} of {summary['data']['n_folds']} "
        f"folds, {summary['n_subjects']} patients each tested once: {summary['n_images']['test']} images without "
        f"attack, {summary['n_images']['attacked']} under the worst case of {', '.join(summary['attacks'])}; "
        f"{budget['clean_epochs']} epochs without attack, then {budget['epochs']} of hardening; %, 95 % intervals over "
        "patients.\n"
    )
    return markdown(["model", *header, "clean AUROC by fold"], rows) + said


def _with_interval(found: Mapping[str, Any] | None, question: str, level: str, metric: str) -> str:
    if found is None:
        return "-"
    own = found[question][level]
    low, high = own["interval"][metric]
    return f"{100 * own[metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def attack_speed_table(record: Mapping[str, Any]) -> str:
    """Our attacks beside the slow way, from ``benchmarks/attack_speed.json``."""
    ways = [way for way in next(iter(record["models"].values()))["rows"]["PGD-10"] if way in OWN_WAYS]
    rows = []
    for title, model in record["models"].items():
        for attack, row in model["rows"].items():
            slow = row["torchattacks" if "torchattacks" in row else "ours, every image"]
            own = [*(row[way] for way in ways), slow]
            cells = [f"{way['seconds']:.2f} s" + _memory(way) for way in own]
            cells += [" / ".join(f"{way['times_faster']:.1f}" for way in own[:-1])]
            cells += [" / ".join(f"{100 * way['robust_accuracy']:.1f}" for way in own) + " %"]
            rows.append([title, attack, *cells])
    header = ["model", "attack", *ways, "slow way", "times faster", "accuracy left"]
    images = next(iter(record["models"].values()))["images"]
    said = f"{record['data']['source']}, eps {255 * record['eps']:.3g}/255, {images['PGD-10']} images for PGD-10 and "
    return markdown(header, rows) + _machine(record, f"{said}{images['others']} for the others")


def _memory(way: Mapping[str, Any]) -> str:
    return "" if way["peak_mib"] is None else f", {way['peak_mib']:.0f} MiB"


def training_speed_table(record: Mapping[str, Any]) -> str:
    """Epochs of hardening as multiples of clean ones and of their floor, from ``benchmarks/training_speed.json``."""
    rows = []
    for title, own in record["backbones"].items():
        cells = [f"{own['times_clean'][name]:.1f} ({own['times_floor'][name]:.2f})" for name in own["times_clean"]]
        rows.append([title, f"{own['seconds']['clean']:.1f} s", *cells])
    names = list(next(iter(record["backbones"].values()))["times_clean"])
    first = next(iter(record["backbones"].values()))
    said = f"{first['train_images']} images, batches of {record['batch_size']}, {record['precision']}"
    return markdown(["backbone", "clean epoch", *names], rows) + _machine(record, said)


def _machine(record: Mapping[str, Any], said: str) -> str:
    facts = record["environment"]
    return f"\n{said}; {facts['hardware']}, torch {facts['versions']['torch']}, medians of turns in one process.\n"


#: Of those in the record; the others are slow ways.
OWN_WAYS = ("ours", "ours, bf16", "ours, compiled")
KINDS: dict[str, Callable[[Any], str]] = {
    "leak": leak_table,
    "recipes": recipes_table,
    "folds": folds_table,
    "trainable": trainable_table,
    "attack_speed": attack_speed_table,
    "training_speed": training_speed_table,
}


def rebuilt(text: str, root: Path = ROOT) -> str:
    """``text`` with each of its tables made again from its record.

    Raises:
        ValueError: a kind of table that does not exist.
        FileNotFoundError: a record that does not.
    """

    def replace(block: re.Match[str]) -> str:
        begin, kind, record, _, end = block.groups()
        if kind not in KINDS:
            raise ValueError(f"no table {kind!r}; known: {', '.join(KINDS)}")
        found = [read_json(path) for path in sorted(root.glob(record))]
        if not found:
            raise FileNotFoundError(f"no record {record} in {root}")
        return begin + KINDS[kind](found if "*" in record else found[0]) + end

    return _BLOCK.sub(replace, text)


def main() -> int:
    """Write the README anew; returns the exit status."""
    try:
        text = rebuilt(README.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    atomic_write(README, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
