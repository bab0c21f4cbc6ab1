"""The GPU script's smoke mode runs the same path on a CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

from utils.core.paths import read_json
from utils.evaluation.robustness import SuiteRecord
from utils.training.checkpoints import load_checkpoint
from utils.training.record import read_record_file

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", SCRIPT, *words], env=own, capture_output=True, text=True, check=False)


def test_smoke_measures_trains_hardens_attacks_and_packs(tmp_path: Path) -> None:
    """One backbone of the three; the others go through the same lines."""
    out = tmp_path / "out"
    done = _run("smoke", "phantom", str(out), BACKBONES="efficientnet_b0", WORK=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout and "done in" in done.stdout
    speed, training = (read_json(out / f"{name}.json") for name in ("attack_speed_gpu", "training_speed_gpu_fp32"))
    assert set(speed["models"]) == {"EfficientNetB0"}
    assert {"ours", "torchattacks"} <= set(next(iter(speed["models"]["EfficientNetB0"]["rows"].values())))
    assert training["backbones"]["efficientnet_b0"]["times_floor"]["clean"] > 0
    files = [path for path in out.iterdir() if path.suffix != ".png"]
    assert len(list(out.iterdir())) <= 8 and all(path.stat().st_size <= 16 * 2**20 for path in files)
    for name in ("records", "logs"):
        with tarfile.open(out / f"{name}.tar.gz") as packed:
            packed.extractall(tmp_path / name, filter="data")
    for title in ("EfficientNetB0", "EfficientNetB0_atk"):
        record = SuiteRecord.model_validate(read_json(tmp_path / "records" / f"robustness_{title}.json"))
        assert record.title == title and record.curve.n_images == 8 and record.suite == "smoke"
        assert read_record_file(tmp_path / "records" / f"record_{title}.json").trained.history
    subprocess.run(f"cat {out}/weights.part* | tar -C {tmp_path / 'records'} -xf -", shell=True, check=True)
    hardened, record = load_checkpoint(tmp_path / "records" / "checkpoints" / "EfficientNetB0_atk")
    assert hardened.image_size == 32 and record.trained.objective.name == "n_fgsm"


@pytest.mark.parametrize(
    ("words", "said"), [((), "two calls of at most eight minutes"), (("fly", "phantom", "out"), "no part fly")]
)
def test_wrong_words_are_answered_with_what_there_is(words: tuple[str, ...], said: str) -> None:
    done = _run(*words)
    assert done.returncode == 2 and said in done.stdout + done.stderr


def test_a_step_that_fails_says_which_and_why(tmp_path: Path) -> None:
    done = _run("smoke", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert done.returncode == 1 and "error: prepare failed" in done.stderr and "nowhere" in done.stderr
