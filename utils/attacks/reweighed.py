"""An attack on a vote that pulls most at the members that still answer right.

After MORA (Yu et al., 2022, arXiv:2211.08008): a gradient of the vote alone is spent on members that are fooled
already, or on the one that is easiest. Here each member's weight falls as its own margin grows; the rest of the paper's
schedule is left out.
"""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.balls import Draws
from utils.attacks.given import as_logits, check_batch, check_logits
from utils.attacks.gradient import Loss, margin, pgd
from utils.core.modes import attack_mode

#: How fast a member's weight falls with its margin, in standard deviations of its logits.
SHARPNESS = 4.0


class Members(nn.Module):
    """The members' logits beside each other, N x (M * K), for :func:`reweighed_pgd`."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits N x (M * K)."""
        return torch.cat([member(images) for member in self.members], dim=1)


def reweighed_loss(count: int) -> Loss:
    """Weighted sum of the members' margins, each in standard deviations of its logits.

    Args:
        count: number of members M; logits are N x (M * K).
    """

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = logits.unflatten(1, (count, -1))
        spread = each.std(2).detach().clamp(min=1e-6)
        margins = torch.stack([margin(each[:, place], labels) for place in range(count)], 1) / spread
        weights = torch.sigmoid(-SHARPNESS * margins.detach())
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        return (weights * margins).sum(1)

    return loss


def reweighed_pgd(
    model: Members,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    steps: int = 20,
    alpha: float | None = None,
    norm: str = "linf",
    generator: Draws = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """PGD on the re-weighted margins of the members of a vote.

    Args:
        model, images, labels, eps, steps, alpha, norm, generator, assume_checked: see
            :func:`utils.attacks.gradient.pgd`.

    Raises:
        ValueError: the model is not :class:`Members`; also see :func:`utils.attacks.gradient.pgd`.
    """
    if not isinstance(model, Members):
        raise ValueError(
            f"the re-weighted attack needs the members of a vote, not a {type(model).__name__}; attack a vote by a "
            "suite, which has this attack"
        )
    check_batch(model, images, labels)
    if not assume_checked:
        # the answers beside each other are no answer of a single model, and would pass for one
        with attack_mode(model), torch.no_grad():
            for member in model.members:
                check_logits(as_logits(member(images)), labels)
    return pgd(
        model,
        images,
        labels,
        eps=eps,
        alpha=alpha,
        steps=steps,
        loss=reweighed_loss(len(model.members)),
        norm=norm,
        generator=generator,
        assume_checked=True,
    )
