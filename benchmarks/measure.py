"""How the benchmarks measure: contenders take turns in one process, and their medians are compared.

Other load on a machine then meets all of them alike. A turn before that warms up and takes the peak memory.
"""

from __future__ import annotations

import gc
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from utils.core.paths import ROOT, read_json, write_json
from utils.core.reproducibility import environment_facts
from utils.reporting.style import COLOURS, axes_of, finish, save_figure

FOLDER = ROOT / "benchmarks"
MIB = 2**20


@dataclass
class Measured:
    """One contender: seconds of each turn, peak memory in MiB (None: not measured), and what each turn returned."""

    seconds: list[float]
    peak_mib: float | None
    results: list[Any]

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)


def take_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Measured]:
    """Run each contender once to warm up and to take its memory, then all of them in turn ``repeats`` times.

    With ``repeats`` 0 a single turn counts and memory is not taken: for runs so long that a first moment does not
    matter, and that would fill the profiler's record.
    """
    found = {}
    for name, run in contenders.items():
        if repeats:
            found[name] = Measured([], peak_memory(run)[0], [])
        else:
            seconds, result = timed(run)
            found[name] = Measured([seconds], None, [result])
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds, result = timed(run)
            found[name].seconds.append(seconds)
            found[name].results.append(result)
    return found


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what ``run`` returned; waits for the GPU."""
    _wait_for_gpu()
    begun = time.perf_counter()
    result = run()
    _wait_for_gpu()
    return time.perf_counter() - begun, result


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any]) -> tuple[float, Any]:
    """MiB of tensors that ``run`` held at once beyond those there before, and what it returned.

    On a GPU as its allocator counts them; on a CPU from the profiler's record of every allocation, for resident
    memory shows nothing in a process that has grown already.
    """
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return (torch.cuda.max_memory_allocated() - before) / MIB, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in read_json(trace)["traceEvents"] if event.get("name") == "[memory]"]
    held = list(accumulate(event["args"]["Bytes"] for event in sorted(events, key=itemgetter("ts"))))
    return max(held, default=0) / MIB, result


def gpu_use(run: Callable[[], Any]) -> float | None:
    """Percent of ``run``'s time in which the first GPU was at work, as nvidia-smi samples it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    unit = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    return mean(sampled(run, ["nvidia-smi", unit, *query]))


def sampled(run: Callable[[], Any], command: Sequence[str]) -> list[float]:
    """The numbers that ``command`` prints, one a line, while ``run`` runs.

    Raises:
        RuntimeError: it printed none.
    """
    with tempfile.TemporaryFile("w+") as said:
        watcher = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            timed(run)
        finally:
            watcher.terminate()
            watcher.wait()
        said.seek(0)
        lines = said.read().splitlines()
    numbers = [float(line) for line in lines if line.strip().isdigit()]
    if not numbers:
        raise RuntimeError(f"{command[0]} printed no number: {' '.join(lines)[:200]}")
    return numbers


def progress(rows: list[Any], title: str) -> tqdm:
    """A bar over the rows of a benchmark."""
    return tqdm(rows, desc=title, unit="row")


def save(name: str, content: Mapping[str, Any], figure: Figure, folder: Path = FOLDER) -> None:
    """Write ``name.json``, with versions and hardware, and ``name.png``."""
    facts = environment_facts() | {"threads": torch.get_num_threads()}
    write_json(folder / f"{name}.json", dict(content) | {"environment": facts})
    print(save_figure(figure, folder / f"{name}.png"))


def bars(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    ylabel: str,
    title: str,
    note: str = "",
    log: bool = False,
) -> Figure:
    """Grouped bars, one panel below the other.

    Args:
        panels: title of the panel -> group -> bar -> height; a bar has the same colour everywhere.
        log: logarithmic heights, counted from 1.
    """
    names = list(dict.fromkeys(name for groups in panels.values() for group in groups.values() for name in group))
    many = max(map(len, panels.values()))
    size = (max(7.5, 3 + many * max(1.3, 0.3 * len(names))), 1.9 + 2.5 * len(panels))
    figure, axes = axes_of(len(panels), size=size)
    for ax, (panel, groups) in zip(axes[:, 0], panels.items()):
        _grouped_bars(ax, groups, names)
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.axhline(1, color="grey", linewidth=1)
        ax.margins(y=0.12)
        ax.set_title(panel, fontsize=10)
        ax.set(ylabel=ylabel)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return finish(figure, title, note)


def _grouped_bars(ax: Axes, groups: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = [index for index, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        x = np.array(at) + (place - (len(names) - 1) / 2) * width
        drawn = ax.bar(x, heights, width, label=name, color=COLOURS[place % len(COLOURS)])
        texts = [f"{height:.0f}" if height >= 10 else f"{height:.1f}" for height in heights]
        ax.bar_label(drawn, texts, fontsize=7, padding=1)
    ax.set_xticks(range(len(groups)), list(groups))
