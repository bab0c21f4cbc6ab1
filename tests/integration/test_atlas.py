"""The atlas on phantoms: each chapter is measured, written, read back and not measured again, and says what it must."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, add_backbone, small_model
from torch import nn

from tests.toy import toy_images
from utils.attacks.targets import Towards
from utils.commands.atlas import main
from utils.core.paths import read_json, write_json
from utils.data.corruptions import CORRUPTIONS
from utils.data.sets import DataFacts, DataSplits, ImageSet
from utils.data.workspace import Workspace
from utils.evaluation.by_patient import MeanOfSlices
from utils.evaluation.curve import NEVER, RobustnessCurve
from utils.evaluation.metrics import predict
from utils.evaluation.robustness import SuiteRecord
from utils.evaluation.vote import VoteAttack
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.atlas import chapters, patients, targets
from utils.experiments.atlas.bench import HARDENED, PLAIN, QUICK, RADII, AtlasBudget, Bench, flat, open_bench
from utils.experiments.atlas.bracket import _upper
from utils.experiments.atlas.chapters import CHAPTERS, measure_chapter, read_chapter
from utils.experiments.atlas.foreign import REAL_EPS
from utils.experiments.atlas.names import attacks
from utils.experiments.atlas.patients import FINE
from utils.experiments.atlas.regions import WHOLE, top_share
from utils.experiments.atlas.scans import Worst, _errors
from utils.experiments.atlas.targets import share
from utils.experiments.atlas.universal import NOISE, Change
from utils.reporting import atlas as reporting
from utils.reporting.atlas_figures import FIGURES, draw_atlas, plot_directions
from utils.reporting.atlas_findings import verdict
from utils.reporting.atlas_tables import ATLAS_TABLES, _gain, vote_table
from utils.training.checkpoints import save_checkpoint
from utils.training.config import TrainConfig
from utils.training.loop import train
from utils.training.objectives import Adversarial, Standard
from utils.training.record import ObjectiveFacts

BUDGET = replace(QUICK, slices=2, patients=0, images=16, epochs=3, steps=5, draws=4, views=2, certified=3, samples=60)
BUDGET = replace(BUDGET, radii=())


@pytest.fixture(scope="module")
def bench(splits: DataSplits) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        add_backbone(patch, "small", _build)
        models = {}
        for name, objective in ((PLAIN, Standard()), (HARDENED, Adversarial(eps=8 / 255, steps=2))):
            model = small_model()
            config = TrainConfig(num_epochs=4, batch_size=8, learning_rate=3e-3, validation_images=8)
            train(model, splits, objective=objective, config=config)
            models[name] = model
        yield open_bench(models, splits, budget=BUDGET)


def _build(num_classes: int, image_size: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    net = nn.Sequential(body, nn.Flatten())
    net.add_module("out", nn.Linear(128, num_classes))
    return net


@pytest.fixture(scope="module")
def found(bench: Bench, tmp_path_factory) -> dict[str, object]:
    """Every chapter, measured once."""
    folder = tmp_path_factory.mktemp("atlas")
    return {name: measure_chapter(bench, name, folder, note="phantoms") for name in CHAPTERS} | {"folder": folder}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_read_back_and_not_measured_again(name: str, bench: Bench, found, monkeypatch) -> None:
    def never(_: Bench) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setitem(chapters.CHAPTERS, name, replace(CHAPTERS[name], measure=never))
    again = measure_chapter(bench, name, found["folder"])
    assert again.plain() == found[name].plain()
    record, _ = read_chapter(found["folder"], name)
    assert record.note == "phantoms" and record.environment["commit"] and record.data.fingerprint
    with pytest.raises(ValueError, match="seed"):
        measure_chapter(replace(bench, seed=3), name, found["folder"])
    with pytest.raises(ValueError, match="budget steps"):
        measure_chapter(replace(bench, budget=replace(BUDGET, steps=6)), name, found["folder"])
    other = {**bench.models, HARDENED: bench.models[PLAIN]}
    with pytest.raises(ValueError, match="weights hardened"):
        measure_chapter(replace(bench, models=other), name, found["folder"])


#: What each chapter spends its time on.
_WORK = {
    "scans": ("utils.experiments.atlas.scans._damage", "utils.experiments.atlas.scans._worst"),
    "bracket": ("utils.experiments.atlas.bracket.train", "utils.experiments.atlas.bracket._bracket"),
}


class _Killed(BaseException):
    """What a test throws into a chapter; no code may catch it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_killed_chapter_goes_on_and_ends_the_same(name: str, bench: Bench, found, tmp_path, monkeypatch) -> None:
    kept, calls, limit = replace(bench, cache=tmp_path / "cache"), 0, 2
    for target in _WORK.get(name, ("utils.evaluation.attacker.Attacker.attack",)):
        work = _named(target)

        def counted(*own, work=work, **named):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise _Killed
            return work(*own, **named)

        monkeypatch.setattr(target, counted)
    with pytest.raises(_Killed):
        measure_chapter(kept, name, tmp_path)
    assert len(_pieces(tmp_path, name)) == limit
    assert not (tmp_path / f"{name}.json").exists()
    calls, limit = 0, 10**9
    again = measure_chapter(kept, name, tmp_path)
    spent, calls = calls, 0
    assert read_chapter(tmp_path, name)[0].resumed
    assert _without_times(again.plain()) == _without_times(found[name].plain())
    # what the killed run had finished was not done again, and a third run does nothing
    assert spent == len(_pieces(tmp_path, name)) - 2 > 0
    (tmp_path / f"{name}.json").unlink()
    measure_chapter(kept, name, tmp_path)
    assert calls == 0


