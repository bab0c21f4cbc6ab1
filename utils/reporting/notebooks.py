"""Run the notebooks in order: ``python -m utils reproduce --profile quick``."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image
from tqdm.auto import tqdm

from utils.core.paths import ROOT, atomic_write
from utils.reporting.notebook_plan import ATLAS, ATLAS_OF, RESULTS, parameters_of
from utils.reporting.widgets import HEADLESS

FAILED = ROOT / "runs" / "failed"

#: Kernels talk through files of this user. TCP ports, which are all that Windows has, would be open to others here.
TRANSPORT = "tcp" if os.name == "nt" else "ipc"
#: In a kernel, warnings of this project show each time, also where they point at a cell; those of libraries do not.
WARNINGS = (
    "import warnings; warnings.filterwarnings('ignore', category=UserWarning); "
    "warnings.filterwarnings('default', category=UserWarning, module=r'(utils|models)\\.|__main__')"
)

#: What a figure may take in a notebook, so that the longest stays under a megabyte.
FIGURE_BYTES, FIGURE_COLOURS, FIGURE_WIDTH = 80_000, 256, 720

#: Seconds between two looks at the bar of a cell.
BAR_EVERY = 2.0

#: The order of notebooks that run beside each other: the long atlas comes last, with the results beside it.
TURNS = (
    "prepare_dataset",
    "efficientnet_model",
    "dino_v2_model",
    "efficientnet_model_atk",
    "resnet_model",
    "resnet_model_atk",
    "dino_v2_model_atk",
    "attack_atlas",
    "results",
)


def without_injected(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without what an earlier run injected."""
    copied = nbformat.from_dict(notebook)
    copied.cells = [cell for cell in copied.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    return copied


def inject(notebook: nbformat.NotebookNode, values: dict[str, Any]) -> nbformat.NotebookNode:
    """A copy with a cell after the parameters that sets those of ``values`` that the notebook has, if there are any."""
    copied = without_injected(notebook)
    known = parameters_of(copied)
    chosen = {name: value for name, value in values.items() if name in known}
    if not chosen:
        return copied
    position = max(i for i, cell in enumerate(copied.cells) if "parameters" in cell.metadata.get("tags", []))
    source = "\n".join(f"{name} = {_written(value)}" for name, value in chosen.items())
    cell = nbformat.v4.new_code_cell(f"{INJECTED}\n{source}", id="injected")
    cell.metadata["tags"] = ["injected-parameters"]
    copied.cells.insert(position + 1, cell)
    return copied


def _written(value: Any) -> str:
    """A value as somebody would type it: radii as fractions of 255."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    levels = 255 * value if isinstance(value, float) else 0
    typed = 0 < levels <= 32 and math.isclose(levels, round(2 * levels) / 2, rel_tol=1e-12)
    return f"{levels:g} / 255" if typed and f"{levels:g}" in (f"{levels:.1f}", f"{levels:.0f}") else repr(value)


#: First line of the cell that holds a run's values.
INJECTED = "# this run's values, set from the command line; they replace those above, until this cell is deleted"


class _Client(NotebookClient):
    """Passes on what cells print and how far their bars are, so that a long training can be watched."""

    live: ClassVar[set[_Client]] = set()

    def __init__(self, notebook: nbformat.NotebookNode, bar: tqdm, sockets: Path, **options: Any) -> None:
        super().__init__(notebook, on_cell_executed=self._count, kernel_name="python3", **options)
        self.bar, self.sockets, self.told = bar, sockets, 0.0

    def create_kernel_manager(self) -> Any:
        """A kernel that is reached through the folder ``sockets``, which only this user may open."""
        manager = super().create_kernel_manager()
        if TRANSPORT == "ipc":
            manager.transport, manager.ip = TRANSPORT, str(self.sockets / "kernel")
        return manager

    def _count(self, cell: nbformat.NotebookNode, **_: Any) -> None:
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(cell.cell_type == "code")

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            name = self.resources["metadata"]["name"]
            for line in msg["content"]["text"].rstrip().splitlines():
                tqdm.write(f"{name} | {line}")
        if msg["msg_type"] == "comm_msg":
            self._tell(msg["content"]["data"].get("state", {}).get("value"))
        return super().process_message(msg, cell, cell_index)

    def _tell(self, value: Any) -> None:
        """Put the right half of a cell's own bar, which is a widget's text, behind the notebook's."""
        if isinstance(value, str) and "[" in value and time.monotonic() - self.told >= BAR_EVERY:
            self.told = time.monotonic()
            self.bar.set_postfix_str(" ".join(html.unescape(value).split()))

    @classmethod
    def stop_all(cls) -> None:
        """End the kernels of all notebooks that other threads are running."""
        for client in list(cls.live):
            if client.km and client.km.has_kernel:
                cast(Any, client.km.provisioner).process.kill()  # of a local kernel


def execute(path: Path, values: dict[str, Any], target: Path, *, threads: int | None = None) -> None:
    """Run one notebook with ``values`` as parameters and write it, with outputs, to ``target``.

    Where a cell failed, what ran is written too, but never over the notebook itself. The cell with the values stays in
    the notebook, so that what is shown is what ran; a next run replaces it.

    Args:
        threads: CPU threads that its kernel may use; None leaves that to torch.

    Raises:
        RuntimeError: a cell failed or the kernel died; the message names notebook and error.
    """
    notebook = inject(nbformat.read(path, as_version=4), values)
    code = sum(cell.cell_type == "code" for cell in notebook.cells)
    environment = os.environ | {HEADLESS: "1"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tqdm(total=code, desc=path.stem, unit="cell") as bar, TemporaryDirectory(prefix="mri_") as sockets:
        client = _Client(
            notebook,
            bar,
            Path(sockets),
            timeout=None,
            extra_arguments=[f"--IPKernelApp.exec_lines={WARNINGS}"],
            resources={"metadata": {"path": str(path.parent), "name": path.stem}},
        )
        _Client.live.add(client)
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            failed = FAILED / path.name if target == path else target
            _write(notebook, failed)
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"{path.name} stopped: {reason}. See {failed}") from error
        except DeadKernelError as error:
            raise RuntimeError(f"{path.name} stopped: its kernel died, often for lack of memory") from error
        finally:
            _Client.live.discard(client)
    _write(notebook, target)


def run(steps: list[tuple[Path, dict[str, Any]]], *, out: Path | None, jobs: int) -> None:
    """Execute notebooks, ``jobs`` at once, each after those whose results it needs.

    Raises:
        RuntimeError: the first failure; the notebooks that run beside it are stopped.
    """
    if jobs > 1:
        steps = sorted(steps, key=lambda step: _turn(step[0]))
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    atlas = any(path == ATLAS for path, _ in steps)
    futures: dict[Path, Future] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for path, values in steps:
            needed = [future for other, future in futures.items() if _needs(path, other)]
            target = out / "notebooks" / path.name if out else path
            alone = _stage(path) == 0 or (path == RESULTS and not atlas)
            futures[path] = pool.submit(_execute_after, needed, path, values, target, None if alone else threads)
        failed: list[BaseException] = []
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            failed = [error for error in (future.exception() for future in done) if error]
        finally:
            for future in futures.values():
                future.cancel()
            _Client.stop_all()
    if failed:
        raise failed[0]


def _execute_after(needed: list[Future], path: Path, values: dict[str, Any], target: Path, threads: int | None) -> None:
    # what is needed was handed to the pool before, so somebody is at work on it already
    if all(future.exception() is None for future in needed):
        execute(path, values, target, threads=threads)


def _stage(path: Path) -> int:
    """0 data, 1 clean models, 2 hardening, 3 results and the atlas."""
    if path.parent.name == "dataset":
        return 0
    return 3 if path in (RESULTS, ATLAS) else 1 + path.stem.endswith("_atk")


def _turn(path: Path) -> float:
    """Place among all; models of one's own begin right after the data, and are hardened last."""
    if path.stem in TURNS:
        return TURNS.index(path.stem)
    return len(TURNS) - 1.5 if _stage(path) == 2 else 0.5


def _needs(path: Path, earlier: Path) -> bool:
    """Whether one notebook reads what an earlier one wrote."""
    if path == ATLAS:
        return earlier.stem == f"{ATLAS_OF}_model_atk"
    if _stage(path) == 2 and _stage(earlier) == 1:
        return path.stem == f"{earlier.stem}_atk"
    return _stage(path) > _stage(earlier)


def _write(notebook: nbformat.NotebookNode, target: Path) -> None:
    tidy(notebook)
    if target.is_relative_to(ROOT):
        _name_paths_from(target.parent, notebook)
    atomic_write(target, lambda file: nbformat.write(notebook, file))


def _name_paths_from(folder: Path, notebook: nbformat.NotebookNode) -> None:
    """Injected paths inside the repository, seen from ``folder``, where Jupyter opens the notebook in any clone.

    Of a file elsewhere only the name is left: its folder is this machine's affair.
    """
    inside = rf"(?<='){re.escape(repr(str(ROOT))[1:-1])}(?=[/\\'])"
    there = Path(os.path.relpath(ROOT, folder)).as_posix()
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(inside, there, cell.source)
            cell.source = re.sub(r"'((?:/|[A-Za-z]:\\\\)[^'\n]+)'", _without_folder, cell.source)


def _without_folder(quoted: re.Match[str]) -> str:
    return repr(Path(quoted[1]).name) if Path(quoted[1]).is_file() else quoted[0]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Lighten figures, and drop what only lives with the kernel or on this machine: widgets, bars, times, paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in cell.outputs if not _fleeting(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = _lighter(output.data)
                if output.output_type == "stream":
                    output.text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", output.text.replace(f"{ROOT}/", ""))


def _lighter(data: dict[str, Any]) -> dict[str, Any]:
    """Outputs with a figure in fewer colours, or a JPEG where that is not enough; ``assets/`` holds it whole."""
    figure = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    packed, kind = io.BytesIO(), "image/png"
    # not the median cut, which gives thin lines the colours of the areas around them
    colours = len(figure.getcolors(FIGURE_COLOURS) or range(FIGURE_COLOURS))
    few = figure.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(packed, "PNG", optimize=True)
    if len(packed.getvalue()) > FIGURE_BYTES:
        packed, kind = io.BytesIO(), "image/jpeg"
        figure.thumbnail((FIGURE_WIDTH, figure.height))
        figure.save(packed, "JPEG", quality=65, optimize=True)
    others = {mime: content for mime, content in data.items() if mime != "image/png"}
    return {kind: base64.b64encode(packed.getvalue()).decode(), **others}


def _fleeting(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr" and "Warning" not in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})
