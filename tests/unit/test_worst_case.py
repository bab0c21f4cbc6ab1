from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch import nn

from tests.toy import EPS, toy_images, train_toy
from utils.attacks.attack import Attack
from utils.attacks.suites import SUITES, Threat
from utils.core.compiled import Compiled
from utils.core.precision import uses_bf16
from utils.evaluation import attacker, worst_case
from utils.evaluation.attack_cache import describe_module
from utils.evaluation.attacker import Attacker, round_to_8_bits
from utils.evaluation.curve import NEVER, combine
from utils.evaluation.worst_case import robustness_curve

GRID = [1 / 255, 2 / 255, 4 / 255, EPS, 10 / 255]


@pytest.fixture(scope="module")
def worst(toy_nets, toy_test):
    return robustness_curve(toy_nets["plain"], toy_test, attack=SUITES["quick"], epsilons=GRID)


@pytest.mark.slow
def test_carrying_upwards_never_counts_more_than_attacking_afresh(worst, toy_nets, toy_test) -> None:
    assert worst.robust_accuracy == sorted(worst.robust_accuracy, reverse=True)
    for eps, carried in zip(worst.epsilons[1:], worst.robust_accuracy[1:]):
        fresh = robustness_curve(toy_nets["plain"], toy_test, attack=SUITES["quick"], epsilons=[eps])
        assert carried <= fresh.robust_accuracy[-1]
    assert worst.robust_accuracy[-1] < 0.5 < worst.robust_accuracy[1]


def test_flags_say_what_broke_each_image_and_when(worst, toy_nets, toy_test) -> None:
    first, by = torch.tensor(worst.first_broken), torch.tensor(worst.broken_by)
    clean_wrong = toy_nets["plain"](toy_test.pixels(slice(None))).argmax(1) != toy_test.labels
    assert torch.equal(first == 0, clean_wrong)
    assert ((by == NEVER) == ((first == NEVER) | (first == 0))).all()
    for step in range(len(worst.epsilons)):
        wrong = worst.logits[step].argmax(1) != toy_test.labels
        assert torch.equal(wrong, (first != NEVER) & (first <= step))
    assert worst.attacks[0].title == "FGSM" and set(by.tolist()) <= {NEVER, 0, 1}


def test_every_attack_only_lowers_the_worst_case(worst, toy_nets, toy_test) -> None:
    alone = robustness_curve(toy_nets["plain"], toy_test, attack=Attack("fgsm"), epsilons=GRID)
    assert all(both <= one for both, one in zip(worst.robust_accuracy, alone.robust_accuracy))


@pytest.mark.slow
def test_what_is_known_is_not_attacked_again_and_counts_the_same(worst, toy_nets, toy_test, monkeypatch) -> None:
    net, more = toy_nets["plain"], Attack("pgd", loss="margin", stop_when_fooled=True)
    at_once = robustness_curve(net, toy_test, attack=[*SUITES["quick"], more], epsilons=GRID)
    attacked = []
    real = Attacker.attack
    monkeypatch.setattr(Attacker, "attack", lambda self, *a: attacked.append((a[2], a[1])) or real(self, *a))
    after = robustness_curve(net, toy_test, attack=more, epsilons=GRID, known=worst)
    for name in ("first_broken", "broken_by", "robust_accuracy", "rounded_accuracy", "attacks", "title"):
        assert getattr(after, name) == getattr(at_once, name), name
    assert torch.allclose(after.logits, at_once.logits, atol=1e-4)
    first = torch.tensor(worst.first_broken)
    for eps, index in attacked:
        own = first[index]
        assert ((own == NEVER) | (own > worst.epsilons.index(eps))).all()
    assert 2 in after.broken_by
    assert after.seconds > worst.seconds


