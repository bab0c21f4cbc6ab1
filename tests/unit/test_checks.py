"""Settings are checked by one set of checkers, and commands end in one line."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

from models.def_models import build_model
from utils.attacks.attack import Attack
from utils.attacks.suites import Threat
from utils.commands import atlas, combine, folds, recipes
from utils.commands.boundary import MISUSED, STOPPED, command
from utils.core.checks import choice, number, whole
from utils.data.phantom import PhantomConfig
from utils.training.augment import Augmentation
from utils.training.config import TrainConfig, parse_assignment
from utils.training.objectives import Adversarial, NFgsm, Trades, make_objective


@pytest.mark.parametrize("wrong", [True, 2.0, "3", None, math.nan, 0, 11])
def test_whole_numbers(wrong) -> None:
    assert whole("steps", 3, 1, 10) == 3
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 10, not"):
        whole("steps", wrong, 1, 10)


@pytest.mark.parametrize("wrong", [True, "abc", None, math.nan, math.inf, -0.1, 1.0])
def test_numbers(wrong) -> None:
    assert number("rate", 0, least=0, below=1) == 0.0
    with pytest.raises(ValueError, match="rate must be a number at least 0 and below 1, not"):
        number("rate", wrong, least=0, below=1)


def test_choices() -> None:
    assert choice("norm", "l2", ("linf", "l2")) == "l2"
    with pytest.raises(ValueError, match="norm must be one of linf, l2, not 'l1'"):
        choice("norm", "l1", ("linf", "l2"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrainConfig(num_epochs=True), "num_epochs"),
        (lambda: TrainConfig(batch_size=1), "batch_size"),
        (lambda: TrainConfig(learning_rate="abc"), "learning_rate"),
        (lambda: TrainConfig(learning_rate=math.nan), "learning_rate"),
        (lambda: TrainConfig(mixup=2), "mixup"),
        (lambda: TrainConfig(cutmix=-0.1), "cutmix"),
        (lambda: TrainConfig(ema_decay=1), "ema_decay"),
        (lambda: TrainConfig(layer_decay=0), "layer_decay"),
        (lambda: TrainConfig(clip_norm=math.inf), "clip_norm"),
        (lambda: TrainConfig(scheduler="linear"), "scheduler"),
        (lambda: Augmentation(flip=1.5), "flip"),
        (lambda: Augmentation(strength=math.nan), "augmentation strength"),
        (lambda: Adversarial(eps=0), "eps above 0"),
        (lambda: Adversarial(eps=math.nan), "eps must be"),
        (lambda: Adversarial(eps=2 / 255, steps=1.5), "steps"),
        (lambda: Adversarial(eps=2 / 255, alpha=2), "alpha"),
        (lambda: Adversarial(eps=2 / 255, adv_weight=0), "adv_weight"),
        (lambda: Trades(eps=2 / 255, beta=math.inf), "beta"),
        (lambda: NFgsm(eps=2 / 255, noise=-1), "noise"),
        (lambda: make_objective("fast", eps=2 / 255), "recipe"),
        (lambda: Attack(steps=1.5), "steps"),
        (lambda: Attack(restarts=True), "restarts"),
        (lambda: Attack(alpha=math.nan), "alpha"),
        (lambda: Threat(size=2.5), "size"),
        (lambda: PhantomConfig(n_subjects=8.0), "n_subjects"),
        (lambda: parse_assignment("x=1/0"), "x=1/0 divides by zero"),
        (lambda: build_model("resnet34", image_size=100_000, weights="scratch"), "from 32 to 1024 pixels, not 100000"),
    ],
)
def test_settings_are_refused_by_name(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("two\nlines"), 1, "error: two lines"),
        (FloatingPointError("the loss became nan"), 1, "error: the loss became nan"),
        (KeyError("curve"), 1, "error: there is no entry 'curve'"),
        (OSError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), STOPPED, "stopped; the same command goes on"),
    ],
)
def test_commands_end_in_one_line(error: BaseException, status: int, said: str, capsys) -> None:
    @command("demo")
    def main() -> None:
        raise error

    assert main([]) == status
    last = capsys.readouterr().err.strip().splitlines()
    assert len(last) == 1 and last[0].startswith(said)
    if status == 1:
        assert main(["--debug"]) == 1 and "Traceback (most recent call last)" in capsys.readouterr().err


def test_commands_take_options_from_a_file_and_typed_ones_count_more(tmp_path: Path, capsys) -> None:
    @command("demo")
    def main(*, model: str, max_images: int = 3, seeds: tuple[int, ...] = (0,)) -> None:
        """Show what was asked for.

        Args:
            model: which one.
        """
        print(model, max_images, seeds)

    file = tmp_path / "options.yaml"
    file.write_text("model: a\nmax-images: 8\nseeds: [1, 2]\n")
    assert main(["--config", str(file), "--max-images", "9"]) == 0 and capsys.readouterr().out == "a 9 (1, 2)\n"
    assert main(["--model", "b", "--seeds", "4", "5"]) == 0 and capsys.readouterr().out == "b 3 (4, 5)\n"
    file.write_text("model: {eps: 0.5, flip: true}\n")
    assert main(["--config", str(file)]) == MISUSED and "eps=0.5" in capsys.readouterr().err
    file.write_text("modle: a\n")
    for words, said in (
        (["--config", str(file)], f'Unknown option: "[modle]" from {file}'),
        (["--config"], "--config needs the path"),
        (["--config", str(tmp_path / "none.yaml"), "--model", "a"], "none.yaml"),
        (["--max-images", "3"], "--model is needed"),
        (["--model"], "--model requires an argument"),
        (["--model", "a", "--max-images", "many"], 'Invalid value for --max-images: unable to convert "many" into int'),
        (["--model", "a", "--colour", "red"], "--colour"),
    ):
        assert main(words) in (1, MISUSED)
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert "which one" in help_text and "--config FILE.yaml" in help_text and "Show what was asked for" in help_text


@pytest.mark.parametrize(
    "verb, words",
    [
        (atlas, ["--model", "a", "--hardened", "b"]),
        (combine, ["--members", "a", "b"]),
        (folds, []),
        (recipes, []),
    ],
    ids=["atlas", "combine", "folds", "recipes"],
)
def test_a_folder_that_cannot_be_made_is_named_before_anything_is_read(verb, words, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    given = [*words, "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "file" / "results")]
    assert verb.main(given) == 1
    assert f"{tmp_path / 'file'} is a file; choose another folder" in capsys.readouterr().err


def test_a_warning_is_one_plain_line_and_with_debug_says_where(capsys) -> None:
    @command("demo")
    def main() -> None:
        sys.stderr.write(warnings.formatwarning("look out", UserWarning, "code.py", 3, "line of code"))

    usual = warnings.formatwarning
    assert main([]) == 0 and capsys.readouterr().err == "warning: look out\n"
    assert main(["--debug"]) == 0 and "code.py:3: UserWarning: look out" in capsys.readouterr().err
    assert warnings.formatwarning is usual


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- a", "holds no options; write one `name: value` a line"),
        (b"hello", "holds no options"),
        (b"1: 2", "holds no options"),
        (b"model: [1", "is no YAML: while parsing"),
        (b"model: \xff", "is no YAML: 'utf-8' codec"),
        (b"model: !!python/object:os.system a", "is no YAML: could not determine a constructor"),
        (None, "--config: there is no file"),
    ],
)
@pytest.mark.parametrize("form", [lambda file: ["--config", file], lambda file: [f"--config={file}"]])
def test_a_configuration_file_that_holds_no_options_is_named(content, told: str, form, tmp_path: Path, capsys) -> None:
    @command("demo")
    def main(*, model: str = "a") -> None:
        print(model)

    file = tmp_path / "options.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert main(form(str(file))) == 1
    error = capsys.readouterr().err
    assert told in error and str(file) in error and error.count("\n") == 1
    if content is not None:
        file.write_text("")
        assert main(form(str(file))) == 0 and capsys.readouterr().out == "a\n"
        file.write_text("model: b")
        assert main(form(str(file))) == 0 and capsys.readouterr().out == "b\n"


def test_settings_of_a_configuration_file_may_stand_below_set(tmp_path: Path, capsys) -> None:
    @command("demo")
    def main(*, set: tuple[str, ...] = ()) -> None:
        print(*map(parse_assignment, set))

    file = tmp_path / "options.yaml"
    for text in ("set: {flip: true, eps: 2/255}", "set:\n  flip: true\n  eps: 2/255", "set: [flip=True, eps=2/255]"):
        file.write_text(text)
        assert main(["--config", str(file)]) == 0
        assert capsys.readouterr().out == f"('flip', True) ('eps', {2 / 255})\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent otherwise there")
def test_ctrl_c_ends_a_command_in_one_line(tmp_path: Path) -> None:
    arguments = ["-m", "utils", "prepare", "--source", "phantom", "--out", str(tmp_path / "data")]
    # a process that was started in the background would ignore the signal
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import utils.commands.prepare as p, time; "
    code += "p.load_source = lambda *_, **__: (print('begun', flush=True), time.sleep(60))"
    code += "\nimport sys; sys.exit(p.main(sys.argv[1:]))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments[3:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout.readline() == "begun\n"
    time.sleep(0.2)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == STOPPED and "Traceback" not in said and "goes on from what is finished" in said
