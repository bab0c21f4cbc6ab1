"""Models of whole patients: from a stack of slices to one answer, by mean, attention, recurrence or stacking.

All take P x S x H x W, a patient's slices as channels (:func:`utils.data.stacks.patient_stacks`), and give P x K
logarithms of class shares. Each is one differentiable model, so that all slices of a patient are attacked together and
the patient's verdict is the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.evaluation.ensemble import mix

POOLS = ("mean", "attention", "gru")


class MeanOfSlices(nn.Module):
    """The mean of the slices' probabilities, in which their order does not matter.

    Args:
        model: maps slices N x 1 x H x W in [0, 1] to logits N x K.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Logarithm of the mean probability, P x K."""
        return self.read(self.model(stacks.flatten(0, 1)[:, None]).unflatten(0, stacks.shape[:2]))

    def read(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities P x K of logits P x S x K of the slices."""
        return logits.log_softmax(-1).logsumexp(1) - torch.tensor(float(logits.shape[1])).log()


class PooledFeatures(nn.Module):
    """A head that reads the features of all slices of a patient at once.

    ``attention`` weighs them by what they show (Ilse et al., 2018, arXiv:1802.04712, equation 8), whatever their order;
    ``gru`` reads them in order, from below and from above (Cho et al., 2014, arXiv:1406.1078), and averages its states.

    Args:
        model: whose features are read; its own head is not used.
        pool: ``attention`` or ``gru``.
        width: numbers that each slice's features become.

    Raises:
        ValueError: another word.
    """

    def __init__(self, model: MRIClassifier, pool: str, *, num_classes: int, n_features: int, width: int = 32) -> None:
        super().__init__()
        if pool not in POOLS[1:]:
            raise ValueError(f"pool must be one of {', '.join(POOLS[1:])}, not {pool!r}")
        self.model, self.pool = model, pool
        self.narrow = nn.Sequential(nn.LayerNorm(n_features), nn.Linear(n_features, width), nn.GELU(), nn.Dropout(0.3))
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.reader = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Log-probabilities P x K."""
        return self.read(self.model.features(stacks.flatten(0, 1)[:, None]).unflatten(0, stacks.shape[:2]))

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Log-probabilities P x K of features P x S x F of the slices in order."""
        narrow = self.narrow(features)
        if self.pool == "gru":
            pooled = self.reader(narrow)[0].mean(1)
        else:
            pooled = (self.score(narrow).softmax(1) * narrow).sum(1)
        return self.head(pooled).log_softmax(-1)


def answers_of(members: Iterable[nn.Module], stacks: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities P x K of each member; a network that several of them read looks at each slice once."""
    looks: dict[MRIClassifier, tuple[torch.Tensor, torch.Tensor]] = {}
    said = []
    for member in members:
        if isinstance(member, (MeanOfSlices, PooledFeatures)) and isinstance(member.model, MRIClassifier):
            if member.model not in looks:
                looks[member.model] = member.model.look(stacks.flatten(0, 1)[:, None])
            features, logits = (part.unflatten(0, stacks.shape[:2]) for part in looks[member.model])
            said.append(member.read(logits if isinstance(member, MeanOfSlices) else features))
        else:
            said.append(member(stacks).log_softmax(-1))
    return said


class Blend(nn.Module):
    """Several models of patients by the weighted mean of their probabilities; even weights are a soft vote.

    Args:
        members: each P x S x H x W to P x K.
        shares: nonnegative, with sum 1.
    """

    shares: torch.Tensor

    def __init__(self, members: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        if len(members) != len(shares) or abs(sum(shares) - 1) > 1e-4 or min(shares) < 0:
            raise ValueError(f"shares must be {len(members)} nonnegative numbers with sum 1, not {list(shares)}")
        self.members = nn.ModuleList(members)
        self.register_buffer("shares", torch.tensor(list(shares), dtype=torch.float32))

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Log-probabilities P x K."""
        return mix(torch.stack(answers_of(self.members, stacks)), self.shares)


class Stacked(nn.Module):
    """A logistic regression on the members' log-probabilities (Wolpert, 1992, stacked generalisation).

    Args:
        members: each P x S x H x W to P x K.
        weight: K x (members * K), of :func:`utils.training.pooling.fit_stack`.
        bias: K.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, members: Sequence[nn.Module], weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Log-probabilities P x K."""
        said = torch.cat(answers_of(self.members, stacks), dim=1)
        return nn.functional.linear(said, self.weight, self.bias).log_softmax(-1)


class Verdict(nn.Module):
    """Whether a patient is ill, as two logits whose order is the answer at a threshold.

    Args:
        model: gives log-probabilities P x K of patients.
        healthy: place of the class that means healthy.
        threshold: probability of being ill from which somebody counts as ill, in (0, 1).

    Raises:
        ValueError: a threshold outside.
    """

    cut: torch.Tensor

    def __init__(self, model: nn.Module, healthy: int, threshold: float = 0.5) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be above 0 and below 1, not {threshold}")
        self.model, self.healthy = model, healthy
        # who has exactly the threshold counts as ill
        self.register_buffer("cut", torch.tensor([1 - threshold, threshold]).log() - torch.tensor([0.0, 1e-6]))

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Logits P x 2: healthy, ill."""
        chances = self.model(stacks).log_softmax(-1)
        others = [place for place in range(chances.shape[1]) if place != self.healthy]
        sides = torch.stack([chances[:, self.healthy], chances[:, others].logsumexp(1)], 1)
        return sides - self.cut


class Tempered(nn.Module):
    """A model whose probabilities are made less sure, or more, without another answer (Guo et al., 2017,
    arXiv:1706.04599, section 4.2)."""

    temperature: torch.Tensor

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.model = model
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits divided by the temperature."""
        return self.model(images) / self.temperature
