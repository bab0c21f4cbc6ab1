from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from torch import nn

from models import def_models
from models.def_models import Backbone
from models.templates import build
from models.templates.build import notebooks
from utils import utils_funcs
from utils.commands import figures as figures_command
from utils.commands import reproduce as reproduce_command
from utils.commands.reproduce import main
from utils.core.paths import write_json
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.workspace import Workspace
from utils.evaluation.attacker import Attacker
from utils.reporting import atlas_figures, notebook_plan, style
from utils.reporting import notebooks as reproduce
from utils.reporting.notebook_plan import Order, parameters_of, plan
from utils.reporting.notebooks import execute, inject, run, tidy
from utils.reporting.style import COLOURS
from utils.training.config import SLICES_PER_PATIENT

COMMITTED = [ROOT / "dataset" / "prepare_dataset.ipynb", *sorted((ROOT / "models").glob("*.ipynb"))]
PUBLISHED = sorted((ROOT / "benchmarks" / "published" / "notebooks").glob("*.ipynb"))
FIGURES = {
    "accuracy_curve",
    "adversarial_examples_fgsm",
    "adversarial_examples_pgd",
    "confusion_matrix",
    "grad_cam",
    "loss_curve",
    "robustness_curve",
    "worst_case",
    "first_breaking",
    "reliability",
}
CLEAN = ("DINOv2", "ResNet34", "EfficientNetB0")
HARDENED = tuple(f"{title}_atk" for title in CLEAN)
#: What a plain model, a hardened one and the vote have beyond that.
OWN = {"": {"step_size"}, "_atk": {"before_after", "recall"}, "Ensemble": {"transfer_matrix"}}
MODEL_NOTEBOOKS = sorted((ROOT / "models").glob("*_model*.ipynb"))


def _figures_of(title: str) -> set[str]:
    return FIGURES | OWN["Ensemble" if title == "Ensemble" else "_atk" if title.endswith("_atk") else ""]


def test_rebuilding_changes_no_source() -> None:
    built = notebooks()
    assert sorted(built) == sorted(COMMITTED)
    for path, fresh in built.items():
        stored = nbformat.read(path, as_version=4)
        assert [(c.cell_type, c.source, c.id) for c in reproduce.without_injected(stored).cells] == [
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
            limit = 40 if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])) else 15
            assert len(lines) <= limit, cell.source
            assert not any(line.lstrip().startswith(("def ", "class ")) for line in lines)
            assert not any(output.output_type == "error" for output in cell.outputs)
    # the one notebook that trains nothing and reads no prepared data
    common = {"out_dir"} if path.stem == "predict" else {"seed", "profile", "out_dir", "data_dir"}
    assert common <= set(parameters_of(notebook))


def test_every_notebook_of_the_mission_is_there() -> None:
    names = {f"{name}_model{suffix}" for name in ("dino_v2", "resnet", "efficientnet") for suffix in ("", "_atk")}
    assert {path.stem for path in COMMITTED} == names | {"results", "prepare_dataset", "attack_atlas", "predict"}


@pytest.mark.parametrize("path", MODEL_NOTEBOOKS, ids=lambda path: path.stem)
def test_the_missions_parameters_are_there(path: Path) -> None:
    parameters = set(parameters_of(nbformat.read(path, 4)))
    shared = {"load_existing_hyperparams", "load_existing_params", "train_loaded_model", "num_epochs", "n_trials"}
    assert shared | {"augmentation_strength"} <= parameters
    if path.stem.endswith("_atk"):
        assert {"pretrained_model_path", "Epsilon", "Alpha", "num_iter", "adv_weight", "epsilons"} <= parameters


def test_what_one_sets_in_the_notebook_for_scans_counts() -> None:
    """A cell of a run's values below one's own would answer about another scan."""
    notebook = nbformat.read(ROOT / "models" / "predict.ipynb", as_version=4)
    assert reproduce.without_injected(notebook).cells == notebook.cells
    assert inject(notebook, {"foreign": 1}).cells == notebook.cells


def test_no_badge_without_an_address() -> None:
    assert build.badge("models/results") == "" or build.REPOSITORY
    for path in [*COMMITTED, *PUBLISHED]:
        first = nbformat.read(path, as_version=4).cells[0].source
        assert ("colab-badge" in first) == bool(build.REPOSITORY) and first == first.strip(), path