def _named(target: str):
    """What a dotted name holds."""
    where, name = target.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(where), name)
    except ModuleNotFoundError:
        module, owner = where.rsplit(".", 1)
        return getattr(getattr(importlib.import_module(module), owner), name)


def _pieces(folder: Path, name: str) -> list[Path]:
    """What was kept, but for keys, what attacks learnt, and what a detector's batches came to."""
    kept = [path for path in (folder / "cache").rglob("*.*") if path.stem not in ("key", "fitted")]
    return [path for path in kept if name != "foreign" or path.suffix != ".json"]


def _without_times(plain):
    """A record without what depends on how fast the machine is."""
    if isinstance(plain, dict):
        return {key: _without_times(value) for key, value in plain.items() if key != "seconds"}
    return [_without_times(value) for value in plain] if isinstance(plain, list) else plain


def test_slices_of_stacks_are_those_of_the_patients(bench: Bench) -> None:
    stacks, slices = bench.stacks, bench.slices
    assert len(slices) == BUDGET.slices * len(stacks)
    assert torch.equal(slices.images[2:4, 0], stacks.images[1]) and torch.equal(slices.labels[::2], stacks.labels)
    assert torch.equal(flat(stacks).subjects, stacks.subjects.repeat_interleave(2))
    said = predict(MeanOfSlices(bench.models[PLAIN]), stacks)
    alone = predict(bench.models[PLAIN], slices).softmax(1).unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(said.exp(), alone)


def test_no_attack_leaves_more_than_none_and_all_names_are_there(bench: Bench, found) -> None:
    names = found["names"]
    # a loss over the four highest logits is not defined for three
    assert {attack.name for attack, _ in attacks(5, 4)} - {attack.name for attack, _ in attacks(5, 3)} == {"APGDT"}
    assert {row.name for row in names.rows} == {attack.name for attack, _ in attacks(5, 4)}
    for row in names.rows:
        assert all(0 <= value <= names.clean[model] for model, value in row.robust.items()) and row.seconds > 0
    best = {row.title: row.robust[PLAIN] for row in names.rows if row.norm == "linf"}
    assert best["APGD-T-5"] <= best["FGSM"] <= best["Noise"]


@pytest.mark.parametrize("step", [NEVER, 1])
def test_a_target_counts_as_reached_only_by_slices_that_were_elsewhere(bench: Bench, monkeypatch, step: int) -> None:
    labels, asked = bench.slices.labels, []

    def attacked(_: Bench, model: Towards, images: ImageSet, *rest, **named) -> SimpleNamespace:
        asked.append((model.wanted.tolist(), images.images))
        assert not images.labels.any()
        return SimpleNamespace(first_broken=[step] * len(images))

    monkeypatch.setattr(Bench, "attacked", attacked)
    before = torch.nn.functional.one_hot((labels + torch.arange(len(labels)) % 2) % 4, 4).float()
    table, share = targets._reached(bench, PLAIN, before), 0.0 if step == NEVER else 1.0
    for place, own in enumerate(bench.classes):
        right = float((before[labels == place].argmax(1) == place).float().mean())
        assert table[own] == {wanted: right if wanted == own else share for wanted in bench.classes}
    # half of each class is taken for the next one, and is not attacked towards it
    towards = {wanted.index(True): images for wanted, images in asked}
    for place, images in towards.items():
        away = (labels != place) & (before.argmax(1) != place)
        assert torch.equal(images, bench.slices.images[away])
    assert set(targets._asked(bench, PLAIN, before).values()) == {share}
    everywhere = torch.nn.functional.one_hot((labels + 1).clamp(max=3), 4).float()
    assert targets._asked(bench, PLAIN, everywhere)["next"] is None


