"""Ask a trained model about scans of one's own, and say how far to believe the answer.

    python -m utils predict SCAN --model EfficientNetB0 --out answers

First the gate: what is unlike every training slice gets no answer. Then the answer with the model's own measured error,
how small a change of the pixels turns it around, and where the model looked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.core.radii import radius_label
from utils.core.reproducibility import environment_facts
from utils.data.cases import Case
from utils.data.classes import healthy_class
from utils.data.slice_files import read_slices, write_slices
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.attacker import predict_batch
from utils.evaluation.by_patient import MeanOfSlices
from utils.evaluation.calibration import BINS, Calibration, Decision, Outcomes, question
from utils.evaluation.ensemble import Vote
from utils.evaluation.fragility import ATTACK, RADII, attack_answer, smallest_turn
from utils.evaluation.gate import REFUSED, Gate
from utils.experiments.answer_records import UNREADABLE, Answer, FileAnswer, Fragility, SliceAnswer
from utils.experiments.calibrate import weights_of
from utils.experiments.records import load_vote
from utils.grad_cam import grad_cam
from utils.training.checkpoints import load_checkpoint, read_record
from utils.training.record import VoteRecord

#: Pixels that are brighter belong to the brain.
_BRAIN = 10 / 255
#: A temperature from which log-odds say next to nothing; a share that is most.
_HARDLY_ORDERS, _MOSTLY = 10.0, 0.5


@dataclass
class Seen:
    """Pictures beside an answer, of its middle slice: H x W in [0, 1].

    Attributes:
        image: the slice; ``attacked`` the same after the smallest attack that turned the answer around, or None.
        heat: Grad-CAM, or None where nothing was answered.
        before, after: calibrated class probabilities.
        stack: all attacked slices, S x H x W.
    """

    image: np.ndarray | None = None
    attacked: np.ndarray | None = None
    heat: np.ndarray | None = None
    before: list[float] | None = None
    after: list[float] | None = None
    eps: float | None = None
    stack: np.ndarray | None = None


class Predictor:
    """A trained model or vote, its gate and what is known of its answers.

    Attributes:
        title: name of its folder.
        model: slices N x 1 x H x W in [0, 1] to logits N x K.
        members: title -> model; of a single model itself.
        shares: weight of each member.
    """

    def __init__(self, workspace: Workspace, folder: Path, *, device: torch.device | str | None = None) -> None:
        """Load a checkpoint's folder.

        Raises:
            FileNotFoundError: no checkpoint, gate or calibration there; the message says what to run.
            ValueError: one of them is damaged or of other weights.
        """
        record = read_record(folder)
        self.title, self.device = folder.name, torch.device(device or pick_device())
        self.gate = Gate.load(folder)
        self.calibration = Calibration.load(folder, weights_of(workspace, folder))
        self.model: nn.Module
        if isinstance(record, VoteRecord):
            vote: Vote = load_vote(workspace, record)
            self.model, self.shares = vote.to(self.device), vote.shares.tolist()
            self.members = dict(zip(record.vote.members, vote.members))
        else:
            self.model, self.shares = load_checkpoint(folder)[0].to(self.device), [1.0]
            self.members = {folder.name: self.model}
        self.classes = self.calibration.classes
        healthy = healthy_class(self.classes)
        self.healthy = None if healthy is None else self.classes.index(healthy)

    def outcomes(self, case: Case) -> Outcomes:
        """What is known of answers about such cases."""
        return self.calibration.of(case.whole)

    def chances(self, logits: torch.Tensor, known: Outcomes) -> torch.Tensor:
        """Calibrated probabilities N x K."""
        return known.chances(logits, self.healthy)

    def asked(self, chances: torch.Tensor) -> torch.Tensor:
        """Probability of not being healthy, or of the likeliest class, N."""
        return chances.amax(1) if self.healthy is None else 1 - chances[:, self.healthy]


def answer_case(
    predictor: Predictor, case: Case, *, attack: bool = True, heat: bool = True, force: bool = False, seed: int = 0
) -> tuple[Answer, Seen]:
    """The answer about a case, and its pictures.

    Args:
        attack: look for the smallest attack that turns the answer around.
        heat: explain it by Grad-CAM.
        force: answer what the gate refuses, too; it stays marked as refused.
        seed: of the attack's random starts.
    """
    told: dict[str, Any] = {
        "case": case.name,
        "model": predictor.title,
        "files": case.files,
        "kind": "patient" if case.whole else "slice",
        "notes": [*case.notes, *([predictor.calibration.note] if predictor.calibration.note else [])],
        "preparation": case.facts,
        "environment": environment_facts(),
    }
    if case.problem:
        return Answer(**told, verdict=UNREADABLE, reason=case.problem), Seen()
    images = case.images.float() / 255
    told |= _gated(predictor.gate, images, case)
    told["trained_on"] = int(predictor.gate.among_training(case.images).sum())
    seen = Seen(image=images[_middle(images), 0].numpy())
    if told["verdict"] == REFUSED and not force:
        return Answer(**told), seen
    told["slices"] = _by_slice(predictor, images, told["slices"])
    told |= _answered(predictor, predictor.outcomes(case), images, seen, attack=attack, seed=seed)
    if heat:
        title, member = _leading(predictor)
        middle = images[_middle(images)][None].to(predictor.device)
        seen.heat = grad_cam(member, middle)[0]
        told |= {"heat_of": title, "heat_outside": _outside(seen.heat, middle[0, 0].cpu().numpy())}
    told["notes"] += _warnings(told, predictor.outcomes(case))
    if told["verdict"] == REFUSED or told["trained_on"]:
        # measured on slices that the gate lets in, of people that the model had never seen
        told |= dict.fromkeys(("of_such", "of_such_patients", "of_such_interval", "in_tenth"))
    return Answer(**told), seen


def _warnings(told: Mapping[str, Any], known: Outcomes) -> list[str]:
    """What makes an answer worth less than it looks."""
    found = []
    if told["verdict"] == REFUSED:
        found.append("The gate refuses this image: nothing that was measured of answers holds for this one.")
    if told["trained_on"]:
        which = "this very slice" if told["kind"] == "slice" else f"{told['trained_on']} of these slices"
        found.append(
            f"The model was trained on {which} and may know the answer by heart: nothing that was measured on other "
            "people holds for it."
        )
    if known.temperature >= _HARDLY_ORDERS:
        found.append(
            f"This model hardly tells {told['kind']}s apart: its probabilities all lie near the share of the ill."
        )
    if told.get("heat_outside", 0.0) > _MOSTLY:
        found.append("Most of what weighed for the answer lies outside the brain.")
    return found


def attacked_at(
    predictor: Predictor, case: Case, answer: Answer, seen: Seen, eps: float, *, seed: int = 0
) -> tuple[Answer, Seen]:
    """An answer and its pictures with an attack within a radius of one's choice instead of the smallest.

    Args:
        answer, seen: of :func:`answer_case`; they are left as they are.
        eps: radius in [0, 1].
    """
    if answer.answer is None:
        return answer, seen
    known, images = predictor.outcomes(case), case.images.float() / 255
    stacks = images[:, 0][None].to(predictor.device)
    found = attack_answer(_decision(predictor, known, MeanOfSlices(predictor.model)), stacks, eps, seed=seed)
    told = _bears(eps) if found is None else _turned(predictor, known, found, eps)
    shown = replace(seen, attacked=None, after=None, stack=None)
    if found is not None:
        _show_attacked(shown, predictor, known, found, eps)
    return answer.model_copy(update={"fragility": told}), shown


def exported(
    predictor: Predictor, case: Case, answer: Answer, seen: Seen, folder: Path, kinds: Sequence[str]
) -> Answer:
    """Write the attacked slices of an answer as files, and tell what is answered once these are read again.

    Args:
        folder: for the files, whose names begin with the case's.
        kinds: keys of :data:`utils.data.slice_files.KINDS`.

    Returns:
        the answer with these answers in it; as it was where no attack turned it around.
    """
    if answer.fragility is None or seen.stack is None:
        return answer
    known, files = predictor.outcomes(case), {}
    for kind in kinds:
        written = write_slices(seen.stack, folder / f"{kind}_attacked", kind)
        stacks = torch.from_numpy(read_slices(written, kind))[None].to(predictor.device)
        logits = _of(predictor.model, stacks)
        told = _said(predictor, known, logits, predictor.chances(logits, known))
        files[kind] = FileAnswer(
            files=[file.name for file in written],
            answer=told["answer"],
            probability=told["probability"],
            survives=told["answer"] != answer.answer,
        )
    return answer.model_copy(update={"fragility": answer.fragility.model_copy(update={"files": files})})


def _answered(
    predictor: Predictor, known: Outcomes, images: torch.Tensor, seen: Seen, *, attack: bool, seed: int
) -> dict[str, Any]:
    """Answer, members and attack; their pictures go into ``seen``."""
    stacks = images[:, 0][None].to(predictor.device)
    logits = _of(predictor.model, stacks)
    chances = predictor.chances(logits, known)
    told = _said(predictor, known, logits, chances)
    seen.before = chances[0].tolist()
    if len(predictor.members) > 1:
        told["members"] = {
            title: _rounded(predictor.asked(predictor.chances(_of(member, stacks), known))[0])
            for title, member in predictor.members.items()
        }
    if attack:
        told["fragility"], attacked = _fragility(predictor, known, stacks, seed)
        if attacked is not None:
            _show_attacked(seen, predictor, known, attacked, told["fragility"].radius)
    return told


def _show_attacked(seen: Seen, predictor: Predictor, known: Outcomes, attacked: torch.Tensor, eps: float) -> None:
    """Put attacked slices, 1 x S x H x W, and what is answered to them among the pictures."""
    seen.stack, seen.eps = attacked[0].cpu().numpy(), eps
    seen.attacked = seen.stack[_middle(attacked[0])]
    seen.after = predictor.chances(_of(predictor.model, attacked), known)[0].tolist()


def _gated(gate: Gate, images: torch.Tensor, case: Case) -> dict[str, Any]:
    """The gate's verdict on each slice, and on the case by its middle one in the order of distances."""
    verdict, reason, distances = gate.of_case(images)
    slices = [
        SliceAnswer(file=name, distance=_rounded(distance), verdict=gate.verdict(float(distance)))
        for name, distance in zip(_slice_names(case), distances)
    ]
    told = {"verdict": verdict, "distance": _rounded(distances.median()), "limit": gate.refused, "slices": slices}
    return told | ({"reason": reason} if reason else {})


