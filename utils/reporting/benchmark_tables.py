"""Tables of the records in ``benchmarks/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.attacks.suites import GRID
from utils.core.radii import ORIGINAL_EPS, radius_label
from utils.data.sets import DataFacts, patients_verified
from utils.experiments.budget import ENCODERS
from utils.experiments.records import display_name
from utils.reporting.markdown import markdown


def signal_table(record: Mapping[str, Any]) -> str:
    """AUROC of simple readers by the number of patients they learnt from, from ``benchmarks/patient_signal.json``."""
    sizes = list(next(iter(record["readers"].values())))
    rows = []
    for name, found in record["readers"].items():
        values = [100 * np.array(found[size]) for size in sizes]
        rows.append([name, *(f"{own.mean():.1f} ± {own.std(ddof=1):.1f}" for own in values)])
    weights = record["encoder"]["weights"]
    said = (
        f"\n{record['n_subjects']} patients, {record['folds']} folds, {record['repeats']} times; %, mean ± standard "
        f"deviation over the times; encoder: {ENCODERS.get(weights, weights)}, {record['encoder']['image_size']} px.\n"
    )
    return markdown(["reader", *(f"{size} patients" for size in sizes)], rows) + said


def attack_speed_table(record: Mapping[str, Any]) -> str:
    """Our attacks beside the slow way, from ``benchmarks/attack_speed.json``."""
    first = next(iter(record["models"].values()))["rows"]
    ways = [way for way in next(iter(first.values())) if way in OWN_WAYS]
    rows = []
    for title, model in record["models"].items():
        for attack, row in model["rows"].items():
            slow = row["torchattacks" if "torchattacks" in row else "ours, every image"]
            own = [*(row[way] for way in ways), slow]
            cells = [f"{way['seconds']:.2f} s" + _memory(way) for way in own]
            cells += [" / ".join(f"{way['times_faster']:.1f}" for way in own[:-1])]
            cells += [" / ".join(f"{100 * way['robust_accuracy']:.1f}" for way in own) + " %"]
            rows.append([display_name(title), attack, *cells])
    header = ["model", "attack", *ways, "slow way", "times faster", "accuracy left"]
    return markdown(header, rows) + _machine(record, attack_conditions(record))


def attack_conditions(record: Mapping[str, Any]) -> str:
    """Data, radius and numbers of images of ``benchmarks/attack_speed.json``, for a note below a table or figure."""
    images = next(iter(record["models"].values()))["images"]
    numbers = ", ".join(f"{n} images for {display_name(title)}" for title, n in images.items())
    radius = "" if all("eps" in title for title in images) else f"eps {radius_label(record['eps'])}, "
    return f"{record['data']['source']}, {radius}{numbers}"


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


def attention_speed_table(record: Mapping[str, Any]) -> str:
    """Fused attention beside plain products, from ``benchmarks/attention_speed.json``."""
    rows = []
    for own in record["sizes"]:
        for precision, ratio in own["times_fused"].items():
            names = [f"{precision}, {way}" for way in ("fused", "products")]
            cells = [f"{own['seconds'][name]:.2f} s, {own['peak_mib'][name]:.0f} MiB" for name in names]
            rows.append([f"{own['image_size']} px", precision, *cells, f"{ratio:.2f}"])
    said = f"a pass of {record['batch_size']} images forward and back, gradients of images and weights"
    return markdown(["input", "precision", "fused", "products", "times faster"], rows) + _machine(record, said)


def large_set_table(record: Mapping[str, Any]) -> str:
    """Preparing a large set of drawn heads, from ``benchmarks/large_set.json``."""
    found = f"{record['patients_found']:,} of {record['people']:,}"
    row = [f"{record['images']:,}", f"{record['side']} px", found]
    row += [f"{record['seconds'] / 60:.1f} min", f"{record['peak_mib']:,.0f} MiB"]
    facts = record["environment"]
    said = f"\nnames tell nothing of the people; {facts['hardware']}, torch {facts['versions']['torch']}.\n"
    return markdown(["slices", "side", "people found from pixels", "time", "peak memory"], [row]) + said


def near_training_table(record: Mapping[str, Any]) -> str:
    """Accuracy by resemblance to a training image, from ``benchmarks/near_training_*.json``."""
    rows = []
    for title, found in record["models"].items():
        for eps, shares in found.items():
            shown = display_name(title)
            name = shown if float(eps) == 0 else f"{shown}, {radius_label(float(eps))}"
            rows.append([name, *("-" if share is None else f"{100 * share:.1f}" for share in shares)])
    data = DataFacts.model_validate(record["data"])
    header = ["model", *(f"{group['name']} (n = {group['n']})" for group in record["groups"])]
    said = "groups by the highest correlation with a training image, and by the next slices of the same patient; %"
    return markdown(header, rows) + f"\n{data.source}, {data.split_name}; {said}.\n"


def gate_table(record: Mapping[str, Any]) -> str:
    """Which images the gate refuses, as they are and attacked by somebody who knows it."""
    gate, own = record["gate"], record["gate"]["test"]
    attacked, rows = gate["attacked"], []
    for name, share in gate["refused"].items():
        after = [f"{100 * attacked['refused'][name]:.1f} %", f"{attacked['auroc'][name]:.3f}"]
        count = str(len(gate["distances"][name]))
        rows.append([name, count, f"{100 * share:.1f} %", f"{gate['auroc']['gate'][name]:.3f}", *after])
    header = ["foreign images", "n", "refused", "AUROC", "refused, attacked", "AUROC, attacked"]
    said = (
        f"\n{record['data']['source']}, {', '.join(record['volumes'])}; AUROC against {own['slices']} test slices, of "
        f"which {100 * own['slices_refused']:.1f} % are refused, and of their {own['patients']} patients "
        f"{100 * own['patients_refused']:.1f} %; attacked: {attacked['steps']} steps of PGD towards the nearest "
        f"training slice within {radius_label(attacked['foreign_radius'])} (L∞).\n"
    )
    return markdown(header, rows) + said


def gate_attacked_table(record: Mapping[str, Any]) -> str:
    """Real slices that are pushed out of the gate, and that are misclassified and accepted."""
    attacked = record["gate"]["attacked"]
    cells = [f"{100 * share:.1f}" for share in attacked["test_refused"]]
    rows = [[f"{attacked['slices']} test slices, pushed out", "refused", *cells]]
    for name, own in attacked["models"].items():
        whose = f"{display_name(name)}, {own['right']} right slices"
        wrong = [f"{100 * share:.1f}" for share in own["misclassified_and_accepted"]]
        noticed = ["-" if share is None else f"{100 * share:.1f}" for share in own["pgd_noticed"]]
        rows.append([whose, "misclassified and accepted", "-", *wrong])
        rows.append([whose, "refused, of those turned by PGD that ignores the gate", "-", *noticed])
    header = ["images", "share, %", "no attack", *map(radius_label, attacked["radii"])]
    return markdown(header, rows) + f"\n{record['data']['source']}; radii in L∞.\n"


def bad_scans_table(record: Mapping[str, Any]) -> str:
    """Which scans that went wrong the gate notices, from ``benchmarks/bad_scans.json``."""
    severities, rows = max(map(len, record["noticed"].values())), []
    for kind, shares in record["noticed"].items():
        cells = [f"{100 * share:.0f} / {100 * alone:.0f}" for share, alone in zip(shares, record["by_distance"][kind])]
        rows.append([kind, *cells, *[""] * (severities - len(cells))])
    header = ["scan", "severity 1", *map(str, range(2, severities + 1))]
    said = (
        f"\n{record['data']['source']}, {record['data']['protocol']} split; {record['patients']} test patients, "
        f"{record['slices']} slices each; % of patients who are not accepted / of those by the distance alone.\n"
    )
    return markdown(header, rows) + said


def heads_table(record: Mapping[str, Any]) -> str:
    """How like the public slices those of a whole head are, from ``benchmarks/scans.json``."""
    heads, rows = record["heads"], []
    for name, levels in heads["levels"].items():
        fit = heads["fit"].get(name)
        told = [f"{fit[key]:.3f}" for key in ("correlation", "overlap")] if fit else ["-", "-"]
        rows.append([name, f"{min(levels):.3f} to {max(levels):.3f}", *told])
    wrong = heads["wrong_turns"]
    worst = [f"at most {max(own[key] for own in wrong):.3f}" for key in ("correlation", "overlap")]
    rows.append([f"{len(wrong)} wrong turns of the head", "-", *worst])
    header = [
        "volume",
        "correlation with the mean public slice, by level",
        "with the template",
        "overlap of the brains",
    ]
    said = f"\nslices of the whole head and of its stripped copy correlate by {min(heads['agreement']):.3f} and more; "
    return markdown(header, rows) + said + f"{', '.join(record['volumes'])}.\n"


def memory_table(record: Mapping[str, Any]) -> str:
    """Peak memory of whole training processes, from ``benchmarks/whole_processes.json``."""
    found, kept = record["memory_mib"], ", kept for the backward pass"
    titles = [name.removesuffix(kept) for name in found if name.endswith(kept)]
    ways = [name.removeprefix(titles[0] + ", ") for name in found if name.startswith(titles[0] + ", ")]
    rows = [[title, *(f"{found[f'{title}, {way}']:,.0f} MiB" for way in ways)] for title in titles]
    facts = record["environment"]
    said = f"224 px, batches of 32; Python with torch alone {found['Python with torch']:,.0f} MiB, preparation of "
    said += f"{record['source']} {found['prepare']:,.0f}; {facts['hardware']}, torch {facts['versions']['torch']}"
    return markdown(["backbone", *ways], rows) + f"\n{said}.\n"


def _machine(record: Mapping[str, Any], said: str) -> str:
    facts = record["environment"]
    return f"\n{said}; {facts['hardware']}, torch {facts['versions']['torch']}, medians of turns in one process.\n"


#: Of those in the record; the others are slow ways.
OWN_WAYS = ("ours", "ours, bf16", "ours, compiled")


def leak_table(record: Mapping[str, Any]) -> str:
    """Nearest neighbour on two splits, from ``leak_audit.json``."""
    rows = {
        "accuracy on the test images": "accuracy",
        "what the classes alone give, recognising nobody": "expected",
        "the nearest training image is of the same patient": "same_patient",
        "always answering the most frequent class": "majority",
    }
    verified = patients_verified(record["data"])
    names = {"published": "published split", "random": "random split"}
    names["patient"] = "split by patient" if verified else "split by unverified patients"
    header = ["raw-pixel 1-nearest-neighbour", *(names[split["protocol"]] for split in record["splits"])]
    # audits from before this was measured do not tell what the classes alone give
    known = {label: key for label, key in rows.items() if all(key in split for split in record["splits"])}
    cells = [[label, *(_share(split[key]) for split in record["splits"])] for label, key in known.items()]
    for eps in (ORIGINAL_EPS, max(GRID)):
        label = f"accuracy, proven against every change of up to {radius_label(eps)} a pixel"
        shares = [split["certified_accuracy"][split["epsilons"].index(eps)] for split in record["splits"]]
        cells.append([label, *map(_share, shares)])
    return markdown(header, cells)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"
