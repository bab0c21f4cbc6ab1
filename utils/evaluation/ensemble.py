"""Several classifiers that answer as one: hard, soft and weighted votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from utils.data.sets import ImageSet
from utils.evaluation.metrics import predict

RULES = ("soft", "hard", "weighted")


class Vote(nn.Module):
    """A vote as one model, so that it can be attacked and measured like any of its members.

    ``soft`` and ``weighted`` average the members' probabilities. ``hard`` counts one vote a member;
    where classes have as many votes, the mean probability decides among them.

    Args:
        members: models that map images N x C x H x W in [0, 1] to logits N x K.
        rule: one of ``RULES``.
        weights: for ``weighted``, one nonnegative number a member with sum 1, from :func:`fit_weights`.

    Raises:
        ValueError: no members, an unknown rule, or weights that do not fit.
    """

    shares: torch.Tensor

    def __init__(
        self, members: Sequence[nn.Module], *, rule: str = "soft", weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("a vote needs at least one member")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
        if (rule == "weighted") != (weights is not None):
            raise ValueError("rule 'weighted' needs weights, and only that rule takes them")
        shares = torch.tensor(weights if weights is not None else [1 / len(members)] * len(members))
        if len(shares) != len(members) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-4:
            raise ValueError(f"weights must be {len(members)} nonnegative numbers with sum 1, not {weights}")
        self.members = nn.ModuleList(members)
        self.rule = rule
        self.register_buffer("shares", shares.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logarithm of the vote's class shares, N x K; its softmax is the shares themselves.

        A hard vote has no gradient of its own. What is left of it is that of the mean probability,
        by which ties are broken: an attack by sign of gradient then attacks the soft vote.
        """
        logits = torch.stack([member(images) for member in self.members])
        mean = mix(logits.log_softmax(-1), self.shares)
        if self.rule != "hard":
            return mean
        votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
        # half a vote for the probabilities can never outweigh a whole one
        return ((votes + 0.5 * mean.exp()) / (len(self.members) + 0.5)).log()


def mix(log_probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean of the members' probabilities.

    Args:
        log_probabilities: M x N x K.
        shares: M nonnegative numbers with sum 1.

    Returns:
        N x K.
    """
    return (log_probabilities + shares.log()[:, None, None]).logsumexp(0)


def fit_weights(log_probabilities: torch.Tensor, labels: torch.Tensor, *, rounds: int = 500) -> list[float]:
    """Weights of a weighted vote that make the right answers on given images most likely.

    Expectation maximisation for the shares of a mixture of fixed components (Dempster, Laird and Rubin,
    1977): the likelihood is concave in the shares, so there is one maximum and no step size. Classes count
    alike, however many images they have.

    Args:
        log_probabilities: M x N x K of the members on validation images, never on test images.
        labels: int64 tensor N.
        rounds: iterations.

    Returns:
        M numbers with sum 1.

    Raises:
        ValueError: no images.
    """
    if not len(labels):
        raise ValueError("weights of a vote are fitted on validation images, and there are none")
    right = log_probabilities.double().gather(2, labels.expand(len(log_probabilities), -1)[:, :, None])[:, :, 0]
    importance = 1 / labels.bincount()[labels].double()
    importance = importance / importance.sum()
    shares = torch.full((len(right),), 1 / len(right), dtype=torch.float64)
    for _ in range(rounds):
        shares = ((right + shares.log()[:, None]).softmax(0) * importance).sum(1)
    return shares.tolist()


def validation_weights(
    members: Sequence[nn.Module], validation: ImageSet, *, device: torch.device | str = "cpu"
) -> list[float]:
    """:func:`fit_weights` on the members' answers to clean validation images."""
    answers = torch.stack([predict(member, validation, device=device).log_softmax(-1) for member in members])
    return fit_weights(answers, validation.labels)
