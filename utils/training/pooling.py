"""Fit what combines slices and models of a patient: heads on frozen features, stackers, temperatures.

Heads learn from training patients; stackers and temperatures from validation patients, whom no model was trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.def_models import MRIClassifier
from utils.core.modes import eval_mode
from utils.core.reproducibility import seed_everything
from utils.data.sets import ImageSet
from utils.evaluation.by_patient import PooledFeatures

EPOCHS, RATE, DECAY = 60, 2e-3, 1e-2
#: Strength of the stacker's L2 penalty; few patients, many weights.
PENALTY = 10.0


@torch.no_grad()
def slice_features(
    model: MRIClassifier, stacks: ImageSet, *, batch_size: int = 4, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Features of all slices, P x S x F float32 on the CPU.

    Args:
        stacks: of :func:`utils.data.stacks.patient_stacks`.
        batch_size: patients a pass.
    """
    with eval_mode(model):
        found = [
            model.features(pixels.flatten(0, 1)[:, None]).float().cpu().unflatten(0, pixels.shape[:2])
            for pixels, _ in stacks.batches(batch_size, device)
        ]
    return torch.cat(found)


def fit_pool(
    model: MRIClassifier,
    pool: str,
    train: ImageSet,
    validation: ImageSet,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    device: torch.device | str = "cpu",
) -> PooledFeatures:
    """Train a head on the frozen features of whole patients, and keep the epoch of the least validation loss.

    Args:
        model: whose features are read; it is left as it is.
        pool: ``attention`` or ``gru``, see :class:`utils.evaluation.by_patient.PooledFeatures`.
        train, validation: of :func:`utils.data.stacks.patient_stacks`.
        seed: of weights and order.

    Returns:
        the whole model from stacks to answers, in eval mode.
    """
    seed_everything(seed)
    seen, held = (slice_features(model, part, device=device) for part in (train, validation))
    pooled = PooledFeatures(model, pool, num_classes=len(train.classes), n_features=seen.shape[-1])
    own = [value for name, value in pooled.named_parameters() if not name.startswith("model.")]
    optimizer = torch.optim.AdamW(own, lr=RATE, weight_decay=DECAY)
    weights = _class_weights(train)
    best, kept = float("inf"), {}
    for _ in range(epochs):
        _reader(pooled).train()
        for part in torch.randperm(len(seen)).split(16):
            optimizer.zero_grad()
            F.nll_loss(pooled.read(seen[part]), train.labels[part], weight=weights).backward()
            optimizer.step()
        _reader(pooled).eval()
        with torch.no_grad():
            loss = F.nll_loss(pooled.read(held), validation.labels, weight=weights).item()
        if loss < best:
            best, kept = loss, copy.deepcopy(_reader(pooled).state_dict())
    _reader(pooled).load_state_dict(kept)
    return pooled.to(device).eval()


def _reader(pooled: PooledFeatures) -> nn.ModuleList:
    """All of it but the model, whose mode and BatchNorm must not change."""
    return nn.ModuleList([pooled.narrow, pooled.score, pooled.reader, pooled.head])


def _class_weights(images: ImageSet) -> torch.Tensor:
    """Weights proportional to the root of a class's rarity, with mean 1 over the images."""
    counts = images.labels.bincount(minlength=len(images.classes)).clamp(min=1).float()
    weights = counts**-0.5
    return weights * len(images) / (weights * counts).sum()


def fit_stack(answers: Sequence[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of :class:`utils.evaluation.by_patient.Stacked`.

    It begins as the members' mean, and an L2 penalty on what it moves from there keeps it near where patients are few.

    Args:
        answers: each member's log-probabilities P x K of patients that no member was trained on.
        labels: int64 tensor P.

    Returns:
        K x (members * K), and K.
    """
    said = torch.cat([own.log_softmax(-1) for own in answers], dim=1)
    classes = answers[0].shape[1]
    mean = torch.cat([torch.eye(classes)] * len(answers), dim=1) / len(answers)
    moved, bias = torch.zeros_like(mean, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([moved, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fitted = F.cross_entropy(F.linear(said, mean + moved, bias), labels, reduction="sum")
        total = fitted + PENALTY * (moved.square().sum() + bias.square().sum())
        total.backward()
        return total

    optimizer.step(loss)
    return (mean + moved).detach(), bias.detach()


#: Logarithm of the highest temperature, and minus that of the lowest.
_LOG_BOUND = 3.0


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature under which held-out answers are likeliest (Guo et al., 2017, arXiv:1706.04599).

    Args:
        logits: P x K.
        labels: int64 tensor P.

    Raises:
        ValueError: no answers.
    """
    if not len(logits):
        raise ValueError("a temperature needs at least one held-out answer")
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    found = log_temperature.detach()
    if not found.isfinite():  # all answers are right or none is, and the logits are small: the search left all bounds
        ends = torch.tensor([-_LOG_BOUND, _LOG_BOUND])
        found = min(ends, key=lambda end: float(F.cross_entropy(logits / end.exp(), labels)))
    # where all answers are right, or none is, there is no best one
    return float(found.clamp(-_LOG_BOUND, _LOG_BOUND).exp())