def test_setup_is_the_same_everywhere_and_each_badge_opens_its_own_notebook(monkeypatch) -> None:
    setups = set()
    for path in COMMITTED:
        cells = nbformat.read(path, as_version=4).cells
        setups.add(next(c.source for c in cells if "sys.path.insert" in c.source))
    assert len(setups) == 1
    monkeypatch.setattr(build, "REPOSITORY", "https://github.com/owner/name")
    for path, fresh in notebooks().items():
        place = path.relative_to(ROOT).as_posix()
        assert fresh.cells[0].source.startswith("[![Open in Colab]")
        assert f"(https://colab.research.google.com/github/owner/name/blob/main/{place})" in fresh.cells[0].source
        assert 'REPOSITORY = "https://github.com/owner/name"' in "".join(c.source for c in fresh.cells)


def test_setup_fetches_the_repository_on_colab(tmp_path: Path, monkeypatch) -> None:
    source = (ROOT / "models" / "templates" / "setup.py").read_text().split("# %%\n")[-1]
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(FileNotFoundError, match="inside a clone"):
        exec(source.replace("__REPOSITORY__", ""), {})
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    with pytest.raises(ValueError, match="REPOSITORY"):
        exec(source.replace("__REPOSITORY__", ""), {})

    def fake(command: list, check: bool) -> None:
        ran.append([str(part) for part in command])
        (tmp_path / "repository").mkdir(exist_ok=True)

    monkeypatch.setattr("subprocess.run", fake)
    exec(source.replace("__REPOSITORY__", "https://github.com/owner/name"), {})
    assert ran[0][:2] == ["git", "clone"] and ran[0][-2] == "https://github.com/owner/name"
    assert ran[1][-1].endswith("requirements-colab.txt") and sys.path[0].endswith("repository")
    exec(source.replace("__REPOSITORY__", ""), {})
    assert len(ran) == 2


def test_notebooks_import_only_what_utils_funcs_exports() -> None:
    for path in COMMITTED:
        source = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        imported = {line for line in source.splitlines() if line.startswith(("from utils", "from models"))}
        assert imported == {"from utils import utils_funcs as uf"}
        names = set(re.findall(r"\buf\.(\w+)", source))
        assert names <= set(utils_funcs.__all__), names - set(utils_funcs.__all__)


def test_parameters_must_be_constants() -> None:
    for source in ("a = open('x')", "import os", "a = os.sep"):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        with pytest.raises(ValueError, match="constants"):
            parameters_of(nbformat.v4.new_notebook(cells=[cell]))
    with pytest.raises(ValueError, match="found none"):
        parameters_of(nbformat.v4.new_notebook())
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in ("a = 1", "b = 2")]
    assert parameters_of(nbformat.v4.new_notebook(cells=cells)) == {"a": 1, "b": 2}
    cells[1].source = "a = 2"
    with pytest.raises(ValueError, match="assign a twice"):
        parameters_of(nbformat.v4.new_notebook(cells=cells))


def test_injection_follows_the_parameters_and_ignores_foreign_names() -> None:
    notebook = reproduce.without_injected(nbformat.read(ROOT / "models" / "resnet_model.ipynb", as_version=4))
    changed = inject(notebook, {"num_epochs": 3, "foreign": 1})
    # after the last of the cells, or defaults would come after it and count
    position = max(i for i, c in enumerate(changed.cells) if "parameters" in c.metadata.get("tags", []))
    assert changed.cells[position + 1].source.endswith("num_epochs = 3")
    folded = [c for c in changed.cells if "hide-input" in c.metadata.get("tags", [])]
    assert len(folded) == 1 and folded[0].metadata["jupyter"] == {"source_hidden": True}
    assert len(notebook.cells) + 1 == len(changed.cells)


def test_command_line_refuses_what_it_does_not_know(capsys) -> None:
    assert main(["--models", "vgg"]) == 1 and "available: dino_v2" in capsys.readouterr().err
    assert main(["--set", "num_epoch=3"]) == 1 and "num_epochs" in capsys.readouterr().err
    assert main(["--set", "num_epochs"]) == 1 and "name=value" in capsys.readouterr().err
    assert main(["--set-atk", "weights=scratch"]) == 1 and "--set-atk weights" in capsys.readouterr().err


def _order(words: list[str]) -> Order:
    """What these words ask for."""
    return reproduce_command.main.parse(words)["order"].filled()


