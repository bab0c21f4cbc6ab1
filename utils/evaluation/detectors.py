"""Detectors of images that a model does not know, as differentiable models, so that they can be attacked themselves.

What a detector is worth counts only under an attack that knows it (Tramer et al., 2020, arXiv:2002.08347).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.attacks.balls import Draws, project, random_point
from utils.attacks.given import check_batch
from utils.attacks.gradient import ascent, check_gradient, default_alpha, margin
from utils.core.checks import number, whole
from utils.core.modes import attack_mode, eval_mode
from utils.core.parts import Part
from utils.core.radii import check_eps
from utils.data.sets import ImageSet
from utils.evaluation.curve import NEVER, RobustnessCurve
from utils.evaluation.gate import Gate
from utils.evaluation.worst_case import robustness_curve

#: :func:`robustness_curve`, or it with settings of one's own.
Evaluate = Callable[..., RobustnessCurve]

#: Principal components of the features that the Mahalanobis distance sees: a covariance of all of them is singular, and
#: one estimated from fewer than so many images for each component says little.
COMPONENTS, IMAGES_A_COMPONENT = 64, 4
#: Neighbour that counts, as in Sun et al. (2022) for sets of this size.
NEIGHBOUR = 5
#: By how much an image must be misclassified, in standard deviations of its logits, before the attack turns to the
#: detector; and what lies between one that is right, one that is wrong, and one that is accepted too.
_ENOUGH, _TIER = 0.05, 1e3


class Detector(nn.Module):
    """Gives logits and, as a last column, a score that is the higher the more foreign an image is: N x (K + 1)."""

    model: nn.Module


class FeatureDetector(Detector):
    """A score of a classifier's features and logits.

    Args:
        model: the classifier.
    """

    model: MRIClassifier

    def __init__(self, model: MRIClassifier) -> None:
        super().__init__()
        self.model = model

    def scored(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores N of features N x F and logits N x K."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`Detector`."""
        features = self.model.features(images)
        logits = self.model.backbone.get_submodule(self.model.head_name)(features)
        return torch.cat([logits, self.scored(features, logits)[:, None]], 1)


