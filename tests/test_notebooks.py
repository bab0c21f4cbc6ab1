from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from models.templates.build import notebooks
from utils import reproduce, utils_funcs
from utils.reproduce import execute, inject, main, parameters_of, plan, tidy
from utils.workspace import Workspace

COMMITTED = [ROOT / "dataset" / "prepare_dataset.ipynb", *sorted((ROOT / "models").glob("*.ipynb"))]
ASSETS = {
    "ResNet34": {
        "accuracy_curve",
        "adversarial_examples_fgsm",
        "adversarial_examples_pgd",
        "confusion_matrix",
        "grad_cam",
        "loss_curve",
        "robustness_curve",
    },
    "Dataset": {"contact_sheet", "leak_audit"},
}
ASSETS["ResNet34_atk"] = ASSETS["ResNet34"]


def test_rebuilding_changes_no_source() -> None:
    built = notebooks()
    assert sorted(built) == sorted(COMMITTED)
    for path, fresh in built.items():
        stored = nbformat.read(path, as_version=4)
        assert [(c.cell_type, c.source, c.id) for c in stored.cells] == [
            (c.cell_type, c.source, c.id) for c in fresh.cells
        ], f"{path.name}: run python -m models.templates.build"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_form_of_the_committed_notebooks(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = path.read_text(encoding="utf-8")
    assert "widgets" not in notebook.metadata and len(text) < 2**20
    assert not any(place in text for place in ("/root/", "/home/", "/work/", "/tmp/", "/Users/"))
    assert "Not for clinical use" in text
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            limit = 32 if "parameters" in cell.metadata.get("tags", []) else 15
            assert len(lines) <= limit, cell.source
            assert not any(line.lstrip().startswith(("def ", "class ")) for line in lines)
            assert not any(output.output_type == "error" for output in cell.outputs)
    assert {"seed", "profile", "out_dir", "data_dir"} <= set(parameters_of(notebook))


def test_the_missions_parameters_are_there() -> None:
    clean, attack = (parameters_of(nbformat.read(ROOT / "models" / f"resnet_model{x}.ipynb", 4)) for x in ("", "_atk"))
    shared = {"load_existing_hyperparams", "load_existing_params", "train_loaded_model", "num_epochs"}
    assert shared | {"n_trials"} <= set(clean)
    assert shared | {"pretrained_model_path", "Epsilon", "Alpha", "num_iter", "adv_weight", "epsilons"} <= set(attack)


def test_notebooks_import_only_what_utils_funcs_exports() -> None:
    for path in COMMITTED:
        source = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        imported = {line for line in source.splitlines() if line.startswith(("from utils", "from models"))}
        assert imported == {"from utils import utils_funcs as uf"}
        used = {part.split("(")[0].split(")")[0].split(".")[0] for part in source.replace("\n", " ").split("uf.")[1:]}
        names = {name.strip(" ,[]:*}").split(" ")[0].split(",")[0].split("[")[0] for name in used}
        assert names <= set(utils_funcs.__all__), names - set(utils_funcs.__all__)


def test_parameters_must_be_constants() -> None:
    for source in ("a = open('x')", "import os", "a = os.sep"):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        with pytest.raises(ValueError, match="constants"):
            parameters_of(nbformat.v4.new_notebook(cells=[cell]))
    with pytest.raises(ValueError, match="one cell"):
        parameters_of(nbformat.v4.new_notebook())


def test_injection_follows_the_parameters_and_ignores_foreign_names() -> None:
    notebook = nbformat.read(ROOT / "models" / "resnet_model.ipynb", as_version=4)
    changed = inject(notebook, {"num_epochs": 3, "foreign": 1})
    position = next(i for i, c in enumerate(changed.cells) if "parameters" in c.metadata.get("tags", []))
    assert changed.cells[position + 1].source.endswith("num_epochs = 3")
    assert len(notebook.cells) + 1 == len(changed.cells)


def test_command_line_refuses_what_it_does_not_know(capsys) -> None:
    assert main(["--models", "vgg"]) == 1 and "available: resnet" in capsys.readouterr().err
    assert main(["--set", "num_epoch=3"]) == 1 and "num_epochs" in capsys.readouterr().err
    assert main(["--set", "num_epochs"]) == 1 and "name=value" in capsys.readouterr().err
    assert main(["--set-atk", "search_epochs=3"]) == 1 and "--set-atk search_epochs" in capsys.readouterr().err


def test_plan_runs_preparation_first_unless_the_data_are_prepared(tmp_path: Path) -> None:
    steps = plan(reproduce._arguments(["--out", str(tmp_path), "--split", "published"]))
    assert [path.name for path, _ in steps] == ["prepare_dataset.ipynb", "resnet_model.ipynb", "resnet_model_atk.ipynb"]
    assert steps[0][1]["ratios"] == [0.8, 0.2, 0.0] and steps[0][1]["source"] == "phantom"
    (tmp_path / "train_set.pt").touch()
    steps = plan(reproduce._arguments(["--data", str(tmp_path), "--profile", "full", "--set", "Epsilon=0.01"]))
    assert len(steps) == 2 and steps[0][1]["data_dir"] == str(tmp_path) and steps[1][1]["Epsilon"] == 0.01


@pytest.mark.parametrize(
    "setting",
    ["epsilons=8", "epsilons=[1,2]", "num_epochs=abc", "num_epochs=1.5", "split=random", "source=x", "Epsilon=8"],
)
def test_settings_that_would_stop_a_notebook_later_are_refused_now(setting: str, capsys) -> None:
    assert main(["--set", setting]) == 1 and f"--set {setting.split('=')[0]}" in capsys.readouterr().err


def test_settings_may_be_fractions() -> None:
    steps = plan(
        reproduce._arguments(["--set", "epsilons=[0, 1/255]", "--set", "Epsilon=2/255", "--set", "trainable=2"])
    )
    assert steps[-1][1]["epsilons"] == [0, 1 / 255] and steps[-1][1]["Epsilon"] == 2 / 255


def test_settings_of_the_hardening_notebooks_leave_the_others_alone() -> None:
    steps = plan(reproduce._arguments(["--set", "num_epochs=20", "--set-atk", "num_epochs=5"]))
    epochs = {path.stem: values["num_epochs"] for path, values in steps}
    assert epochs["resnet_model"] == 20 and epochs["resnet_model_atk"] == 5


def test_data_and_folders_are_checked_before_anything_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reproduce, "DATASET_VARIABLES", tmp_path)
    (tmp_path / "file").touch()
    for arguments, word in (
        (["--data", ""], "empty"),
        (["--data", "nowhere"], "neither a folder"),
        (["--out", str(tmp_path / "file")], "is a file"),
        (["--profile", "full"], "no prepared data"),
    ):
        assert main(arguments) == 1 and word in capsys.readouterr().err
    (tmp_path / "train_set.pt").touch()
    assert main(["--profile", "full", "--split", "random"]) == 1 and "split already" in capsys.readouterr().err
    steps = plan(reproduce._arguments(["--profile", "full"]))
    assert [path.stem for path, _ in steps] == ["resnet_model", "resnet_model_atk"]