def test_plan_runs_preparation_first_unless_the_data_are_prepared(tmp_path: Path) -> None:
    steps = plan(_order(["--out", str(tmp_path), "--split", "published"]))
    names = [path.stem for path, _ in steps]
    assert names[0] == "prepare_dataset" and names[-1] == "results" and len(names) == 8
    # the atlas is of patients, and of the two models of one backbone
    assert [path.stem for path, _ in plan(_order(["--out", str(tmp_path)]))] == [*names, "attack_atlas"]
    assert "attack_atlas" not in [path.stem for path, _ in plan(_order(["--models", "resnet"]))]
    assert all(names.index(name) < names.index(f"{name}_atk") for name in names if name.endswith("_model"))
    assert steps[0][1]["ratios"] == [0.8, 0.2, 0.0] and steps[0][1]["source"] == "phantom"
    (tmp_path / "train_set.pt").touch()
    steps = plan(_order(["--data", str(tmp_path), "--profile", "full", "--set", "Epsilon=0.01"]))
    assert len(steps) == 7 and steps[0][1]["data_dir"] == str(tmp_path) and steps[1][1]["Epsilon"] == 0.01
    steps = plan(_order(["--data", str(tmp_path), "--models", "resnet", "--skip-results"]))
    assert [path.stem for path, _ in steps] == ["resnet_model", "resnet_model_atk"]
    steps = plan(_order(["--data", str(tmp_path), "--only-results"]))
    assert [path.stem for path, _ in steps] == ["results"]
    for wrong in (["--models", "resnet"], ["--skip-results"], ["--data", "phantom"]):
        with pytest.raises(ValueError, match="--only-results"):
            plan(_order(["--data", str(tmp_path), "--only-results", *wrong]))


@pytest.mark.parametrize(
    "setting",
    [
        "epsilons=8",
        "epsilons=[1,2]",
        "num_epochs=abc",
        "num_epochs=1.5",
        "split=random",
        "source=x",
        "Epsilon=8",
        "rule=loudest",
        "vote_suite=standrad",
        "attacked_rules=['soft', 'loud']",
        "attacked_rules=[1]",
        "recipe=free",
        "sampling=even",
        "ema_decay=high",
    ],
)
def test_settings_that_would_stop_a_notebook_later_are_refused_now(setting: str, capsys) -> None:
    assert main(["--set", setting]) == 1 and f"--set {setting.split('=')[0]}" in capsys.readouterr().err


def test_settings_may_be_fractions() -> None:
    steps = plan(_order(["--set", "epsilons=[0, 1/255]", "--set", "Epsilon=2/255", "--set", "trainable=2"]))
    assert steps[-1][1]["epsilons"] == [0, 1 / 255] and steps[-1][1]["Epsilon"] == 2 / 255
    steps = plan(_order(["--models", "resnet", "--skip-results", "--set-atk", "Alpha=0.5/255"]))
    assert steps[-1][1]["Alpha"] == 0.5 / 255


