"""Peak memory of whole processes, seconds until the notebooks' one import is there, and time against growth.

    python -m benchmarks.whole_processes --source PATH

Each row starts a process of its own, as a user does, and reads what the system says of it afterwards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import COLOURS, FOLDER, MIB, axes_of, finish, progress, save, timed
from models.def_models import BACKBONES, build_model
from utils.attacks.attack import Attack
from utils.core.paths import ROOT
from utils.core.precision import emulates_bf16
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, split_and_save, splits_in_memory
from utils.data.raw_images import RawImages
from utils.data.sets import ImageSet, load_splits
from utils.data.sources import load_source
from utils.evaluation.metrics import predict
from utils.evaluation.worst_case import robustness_curve

IMPORT = ["-c", "import utils.utils_funcs"]
EPS = 2 / 255
PARTS = "in 4 parts"
#: A small process between: to a new process the system counts the memory of the one that started it.
WATCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
status, usage = os.wait4(child.pid, 0)[1:]
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
sys.exit(status != 0)
"""


def run_process(arguments: list[str], folder: Path = ROOT, **environment: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of ``python ARGUMENTS`` in ``folder``.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        peak, said = Path(name) / "peak", Path(name) / "said"
        command = [sys.executable, "-c", WATCH, str(peak), sys.executable, *arguments]
        begun = time.perf_counter()
        with said.open("wb") as out:
            status = subprocess.call(command, cwd=folder, stdout=out, stderr=out, env=os.environ | environment)
        seconds = time.perf_counter() - begun
        if status:
            raise RuntimeError(f"{' '.join(arguments)} failed: {said.read_bytes()[-500:].decode(errors='replace')}")
        # Linux counts in KiB, macOS in bytes
        return seconds, int(peak.read_text()) * (1 if sys.platform == "darwin" else 1024) / MIB


def start_up(checkouts: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Seconds of ``import utils.utils_funcs`` in new processes, checkouts in turn after a first one that warms up."""
    turns = [{name: run_process(IMPORT, folder)[0] for name, folder in checkouts.items()} for _ in range(repeats + 1)]
    return {
        name: {"turns": [turn[name] for turn in turns[1:]], "median": median(turn[name] for turn in turns[1:])}
        for name in checkouts
    }


def memory(source: str, folder: Path) -> dict[str, float]:
    """MiB of preparing a source, and of training each backbone at 224 pixels in batches of 32.

    ``kept for the backward pass`` is what a step of the whole batch in float32 cannot do without, beside weights,
    gradients, the optimiser's two moments, and Python with torch.
    """
    out, small = folder / "data", folder / "small"
    found = {"prepare": run_process(["-m", "utils", "prepare", "--source", source, "--out", str(out)])[1]}
    phantoms = make_phantoms(PhantomConfig(n_subjects=20, n_levels=8))
    split_and_save(phantoms, group_by_subject(phantoms), out=small)
    common = ["-m", "utils", "train", "--data", str(small), "--set", "num_epochs=1", "--set", "batch_size=32"]
    common += ["--set", "validation_images=8"]
    for backbone in sorted(BACKBONES):
        clean = ["--backbone", backbone, "--out", str(folder / backbone)]
        hard = ["--backbone", backbone, "--start", str(folder / backbone), "--out", str(folder / f"{backbone}_atk")]
        hard += ["--set", f"eps={EPS}", "--set", "steps=1"]
        title = BACKBONES[backbone].title
        found[f"{title}, training"] = run_process([*common, *clean])[1]
        found[f"{title}, hardening"] = run_process([*common, *hard])[1]
        ways = {"bf16": ["--set", "precision=bf16"], PARTS: ["--set", "accumulation_steps=4"]}
        for way, changes in ways.items():
            if way != "bf16" or not emulates_bf16("cpu"):
                found[f"{title}, training, {way}"] = run_process([*common, *clean, *changes, "--overwrite"])[1]
                found[f"{title}, hardening, {way}"] = run_process([*common, *hard, *changes, "--overwrite"])[1]
        found[f"{title}, kept for the backward pass"] = kept_for_backward(backbone)
    found["Python with torch"] = run_process(IMPORT)[1]
    return found


def kept_for_backward(backbone: str, side: int = 224, batch: int = 32) -> float:
    """MiB of activations that autograd keeps between the forward and the backward pass of one training step."""
    model = build_model(backbone, image_size=side).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(torch.rand(batch, 1, side, side))
    del logits
    return sum(sizes.values()) / MIB


def growth_by_images(raw: RawImages, sizes: list[int]) -> dict[str, dict[int, float]]:
    """Seconds of each kind of work on the first part of a shuffled source."""
    order = np.random.default_rng(0).permutation(len(raw))
    model = build_model("resnet34", image_size=32).eval()
    found: dict[str, dict[int, float]] = {"find patients and split": {}, "predict": {}, "FGSM": {}}
    for n in progress(sizes, "images"):
        part = _part(raw, np.sort(order[:n]))
        subjects = group_by_subject(part)
        images = _all_images(part, subjects)
        attack = partial(robustness_curve, model, images, attack=Attack("fgsm"), epsilons=[EPS])
        found["find patients and split"][n] = timed(lambda part=part: _prepare(part))[0]
        found["predict"][n] = timed(partial(predict, model, images))[0]
        found["FGSM"][n] = timed(attack)[0]
    return found


def _prepare(raw: RawImages) -> None:
    splits_in_memory(raw, group_by_subject(raw), "random")


def _part(raw: RawImages, index: np.ndarray) -> RawImages:
    paths, folders = ([values[i] for i in index] for values in (raw.paths, raw.folders))
    part = {"paths": paths, "folders": folders, "subjects": None if raw.subjects is None else raw.subjects[index]}
    return replace(raw, pixels=raw.pixels[index], labels=raw.labels[index], **part)


def _all_images(raw: RawImages, subjects: Any) -> ImageSet:
    return splits_in_memory(raw, subjects, "random").everyone


def growth_by_processes(folder: Path, counts: list[int], images: int) -> dict[int, float]:
    """Seconds of one evaluation shared by so many processes of one thread each."""
    splits = load_splits(folder / "data")
    fit = ["-m", "utils", "train", "--backbone", "resnet34", "--data", str(folder / "data"), "--image-size", "64"]
    run_process([*fit, "--out", str(folder / "grown"), "--set", "num_epochs=1", "--set", "batch_size=64"])
    command = ["-m", "utils", "robustness", "--model", str(folder / "grown"), "--data", str(folder / "data")]
    command += ["--suite", "quick", "--epsilons", "0.5/255", "--panel-images", "0", "--batch-size", "32"]
    command += ["--max-images", str(min(images, len(splits.test)))]
    found = {}
    for count in progress(counts, "processes"):
        # a root of its own: an evaluation never meets the cache of another one
        place = ["--root", str(folder / f"root{count}"), "--out", str(folder / f"{count}.json")]
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_machines",
            "1",
            "--num_processes",
            str(count),
        ]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        found[count] = run_process([*(launch if count > 1 else []), *command, *place], OMP_NUM_THREADS="1")[0]
    return found


def growth_figure(images: dict[str, dict[int, float]], processes: dict[int, float], note: str) -> Any:
    """Time against images and against processes."""
    figure, axes = axes_of(1, 2, size=(10, 4))
    for place, (name, seconds) in enumerate(images.items()):
        axes[0, 0].plot(list(seconds), list(seconds.values()), marker="os^"[place], color=COLOURS[place], label=name)
    axes[0, 0].set(xlabel="images", ylabel="seconds", xscale="log", yscale="log")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].plot(list(processes), list(processes.values()), marker="o", color=COLOURS[0], label="measured")
    first = processes[min(processes)]
    axes[0, 1].plot(list(processes), [first / n for n in processes], linestyle=":", color="grey", label="ideal")
    axes[0, 1].set(xlabel="processes", ylabel="seconds", xticks=list(processes), ylim=(0, None))
    axes[0, 1].legend(fontsize=8)
    return finish(figure, "Time against images (one process) and against processes (one evaluation)", note)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    raw = load_source(args.source)
    checkouts = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    sizes = sorted({min(n, len(raw)) for n in args.sizes})
    with tempfile.TemporaryDirectory() as name:
        content = {"source": raw.name, "import_seconds": start_up(checkouts, args.repeats)}
        content["memory_mib"] = memory(args.source, Path(name))
        content["seconds_by_images"] = growth_by_images(raw, sizes)
        content["seconds_by_processes"] = growth_by_processes(Path(name), args.processes, args.images)
    note = f"{raw.name}, ResNet34, {torch.get_num_threads()} threads; processes of one thread"
    figure = growth_figure(content["seconds_by_images"], content["seconds_by_processes"], note)
    save("whole_processes", content, figure, args.out)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_processes", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="as for utils.data.preparation")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 11519], metavar="N")
    parser.add_argument("--processes", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--images", type=int, default=640, help="of the evaluation that processes share")
    parser.add_argument("--repeats", type=int, default=5, help="of the import")
    parser.add_argument("--before", type=Path, help="an older checkout whose import is measured beside this one's")
    parser.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
