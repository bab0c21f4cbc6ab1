"""Every command that the README gives is executed here, with PATH put in and sizes made small."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, left_out
from PIL import Image

from models.def_models import build_model
from models.templates import build
from utils import utils_funcs
from utils.attacks.attack import Attack
from utils.attacks.suites import SUITES, Threat
from utils.commands import (
    atlas,
    calibrate,
    combine,
    figures,
    folds,
    pages,
    predict,
    prepare,
    recipes,
    reproduce,
    robustness,
    search,
    spot_check,
    train,
)
from utils.core.parts import read_part
from utils.core.paths import read_json
from utils.core.precision import emulates_bf16
from utils.core.radii import parse_radius
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.sets import load_splits
from utils.data.workspace import Workspace
from utils.evaluation.examples import adversarial_examples
from utils.evaluation.gate import Gate
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.atlas.chapters import CHAPTERS
from utils.experiments.folds import read_fold
from utils.reporting.atlas import atlas_splits
from utils.reporting.page_text import read_page
from utils.reporting.pages import suites_table, trained
from utils.training.checkpoints import save_checkpoint
from utils.training.record import Record, parse_record

#: Folders with a page of their own.
ROOMS = ("models", "utils", "benchmarks", "dataset")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "assets/RESULTS.md", "assets/ATLAS.md", *(f"{room}/README.md" for room in ROOMS))
}
README = PAGES["README.md"]
# a fence's opening is taken with its language, or its closing one would pass for the next opening
FENCES = [fence for page in PAGES.values() for fence in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)]
COMMANDS = sorted({line for language, block in FENCES if not language for line in block.splitlines()})
ONE_LINE = "python3 -m venv .venv && .venv/bin/pip install -q -r env/requirements.txt && .venv/bin/"
SMALL = ["image_size=32", "num_epochs=1", "max_test_images=8", "num_iter=2", "epsilons=[0, 2/255]", "alphas=[0.002]"]
SMALL += ["panel_images=0", "vote_images=2", "vote_suite=smoke", "attacked_rules=[]"]
FULL = "python -m utils reproduce --profile full --data PATH"


def _arguments(command: str, source: str = "phantom") -> list[str]:
    words = shlex.split(command.replace("PATH", source))
    return words[4:] if words[2] == "utils" else words[3:]


def _shell(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def _phantom_data(folder: Path) -> Path:
    """Prepared phantoms, made once beside the folders of all commands, which only read them."""
    made = folder.parent / "phantom_data"
    if not made.is_dir():
        assert prepare.main(["--source", "phantom", "--out", str(made)]) == 0
    return made


def _install(folder: Path) -> None:
    _shell(sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv"))
    if shutil.which("pip"):
        # everything is installed here, so this asks no network; .ci/run installs for real
        _shell(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "-r", "env/requirements.txt")


def _quick(folder: Path) -> None:
    """The command's own plan; tests/integration/test_notebooks.py runs it whole, at smaller sizes."""
    steps = reproduce.plan(reproduce.main.parse(["--profile", "quick"])["order"].filled())
    assert len(steps) == 9 and steps[0][1]["source"] == "phantom"


