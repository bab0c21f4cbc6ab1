"""A bracket for each patient: what the smoothed answer is certified to bear, and where an attack turns it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import scipy  # loads its parts at their first use
import torch
from tqdm.auto import tqdm

from models.def_models import MRIClassifier
from utils.attacks.gradient import pgd
from utils.core.parts import Part
from utils.core.reproducibility import generator, seed_everything
from utils.data.sets import ImageSet
from utils.data.stacks import patient_stacks
from utils.evaluation.attacker import predict_batch
from utils.evaluation.by_patient import MeanOfSlices, Verdict
from utils.evaluation.metrics import best_threshold
from utils.evaluation.smoothing import ABSTAINS, Smoothed, certify, lower_bound, noisy_counts
from utils.experiments.atlas.bench import HARDENED, PLAIN, Bench, Whom, spread, whom
from utils.training.config import TrainConfig
from utils.training.loop import train
from utils.training.objectives import Noisy

#: Standard deviation of the noise on each pixel, and the probability that a certificate is too large.
SIGMA, ERROR = 0.1, 0.001
#: L2 lengths over all slices of a patient together that are tried, the smallest first.
RADII = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_RATE = 5e-4
#: Noisy copies of each validation patient that choose the threshold.
_COPIES = 8
#: Noisy copies through which the attack climbs, and those that judge it, at most.
_CLIMBED, _JUDGED = 4, 200


class Bracket(Part):
    """One patient.

    Attributes:
        ill: the truth.
        answer: certified answer, 0 healthy or 1 ill; -1 where none is certain.
        lower: certified L2 length.
        share: of the noisy copies that got the answer.
        upper: smallest length at which the attack turned the smoothed answer, certain but for ``ERROR`` over all
            lengths; None where none of ``RADII`` did.
    """

    ill: int
    answer: int
    lower: float
    share: float
    upper: float | None


class BracketFound(Part):
    """Patients, how the model was trained, and what its smoothed answers are worth.

    Attributes:
        certified: share of patients whose answer is certified and right.
        abstained: share of patients for whom no answer is certain.
    """

    whom: Whom
    sigma: float
    error: float
    samples: int
    noise_epochs: int
    threshold: float
    certified: float
    abstained: float
    patients: list[Bracket]

    @property
    def longest(self) -> float:
        """The certificate of a patient all of whose noisy copies get the same answer."""
        return self.sigma * float(scipy.stats.norm.ppf(lower_bound(self.samples, self.samples, self.error)))


def measure(bench: Bench) -> BracketFound:
    """Train on noise, certify, attack."""
    model = noise_trained(bench)
    models = {PLAIN: model, HARDENED: model}
    noisy = replace(bench, models=models, thresholds=dict.fromkeys(models, noisy_threshold(bench, model)))
    patients = noisy.questions().subset(spread(noisy.stacks.labels, min(bench.budget.certified, len(noisy.stacks))))
    verdict = noisy.verdict(PLAIN)
    found = [
        bench.piece("bracket", f"patient {place}", Bracket, partial(_bracket, noisy, verdict, patients, place))
        for place in tqdm(range(len(patients)), "brackets", leave=False)
    ]
    return BracketFound(
        whom=whom(bench),
        sigma=SIGMA,
        error=ERROR,
        samples=bench.budget.samples,
        noise_epochs=bench.budget.noise_epochs,
        threshold=noisy.thresholds[PLAIN],
        certified=sum(one.answer == one.ill for one in found) / len(found),
        abstained=sum(one.answer == ABSTAINS for one in found) / len(found),
        patients=found,
    )


def noisy_threshold(bench: Bench, model: MRIClassifier) -> float:
    """The threshold that is best for noisy copies of validation patients: noise moves a model's probabilities.

    That of clean slices would put all noisy ones on one side, and what always says the same is certified for nothing.
    """
    stacks = patient_stacks(bench.splits.validation, bench.budget.slices)
    ill = stacks.labels != bench.healthy
    if ill.all() or not ill.any():
        return 0.5
    patients, draws, chances = MeanOfSlices(model), generator(bench.seed, "noisy threshold"), []
    for place in range(len(stacks)):
        stack = stacks.pixels(slice(place, place + 1), bench.device)
        noise = torch.randn((_COPIES, *stack.shape[1:]), generator=draws).to(stack)
        chances.append(1 - predict_batch(patients, stack + SIGMA * noise).softmax(1)[:, bench.healthy].cpu())
    threshold = best_threshold(torch.cat(chances), ill.repeat_interleave(_COPIES))
    return min(max(threshold, 1e-3), 1 - 1e-3)


def noise_trained(bench: Bench) -> MRIClassifier:
    """The model that is not hardened, trained on with noise on every pixel."""
    seed_everything(bench.seed)
    model = copy.deepcopy(bench.models[PLAIN]).requires_grad_(True)
    config = TrainConfig(
        num_epochs=bench.budget.noise_epochs,
        batch_size=64,
        learning_rate=_RATE,
        slices_per_patient=8 if len(bench.splits.train) > 640 else 0,
        keep="last",
        precision="fp32",
        seed=bench.seed,
    )
    splits = replace(bench.splits, validation=bench.splits.validation.balanced_subset(256))
    kept = bench.pieces("bracket")
    known = kept.load("noise_trained")
    if known is None:
        train(model, splits, objective=Noisy(sigma=SIGMA), config=config)
        kept.save("noise_trained", model.state_dict())
    else:
        model.load_state_dict(known)
    return model.to(bench.device).eval().requires_grad_(False)


def _bracket(bench: Bench, verdict: Verdict, patients: ImageSet, place: int) -> Bracket:
    stack = patients.pixels(slice(place, place + 1), bench.device)
    draws = generator(bench.seed, "certify", int(patients.subjects[place]))
    size = max(1, 100 // stack.shape[1])
    sure = certify(verdict, stack, sigma=SIGMA, draws=draws, samples=bench.budget.samples, error=ERROR, batch_size=size)
    upper = None if sure.answer == ABSTAINS else _upper(bench, verdict, stack, sure.answer, size)
    return Bracket(
        ill=int(patients.labels[place]), answer=sure.answer, lower=sure.radius, share=sure.share, upper=upper
    )


def _upper(bench: Bench, verdict: Verdict, stack: torch.Tensor, answer: int, size: int) -> float | None:
    """The first length at which most noisy copies of the attacked patient certainly get another answer."""
    judged = min(_JUDGED, bench.budget.samples)
    smoothed = Smoothed(verdict, SIGMA, samples=_CLIMBED, seed=bench.seed).eval()
    label = torch.tensor([answer], device=stack.device)
    for eps in RADII:
        draws = generator(bench.seed, "bracket", eps)
        found = pgd(
            smoothed,
            stack,
            label,
            eps=eps,
            steps=bench.budget.steps,
            norm="l2",
            generator=draws,
            assume_checked=True,
        )
        counts = noisy_counts(verdict, found, sigma=SIGMA, samples=judged, draws=draws, batch_size=size)
        others = judged - int(counts[answer])
        if lower_bound(others, judged, ERROR / len(RADII)) > 0.5:
            return eps
    return None