@pytest.mark.parametrize("other", ["images", "radii", "threat", "model"])
def test_what_is_known_of_something_else_is_refused(worst, toy_nets, toy_test, other: str) -> None:
    net = toy_nets["hardened" if other == "model" else "plain"]
    images = toy_test.subset(torch.arange(20)) if other == "images" else toy_test
    options = {"threat": Threat(norm="l2")} if other == "threat" else {}
    with pytest.raises(ValueError, match="what is known was measured"):
        radii = GRID[:2] if other == "radii" else GRID
        robustness_curve(net, images, attack=Attack("fgsm"), epsilons=radii, known=worst, **options)


def test_the_progress_bar_ends_full(toy_nets, toy_test, monkeypatch) -> None:
    bars = []
    real = worst_case.tqdm
    monkeypatch.setattr(worst_case, "tqdm", lambda **kwargs: bars.append(real(**kwargs)) or bars[-1])
    attacks = [Attack("fgsm"), Attack("pgd", steps=2, restarts=2), Attack("apgd_t", steps=2), Attack("square", steps=5)]
    assert [attack.passes for attack in attacks] == [2, 8, 12, 5]
    robustness_curve(toy_nets["plain"], toy_test, attack=attacks, epsilons=[EPS, 2 * EPS])
    assert bars[0].n == bars[0].total == 2 * len(toy_test) * (2 + 8 + 12 + 5)


@pytest.mark.slow
def test_worst_case_breaks_at_least_what_autoattack_does(toy_nets, toy_test) -> None:
    # restarts, as AutoAttack has: which of two finds an image on the edge differs from processor to processor
    attacks = (*SUITES["quick"], Attack("apgd", steps=30, restarts=5), Attack("apgd_t", steps=30, restarts=5))
    few = toy_test.balanced_subset(64)
    ours = robustness_curve(toy_nets["plain"], few, attack=attacks, epsilons=[EPS])
    theirs = robustness_curve(toy_nets["plain"], few, attack=Attack("autoattack"), epsilons=[EPS])
    assert ours.robust_accuracy[1] <= theirs.robust_accuracy[1]


def test_rounding_to_8_bits_stays_in_the_ball(worst) -> None:
    clean = torch.tensor([[[[10, 250]]]]) / 255
    attacked = clean + torch.tensor([[[[1.4, -1.6]]]]) / 255
    assert torch.allclose(255 * round_to_8_bits(attacked, clean, 2 / 255), torch.tensor([[[[11.0, 248.0]]]]))
    assert torch.allclose(255 * round_to_8_bits(attacked, clean, 1 / 255), torch.tensor([[[[11.0, 249.0]]]]))
    assert torch.equal(round_to_8_bits(attacked, clean, 0.5 / 255), clean)
    assert worst.rounded_accuracy[3:] == [None] * 3
    assert all(known >= exact for known, exact in zip(worst.rounded_accuracy[:3], worst.robust_accuracy[:3]))


def test_surrogates_make_the_image_and_the_model_judges_it(toy_nets, toy_test) -> None:
    transfer = Attack("pgd", steps=10, surrogate="other")
    other = train_toy(seed=7, steps=60)
    options = {"epsilons": [EPS], "surrogates": {"other": other}}
    moved = robustness_curve(toy_nets["plain"], toy_test, attack=transfer, **options)
    white = robustness_curve(toy_nets["plain"], toy_test, attack=Attack("pgd", steps=10), epsilons=[EPS])
    assert white.robust_accuracy[1] < moved.robust_accuracy[1] <= moved.robust_accuracy[0]
    assert moved.title == "PGD-10 from other"
    with pytest.raises(ValueError, match="not given: other"):
        robustness_curve(toy_nets["plain"], toy_test, attack=transfer, epsilons=[EPS])


