from __future__ import annotations

import pytest
import torch
from matplotlib.collections import PolyCollection

from tests.toy import EPS, train_toy
from utils.attacks.attack import Attack
from utils.core.paths import write_json
from utils.data.workspace import Workspace
from utils.evaluation.baselines import majority
from utils.evaluation.ensemble import Vote
from utils.evaluation.intervals import report
from utils.evaluation.robustness import evaluate_robustness
from utils.evaluation.transfer import step_size_sweep, transfer_matrix
from utils.experiments.records import display_name
from utils.reporting.pages import KINDS
from utils.reporting.robustness_figures import (
    comparison_figures,
    draw_all,
    headline_table,
    model_figures,
    paired_table,
    panel_table,
    question_table,
    recall_table,
    remark,
    robustness_records,
    summary_table,
    vote_table,
)
from utils.reporting.robustness_plots import plot_step_sizes


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_nets, toy_test) -> Workspace:
    """Records of a plain and a hardened net and of a vote, as the command writes them."""
    root = Workspace.open(str(tmp_path_factory.mktemp("figures")))
    few = toy_test.balanced_subset(64)
    vote = Vote([toy_nets["plain"], train_toy(seed=3)]).eval()
    models = {"ResNet34": toy_nets["plain"], "ResNet34_atk": toy_nets["hardened"], "Ensemble": vote}
    for title, model in models.items():
        panel = 0 if title == "Ensemble" else 32
        found = evaluate_robustness(
            model, few, suite="quick", epsilons=[2 / 255, EPS], panel_images=panel, panel_eps=EPS
        )
        own = {"title": title, "classes": few.classes, "data": few.info, "note": "toys"}
        write_json(root.checkpoint(title) / "robustness_quick.json", own | found.plain())
    return root


@pytest.mark.slow
def test_tables_are_made_of_records_alone(workspace: Workspace) -> None:
    records = robustness_records(workspace, "quick")
    assert list(records) == ["ResNet34", "ResNet34_atk", "Ensemble"]
    table = summary_table(records)
    assert list(table.columns) == ["images (patients)", "clean", "2/255", "6/255", "gradient checks"]
    assert table.loc["ResNet34", "images (patients)"] == "64 (20)" and "[" in table.loc["ResNet34", "clean"]
    assert list(table["gradient checks"]) == ["9/9", "9/9", "unchecked"]
    assert list(table.index) == ["ResNet34", "ResNet34, hardened", "Ensemble"]
    assert set(panel_table(records["ResNet34"])["passed"]) == {"yes"}
    assert len(panel_table(records["ResNet34"])) == 9
    assert list(panel_table(records["Ensemble"]).index) == ["none was made"]
    questions = question_table(records["ResNet34"])
    assert {entry[:2] for entry in questions.index} >= {("binary", "patient"), ("4 classes", "image")}
    voted = vote_table(records["Ensemble"])
    assert voted.loc["worst case"].tolist() == pytest.approx(
        [round(100 * value, 1) for value in records["Ensemble"].curve.robust_accuracy]
    )
    assert {"all from members", "best member", "oracle", "Square-200"} <= set(voted.index)


def test_models_and_baselines_stand_in_one_table(workspace: Workspace, toy_test) -> None:
    records, few = robustness_records(workspace, "quick"), toy_test.balanced_subset(64)
    baselines = {"majority": report(majority(few, few), few)}
    table, plain = headline_table(records, baselines), records["ResNet34"]
    assert table.loc["ResNet34", "2/255"].startswith(f"{100 * plain.curve.robust_accuracy[1]:.1f} [")
    by_patient = plain.metrics[0]["binary"].patient.auroc
    assert table.loc["ResNet34", "clean, AUROC"].startswith(f"{100 * by_patient:.1f} [")
    assert set(table["1/255"]) == {"-"} and table.loc["majority", "2/255"] == "-"
    assert table.loc["majority", "clean, balanced"].startswith("25.0 [")
    recalls = recall_table(records, 2 / 255)
    clean, attacked = (entry["4 classes"].image.recall["Non"] for entry in plain.metrics[:2])
    assert recalls.loc["ResNet34", "Non"] == f"{100 * clean:.1f} / {100 * attacked:.1f}"
    with pytest.raises(ValueError, match="1/255 was not measured"):
        recall_table(records)
    for kind in ("headline", "worst_case"):
        text = KINDS[kind](list(records.values()))
        order = [text.index(f"| {display_name(title)} |") for title in records]
        assert order == sorted(order) and "of Ensemble: suite quick (PGD-20 from mean probability" in text
        assert "no targeted attack was made" in text and "_atk" not in text
    assert "binary | patient | 6/255" in KINDS["questions"](plain)


