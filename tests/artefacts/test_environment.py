from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


def _pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "env" / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in found}


def test_colab_has_the_same_pins_without_what_colab_brings() -> None:
    everything, colab = _pins("requirements.txt"), _pins("requirements-colab.txt")
    # notebook and ipywidgets: Colab is built on its own releases of them
    assert set(everything) - set(colab) == {"torch", "torchvision", "numpy", "notebook", "ipywidgets"}
    assert all(str(everything[name]) == str(pin) for name, pin in colab.items())


def test_conda_and_pyproject_read_the_same_file() -> None:
    conda = yaml.safe_load((ROOT / "env" / "project_env.yaml").read_text(encoding="utf-8"))
    assert {"pip": ["-r requirements.txt"]} in conda["dependencies"] and conda["name"] == "project_env"
    assert 'dependencies = { file = ["env/requirements.txt"] }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(_pins("requirements.txt")))
def test_installed_versions_satisfy_the_pins(name: str) -> None:
    assert _pins("requirements.txt")[name].specifier.contains(metadata.version(name), prereleases=True)


@pytest.mark.slow
def test_nothing_is_dragged_down_and_nothing_conflicts() -> None:
    assert Version(metadata.version("notebook")) >= Version("7")
    assert Version(metadata.version("requests")) >= Version("2.32")
    assert metadata.version("torchattacks") == "3.3.0"
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert result.returncode == 0 or "No module named pip" in result.stderr, result.stdout


def test_leak_table_of_the_readme_is_its_record() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "assets" / "Dataset" / "leak_audit.json").read_text(encoding="utf-8"))
    published, patient = record["splits"]
    for name, key in (
        ("accuracy on the test images", "accuracy"),
        ("the nearest training image is of the same patient", "same_patient"),
        ("always answering the most frequent class", "majority"),
    ):
        assert f"| {name} | {100 * published[key]:.1f} % | {100 * patient[key]:.1f} % |" in readme
    assert f"it scores {100 * record['patient_grouped_five_fold_accuracy']:.1f} %" in readme
    proven = published["certified_accuracy"][-1]
    assert published["epsilons"][-1] == 8 / 255
    assert f"{100 * proven:.1f} % keep their right answer" in " ".join(readme.split())
    assert round(patient["certified_accuracy"][-1] * patient["n_test"]) == 1 and patient["n_test"] == 1280
    networks = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "published").rglob("record.json")]
    assert networks and all(network["test"]["image"]["accuracy"] < proven for network in networks)


def test_not_for_clinical_use_stands_in_the_readme() -> None:
    assert "Not for clinical use" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_importing_has_no_side_effects() -> None:
    script = "import sys, utils.utils_funcs; assert not {'torchattacks', 'kagglehub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_one_import_leaves_slow_libraries_for_later() -> None:
    slow = {"accelerate", "IPython", "ipywidgets", "pytorch_grad_cam", "scipy.ndimage", "scipy.stats", "seaborn"}
    slow |= {"sklearn", "timm", "torch._dynamo", "torchattacks", "torchmetrics", "torchvision"}
    code = f"import sys, utils.utils_funcs; print(*({slow!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()