def test_combining_is_the_worst_of_each_image(toy_nets, toy_test) -> None:
    attacks = (Attack("fgsm"), Attack("pgd", steps=10, loss="margin"))
    curves = [robustness_curve(toy_nets["plain"], toy_test, attack=attack, epsilons=GRID) for attack in attacks]
    both = combine(curves)
    for step in range(len(both.epsilons)):
        standing = [
            all(curve.first_broken[i] == NEVER or curve.first_broken[i] > step for curve in curves)
            for i in range(len(toy_test))
        ]
        assert both.robust_accuracy[step] == pytest.approx(sum(standing) / len(standing))
        wrong = both.logits[step].argmax(1) != toy_test.labels
        assert wrong.tolist() == [not stands for stands in standing]
    for first, by in zip(both.first_broken, both.broken_by):
        assert (by == NEVER) == (first in (NEVER, 0))
        assert by == NEVER or curves[by].first_broken[both.first_broken.index(first)] >= 0
    with pytest.raises(ValueError, match="same images"):
        combine([curves[0], robustness_curve(toy_nets["plain"], toy_test, attack=attacks[0], epsilons=[EPS])])


def test_l2_and_untied_planes(toy_nets, toy_test) -> None:
    curve = robustness_curve(toy_nets["plain"], toy_test, attack=Attack(), epsilons=[0.3, 1.5], threat=Threat("l2"))
    assert curve.robust_accuracy[0] > curve.robust_accuracy[1] > curve.robust_accuracy[2]
    assert curve.max_norm[2] <= 1.5 * (1 + 1e-4) and curve.rounded_accuracy == [None] * 3
    assert curve.threat.plain() == {"title": "L2, grey, native", "norm": "l2", "size": None}


#: Beside the module: whatever a module holds is part of its key.
CALLS = [0]


