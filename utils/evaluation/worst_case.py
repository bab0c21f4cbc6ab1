"""Attacked accuracy, measured one way for every notebook, table and record: the worst case of each image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.attacks.attack import Attack, describe
from utils.attacks.given import check_batch, check_logits
from utils.attacks.gradient import margin
from utils.attacks.suites import Threat
from utils.core.paths import file_digest
from utils.core.processes import rank, share_out, world_size
from utils.core.radii import check_eps, radius_label, warn_if_negligible
from utils.data.sets import ImageSet
from utils.evaluation.attack_cache import AttackCache, describe_images, describe_subject
from utils.evaluation.attacker import Attacker
from utils.evaluation.curve import NEVER, AttackRun, RobustnessCurve, ThreatFacts, share_robust

OnBroken = Callable[[torch.Tensor, torch.Tensor, int], None]
#: An attack that fills its passes by itself gets so many batches at once, unless it has more starts anyway.
BATCHES_A_JOB = 2


def robustness_curve(
    model: nn.Module,
    images: ImageSet,
    *,
    attack: Attack | Sequence[Attack],
    epsilons: Sequence[float],
    threat: Threat | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    title: str = "",
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    cache: Path | None = None,
    known: RobustnessCurve | None = None,
    on_broken: OnBroken | None = None,
    fit_on: ImageSet | None = None,
    within: torch.Tensor | None = None,
) -> RobustnessCurve:
    """Run attacks at growing radii, each only on what no earlier attack and no smaller radius has broken.

    Every adversarial image is judged by ``model`` itself in eval mode and full precision, whatever made it. Several
    processes share the batches and all return the curve that one would.

    Args:
        attack: one, or several in the order to run them.
        epsilons: radii; 0 is added and the order does not matter.
        threat: None is L-infinity on the grey image.
        surrogates: name -> model for attacks that use another model's gradient.
        title: of the attacks together; "" takes the only attack's own, or "worst case".
        seed: of the random starts.
        batch_size: images a batch.
        precision: of the attacks' passes, see :mod:`utils.core.precision`; where they think that they fooled the model
            and float32 says no, they are made again in float32.
        compiled: attack by way of :class:`utils.core.compiled.Compiled`, which needs a C++ compiler (on a GPU, Triton).
        cache: folder for finished batches, from which a killed evaluation goes on; None keeps nothing.
        known: what other attacks found on the same model, images and radii: only what they left is attacked, and the
            curve is the worst case of theirs and these.
        on_broken: called with the indices of images that were just broken, the images that broke them, and the
            index of the radius.
        fit_on: images of other patients, for attacks that are first fitted on some.
        within: where each image may be changed, bool N x 1 x H x W; None where everywhere.

    Raises:
        ValueError: a bad radius; an attack that :meth:`utils.evaluation.attacker.Attacker.check` refuses, or from a
            surrogate that is not given; ``known`` is of
            other images, radii or another threat, or of a model with other answers; labels, logits or images that
            :func:`utils.attacks.gradient.check_logits` or :func:`utils.attacks.gradient.check_batch` refuses; a
            ``within`` of another shape or type.
        TypeError: a model in half precision.
    """
    attacks = [attack] if isinstance(attack, Attack) else list(attack)
    warn_if_negligible(epsilons, (threat or Threat()).norm)
    attacker = Attacker(
        model,
        images,
        threat or Threat(),
        dict(surrogates or {}),
        seed,
        batch_size,
        device,
        precision,
        compiled,
        fit_on,
        within,
        cache,
    )
    run = _Run(attacker, attacks, known, on_broken)
    return run.curve(sorted({0.0, *(check_eps(eps, attacker.threat.norm) for eps in epsilons)}), title, cache)


@dataclass
class _Run:
    """One evaluation in progress: its settings, and what is known of each image so far."""

    attacker: Attacker
    attacks: list[Attack]
    known: RobustnessCurve | None
    on_broken: OnBroken | None

    def __post_init__(self) -> None:
        missing = {attack.surrogate for attack in self.attacks} - {"", *self.attacker.surrogates}
        if not self.attacks or missing:
            raise ValueError(f"there is no attack, or its surrogate is not given: {', '.join(sorted(missing))}")
        self.images, self.threat = self.attacker.images, self.attacker.threat
        for attack in self.attacks:
            self.attacker.check(attack)
        first = torch.arange(min(len(self.images), 1))
        check_batch(self.attacker.model, self.threat.images(self.images, first, "cpu"), self.images.labels[first])

    def curve(self, radii: list[float], title: str, folder: Path | None) -> RobustnessCurve:
        self._start()
        self._check_known(radii)
        budgets = [AttackRun(**own) for own in describe(self.attacks)]
        budgets = [*(self.known.attacks if self.known else []), *budgets]
        title = title or (budgets[0].title if len(budgets) == 1 else "worst case")
        logits, settings = [self.worst.clone()], self._settings(folder)
        # the total is what a model costs that nothing breaks; images that are broken already pass at once
        passes = len(self.images) * (len(radii) - 1) * sum(attack.passes for attack in self.attacks)
        with tqdm(total=passes, desc=title, unit="pass", unit_scale=True, leave=False, disable=rank() > 0) as bar:
            for step, eps in enumerate(radii[1:], start=1):
                self.norms.append(0.0)
                # its own for each radius: what is found there depends on the smaller ones and not on the larger
                self.cache = AttackCache(folder, settings | {"epsilons": radii[: step + 1]})
                self._recall(step)
                for number in range(len(self.attacks)):
                    self._attack_survivors(number, step, eps, bar)
                logits.append(self.worst.clone())
        return RobustnessCurve(
            title=title,
            attacks=budgets,
            threat=ThreatFacts(**self.threat.as_dict()),
            epsilons=radii,
            robust_accuracy=[share_robust(self.first_broken, step) for step in range(len(radii))],
            rounded_accuracy=[
                share_robust(self.first_rounded, step) if self.attacker.rounds(eps) else None
                for step, eps in enumerate(radii)
            ],
            first_broken=self.first_broken.tolist(),
            broken_by=self.broken_by.tolist(),
            n_images=len(self.images),
            n_subjects=len(self.images.subjects.unique()),
            max_norm=self.norms,
            seconds=self.seconds,
            first_rounded=self.first_rounded,
            logits=torch.stack(logits),
        )

    def _check_known(self, radii: list[float]) -> None:
        if (known := self.known) is None:
            return
        if (known.epsilons, known.n_images, known.threat.plain()) != (radii, len(self.images), self.threat.as_dict()):
            raise ValueError("what is known was measured on other images, at other radii or of another threat")
        if not torch.equal(known.logits[0].argmax(1), self.worst.argmax(1)):
            raise ValueError("what is known was measured of another model or on other images")
        self.seconds += known.seconds

    def _recall(self, step: int) -> None:
        """Take over what is known of a radius; what broke there needs no attack."""
        if (known := self.known) is None:
            return
        standing = self.first_broken == NEVER
        broken = standing & (torch.tensor(known.first_broken) == step)
        reached = margin(known.logits[step], self.images.labels)
        closer = broken | (standing & (reached > self.margin))
        self.margin[closer], self.worst[closer] = reached[closer], known.logits[step][closer]
        self.first_broken[broken], self.broken_by[broken] = step, torch.tensor(known.broken_by)[broken]
        self.first_rounded[(self.first_rounded == NEVER) & (known.first_rounded == step)] = step
        self.norms[step] = known.max_norm[step]

    def _settings(self, folder: Path | None) -> dict[str, Any]:
        """All that the numbers depend on but the radii, told once: digests of large models take their time."""
        if folder is None:
            return {}
        told = describe_subject(self.attacker.model, self.attacker.surrogates, self.images)
        if self.attacker.fit_on is not None and any(attack.kind.fits for attack in self.attacks):
            told["fit_on"] = describe_images(self.attacker.fit_on)
        if self.attacker.within is not None:
            told["within"] = hashlib.sha256(self.attacker.within.contiguous().numpy().data).hexdigest()[:16]
        return told | {
            "attacks": describe(self.attacks),
            "files": [file_digest(path) for attack in self.attacks for path in attack.kind.files(attack.options)],
            "threat": self.threat.title,
            "seed": self.attacker.seed,
            "batch_size": self.attacker.batch_size,
            "device": self.attacker.program,
        }

    def _start(self) -> None:
        begun = time.perf_counter()
        parts = torch.arange(len(self.images)).split(self.attacker.batch_size)
        self.worst = torch.cat(share_out(parts, self.attacker.clean_answers))
        check_logits(self.worst, self.images.labels)
        for attack in self.attacks:
            attack.check_classes(self.worst.shape[1])
        self.first_broken = torch.where(self.worst.argmax(1) == self.images.labels, NEVER, 0)
        self.first_rounded = self.first_broken.clone()
        self.broken_by = torch.full_like(self.first_broken, NEVER)
        self.margin = margin(self.worst, self.images.labels)
        self.norms = [0.0]
        self.seconds = time.perf_counter() - begun

    def _attack_survivors(self, number: int, step: int, eps: float, bar: tqdm) -> None:
        for start, attack in enumerate(self.attacks[number].rounds()):
            alive = torch.nonzero(self.first_broken == NEVER)[:, 0]
            ends = bar.n + attack.passes * len(self.images)
            bar.update(attack.passes * (len(self.images) - len(alive)))
            jobs = self._jobs(alive, attack)
            # in rounds of one job a process, so that the progress shows
            for begin in range(0, len(jobs), world_size()):
                turn = jobs[begin : begin + world_size()]
                work = partial(self._attack_once, attack=attack, eps=eps, number=(step, number, start))
                left = sum(len(index) for index in jobs[begin + world_size() :])
                # as many as if nothing had been broken, which is what the total counts
                with _counted(self.attacker.source(attack), bar, up_to=ends - attack.passes * left):
                    found = share_out(turn, work)
                for index, own in zip(turn, found):
                    self._note(own, index, number, step)
                robust = (self.first_broken == NEVER).float().mean()
                bar.set_postfix(eps=radius_label(eps, self.threat.norm), attack=attack.title, robust=f"{robust:.1%}")

    def _jobs(self, alive: torch.Tensor, attack: Attack) -> list[torch.Tensor]:
        """The images of each call, whatever the number of processes, so that all come to the same bits."""
        size = self.attacker.batch_size * (max(1, BATCHES_A_JOB // attack.restarts) if attack.refills else 1)
        return list(alive.tensor_split(-(-len(alive) // size))) if len(alive) else []

    def _attack_once(
        self, index: torch.Tensor, *, attack: Attack, eps: float, number: tuple[int, int, int]
    ) -> dict[str, torch.Tensor]:
        """:meth:`Attacker.attack`, unless its result lies in the cache."""
        whose = hashlib.sha256(index.numpy().data).hexdigest()[:16]
        name = "eps{}-attack{}-start{}".format(*number) + f"-{whose}"
        found = self.cache.load(name)
        if found is None:
            found = self.attacker.attack(attack, index, eps, number[-1])
            self.cache.save(name, found)
        return found

    def _note(self, found: dict[str, torch.Tensor], index: torch.Tensor, number: int, step: int) -> None:
        labels = self.images.labels[index]
        reached = margin(found["logits"], labels)
        fooled = found["logits"].argmax(1) != labels
        closer = fooled | (reached > self.margin[index])
        self.margin[index] = torch.where(closer, reached, self.margin[index])
        self.worst[index] = torch.where(closer[:, None], found["logits"], self.worst[index])
        before = len(self.known.attacks) if self.known else 0
        self.first_broken[index[fooled]], self.broken_by[index[fooled]] = step, before + number
        self.seconds += found["seconds"].item()
        self.norms[step] = max(self.norms[step], found["norm"].max().item())
        if "rounded" in found:
            wrong = (found["rounded"].argmax(1) != labels) & (self.first_rounded[index] == NEVER)
            self.first_rounded[index[wrong]] = step
        if self.on_broken is not None and fooled.any():
            self.on_broken(index[fooled], found["broken"], step)


@contextmanager
def _counted(model: nn.Module, bar: tqdm, *, up_to: int) -> Iterator[None]:
    """Move the bar with each image and each gradient that ``model`` computes, and at the end to ``up_to``."""

    def watch(_: nn.Module, given: tuple[torch.Tensor], answer: torch.Tensor) -> None:
        bar.update(min(len(answer) * (2 if answer.requires_grad else 1), up_to - bar.n))

    handle = model.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
    bar.update(up_to - bar.n)