def test_paths_among_the_settings_are_from_where_the_command_is_given(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "encoder.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for given, passed in (("encoder.safetensors", str(tmp_path / "encoder.safetensors")), ("scratch", "scratch")):
        steps = plan(_order(["--models", "dino_v2", "--skip-results", "--set", f"weights={given}"]))
        assert steps[1][1]["weights"] == passed


def test_settings_of_the_hardening_notebooks_leave_the_others_alone() -> None:
    steps = plan(_order(["--set", "num_epochs=20", "--set-atk", "num_epochs=5"]))
    epochs = {path.stem: values["num_epochs"] for path, values in steps}
    assert epochs["resnet_model"] == 20 and epochs["resnet_model_atk"] == 5


def test_data_and_folders_are_checked_before_anything_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(notebook_plan, "DATASET_VARIABLES", tmp_path)
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
    assert main(["--jobs", "0"]) == 1 and "at least 1" in capsys.readouterr().err
    assert "prepare_dataset" not in {path.stem for path, _ in plan(_order(["--profile", "full"]))}


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


@pytest.mark.parametrize("path", [*COMMITTED, *PUBLISHED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_notebooks_are_light_and_name_nobodys_folders(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and path.stat().st_size < 1_000_000 and "widgets" not in notebook.metadata
    assert not any(output.output_type == "error" for output in outputs)
    said = " ".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    said += " ".join(cell.source for cell in notebook.cells)
    assert not re.search(r"(?<![\w.])/(?:root|home|Users|tmp|work|content)/", said)


def test_paths_of_a_run_inside_the_repository_hold_in_every_clone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "clone")
    notebook = tmp_path / "a.ipynb"
    cell = nbformat.v4.new_code_cell("out_dir = data_dir = weights = ''", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebook)
    values = {"out_dir": f"{tmp_path}/clone/runs/a", "data_dir": f"{tmp_path}/clone", "weights": f"{tmp_path}/clone2/b"}
    execute(notebook, values, tmp_path / "clone" / "runs" / "a" / "notebooks" / "a.ipynb")
    execute(notebook, values, tmp_path / "elsewhere" / "a.ipynb")
    inside, outside = sorted(tmp_path.rglob("*/a.ipynb"))
    told = nbformat.read(inside, as_version=4).cells[1].source
    assert told.splitlines()[1:] == [
        "out_dir = '../../../runs/a'",
        "data_dir = '../../..'",
        f"weights = '{tmp_path}/clone2/b'",
    ]
    assert (inside.parent / "../../../runs/a").resolve() == tmp_path / "clone" / "runs" / "a"
    assert f"data_dir = '{tmp_path}/clone'" in nbformat.read(outside, as_version=4).cells[1].source


def test_the_bar_of_a_long_cell_shows_outside(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(reproduce, "BAR_EVERY", 0.0)
    source = "import time\nfrom tqdm.auto import tqdm\nbar = tqdm(range(40), unit='pass')\nfor turn in bar:\n"
    source += "    bar.set_postfix(robust=f'{turn}%')\n    time.sleep(0.02)"
    execute(_notebook(tmp_path, "a", source), {}, tmp_path / "out" / "a.ipynb")
    lines = capsys.readouterr().err.splitlines()
    assert any(re.search(r"cell(/s)?, +\d+/40 \[00:0\d<.*pass/s, robust=\d+%\]", line) for line in lines), lines
    assert "2/2" in lines[-1] and "robust" not in lines[-1]


def test_tidy_keeps_the_colours_of_thin_lines() -> None:
    figure, ax = plt.subplots(figsize=(8.4, 4.4))
    x = np.linspace(0, 8, 50)
    for place, colour in enumerate(COLOURS):  # bands that overlap make hundreds of mixtures
        ax.plot(x, place + np.sin(x), color=colour, lw=1)
        for width in (1, 2, 3):
            ax.fill_between(x, place - width + np.sin(x), place + width + np.cos(x), color=colour, alpha=0.1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    whole = np.asarray(Image.open(file).convert("RGB")).astype(int)
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    output = nbformat.v4.new_output("display_data", data)
    tidy(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])]))
    lighter = np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")).astype(int)
    assert np.abs(lighter - whole).max() < 32
    assert len(output.data["image/png"]) < len(data["image/png"])


def test_tidy_lightens_figures() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    bars = np.repeat(np.arange(900, dtype=np.uint8)[None, :, None] // 100 * 20, 600, 0).repeat(3, 2)
    outputs = []
    for pixels in (noise, bars):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"}
        outputs.append(nbformat.v4.new_output("display_data", data))
    tidy(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)]))
    heavy, light = (output.data for output in outputs)
    assert list(heavy) == ["image/jpeg", "text/plain"] and list(light) == ["image/png", "text/plain"]
    assert Image.open(io.BytesIO(base64.b64decode(heavy["image/jpeg"]))).size == (720, 480)
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(light["image/png"]))).convert("RGB"))
    assert np.array_equal(again, bars) and len(light["image/png"]) < 4000


def _notebook(folder: Path, name: str, source: str) -> Path:
    parameters = nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)]), path)
    return path


def test_notebooks_run_beside_each_other_and_after_what_they_need(tmp_path: Path, monkeypatch) -> None:
    note = "import os, time\nwith open('order', 'a') as f: f.write('{0} ')\n"
    sources = {
        "a_model": note.format("a") + "time.sleep(2)\nopen('a_done', 'w').close()",
        "b_model": note.format("b") + "assert os.environ['OMP_NUM_THREADS']\ntime.sleep(2)",
        "a_model_atk": note.format("a_atk") + "assert os.path.exists('a_done')",
        "results": note.format("results"),
    }
    paths = {name: _notebook(tmp_path, name, source) for name, source in sources.items()}
    monkeypatch.setattr(reproduce, "RESULTS", paths["results"])
    run([(path, {}) for path in paths.values()], out=tmp_path / "out", jobs=2)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order[:2]) == ["a", "b"] and order[2:] == ["a_atk", "results"]
    assert len(list((tmp_path / "out" / "notebooks").glob("*.ipynb"))) == 4


def test_results_share_the_cores_with_the_atlas_and_have_them_alone_without(tmp_path: Path, monkeypatch) -> None:
    given: dict[str, int | None] = {}
    monkeypatch.setattr(reproduce, "execute", lambda path, *_, threads: given.update({path.stem: threads}))
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 2)
    steps = [(path, {}) for path, _ in plan(Order().filled())]
    run(steps, out=tmp_path, jobs=2)
    assert given["results"] == given["attack_atlas"] == given["resnet_model_atk"] == 1
    assert given["prepare_dataset"] is None
    run([step for step in steps if step[0] != reproduce.ATLAS], out=tmp_path, jobs=2)
    assert given["results"] is None


