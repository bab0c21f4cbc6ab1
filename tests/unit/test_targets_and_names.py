"""Targeted attacks, those of torchattacks by name, parts, views and links, against closed forms and libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from conftest import SmallNet
from torch import nn

from tests.toy import EPS, toy_images, train_toy
from utils.attacks.attack import Attack, known_attacks
from utils.attacks.balls import distance, project
from utils.attacks.gradient import margin, pgd
from utils.attacks.library import LIBRARY, settings_of
from utils.attacks.linked import LINKS, link_matrix, linked_pgd
from utils.attacks.suites import Threat
from utils.attacks.targets import Towards, log_odds, parse_target, target_mask, targeted_pgd
from utils.attacks.universal import universal_perturbation
from utils.attacks.views import VIEWS, as_jpeg, eot_pgd
from utils.data.anatomy import PARTS, part_masks
from utils.evaluation.by_patient import MeanOfSlices, Verdict
from utils.evaluation.worst_case import robustness_curve

STEPS, ALPHA = 7, 1 / 255
RADII = {"linf": EPS, "l2": 0.5, "l0": 4}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return train_toy(0)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = toy_images(32, seed=5)
    return images.pixels(slice(None)), images.labels


class Linear(nn.Module):
    """Class scores are sums of pixels of each quarter: the best attack towards a class is known."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(4, 4, 4)
        for k in range(4):
            weight[k, 2 * (k // 2) : 2 * (k // 2) + 2, 2 * (k % 2) : 2 * (k % 2) + 2] = 1
        self.register_buffer("weight", weight.flatten(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


# --- I-FGSM and torchattacks by name --------------------------------------------------------------------------------


def test_our_ifgsm_is_the_bim_of_torchattacks(net: nn.Module, batch) -> None:
    images, labels = batch
    ours = Attack("ifgsm", steps=STEPS, alpha=ALPHA)(net, images, labels, eps=EPS)
    theirs = torchattacks.BIM(net.eval(), eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        Attack("BIM", steps=STEPS, alpha=ALPHA)(net, images, labels, eps=EPS), ours, atol=1e-6, rtol=0
    )


def test_every_attack_of_torchattacks_is_known_or_left_out_on_purpose() -> None:
    classes = {name for name in torchattacks.__all__ if isinstance(getattr(torchattacks, name, None), type)}
    assert classes - set(LIBRARY) == {"VANILA", "GN", "MultiAttack", "LGV"}
    assert set(LIBRARY) <= classes
    assert set(LIBRARY) <= set(known_attacks())


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, norms in LIBRARY.items() for norm in norms])
def test_each_stays_in_its_ball_and_leaves_the_model_as_it_was(name: str, norm: str, batch) -> None:
    torch.manual_seed(0)
    model = SmallNet().train()
    model.body[3].eval()
    modes = [module.training for module in model.modules()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    images, labels = batch[0][:4], batch[1][:4]
    attack, eps = Attack(name, steps=3), RADII[norm]
    found = attack(model, images, labels, eps=eps, norm=norm)
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    assert distance(found - images, norm).max() <= eps + 1e-5
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(found, attack(model, images, labels, eps=eps, norm=norm)), "one seed, one result"


@pytest.mark.parametrize("name", ["MIFGSM", "DIFGSM", "VMIFGSM", "NIFGSM", "EOTPGD"])
def test_those_with_steps_beat_one_step(name: str, net: nn.Module, batch) -> None:
    images, labels = batch
    one = Attack("FGSM")(net, images, labels, eps=EPS)
    many = Attack(name, steps=10)(net, images, labels, eps=EPS)
    wrong = [(margin(net(found), labels) > 0).float().mean() for found in (one, many)]
    assert wrong[1] >= wrong[0]


def test_tifgsm_sees_a_grey_image_as_three_alike_planes(net: nn.Module, batch) -> None:
    images, labels = batch
    found = Attack("TIFGSM", steps=5, options={"len_kernel": 3})(net, images, labels, eps=EPS)
    assert margin(net(found), labels).mean() > margin(net(images), labels).mean()


@pytest.mark.parametrize("name", ["APGDT", "AutoAttack"])
def test_a_loss_over_four_logits_is_refused_for_three_before_any_work(name: str) -> None:
    with pytest.raises(ValueError, match="targeted loss needs four classes, and this model has 3"):
        robustness_curve(train_toy(0, k=3, steps=5), toy_images(8, 5, k=3), attack=Attack(name), epsilons=[EPS])
    assert "-" not in Attack("Pixle").title.split(" of ")[0]


def test_options_are_checked_by_name() -> None:
    assert Attack("CW", options={"c": 2.0}).options == {"c": 2.0}
    with pytest.raises(ValueError, match="decay must be a number, not nan"):
        Attack("MIFGSM", options={"decay": float("nan")})
    with pytest.raises(ValueError, match="CW takes the options c, kappa, lr, not constant"):
        Attack("CW", options={"constant": 1})
    with pytest.raises(ValueError, match="not eps"):
        Attack("BIM", options={"eps": 1})
    with pytest.raises(ValueError, match="takes no options, not samples"):
        Attack("pgd", options={"samples": 3})
    with pytest.raises(ValueError, match="torchattacks has"):
        settings_of("Nothing")


def test_a_norm_in_which_an_attack_does_not_run_is_refused_before_any_work(net: nn.Module, batch) -> None:
    with pytest.raises(ValueError, match=r"OnePixel-10 of torchattacks is an attack in L0, not in L-inf"):
        Attack("OnePixel", steps=10)(net, *batch, eps=EPS)
    with pytest.raises(ValueError, match="FGSM is an attack in L-inf or L2, not in L0"):
        robustness_curve(net, toy_images(8, seed=1), attack=Attack("fgsm"), epsilons=[1], threat=Threat("l0"))


def test_pixels_are_counted(net: nn.Module) -> None:
    shift = torch.zeros(1, 3, 2, 2)
    shift[0, 0, 0, 0], shift[0, 1, 0, 0], shift[0, 2, 1, 1], shift[0, 0, 0, 1] = 0.1, 0.2, -0.5, 0.05
    assert distance(shift, "l0").tolist() == [3]
    kept = project(shift, 2, "l0")
    assert distance(kept, "l0").tolist() == [2] and kept[0, 0, 0, 1] == 0 and kept[0, 0, 0, 0] == 0.1
    curve = robustness_curve(
        net, toy_images(8, seed=1), attack=Attack("SparseFool", steps=5), epsilons=[1, 64], threat=Threat("l0")
    )
    assert curve.robust_accuracy[2] <= curve.robust_accuracy[1] <= curve.robust_accuracy[0]


# --- targets --------------------------------------------------------------------------------------------------------


def test_targets_are_words_or_classes() -> None:
    classes = ["Non", "VeryMild", "Mild", "Moderate"]
    assert parse_target("healthy", classes) == (0,) and parse_target("ill", classes) == (1, 2, 3)
    assert parse_target("mild", classes) == (2,) and parse_target("next", classes) == "next"
    with pytest.raises(ValueError, match="a target must be one of"):
        parse_target("worst", classes)
    with pytest.raises(ValueError, match="known to mean healthy"):
        parse_target("ill", ["a", "b"])
    with pytest.raises(ValueError, match="option target"):
        Attack("pgd_t")
    with pytest.raises(ValueError, match="indices of classes"):
        Attack("pgd_t", options={"target": "Mild"})
    assert Attack("pgd_t", options={"target": [1, 2]}).title == "PGD-20 to classes 1, 2"
    assert Attack("ifgsm_t", steps=5, options={"target": "next"}).title == "I-FGSM-5 to the next stage"


def test_whether_a_target_is_reached_is_a_question_of_two_answers() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, -1.0, 0.0, 5.0]])
    asked = Towards(nn.Identity(), torch.tensor([True, False, True, False]))
    assert asked(logits).tolist() == [[2.0, 3.0], [5.0, 4.0]]
    smooth = Towards(nn.Identity(), torch.tensor([True, False, True, False]), smooth=True)(logits)
    expected = [[np.logaddexp(2, 0), np.logaddexp(1, 3)], [np.logaddexp(-1, 5), np.logaddexp(4, 0)]]
    torch.testing.assert_close(smooth, torch.tensor(expected).float())
    for wanted in ([False] * 4, [True] * 4):
        with pytest.raises(ValueError, match="some classes must be wanted"):
            Towards(nn.Identity(), torch.tensor(wanted))