def _all_tests(folder: Path) -> None:
    """It is what runs now. .ci/run takes its last part from the README by a pattern of its own."""
    pattern = re.search(r"grep -- '(.+)' README\.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))[1]
    assert re.findall(f"^.*{pattern}", README, re.M) == [f"{ONE_LINE}python -m pytest"]


def _conda(folder: Path) -> None:
    if not shutil.which("conda"):
        pytest.skip("conda is not on this machine; tests/artefacts/test_environment.py reads env/project_env.yaml")
    _shell("conda", "env", "create", "--dry-run", "-f", "env/project_env.yaml")


def _uv(folder: Path) -> None:
    if not shutil.which("uv"):
        pytest.skip("uv is not on this machine")
    _shell("uv", "--version")
    _shell(sys.executable, "-m", "utils", "reproduce", "--help")


def _prepare(command: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        arguments = [str(folder / "audit") if word == "assets/Dataset" else word for word in _arguments(command)]
        assert prepare.main([*arguments, "--out", str(folder / "data")]) == 0
        assert (folder / "data" / "manifest.csv").is_file()
        assert (folder / "audit" / "leak_audit.png").is_file() == ("--audit" in command)

    return run


def _pictures(folder: Path) -> Path:
    """A folder of pictures as somebody would have it: classes as folders, patients in the names."""
    raw = make_phantoms(PhantomConfig(n_subjects=16, n_levels=4))
    for pixels, path in zip(raw.pixels, raw.paths, strict=True):
        target = (folder / path).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((48, 48)).save(target)
    return folder


def _full(folder: Path) -> None:
    """Drawn pictures stand for the images; one model stands for three, of which each quick run makes all."""
    small = [
        text for pair in (*SMALL, "weights=scratch", "train_steps=1", "validation_images=8") for text in ("--set", pair)
    ]
    words, out = _arguments(FULL, str(_pictures(folder / "pictures"))), folder / "out"
    arguments = [*words, "--models", "efficientnet", "--out", str(out), *small]
    assert reproduce.main(arguments) == 0
    assert (out / "assets" / "Ensemble" / "confusion_matrix.png").is_file()
    assert figures.main(["--root", str(out), "--data", str(out / "data"), "--models", "EfficientNetB0"]) == 0
    for kind, rows in (("headline", 3 + 4), ("trained", 2), ("worst_case", 3), ("sweeps", 3 * 2)):
        block = f"<!-- table {kind} checkpoints/*/record.json -->\n<!-- end -->"
        assert pages.rebuilt(block, out).count("\n| ") == rows + 2


def _train_one(command: str, clean_epochs: int, atk_epochs: int) -> Callable[[Path], None]:
    """The command's own plan; what it runs is what _full runs, longer."""

    def run(folder: Path) -> None:
        steps = reproduce.plan(reproduce.main.parse(_arguments(command))["order"].filled())
        epochs = {path.stem: values.get("num_epochs") for path, values in steps}
        assert epochs["resnet_model"] == clean_epochs and epochs["resnet_model_atk"] == atk_epochs

    return run


def _results(command: str) -> Callable[[Path], None]:
    """The command's own plan, on phantoms: what it runs is what _full runs, longer."""

    def run(folder: Path) -> None:
        made = str(_phantom_data(folder))
        prepared = command.replace("runs/published", made)
        data = [] if "--data" in command else ["--data", made]
        steps = reproduce.plan(reproduce.main.parse([*_arguments(prepared), *data])["order"].filled())
        assert all(path.is_file() and values["profile"] == "full" for path, values in steps) and steps

    return run


def _search(command: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        arguments = command.replace("runs/", f"{folder}/").replace(
            "--n-trials 20 --num-epochs 3", "--n-trials 1 --num-epochs 1"
        )
        options = ["--data", str(_phantom_data(folder)), "--out", str(folder / "found.json"), "--image-size", "32"]
        assert search.main([*arguments.split()[4:], *options]) == 0
        assert (folder / "found.json").is_file() and (folder / "resnet34.log").is_file()

    return run


def _search_hardening(folder: Path) -> None:
    """Random weights stand for a trained model."""
    splits = load_splits(_phantom_data(folder))
    model = build_model("resnet34", image_size=32)
    save_checkpoint(model, {"classes": splits.classes, "data": splits.info}, folder / "ResNet34")
    arguments = HARDEN.replace("checkpoints/ResNet34", str(folder / "ResNet34"))
    arguments = arguments.replace("--n-trials 20", "--n-trials 1 --num-epochs 1 --space learning_rate beta")
    options = ["--data", str(_phantom_data(folder)), "--out", str(folder / "found.json")]
    assert search.main([*arguments.split()[4:], *options]) == 0
    found = read_json(folder / "found.json")
    assert found["objective"]["name"] == "trades" and found["clean_floor"] == 0.45 and "beta" in found["params"]


def _without(words: list[str], *options: str) -> list[str]:
    """Words of a command without some options and their values."""
    kept, dropping = [], False
    for word in words:
        dropping = word in options or (dropping and not word.startswith("--"))
        kept += [] if dropping else [word]
    return kept


def _compare(command: str) -> Callable[[Path], None]:
    """The runs that it made tell the same; the first such command is also run, smaller."""

    def run(folder: Path) -> None:
        asked = recipes.main.parse(_arguments(command))
        for variant, seed in itertools.product(("clean", *asked["variants"]), asked["seeds"]):
            told = read_json(ROOT / asked["out"] / f"{variant}_seed{seed}.json")
            wanted = asdict(asked["budget"])
            same = told["budget"].keys() - ({"weights"} if "--weights PATH" in command else set())
            assert told["model"]["backbone"] == asked["backbone"] and told["seed"] == seed
            assert {name: told["budget"][name] for name in same} == {name: wanted[name] for name in same}
        if command == COMPARES[0]:
            _compare_small(command, folder)

    return run


def _compare_small(command: str, folder: Path) -> None:
    """The command's words, and then what makes it small: of two the last counts, and the shortest suite scores it."""
    few = make_phantoms(PhantomConfig(n_subjects=16, n_levels=4))
    split_and_save(few, group_by_subject(few), out=folder / "data")
    words = _without(_arguments(command), "--variants", "--seeds")
    small = ["--variants", "n_fgsm", "--seeds", "0", "--epochs", "1", "--clean-epochs", "1", "--max-images", "4"]
    small += ["--weights", "scratch", "--image-size", "42", "--train-steps", "1", "--validation-images", "8"]
    small += ["--data", str(folder / "data"), "--work", str(folder / "work")]
    small += ["--precision", "fp32"] if emulates_bf16("cpu") else []
    small += ["--suite", "smoke"]
    assert recipes.main([*words, *small, "--out", str(folder / "recipes")]) == 0
    assert (folder / "recipes" / "summary.json").is_file()


def _launch(command: str) -> Callable[[Path], None]:
    """Both parsers take it; tests/integration/test_processes.py starts several processes for real."""

    def run(folder: Path) -> None:
        launched = launch_command_parser().parse_args(command.split()[2:])
        verb, *arguments = launched.training_script_args
        module = {"train": train, "robustness": robustness}[verb]
        assert launched.training_script == "utils" and launched.multi_gpu and launched.module
        assert module.main.parse(arguments)

    return run


def _folds(command: str) -> Callable[[Path], None]:
    """Its parser takes it; tests/integration/test_cross_validate.py runs it, smaller."""

    def run(folder: Path) -> None:
        parsed = folds.main.parse(_arguments(command))
        assert (ROOT / parsed["out"] / "summary.json").is_file() and parsed["budget"].epochs > 0

    return run


def _combine(command: str) -> Callable[[Path], None]:
    """Its parser takes it, and folds that it made tell the same; test_by_patient.py runs it, smaller."""

    def run(folder: Path) -> None:
        asked = combine.main.parse(_arguments(command))
        made = sorted((ROOT / asked["out"]).glob("fold*.json")) if "benchmarks" in asked["out"].parts else []
        assert len(made) in (0, asked["n_folds"])
        for path in made:
            told = read_fold(path).specification
            assert tuple(told.pop("members")) == asked["members"]
            assert told == {name: asked[name] for name in told}

    return run


def _benchmark(command: str) -> Callable[[Path], None]:
    """Its parser takes it; tests/integration/test_benchmarks.py runs it, smaller."""

    def run(folder: Path) -> None:
        module = importlib.import_module(command.split()[2])
        assert module._parse(_arguments(command)).out == ROOT / "benchmarks"

    return run


def _slurm(folder: Path) -> None:
    """tests/integration/test_processes.py runs it with stand-ins for Slurm's commands."""
    _shell("bash", "-n", "env/train.slurm")
    assert train.main.parse(SLURM.split()[2:])["backbone"] == "resnet34"


def _figures(command: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        """Without trained models the command says so; tests/integration/test_notebooks.py draws with them."""
        arguments = [word.replace("dataset/dataset_variables", str(folder)) for word in _arguments(command)]
        assert figures.main([*arguments, "--root", str(folder)]) == 1

    return run


def _robustness(folder: Path) -> None:
    """Without a trained model the command says so; tests/integration/test_robustness_command.py runs it with one."""
    shutil.copytree(_phantom_data(folder), folder / "data")
    assert robustness.main([*_arguments(ROBUSTNESS), "--root", str(folder)]) == 1


def _measured(command: str) -> Callable[[Path], None]:
    """The record that it made lies in the repository; tests/integration/test_robustness_command.py runs it, smaller."""

    def run(folder: Path) -> None:
        parsed = robustness.main.parse(_arguments(command))
        suite = parsed["suite"]
        folder = Path("checkpoints") / parsed["model"]
        target = parsed["out"] or robustness.record_path(folder, suite, Threat(), parsed["max_images"])
        curve = read_json(ROOT / target)["curve"]
        assert curve["epsilons"] == [0.0, *(parse_radius(text) for text in parsed["epsilons"])]
        assert [own["title"] for own in curve["attacks"]] == [attack.title for attack in SUITES[suite]]

    return run


def _spot_check(folder: Path) -> None:
    """Other data are refused; tests/artefacts/test_real_images.py runs it on the data of the records."""
    data = ["--data", str(_phantom_data(folder))]
    assert spot_check.main(data) == 1


def _calibrate(folder: Path) -> None:
    """Other data are refused; tests/integration/test_predict.py runs it on its own."""
    assert calibrate.main(["--data", str(_phantom_data(folder))]) == 1


def _predict(folder: Path) -> None:
    """On a training slice as the gate keeps it, coarse, for the images are not here: it is answered, and called so."""
    kept = Gate.load(ROOT / "checkpoints" / "ResNet34").references[0].numpy()
    Image.fromarray(kept).resize((128, 128), Image.Resampling.BICUBIC).save(folder / "scan.png")
    words = [
        {"SCAN": str(folder / "scan.png"), "answers": str(folder / "answers")}.get(w, w) for w in _arguments(PREDICT)
    ]
    assert predict.main(words) == 0
    told = read_json(folder / "answers" / "scan_answer.json")
    assert told["verdict"] == "doubtful" and "a picture that was enlarged" in told["reason"] and told["answer"]


def _predict_colin(folder: Path) -> None:
    """The committed answer is what the committed model says."""
    head = Path(COLIN.split()[4])
    stored = read_json(ROOT / "assets" / "Predict" / "ch2_answer.json")
    assert stored["model"] == "ResNet34" and stored["files"] == [head.name]
    if not head.is_file() or importlib.util.find_spec("deepbet") is None:
        left_out("needs Debian's mricron-data and env/requirements-scans.txt")
    assert predict.main([*_arguments(COLIN)[:-1], str(folder), "--attack", "none"]) == 0
    found = read_json(folder / "ch2_answer.json")
    assert found["answer"] == stored["answer"]
    # a registration differs in its last digits from machine to machine
    for name, most in (("distance", 0.02), ("probability", 0.1), ("heat_outside", 0.1)):
        assert abs(found[name] - stored[name]) < most


def _atlas(command: str) -> Callable[[Path], None]:
    """On phantoms, two untrained models and one chapter; tests/integration/test_atlas.py measures all."""

    def run(folder: Path) -> None:
        words, data = _arguments(command), _phantom_data(folder)
        fold = int(words[words.index("--fold") + 1]) if "--fold" in words else -1
        sides = atlas_splits(Workspace.open("", data_dir=str(data)), fold=fold)
        for option in ("--model", "--hardened"):
            own = {"classes": sides.classes, "data": sides.info, "note": ""}
            save_checkpoint(build_model("resnet34", image_size=32), own, folder / option.strip("-"))
            words[words.index(option) + 1] = str(folder / option.strip("-"))
        words[words.index("--out") + 1] = str(folder / "atlas")
        if "--chapters" in words:
            first = words.index("--chapters")
            assert set(words[first + 1 : words.index("--out")]) <= set(CHAPTERS)
            del words[first : words.index("--out")]
        assert atlas.main([*words, "--data", str(data), "--quick", "--chapters", "patients"]) == 0
        assert (folder / "atlas" / "patients.png").is_file()

    return run


def _voila(folder: Path) -> None:
    """tests/integration/test_browser.py opens the page."""
    if importlib.util.find_spec("voila") is None:
        left_out("needs env/requirements-browser.txt")
    _shell(sys.executable, "-m", "voila", "--version")


def _build(folder: Path) -> None:
    before = {path: path.read_bytes() for path in build.notebooks()}
    _shell(sys.executable, "-m", "models.templates.build")
    assert {path: path.read_bytes() for path in before} == before


def _pages(folder: Path) -> None:
    before = {path: path.read_bytes() for path in pages.DOCUMENTS}
    assert pages.main([]) == 0
    assert {path: path.read_bytes() for path in before} == before


CALIBRATE = "python -m utils calibrate"
PREDICT = "python -m utils predict SCAN --out answers"
COLIN = "python -m utils predict /usr/share/mricron/templates/ch2.nii.gz --model ResNet34 --out assets/Predict"
HERO = "python -m utils figures --data dataset/dataset_variables --hero ResNet34 --eps 2/255"
REDRAW = "python -m utils figures --data dataset/dataset_variables"
ONE = f"{FULL} --models resnet --set image_size=64 --set num_epochs=20 --set-atk num_epochs=10"
ROBUSTNESS = "python -m utils robustness --model ResNet34 --suite standard"
PREPARE = "python -m utils prepare --source PATH --split patient"
PREPARE_PUBLISHED = "python -m utils prepare --source PATH --split published --out runs/published"
SEARCH = "python -m utils search --backbone resnet34 --n-trials 20 --num-epochs 3"
SEARCH += " --journal runs/resnet34.log --worker 0"
HARDEN = "python -m utils search --backbone resnet34 --start checkpoints/ResNet34 --recipe trades"
HARDEN += " --n-trials 20 --clean-floor 0.45"
SLURM = "sbatch env/train.slurm --backbone resnet34 --set num_epochs=20"
#: Read from the README itself: what matters is that whatever stands there is understood.
ATLASES = [command for command in COMMANDS if command.startswith("python -m utils atlas ")]
BENCHMARKS = [command for command in COMMANDS if command.startswith("python -m benchmarks.")]
COMPARES = [command for command in COMMANDS if command.startswith("python -m utils recipes ")]
COMBINES = [command for command in COMMANDS if command.startswith("python -m utils combine ")]
FOLDS = [command for command in COMMANDS if command.startswith("python -m utils folds ")]
RESULTS = [command for command in COMMANDS if re.match(r"python -m utils reproduce .*--(skip|only)-results", command)]
LAUNCHES = [command for command in COMMANDS if command.startswith("accelerate launch ")]
MEASURED = [command for command in COMMANDS if re.match(r"python -m utils robustness .*--max-images", command)]
RUNNERS: dict[str, Callable[[Path], None]] = {
    f"{ONE_LINE}python -m utils reproduce --profile quick": _quick,
    f"{ONE_LINE}python -m pytest": _all_tests,
    "python3 -m venv .venv": _install,
    "source .venv/bin/activate": lambda folder: None,
    "pip install -r env/requirements.txt": _install,
    "conda env create -f env/project_env.yaml": _conda,
    "conda activate project_env": _conda,
    "uv run python -m utils reproduce --profile quick": _uv,
    "python -m models.templates.build": _build,
    PREPARE: _prepare(PREPARE),
    PREPARE_PUBLISHED: _prepare(PREPARE_PUBLISHED),
    f"{PREPARE} --audit assets/Dataset": _prepare(f"{PREPARE} --audit assets/Dataset"),
    FULL: _full,
    ONE: _train_one(ONE, 20, 10),
    SEARCH: _search(SEARCH),
    HARDEN: _search_hardening,
    **{command: _results(command) for command in RESULTS},
    **{command: _compare(command) for command in COMPARES},
    **{command: _folds(command) for command in FOLDS},
    **{command: _combine(command) for command in COMBINES},
    **{command: _launch(command) for command in LAUNCHES},
    SLURM: _slurm,
    **{command: _benchmark(command) for command in BENCHMARKS},
    ROBUSTNESS: _robustness,
    **{command: _measured(command) for command in MEASURED},
    "python -m utils pages": _pages,
    "python -m utils spot-check": _spot_check,
    **{command: _atlas(command) for command in ATLASES},
    CALIBRATE: _calibrate,
    PREDICT: _predict,
    COLIN: _predict_colin,
    "voila models/predict.ipynb": _voila,
    HERO: _figures(HERO),
    REDRAW: _figures(REDRAW),
}


def test_every_command_has_a_runner_and_every_runner_a_command() -> None:
    assert set(COMMANDS) == set(RUNNERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    RUNNERS[command](tmp_path)


def test_training_table_names_each_machine_and_the_rates_of_the_blocks() -> None:
    def record(backbone: str, machine: str, decay: float) -> Record:
        config = {"learning_rate": 2e-4, "layer_decay": decay, "precision": "bf16", "seed": 0}
        training = {"objective": {"name": "standard"}, "config": config, "start": "scratch", "best_epoch": 0}
        training |= {"selected_by": "x"}
        data = {"source": "phantom", "protocol": "patient"}
        model = {"backbone": backbone, "image_size": 64, "num_classes": 4}
        environment = {"hardware": machine, "created": "2026-11-28"}
        own = {"training": training | {"history": [{}], "seconds": 60.0}, "environment": environment}
        return parse_record({"model": model, "data": data} | own, "x")

    alike = trained([record("resnet34", "CPU A", 1), record("efficientnet_b0", "CPU A", 1)])
    assert alike.endswith("; CPU A.\n") and " x " not in alike
    mixed = trained([record("dino_v2", "CPU A", 0.75), record("resnet34", "CPU B", 1)])
    assert mixed.endswith("; DINOv2: CPU A; ResNet34: CPU B.\n")
    assert "| 0.0002, x 0.75 a block |" in mixed


def test_python_of_the_readme(splits, resnet) -> None:
    epsilons, alphas = [0, 2 / 255], [0.001]
    examples = adversarial_examples(resnet, splits.test, attacks=[(Attack("fgsm"), eps) for eps in epsilons], n=2)
    first, second = next(block for language, block in FENCES if language == "python").splitlines()
    space = {"utils_funcs": utils_funcs, "epsilons": epsilons, "alphas": alphas, "examples": examples}
    assert len(eval(first, space).axes) == 4
    examples = adversarial_examples(resnet, splits.test, attacks=[(Attack(alpha=alphas[0]), 2 / 255)], n=2)
    assert len(eval(second, space | {"examples": examples}).axes) == 2


def _headings(page: str) -> set[str]:
    return {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", page, re.M)
    }


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[name]):
        path, _, heading = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if heading:
            assert heading in _headings(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_every_named_file_exists(name: str) -> None:
    for path in re.findall(
        r"`((?:models|utils|env|dataset|assets|checkpoints)/[\w/.]+\.(?:py|ipynb|txt|yaml|md))`", PAGES[name]
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    ("name", "most"),
    [("README.md", 250), ("models/README.md", 150), ("utils/README.md", 120), ("benchmarks/README.md", 150)],
)
def test_pages_keep_to_their_length(name: str, most: int) -> None:
    assert PAGES[name].count("\n") <= most


def test_numbers_in_the_readme_are_those_of_the_records() -> None:
    prose = re.sub(r"<!-- table .*?<!-- end -->", "", README, flags=re.S)
    published, patient = read_json(ROOT / "assets" / "Dataset" / "leak_audit.json")["splits"]
    said = re.search(r"scores ([\d.]+) % there, and ([\d.]+) % on patients", " ".join(prose.split()))
    assert said and [f"{100 * split['accuracy']:.1f}" for split in (published, patient)] == list(said.groups())
    said = re.search(
        r"right on ([\d.]+) % of all slices, ([\d.]+) % without attack.*? ([\d.]+) %, of ([\d.]+) %", prose
    )
    table = PAGES["assets/RESULTS.md"].partition(
        "efficientnet_imagenet_64px_standard/summary.json -->\n| model | clean |"
    )
    plain, hardened = (
        re.search(rf"\| {name} \|(.*)", table[2]).group(1).split("|") for name in ("not hardened", "hardened")
    )
    assert said and [said[1], said[3]] == [row[3].split()[0] for row in (plain, hardened)]
    before = re.findall(r"clean ([\d.]+) \[", table[2].partition("The attacked 800 without attack")[2])[:2]
    assert [said[2], said[4]] == before


def test_the_first_picture_is_of_committed_models_and_unseen_patients() -> None:
    shown = read_json(ROOT / "assets" / "hero.json")
    assert shown["data"]["protocol"] == "patient" and shown["note"] == "" and shown["rule"]
    for own in (shown, shown["hardened"]):
        folder = ROOT / "checkpoints" / own["model"]["title"]
        assert (folder / "weights.safetensors").is_file()
        record = read_json(folder / "record.json")
        assert record["data"]["fingerprint"] == shown["data"]["fingerprint"]
        assert record["training"]["best_epoch"] == own["training"]["best_epoch"]
    (before, after), hardened = shown["probabilities"], shown["hardened"]["probabilities"]
    answers = [chances.index(max(chances)) for chances in (before, after, *hardened)]
    assert answers[0] == answers[2] == answers[3] == shown["label"] != answers[1]


def test_every_table_is_what_its_record_says() -> None:
    for path in pages.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert pages.rebuilt(text) == text, path
    for page in PAGES.values():
        assert page.count("<!-- table ") == page.count("<!-- end -->")


def test_a_changed_number_would_be_noticed() -> None:
    assert pages.rebuilt(README.replace("| 99.9 % |", "| 99.8 % |", 1)) == README
    with pytest.raises(ValueError, match="no table 'nothing'"):
        pages.rebuilt("<!-- table nothing assets/Dataset/leak_audit.json -->\n<!-- end -->")
    here = "benchmarks/cross_validation/resnet34_64px/summary.json"
    with pytest.raises(ValueError, match="line 1, table by_patient .*no record benchmarks/none/"):
        pages.rebuilt(f"<!-- table by_patient {here} benchmarks/none/*.json -->\n<!-- end -->")


LEAK = "<!-- table leak assets/Dataset/leak_audit.json -->"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{LEAK}\nold\n\nA sentence.\n{LEAK}\nold\n<!-- end -->\n", "table of line 1 has no <!-- end --> before"),
        (f"{LEAK}\nold\n\nA sentence.\n", "table of line 1 has no <!-- end -->"),
        (f"A sentence.\n{LEAK.replace(' -->', '-->')}\nold\n<!-- end -->\n", "page.md, line 2: expected <!-- table"),
        ("A sentence.\n<!-- end -->\n", "page.md, line 2: '<!-- end -->' ends no table"),
        (f"{LEAK}\nold\n<!-- end-->\n", "line 3: '<!-- end-->' ends no table"),
    ],
)
def test_a_marker_without_its_other_one_changes_nothing(text: str, told: str, monkeypatch, tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(pages, "DOCUMENTS", (page,))
    monkeypatch.setattr(pages, "write_gallery", None)
    assert pages.main([]) == 1 and told in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize("content", ["{}", "[]", '{"splits": 3, "data": {}}', "{", "\xff"])
def test_a_damaged_record_is_named_with_page_and_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "leak_audit.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"page.md, line 3, table leak leak_audit.json: .*(restore it)"):
        pages.rebuilt("A\nB\n<!-- table leak leak_audit.json -->\n<!-- end -->\n", tmp_path, "page.md")


def test_a_page_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no page .*git checkout"):
        read_page(tmp_path / "page.md")
    (tmp_path / "page.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"page.md is not text in UTF-8 .* at byte 3"):
        read_page(tmp_path / "page.md")


def test_experiments_that_begin_alike_are_told_apart() -> None:
    folder = "benchmarks/cross_validation"
    alike = pages.rebuilt(f"<!-- table hardening_gains {folder}/resnet34*/summary.json -->\n<!-- end -->")
    assert "| ResNet34, 64 px, 12 + 6 epochs |" in alike
    assert "| ResNet34, 64 px, 30 + 24 epochs of 8 slices a patient |" in alike
    suites = pages.rebuilt(
        f"<!-- table hardening_gains {folder}/efficientnet_imagenet_64px*/summary.json -->\n<!-- end -->"
    )
    assert " of 8 slices a patient, suite brief |" in suites and " of 8 slices a patient, suite standard |" in suites
    two = f"{folder}/resnet34_64px/summary.json {folder}/dinov2*/summary.json"
    apart = pages.rebuilt(f"<!-- table hardening_gains {two} -->\n<!-- end -->")
    assert "| ResNet34, 64 px | " in apart and apart.index("| ResNet34") < apart.index("| DINOv2")


def test_suites_stand_beside_each_other_on_the_same_images_alone() -> None:
    folder = "checkpoints/EfficientNetB0_atk"
    pair = f"{folder}/robustness_targeted_n320.json {folder}/robustness_standard_n320.json"
    table = pages.rebuilt(f"<!-- table suites {pair} -->\n<!-- end -->")
    suites = [read_json(ROOT / path)["curve"]["robust_accuracy"] for path in pair.split()]
    cells = [f"{100 * share:.1f}" for step in (1, 2, 3) for share in (suites[0][step], suites[1][step])]
    row = f"| EfficientNetB0, hardened | {100 * suites[0][0]:.1f} | {' | '.join(cells)} |"
    assert row in table and "| 2/255, targeted | 2/255, standard |" in table
    with pytest.raises(ValueError, match="not run on the same images"):
        suites_table([_suite(300), _suite(320)])


def _suite(n_images: int) -> SuiteRecord:
    record = read_part(SuiteRecord, ROOT / "checkpoints" / "EfficientNetB0_atk" / "robustness_standard_n320.json", "")
    kept = {"n_images": n_images, "first_broken": record.curve.first_broken[:n_images]}
    return record.model_copy(update={"curve": record.curve.model_copy(update=kept)})