class FarApart(nn.Module):
    """Logits of two halves, 80 apart where both are grey: cross-entropy sees the smaller one's gradient alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = (half.mean((1, 2, 3)) for half in images.tensor_split(2, dim=-1))
        return 800 * torch.stack([left, right - 0.1], 1)


def test_a_target_far_away_is_reached_where_both_logits_are_moved(monkeypatch) -> None:
    grey = replace(toy_images(3, seed=0, k=2), images=torch.full((3, 1, 16, 16), 128, dtype=torch.uint8))
    grey = replace(grey, labels=torch.zeros(3, dtype=torch.long))
    own = SimpleNamespace(models={PLAIN: FarApart()}, slices=grey, budget=AtlasBudget(steps=20))
    own.attacked = lambda model, images, attacks, epsilons, **named: robustness_curve(
        model, images, attack=attacks, epsilons=epsilons, **named
    )
    before = FarApart()(grey.pixels(slice(None)))
    for eps, there in ((0.045, False), (0.07, True)):  # half of the distance is 0.05
        monkeypatch.setattr(targets, "EPS", eps)
        asked, reached = targets._towards(own, PLAIN, (1,), before)
        assert asked.all() and (reached == there).all()


def test_the_likeliest_wrong_class_is_asked_of_those_that_are_right(bench: Bench, monkeypatch) -> None:
    before, hit = predict(bench.models[PLAIN], bench.slices), []
    for eps in (1e-4, 0.5):
        monkeypatch.setattr(targets, "EPS", eps)
        asked, reached = targets._towards(bench, PLAIN, "likeliest", before)
        assert torch.equal(asked, before.argmax(1) == bench.slices.labels) and asked.any()
        assert not (reached & ~asked).any()
        hit.append(int(reached.sum()))
    assert hit[1] > hit[0]


def test_directions_grow_with_the_radius_and_are_of_those_found_right(bench: Bench, found) -> None:
    for direction in found["targets"].directions.values():
        for side in (direction.hidden, direction.invented):
            assert len({one.of for one in side}) == 1
            counts = [one.count for one in side]
            assert counts == sorted(counts)
        assert direction.balanced == sorted(direction.balanced, reverse=True)
    said = bench.verdict(PLAIN)(bench.stacks.pixels(slice(None))).argmax(1)
    truth = bench.questions().labels
    right = [float((said == truth)[truth == side].float().mean()) for side in (0, 1)]
    assert found["targets"].directions[PLAIN].balanced[0] == pytest.approx(np.mean(right))


def test_a_side_that_nobody_is_on_is_left_out(bench: Bench, tmp_path: Path) -> None:
    ill = torch.nonzero(bench.stacks.labels != bench.healthy)[:, 0]
    stacks = bench.stacks.subset(ill)
    alone = replace(bench, stacks=stacks, slices=flat(stacks))
    direction = measure_chapter(alone, "targets", tmp_path).directions[PLAIN]
    assert direction.invented[0].value is None and 0 <= direction.balanced[0] <= 1
    plot_directions(read_chapter(tmp_path, "targets")[1])


def test_a_draw_without_one_side_tells_nothing_and_bars_never_point_inwards() -> None:
    truth = np.array([True, True] + [False] * 8)
    said = np.where(truth, 0.1, 0.2)
    counts = np.array([[1] * 10, [0, 0] + [1] * 8])
    errors = _errors(said, truth, 0.5, counts)
    assert errors[0] == 0.5 and np.isnan(errors[1])
    assert _errors(np.array([0.5]), np.array([True]), 0.5, np.ones((1, 1)))[0] == 0  # at the threshold counts as ill


def test_shares_have_wilsons_interval() -> None:
    one = share(3, 10)
    assert (one.low, one.high) == pytest.approx((0.1078, 0.6032), abs=1e-3) and one.value == 0.3
    assert share(0, 0).value is None


def test_a_region_is_never_worth_more_than_the_whole(found) -> None:
    for regions in found["regions"].regions.values():
        whole = regions[WHOLE]
        assert whole.area == 1 and len(whole.misclassified) == len(found["regions"].radii)
        for region in regions.values():
            assert 0 <= region.area <= 1 and region.misclassified == sorted(region.misclassified)
            assert all(one >= own for one, own in zip(whole.misclassified, region.misclassified))
    for sufficient in found["regions"].sufficient.values():
        assert all(0 < value <= 1 for value in sufficient.shares)
        assert np.min(sufficient.seen) >= 0 and np.max(sufficient.seen) <= 1


def test_the_highest_values_are_chosen() -> None:
    values = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert top_share(values, 0.25).sum() == 3 and top_share(values, 0.25).flatten()[-3:].all()
    assert top_share(values, 1e-6).sum() == 1
    assert top_share(values.expand(2, 1, 3, 4), torch.tensor([0.5, 1.0])).flatten(1).sum(1).tolist() == [6, 12]


def test_one_change_for_all_beats_random_signs_on_its_model(found) -> None:
    universal = found["universal"]
    own = universal.misclassified[PLAIN]
    assert sum(own[f"from {PLAIN}"]) >= sum(own[NOISE])
    assert set(own) == {f"from {PLAIN}", f"from {HARDENED}", NOISE}
    levels = universal.change[PLAIN].levels()
    assert levels.shape == (128, 128) and 0 < np.abs(levels).max() <= 255 * universal.radii[-1] + 0.1
    drawn = torch.randint(-80, 81, (1, 1, 5, 7)) / 2550
    assert np.allclose(Change.of(drawn).levels(), 255 * drawn[0, 0].numpy())


def test_ties_cost_the_attacker_a_larger_radius(found) -> None:
    for name, links in found["patients"].smallest.items():
        assert {len(radii) for radii in links.values()} == {len(found["patients"].subjects[name])}
        reach = {link: np.sum([np.inf if r is None else r for r in radii]) for link, radii in links.items()}
        assert reach["free"] <= reach["shared"]


def test_survivors_are_shares_of_those_the_attack_changed(found) -> None:
    survival = found["survival"]
    for name, attacked in survival.attacks.items():
        for steps in attacked.values():
            for one in steps:
                assert one.misclassified <= survival.right[name]
                values = [value for value in one.survives.values() if value is not None]
                assert len(values) in (0, len(one.survives)) and all(0 <= value <= 1 for value in values)


def test_detectors_are_worth_less_once_attacked(found) -> None:
    for detectors in found["foreign"].detectors.values():
        for watched in detectors.values():
            assert all(kind.after.auroc <= kind.before.auroc + 1e-6 for kind in watched.foreign.values())
            assert all(kind.accepted_after >= kind.accepted_before for kind in watched.foreign.values())
            assert watched.refused[-1] >= watched.refused[0]
            assert watched.fooled[0] == 0 and watched.fooled == sorted(watched.fooled) and watched.noticed[0] is None


def test_damage_is_counted_against_the_truth(bench: Bench, found) -> None:
    scans = found["scans"]
    assert set(scans.corruptions) == set(CORRUPTIONS)
    for damage in scans.corruptions.values():
        assert damage.difference == pytest.approx(damage.error[HARDENED] - damage.error[PLAIN])
        assert damage.interval[0] <= damage.difference <= damage.interval[1]
        assert damage.error[PLAIN] == pytest.approx(np.mean([one.error for one in damage.by_severity[PLAIN]]))
    for worst in scans.worst.values():
        assert all(own.worst.count >= own.one.count for own in worst.values())


def test_a_turn_is_only_told_where_it_is_certain(bench: Bench) -> None:
    class Coin(nn.Module):
        """Says healthy to all but a share of noisy images, whatever they show: no attack can turn it."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            # a pixel's noise decides, whose mean an attack does not move
            away = images[:, 0, 0, 0] - images[:, 0, 0, 0].detach() + 0.3 - torch.rand(len(images)).sub(0.25)
            return torch.stack([away, -away], 1)

    stack = torch.full((1, 2, 8, 8), 0.5)
    torch.manual_seed(0)
    assert [_upper(bench, Coin(), stack, 0, 50) for _ in range(5)] == [None] * 5