class _Counting(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        CALLS[0] += 1
        return self.net(images)


def test_finished_batches_are_read_and_not_repeated(toy_nets, toy_test, tmp_path) -> None:
    run = {"attack": SUITES["quick"], "epsilons": [2 / 255, EPS], "batch_size": 40, "cache": tmp_path}
    model, CALLS[0] = _Counting(toy_nets["plain"]), 0
    first = robustness_curve(model, toy_test, **run)
    batches = sorted(tmp_path.glob("*/*.safetensors"))
    full, CALLS[0] = CALLS[0], 0
    again = robustness_curve(model, toy_test, **run)
    assert again.first_broken == first.first_broken and torch.equal(again.logits, first.logits)
    assert CALLS[0] == 4 and full > 40  # clean answers only
    for path in batches[len(batches) // 2 :]:
        path.unlink()
    half = robustness_curve(model, toy_test, **run)
    assert half.first_broken == first.first_broken and torch.equal(half.logits, first.logits)
    batches[0].write_bytes(b"damaged")
    with pytest.raises(ValueError, match="delete it"):
        robustness_curve(model, toy_test, **run)


def test_a_changed_setting_reads_nothing_stale(toy_nets, toy_test, tmp_path) -> None:
    run = {"attack": Attack("fgsm"), "epsilons": [EPS], "cache": tmp_path}
    robustness_curve(toy_nets["plain"], toy_test, **run)
    changed = [
        (toy_nets["hardened"], toy_test, run),
        (toy_nets["plain"], toy_images(160, seed=5), run),
        (toy_nets["plain"], toy_test, run | {"seed": 1}),
        (toy_nets["plain"], toy_test, run | {"attack": Attack("fgsm", loss="margin")}),
        (toy_nets["plain"], toy_test, run | {"threat": Threat("l2")}),
    ]
    for number, (net, images, settings) in enumerate(changed, start=2):
        robustness_curve(net, images, **settings)
        assert len(list(tmp_path.iterdir())) == number


def test_a_models_digest_sees_weights_and_settings(resnet) -> None:
    before = describe_module(resnet)
    resnet.image_size = 48
    other = describe_module(resnet)
    resnet.image_size = 32
    assert describe_module(resnet.train()) == before != other
    next(resnet.parameters()).data[0] += 1
    assert describe_module(resnet) != before


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_the_same(toy_nets, toy_test, tmp_path) -> None:
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from tests.toy import EPS, toy_images, toy_net
        from utils.attacks.attack import Attack
        from utils.evaluation.worst_case import robustness_curve
        net = toy_net(0).eval()
        net.load_state_dict(torch.load({str(tmp_path / "net.pt")!r}, weights_only=True))
        attack = [Attack("pgd", steps=100, restarts=2), Attack("pgd", steps=100, loss="margin")]
        curve = robustness_curve(net, toy_images(160, seed=2), attack=attack, epsilons=[EPS],
                                 batch_size=20, cache=Path({str(tmp_path / "cache")!r}))
        print(curve.first_broken, curve.broken_by)
    """)
    torch.save(toy_nets["plain"].state_dict(), tmp_path / "net.pt")
    call = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "text": True}
    running = subprocess.Popen([sys.executable, "-c", script], **call, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "cache").glob("*/*.safetensors"))) < 3:
        assert running.poll() is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*.safetensors")}
    resumed = subprocess.run([sys.executable, "-c", script], **call, check=True, stderr=subprocess.DEVNULL).stdout
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*.safetensors")}
    assert len(after) > len(done) and all(after[name] == when for name, when in done.items())
    for path in (tmp_path / "cache").glob("*/*"):
        path.unlink()
    fresh = subprocess.run([sys.executable, "-c", script], **call, check=True, stderr=subprocess.DEVNULL).stdout
    assert resumed == fresh


def test_time_that_an_earlier_run_spent_is_counted(toy_nets, toy_test, tmp_path) -> None:
    run = {"attack": Attack("pgd", steps=40), "epsilons": [EPS], "cache": tmp_path}
    first, again = (robustness_curve(toy_nets["plain"], toy_test, **run).seconds for _ in range(2))
    assert again > 0.5 * first > 0


def test_bad_models_and_labels_are_refused(toy_nets, toy_test) -> None:
    net, run = toy_nets["plain"], {"attack": Attack("fgsm"), "epsilons": [EPS]}
    with pytest.raises(ValueError, match="probabilities"):
        robustness_curve(nn.Sequential(net, nn.Softmax(1)), toy_test, **run)
    wrong = toy_test.subset(torch.arange(8))
    wrong.labels = torch.full((8,), 4)
    with pytest.raises(ValueError, match="labels must be in"):
        robustness_curve(net, wrong, **run)
    with pytest.raises(TypeError, match="half precision"):
        robustness_curve(train_toy(steps=1).half(), toy_test, **run)
    with pytest.raises(ValueError, match="k/255"):
        robustness_curve(net, toy_test, attack=Attack("fgsm"), epsilons=[8])
    with pytest.raises(ValueError, match="k/255"):
        robustness_curve(net, toy_test, attack=Attack("fgsm"), epsilons=[-0.1])
    robustness_curve(nn.Sequential(net, nn.LogSoftmax(1)), toy_test, **run)


def test_bf16_attacks_count_only_what_float32_confirms(toy_nets, toy_test) -> None:
    few = toy_test.subset(torch.arange(64))
    options = {"attack": [Attack("fgsm"), Attack("pgd", steps=10, stop_when_fooled=True)], "epsilons": [0.02, 0.05]}
    exact, quick = (robustness_curve(toy_nets["plain"], few, precision=p, **options) for p in ("fp32", "bf16"))
    assert quick.robust_accuracy[0] == exact.robust_accuracy[0]  # without attack nothing is rounded
    assert quick.robust_accuracy == pytest.approx(exact.robust_accuracy, abs=2 / 64)
    assert 0 < exact.robust_accuracy[1] < exact.robust_accuracy[0]


def test_a_cpu_that_imitates_bf16_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match="slower than float32"):
        assert uses_bf16("bf16", "cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uses_bf16("bf16", "cpu") and not uses_bf16("auto", "cpu")


class _FallsInBf16(nn.Module):
    """In bfloat16 it answers 1 to everything; in float32 it looks at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = self.scale * (0.5 - images.mean((1, 2, 3)))
        if torch.is_autocast_enabled(images.device.type):
            score = score - 1000
        return torch.stack([score, -score], 1)


def test_what_only_bf16_believes_is_attacked_again_in_float32(toy_test) -> None:
    few = replace(toy_test.subset(torch.arange(8)), labels=torch.zeros(8, dtype=torch.int64))
    few.images = torch.full_like(few.images, 125)  # mean 0.49: right, and wrong within 0.02
    attack = Attack("pgd", steps=5, stop_when_fooled=True)
    curve = robustness_curve(_FallsInBf16(), few, attack=attack, epsilons=[0.005, 0.02], precision="bf16")
    assert curve.robust_accuracy == [1.0, 1.0, 0.0]


@pytest.mark.slow
def test_a_compiled_model_finds_what_the_model_itself_finds(toy_nets, toy_test, tmp_path) -> None:
    options = {"attack": SUITES["quick"], "epsilons": [EPS], "batch_size": 24}
    plain = robustness_curve(toy_nets["hardened"], toy_test, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if shutil.which("g++") else "default", UserWarning)
        fused = robustness_curve(toy_nets["hardened"], toy_test, compiled=True, **options)
    assert fused.first_broken == plain.first_broken and 0.1 < plain.robust_accuracy[1] < plain.robust_accuracy[0]
    assert torch.allclose(fused.logits, plain.logits, atol=0.05)


class _Optimist(nn.Module):
    """Stands in for a compiled model: takes every image whose attack has begun for broken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -self.model(images)


class _Tells(nn.Module):
    """Answers 2 from a compiled program and 1 from Python."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        said = 2.0 if torch.compiler.is_compiling() else 1.0
        return images.flatten(1).sum(1, keepdim=True) * 0 + self.weight * said


def test_every_one_of_many_models_is_compiled(monkeypatch) -> None:
    # torch's tracer without the C++ compiler: which of them runs is what the test asks
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    images = torch.zeros(3, 1, 4, 4)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        answers = [Compiled(_Tells(width))(images) for width in range(2, 14)]
    assert [set(answer.flatten().tolist()) for answer in answers] == [{2.0}] * 12


def test_a_compiled_evaluation_leaves_the_model_as_it_was(toy_nets, toy_test, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = copy.deepcopy(toy_nets["plain"]).eval()
    attack = Attack("pgd", steps=2, stop_when_fooled=True)
    robustness_curve(model, toy_test, attack=attack, epsilons=[EPS], compiled=True)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("compiled", [True, False])
def test_what_only_the_fast_program_is_fooled_by_is_attacked_again(toy_nets, toy_test, monkeypatch, compiled) -> None:
    monkeypatch.setattr(attacker, "Compiled", _Optimist)
    options = {"attack": Attack("pgd", steps=10, stop_when_fooled=True), "epsilons": [EPS], "compiled": compiled}
    found = robustness_curve(toy_nets["plain"], toy_test, **options, precision="bf16")
    honest = robustness_curve(toy_nets["plain"], toy_test, attack=options["attack"], epsilons=[EPS])
    assert abs(found.robust_accuracy[1] - honest.robust_accuracy[1]) <= 0.02 < honest.robust_accuracy[0] - 0.2


@pytest.mark.parametrize("only_gradient", [False, True])
def test_a_model_that_cannot_be_compiled_is_attacked_as_it_is(toy_nets, toy_test, monkeypatch, only_gradient) -> None:
    def broken(*_: torch.Tensor, **__: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    options = {"attack": SUITES["quick"], "epsilons": [EPS]}
    plain = robustness_curve(toy_nets["plain"], toy_test, **options)
    if only_gradient:
        backward = torch.autograd.grad
        calls = iter([broken])
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: next(calls, backward)(*a, **k))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model if only_gradient else broken)
    with pytest.warns(UserWarning, match="runs as it is: no C.. compiler$"):
        again = robustness_curve(toy_nets["plain"], toy_test, compiled=True, **options)
    assert again.first_broken == plain.first_broken and torch.equal(again.logits, plain.logits)
