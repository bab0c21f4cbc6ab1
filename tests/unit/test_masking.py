"""The panel must flag defences that are broken, and leave honest models alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.toy import EPS, toy_net
from utils.attacks.attack import Attack
from utils.attacks.suites import SUITES
from utils.data.sets import ImageSet
from utils.evaluation.masking import masking_panel

RUN = {"epsilons": [2 / 255, 4 / 255], "eps": EPS, "attacks": SUITES["quick"], "queries": 150}
#: PGD-20 alone misses one or two images of a plain net, and the panel says so; an honest number takes more.
ENOUGH = (
    Attack("fgsm"),
    Attack("pgd", steps=50, restarts=2, stop_when_fooled=True),
    Attack("apgd", steps=50),
    Attack("apgd_t", steps=50, restarts=2),
)


class _Defence(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Quantised(_Defence):
    """Rounds its input, which has no gradient."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net((images * 16).round() / 16)


class Saturated(_Defence):
    """Scales its logits until the cross-entropy of a right answer is exactly zero."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1e5 * self.net(images)


class Noisy(_Defence):
    """Adds noise to its input, so that the gradient is of another image than the next answer."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images + 0.1 * torch.randn_like(images))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["plain", "hardened"])
def test_honest_models_pass(which: str, toy_nets, toy_test) -> None:
    panel = masking_panel(toy_nets[which], toy_test, **RUN | {"attacks": ENOUGH})
    assert panel.verdict == "gradient checks 9/9", [check for check in panel.checks if not check.passed]
    assert len({check.name for check in panel.checks}) == 9 and panel.n_images == len(toy_test)
    assert panel.alone["worst case"] <= min(panel.alone[attack.title] for attack in ENOUGH)
    assert panel.plain()["verdict"] == "gradient checks 9/9"


@pytest.mark.slow
@pytest.mark.parametrize(
    "defence, betrayed_by",
    [
        (Quantised, ["without a bound", "Square-150 breaks nothing"]),
        (Saturated, ["without a bound", "Square-150 breaks nothing"]),
        (Noisy, ["the same image gets"]),
    ],
)
def test_broken_defences_are_flagged(defence, betrayed_by, toy_nets, toy_test) -> None:
    torch.manual_seed(0)
    panel = masking_panel(defence(toy_nets["plain"]).eval(), toy_test, **RUN)
    failed = [check.question for check in panel.checks if not check.passed]
    assert panel.verdict == f"gradient checks {9 - len(failed)}/9: " + ", ".join(
        check.name for check in panel.checks if not check.passed
    )
    assert all(any(question.startswith(start) for question in failed) for start in betrayed_by), failed


@pytest.mark.slow
def test_too_few_steps_are_noticed(toy_nets, toy_test) -> None:
    weak = (Attack("fgsm"), Attack("pgd", steps=4, alpha=EPS / 40, random_start=False, stop_when_fooled=True))
    with pytest.warns(UserWarning, match="cannot reach"):
        panel = masking_panel(toy_nets["plain"], toy_test, **RUN | {"attacks": weak})
    failed = [check.question for check in panel.checks if not check.passed]
    assert "PGD-4 is not weaker than FGSM" in failed and "ten times the steps change nothing" in failed


@pytest.mark.slow
def test_square_is_held_against_all_gradient_attacks_of_the_number(toy_nets, toy_test) -> None:
    """One PGD may stall where another loss does not: only what every gradient leaves betrays a masked one."""
    stalled = Attack("pgd", steps=1, alpha=EPS / 100, random_start=False)
    with pytest.warns(UserWarning, match="cannot reach"):
        panel = masking_panel(
            toy_nets["plain"], toy_test, **RUN | {"attacks": (stalled, Attack("apgd_t", steps=30)), "queries": 500}
        )
    assert panel.alone["Square-500"] < panel.alone[stalled.title] - 0.1
    square = next(check for check in panel.checks if check.question.startswith("Square-500"))
    assert square.passed, square


def test_the_panel_needs_a_radius_and_a_pgd(toy_test) -> None:
    for wrong in ({"eps": 0}, {"attacks": (Attack("fgsm"),)}):
        with pytest.raises(ValueError, match="panel needs"):
            masking_panel(toy_net(0).eval(), toy_test, **RUN | wrong)


class ThreeWays(torch.nn.Module):
    """Its best wrong class is never in reach and the other one is: only an attack with targets finds it.

    The image's mean decides between right (class 0) and class 1, whose logit falls as fast as that of the right class;
    class 2 rises along another direction, from far below.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        mean, tilt = flat.mean(1), (flat[:, ::2].mean(1) - flat[:, 1::2].mean(1))
        near = -0.05 - 4 * (mean - 0.5).abs()
        far = torch.where(tilt > 0.04, 5.0 * torch.ones_like(tilt), -1 + 0.2 * tilt)
        return torch.stack([torch.zeros_like(mean), near, far, -9 + 0 * mean], 1)


def test_targeted_attacks_lower_a_number_that_untargeted_ones_leave() -> None:
    images = ImageSet(
        torch.full((24, 1, 8, 8), 128, dtype=torch.uint8),
        torch.zeros(24, dtype=torch.int64),
        torch.arange(24),
        torch.zeros(24, dtype=torch.int64),
        torch.zeros(24, dtype=torch.bool),
        [""] * 24,
        ["a", "b", "c", "d"],
    )
    attacks = (Attack("fgsm"), Attack("pgd", steps=10, loss="margin", random_start=False, stop_when_fooled=True))
    panel = masking_panel(ThreeWays().eval(), images, epsilons=[0.05], eps=0.05, attacks=attacks, queries=20)
    targets = next(check for check in panel.checks if check.name == "targets")
    assert panel.alone["worst case"] == 1 and not targets.passed and "breaks 100.0% more" in targets.measured
