from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.attacks.gradient import pgd
from utils.core.modes import attack_mode
from utils.evaluation.ensemble import RULES, Vote, fit_weights, mix, validation_weights


class Fixed(nn.Module):
    """Answers with given logits, whatever the image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor([logits]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


IMAGES = torch.rand(2, 1, 8, 8)


def _probabilities(*members: nn.Module, **options) -> torch.Tensor:
    return Vote(members, **options)(IMAGES).softmax(-1)[0]


def test_soft_vote_is_the_mean_probability() -> None:
    members = [Fixed(2.0, 0.0, -1.0), Fixed(0.0, 3.0, 0.0)]
    mean = torch.stack([m.logits[0].softmax(0) for m in members]).mean(0)
    assert torch.allclose(_probabilities(*members), mean)
    one = _probabilities(*members, rule="weighted", weights=[1.0, 0.0])
    assert torch.allclose(one, members[0].logits[0].softmax(0))


def test_hard_vote_counts_and_ties_go_to_the_mean_probability() -> None:
    sure, unsure = Fixed(9.0, 0.0, 0.0), Fixed(0.0, 0.1, 0.0)
    assert _probabilities(sure, unsure, unsure, rule="hard").argmax() == 1
    assert _probabilities(sure, unsure, unsure, rule="soft").argmax() == 0
    assert _probabilities(sure, unsure, rule="hard").argmax() == 0
    assert _probabilities(Fixed(0.0, 0.1, 0.0), Fixed(0.0, 0.0, 5.0), rule="hard").argmax() == 2


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6))
def test_shares_are_probabilities_and_hard_votes_win_by_number(seed: int, members: int, classes: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    fixed = [Fixed(*(8 * torch.randn(classes, generator=draws)).tolist()) for _ in range(members)]
    for rule in ("soft", "hard"):
        shares = _probabilities(*fixed, rule=rule)
        assert shares.sum().item() == pytest.approx(1, abs=1e-4) and (shares >= 0).all()
    votes = torch.stack([f.logits[0].argmax() for f in fixed]).bincount(minlength=classes)
    assert votes[_probabilities(*fixed, rule="hard").argmax()] == votes.max()


def test_fitted_weights_find_the_mixture_that_a_grid_finds() -> None:
    draws = torch.Generator().manual_seed(0)
    answers = (2 * torch.randn(3, 60, 4, generator=draws)).log_softmax(-1)
    labels = torch.randint(4, (60,), generator=draws)
    weights = fit_weights(answers, labels)
    importance = 1 / labels.bincount()[labels].double()

    def likelihood(shares: list[float]) -> float:
        chosen = mix(answers.double(), torch.tensor(shares).double())[range(60), labels]
        return (chosen * importance).sum().item()

    best = likelihood(weights)
    grid = [(a / 20, b / 20, 1 - (a + b) / 20) for a in range(21) for b in range(21 - a)]
    assert sum(weights) == pytest.approx(1) and best >= max(likelihood(list(shares)) for shares in grid) - 1e-6


def test_a_member_that_knows_nothing_gets_next_to_no_weight(splits) -> None:
    class Knows(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            key = images.flatten(1).sum(1)
            right = (key[:, None] - self.keys).abs().argmin(1)
            return 4 * nn.functional.one_hot(self.labels[right], 4).float()

    knowing = Knows()
    pixels = splits.validation.pixels(slice(None))
    knowing.keys, knowing.labels = pixels.flatten(1).sum(1), splits.validation.labels
    weights = validation_weights([Fixed(0.0, 0.0, 0.0, 0.0), knowing], splits.validation)
    assert weights[1] > 0.95


@pytest.mark.parametrize("rule", ["soft", "hard"])
def test_a_vote_is_attacked_as_one_model(rule: str, small_net: nn.Module, batch) -> None:
    other = type(small_net)().train()
    vote, (images, _) = Vote([small_net, other], rule=rule), batch
    with attack_mode(vote):
        labels = vote(images).argmax(1)
    attacked = pgd(vote, images, labels, eps=0.2, steps=10)
    assert other.training and not small_net.training
    with torch.no_grad(), attack_mode(vote):
        assert (vote(attacked).argmax(1) != labels).float().mean() > 0.5


def test_bad_votes_are_refused() -> None:
    for arguments, options, word in (
        ([], {}, "at least one"),
        ([Fixed(0.0, 1.0)], {"rule": "loud"}, "soft, hard, weighted"),
        ([Fixed(0.0, 1.0)], {"rule": "weighted"}, "needs weights"),
        ([Fixed(0.0, 1.0)], {"weights": [1.0]}, "only that rule"),
        ([Fixed(0.0, 1.0)] * 2, {"rule": "weighted", "weights": [0.9, 0.9]}, "sum 1"),
    ):
        with pytest.raises(ValueError, match=word):
            Vote(arguments, **options)
    with pytest.raises(ValueError, match="validation images"):
        fit_weights(torch.zeros(2, 0, 4), torch.zeros(0, dtype=torch.int64))
    assert RULES == ("soft", "hard", "weighted")