def _slice_names(case: Case) -> Sequence[str]:
    if len(case.files) == len(case.images):
        return case.files
    levels = case.facts.get("levels_mm", range(len(case.images)))
    return [f"{level:g} mm" for level in levels]


def _said(predictor: Predictor, known: Outcomes, logits: torch.Tensor, chances: torch.Tensor) -> dict[str, Any]:
    """The answer, and how such answers turned out."""
    asked, probability = question(predictor.classes), float(predictor.asked(chances)[0])
    own = {
        "probability": _rounded(probability),
        "threshold": known.threshold,
        "slice_threshold": predictor.calibration.slice.threshold,
        "classes": {name: _rounded(chance) for name, chance in zip(predictor.classes, chances[0])},
        "tested_on": predictor.calibration.source,
    }
    if asked is None or predictor.healthy is None or known.threshold is None:
        answer = predictor.classes[int(chances[0].argmax())]
        return own | {"answer": answer, "question": "class"} | _of_such(known, answer)
    answer = asked[int(_decision(predictor, known)(logits)[0].argmax())]
    tenth = min(int(probability * BINS), BINS - 1)
    return (
        own
        | {
            "answer": answer,
            "question": asked[1],
            "in_tenth": known.tested[tenth] if known.tested else None,
        }
        | _of_such(known, answer)
    )