def test_no_bracket_is_upside_down(found) -> None:
    bracket = found["bracket"]
    assert len(bracket.patients) == BUDGET.certified
    for patient in bracket.patients:
        assert patient.lower >= 0 and (patient.answer >= 0) == (patient.lower > 0)
        assert patient.upper is None or patient.lower <= patient.upper
    sure = [patient.answer == patient.ill for patient in bracket.patients]
    assert bracket.certified == pytest.approx(np.mean(sure))


# --- bench and command ----------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused(bench: Bench, splits: DataSplits) -> None:
    with pytest.raises(ValueError, match="compares two models, not hardened and hardened"):
        open_bench({PLAIN: bench.models[PLAIN]}, splits)
    other = replace(splits, train=replace(splits.train, info=splits.info | {"protocol": "random"}))
    with pytest.raises(ValueError, match="--split patient, not random"):
        open_bench(bench.models, other)
    strange = replace(splits, train=replace(splits.train, classes=["a", "b", "c", "d"]))
    with pytest.raises(ValueError, match="known to mean healthy, and the atlas"):
        open_bench(bench.models, strange)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        AtlasBudget(steps=0)
    few = open_bench(bench.models, splits, budget=replace(BUDGET, patients=4))
    assert len(few.stacks) == 4 and len(few.stacks.labels.unique()) == len(bench.stacks.labels.unique())