def test_a_linear_models_target_is_reached_from_the_radius_that_follows_from_its_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
        model[1].bias.copy_(torch.tensor([0.4, 0.0, -1e4]))
        model[1].bias[0] -= (model[1].weight[0] - model[1].weight[1]).sum() / 2
    images = 0.5 + 0.01 * torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    logits, slope = model(images), model[1].weight
    needed = (logits[:, 0] - logits[:, 1]) / (slope[0] - slope[1]).abs().sum()
    labels = torch.zeros(20, dtype=torch.long)
    for eps in (float(needed.median()), 0.05):
        there = Towards(model, torch.tensor([False, True, False]))
        found = pgd(there, images, labels, eps=eps, steps=10)
        clear = (needed - eps).abs() > 1e-4
        assert clear.sum() > 10 and (needed > 0).all()
        assert torch.equal((model(found).argmax(1) == 1)[clear], (needed < eps)[clear])


def test_masks_of_targets_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 2])

    def places(target) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in target_mask(target, logits, labels)]

    assert places("likeliest") == [[2], [2], [1]]
    assert places("least_likely") == [[1], [0], [0]]
    assert places("next") == [[1], [2], []]
    assert places("former") == [[], [0], [1]]
    assert places([1, 2]) == [[1, 2], [], []]
    with pytest.raises(ValueError, match="classes 0 to 2, not 3"):
        target_mask([3], logits, labels)


