"""Scans that go wrong by themselves, and the worst plausible one: does hardening help or hurt?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from utils.core.parts import Part
from utils.core.reproducibility import generator
from utils.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt_slices, corrupted
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.evaluation.intervals import bootstrap_counts, interval
from utils.evaluation.metrics import illness_by_patient, predict
from utils.experiments.atlas.bench import HARDENED, PLAIN, Bench, Whom, whom
from utils.experiments.atlas.targets import Share, share

#: Corruptions among whose draws the worst is searched, and at which severity.
WORST_OF = ("bias field", "motion")
SEVERITY = 3


class Ill(Part):
    """Whether patients are ill, decided at the model's threshold: balanced error and AUROC."""

    error: float
    auroc: float | None


class Damage(Part):
    """One corruption.

    Attributes:
        by_severity: model -> at each severity.
        error: model -> mean balanced error over the severities.
        relative: hardened error over plain error, both as they are and beyond the error without corruption (MedMNIST-C,
            Di Salvo et al., 2024, arXiv:2406.17536); None where the denominator is not above 0.
        difference: mean error of hardened minus plain, with its 95 % interval over patients.
    """

    by_severity: dict[str, list[Ill]]
    error: dict[str, float]
    relative: float | None
    relative_rise: float | None
    difference: float
    interval: list[float] | None


class Worst(Part):
    """Patients that are right as they are: turned by one random scan, and by the worst of all that were tried."""

    one: Share
    worst: Share


class ScansFound(Part):
    """Without corruption, under each, and the worst plausible scan; model -> ..."""

    whom: Whom
    clean: dict[str, Ill]
    corruptions: dict[str, Damage]
    severity: int
    draws: int
    worst: dict[str, dict[str, Worst]]


def measure(bench: Bench) -> ScansFound:
    """Every corruption at every severity, and the search for the worst plausible scan."""
    clean = {name: _said(bench, name, bench.slices) for name in bench.models}
    truth = (bench.stacks.labels != bench.healthy).numpy()
    damage = {
        kind: bench.piece("scans", kind, Damage, partial(_damage, bench, kind, clean, truth))
        for kind in tqdm(CORRUPTIONS, desc="scans that go wrong", leave=False)
    }
    return ScansFound(
        whom=whom(bench),
        clean={name: _ill(said, truth, bench.thresholds[name]) for name, said in clean.items()},
        corruptions=damage,
        severity=SEVERITY,
        draws=bench.budget.draws,
        worst={
            kind: {
                name: bench.piece(
                    "scans", f"worst {kind} {name}", Worst, partial(_worst, bench, kind, name, clean[name], truth)
                )
                for name in bench.models
            }
            for kind in WORST_OF
        },
    )


def _said(bench: Bench, name: str, images: ImageSet) -> np.ndarray:
    """Probability of being ill, a patient, in the order of the stacks."""
    logits = predict(bench.models[name], images, device=bench.device)
    chances, _ = illness_by_patient(logits, images)
    order = images.subjects.unique().tolist()
    place = {subject: at for at, subject in enumerate(order)}
    return np.array([float(chances[place[subject]]) for subject in bench.stacks.subjects.tolist()])


def _ill(said: np.ndarray, truth: np.ndarray, threshold: float) -> Ill:
    from sklearn.metrics import roc_auc_score  # slow to import

    both = truth.any() and not truth.all()
    error = float(_errors(said, truth, threshold, np.ones((1, len(truth))))[0])
    return Ill(error=error, auroc=float(roc_auc_score(truth, said)) if both else None)


def _errors(said: np.ndarray, truth: np.ndarray, threshold: float, counts: np.ndarray) -> np.ndarray:
    """Balanced error over draws of patients, D, from how often each is drawn, D x P; of one side where one is there.

    NaN where a draw has nobody of a side that is there.
    """
    wrong = (said >= threshold) != truth
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = [(counts @ (wrong & side)) / (counts @ side) for side in (truth, ~truth) if side.any()]
    return np.mean(sides, axis=0)


def _damage(bench: Bench, kind: str, clean: Mapping[str, np.ndarray], truth: np.ndarray) -> Damage:
    counts = bootstrap_counts(len(truth), seed=bench.seed)
    by_severity: dict[str, list[Ill]] = {name: [] for name in bench.models}
    drawn = {name: np.zeros(len(counts)) for name in bench.models}
    for severity in SEVERITIES:
        images = corrupted(bench.slices, kind, severity, seed=bench.seed)
        for name in bench.models:
            said = _said(bench, name, images)
            by_severity[name].append(_ill(said, truth, bench.thresholds[name]))
            drawn[name] += _errors(said, truth, bench.thresholds[name], counts) / len(SEVERITIES)
    error = {name: float(np.mean([one.error for one in own])) for name, own in by_severity.items()}
    before = {name: _ill(clean[name], truth, bench.thresholds[name]).error for name in bench.models}
    rise = {name: error[name] - before[name] for name in bench.models}
    return Damage(
        by_severity=by_severity,
        error=error,
        relative=error[HARDENED] / error[PLAIN] if error[PLAIN] > 0 else None,
        relative_rise=rise[HARDENED] / rise[PLAIN] if rise[PLAIN] > 0 else None,
        # the first draw has everybody once
        difference=float(drawn[HARDENED][0] - drawn[PLAIN][0]),
        interval=interval(drawn[HARDENED] - drawn[PLAIN]),
    )


def _worst(bench: Bench, kind: str, name: str, clean: np.ndarray, truth: np.ndarray) -> Worst:
    """Among random scans of one severity the one that turns the verdict, if any does."""
    verdict, threshold = bench.verdict(name), bench.thresholds[name]
    right = (clean >= threshold) == truth
    first, ever = np.zeros(len(truth), bool), np.zeros(len(truth), bool)
    for place, subject in enumerate(bench.stacks.subjects.tolist()):
        if not right[place]:
            continue
        slices = bench.stacks.pixels(slice(place, place + 1))[0][:, None]
        scans = [
            corrupt_slices(slices, kind, SEVERITY, generator(bench.seed, "worst", kind, subject, draw))[:, 0]
            for draw in range(bench.budget.draws)
        ]
        said = predict_batch(verdict, torch.stack(scans).to(bench.device)).argmax(1).cpu().numpy().astype(bool)
        turned = said != truth[place]
        first[place], ever[place] = turned[0], turned.any()
    return Worst(one=share(int(first.sum()), int(right.sum())), worst=share(int(ever.sum()), int(right.sum())))
