from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from tests.toy import toy_images
from utils.attacks.attack import Attack
from utils.evaluation.examples import AdversarialExample, adversarial_examples
from utils.evaluation.leak_audit import audit_splits
from utils.evaluation.metrics import evaluate, merge_by_patient, scores
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import robustness_table, score_table
from utils.grad_cam import cells_of, explain, pick_layer, with_cells
from utils.reporting import figures, plots, robustness_plots, slices, style
from utils.reporting.widgets import attack_explorer, attack_strip
from utils.training.record import ObjectiveFacts

CLASSES = ["Non", "VeryMild", "Mild", "Moderate"]


def _random(n: int = 200, missing: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3 if missing else 4, (n,), generator=draws)
    logits = torch.randn(n, 4, generator=draws) + 1.5 * torch.nn.functional.one_hot(labels, 4)
    return logits.softmax(1), labels


@pytest.mark.parametrize("missing", [False, True])
def test_scores_equal_scikit_learn(missing: bool) -> None:
    probabilities, labels = _random(missing=missing)
    found = scores(probabilities, labels, CLASSES)
    predicted, present = probabilities.argmax(1), sorted(labels.unique().tolist())
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, predicted))
    recalls = sk.recall_score(labels, predicted, labels=present, average=None)
    assert found.balanced_accuracy == pytest.approx(recalls.mean(), abs=1e-6)
    f1 = sk.f1_score(labels, predicted, labels=present, average="macro")
    assert found.macro_f1 == pytest.approx(f1, abs=1e-6)
    aurocs = [sk.roc_auc_score(labels == c, probabilities[:, c]) for c in present]
    assert found.auroc == pytest.approx(np.mean(aurocs), abs=1e-5)
    assert found.confusion == sk.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert (found.recall["Moderate"] is None) == missing


def test_patients_with_the_same_votes_tie_whatever_the_order_of_their_slices() -> None:
    draws = torch.Generator().manual_seed(0)
    right = torch.arange(32) < 20
    votes = torch.stack([right[torch.randperm(32, generator=draws)] for _ in range(40)])
    # sure, but not quite: sums of such numbers depend on their order
    chances = torch.where(votes.flatten(), 0.9998, 0.0001).float()
    images = toy_images(40 * 32, seed=0)
    images = replace(images, subjects=torch.arange(40).repeat_interleave(32))
    means, _ = merge_by_patient(torch.stack([chances, 1 - chances], 1), images)
    assert (means == means[0]).all() and torch.allclose(means[0, 0], chances[:32].mean())


def test_patient_level_averages_probabilities(splits) -> None:
    logits = torch.randn(len(splits.test), 4, generator=torch.Generator().manual_seed(1))
    means, labels = merge_by_patient(logits.softmax(1), splits.test)
    patients = splits.test.subjects.unique()
    assert len(means) == len(labels) == len(patients)
    first = splits.test.subjects == patients[0]
    assert torch.allclose(means[0], logits.softmax(1)[first].mean(0)) and labels[0] == splits.test.labels[first][0]
    found = evaluate(logits, splits.test)
    assert found.patient.n == len(patients) and found.image.n == len(splits.test)
    assert "by patient" in score_table(found).columns


def test_every_plot_is_a_closed_figure_with_its_note(splits, small_net) -> None:
    import matplotlib.pyplot as plt

    entry = {"epoch": 0, "train_loss": 1.0, "validation_loss": 1.1, "train_accuracy": 0.5, "validation_accuracy": 0.4}
    history = [entry, entry | {"epoch": 1}]
    attacks = [(Attack("fgsm"), eps) for eps in (0, 0.05)]
    examples = adversarial_examples(small_net, splits.test, attacks=attacks, n=3)
    curve = robustness_curve(small_net, splits.test, attack=Attack("fgsm"), epsilons=[0.01])
    note = "these numbers mean nothing"
    images = splits.test.pixels(slice(0, 2))
    heat = [("right", images, np.zeros((2, 128, 128)), ["a", "b"])]
    figures = [
        plots.plot_confusion_matrix(np.eye(4, dtype=int), CLASSES, title="t", note=note),
        plots.plot_loss_curve(history, title="t", best_epoch=0, note=note),
        plots.plot_accuracy_curve(history, title="t", note=note),
        plots.plot_robustness_curve({"a": ([0, 0.01], [1, 0.5])}, title="t", chance=0.5, note=note),
        slices.plot_adversarial_examples([0, 0.05], examples, "fgsm", "Epsilon", classes=CLASSES, note=note),
        slices.plot_grad_cam(heat, title="t", note=note),
        plots.plot_leak_audit(audit_splits(splits), note=note),
        slices.plot_contact_sheet(splits.test.images[:3], ["a", "b", "c"], title="t", note=note),
        attack_strip(small_net, splits.test, 0, epsilons=[0, 0.05], note=note),
    ]
    for figure in figures:
        assert isinstance(figure, Figure) and note in figure.get_suptitle()
    assert not plt.get_fignums()
    assert robustness_table({"FGSM": curve}).loc["0/255", "FGSM"] == pytest.approx(
        100 * curve.robust_accuracy[0], abs=0.1
    )