def test_log_odds_of_a_set_and_their_gradient() -> None:
    logits = torch.randn(5, 4, requires_grad=True)
    wanted = torch.tensor(
        [[True, False, False, False], [False, True, True, False], [False] * 4] + [[False] * 3 + [True]] * 2
    )
    chance = (logits.softmax(1) * wanted).sum(1)
    expected = torch.where(wanted.any(1), (chance / (1 - chance)).log(), torch.zeros(5))
    found = log_odds(logits, wanted)
    torch.testing.assert_close(found, expected)
    gradient = torch.autograd.grad(found.sum(), logits)[0]
    assert gradient.isfinite().all() and gradient[2].abs().max() == 0


def test_the_best_step_towards_a_class_of_a_linear_model_is_found() -> None:
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    found = targeted_pgd(Linear(), images, labels, target=[3], eps=0.1, steps=10, assume_checked=True)
    shift = found - images
    # two-by-two quarter of class 3 up, all others down
    expected = torch.full((4, 4), -0.1)
    expected[2:, 2:] = 0.1
    torch.testing.assert_close(shift, expected.expand(2, 1, 4, 4))


def test_an_image_with_nowhere_to_go_comes_back(net: nn.Module, batch) -> None:
    images, labels = batch
    found = Attack("pgd_t", steps=3, options={"target": "next"})(net, images, labels, eps=EPS)
    same = (found == images).flatten(1).all(1)
    assert torch.equal(same, labels == 3)


def test_a_target_is_reached_more_often_than_by_an_untargeted_attack(net: nn.Module, batch) -> None:
    images, labels = batch
    aim = target_mask("least_likely", net(images).detach(), labels).int().argmax(1)
    targeted = Attack("pgd_t", options={"target": "least_likely"})(net, images, labels, eps=2 * EPS)
    plain = pgd(net, images, labels, eps=2 * EPS, steps=20)
    hits = [(net(found).argmax(1) == aim).float().mean() for found in (targeted, plain)]
    assert hits[0] > hits[1]


