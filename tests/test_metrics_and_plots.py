from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from matplotlib.figure import Figure

from utils import plots
from utils.leak_audit import audit_splits
from utils.metrics import evaluate, merge_by_patient, scores
from utils.results import robustness_table, score_table
from utils.suites import Attack
from utils.widgets import attack_explorer, attack_strip
from utils.worst_case import adversarial_examples, robustness_curve

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
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    recalls = sk.recall_score(labels, predicted, labels=present, average=None)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-6)
    f1 = sk.f1_score(labels, predicted, labels=present, average="macro")
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-6)
    aurocs = [sk.roc_auc_score(labels == c, probabilities[:, c]) for c in present]
    assert found["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-5)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert (found["recall"]["Moderate"] is None) == missing


def test_patient_level_averages_probabilities(splits) -> None:
    logits = torch.randn(len(splits.test), 4, generator=torch.Generator().manual_seed(1))
    means, labels = merge_by_patient(logits.softmax(1), splits.test)
    patients = splits.test.subjects.unique()
    assert len(means) == len(labels) == len(patients)
    first = splits.test.subjects == patients[0]
    assert torch.allclose(means[0], logits.softmax(1)[first].mean(0)) and labels[0] == splits.test.labels[first][0]
    found = evaluate(logits, splits.test)
    assert found["patient"]["n"] == len(patients) and found["image"]["n"] == len(splits.test)
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
        plots.plot_adversarial_examples([0, 0.05], examples, "fgsm", "Epsilon", classes=CLASSES, note=note),
        plots.plot_grad_cam(heat, title="t", note=note),
        plots.plot_leak_audit(audit_splits(splits), note=note),
        plots.plot_contact_sheet(splits.test.images[:3], ["a", "b", "c"], title="t", note=note),
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
        plots.plot_adversarial_examples([0, 1], [], "fgsm", "Epsilon")


def test_saving_a_figure_is_atomic(tmp_path) -> None:
    figure = plots.plot_confusion_matrix([[1, 0], [0, 1]], ["a", "b"], title="t")
    path = plots.save_figure(figure, tmp_path / "deep" / "figure.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in path.parent.iterdir()] == ["figure.png"]


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