class SoftmaxDetector(FeatureDetector):
    """Minus the highest probability (Hendrycks and Gimpel, 2017, arXiv:1610.02136)."""

    def scored(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See :meth:`FeatureDetector.scored`."""
        from pytorch_ood.detector import MaxSoftmax

        return MaxSoftmax.score(logits)


class EnergyDetector(FeatureDetector):
    """Minus the logarithm of the sum of exponentials (Liu et al., 2020, arXiv:2010.03759)."""

    def scored(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See :meth:`FeatureDetector.scored`."""
        from pytorch_ood.detector import EnergyBased

        return EnergyBased.score(logits)


class MahalanobisDetector(FeatureDetector):
    """Distance to the nearest class centre in the classes' common covariance (Lee et al., 2018, arXiv:1807.03888).

    Args:
        features: of training images, N x F.
        labels: int64 tensor N; classes without images are left out.
    """

    centre: torch.Tensor
    axes: torch.Tensor
    mu: torch.Tensor
    precision: torch.Tensor

    def __init__(self, model: MRIClassifier, features: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(model)
        from pytorch_ood.detector import Mahalanobis

        centre = features.mean(0)
        count = max(1, min(COMPONENTS, features.shape[1], len(features) // IMAGES_A_COMPONENT))
        # exact, for the randomised decomposition would draw from the global generator
        axes = torch.linalg.svd(features - centre, full_matrices=False).Vh[:count].T
        fitted = Mahalanobis(None).fit_features((features - centre) @ axes, labels.unique(return_inverse=True)[1])
        for name, value in (("centre", centre), ("axes", axes), ("mu", fitted.mu), ("precision", fitted.precision)):
            self.register_buffer(name, value.detach().clone())

    def scored(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See :meth:`FeatureDetector.scored`."""
        away = ((features - self.centre) @ self.axes)[:, None] - self.mu
        return 0.5 * torch.einsum("nkf,fg,nkg->nk", away, self.precision, away).amin(1)


class NeighbourDetector(FeatureDetector):
    """Distance to the fifth nearest training image in features of length 1 (Sun et al., 2022, arXiv:2204.06507)."""

    known: torch.Tensor

    def __init__(self, model: MRIClassifier, features: torch.Tensor) -> None:
        super().__init__(model)
        self.register_buffer("known", F.normalize(features, dim=1))

    def scored(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See :meth:`FeatureDetector.scored`."""
        return torch.cdist(F.normalize(features, dim=1), self.known).kthvalue(NEIGHBOUR, dim=1).values


class GateDetector(Detector):
    """Distance of the pixels to the nearest training slice, which decides whether :mod:`utils.predict` answers.

    Args:
        model: gives the logits.
        gate: of the data that the model was trained on.
    """

    def __init__(self, model: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.model, self.gate = model, gate

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`Detector`."""
        return torch.cat([self.model(images), self.gate.distances(images)[:, None]], 1)


def fit_detectors(
    model: MRIClassifier, train: ImageSet, *, device: torch.device | str = "cpu", batch_size: int = 128
) -> dict[str, FeatureDetector]:
    """Name -> detector, fitted on training images.

    Raises:
        ValueError: fewer images than ``NEIGHBOUR``.
    """
    if len(train) < NEIGHBOUR:
        raise ValueError(f"detectors are fitted on at least {NEIGHBOUR} training images, not {len(train)}")
    with eval_mode(model), torch.no_grad():
        features = torch.cat([model.features(pixels) for pixels, _ in train.batches(batch_size, device)])
    labels = train.labels.to(features.device)
    return {
        "maximum softmax": SoftmaxDetector(model),
        "energy": EnergyDetector(model),
        "Mahalanobis": MahalanobisDetector(model, features, labels),
        "nearest neighbours": NeighbourDetector(model, features),
    }


@torch.no_grad()
def answers_and_scores(
    detector: Detector, images: torch.Tensor, batch_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits N x K and scores N of images N x 1 x H x W, on the CPU."""
    with eval_mode(detector):
        found = torch.cat([detector(part).float().cpu() for part in images.split(batch_size)])
    return found[:, :-1], found[:, -1]


class Separation(Part):
    """How well scores tell foreign images from real ones.

    Attributes:
        auroc: chance that a foreign image scores higher than a real one.
        fpr95: share of real images that are refused where 95 % of the foreign ones are.
    """

    auroc: float
    fpr95: float


def separation(real: torch.Tensor, foreign: torch.Tensor) -> Separation:
    """Separation of scores of real and of foreign images; no more than chance where all scores are alike."""
    from pytorch_ood.metrics import OODMetrics

    metrics = OODMetrics()
    metrics.update(torch.cat([real, foreign]), torch.cat([torch.zeros(len(real)), -torch.ones(len(foreign))]).long())
    found: Mapping[str, float] = metrics.compute()
    return Separation(auroc=float(found["AUROC"]), fpr95=float(found["FPR95TPR"]))


def push_score(
    detector: Detector,
    images: torch.Tensor,
    *,
    eps: float,
    up: bool,
    steps: int = 20,
    draws: Draws = None,
) -> torch.Tensor:
    """Images within L-infinity ``eps`` whose score is as high, or as low, as PGD makes it; never worse than before.

    Args:
        images: N x 1 x H x W in [0, 1].
        up: towards foreign, else towards known.
        draws: of the random start.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd`.
    """
    check_eps(eps)
    whole("steps", steps, 1)
    nobody = torch.zeros(len(images), dtype=torch.long, device=images.device)
    check_batch(detector, images, nobody)
    sign, alpha = 1.0 if up else -1.0, default_alpha(eps, steps)
    here, best = images, images.clone()
    highest = torch.full((len(images),), -torch.inf, device=images.device)
    with attack_mode(detector):
        for step in range(steps + 2):
            found = ascent(detector, here, nobody, lambda answers, _: sign * answers[:, -1])
            check_gradient(found.gradient)
            better = found.loss > highest
            best[better], highest = here[better], torch.maximum(found.loss, highest)
            if step == 0:
                here = random_point(images, eps, "linf", draws)
            else:
                shift = project(here + alpha * found.gradient.sign() - images, eps, "linf")
                here = (images + shift).clamp(0, 1)
    return best


class Accepted(nn.Module):
    """Whether images of one class are misclassified and accepted at once, as a question of two answers.

    The selective form of Bryniarski et al. (2022, arXiv:2106.15023): the second answer grows, for an image that is
    right, as it comes nearer to a wrong answer, and for one that is wrong as its score comes nearer to the limit. It is
    above the first, which is 0, only where both are reached.

    Args:
        label: the true class.
        limit: highest score that is accepted.

    Raises:
        TypeError, ValueError: a limit that is no number; a label that is no place of a class.
    """

    def __init__(self, detector: Detector, label: int, limit: float) -> None:
        super().__init__()
        self.detector, self.label, self.limit = detector, whole("label", label, 0), number("limit", limit)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Answers N x 2; the second wins where the image is misclassified and accepted."""
        found = self.detector(images)
        logits, excess = found[:, :-1], (found[:, -1] - self.limit).clamp(min=0)
        wrong = margin(logits, torch.full_like(excess, self.label, dtype=torch.long))
        wrong = wrong / logits.std(1).detach().clamp(min=1e-12)
        reached = torch.where(excess > 0, -torch.log1p(excess), _TIER + wrong)
        value = torch.where((wrong >= _ENOUGH) | ((wrong > 0) & (excess == 0)), reached, wrong - _TIER)
        return torch.stack([torch.zeros_like(value), value], 1)


def share_fooled(
    detector: Detector,
    images: ImageSet,
    *,
    limit: float,
    epsilons: Sequence[float],
    steps: int,
    evaluate: Evaluate = robustness_curve,
) -> list[float]:
    """Share of images that PGD on :class:`Accepted` has misclassified and accepted within each radius; 0 of none.

    Args:
        images: the model is right on all of them.
        limit: highest score that is accepted.
        epsilons: radii, ascending.
        steps: of PGD.
        evaluate: :func:`utils.evaluation.worst_case.robustness_curve`, with its settings.

    Raises:
        TypeError, ValueError: see :class:`Accepted` and :func:`utils.evaluation.worst_case.robustness_curve`.
    """
    count, attack = torch.zeros(len(epsilons)), Attack("pgd", steps=steps, loss="margin", stop_when_fooled=True)
    for label in images.labels.unique().tolist():
        own = images.subset(torch.nonzero(images.labels == label)[:, 0])
        asked = replace(own, labels=torch.zeros_like(own.labels), classes=["noticed", "accepted"])
        curve = evaluate(Accepted(detector, label, limit), asked, attack=attack, epsilons=epsilons)
        first = torch.tensor(curve.first_broken)
        count += torch.stack([((first != NEVER) & (first <= step + 1)).sum() for step in range(len(epsilons))])
    return (count / max(1, len(images))).tolist()


def share_noticed(
    detector: Detector,
    images: ImageSet,
    *,
    limit: float,
    eps: float,
    steps: int,
    evaluate: Evaluate = robustness_curve,
) -> float | None:
    """Share of what PGD that knows the model alone has misclassified that is refused; None where that is nothing.

    Args:
        detector, images, limit, steps, evaluate: see :func:`share_fooled`.
    """
    made: list[torch.Tensor] = []
    attack = Attack("pgd", steps=steps)
    evaluate(detector.model, images, attack=attack, epsilons=[eps], on_broken=lambda _, found, __: made.append(found))
    if not made:
        return None
    return float((answers_and_scores(detector, torch.cat(made))[1] > limit).float().mean())