def _of_such(known: Outcomes, answer: str) -> dict[str, Any]:
    """How such an answer turned out on test patients."""
    return {
        "of_such": known.right.get(answer),
        "of_such_patients": known.patients.get(answer),
        "of_such_interval": known.bounds.get(answer),
    }


def _decision(predictor: Predictor, known: Outcomes, model: nn.Module | None = None) -> nn.Module:
    """``model`` (None takes logits as they are) as one whose larger logit is the answer."""
    inner = model or nn.Identity()
    if predictor.healthy is None or known.threshold is None:
        return inner
    decision = Decision(inner, predictor.healthy, known.cut)
    return decision.to(predictor.device) if model else decision


def _by_slice(predictor: Predictor, images: torch.Tensor, slices: list[SliceAnswer]) -> list[SliceAnswer]:
    known = predictor.calibration.slice
    with torch.no_grad():
        logits = torch.cat(
            [predict_batch(predictor.model, part.to(predictor.device)).cpu() for part in images.split(32)]
        )
    chances = predictor.asked(predictor.chances(logits, known))
    return [own.model_copy(update={"probability": _rounded(chance)}) for own, chance in zip(slices, chances)]


def _of(model: nn.Module, stacks: torch.Tensor) -> torch.Tensor:
    return predict_batch(MeanOfSlices(model), stacks).cpu()


def _fragility(
    predictor: Predictor, known: Outcomes, stacks: torch.Tensor, seed: int
) -> tuple[Fragility, torch.Tensor | None]:
    """How small an attack turned the answer around, and the attacked slices, 1 x S x H x W."""
    model = _decision(predictor, known, MeanOfSlices(predictor.model))
    eps, attacked = smallest_turn(model, stacks, seed=seed)
    if eps is None or attacked is None:
        return _bears(RADII[-1]), None
    return _turned(predictor, known, attacked, eps), attacked


def _bears(tried: float) -> Fragility:
    """No attack up to ``tried`` turned the answer around."""
    return Fragility(radius=None, shown=f"above {radius_label(tried)}", attack=ATTACK.title, tried=tried)


def _turned(predictor: Predictor, known: Outcomes, attacked: torch.Tensor, eps: float) -> Fragility:
    """What is answered to attacked slices."""
    logits = _of(predictor.model, attacked)
    turned = _said(predictor, known, logits, predictor.chances(logits, known))
    return Fragility(
        radius=eps,
        shown=radius_label(eps),
        attack=ATTACK.title,
        tried=RADII[-1],
        answer=turned["answer"],
        probability=turned["probability"],
    )


def _leading(predictor: Predictor) -> tuple[str, MRIClassifier]:
    """The member with the largest weight, the first of several."""
    place = int(np.argmax(predictor.shares))
    title = list(predictor.members)[place]
    return title, predictor.members[title]  # type: ignore[return-value]


def _outside(heat: np.ndarray, image: np.ndarray) -> float:
    return _rounded(heat[image <= _BRAIN].sum() / max(float(heat.sum()), 1e-9))


def _middle(images: torch.Tensor) -> int:
    return len(images) // 2


def _rounded(value: Any) -> float:
    return round(float(value), 4)