def test_a_budget_may_cut_the_radii_down(bench: Bench) -> None:
    few = replace(bench, budget=QUICK)
    assert few.radii(RADII) == few.radii(FINE) == (1 / 255, 2 / 255, 8 / 255)
    assert few.radii(REAL_EPS) == (1 / 255, 2 / 255) and bench.radii(RADII) == RADII
    measured = {"targets": targets.measure(few), "patients": patients.measure(few)}
    assert {tuple(found.radii) for found in measured.values()} == {few.radii(RADII)}
    # a record from before there was a choice is one of all radii
    assert few.facts("targets")["budget"]["radii"] == list(QUICK.radii)
    assert "radii" not in bench.facts("targets")["budget"]


def test_the_command_measures_the_named_chapters(
    bench: Bench, splits: DataSplits, tmp_path, monkeypatch, capsys
) -> None:
    for name, model in bench.models.items():
        own = {"classes": splits.classes, "data": splits.info, "note": ""}
        save_checkpoint(model, own, tmp_path / "checkpoints" / name.replace(" ", "_"))
    monkeypatch.setattr(reporting, "load_splits", lambda _: splits)
    found = {name.replace(" ", "_"): model for name, model in bench.models.items()}
    records = {name: SimpleNamespace(training=None) for name in found}
    monkeypatch.setattr(reporting, "load_checkpoint", lambda folder, **_: (found[folder.name], records[folder.name]))
    run = ["--model", "not_hardened", "--hardened", "hardened", "--root", str(tmp_path), "--quick"]
    out = tmp_path / "atlas"
    assert main([*run, "--out", str(out), "--chapters", "patients"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["patients.json", "patients.png"]
    assert read_json(out / "patients.json")["note"].startswith("quick run: these numbers mean nothing")
    assert main([*run, "--out", str(out), "--chapters", "weather"]) == 1
    assert "the atlas has the chapters names, targets" in capsys.readouterr().err
    assert main([*run, "--out", str(out), "--chapters", "patients", "--seed", "1"]) == 1
    assert "seed" in capsys.readouterr().err
    for twin, told in (
        ("not_hardened", "are the same weights"),
        ("hardened", "was trained by the recipe standard, so"),
    ):
        assert main([*run, "--out", str(out), "--hardened", twin]) == 1 and told in capsys.readouterr().err
        records["hardened"].training = SimpleNamespace(objective=ObjectiveFacts(name="standard"))
    records["hardened"].training = None
    monkeypatch.setattr(found["hardened"], "image_size", 40)
    assert main([*run, "--out", str(out)]) == 1
    assert "hardened is small at 40 px: name a model, and its hardened twin" in capsys.readouterr().err
    assert main([*run, "--out", str(out), "--fold=-5"]) == 1
    assert "--fold must be a whole number of at least -1, not -5" in capsys.readouterr().err


def test_damaged_files_are_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "patients.json").write_text('{"question": "?"}', "utf-8")
    with pytest.raises(ValueError, match=r"patients\.json lacks"):
        measure_chapter(bench, "patients", tmp_path)


# --- figures and tables ---------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_from_its_record(found, tmp_path: Path) -> None:
    drawn = draw_atlas(found["folder"])
    assert {path.stem for path in drawn} == set(FIGURES)
    assert {chapter for chapter, _ in FIGURES.values()} == set(CHAPTERS)
    for figure in drawn.values():
        assert "phantoms" in figure.get_suptitle()
    assert not draw_atlas(tmp_path)


def test_tables_tell_what_was_found(bench: Bench, found) -> None:
    atlas = reporting.Atlas(bench, found["folder"], note="phantoms")
    for name in ATLAS_TABLES:
        text = repr(atlas.table(name.removeprefix("atlas_")))
        assert text and "nan" not in text
    direction = found["targets"].directions[PLAIN].hidden[0]
    cell = f"{direction.count} of {direction.of} [{100 * direction.low:.0f}, {100 * direction.high:.0f}]"
    assert cell in repr(atlas.table("directions"))
    plain = found["scans"].corruptions["blur"].error[PLAIN]
    row = next(line for line in repr(atlas.table("scans")).splitlines() if line.startswith("| blur"))
    assert f"| {100 * plain:.1f} |" in row
    assert repr(atlas.table("learnt")).count("\n") == 3
    # of a chapter that a killed run had begun, the time is only a part
    for name in ("regions", "costs"):
        record, own = read_chapter(found["folder"], "regions")
        resumed = (record.model_copy(update={"resumed": True}), own)
        whole, part = (
            ATLAS_TABLES[f"atlas_{name}"](one if name == "regions" else [one]) for one in ((record, own), resumed)
        )
        assert "over " in part and "over 0" not in whole
    assert "threshold" in repr(atlas) and "phantoms" in repr(atlas)


def test_a_verdict_on_hardening_needs_an_interval_beside_zero(found) -> None:
    damage = found["scans"].corruptions["blur"]
    told = {(-2.0, -1.0): "helps", (1.0, 2.0): "hurts", (-1.0, 1.0): "cannot be told"}
    for interval, word in told.items():
        assert verdict(damage.model_copy(update={"interval": list(interval)})) == word
    for (plain, hard), word in {(28, 11): "helps", (3, 28): "hurts", (14, 15): "cannot be told"}.items():
        pair = {PLAIN: Worst(one=share(0, 29), worst=share(plain, 29))}
        assert _gain(pair | {HARDENED: Worst(one=share(0, 29), worst=share(hard, 29))}) == word
    nobody = Worst(one=share(0, 0), worst=share(0, 0))
    assert _gain({PLAIN: nobody, HARDENED: nobody}) == "cannot be told"


def test_the_sheet_shows_every_kind_at_every_severity(bench: Bench, tmp_path: Path) -> None:
    figure = reporting.Atlas(bench, tmp_path).sheet()
    # as scanned, five severities, and what the last changed
    assert len(figure.axes) == 7 * len(CORRUPTIONS) and (tmp_path / "corruptions.png").is_file()


def test_a_vote_is_shown_with_and_without_the_reweighed_attack() -> None:
    alone = {"PGD-20 from mean logits": [0.8, 0.5], "Re-weighted PGD-20 from all members": [0.8, 0.4]}
    vote = VoteAttack(
        rule="soft",
        alone=alone,
        joint=[0.8, 0.4],
        transfer_only=[0.8, 0.6],
        members={"a": [0.7, 0.3]},
        best_member=[0.7, 0.3],
        oracle=[0.9, 0.6],
        without_reweighing=[0.8, 0.5],
    )
    curve = RobustnessCurve.model_construct(
        epsilons=[0.0, 2 / 255], robust_accuracy=[0.8, 0.4], n_images=10, n_subjects=5
    )
    data = DataFacts(source="toy", protocol="patient")
    table = vote_table(SuiteRecord.model_construct(title="Ensemble", curve=curve, vote=vote, data=data))
    assert "| worst case | 80.0 | 40.0 |" in table and "| lower by it, points | 0.0 | 10.0 |" in table
    with pytest.raises(ValueError, match="is no vote"):
        vote_table(SuiteRecord.model_construct(title="ResNet34", curve=curve, vote=None, data=data))


def test_the_notebook_shows_the_vote_of_the_results_or_says_who_makes_it(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path))
    assert "results.ipynb" in repr(reporting.attacked_vote(workspace))
    content = read_json(ROOT / "checkpoints" / "Ensemble" / "record.json")
    path = workspace.checkpoint("Ensemble") / "record.json"
    write_json(path, content)
    page = (ROOT / "assets" / "ATLAS.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- table vote .*?-->\n(.*?)<!-- end -->", page, re.S)
    assert repr(reporting.attacked_vote(workspace)).strip() == block.strip()
    write_json(path, content | {"worst_case": None})
    with pytest.raises(ValueError, match=r"no attack on the vote; run results\.ipynb again"):
        reporting.attacked_vote(workspace)