# --- parts of the image ---------------------------------------------------------------------------------------------


def test_parts_of_a_drawn_head() -> None:
    image = torch.zeros(1, 1, 64, 64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    from_middle = ((y - 32) ** 2 + (x - 32) ** 2).sqrt()
    image[0, 0, from_middle <= 24] = 0.8
    image[0, 0, from_middle <= 5] = 0.1
    brain, back, rim, fluid = (part_masks(image, name)[0, 0] for name in ("brain", "background", "rim", "ventricles"))
    assert torch.equal(brain, from_middle <= 24) and torch.equal(back, ~brain)
    assert torch.equal(fluid, from_middle <= 5)
    assert rim[from_middle > 23][brain[from_middle > 23]].all() and not (rim & (from_middle < 14)).any()
    with pytest.raises(ValueError, match="part must be one of"):
        part_masks(image, "skull")


def test_a_slice_that_fills_the_picture_has_a_rim_all_around() -> None:
    image = torch.full((1, 1, 32, 32), 0.8)
    rim = part_masks(image, "rim")[0, 0]
    assert rim[:3].all() and rim[:, -3:].all() and not rim[12:20, 12:20].any()
    assert torch.equal(rim, rim.flip(0)) and torch.equal(rim, rim.T)


@pytest.mark.parametrize("part", PARTS)
def test_a_region_attack_changes_nothing_else_and_is_not_stronger(part: str, net: nn.Module, batch) -> None:
    images, labels = batch
    inside = part_masks(images, part)
    found = Attack("region", options={"part": part})(net, images, labels, eps=EPS)
    assert ((found - images) * ~inside).abs().max() == 0
    whole = pgd(net, images, labels, eps=EPS, steps=20)
    assert margin(net(found), labels).mean() <= margin(net(whole), labels).mean() + 1e-4


def test_a_full_mask_is_plain_pgd(net: nn.Module, batch) -> None:
    images, labels = batch
    one, other = (
        pgd(net, images, labels, eps=EPS, steps=5, generator=torch.Generator().manual_seed(1), mask=mask)
        for mask in (None, torch.ones_like(images))
    )
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="stop_when_fooled"):
        pgd(net, images, labels, eps=EPS, mask=torch.ones_like(images), stop_when_fooled=True)


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIEWS)
def test_views_stay_images_and_pass_gradients_on(name: str, batch) -> None:
    images = batch[0][:4].clone().requires_grad_(True)
    seen = VIEWS[name](images, torch.Generator().manual_seed(0))
    assert seen.shape == images.shape and seen.min() >= 0 and seen.max() <= 1
    assert torch.autograd.grad(seen.sum(), images)[0].abs().sum() > 0
    assert (seen - images).abs().mean() < 0.1


def test_jpeg_at_full_quality_is_almost_the_image(batch) -> None:
    exact = (batch[0][:3] * 255).round() / 255
    assert (as_jpeg(exact, 100) - exact).abs().max() <= 3 / 255
    assert (as_jpeg(exact, 75) - exact).abs().max() > 3 / 255


def test_an_attack_on_the_expectation_survives_more_often(net: nn.Module, batch) -> None:
    images, labels = batch
    plain = pgd(net, images, labels, eps=EPS, steps=20, generator=torch.Generator().manual_seed(0))
    expected = eot_pgd(net, images, labels, eps=EPS, steps=20, samples=5)

    def surviving(found: torch.Tensor) -> float:
        draws = torch.Generator().manual_seed(7)
        seen = [
            net(VIEWS[name](found, draws)) for name in ("resized", "turned by 1 degree", "window") for _ in range(8)
        ]
        return float(torch.stack([(answer.argmax(1) != labels).float() for answer in seen]).mean())

    assert surviving(expected) >= surviving(plain)
    with pytest.raises(ValueError, match="at least 1"):
        eot_pgd(net, images, labels, eps=EPS, samples=0)
    with pytest.raises(ValueError, match="samples must be a whole number"):
        Attack("eot", options={"samples": 1.5})