def test_rows_of_the_confusion_matrix_are_the_true_class() -> None:
    counts = [[5, 1], [0, 2]]
    ax = plots.plot_confusion_matrix(counts, ["sick", "well"], title="t").axes[0]
    assert ax.get_ylabel() == "true" and ax.get_xlabel() == "predicted"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sick", "well"]
    assert [t.get_text().split("\n")[0] for t in ax.texts] == ["5", "1", "0", "2"]


def test_examples_need_one_row_a_parameter() -> None:
    with pytest.raises(ValueError, match="2 parameters"):
        slices.plot_adversarial_examples([0, 1], [], "fgsm", "Epsilon")


def test_saving_a_figure_is_atomic(tmp_path) -> None:
    figure = plots.plot_confusion_matrix([[1, 0], [0, 1]], ["a", "b"], title="t")
    path = style.save_figure(figure, tmp_path / "deep" / "figure.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_a_saved_figure_is_what_matplotlib_would_save_and_is_left_as_it_was(tmp_path) -> None:
    figure = robustness_plots.plot_intervals(_curve("a", 0.5), title="a title")
    canvas = figure.canvas
    with Image.open(style.save_figure(figure, tmp_path / "ours.png")) as picture:
        ours = np.asarray(picture.convert("RGB"), dtype=int)
    assert figure.canvas is canvas and figure.dpi == 100
    figure.savefig(tmp_path / "theirs.png", dpi=200)
    with Image.open(tmp_path / "theirs.png") as picture:
        theirs = np.asarray(picture.convert("RGB"), dtype=int)
    # but for what a palette of 256 colours rounds
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 8


def test_no_sliders_where_nobody_can_move_them(splits, small_net, monkeypatch) -> None:
    monkeypatch.setenv("MRI_HEADLESS", "1")
    assert attack_explorer(small_net, splits.test) is None


def test_sliders_attack_again(splits, small_net, monkeypatch) -> None:
    monkeypatch.delenv("MRI_HEADLESS", raising=False)
    box = attack_explorer(small_net, splits.test)
    strength, number, output = box.children
    strength.value, number.value = 4.0, 1
    assert output is not None and strength.max == pytest.approx(8)


def test_collapsed_epochs_are_marked_once_in_the_legend() -> None:
    keys = ("train_accuracy", "validation_accuracy", "validation_robust_accuracy", "validation_fgsm_accuracy")
    history = [{"epoch": epoch, **dict.fromkeys(keys, 0.5), "collapsed": epoch in (1, 3)} for epoch in range(5)]
    ax = plots.plot_accuracy_curve(history, title="t").axes[0]
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown.count("collapsed, taken back") == 1 and "validation, balanced, FGSM" in shown
    marked = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert marked == [2, 4]
    # of several members a line would not say whose epoch it marks
    members = plots.plot_member_curves({"a": history}, "validation_accuracy", title="t", unit="u").axes[0]
    assert [line.get_label() for line in members.lines] == ["a"]


def _curve(label: str, height: float) -> dict[str, tuple]:
    return {label: ([0, 1 / 255, 2 / 255], [height, 0.4, 0.1], [[0.2, 0.9]] * 3)}


def test_a_saved_figure_has_the_styles_resolution_and_no_legend_has_a_frame(tmp_path) -> None:
    figure = robustness_plots.plot_intervals(_curve("a", 0.5), title="t")
    path = style.save_figure(figure, tmp_path / "a.png")
    with Image.open(path) as picture:
        assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert picture.width == pytest.approx(200 * figure.get_figwidth(), abs=2)
    framed, axes = style.axes_of(1, 2, size=(4, 2))
    for ax in axes.flat:
        ax.plot([0, 1], label="a")
        ax.legend()
    framed.legend()
    style.finish(framed, "ResNet34_atk: a figure", "")
    assert framed.get_suptitle().replace("\n", " ") == "ResNet34, hardened: a figure"
    legends = [*framed.legends, *(ax.get_legend() for ax in framed.axes)]
    assert len(legends) == 3 and not any(legend.get_frame_on() for legend in legends)


def test_many_curves_get_bars_instead_of_bands() -> None:
    few = _curve("a", 0.5) | _curve("b", 0.6)
    many = few | _curve("c", 0.7)
    bands = [
        [one for one in figure.axes[0].collections if isinstance(one, PolyCollection)]
        for figure in (robustness_plots.plot_intervals(curves, title="t") for curves in (few, many))
    ]
    assert [len(found) for found in bands] == [2, 0]
    apart = robustness_plots.plot_intervals_apart({"x": few, "y": _curve("c", 0.7)}, title="t")
    assert [len(ax.lines) for ax in apart.axes] == [2, 1]


def test_axes_of_percent_end_at_100_and_a_marked_radius_has_the_axis_unit() -> None:
    history = [{"epoch": 0, "train_accuracy": 1.0, "validation_accuracy": 1.0}]
    figures = [
        plots.plot_accuracy_curve(history, title="t"),
        plots.plot_member_curves({"a": history}, "train_accuracy", title="t", unit="accuracy (%)"),
        plots.plot_robustness_curve({"a": ([0, 0.01], [1, 0.5])}, title="t"),
        robustness_plots.plot_before_after({"clean": (1.0, None)}, title="t"),
        robustness_plots.plot_intervals(_curve("a", 1.0), title="t", original=0.005),
    ]
    for figure in figures:
        assert max(figure.axes[0].get_yticks()) == 100
    assert [text.get_text().strip() for text in figures[-1].axes[0].texts] == ["0.005 = 1.28/255"]


def test_losses_say_what_they_are_of() -> None:
    entry = {"epoch": 0, "train_loss": 1.0, "validation_loss": 1.1}

    def labels(history: list, **options: str) -> list[str]:
        lines = plots.plot_loss_curve(history, title="t", **options).axes[0].lines
        return [line.get_label().replace("\n", " ") for line in lines]

    assert labels([entry]) == ["training, clean images", "validation, clean images"]
    hardened = [entry | {"validation_robust_accuracy": 0.5}]
    assert labels(hardened) == ["training, attacked images", "validation, clean images"]
    assert labels(hardened, training="half")[0] == "training, half"
    half = ObjectiveFacts(name="adversarial", adv_weight=0.25)
    assert figures._trained_on(half).replace("\n", " ") == "75% clean, 25% attacked images"


def test_bins_of_few_images_are_hollow_and_have_no_interval() -> None:
    sure = [0.95] * 50 + [0.55] * 9 + [0.35] * 10
    right = [True] * 40 + [False] * 10 + [True] * 9 + [True, False] * 5
    rows = robustness_plots.binned(sure, right, 10)
    assert [row[4] for row in rows] == [True, False, True]
    assert [row[1] for row in rows] == pytest.approx([0.5, 1, 0.8])
    low, high = rows[2][2:4]  # Wilson's interval of 40 out of 50
    assert (low, high) == pytest.approx((0.670, 0.888), abs=1e-3)
    assert not robustness_plots.binned([0.95] * 600 + [0.5] * 11, [True] * 611, 10)[0][4]
    figure = robustness_plots.plot_reliability({"a": (sure, right)}, title="t")
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [len(line.get_xdata()) for line in hollow] == [1] and "hollow" in figure.get_suptitle()


def test_importances_take_ten_finished_trials() -> None:
    trials = [{"number": number, "state": "complete", "value": 0.5} for number in range(10)]
    study = {"history": trials, "selected_by": "accuracy", "importance": {"learning_rate": 1.0}}
    assert set(figures.optuna_figures(study, "a")) == {"optuna_history", "optuna_importance"}
    trials[3]["state"] = "pruned"
    assert set(figures.optuna_figures(study, "a")) == {"optuna_history"}


def test_heat_maps_have_a_colour_bar_that_says_whose_scale_it_is(splits, resnet) -> None:
    name, images, maps, captions = explain(resnet, splits.test, torch.tensor([0, 1]), name="right")
    figure = slices.plot_grad_cam([(name, images, maps, captions)], title="t")
    bar = figure.axes[-1]
    assert "share of the map's maximum" in bar.get_ylabel() and bar.get_ylim() == (0, 1)
    assert "its own maximum" in figure.get_suptitle().replace("\n", " ") and len(figure.axes) == 3
    layer = pick_layer(resnet, images)
    name = with_cells("right", resnet, splits.test)
    assert name == f"right\n({cells_of(resnet, layer, images)} x {cells_of(resnet, layer, images)} cells)"


def test_examples_show_model_attack_radius_and_change(splits, small_net) -> None:
    alphas, eps = [0.001, 0.004], 4 / 255
    attacks = [(Attack("pgd", steps=5, alpha=alpha, random_start=False), eps) for alpha in alphas]
    examples = adversarial_examples(small_net, splits.test, attacks=attacks, n=2)
    figure = slices.plot_adversarial_examples(alphas, examples, "pgd", "Alpha", model="ResNet34, hardened")
    assert figure.get_suptitle().startswith("ResNet34, hardened: slices under PGD-5\n")
    assert [ax.get_ylabel().split("\n") for ax in figure.axes[::2]] == [
        ["Alpha", "0.001", "= 0.26/255", "at eps", "4/255"],
        ["Alpha", "0.004", "= 1/255", "at eps", "4/255"],
    ]
    for ax, example in zip(figure.axes, [one for row in examples for one in row]):
        attacked, change = (picture.get_array() for picture in ax.images)
        assert np.allclose(attacked, example.image[0]) and ax.images[1].get_clim() == (-eps, eps)
        assert np.allclose(change, (example.image - example.clean_image)[0])
        assert 0 < np.abs(change).max() <= eps + 1e-6
    bare = [[AdversarialExample(one.image, one.label, one.clean, one.attacked) for one in row] for row in examples]
    figure = slices.plot_adversarial_examples([0, 0.005], bare, attack_name="fgsm", parameter_type="Epsilon")
    assert figure.get_suptitle().startswith("FGSM\n") and [len(ax.images) for ax in figure.axes] == [1] * 4
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["no attack", "eps\n0.005"]
