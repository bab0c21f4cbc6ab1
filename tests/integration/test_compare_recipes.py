from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from conftest import ROOT

from utils.commands.boundary import Command
from utils.commands.folds import main as folds_command
from utils.commands.recipes import main
from utils.core.parts import read_part
from utils.core.paths import read_json, write_json
from utils.data.preparation import group_by_subject, split_and_save
from utils.experiments import recipes as compare_recipes
from utils.experiments.budget import describe_start
from utils.experiments.recipe_records import RecipesSummary
from utils.experiments.recipe_summary import summarise, summary_table
from utils.experiments.recipes import RECIPE_VARIANTS, VARIANTS, claim
from utils.reporting.experiment_figures import recipes_figure
from utils.reporting.notebook_plan import parameters_of
from utils.training.config import TrainConfig
from utils.training.objectives import make_objective

SIZES = {"trainable": "head", "clean-epochs": 1, "epochs": 1, "train-steps": 1, "validation-images": 8, "max-images": 8}


@pytest.fixture
def command(phantoms, tmp_path: Path, small_backbone) -> list[str]:
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--backbone", "small", "--out", str(tmp_path / "out")]
    return [*arguments, "--work", str(tmp_path), *(text for k, v in SIZES.items() for text in (f"--{k}", str(v)))]


