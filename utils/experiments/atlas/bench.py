"""What every chapter of the atlas is measured on: a model and its hardened twin, and slices of the same patients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.attacks.suites import GRID, Threat
from utils.core.checks import whole
from utils.core.parts import Part, read_part
from utils.core.paths import write_json
from utils.core.radii import ORIGINAL_EPS
from utils.data.classes import healthy_place
from utils.data.sets import DataSplits, ImageSet
from utils.data.stacks import patient_stacks
from utils.evaluation.attack_cache import AttackCache
from utils.evaluation.by_patient import MeanOfSlices, Verdict
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.intervals import questions
from utils.evaluation.metrics import best_threshold, illness_by_patient, predict
from utils.evaluation.worst_case import OnBroken, robustness_curve

P = TypeVar("P", bound=Part)
PLAIN, HARDENED = "not hardened", "hardened"
#: L-infinity radii of the atlas.
RADII = tuple(eps for eps in GRID if eps and eps != ORIGINAL_EPS)


@dataclass(frozen=True)
class AtlasBudget:
    """How much is spent.

    Attributes:
        slices: of each patient, evenly spread.
        patients: of the test side at most, spread over the classes; 0 takes all.
        steps: of PGD.
        images: slices that the dearer chapters take, spread over patients.
        epochs: over the training slices, of one change for all.
        views: random views of each kind.
        draws: random scans among which the worst plausible one is searched.
        certified: patients who get a certificate.
        samples: noisy copies of a patient for it.
        noise_epochs: of training on noise, before it.
        radii: L-infinity radii to which a chapter's own are cut down; () takes all of them.
    """

    slices: int = 4
    patients: int = 0
    steps: int = 20
    images: int = 80
    epochs: int = 10
    views: int = 5
    draws: int = 32
    certified: int = 24
    samples: int = 1000
    noise_epochs: int = 6
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "radii":
                whole(name, value, 0 if name == "patients" else 1)

    def facts(self) -> dict[str, Any]:
        """Everything as plain values; without ``radii`` where there are all, as in records from before them."""
        counts = {name: value for name, value in asdict(self).items() if name != "radii"}
        return counts | ({"radii": list(self.radii)} if self.radii else {})


#: On phantoms, to show that everything runs; its numbers mean nothing.
QUICK = AtlasBudget(
    slices=2,
    patients=4,
    steps=1,
    images=4,
    epochs=1,
    views=1,
    draws=3,
    certified=2,
    samples=40,
    noise_epochs=1,
    radii=(1 / 255, 2 / 255, 8 / 255),
)


@dataclass(frozen=True)
class Bench:
    """Models and slices.

    Attributes:
        models: ``PLAIN`` and ``HARDENED`` -> model in eval mode.
        splits: whose training side fits what is fitted, and whose validation side chooses thresholds.
        stacks: test patients, P x S x H x W; ``slices`` are the same slices one by one.
        thresholds: of the probability of being ill, of each model.
        cache: folder for what a chapter has found so far, from which a killed one goes on; None keeps nothing.
    """

    models: Mapping[str, MRIClassifier]
    splits: DataSplits
    stacks: ImageSet
    slices: ImageSet
    thresholds: Mapping[str, float]
    budget: AtlasBudget
    seed: int
    device: torch.device
    cache: Path | None = None

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return self.splits.classes

    @property
    def healthy(self) -> int:
        """Place of the class that means healthy."""
        return healthy_place(self.classes)

    def radii(self, all_radii: Sequence[float]) -> tuple[float, ...]:
        """Those of a chapter's L-infinity radii that the budget pays for."""
        return tuple(eps for eps in all_radii if not self.budget.radii or eps in self.budget.radii)

    def few(self) -> ImageSet:
        """``budget.images`` slices, spread over patients."""
        return self.slices.balanced_subset(self.budget.images, self.seed)

    def train_slices(self) -> ImageSet:
        """As many slices of each training patient as of each test patient."""
        return flat(patient_stacks(self.splits.train, self.budget.slices))

    def verdict(self, name: str) -> Verdict:
        """A model's answer about patients: ill or not, at its threshold."""
        model = MeanOfSlices(self.models[name])
        return Verdict(model, self.healthy, self.thresholds[name]).to(self.device).eval()

    def questions(self) -> ImageSet:
        """The stacks with the labels of :meth:`verdict`: 0 healthy, 1 ill."""
        ill = (self.stacks.labels != self.healthy).long()
        return replace(self.stacks, labels=ill, classes=["healthy", "ill"])

    def attacked(
        self,
        model: nn.Module,
        images: ImageSet,
        attack: Attack | Sequence[Attack],
        epsilons: Sequence[float],
        *,
        threat: Threat | None = None,
        surrogates: Mapping[str, nn.Module] | None = None,
        batch_size: int = 64,
        on_broken: OnBroken | None = None,
        fit_on: ImageSet | None = None,
        within: torch.Tensor | None = None,
    ) -> RobustnessCurve:
        """The worst case of each image, by the evaluator that judges everything in this project.

        Args:
            threat, surrogates, batch_size, on_broken, fit_on, within: see
                :func:`utils.evaluation.worst_case.robustness_curve`.
        """
        return robustness_curve(
            model,
            images,
            attack=attack,
            epsilons=epsilons,
            threat=threat,
            surrogates=surrogates,
            seed=self.seed,
            batch_size=batch_size,
            device=self.device,
            cache=self.cache,
            on_broken=on_broken,
            fit_on=fit_on,
            within=within,
        )

    def misclassified(
        self, model: nn.Module, images: ImageSet, attack: Attack, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of right images that one attack at one radius misclassifies, ascending, and what it made of them."""
        found = [(torch.zeros(0, dtype=torch.long), images.pixels(slice(0, 0)))]
        if len(images):
            self.attacked(model, images, attack, [eps], on_broken=lambda index, made, _: found.append((index, made)))
        places = torch.cat([index for index, _ in found])
        order = places.argsort()
        return places[order], torch.cat([made.cpu() for _, made in found])[order].to(self.device)

    def pieces(self, section: str) -> AttackCache:
        """What a run of a chapter that did not end has left."""
        return AttackCache(self.cache, {"chapter": self.facts(section)})

    def piece(self, section: str, name: str, kind: type[P], measure: Callable[[], P]) -> P:
        """A piece of a chapter that the evaluator does not keep: from a run that did not end, or measured.

        Args:
            name: of the piece, within its chapter.
        """
        folder = self.pieces(section).folder
        if folder is None:
            return measure()
        path = folder / f"{name.replace(' ', '_')}.json"
        if path.is_file():
            return read_part(kind, path, "delete it and run this again")
        found = measure()
        write_json(path, found.plain())
        return found

    def facts(self, section: str) -> dict[str, Any]:
        """Everything that a chapter's numbers depend on, as plain values."""
        return {
            "section": section,
            "budget": self.budget.facts(),
            "seed": self.seed,
            "fingerprint": self.splits.fingerprint,
            "models": {name: model.backbone_name for name, model in self.models.items()},
            "image_size": next(iter(self.models.values())).image_size,
            "weights": {name: weights_digest(model) for name, model in self.models.items()},
        }


class Whom(Part):
    """On whom a chapter was measured, for captions; ``healthy`` and ``others`` are what the two sides are called."""

    patients: int
    slices: int
    ill: int
    healthy: str = "Non"
    others: str = "demented"


def flat(stacks: ImageSet) -> ImageSet:
    """The slices of stacks P x S x H x W one by one, (P * S) x 1 x H x W, a patient's after each other."""
    patients, slices = stacks.images.shape[:2]

    def each(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(slices)

    return ImageSet(
        stacks.images.flatten(0, 1)[:, None],
        each(stacks.labels),
        each(stacks.subjects),
        torch.arange(slices).repeat(patients),
        each(stacks.synthetic),
        [path for path in stacks.paths for _ in range(slices)],
        stacks.classes,
        stacks.info,
    )


def weights_digest(model: nn.Module) -> str:
    """Sixteen digits that change with any weight."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def open_bench(
    models: Mapping[str, MRIClassifier],
    splits: DataSplits,
    *,
    budget: AtlasBudget | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Bench:
    """Choose the slices and each model's threshold.

    Args:
        models: ``PLAIN`` and ``HARDENED`` -> model, of the classes of ``splits``.
        splits: by patient.
        budget: None takes the full one.
        seed: of every draw.
        cache: see :class:`Bench`.

    Raises:
        ValueError: other models, a split that is not by patient, or classes of which none means healthy.
    """
    if set(models) != {PLAIN, HARDENED}:
        raise ValueError(f"the atlas compares two models, {PLAIN} and {HARDENED}, not {', '.join(models) or 'none'}")
    if splits.info["protocol"] != "patient":
        raise ValueError(f"the atlas asks about patients; prepare with --split patient, not {splits.info['protocol']}")
    healthy_place(splits.classes, ", and the atlas asks who is ill")
    budget, place = budget or AtlasBudget(), torch.device(device)
    stacks = patient_stacks(splits.test, budget.slices)
    if budget.patients and budget.patients < len(stacks):
        stacks = stacks.subset(spread(stacks.labels, budget.patients))
    ready = {name: model.to(place).eval().requires_grad_(False) for name, model in models.items()}
    thresholds = {name: _threshold(model, splits.validation, place) for name, model in ready.items()}
    return Bench(ready, splits, stacks, flat(stacks), thresholds, budget, seed, place, cache)


def spread(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Places of ``count`` patients, the classes in turn."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        own = labels == label
        rank[own] = torch.arange(int(own.sum()))
    return torch.argsort(rank, stable=True)[:count].sort().values


def _threshold(model: nn.Module, validation: ImageSet, device: torch.device) -> float:
    chances, ill = illness_by_patient(predict(model, validation, device=device), validation)
    threshold = best_threshold(chances, ill) if ill.any() and not ill.all() else 0.5
    return min(max(threshold, 1e-3), 1 - 1e-3)


def whom(bench: Bench) -> Whom:
    """On whom a bench measures."""
    ill = int((bench.stacks.labels != bench.healthy).sum())
    healthy, others = questions(bench.classes).get("binary", ((bench.classes[bench.healthy], "the rest"), ()))[0]
    return Whom(patients=len(bench.stacks), slices=len(bench.slices), ill=ill, healthy=healthy, others=others)