def test_a_second_run_does_not_see_the_settings_of_the_first() -> None:
    notebook = nbformat.read(ROOT / "models" / "resnet_model.ipynb", as_version=4)
    twice = inject(inject(notebook, {"num_epochs": 9, "image_size": 64}), {"num_epochs": 3})
    injected = [c.source for c in twice.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert len(injected) == 1 and "num_epochs = 3" in injected[0] and "image_size" not in injected[0]


def test_a_quick_run_may_not_write_over_the_repository() -> None:
    with pytest.raises(ValueError, match="folder of its own"):
        Workspace.open("", profile="quick")
    with pytest.raises(ValueError, match="profile"):
        Workspace.open("", profile="fast")


def test_a_failing_cell_is_named(tmp_path: Path) -> None:
    parameters = nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    broken = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(RuntimeError, match="broken.ipynb stopped.*division by zero"):
        execute(tmp_path / "broken.ipynb", {}, tmp_path / "out.ipynb")
    assert (tmp_path / "out.ipynb").is_file()


def test_tidy_drops_widgets_and_bars() -> None:
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}),
        nbformat.v4.new_output("stream", name="stderr", text="50%|#####"),
        nbformat.v4.new_output("stream", name="stderr", text=f"{ROOT}/utils/attacks.py:9: UserWarning: alpha"),
        nbformat.v4.new_output("execute_result", {"text/plain": "1"}),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": 1}})
    tidy(notebook)
    assert len(cell.outputs) == 2 and "widgets" not in notebook.metadata
    assert cell.outputs[0].text == "utils/attacks.py:9: UserWarning: alpha"


SMALL = ("image_size=32", "num_epochs=1", "max_test_images=12", "num_iter=2", "train_steps=1")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    settings = [text for pair in SMALL for text in ("--set", pair)]
    assert main(["--profile", "quick", "--out", str(folder), *settings]) == 0
    return folder


def test_quick_run_makes_every_figure_and_record(quick: Path) -> None:
    for model, names in ASSETS.items():
        assert {path.stem for path in (quick / "assets" / model).glob("*.png")} == names
    for model in ("ResNet34", "ResNet34_atk"):
        record = json.loads((quick / "checkpoints" / model / "record.json").read_text())
        assert record["note"] == "quick run: these numbers mean nothing"
        assert record["test"]["image"]["n"] == 12 and set(record["robustness"]) == {"FGSM", "PGD-2"}
        clean = record["robustness"]["FGSM"]["robust_accuracy"][0]
        assert clean == pytest.approx(record["test"]["image"]["accuracy"])
    for path in sorted((quick / "notebooks").glob("*.ipynb")):
        assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_load_flags_reuse_train_on_or_start_anew(quick: Path) -> None:
    data = ["--data", str(quick / "data"), "--out", str(quick), "--models", "resnet"]
    weights = quick / "checkpoints" / "ResNet34" / "weights.safetensors"
    before = weights.read_bytes()
    settings = [text for pair in (*SMALL, "load_existing_params=True") for text in ("--set", pair)]
    assert main([*data, *settings]) == 0
    assert weights.read_bytes() == before


def test_missing_data_and_models_say_what_to_do(tmp_path: Path, capsys) -> None:
    notebook = ROOT / "models" / "resnet_model.ipynb"
    values = {"out_dir": str(tmp_path), "profile": "quick"}
    with pytest.raises(RuntimeError, match="utils.prepare"):
        execute(notebook, values, tmp_path / "out.ipynb")