def test_notebooks_and_commands_take_as_many_slices_of_each_patient() -> None:
    for path in itertools.chain.from_iterable(notebook_plan.model_notebooks().values()):
        assert parameters_of(nbformat.read(path, as_version=4))["slices_per_patient"] == SLICES_PER_PATIENT, path


def test_no_notebook_has_its_turn_before_one_that_it_needs() -> None:
    paths = [path for path, _ in plan(Order().filled())]
    paths += [ROOT / "models" / f"own_model{suffix}.ipynb" for suffix in ("_atk", "")]
    turns = sorted(paths, key=reproduce._turn)
    assert {path.stem for path in paths} >= set(reproduce.TURNS) and turns[-1] == reproduce.RESULTS
    for place, path in enumerate(turns):
        assert not [later.stem for later in turns[place:] if reproduce._needs(path, later)]


def test_a_failure_stops_what_runs_beside_it_and_what_needs_it(tmp_path: Path) -> None:
    slow = _notebook(tmp_path, "a_model", "import time\ntime.sleep(60)")
    broken = _notebook(tmp_path, "b_model", "1 / 0")
    after = _notebook(tmp_path, "b_model_atk", "open('ran', 'w').close()")
    begun = time.perf_counter()
    with pytest.raises(RuntimeError, match="b_model.ipynb stopped.*division"):
        run([(path, {}) for path in (slow, broken, after)], out=tmp_path / "out", jobs=2)
    assert time.perf_counter() - begun < 45 and not (tmp_path / "ran").exists()


SMALL = {"image_size": 32, "num_epochs": 1, "max_test_images": 12, "num_iter": 2, "train_steps": 1}
SMALL |= {"weights": "scratch", "panel_images": 2, "panel_queries": 10, "vote_images": 2}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight notebooks, as the README's first command runs them, only smaller."""
    folder = tmp_path_factory.mktemp("quick")
    settings = [text for name, value in SMALL.items() for text in ("--set", f"{name}={value}")]
    # the models' checks show how checks are made and drawn; those of the vote take as long as all the rest
    settings += ["--set", "validation_images=8", "--set", "panel_images=0", "--set-atk", "panel_images=2"]
    assert main(["--profile", "quick", "--out", str(folder), *settings]) == 0
    return folder


def test_quick_run_makes_every_figure_and_record(quick: Path) -> None:
    for title in (*CLEAN, *HARDENED, "Ensemble"):
        made = {path.stem for path in (quick / "assets" / title).glob("*.png")}
        assert made - {"optuna_history", "optuna_importance"} == _figures_of(title), title
        record = json.loads((quick / "checkpoints" / title / "record.json").read_text())
        assert record["note"] == "quick run: these numbers mean nothing; phantom demo, no medical meaning"
        assert record["test"]["image"]["n"] == 12 and set(record["robustness"]) == {"FGSM", "PGD-2"}
        clean = record["robustness"]["FGSM"]["robust_accuracy"][0]
        assert clean == pytest.approx(record["test"]["image"]["accuracy"])
        panel = record["worst_case"]["panel"]
        assert (panel is None) == (title == "Ensemble")
        assert panel is None or panel["verdict"].startswith("gradient checks ")
    assert {path.stem for path in (quick / "assets" / "Robustness").glob("*.png")} == {"worst_case_all", "attacks"}
    assert {path.stem for path in (quick / "assets" / "Dataset").glob("*.png")} == {
        "contact_sheet",
        "embedding",
        "leak_audit",
    }
    assert (quick / "assets" / "DINOv2" / "optuna_history.png").is_file()
    atlas = {path.stem for path in (quick / "assets" / "Atlas").glob("*.png")}
    assert atlas == {*atlas_figures.FIGURES, "corruptions"}
    # predict.ipynb asks about a scan of one's own, and is no part of a reproduction
    run = {path.stem for path in COMMITTED} - {"predict"}
    assert {path.stem for path in (quick / "notebooks").glob("*.ipynb")} == run
    for path in sorted((quick / "notebooks").glob("*.ipynb")):
        assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_the_vote_is_over_the_hardened_models_by_every_rule(quick: Path) -> None:
    vote = json.loads((quick / "checkpoints" / "Ensemble" / "record.json").read_text())["vote"]
    assert vote["members"] == list(HARDENED) and set(vote["rules"]) == {"soft", "hard", "weighted"}
    assert sum(vote["weights"]["weighted"]) == pytest.approx(1)