def test_a_pair_is_compared_on_the_same_images(workspace: Workspace, toy_test) -> None:
    records, few = robustness_records(workspace, "quick"), toy_test.balanced_subset(64)
    table = paired_table(records["ResNet34_atk"], records["ResNet34"], few)
    plain, hardened = (records[name].curve.robust_accuracy[-1] for name in ("ResNet34", "ResNet34_atk"))
    last = table.iloc[-1]
    assert last["difference (points)"].startswith(f"{100 * (hardened - plain):.1f} [")
    assert last["robust only when hardened"] - last["robust only when not hardened"] == round(64 * (hardened - plain))
    assert 0 <= float(last["McNemar p"]) <= 1
    curve = records["ResNet34"].curve.model_copy(update={"epsilons": [0.0]})
    short = records["ResNet34"].model_copy(update={"curve": curve})
    with pytest.raises(ValueError, match="radii differ"):
        paired_table(records["ResNet34_atk"], short, few)


def test_every_figure_is_drawn(workspace: Workspace) -> None:
    names = {path.relative_to(workspace.root / "assets").as_posix() for path in draw_all(workspace, "quick")}
    own = ("worst_case", "first_breaking", "reliability")
    assert names >= {f"{title}/{name}.png" for title in ("ResNet34", "ResNet34_atk", "Ensemble") for name in own}
    assert names >= {"ResNet34_atk/before_after.png", "Robustness/worst_case_all.png", "Robustness/attacks.png"}
    assert "ResNet34_atk/recall.png" in names and "ResNet34/recall.png" not in names


def test_figures_show_two_bands_an_axis_words_and_no_ticks_above_100(workspace: Workspace) -> None:
    for path, figure in draw_all(workspace, "quick").items():
        for ax in figure.axes:
            drawn = [one for one in ax.collections if isinstance(one, PolyCollection)]
            assert len(drawn) <= 2, path
            legend = ax.get_legend()
            names = [text.get_text() for text in legend.get_texts()] if legend else []
            assert not any("_atk" in name for name in names), path
            assert legend is None or not legend.get_frame_on(), path
            if "%" in ax.get_ylabel():
                assert max(ax.get_yticks()) <= 100, path
        assert "64 test images of 20 patients" in figure.get_suptitle() or path.stem == "attacks", path


def test_the_figure_of_attacks_says_on_how_many_images(workspace: Workspace) -> None:
    figure = comparison_figures(robustness_records(workspace, "quick"))["attacks"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "ResNet34 (32)",
        "ResNet34, hardened (32)",
    ]
    assert "up to 64" in figure.get_suptitle()


def test_recall_figure_draws_the_recalls_of_the_records(workspace: Workspace) -> None:
    records = robustness_records(workspace, "quick")
    ax = model_figures("ResNet34_atk", records)["recall"].axes[0]
    for bars, title in zip(ax.containers, ("ResNet34", "ResNet34_atk")):
        expected = records[title].metrics[0]["4 classes"].image.recall
        assert [bar.get_height() for bar in bars] == pytest.approx([100 * value for value in expected.values()])


def test_a_doubtful_number_is_marked_wherever_it_is_shown(workspace: Workspace) -> None:
    records = robustness_records(workspace, "quick")
    checks = records["ResNet34"].panel.checks
    checks[2] = checks[2].model_copy(update={"passed": False})
    name = checks[2].name
    assert f"gradient checks of ResNet34 8/9: {name}" in remark(records) and "toys" in remark(records)
    assert "trustworthy" not in remark(records)
    curve = records["Ensemble"].curve.model_copy(update={"n_images": 8})
    records["Ensemble"] = records["Ensemble"].model_copy(update={"curve": curve})
    assert "Ensemble on 8 of 64 images" in remark(records)
    assert summary_table(records).loc["ResNet34", "gradient checks"] == f"8/9: {name}"


def test_records_of_other_data_do_not_mix(workspace: Workspace) -> None:
    records = robustness_records(workspace, "quick")
    other = {"data": records["ResNet34"].data.plain() | {"fingerprint": "other"}}
    write_json(workspace.checkpoint("ResNet34_x") / "robustness_quick.json", records["ResNet34"].plain() | other)
    try:
        with pytest.raises(ValueError, match="different data"):
            robustness_records(workspace, "quick")
    finally:
        (workspace.checkpoint("ResNet34_x") / "robustness_quick.json").unlink()
    with pytest.raises(ValueError, match="suite must be"):
        robustness_records(workspace, "none")


def test_transfer_is_weaker_than_the_models_own_gradient(toy_nets, toy_test) -> None:
    models = {"plain": toy_nets["plain"], "other": train_toy(seed=3)}
    matrix = transfer_matrix(models, toy_test, eps=EPS, attack=Attack("pgd", steps=10))
    for target in models:
        others = [matrix[source][target] for source in models if source != target]
        assert all(matrix[target][target] < value for value in others)


def test_steps_that_stay_near_the_image_only_look_like_robustness(toy_nets, toy_test) -> None:
    with pytest.warns(UserWarning, match="cannot reach"):
        sweep = step_size_sweep(
            toy_nets["plain"], toy_test, eps=10 / 255, steps=10, alphas=[0.1 / 255, 1 / 255, 2.5 / 255]
        )
    assert sweep["accuracy"][0] > sweep["clean"] - 0.1 and sweep["accuracy"][2] < 0.3
    said = plot_step_sizes(**sweep, title="t").get_suptitle()
    assert f"{len(toy_test)} test images of {len(toy_test.subjects.unique())} patients" in said
    assert torch.tensor(sweep["accuracy"]).diff().max() <= 0
