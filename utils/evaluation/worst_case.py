"""Attacked accuracy, measured one way for every notebook, table and record: the worst case of each image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.attacks.attack import Attack, describe
from utils.attacks.gradient import check_batch, check_logits, margin
from utils.attacks.suites import Threat
from utils.core.compiled import Compiled
from utils.core.modes import eval_mode
from utils.core.precision import autocast, uses_bf16
from utils.core.processes import rank, share_out, world_size
from utils.core.radii import check_eps, radius_label, warn_if_negligible
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attack_cache import AttackCache, cache_for

NEVER = -1
OnBroken = Callable[[torch.Tensor, torch.Tensor, int], None]
#: Up to this radius adversarial images are also scored after rounding to 8 bits, as a file would hold them.
ROUNDED_UP_TO = 2 / 255
#: An attack that fills its passes by itself gets so many batches at once, unless it has more starts anyway.
BATCHES_A_JOB = 2


@dataclass
class RobustnessCurve:
    """Robust accuracy over radii for one model and a set of attacks.

    An image is robust at a radius if it is right without attack and was broken neither there nor
    at any smaller radius, by any attack: a larger ball contains the smaller ones.

    Attributes:
        title: of the attacks together.
        attacks: budgets as plain values, each with its title, in the order they were run.
        threat: what the attacker may change, as plain values.
        epsilons: radii, ascending, the first 0.
        robust_accuracy: share of all images, 0..1, for each radius; the first is clean accuracy.
        rounded_accuracy: the same where only adversarial images count that still fool the model once rounded
            to 8 bits within the radius; None where that was not measured (above ``ROUNDED_UP_TO``, other threats).
        first_broken: for each image the index into ``epsilons`` at which it was first wrong (0:
            without attack), ``NEVER`` if it stood.
        broken_by: for each image the index into ``attacks`` of the one that broke it, ``NEVER`` if none did.
        n_images, n_subjects: how many.
        max_norm: largest size that a perturbation had at each radius, in the threat's norm.
        seconds: of all batches, those from the cache of an interrupted evaluation and of other processes too.
        first_rounded: int64 tensor N like ``first_broken``, for ``rounded_accuracy``. Not part of the record.
        logits: radii x N x K, float32, the model's answers to the worst image found at each radius: the one
            that broke it, or else the one that came closest. Not part of the record.
    """

    title: str
    attacks: list[dict[str, Any]]
    threat: dict[str, Any]
    epsilons: list[float]
    robust_accuracy: list[float]
    rounded_accuracy: list[float | None]
    first_broken: list[int] = field(repr=False)
    broken_by: list[int] = field(repr=False)
    n_images: int
    n_subjects: int
    max_norm: list[float]
    seconds: float
    first_rounded: torch.Tensor = field(repr=False, compare=False)
    logits: torch.Tensor = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {key: value for key, value in vars(self).items() if key not in ("first_rounded", "logits")}


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

    Raises:
        ValueError: a bad radius; an attack from a surrogate that is not given; ``known`` is of other images, radii or
            another threat, or of a model with other answers; labels, logits or images that
            :func:`utils.attacks.gradient.check_logits` or :func:`utils.attacks.gradient.check_batch` refuses.
        TypeError: a model in half precision.
    """
    attacks = [attack] if isinstance(attack, Attack) else list(attack)
    warn_if_negligible(epsilons, (threat or Threat()).norm)
    fixed = {"seed": seed, "batch_size": batch_size, "device": device, "precision": precision, "compiled": compiled}
    fixed |= {"known": known, "on_broken": on_broken}
    run = _Run(model, images, attacks, threat or Threat(), dict(surrogates or {}), **fixed)
    return run.curve(sorted({0.0, *(check_eps(eps, run.threat.norm) for eps in epsilons)}), title, cache)