def test_figures_are_drawn_again_from_records(quick: Path, capsys) -> None:
    before = {path: plt.imread(path) for path in sorted((quick / "assets").glob("*/*.png"))}
    kept = ("contact_sheet", "leak_audit")  # drawn from the images themselves
    before = {path: pixels for path, pixels in before.items() if path.stem not in kept}
    for path in before:
        path.unlink()
    assert figures_command.main(["--root", str(quick), "--data", str(quick / "data")]) == 0
    assert {line for line in capsys.readouterr().out.splitlines() if line} == {str(path) for path in before}
    for path, pixels in before.items():
        # pictures come from a forward pass, which rounds otherwise with another number of threads
        drawn_by_model = path.stem == "grad_cam" or path.stem.startswith("adversarial_examples")
        assert np.abs(plt.imread(path) - pixels).mean() <= (0.02 if drawn_by_model else 0), path
    (quick / "assets" / "ResNet34" / "loss_curve.png").unlink()
    assert figures_command.main(["--root", str(quick), "--models", "ResNet34"]) == 0
    assert (quick / "assets" / "ResNet34" / "loss_curve.png").is_file()


def test_hero_figure_comes_with_its_record(quick: Path, capsys) -> None:
    arguments = ["--root", str(quick), "--hero", "ResNet34"]
    assert figures_command.main(arguments) == 1 and "--data" in capsys.readouterr().err
    arguments += ["--data", str(quick / "data"), "--eps", "16/255"]
    found = figures_command.main(arguments)
    if found:  # a model that is right nowhere cannot be turned
        assert "turns no right diagnosis" in capsys.readouterr().err
        return
    record = json.loads((quick / "assets" / "hero.json").read_text())
    before, after = record["probabilities"]
    assert np.argmax(before) == record["label"] != np.argmax(after) and (quick / "assets" / "hero.png").is_file()
    assert {np.argmax(chances) for chances in record["hardened"]["probabilities"]} == {record["label"]}


def test_a_radius_in_grey_levels_is_refused(capsys) -> None:
    assert figures_command.main(["--hero", "ResNet34", "--data", "x", "--eps", "2"]) == 2
    assert "k/255" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared_data(phantoms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=folder)
    return folder


def _run_cells(name: str, values: dict, until: str = "") -> dict:
    """Execute a notebook's own cells here, up to a heading; much faster than a kernel for each case."""
    notebook = inject(nbformat.read(ROOT / "models" / f"{name}.ipynb", as_version=4), SMALL | values)
    space: dict = {"display": lambda *_: None}
    with pytest.MonkeyPatch.context() as patch:
        # half of the time would go into pixels of figures that nobody looks at
        patch.setitem(style._STYLE, "savefig.dpi", 40)
        for cell in notebook.cells:
            if until and cell.cell_type == "markdown" and cell.source.startswith(until):
                break
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name} {cell.id}", "exec"), space)
    return space


