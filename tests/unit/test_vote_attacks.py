from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.toy import train_toy
from utils.attacks.gradient import pgd
from utils.attacks.reweighed import Members, reweighed_loss, reweighed_pgd
from utils.attacks.suites import SUITES
from utils.evaluation.curve import NEVER
from utils.evaluation.ensemble import Vote
from utils.evaluation.vote import LOGITS, LOSSES_SUM, MEMBERS, PROBABILITIES, attack_vote, surrogates, vote_attacks

RADIUS = 9 / 255


@pytest.fixture(scope="module")
def members() -> list[nn.Module]:
    return [train_toy(seed) for seed in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["soft", "hard", "weighted"])
def test_transfer_alone_flatters_a_vote(rule: str, members, toy_test) -> None:
    weights = [0.5, 0.3, 0.2] if rule == "weighted" else None
    vote = Vote(members, rule=rule, weights=weights).eval()
    worst, table = attack_vote(vote, toy_test, epsilons=[RADIUS], suite="quick", names=["a", "b", "c"])
    assert table.transfer_only[1] >= table.joint[1] + 0.1
    assert worst.robust_accuracy[1] <= min(table.joint[1], table.transfer_only[1])
    assert set(table.members) == {"a", "b", "c"} and table.rule == rule
    # the vote gets margins, so its members get them, too
    assert table.members_by == [attack.title for attack in SUITES["brief"]]
    # never weaker than the worst case was without it
    assert all(now <= before for now, before in zip(worst.robust_accuracy, table.without_reweighing))
    assert table.best_member[1] == max(values[1] for values in table.members.values())
    assert "PGD-20 from a" in table.alone and "Square-200" in table.alone
    # some member is right wherever a vote is, and a vote can do no better than that
    assert all(oracle >= robust for oracle, robust in zip(table.oracle, worst.robust_accuracy))
    assert table.oracle[0] >= table.oracle[1]


@pytest.mark.slow
def test_one_image_fools_the_vote_itself(members, toy_test) -> None:
    vote = Vote(members, rule="hard").eval()
    worst, _ = attack_vote(vote, toy_test, epsilons=[RADIUS], suite="quick")
    wrong = worst.logits[1].argmax(1) != toy_test.labels
    assert wrong.tolist() == [step != NEVER for step in worst.first_broken]


def test_stand_ins_by_hand(members, toy_test) -> None:
    vote = Vote(members, rule="weighted", weights=[0.5, 0.3, 0.2]).eval()
    found = surrogates(vote, ["a", "b", "c"])
    pixels = toy_test.pixels(slice(0, 8))
    logits = torch.stack([member(pixels) for member in members])
    shares = torch.tensor([0.5, 0.3, 0.2])[:, None, None]
    assert torch.allclose(found[PROBABILITIES](pixels).exp(), (shares * logits.softmax(-1)).sum(0), atol=1e-5)
    assert torch.allclose(found[LOGITS](pixels), (shares * logits).sum(0), atol=1e-5)
    assert torch.allclose(found[LOSSES_SUM](pixels), (shares * logits.log_softmax(-1)).sum(0), atol=1e-5)
    assert found["b"] is vote.members[1]


def test_the_standard_suite_attacks_a_vote_with_its_own_budget() -> None:
    joint, transfer, black = vote_attacks("standard", ["a", "b"])
    assert {attack.surrogate for attack in joint} == {PROBABILITIES, LOGITS, LOSSES_SUM, MEMBERS}
    assert {attack.loss for attack in joint} == {"ce", "margin", "nll"}
    assert [attack.title for attack in transfer] == ["PGD-50x5 from a", "PGD-50x5 from b"]
    assert black[0].title == "Square-1000" and not any(attack.stop_when_fooled for attack in joint)


def test_members_that_are_fooled_pull_less() -> None:
    labels = torch.tensor([0])
    right, fooled = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    logits = torch.cat([right, fooled], 1).requires_grad_(True)
    gradient = torch.autograd.grad(reweighed_loss(2)(logits, labels).sum(), logits)[0].unflatten(1, (2, 3))[0]
    assert gradient[0].abs().sum() > 100 * gradient[1].abs().sum()
    # of one member it is that member's margin in units of its spread
    alone = reweighed_loss(1)(right, labels)
    torch.testing.assert_close(alone, torch.tensor([-3.0]) / right.std())


def test_the_reweighed_attack_beats_one_member_and_asks_for_members(members, toy_test) -> None:
    vote = Vote(members, rule="hard").eval()
    pixels, labels = toy_test.pixels(slice(0, 64)), toy_test.labels[:64]
    found = reweighed_pgd(Members(vote.members), pixels, labels, eps=RADIUS)
    from_one = pgd(members[0], pixels, labels, eps=RADIUS, steps=20)
    wrong = [(vote(own).argmax(1) != labels).float().mean() for own in (found, from_one)]
    assert wrong[0] > wrong[1] and (found - pixels).abs().max() <= RADIUS + 1e-6
    with pytest.raises(ValueError, match="needs the members of a vote, not a Sequential"):
        reweighed_pgd(members[0], pixels, labels, eps=RADIUS)
