"""What is measured after each epoch, on validation images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.core.precision import autocast
from utils.core.processes import share_out
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.metrics import predict, scores
from utils.training.config import TrainConfig
from utils.training.objectives import Hardening, Standard

VALIDATION_STEPS = 10
#: Catastrophic overfitting: accuracy under PGD falls this far below its best, and this far below that under FGSM.
COLLAPSE = 0.15
#: On n images it must fall by at least this over the root of n, about two standard errors of a difference.
COLLAPSE_NOISE = 1.5


def validate(
    model: MRIClassifier, images: ImageSet, objective: Standard, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Loss and accuracies of a model; where ``objective`` attacks, also under PGD-10 and FGSM at its eps.

    The attacked ones are balanced accuracies on ``config.validation_images`` images that the seed fixes.
    """
    logits = predict(model, images, device=device)
    found = scores(logits.softmax(1), images.labels, images.classes)
    entry = {
        "validation_loss": F.cross_entropy(logits, images.labels).item(),
        "validation_accuracy": found.accuracy,
        "validation_balanced_accuracy": found.balanced_accuracy,
    }
    if not isinstance(objective, Hardening):
        return entry
    part = images.balanced_subset(config.validation_images, seed=config.seed)
    attacks = {
        "validation_robust_accuracy": Attack("pgd", steps=VALIDATION_STEPS),
        "validation_fgsm_accuracy": Attack("fgsm"),
    }
    for name, attack in attacks.items():
        entry[name] = _accuracy_under(attack, model.eval(), part, objective.eps, config, device)
    return entry


def _accuracy_under(
    attack: Attack, model: MRIClassifier, part: ImageSet, eps: float, config: TrainConfig, device: torch.device
) -> float:
    def answer(place: torch.Tensor) -> torch.Tensor:
        images, labels = part.pixels(place, device), part.labels[place].to(device)
        draws = [generator(config.seed, "validation", image) for image in place.tolist()]
        with autocast(config.precision, device):
            attacked = attack(model, images, labels, eps=eps, draws=draws, assume_checked=True)
        with torch.no_grad():
            return model(attacked).float().softmax(1).cpu()

    probabilities = share_out(torch.arange(len(part)).split(config.batch_size), answer)
    return scores(torch.cat(probabilities), part.labels, part.classes).balanced_accuracy


def collapsed(entry: Mapping[str, float], best: float, n_images: int) -> bool:
    """Whether an epoch fell to catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994).

    Args:
        entry: of :func:`validate`.
        best: highest robust accuracy of the epochs before.
        n_images: on which it was measured.
    """
    if "validation_robust_accuracy" not in entry:
        return False
    fallen = min(best, entry["validation_fgsm_accuracy"]) - entry["validation_robust_accuracy"]
    return fallen > max(COLLAPSE, COLLAPSE_NOISE / math.sqrt(n_images))