def test_what_one_image_meets_does_not_depend_on_who_else_is_attacked(net: nn.Module, batch) -> None:
    images, labels = batch[0][:6], batch[1][:6]
    draws = [torch.Generator().manual_seed(number) for number in range(6)]
    together = eot_pgd(net, images, labels, eps=EPS, steps=3, generator=draws)
    draws = [torch.Generator().manual_seed(number) for number in range(6)]
    alone = eot_pgd(net, images[4:], labels[4:], eps=EPS, steps=3, generator=draws[4:])
    torch.testing.assert_close(together[4:], alone)


# --- a patient's slices together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
def test_a_linked_change_is_a_mean_of_changes_in_the_ball(link: str, net: nn.Module) -> None:
    weights = link_matrix(link, 5)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    images = toy_images(32, seed=6)
    stacks, labels = images.pixels(slice(None)).reshape(4, 8, 16, 16), images.labels[::8]
    model = MeanOfSlices(net)
    found = linked_pgd(model, stacks, labels, link=link, eps=EPS, steps=10)
    shift = found - stacks
    assert shift.abs().max() <= EPS + 1e-6
    if link == "shared":
        inside = ((found > 0) & (found < 1)).all(1, keepdim=True).expand_as(shift)
        spread = (shift - shift.mean(1, keepdim=True)).abs()
        assert spread[inside].max() < 1e-6
    assert (margin(model(found), labels) > margin(model(stacks), labels)).all()


def test_a_tie_costs_the_attacker(net: nn.Module) -> None:
    images = toy_images(64, seed=6)
    stacks, labels = images.pixels(slice(None)).reshape(8, 8, 16, 16), images.labels[::8]
    model, reached = MeanOfSlices(net), {}
    for link in LINKS:
        # the best of some starts: one alone may end far below what its ball holds
        starts = [torch.Generator().manual_seed(seed) for seed in range(4)]
        found = [linked_pgd(model, stacks, labels, link=link, eps=EPS, steps=20, generator=own) for own in starts]
        reached[link] = torch.stack([margin(model(own), labels) for own in found]).amax(0).mean().item()
    assert reached["free"] > reached["smooth"] > reached["shared"]
    with pytest.raises(ValueError, match="link must be one of"):
        link_matrix("loose", 3)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        linked_pgd(model, stacks, labels, link="free", eps=EPS, steps=0)
    with pytest.warns(UserWarning, match="cannot reach the edge of the ball"):
        linked_pgd(model, stacks, labels, link="free", eps=EPS, steps=1, alpha=EPS / 10)
    with pytest.warns(UserWarning, match="cannot reach the edge of the ball"):
        eot_pgd(net, images.pixels(slice(0, 2)), images.labels[:2], eps=EPS, steps=1, samples=1, alpha=EPS / 10)


def test_a_verdict_is_the_side_of_the_threshold(net: nn.Module) -> None:
    stacks = toy_images(64, seed=3).pixels(slice(None)).reshape(8, 8, 16, 16)
    model = MeanOfSlices(net)
    ill = 1 - model(stacks).exp()[:, 1]
    for threshold in (0.2, 0.5, 0.9):
        said = Verdict(model, 1, threshold)(stacks).argmax(1).bool()
        assert torch.equal(said, ill > threshold)
    with pytest.raises(ValueError, match="threshold must be above 0"):
        Verdict(model, 0, 1.0)


# --- one change for all ---------------------------------------------------------------------------------------------


def test_a_universal_change_is_found_where_a_linear_model_has_one() -> None:
    images = toy_images(64, seed=2)
    images.images[:] = 128
    images.labels[:] = 0
    shift = universal_perturbation(Linear4(), images, eps=0.05, epochs=5, batch_size=16)
    torch.testing.assert_close(shift, -0.05 * torch.ones_like(shift))