@pytest.fixture(scope="module")
def trained(prepared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A clean and a hardened EfficientNet, and hyperparameters of a search of each."""
    root = tmp_path_factory.mktemp("trained")
    values = {"out_dir": str(root), "data_dir": str(prepared_data), "profile": "quick", "validation_images": 8}
    values |= {"epsilons": [0, 2 / 255], "alphas": [0.002]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _run_cells("efficientnet_model", values, until="## Grad-CAM")
        _run_cells("efficientnet_model_atk", values, until="## Grad-CAM")
    found = {"params": {"learning_rate": 0.00123, "optimizer": "sgd"}}
    write_json(root / "checkpoints" / "optuna_params" / "EfficientNetB0.json", found)
    return root, values


FLAGS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("hyperparams, params, further", FLAGS)
@pytest.mark.parametrize("suffix", ["", "_atk"])
def test_every_combination_of_the_load_flags(
    suffix: str,
    hyperparams: bool,
    params: bool,
    further: bool,
    trained: tuple[Path, dict],
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    root, values = trained
    monkeypatch.chdir(ROOT)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / f"EfficientNetB0{suffix}"
    before = (folder / "weights.safetensors").read_bytes()
    flags = {
        "load_existing_hyperparams": hyperparams,
        "load_existing_params": params,
        "train_loaded_model": further,
        "out_dir": str(tmp_path),
        "seed": 5,
        "panel_images": 0,  # gradient checks have nothing to do with what is loaded
    }
    end = "## Before and after" if suffix else "## Evaluate"
    space = _run_cells(f"efficientnet_model{suffix}", values | flags, until=end)
    assert (space["config"].learning_rate == 0.00123) == hyperparams and (
        space["config"].optimizer == "sgd"
    ) == hyperparams
    trained_now = not params or further
    assert ("loaded; trained 20" in capsys.readouterr().out) == (not trained_now)
    assert ((folder / "weights.safetensors").read_bytes() != before) == trained_now
    training = json.loads((folder / "record.json").read_text())["training"]
    assert training["config"]["seed"] == (5 if trained_now else 0)
    if trained_now:
        own, clean = f"checkpoints/EfficientNetB0{suffix}", "checkpoints/EfficientNetB0" if suffix else "scratch"
        assert training["start"] == (own if params else clean)


def _curves(record: str) -> list[dict]:
    return list(json.loads(record)["robustness"].values())


def test_attacks_in_the_notebooks_go_on_from_finished_batches(
    trained: tuple[Path, dict], tmp_path: Path, monkeypatch
) -> None:
    root, values = trained
    monkeypatch.chdir(ROOT)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "checkpoints" / "EfficientNetB0" / "record.json"
    before = record.read_text()
    attacked = []
    real = Attacker.attack
    monkeypatch.setattr(Attacker, "attack", lambda *args: attacked.append(args) or real(*args))
    run = partial(_run_cells, "efficientnet_model_atk", until="## The number")
    run(values | {"out_dir": str(tmp_path)})
    fates = [[curve["first_broken"] for curve in _curves(text)] for text in (before, record.read_text())]
    assert not attacked and fates[0] == fates[1]
    run(values | {"out_dir": str(tmp_path), "seed": 1})
    assert attacked  # what another seed draws is not in the cache


def test_a_search_in_the_notebooks_is_used_and_kept(trained: tuple[Path, dict], tmp_path: Path, monkeypatch) -> None:
    root, values = trained
    monkeypatch.chdir(ROOT)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    search = {"n_trials": 2, "search_epochs": 1, "search_space": ["learning_rate"], "out_dir": str(tmp_path)}
    for suffix, end in (("", "## Train"), ("_atk", "## Before and after")):
        space = _run_cells(f"efficientnet_model{suffix}", values | search, until=end)
        path = tmp_path / "checkpoints" / "optuna_params" / f"EfficientNetB0{suffix}.json"
        found = json.loads(path.read_text())
        assert space["config"].learning_rate == found["params"]["learning_rate"]
        assert found["objective"]["name"] == ("adversarial" if suffix else "standard")
        assert (tmp_path / "assets" / f"EfficientNetB0{suffix}" / "optuna_history.png").is_file()


def test_a_copied_notebook_serves_a_backbone_of_ones_own(prepared_data: Path, tmp_path: Path, monkeypatch) -> None:
    def make(num_classes: int, image_size: int) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        net.add_module("out", nn.Linear(128, num_classes))
        return net

    mine = Backbone("Mine", make, "out", lambda net: [net[0]], lambda net: [net[0]], dict)
    monkeypatch.setitem(def_models.BACKBONES, "mine", mine)
    monkeypatch.chdir(ROOT)
    values = {"BACKBONE": "mine", "out_dir": str(tmp_path), "data_dir": str(prepared_data), "profile": "quick"}
    values |= {"epsilons": [0, 2 / 255], "alphas": [0.002], "validation_images": 8}
    _run_cells("resnet_model", values)
    _run_cells("resnet_model_atk", values)
    for title in ("Mine", "Mine_atk"):
        assert {path.stem for path in (tmp_path / "assets" / title).glob("*.png")} == _figures_of(title)
    _run_cells("results", values | {"models": ["Mine_atk"]})
    assert {path.stem for path in (tmp_path / "assets" / "Ensemble").glob("*.png")} == _figures_of("Ensemble")
    vote = json.loads((tmp_path / "checkpoints" / "Ensemble" / "record.json").read_text())["worst_case"]
    assert vote["panel"]["verdict"].startswith("gradient checks ")


def test_missing_data_and_models_say_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="python -m utils prepare"):
        _run_cells("resnet_model", {"out_dir": str(tmp_path), "profile": "quick"})


def _notebook_of(*cells: str) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    return notebook


def test_a_notebook_written_over_itself_keeps_the_values_that_it_ran_with(tmp_path: Path) -> None:
    path = tmp_path / "own.ipynb"
    nbformat.write(_notebook_of("Epsilon = 8 / 255\nsize = 3", "print(Epsilon, size)"), path)
    for size in (5, 7):
        execute(path, {"size": size, "Epsilon": 2 / 255, "foreign": 1}, path)
        stored = nbformat.read(path, as_version=4)
        injected = [cell for cell in stored.cells if "injected-parameters" in cell.metadata.get("tags", [])]
        assert len(injected) == 1 and injected[0].source.splitlines()[1:] == [f"size = {size}", "Epsilon = 2 / 255"]
        assert stored.cells[2].outputs[0].text == f"{2 / 255} {size}\n"


def test_kernels_open_no_port_and_show_the_projects_own_warnings_alone(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "own.ipynb"
    foreign = "exec(compile('import warnings; warnings.warn(1)', 'x.py', 'exec'), {'__name__': 'library.part'})"
    cells = [
        "size = 1",
        "import json, ipykernel",
        "print(json.load(open(ipykernel.get_connection_file()))['transport'])",
        "from utils.core.radii import warn_if_negligible",
        "warn_if_negligible([1e-6])",
        "warn_if_negligible([1e-6])",
        foreign,
    ]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbformat.write(_notebook_of(*cells), path)
    execute(path, {}, path)
    said = [output.text for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert said[0].strip() == ("tcp" if sys.platform == "win32" else "ipc")
    assert len(said) == 3 and all("too small to change an answer" in text for text in said[1:])


def _shown(path: Path) -> dict:
    """What the cells at the top of a notebook set."""
    values: dict = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, {}, values)
    return values


@pytest.mark.parametrize("path", MODEL_NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_committed_notebook_shows_is_what_ran(path: Path) -> None:
    shown = _shown(path)
    title = def_models.BACKBONES[shown["BACKBONE"]].title + ("_atk" if path.stem.endswith("_atk") else "")
    record = json.loads((ROOT / "checkpoints" / title / "record.json").read_text(encoding="utf-8"))
    training = record["training"]
    config = {"slices_per_patient": 0, "keep": "best"} | training["config"]  # what older records do not tell
    assert shown["load_existing_params"] and len(training["history"]) == shown["num_epochs"] == config["num_epochs"]
    assert record["test"]["image"]["n"] == shown["max_test_images"]
    for name in ("batch_size", "seed", "sampling", "patience", "slices_per_patient", "label_smoothing", "keep"):
        assert config[name] == shown[name], name
    if title.endswith("_atk"):
        objective = training["objective"]
        assert objective["eps"] == shown["Epsilon"] and objective["steps"] == shown["train_steps"]
        assert objective["name"] == shown["recipe"] and objective["adv_weight"] == shown["adv_weight"]
        assert config["learning_rate"] == shown["learning_rate"]
        assert config["validation_images"] == shown["validation_images"]
        assert all(own["epsilons"] == shown["epsilons"] for own in record["robustness"].values())
        assert f"PGD-{shown['num_iter']}" in record["robustness"]
    else:
        assert record["model"]["image_size"] == shown["image_size"] and training["start"] == shown["weights"]
        study = json.loads((ROOT / "checkpoints" / "optuna_params" / f"{title}.json").read_text(encoding="utf-8"))
        assert sum(study["trials"].values()) == shown["n_trials"] and set(study["space"]) == set(shown["search_space"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["--set-atk", "batch_size=1"], "batch_size must be a whole number of at least 2"),
        (["--set-atk", "train_steps=0"], "steps must be a whole number of at least 1"),
        (["--set-atk", "Epsilon=0"], "above 0"),
        (["--set-atk", "adv_weight=2"], "adv_weight must be a number above 0 and at most 1"),
        (["--set", "mixup=2"], "mixup must be a number at least 0 and at most 1"),
        (["--set", "num_epochs=True"], "num_epochs"),
        (["--set", "num_epochs=1.5"], "num_epochs"),
        (["--set", "learning_rate=abc"], "learning_rate"),
        (["--set", "max_test_images=-3"], "max_test_images must be a whole number of at least 0"),
        (["--set-atk", "panel_images=-1"], "panel_images must be a whole number of at least 0"),
        (["--set", "image_size=8"], "image_size must be a whole number of at least 32"),
        (["--set", "seed=-1"], "seed must be a whole number of at least 0"),
        (["--set", "scanner=1.5"], "scanner, one of the probabilities, must be a number at least 0 and at most 1"),
        (["--set", "learning_rate=1/0"], "divides by zero"),
    ],
)
def test_settings_are_checked_before_the_first_notebook_runs(
    settings: list[str], named: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(reproduce_command, "run", lambda *_, **__: pytest.fail("a notebook was started"))
    assert main(["--profile", "quick", *settings]) == 1
    said = capsys.readouterr().err
    assert named in said and said.startswith("error: ") and len(said.splitlines()) == 1
