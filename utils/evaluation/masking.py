"""Is a robust number real, or are the gradients masked? Checks that every robust accuracy carries with it.

After Athalye, Carlini and Wagner, 2018 (arXiv:1802.00420, section 3.1) and Carlini et al., 2019
(arXiv:1902.06705): a defence that hides its gradient betrays itself by attacks that behave in ways in
which they cannot behave on a model that is truly robust.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import Threat
from utils.core.parts import Part
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.evaluation.curve import NEVER, RobustnessCurve, combine
from utils.evaluation.worst_case import robustness_curve

#: Starts of the targeted attack that is held against the survivors.
TARGETED_STARTS = 2


class Check(Part):
    """One check: what was asked, what was measured, whether it passed, and its name where room is short."""

    question: str
    measured: str
    passed: bool
    name: str = ""

    @property
    def short(self) -> str:
        """The name, or the question's beginning."""
        return self.name or self.question.split(",")[0]


class Panel(Part):
    """All checks of one model.

    Attributes:
        verdict: of :func:`verdict_of` when it was made.
        checks: in the order of :func:`masking_panel`.
        eps: radius at which they were made.
        n_images: on so many images.
        alone: title of each attack -> robust accuracy under it alone at ``eps``, on those images.
        seconds: wall time.
    """

    verdict: str
    checks: list[Check]
    eps: float
    n_images: int
    alone: dict[str, float]
    seconds: float


def verdict_of(checks: Sequence[Check] | None) -> str:
    """How many checks passed, and which failed: ``gradient checks 8/8``; ``unchecked`` without any."""
    if not checks:
        return "unchecked"
    failed = [check.short for check in checks if not check.passed]
    count = f"gradient checks {len(checks) - len(failed)}/{len(checks)}"
    return f"{count}: {', '.join(dict.fromkeys(failed))}" if failed else count