class Linear4(nn.Module):
    """The first class is as likely as the image is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.mean((1, 2, 3))
        return torch.stack([bright, *[1 - bright] * 3], 1)


def test_a_universal_change_beats_noise_on_other_images(net: nn.Module) -> None:
    train, test = toy_images(256, seed=1), toy_images(128, seed=8)
    shift = universal_perturbation(net, train, eps=EPS, epochs=5)
    assert shift.abs().max() <= EPS + 1e-6
    noise = EPS * torch.randn(shift.shape, generator=torch.Generator().manual_seed(0)).sign()
    pixels = test.pixels(slice(None))
    wrong = [(net((pixels + own).clamp(0, 1)).argmax(1) != test.labels).float().mean() for own in (shift, noise)]
    assert wrong[0] > wrong[1]
    with pytest.raises(ValueError, match="epochs"):
        universal_perturbation(net, train, eps=EPS, epochs=0)


def test_one_change_for_all_runs_by_its_name_and_is_judged_like_every_attack(net: nn.Module, tmp_path: Path) -> None:
    train, test = toy_images(256, seed=1), toy_images(64, seed=8)
    attack, radii = Attack("universal", steps=5, options={"images": 256}), [EPS / 2, EPS]
    curve = robustness_curve(net, test, attack=attack, epsilons=radii, fit_on=train, cache=tmp_path)
    # the worst case over both radii, each with the change that the function itself finds
    wrong = net(test.pixels(slice(None))).argmax(1) != test.labels
    for eps, robust in zip(radii, curve.robust_accuracy[1:]):
        shift = universal_perturbation(net, train, eps=eps, epochs=5)
        wrong |= net((test.pixels(slice(None)) + shift).clamp(0, 1)).argmax(1) != test.labels
        assert robust == pytest.approx(1 - wrong.float().mean().item())
    # in the ball of each image, so that an attack on the image itself finds as much
    each = robustness_curve(net, test, attack=Attack("pgd", steps=20), epsilons=radii)
    assert each.robust_accuracy[-1] <= curve.robust_accuracy[-1]
    # what it was fitted on tells evaluations apart
    known = len(list(tmp_path.iterdir()))
    again = robustness_curve(net, test, attack=attack, epsilons=radii, fit_on=train, cache=tmp_path)
    assert again.robust_accuracy == curve.robust_accuracy and len(list(tmp_path.iterdir())) == known
    robustness_curve(net, test, attack=attack, epsilons=radii, fit_on=toy_images(256, seed=9), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * known


def test_one_change_for_all_needs_no_parameters_in_the_model() -> None:
    images = toy_images(64, seed=2)
    images.images[:] = 128
    images.labels[:] = 0
    curve = robustness_curve(Linear4(), images, attack=Attack("universal", steps=5), epsilons=[0.3], fit_on=images)
    assert curve.robust_accuracy == [1.0, 0.0]


def test_an_attack_that_is_fitted_first_says_what_it_needs(net: nn.Module, batch) -> None:
    attack, test = Attack("universal"), toy_images(8, seed=8)
    with pytest.raises(ValueError, match="name them as fit_on"):
        robustness_curve(net, test, attack=attack, epsilons=[EPS])
    with pytest.raises(ValueError, match="name them as fit_on"):
        attack(net, *batch, eps=EPS)
    with pytest.raises(ValueError, match="grey images at their own size"):
        robustness_curve(net, test, attack=attack, epsilons=[EPS], fit_on=test, threat=Threat(size=32))
    with pytest.raises(ValueError, match="in L-inf or L2, not in L0"):
        robustness_curve(net, test, attack=attack, epsilons=[4], fit_on=test, threat=Threat("l0"))
    for options in ({"images": 0}, {"images": True}, {"epochs": 3}):
        with pytest.raises(ValueError, match="images"):
            Attack("universal", options=options)
