"""Several processes give what one gives. They are started for real, by Accelerate's own launcher."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from torch import nn

from models.def_models import build_model
from utils.commands import train
from utils.core.paths import read_json
from utils.core.processes import share_out, shared_batchnorm, total
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.raw_images import RawImages
from utils.data.sets import DataSplits
from utils.data.workspace import pick_device
from utils.experiments import fit
from utils.training.checkpoints import save_checkpoint

# without GPUs, too, --multi_gpu is what starts several processes; --cpu starts one
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def data(phantoms: RawImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=folder)
    return folder


@pytest.fixture(scope="module")
def clean(splits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "ResNet34"
    torch.manual_seed(0)
    model = build_model("resnet34", image_size=32)
    save_checkpoint(model, {"classes": splits.classes, "data": splits.info}, folder)
    return folder


def _launch(processes: int, module: str, *arguments: str) -> None:
    launcher = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        _launch(processes, "tests.shared_work", str(data), str(tmp_path / str(processes)))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in "12")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["gradient_error"] < 1e-9
    assert set(one["runs"]) == set(two["runs"])
    for name, alone in one["runs"].items():
        shared = two["runs"][name]
        for first, second in zip(alone["history"], shared["history"], strict=True):
            first.pop("seconds"), second.pop("seconds")
            assert second == pytest.approx(first, rel=1e-3, abs=1e-4), name
        for key, value in alone["weights"].items():
            torch.testing.assert_close(shared["weights"][key], value, rtol=2e-2, atol=2e-4, msg=f"{name}, {key}")


def test_two_processes_attack_as_one(data: Path, clean: Path, tmp_path: Path) -> None:
    common = ["--model", str(clean), "--data", str(data), "--root", str(tmp_path), "--suite", "smoke"]
    common += ["--batch-size", "5", "--panel-images", "0", "--epsilons", "1/255", "4/255", "--max-images", "18"]
    for processes in (1, 2):
        _launch(processes, "utils", "robustness", *common, "--out", str(tmp_path / f"{processes}.json"))
    one, two = (read_json(tmp_path / f"{name}.json") for name in "12")
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    one["curve"].pop("seconds"), two["curve"].pop("seconds")
    assert one["curve"] == two["curve"] and one["metrics"] == two["metrics"]
    assert len(set(one["curve"]["robust_accuracy"])) > 1


def test_notebook_launcher_trains_from_a_notebook(data: Path, tmp_path: Path) -> None:
    """The README's cell, made small."""
    block = re.search(
        r"```python\n(from accelerate.*?)```", (ROOT / "utils" / "README.md").read_text(encoding="utf-8"), re.S
    )[1]
    small = f'"resnet34", {str(data)!r}, {str(tmp_path / "model")!r}, image_size=32, '
    block = block.replace('"resnet34", ', small).replace('"num_epochs": 20', '"num_epochs": 1')
    block = block.replace("num_processes=2", f"num_processes=2, use_port='{_free_port()}'")
    source = f"""
import torch
torch.set_num_threads(2)
torch.rand(500, 500) @ torch.rand(500, 500)  # OpenMP's threads run, and are not there after a fork
{block}"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert read_json(tmp_path / "model" / "record.json")["environment"]["processes"] == 2


#: Stand-ins for Slurm's commands: two nodes, which are this machine twice.
SLURM = {
    "scontrol": "echo 127.0.0.1; echo 127.0.0.1",
    "srun": 'export SLURM_NNODES=2; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; first=$?; wait $! && exit $first',
    "python": f'exec {sys.executable} "$@"',
}


def test_slurm_job_trains_on_two_nodes(data: Path, tmp_path: Path) -> None:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "two", "PROCESSES_PER_NODE": "1"}
    own |= {"MAIN_PORT": str(_free_port())}
    command = ["bash", "env/train.slurm", "--backbone", "resnet34", "--data", str(data), "--image-size", "32"]
    command += ["--out", str(tmp_path / "model"), "--set", "num_epochs=1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1
    assert read_json(tmp_path / "model" / "record.json")["environment"]["processes"] == 2


def test_one_process_needs_no_others() -> None:
    values = torch.arange(3.0)
    assert share_out([1, 2, 3], lambda job: 2 * job) == [2, 4, 6] and total(values) is values
    layer = nn.BatchNorm2d(2)
    with shared_batchnorm(layer):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("settings", "start", "message"),
    [
        ({"epochs": 3}, None, "no setting epochs"),
        ({"beta": 3.0}, None, "no setting beta"),
        ({}, "somewhere", "eps=2/255"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings: dict, start: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit.fit("resnet34", "nowhere", "nowhere", start=start, settings=settings)


def test_a_finished_model_is_not_replaced_unasked(data: Path, clean: Path, capsys: pytest.CaptureFixture) -> None:
    before = (clean / "record.json").read_bytes()
    assert train.main(["--backbone", "resnet34", "--data", str(data), "--out", str(clean)]) == 1
    assert "finished model" in capsys.readouterr().err and (clean / "record.json").read_bytes() == before
    assert json.loads(before)["model"]["backbone"] == "resnet34"


@pytest.mark.parametrize(("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_attacks_run_where_training_does(cuda: bool, mps: bool, device: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert pick_device().type == device