@dataclass
class _Run:
    """One evaluation in progress: its settings, and what is known of each image so far."""

    model: nn.Module
    images: ImageSet
    attacks: list[Attack]
    threat: Threat
    surrogates: dict[str, nn.Module]
    seed: int
    batch_size: int
    device: torch.device | str
    precision: str
    compiled: bool
    known: RobustnessCurve | None
    on_broken: OnBroken | None

    def __post_init__(self) -> None:
        self.bf16 = uses_bf16(self.precision, self.device)
        missing = {attack.surrogate for attack in self.attacks} - {"", *self.surrogates}
        if not self.attacks or missing:
            raise ValueError(f"there is no attack, or its surrogate is not given: {', '.join(sorted(missing))}")
        first = torch.arange(min(len(self.images), 1))
        check_batch(self.model, self.threat.images(self.images, first, "cpu"), self.images.labels[first])
        models = {"": self.model, **self.surrogates}
        self.sources = {name: Compiled(model) if self.compiled else model for name, model in models.items()}

    def curve(self, radii: list[float], title: str, folder: Path | None) -> RobustnessCurve:
        self._start()
        self._check_known(radii)
        budgets = [*(self.known.attacks if self.known else []), *describe(self.attacks)]
        title = title or (budgets[0]["title"] if len(budgets) == 1 else "worst case")
        logits = [self.worst.clone()]
        # the total is what a model costs that nothing breaks; images that are broken already pass at once
        passes = len(self.images) * (len(radii) - 1) * sum(attack.passes for attack in self.attacks)
        with tqdm(total=passes, desc=title, unit="pass", unit_scale=True, leave=False, disable=rank() > 0) as bar:
            for step, eps in enumerate(radii[1:], start=1):
                self.norms.append(0.0)
                # its own for each radius: what is found there depends on the smaller ones and not on the larger
                self.cache = self._cache(folder, radii[: step + 1])
                self._recall(step)
                for number in range(len(self.attacks)):
                    self._attack_survivors(number, step, eps, bar)
                logits.append(self.worst.clone())
        return RobustnessCurve(
            title=title,
            attacks=budgets,
            threat=_described(self.threat),
            epsilons=radii,
            robust_accuracy=[share_standing(self.first_broken, step) for step in range(len(radii))],
            rounded_accuracy=[
                share_standing(self.first_rounded, step) if self._rounds(eps) else None
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
        if (known.epsilons, known.n_images, known.threat) != (radii, len(self.images), _described(self.threat)):
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

    def _cache(self, folder: Path | None, radii: list[float]) -> AttackCache:
        kind = torch.device(self.device).type + " bf16" * self.bf16 + " compiled" * self.compiled
        return cache_for(
            folder,
            model=self.model,
            surrogates=self.surrogates,
            images=self.images,
            attacks=describe(self.attacks),
            threat=self.threat.title,
            epsilons=radii,
            seed=self.seed,
            batch_size=self.batch_size,
            device=kind,
        )

    def _start(self) -> None:
        begun = time.perf_counter()
        parts = torch.arange(len(self.images)).split(self.batch_size)

        def answer(part: torch.Tensor) -> torch.Tensor:
            return predict_batch(self.model, self.threat.images(self.images, part, self.device)).cpu()

        self.worst = torch.cat(share_out(parts, answer))
        check_logits(self.worst, self.images.labels)
        for attack in self.attacks:
            attack.check_classes(self.worst.shape[1])
        self.first_broken = torch.where(self.worst.argmax(1) == self.images.labels, NEVER, 0)
        self.first_rounded = self.first_broken.clone()
        self.broken_by = torch.full_like(self.first_broken, NEVER)
        self.margin = margin(self.worst, self.images.labels)
        self.norms = [0.0]
        self.seconds = time.perf_counter() - begun

    def _rounds(self, eps: float) -> bool:
        return self.threat == Threat() and eps <= ROUNDED_UP_TO * (1 + 1e-9)

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
                with _counted(self._source(attack), bar, up_to=ends - attack.passes * left):
                    found = share_out(turn, work)
                for index, own in zip(turn, found):
                    self._note(own, index, number, step)
                robust = (self.first_broken == NEVER).float().mean()
                bar.set_postfix(eps=radius_label(eps, self.threat.norm), attack=attack.title, robust=f"{robust:.1%}")

    def _jobs(self, alive: torch.Tensor, attack: Attack) -> list[torch.Tensor]:
        """The images of each call, whatever the number of processes, so that all come to the same bits."""
        size = self.batch_size * (max(1, BATCHES_A_JOB // attack.restarts) if attack.refills else 1)
        return list(alive.tensor_split(-(-len(alive) // size))) if len(alive) else []

    def _source(self, attack: Attack) -> nn.Module:
        return self.sources[attack.surrogate]

    def _attack_once(
        self, index: torch.Tensor, *, attack: Attack, eps: float, number: tuple[int, int, int]
    ) -> dict[str, torch.Tensor]:
        """:meth:`_attack`, unless its result lies in the cache."""
        whose = hashlib.sha256(index.numpy()).hexdigest()[:16]
        name = "eps{}-attack{}-start{}".format(*number) + f"-{whose}"
        found = self.cache.load(name)
        if found is None:
            found = self._attack(attack, index, eps, number[-1])
            self.cache.save(name, found)
        return found

    def _attack(self, attack: Attack, index: torch.Tensor, eps: float, start: int) -> dict[str, torch.Tensor]:
        """Attack some images; what the model answers to the attacked ones, also once they are rounded."""
        begun = time.perf_counter()
        clean, labels = self.threat.images(self.images, index, self.device), self.images.labels[index].to(self.device)
        # drawn for each image by itself: it meets the same start whoever else stands and whatever ran before
        title = replace(attack, restarts=1).title
        draws = [generator(self.seed, eps, title, start, image) for image in index.tolist()]
        options = {"eps": eps, "norm": self.threat.norm, "batch_size": self.batch_size}
        attacked = self._attacked(attack, clean, labels, draws, options)
        size = self.threat.measure(attacked - clean)
        if size.max() > eps * (1 + 1e-4) + 1e-6:
            raise ValueError(f"{attack.title} left the ball: {size.max():.6f} is more than {eps:.6f}")
        found = {"logits": self._answers(self.model, attacked), "norm": size}
        if self._rounds(eps):
            found["rounded"] = self._answers(self.model, round_to_8_bits(attacked, clean, eps))
        found["broken"] = attacked[found["logits"].argmax(1) != labels]
        plain = {key: value.cpu() for key, value in found.items()}
        return plain | {"seconds": torch.tensor(time.perf_counter() - begun)}

    def _answers(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([predict_batch(model, part) for part in images.split(self.batch_size)])

    def _attacked(
        self, attack: Attack, clean: torch.Tensor, labels: torch.Tensor, draws: list, options: dict[str, Any]
    ) -> torch.Tensor:
        fast, plain = self._source(attack), self.surrogates.get(attack.surrogate, self.model)
        with autocast(self.precision, self.device):
            attacked = attack(fast, clean, labels, draws=draws, assume_checked=True, **options).clamp(0, 1)
            if not self.bf16 and not self.compiled:
                return attacked
            # an attack leaves an image at the first point where the program that it uses is fooled
            believed = self._answers(fast, attacked).argmax(1) != labels
        again = torch.nonzero(believed & (self._answers(plain, attacked).argmax(1) == labels))[:, 0]
        if len(again):
            draws = [draws[place] for place in again.tolist()]
            once_more = attack(plain, clean[again], labels[again], draws=draws, assume_checked=True, **options)
            attacked[again] = once_more.clamp(0, 1)
        return attacked

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


def _described(threat: Threat) -> dict[str, Any]:
    return {"title": threat.title, "norm": threat.norm, "size": threat.size}


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


def round_to_8_bits(attacked: torch.Tensor, clean: torch.Tensor, eps: float) -> torch.Tensor:
    """Attacked images as an 8-bit file would hold them, still within an L-infinity radius.

    Args:
        attacked, clean: N x C x H x W in [0, 1]; ``clean`` already has 8 bits.
        eps: radius in [0, 1]; below 1/255 nothing is left of the attack.
    """
    levels = int(255 * eps + 1e-6)
    return (clean + ((attacked - clean) * 255).round().clamp(-levels, levels) / 255).clamp(0, 1)


def share_standing(first_broken: torch.Tensor, step: int) -> float:
    """Share of images that stand all radii up to the one with index ``step``."""
    return ((first_broken == NEVER) | (first_broken > step)).double().mean().item()


def combine(curves: Sequence[RobustnessCurve], title: str = "worst case") -> RobustnessCurve:
    """The worst case of attacks that were run one by one on the same images and radii.

    Raises:
        ValueError: no curves, or curves over other images, radii or threats.
    """
    same = {(tuple(curve.epsilons), curve.n_images, str(curve.threat)) for curve in curves}
    if len(same) != 1:
        raise ValueError("only curves over the same images, radii and threat can be combined")
    radii = curves[0].epsilons
    when, who = _earliest(torch.tensor([curve.first_broken for curve in curves]))
    offsets = torch.tensor([0, *(len(curve.attacks) for curve in curves[:-1])]).cumsum(0)
    by = torch.tensor([curve.broken_by for curve in curves]).gather(0, who[None])[0]
    rounded, _ = _earliest(torch.stack([curve.first_rounded for curve in curves]))
    logits = torch.stack([curve.logits for curve in curves])
    return RobustnessCurve(
        title=title,
        attacks=[attack for curve in curves for attack in curve.attacks],
        threat=curves[0].threat,
        epsilons=radii,
        robust_accuracy=[share_standing(when, step) for step in range(len(radii))],
        rounded_accuracy=[
            None if known is None else share_standing(rounded, step)
            for step, known in enumerate(curves[0].rounded_accuracy)
        ],
        first_broken=when.tolist(),
        broken_by=torch.where(by == NEVER, NEVER, by + offsets[who]).tolist(),
        n_images=curves[0].n_images,
        n_subjects=curves[0].n_subjects,
        max_norm=[max(norms) for norms in zip(*(curve.max_norm for curve in curves))],
        seconds=sum(curve.seconds for curve in curves),
        first_rounded=rounded,
        logits=logits.gather(0, who[None, None, :, None].expand(1, *logits.shape[1:]))[0],
    )


def _earliest(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first radius that broke each image over the rows of ``steps``, C x N, and the row that did."""
    late = torch.iinfo(steps.dtype).max
    when, who = torch.where(steps == NEVER, late, steps).min(0)
    return torch.where(when == late, NEVER, when), who


@torch.no_grad()
def predict_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of one batch in eval mode, float32."""
    with eval_mode(model):
        return model(images).float()
