"""Answers about scans of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from utils.commands.boundary import command
from utils.core.checks import LARGEST_SEED, whole
from utils.core.paths import atomic_write, check_writable, read_json, write_json
from utils.data.cases import Case, Reading, read_cases
from utils.data.scans.standard import PoorScan, Stripping
from utils.data.workspace import Workspace
from utils.experiments.answer_records import NOT_CLINICAL, Answer
from utils.experiments.prediction import Predictor, Seen, answer_case, exported
from utils.reporting.answers import answers_table, plot_answer, plot_sheet, plot_steps, told
from utils.reporting.style import save_figure
from utils.training.checkpoints import checkpoint_folder

TABLE, SHEET = "answers.csv", "answers.png"


@command("python -m utils predict")
def main(
    source: str,
    /,
    *,
    out: Path,
    model: str = "ResNet34",
    root: Path | None = None,
    together: bool = False,
    fit: Literal["pad", "stretch"] = "pad",
    modality: Literal["T1", "T2", "FLAIR", "PET", "CT"] = "T1",
    stripped: bool = False,
    mask: Path | None = None,
    attack: Literal["quick", "none"] = "quick",
    export: tuple[Literal["png8", "png16", "nifti", "dicom"], ...] = (),
    force: bool = False,
    seed: int = 0,
) -> int:
    """Answer about a slice, a folder, a volume or a DICOM series, and say how far to believe it.

    Each case leaves NAME_answer.png and NAME_answer.json in --out; several leave answers.csv and answers.png, too. What
    is unlike every training slice gets no answer.

    Args:
        source: a picture, a NIfTI or Analyze volume, a DICOM file, a folder or archive of these, or the word phantom.
        out: folder of the answers.
        model: folder in checkpoints/ of a model or a vote, or a path.
        root: holds checkpoints/; without it this repository.
        together: all slices of the folder are one patient's.
        fit: how a picture of another shape is fitted: with black beside it, or stretched.
        modality: of volumes.
        stripped: volumes show nothing but the brain already.
        mask: volume that marks the brain of the one volume given.
        attack: look for the smallest attack that turns each answer around, or do not.
        export: write the attacked slices as such files, and tell what is answered once they are read again.
        force: answer what the gate refuses, too.
        seed: of the attack's random starts.
    """
    if not source.strip():
        raise ValueError("SCAN is empty; give a picture, a volume, a folder, an archive, or the word phantom")
    whole("--seed", seed, 0, LARGEST_SEED)
    workspace = Workspace.open(str(root or ""))
    _check_out(out, source)
    if mask and not mask.is_file():
        raise FileNotFoundError(f"the mask {mask} does not exist")
    predictor = Predictor(workspace, _folder(workspace, model))
    reading = Reading(
        predictor.gate.shape,
        fit=fit,
        together=together,
        stripping=Stripping(mask=mask, stripped=stripped),
        modality=modality,
    )
    found: list[tuple[Answer, Seen]] = []
    names: set[str] = set()
    for case in _cases(source, reading, out):
        answer, seen = answer_case(predictor, case, attack=attack == "quick", force=force, seed=seed)
        stem = out / _file_name(case.name, names)
        if export:
            answer = exported(predictor, case, answer, seen, Path(f"{stem}_attacked"), export)
            if seen.stack is None:
                print(f"{answer.case}: nothing exported, for no attack turned its answer around")
        print(f"{answer.case}: " + "\n  ".join(told(answer)), flush=True)
        _write(stem, case, answer, seen, predictor.classes)
        found.append((answer, seen))
    if len(found) > 1:
        table = answers_table([answer for answer, _ in found])
        atomic_write(out / TABLE, lambda path: table.to_csv(path, index=False))
        print(save_figure(plot_sheet(found), out / SHEET))
    print(NOT_CLINICAL)
    return 0 if any(answer.answer for answer, _ in found) else 1


def _write(stem: Path, case: Case, answer: Answer, seen: Seen, classes: list[str]) -> None:
    target = Path(f"{stem}_answer.json")
    with suppress(FileNotFoundError, ValueError, AttributeError):  # no answer there, or none that could be lost
        if (before := read_json(target).get("model")) != answer.model:
            print(f"  replaces an answer of {before} in {target}")
    write_json(target, answer.plain())
    if case.pictures:
        save_figure(plot_steps(case.name, case.pictures, case.facts), Path(f"{stem}_steps.png"))
    print(f"  {save_figure(plot_answer(answer, seen, classes), Path(f'{stem}_answer.png'))}")


def _check_out(out: Path, source: str) -> None:
    """Refuse a folder of answers that is none, or from which they would be read as scans the next time."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    place = Path(source).expanduser()
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise ValueError(f"--out {out} lies inside the folder that is read; name one beside it")
    check_writable(out / TABLE)


def _folder(workspace: Workspace, model: str) -> Path:
    if model and Path(model).is_dir():
        return checkpoint_folder(model)
    folder = checkpoint_folder(workspace.checkpoint(model))
    if not model or not folder.is_dir():
        known = sorted(path.parent.name for path in workspace.root.glob("checkpoints/*/record.json"))
        asked = model or "without a name"
        raise FileNotFoundError(f"there is no model {asked}; there are {', '.join(known) or 'none'}")
    return folder


def _cases(source: str, reading: Reading, out: Path) -> Iterator[Case]:
    """The cases; a single head that cannot be used leaves the pictures of its steps."""
    try:
        yield from read_cases(source, reading, say=print)
    except PoorScan as error:
        name = _file_name(Path(source).name, set())
        path = save_figure(plot_steps(name, error.pictures, {}), out / f"{name}_steps.png")
        raise ValueError(f"{error}: {path}") from error


def _file_name(name: str, taken: set[str]) -> str:
    """A file name for a case, unlike those before it."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "case"
    unique, number = plain, 2
    while unique.lower() in taken:  # some systems do not tell cases apart
        unique, number = f"{plain}_{number}", number + 1
    taken.add(unique.lower())
    return unique
