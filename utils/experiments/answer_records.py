"""What `python -m utils predict` leaves in a file for each case."""

from __future__ import annotations

from typing import Any

from utils.core.parts import Part

NOT_CLINICAL = "Research code: not for clinical use."
#: Verdict on what could not be read; the others are the gate's.
UNREADABLE = "unreadable"


class FileAnswer(Part):
    """What is answered to attacked slices once they were written to a file and read again."""

    files: list[str]
    answer: str
    probability: float
    survives: bool


class Fragility(Part):
    """How small a change turned an answer around.

    Attributes:
        radius: of the smallest attack that did, an upper bound: a better attack may need less. None where none did.
        shown: the same in grey levels of 255.
        attack: title.
        tried: largest radius that was tried.
        answer, probability: after it.
        files: kind of file -> what is left of the attack in such a file.
    """

    radius: float | None
    shown: str
    attack: str
    tried: float
    answer: str = ""
    probability: float | None = None
    files: dict[str, FileAnswer] = {}


class SliceAnswer(Part):
    """One slice: its file, its distance to the nearest kept training slice, the gate's verdict, and probability."""

    file: str
    distance: float
    verdict: str
    probability: float | None = None


class Answer(Part):
    """What is said of one case.

    Attributes:
        verdict: of the gate, ``accepted``, ``doubtful`` or ``refused``; ``unreadable`` where there was nothing to
            judge.
        reason: why it is not accepted.
        answer: in words; None where refused.
        probability: of what is asked (of not being healthy, or of the answer itself), calibrated.
        threshold: from which the answer is that it is so; ``slice_threshold`` the same for single slices.
        classes: class -> calibrated probability.
        of_such: answers like this one on test patients: [how many, how many of them were right].
        of_such_patients: how many patients these are of; ``of_such_interval`` the 95 % interval of the share that was
            right, over patients.
        trained_on: how many of the slices are, pixel by pixel, among those that the model was trained on.
        in_tenth: test cases whose probability lies in the same tenth: [how many, how many were not healthy].
            None, like ``of_such``, where the image is refused or was trained on.
        members: title -> that probability by each member of a vote.
        heat_outside: share of the Grad-CAM map outside the brain.
    """

    case: str
    model: str
    files: list[str]
    kind: str
    verdict: str
    reason: str = ""
    notes: list[str]
    distance: float | None = None
    limit: float | None = None
    answer: str | None = None
    question: str = ""
    probability: float | None = None
    threshold: float | None = None
    slice_threshold: float | None = None
    classes: dict[str, float] = {}
    of_such: list[int] | None = None
    of_such_patients: int | None = None
    of_such_interval: list[float] | None = None
    trained_on: int = 0
    in_tenth: list[int] | None = None
    tested_on: str = ""
    members: dict[str, float] = {}
    fragility: Fragility | None = None
    heat_outside: float | None = None
    heat_of: str = ""
    slices: list[SliceAnswer] = []
    preparation: dict[str, Any] = {}
    warning: str = NOT_CLINICAL
    environment: dict[str, Any] = {}
