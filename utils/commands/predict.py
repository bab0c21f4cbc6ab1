"""Answers about scans of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from utils.commands.boundary import command
from utils.core.paths import atomic_write, check_writable, write_json
from utils.data.cases import Case, Reading, read_cases
from utils.data.scans.standard import Stripping
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
    model: str = "EfficientNetB0",
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

    Each case leaves a PNG and a JSON in --out; several leave answers.csv and answers.png, too. What is unlike every
    training slice gets no answer.

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
    workspace = Workspace.open(str(root or ""))
    check_writable(out / TABLE)
    predictor = Predictor(workspace, checkpoint_folder(model if Path(model).is_dir() else workspace.checkpoint(model)))
    reading = Reading(
        predictor.gate.shape,
        fit=fit,
        together=together,
        stripping=Stripping(mask=mask, stripped=stripped),
        modality=modality,
    )
    found: list[tuple[Answer, Seen]] = []
    names: set[str] = set()
    for case in read_cases(source, reading):
        answer, seen = answer_case(predictor, case, attack=attack == "quick", force=force, seed=seed)
        stem = out / _file_name(case.name, names)
        if export:
            answer = exported(predictor, case, answer, seen, Path(f"{stem}_attacked"), export)
        _write(stem, case, answer, seen, predictor.classes)
        found.append((answer, seen))
        print(f"{answer.case}: " + " ".join(told(answer)), flush=True)
    if len(found) > 1:
        table = answers_table([answer for answer, _ in found])
        atomic_write(out / TABLE, lambda path: table.to_csv(path, index=False))
        print(save_figure(plot_sheet(found), out / SHEET))
    print(NOT_CLINICAL)
    return 0 if any(answer.answer for answer, _ in found) else 1


def _write(stem: Path, case: Case, answer: Answer, seen: Seen, classes: list[str]) -> None:
    write_json(Path(f"{stem}.json"), answer.plain())
    if case.pictures:
        save_figure(plot_steps(case.name, case.pictures, case.facts), Path(f"{stem}_steps.png"))
    print(save_figure(plot_answer(answer, seen, classes), Path(f"{stem}.png")))


def _file_name(name: str, taken: set[str]) -> str:
    """A file name for a case, unlike those before it."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "case"
    unique, number = plain, 2
    while unique in taken:
        unique, number = f"{plain}_{number}", number + 1
    taken.add(unique)
    return unique
