from __future__ import annotations

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.toy import EPS, toy_images, train_toy
from utils.attacks.apgd import apgd, apgd_targeted, checkpoints, targeted_dlr
from utils.attacks.attack import Attack
from utils.attacks.balls import distance, project, random_point, steepest
from utils.attacks.gradient import fgsm, negative_score, pgd
from utils.attacks.library import auto_attack, square
from utils.attacks.suites import GRID, SUITES, Threat
from utils.core.radii import check_eps

NAMES = ["fgsm", "pgd", "apgd", "apgd_t", "square", "noise"]


def _standing(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (net(images).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("which", ["plain", "hardened"])
@pytest.mark.parametrize("norm, theirs, eps", [("linf", "Linf", EPS), ("l2", "L2", 0.4)])
def test_apgd_breaks_as_many_as_torchattacks(toy_nets, which: str, norm: str, theirs: str, eps: float) -> None:
    net, images = toy_nets[which], toy_images(500, seed=3)
    pixels, labels = images.pixels(slice(None)), images.labels
    reference = torchattacks.APGD(net, norm=theirs, eps=eps, steps=30)(pixels, labels)
    net.eval()
    ours = apgd(net, pixels, labels, eps=eps, steps=30, norm=norm, generator=torch.Generator().manual_seed(0))
    assert _standing(net, ours, labels) <= _standing(net, reference, labels) + 0.005 + 1e-9
    assert distance(ours - pixels, norm).max() <= eps * (1 + 1e-5)


def test_targeted_apgd_breaks_at_least_what_torchattacks_does(toy_nets) -> None:
    net, images = toy_nets["plain"], toy_images(500, seed=3)
    pixels, labels = images.pixels(slice(None)), images.labels
    reference = torchattacks.APGDT(net, eps=EPS, steps=20, n_classes=4)(pixels, labels)
    net.eval()
    ours = apgd_targeted(net, pixels, labels, eps=EPS, steps=20)
    assert _standing(net, ours, labels) <= _standing(net, reference, labels) + 0.005 + 1e-9


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_attack_knows_how_many_classes_there_are(k: int) -> None:
    net, images = train_toy(k=k, steps=60), toy_images(48, seed=2, k=k)
    pixels, labels = images.pixels(slice(None)), images.labels
    clean = _standing(net, pixels, labels)
    for name in NAMES:
        attacked = Attack(name, steps=10)(net, pixels, labels, eps=0.1, draws=torch.Generator().manual_seed(0))
        assert (attacked - pixels).abs().max() <= 0.1 + 1e-6
        if name not in ("noise", "square"):
            assert _standing(net, attacked, labels) < clean - 0.5
    if k < 4:
        with pytest.raises(ValueError, match="four classes"):
            auto_attack(net, pixels, labels, eps=0.1)


def test_targeted_ratio_by_hand() -> None:
    labels, targets = torch.tensor([0]), torch.tensor([2])
    four = targeted_dlr(torch.tensor([[4.0, 3.0, 1.0, 0.0]]), labels, targets)
    assert four.item() == pytest.approx((1 - 4) / (4 - (1 + 0) / 2))
    three = targeted_dlr(torch.tensor([[4.0, 3.0, 1.0]]), labels, targets)
    assert three.item() == pytest.approx((1 - 4) / (4 - 1))
    assert targeted_dlr(torch.tensor([[4.0, 3.0]]), labels, torch.tensor([1])).item() == -1
    assert negative_score(torch.tensor([[4.0, 3.0]]), torch.tensor([1])).item() == -3


def test_step_sizes_are_reconsidered_as_in_the_paper() -> None:
    # p = 0, .22, .41, .57, .70, .80, .87, .93, .99 of 100 steps
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == {1}


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["fgsm", "pgd", "apgd", "apgd_t", "noise"]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_attacks_stay_in_the_ball_of_either_norm(name: str, norm: str, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    images, labels = torch.rand(5, 1, 6, 6), torch.randint(4, (5,))
    attacked = Attack(name, steps=4)(model, images, labels, eps=eps, norm=norm, draws=torch.Generator().manual_seed(1))
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert distance(attacked - images, norm).max() <= eps * (1 + 1e-4) + 1e-6


def test_l2_geometry() -> None:
    shift = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    assert torch.allclose(project(shift, 1.0, "l2").flatten(), torch.tensor([0.6, 0.8]))
    assert torch.equal(project(shift, 10.0, "l2"), shift)
    assert torch.allclose(steepest(shift, "l2").flatten(), torch.tensor([0.6, 0.8]))
    images = torch.full((200, 1, 4, 4), 0.5)
    spread = distance(random_point(images, 0.3, "l2", torch.Generator().manual_seed(0)) - images, "l2")
    assert spread.max() <= 0.3 + 1e-6 and spread.std() > 0.05
    with pytest.raises(ValueError, match="L2 radius"):
        check_eps(-1, "l2")
    with pytest.raises(ValueError, match="norm must be"):
        check_eps(0.1, "l1")


def test_stopping_when_fooled_breaks_no_fewer(toy_nets, toy_test) -> None:
    net, pixels, labels = toy_nets["plain"], toy_test.pixels(slice(None)), toy_test.labels
    results = [
        pgd(net, pixels, labels, eps=EPS, steps=15, stop_when_fooled=stop, generator=torch.Generator().manual_seed(0))
        for stop in (False, True)
    ]
    broken = [net(images).argmax(1) != labels for images in results]
    assert (broken[1] | ~broken[0]).all()
    # what stood to the end went the same way in both
    assert torch.allclose(results[0][~broken[1]], results[1][~broken[1]], atol=1e-5)


@pytest.mark.parametrize("batch_size", [7, 32, None])
def test_filled_up_passes_break_the_same_images_as_one_start_after_the_other(toy_nets, toy_test, batch_size) -> None:
    net, pixels, labels = toy_nets["hardened"], toy_test.pixels(slice(None)), toy_test.labels
    draws = [torch.Generator().manual_seed(number) for number in range(len(labels))]
    separate = torch.zeros(len(labels), dtype=torch.bool)
    for _ in range(3):
        separate |= net(pgd(net, pixels, labels, eps=EPS, steps=6, generator=draws, restarts=1)).argmax(1) != labels
    sizes = []

    def note_gradients(_: torch.nn.Module, given: tuple, answer: torch.Tensor) -> None:
        if answer.requires_grad:
            sizes.append(len(answer))

    watch = net.register_forward_hook(note_gradients)
    draws = [torch.Generator().manual_seed(number) for number in range(len(labels))]
    options = {"restarts": 3, "stop_when_fooled": True, "batch_size": batch_size, "generator": draws}
    attacked = pgd(net, pixels, labels, eps=EPS, steps=6, **options)
    watch.remove()
    together = net(attacked).argmax(1) != labels
    # an iterate before the last may fool where the last one does not, never the other way round
    assert (together | ~separate).all() and 0.2 < separate.double().mean() < 0.9
    assert (together & ~separate).double().mean() < 0.02
    assert (attacked - pixels).abs().max() <= EPS + 1e-6 and max(sizes) <= (batch_size or len(labels))
    # full until the queue is empty, from when each row in the pass has at most its six steps to go
    assert batch_size is None or set(sizes[:-6]) == {batch_size}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_of_a_sample_depend_on_nothing_but_its_generator(norm: str) -> None:
    images = torch.full((3, 1, 4, 4), 0.5)
    alone = torch.Generator().manual_seed(7)
    expected = [random_point(images[:1], 0.1, norm, alone) for _ in range(2)]
    both, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
    # as where two starts of one sample enter a pass together
    assert torch.equal(random_point(images, 0.1, norm, [both, other, both])[::2], torch.cat(expected))


@pytest.mark.parametrize("attack", [pgd, apgd], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("stop", [False, True])
def test_a_gradient_that_becomes_nan_on_the_way_is_noticed(attack, stop: bool) -> None:
    class Late(torch.nn.Module):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            total = images.sum((1, 2, 3)) * (torch.nan if self.calls > 2 else 1)
            return torch.stack([total, -1 - 0 * total], 1)

    images, labels = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    options = {"stop_when_fooled": stop} if attack is pgd else {}
    with pytest.raises(ValueError, match="NaN"):
        attack(Late(), images, labels, eps=EPS, steps=9, **options)


def test_a_fooled_sample_takes_its_other_starts_along() -> None:
    passed = []

    class Wrong(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            passed.append(len(images))
            total = images.sum((1, 2, 3))
            return torch.stack([-1 - 0 * total, total], 1)

    images, labels = torch.full((10, 1, 4, 4), 0.5), torch.zeros(10, dtype=torch.int64)
    pgd(Wrong(), images, labels, eps=EPS, steps=9, restarts=4, stop_when_fooled=True, batch_size=3)
    # the last sample shares its only pass with two more starts of its own
    assert passed == [3, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("run", [lambda *a: square(*a, eps=EPS, queries=20), lambda *a: auto_attack(*a, eps=EPS)])
def test_library_attacks_leave_everything_as_it_was(toy_nets, toy_test, run, capsys) -> None:
    net = toy_nets["plain"]
    net.train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, labels = toy_test.pixels(slice(0, 16)), toy_test.labels[:16]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    attacked = run(net, images, labels)
    try:
        assert torch.equal(torch.rand(1), expected)
        assert net.training and not net[1].training and net[0].training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
        assert attacked.dtype == images.dtype and attacked.device == images.device
        assert (attacked - images).abs().max() <= EPS + 1e-6 and not capsys.readouterr().out
    finally:
        net.eval()


def test_untied_planes_are_attacked_apart(toy_nets, toy_test) -> None:
    threat = Threat(size=24)
    images = threat.images(toy_test, slice(0, 4), "cpu")
    assert images.shape == (4, 3, 24, 24) and torch.equal(images[:, 0], images[:, 2])

    class Grey(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            weights = torch.tensor([0.7, 0.2, 0.1])[None, :, None, None]
            small = nn.functional.interpolate((pixels * weights).sum(1, keepdim=True), size=(16, 16), mode="bilinear")
            return toy_nets["plain"](small)

    attacked = fgsm(Grey(), images, toy_test.labels[:4], eps=EPS)
    assert attacked.shape == images.shape
    with pytest.raises(ValueError, match="number of pixels"):
        Threat(size=0)


def test_suites_hold_what_the_protocol_asks_for() -> None:
    titles = [attack.title for attack in SUITES["standard"]]
    assert titles == ["FGSM", "PGD-50x5", "PGD-50x5 margin", "APGD-100", "APGD-T-100", "Square-1000"]
    assert SUITES["full"][-1].title == "AutoAttack" and SUITES["standard"][4].targets == 3
    assert [round(255 * eps, 3) for eps in GRID] == [0, 0.5, 1, 1.275, 2, 4, 8]
    with pytest.raises(ValueError, match="attack must be"):
        Attack("cw")
    with pytest.raises(ValueError, match="loss must be"):
        Attack("pgd", loss="dlr")


def test_fgsm_follows_the_gradient_in_l2() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 0, 0]])
    images = torch.full((1, 1, 2, 2), 0.5)
    attacked = fgsm(model, images, torch.tensor([0]), eps=0.1, norm="l2")
    assert torch.allclose((attacked - images).flatten(), torch.tensor([-0.06, -0.08, 0, 0]), atol=1e-6)