def masking_panel(
    model: nn.Module,
    images: ImageSet,
    *,
    epsilons: Sequence[float],
    eps: float,
    attacks: Sequence[Attack],
    threat: Threat | None = None,
    tolerance: float = 0.01,
    queries: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Panel:
    """Make all checks on ``images``.

    Args:
        images: a subset of the test images is enough; spread it over patients.
        epsilons: radii for the check that accuracy never rises, each attacked afresh.
        eps: radius for all other checks.
        attacks: of the number that is checked; ten times the steps are held against the survivors of these.
        tolerance: share of images by which a check may be missed, or one image where that is more.
        queries: of Square.
        seed, batch_size, device, threat, cache: see :func:`utils.evaluation.worst_case.robustness_curve`.

    Raises:
        ValueError: see :func:`utils.evaluation.worst_case.robustness_curve`; also ``eps`` 0 or attacks without a PGD.
    """
    steepest = next((attack for attack in attacks if attack.name == "pgd"), None)
    if not eps > 0 or steepest is None:
        raise ValueError("the panel needs a radius above 0 and a PGD among the attacks")
    measure = partial(robustness_curve, threat=threat, seed=seed, batch_size=batch_size, device=device, cache=cache)
    pgd_alone = replace(steepest, restarts=1, loss="ce")
    inspection = _Inspection(model, images, pgd_alone, threat or Threat(), device, measure)
    slack = max(tolerance, 1.001 / len(images))
    worst = measure(model, images, attack=attacks, epsilons=[eps])
    alone = {attack.title: inspection.alone(attack, eps) for attack in attacks}
    pgd = inspection.alone(inspection.pgd, eps)
    fgsm = inspection.alone(Attack("fgsm"), eps)
    square = inspection.alone(Attack("square", steps=queries), eps)
    noise = inspection.alone(Attack("noise", restarts=5), eps)
    white_box = [curve for attack, curve in zip(attacks, alone.values()) if attack.kind.sees == "gradient"]
    gradients = combine([pgd, fgsm, *white_box])
    fresh = [(radius, inspection.alone(inspection.pgd, radius)) for radius in sorted({*epsilons, eps} - {0.0})]
    checks = [
        _not_weaker(pgd, fgsm, slack),
        _never_rises([(0.0, worst), *fresh], slack),
        _reaches_zero(inspection.without_bound(), slack),
        _steps_suffice(inspection, worst, eps, slack),
        _targets_add_nothing(inspection, worst, eps, slack),
        _square_adds_nothing(square, gradients, slack),
        _noise_is_weak(noise, pgd, worst, slack),
        _inside(worst, eps),
        inspection.same_answer_twice(),
    ]
    robust = {title: curve.robust_accuracy[-1] for title, curve in alone.items()}
    robust |= {curve.title: curve.robust_accuracy[-1] for curve in (square, noise)} | {
        "worst case": worst.robust_accuracy[-1]
    }
    return Panel(
        verdict=verdict_of(checks),
        checks=checks,
        eps=eps,
        n_images=len(images),
        alone=robust,
        seconds=inspection.seconds + worst.seconds,
    )


@dataclass
class _Inspection:
    model: nn.Module
    images: ImageSet
    pgd: Attack
    threat: Threat
    device: torch.device | str
    measure: Callable[..., RobustnessCurve]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._known: dict[tuple[Attack, float], RobustnessCurve] = {}

    def alone(self, attack: Attack, eps: float) -> RobustnessCurve:
        if (attack, eps) not in self._known:
            curve = self.measure(self.model, self.images, attack=attack, epsilons=[eps])
            self.seconds += curve.seconds
            self._known[attack, eps] = curve
        return self._known[attack, eps]

    def without_bound(self) -> RobustnessCurve:
        """PGD that may change the image into any other one."""
        pixels = self.threat.images(self.images, slice(0, 1), "cpu")[0]
        return self.alone(self.pgd, 1.0 if self.threat.norm == "linf" else pixels.numel() ** 0.5)

    def same_answer_twice(self) -> Check:
        """A model that draws random numbers is attacked on other draws than it answers with."""
        pixels = self.threat.images(self.images, slice(0, 64), self.device)
        apart = (predict_batch(self.model, pixels) - predict_batch(self.model, pixels)).abs().max().item()
        measured = f"logits differ by {apart:.2g}"
        return _check("the same image gets the same answer twice", measured, apart < 1e-3, "same answer")


def _check(question: str, measured: str, passed: bool, name: str) -> Check:
    return Check(question=question, measured=measured, passed=passed, name=name)


def _percent(curve: RobustnessCurve) -> str:
    return f"{curve.robust_accuracy[-1]:.1%}"


def _not_weaker(pgd: RobustnessCurve, fgsm: RobustnessCurve, slack: float) -> Check:
    passed = pgd.robust_accuracy[-1] <= fgsm.robust_accuracy[-1] + slack
    return _check(
        f"{pgd.title} is not weaker than FGSM",
        f"{_percent(pgd)} robust to {pgd.title}, {_percent(fgsm)} to FGSM",
        passed,
        "PGD against FGSM",
    )


def _never_rises(fresh: list[tuple[float, RobustnessCurve]], slack: float) -> Check:
    values = [curve.robust_accuracy[0 if eps == 0 else -1] for eps, curve in fresh]
    passed = all(later <= earlier + slack for earlier, later in pairwise(values))
    shown = ", ".join(f"{value:.1%}" for value in values)
    return _check("accuracy never rises with eps, each radius attacked afresh", shown, passed, "growing eps")


def _reaches_zero(boundless: RobustnessCurve, slack: float) -> Check:
    passed = boundless.robust_accuracy[-1] <= 2 * slack
    return _check(
        "without a bound on the change hardly anything is robust", f"{_percent(boundless)} are", passed, "no bound"
    )


def _broken_survivors(inspection: _Inspection, worst: RobustnessCurve, attack: Attack, eps: float) -> float:
    """Share of all images that another attack breaks of those that ``worst`` left."""
    alive = torch.nonzero(torch.tensor(worst.first_broken) == NEVER)[:, 0]
    if not len(alive):
        return 0.0
    survivors = inspection.images.subset(alive)
    curve = inspection.measure(inspection.model, survivors, attack=attack, epsilons=[eps])
    inspection.seconds += curve.seconds
    return sum(step != NEVER for step in curve.first_broken) / len(inspection.images)


def _steps_suffice(inspection: _Inspection, worst: RobustnessCurve, eps: float, slack: float) -> Check:
    longer = replace(inspection.pgd, steps=10 * inspection.pgd.steps)
    share = _broken_survivors(inspection, worst, longer, eps)
    return _check(
        "ten times the steps change nothing",
        f"{longer.title} breaks {share:.1%} more",
        share < slack,
        "more steps",
    )


def _targets_add_nothing(inspection: _Inspection, worst: RobustnessCurve, eps: float, slack: float) -> Check:
    """An attack towards each wrong class finds what one away from the right class passes by."""
    classes = worst.logits.shape[2]
    targeted = Attack("apgd_t", steps=max(20, inspection.pgd.steps), restarts=TARGETED_STARTS, targets=classes - 1)
    share = _broken_survivors(inspection, worst, targeted, eps)
    return _check(
        "targeted attacks with restarts change nothing",
        f"{targeted.title} towards each wrong class breaks {share:.1%} more",
        share < slack,
        "targets",
    )


def _square_adds_nothing(square: RobustnessCurve, gradients: RobustnessCurve, slack: float) -> Check:
    """Square sees the outputs only: what it breaks, one of the attacks that follow gradients must break too."""
    pairs = zip(square.first_broken, gradients.first_broken)
    only = sum(black != NEVER and white == NEVER for black, white in pairs) / square.n_images
    return _check(
        f"{square.title} breaks nothing that all gradient attacks leave",
        f"{only:.1%} broken by {square.title} alone",
        only < slack,
        "black box",
    )


def _noise_is_weak(noise: RobustnessCurve, pgd: RobustnessCurve, worst: RobustnessCurve, slack: float) -> Check:
    clean = worst.robust_accuracy[0]
    by_noise, by_pgd = (clean - curve.robust_accuracy[-1] for curve in (noise, pgd))
    return _check(
        "noise of the same size is far weaker",
        f"noise breaks {by_noise:.1%}, {pgd.title} {by_pgd:.1%}",
        by_noise <= max(by_pgd / 2, slack),
        "noise",
    )


def _inside(worst: RobustnessCurve, eps: float) -> Check:
    largest = max(worst.max_norm)
    passed = largest <= eps * (1 + 1e-4) + 1e-6
    return _check("no change is larger than eps", f"{largest / eps:.4f} eps at most", passed, "size")