def test_runs_are_done_once_and_summed_up(command: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    assert main([*command, "--variants", "trades", "ema", "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "TRADES" in printed and "1-NN, raw pixels" in printed and "±" in printed
    files = sorted(path.name for path in (tmp_path / "out").glob("*_seed*.json"))
    assert files == [f"{name}_seed{seed}.json" for name in ("clean", "ema", "trades") for seed in (0, 1)]
    assert (tmp_path / "out" / "summary.png").is_file()
    run = read_json(tmp_path / "out" / "trades_seed1.json")
    assert run["training"]["objective"]["name"] == "trades" and run["training"]["config"]["seed"] == 1
    assert run["budget"]["trainable"] == "head" and run["training"]["start"] == "clean_seed1"
    assert run["test"]["n_images"] == 8 and len(run["test"]["metrics"]) == 3
    for name in ("clean_seed0", "trades_seed1"):
        assert read_json(tmp_path / "out" / name / "record.json")["note"] == "phantom demo, no medical meaning"
    monkeypatch.setattr(compare_recipes, "train_and_save", None)
    monkeypatch.setattr(compare_recipes, "build_model", None)
    assert main([*command, "--variants", "trades", "ema", "--seeds", "0", "1"]) == 0
    with pytest.raises(TypeError):
        main([*command, "--variants", "mart", "--seeds", "0"])


def test_weights_of_another_budget_are_not_taken(command: list[str], tmp_path: Path, capsys) -> None:
    assert main([*command, "--variants", "trades", "--seeds", "0"]) == 0
    again = [str(tmp_path / "elsewhere" / "out") if text == str(tmp_path / "out") else text for text in command]
    assert main([*again, "--variants", "trades", "--seeds", "0", "--clean-epochs", "2"]) == 1
    assert "other clean_epochs" in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()
    assert main([*again, "--variants", "trades", "--seeds", "0", "--max-images", "6"]) == 0


def _run(
    name: str, seed: int, validation: float, test: float, questions: tuple[str, ...] = ("4 classes", "binary")
) -> dict:
    def metrics(value: float) -> dict:
        level = {"n": 8, "accuracy": value, "balanced_accuracy": value, "macro_f1": value, "auroc": value}
        return {question: {"image": level, "patient": level} for question in questions}

    side = {"epsilons": [0, 1 / 255, 2 / 255], "attacks": ["FGSM"], "n_images": 8, "n_subjects": 4}
    return {
        "variant": name,
        "title": VARIANTS[name].title,
        "seed": seed,
        "model": {"backbone": "resnet34", "image_size": 32},
        "training": {"seconds": 60.0, "history": [{"epoch": 0}]},
        "budget": {"epochs": 1, "weights": "scratch"},
        "validation": side | {"metrics": [metrics(validation)] * 3},
        "test": side | {"metrics": [metrics(test)] * 3},
        "data": {"source": "x", "fingerprint": "x", "protocol": "patient"},
    }


def test_the_winner_is_chosen_on_validation_and_never_on_test(tmp_path: Path) -> None:
    for seed, (good, bad) in enumerate(((0.5, 0.4), (0.7, 0.6))):
        write_json(tmp_path / f"trades_seed{seed}.json", _run("trades", seed, validation=good, test=0.1))
        write_json(tmp_path / f"mart_seed{seed}.json", _run("mart", seed, validation=bad, test=0.9))
    summary = summarise(tmp_path, {})
    table = summary_table(summary)
    assert summary.winner == "trades" and list(table.index) == ["TRADES *", "MART"]
    sd = np.std([50, 70], ddof=1)
    assert table.loc["TRADES *", "validation balanced, 2/255"] == f"60.0 ± {sd:.1f}"
    figure = recipes_figure(summary)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["TRADES (chosen on validation)", "MART"]
    plt.close(figure)


@pytest.mark.parametrize(
    ("questions", "ill"),
    [
        (("2 classes",), True),
        (("3 classes",), False),
        (("3 classes", "binary"), True),
        (("4 classes", "3 classes", "binary"), True),
        (("5 classes",), False),
    ],
)
def test_any_number_of_classes_has_its_winner(tmp_path: Path, questions: tuple[str, ...], ill: bool) -> None:
    write_json(tmp_path / "trades_seed0.json", _run("trades", 0, 0.4, 0.9, questions))
    write_json(tmp_path / "mart_seed0.json", _run("mart", 0, 0.6, 0.3, questions))
    summary = summarise(tmp_path, {})
    table = summary_table(summary)
    assert summary.winner == "mart" and list(table.index) == ["TRADES", "MART *"]
    assert table.loc["MART *", "clean, balanced"] == "30.0"
    assert table.loc["MART *", "patient AUROC, clean"] == ("30.0" if ill else "-")


def test_nobody_wins_where_nothing_was_measured(tmp_path: Path) -> None:
    run = _run("trades", 0, 0.5, 0.5)
    run["validation"]["metrics"] = [{"4 classes": {"image": None, "patient": None}}] * 3
    write_json(tmp_path / "trades_seed0.json", run)
    summary = summarise(tmp_path, {})
    assert summary.winner is None and list(summary_table(summary).index) == ["TRADES"]


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished runs"):
        summarise(tmp_path)
    write_json(tmp_path / "trades_seed0.json", _run("trades", 0, 0.5, 0.5))
    write_json(tmp_path / "trades_seed1.json", _run("trades", 1, 0.5, 0.5) | {"budget": {"epochs": 2}})
    with pytest.raises(ValueError, match="use a folder for each"):
        summarise(tmp_path)


def test_an_unknown_variant_is_refused_before_anything_runs(command: list[str], tmp_path: Path, capsys) -> None:
    assert main([*command, "--variants", "tradse"]) == 1
    assert "one of adversarial" in capsys.readouterr().err and not (tmp_path / "out").exists()


_BAD = {
    "--epochs": ("0", "num_epochs must be a whole number of at least 1, not 0"),
    "--clean-epochs": ("0", "num_epochs must be a whole number of at least 1, not 0"),
    "--eps": ("0", "eps"),
    "--train-steps": ("0", "steps must be"),
    "--max-images": ("-4", "max_images must be a whole number of at least 1, not -4"),
    "--validation-images": ("0", "validation_images must be"),
    "--image-size": ("0", "image_size must be"),
    "--batch-size": ("0", "batch_size must be"),
    "--rate": ("nan", "learning_rate must be a number"),
    "--label-smoothing": ("3", "label_smoothing must be"),
    "--slices-per-patient": ("-1", "slices_per_patient must be"),
    "--keep": ("foo", "keep must be one of"),
    "--precision": ("fp8", "precision must be one of"),
    "--trainable": ("99", "trainable"),
    "--backbone": ("resnet99", "resnet99"),
    "--weights": ("none.safetensors", "none.safetensors"),
}


@pytest.mark.parametrize("option", _BAD)
@pytest.mark.parametrize("run", [main, folds_command])
def test_what_cannot_be_done_is_said_before_anything_is_made(
    run: Command, option: str, command: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    value, told = _BAD[option]
    at = command.index(option) if option in command else len(command)
    arguments = [*command[:at], *command[at + 2 :]]
    monkeypatch.setattr(compare_recipes, "train_and_save", None)
    assert run([*arguments, f"{option}={value}"]) == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob("settings.json")) and not (tmp_path / "out").exists()


def test_every_seed_is_looked_at_before_the_first_is_trained(command: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(compare_recipes, "train_and_save", None)
    assert main([*command, "--variants", "trades", "--seeds", "0", "99999999999"]) == 1
    assert "seed must be a whole number from 0" in capsys.readouterr().err


def test_a_copied_run_is_no_second_seed(tmp_path: Path) -> None:
    for name in ("trades_seed0", "trades_seed1"):
        write_json(tmp_path / f"{name}.json", _run("trades", 0, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"trades_seed1.json holds the run of trades, seed 0, so it was copied"):
        summarise(tmp_path)


def test_runs_that_nobody_can_sum_up_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mystery_seed0.json"
    write_json(path, _run("trades", 0, 0.5, 0.5) | {"variant": "mystery"})
    with pytest.raises(ValueError, match="mystery_seed0.json holds a run of 'mystery', which is no variant"):
        summarise(tmp_path)
    path.unlink()
    short = _run("trades", 0, 0.5, 0.5)
    short["test"]["metrics"].pop()
    write_json(tmp_path / "trades_seed0.json", short)
    with pytest.raises(ValueError, match="trades_seed0.json: test .*metrics of 2 radii instead of 3"):
        summarise(tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_made_of_real_settings(name: str) -> None:
    variant = VARIANTS[name]
    objective = make_objective(variant.recipe, eps=0.01, steps=2, **variant.objective)
    assert all(getattr(objective, key) == value for key, value in variant.objective.items())
    TrainConfig(**variant.config)
    compare_recipes.replace(compare_recipes.Augmentation(), **variant.augmentation)


def test_the_default_is_the_winner_of_the_published_comparison() -> None:
    winner = read_json(ROOT / "benchmarks" / "recipes" / "patient_resnet34_32px" / "summary.json")["winner"]
    variant = VARIANTS[winner]
    notebook = nbformat.read(ROOT / "models" / "resnet_model_atk.ipynb", as_version=4)
    parameters = parameters_of(notebook)
    assert parameters["recipe"] == variant.recipe
    assert all(parameters[name] == value for name, value in variant.objective.items())
    made = make_objective(variant.recipe, eps=0.1, **variant.objective)
    assert make_objective(parameters["recipe"], eps=0.1) == made


PUBLISHED = sorted((ROOT / "benchmarks" / "recipes").glob("*/summary.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_summaries_are_those_of_their_runs(path: Path) -> None:
    stored, again = read_json(path), json.loads(json.dumps(summarise(path.parent).plain()))
    budget = stored.pop("budget")
    assert budget.items() <= again.pop("budget").items()  # which also tells what was added since
    for summary in (stored, again):
        summary.pop("environment")
    assert again == stored and len(stored["baselines"]) == 3
    assert path.parent.name.split("_")[:2] == [stored["data"]["protocol"], stored["model"]["backbone"].replace("_", "")]


def test_results_of_an_encoder_from_outside_are_labelled_with_it() -> None:
    found = [read_part(RecipesSummary, path, "") for path in PUBLISHED if "dinov2" in path.parent.name]
    assert {one.budget.trainable for one in found} == {"head", 4, "all"}
    assert {describe_start(one) for one in found} == {"DINOv2, 56 px, from DINOv2-S (Depth-Anything-V2)"}


@pytest.mark.parametrize("split", ["patient", "published"])
def test_every_recipe_is_compared_over_three_seeds_on_both_splits(split: str) -> None:
    variants = read_json(ROOT / "benchmarks" / "recipes" / f"{split}_resnet34_32px" / "summary.json")["variants"]
    assert set(variants) == {"clean", *RECIPE_VARIANTS}
    assert all(row["seeds"] == [0, 1, 2] for row in variants.values())


@pytest.fixture
def finished(command: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, after it has left a run whose training took no time."""
    monkeypatch.setattr(compare_recipes, "harden", _as_clean)
    assert main([*command, "--variants", "trades", "--seeds", "0"]) == 0
    return [*command, "--variants", "trades", "--seeds", "0"]


def _as_clean(splits, variant, seed, budget, start: Path, folder: Path) -> None:
    shutil.copytree(start, folder)


@pytest.mark.parametrize(
    "change, named",
    [
        (["--epochs", "2"], r"clean_seed0.json was made with other epochs \(1, not 2\)"),
        (["--image-size", "48"], r"image_size \(32, not 48\)"),
        (["--backbone", "resnet34"], r"backbone \(small, not resnet34\)"),
        (["--max-images", "9"], r"max_images \(8, not 9\)"),
        (["--precision", "fp32"], r"precision \(auto, not fp32\)"),
    ],
)
def test_finished_runs_of_other_settings_are_refused(change, named: str, finished: list[str], capsys) -> None:
    assert main([*finished, *change]) == 1 and re.search(named, capsys.readouterr().err)


def test_baselines_of_other_data_are_not_set_beside_old_runs(
    finished: list[str], phantoms, tmp_path: Path, capsys
) -> None:
    before = (tmp_path / "out" / "summary.json").read_bytes()
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", seed=5, out=tmp_path / "data")
    assert main(finished) == 1 and "other fingerprint (" in capsys.readouterr().err
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_a_run_of_older_files_is_compared_by_what_it_tells(finished: list[str], tmp_path: Path, capsys) -> None:
    for path in (tmp_path / "out").glob("*_seed0.json"):
        run = read_json(path)
        run.pop("specification")
        write_json(path, run)
    assert main(finished) == 0
    assert main([*finished, "--rate", "0.1"]) == 1 and "other rate (0.0005, not 0.1)" in capsys.readouterr().err


@pytest.mark.parametrize("content, lacks", [({}, "variant"), ({"variant": "trades", "title": "x", "seed": 0}, "model")])
def test_a_run_that_is_not_whole_is_named(content, lacks: str, command: list[str], tmp_path: Path, capsys) -> None:
    write_json(tmp_path / "out" / "mart_seed0.json", content)
    assert main([*command, "--variants", "trades", "--seeds", "0"]) == 1
    assert f"{tmp_path / 'out' / 'mart_seed0.json'} lacks {lacks}" in capsys.readouterr().err


def test_a_run_under_the_name_of_another_is_refused(finished: list[str], tmp_path: Path, capsys) -> None:
    shutil.copy(tmp_path / "out" / "trades_seed0.json", tmp_path / "out" / "trades_seed1.json")
    assert main([*finished[:-1], "1"]) == 1
    assert "trades_seed1.json holds the run of trades, seed 0, so it was copied" in capsys.readouterr().err


def test_weights_whose_record_is_of_another_run_are_trained_again(finished: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "clean_seed0"
    wanted = (folder / "record.json").read_text()
    other = json.loads(wanted) | {"weights_sha256": "0" * 64}
    write_json(folder / "record.json", other)
    (tmp_path / "out" / "clean_seed0.json").unlink()
    assert main(finished) == 0
    assert read_json(folder / "record.json")["weights_sha256"] == json.loads(wanted)["weights_sha256"]


def test_start_weights_count_by_their_content(splits, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    facts = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        facts.append(compare_recipes.specification(splits, "resnet34", compare_recipes.Budget(weights=str(path))))
    claim(tmp_path / "work", facts[0])
    claim(tmp_path / "work", facts[0])
    with pytest.raises(ValueError, match="other weights_sha256"):
        claim(tmp_path / "work", facts[1])
    assert "max_images" not in read_json(tmp_path / "work" / "settings.json")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        compare_recipes.specification(splits, "resnet34", compare_recipes.Budget(weights="nowhere"))
