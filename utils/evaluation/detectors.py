"""Detectors of images that a model does not know, as differentiable models, so that they can be attacked themselves.

What a detector is worth counts only under an attack that knows it (Tramer et al., 2020, arXiv:2002.08347).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from models.def_models import MRIClassifier
from utils.attacks.balls import Draws, project, random_point
from utils.attacks.given import check_batch, check_logits
from utils.attacks.gradient import Loss, ascent, check_gradient, default_alpha, margin, pgd
from utils.core.checks import number, whole
from utils.core.modes import attack_mode, eval_mode
from utils.core.parts import Part
from utils.core.radii import check_eps
from utils.data.sets import ImageSet
from utils.evaluation.gate import Gate

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
    sign = 1.0 if up else -1.0
    return _climb(detector, images, None, lambda found, _: sign * found[:, -1], eps, steps, draws)


def fool_both(
    detector: Detector,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    limit: float,
    steps: int = 40,
    draws: Draws = None,
) -> torch.Tensor:
    """Images that are misclassified and accepted at once, by steps on the one that is not reached yet.

    The selective form of Bryniarski et al. (2022, arXiv:2106.15023): an image that is right steps towards a wrong
    answer, one that is wrong towards a low score. Of all points the best is kept: accepted and wrong before wrong,
    wrong before right.

    Args:
        labels: int64 tensor N, the true classes.
        limit: highest score that is accepted.
        images, eps, steps, draws: see :func:`push_score`.

    Raises:
        TypeError, ValueError: see :func:`push_score`; also a limit that is no number.
    """

    number("limit", limit)

    def selective(found: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        logits = found[:, :-1]
        wrong = margin(logits, own) / logits.std(1).detach().clamp(min=1e-12)
        excess = (found[:, -1] - limit).clamp(min=0)
        towards_accepted = -torch.log1p(excess) + (excess == 0) * (_TIER + wrong)
        return torch.where(wrong < _ENOUGH, wrong - _TIER, towards_accepted)

    return _climb(detector, images, labels, selective, eps, steps, draws)


def share_fooled(
    detector: Detector,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    limit: float,
    steps: int,
    draws: Draws = None,
) -> float:
    """Share of images that :func:`fool_both` has misclassified and accepted; 0 of none. See there."""
    if not len(labels):
        return 0.0
    found = fool_both(detector, images, labels, eps=eps, limit=limit, steps=steps, draws=draws)
    logits, scores = answers_and_scores(detector, found)
    return float(((logits.argmax(1) != labels.cpu()) & (scores <= limit)).float().mean())


def share_noticed(
    detector: Detector,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    limit: float,
    steps: int,
    draws: Draws = None,
) -> float | None:
    """Share of what PGD that knows the model alone has misclassified that is refused; None where that is nothing.

    Args:
        detector, images, labels, eps, limit, steps, draws: see :func:`fool_both`.
    """
    if not len(labels):
        return None
    found = pgd(detector.model, images, labels, eps=eps, steps=steps, generator=draws, assume_checked=True)
    logits, scores = answers_and_scores(detector, found)
    wrong = logits.argmax(1) != labels.cpu()
    return float((scores[wrong] > limit).float().mean()) if wrong.any() else None


def _climb(
    detector: Detector,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    loss: Loss,
    eps: float,
    steps: int,
    draws: Draws,
) -> torch.Tensor:
    """PGD on a loss of the detector's answers that keeps the best of all points, the images themselves among them."""
    check_eps(eps)
    own = torch.zeros(len(images), dtype=torch.long, device=images.device) if labels is None else labels
    whole("steps", steps, 1)
    check_batch(detector, images, own)
    if labels is not None:
        with attack_mode(detector), torch.no_grad():
            check_logits(detector(images)[:, :-1].float(), labels)
    here, best = images, images.clone()
    highest = torch.full((len(images),), -torch.inf, device=images.device)
    alpha = default_alpha(eps, steps)
    with attack_mode(detector):
        for step in range(steps + 2):
            found = ascent(detector, here, own, loss)
            check_gradient(found.gradient)
            better = found.loss > highest
            best[better], highest = here[better], torch.maximum(found.loss, highest)
            if step == 0:
                here = random_point(images, eps, "linf", draws)
            else:
                shift = project(here + alpha * found.gradient.sign() - images, eps, "linf")
                here = (images + shift).clamp(0, 1)
    return best
