"""One call of one attack on some images, judged by the model itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from utils.attacks.attack import Attack, Terms
from utils.attacks.given import as_logits
from utils.attacks.suites import Threat
from utils.core.compiled import Compiled
from utils.core.modes import eval_mode
from utils.core.precision import autocast, uses_bf16
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attack_cache import AttackCache, describe_images, describe_module

#: Up to this radius adversarial images are also scored after rounding to 8 bits, as a file would hold them.
ROUNDED_UP_TO = 2 / 255


@dataclass
class Attacker:
    """A model, its images and how they are attacked.

    Attributes:
        surrogates: name -> model for attacks that use another model's gradient.
        precision: of the attacks' passes; answers are always judged in float32.
        compiled: attack by way of :class:`utils.core.compiled.Compiled`.
        fit_on: images for attacks that are fitted first; None where there is no such attack.
        within: where each image may be changed, bool N x 1 x H x W; None where everywhere.
        cache: folder for what attacks that are fitted learnt.
    """

    model: nn.Module
    images: ImageSet
    threat: Threat
    surrogates: Mapping[str, nn.Module]
    seed: int
    batch_size: int
    device: torch.device | str
    precision: str
    compiled: bool
    fit_on: ImageSet | None = None
    within: torch.Tensor | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        self._fitted: dict[tuple[Attack, float, int], torch.Tensor] = {}
        self._check_within()
        self.bf16 = uses_bf16(self.precision, self.device)
        models = {"": self.model, **self.surrogates}
        # taken before anything watches the models, which would count as a part of them
        keeps = self.cache is not None and self.fit_on is not None
        self._digests = {name: describe_module(model) for name, model in models.items() if keeps}
        self._sources = {name: Compiled(model) if self.compiled else model for name, model in models.items()}

    @property
    def program(self) -> str:
        """What computes the attacks, in words."""
        return torch.device(self.device).type + " bf16" * self.bf16 + " compiled" * self.compiled

    def source(self, attack: Attack) -> nn.Module:
        """The model whose gradient an attack uses."""
        return self._sources[attack.surrogate]

    def rounds(self, eps: float) -> bool:
        """Whether what is left after rounding to 8 bits is measured."""
        return self.threat == Threat() and eps <= ROUNDED_UP_TO * (1 + 1e-9)

    def clean_answers(self, index: torch.Tensor) -> torch.Tensor:
        """Logits without attack, on the CPU."""
        return predict_batch(self.model, self.threat.images(self.images, index, self.device)).cpu()

    def attack(self, attack: Attack, index: torch.Tensor, eps: float, start: int) -> dict[str, torch.Tensor]:
        """Attack some images; what the model answers to the attacked ones, also once they are rounded."""
        begun = time.perf_counter()
        clean, labels = self.threat.images(self.images, index, self.device), self.images.labels[index].to(self.device)
        # drawn for each image by itself: it meets the same start whoever else is attacked and whatever ran before
        title = replace(attack, restarts=1).title
        draws = [generator(self.seed, eps, title, start, image) for image in index.tolist()]
        within = None if self.within is None else self.within[index].to(clean)
        attacked = self._attacked(attack, clean, labels, draws, eps, self._fit(attack, eps, start), within)
        size = self.threat.measure(attacked - clean)
        if size.max() > eps * (1 + 1e-4) + 1e-6:
            raise ValueError(f"{attack.title} left the ball: {size.max():.6f} is more than {eps:.6f}")
        if within is not None and ((attacked != clean) & (within == 0)).any():
            raise ValueError(f"{attack.title} changed pixels outside of the part that it may change")
        found = {"logits": self._answers(self.model, attacked), "norm": size}
        if self.rounds(eps):
            found["rounded"] = self._answers(self.model, round_to_8_bits(attacked, clean, eps))
        found["broken"] = attacked[found["logits"].argmax(1) != labels]
        plain = {key: value.cpu() for key, value in found.items()}
        return plain | {"seconds": torch.tensor(time.perf_counter() - begun)}

    def check(self, attack: Attack) -> None:
        """Refuse, before any work, an attack that cannot run here.

        Raises:
            ValueError: another norm; an attack that is fitted first, without images for it or on enlarged ones; one
                that cannot stay within a part, where there is one.
        """
        attack.check_norm(self.threat.norm)
        attack.check_within(self.within)
        if attack.kind.fits and self.fit_on is None:
            raise ValueError(f"{attack.title!r} is first fitted on images that are not attacked: name them as fit_on")
        if attack.kind.fits and self.threat.size is not None:
            raise ValueError(f"{attack.title!r} is fitted on grey images at their own size, not on {self.threat.title}")

    def _fit(self, attack: Attack, eps: float, start: int) -> torch.Tensor | None:
        """What the attack learns, once for each radius and start."""
        if self.fit_on is None or not attack.kind.fits:
            return None
        key = (attack, eps, start)
        if key not in self._fitted:
            model = self.surrogates.get(attack.surrogate, self.model)
            seed = self.seed + start
            self._fitted[key] = learnt(
                attack,
                model,
                self.fit_on,
                eps,
                norm=self.threat.norm,
                seed=seed,
                device=self.device,
                cache=self.cache,
                digest=self._digests.get(attack.surrogate, ""),
            )
        return self._fitted[key]

    def _check_within(self) -> None:
        if self.within is None:
            return
        wanted = (len(self.images), 1, *self.images.images.shape[-2:])
        if self.within.dtype != torch.bool or self.within.shape != wanted or self.threat.size is not None:
            told = f"{self.within.dtype} {tuple(self.within.shape)} on {self.threat.title}"
            raise ValueError(f"within must be bool, {' x '.join(map(str, wanted))} on grey images, not {told}")

    def _answers(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([predict_batch(model, part) for part in images.split(self.batch_size)])

    def _attacked(
        self,
        attack: Attack,
        clean: torch.Tensor,
        labels: torch.Tensor,
        draws: Sequence[torch.Generator],
        eps: float,
        fitted: torch.Tensor | None,
        within: torch.Tensor | None,
    ) -> torch.Tensor:
        fast, plain = self.source(attack), self.surrogates.get(attack.surrogate, self.model)
        with autocast(self.precision, self.device):
            attacked = self._run(attack, fast, clean, labels, draws, eps, fitted, within)
            if not self.bf16 and not self.compiled:
                return attacked
            # an attack leaves an image at the first point where the program that it uses is fooled
            believed = self._answers(fast, attacked).argmax(1) != labels
        again = torch.nonzero(believed & (self._answers(plain, attacked).argmax(1) == labels))[:, 0]
        if len(again):
            draws = [draws[place] for place in again.tolist()]
            part = None if within is None else within[again]
            attacked[again] = self._run(attack, plain, clean[again], labels[again], draws, eps, fitted, part)
        return attacked

    def _run(
        self,
        attack: Attack,
        model: nn.Module,
        clean: torch.Tensor,
        labels: torch.Tensor,
        draws: Sequence[torch.Generator],
        eps: float,
        fitted: torch.Tensor | None,
        within: torch.Tensor | None,
    ) -> torch.Tensor:
        return attack(
            model,
            clean,
            labels,
            eps=eps,
            norm=self.threat.norm,
            draws=draws,
            batch_size=self.batch_size,
            assume_checked=True,
            fitted=fitted,
            within=within,
        ).clamp(0, 1)


def learnt(
    attack: Attack,
    model: nn.Module,
    images: ImageSet,
    eps: float,
    *,
    norm: str = "linf",
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    digest: str = "",
) -> torch.Tensor:
    """What an attack learns on images before it attacks others; see :meth:`utils.attacks.attack.Kind.fit`.

    Args:
        model: whose gradient it uses.
        images: of other patients than those that are then attacked.
        cache: folder where it is kept and looked for; None fits it again.
        digest: of the model, where it is known; see :func:`utils.evaluation.attack_cache.describe_module`.

    Raises:
        TypeError: the attack is not fitted on images.
    """
    terms = Terms(eps, norm, torch.Generator().manual_seed(seed))
    if cache is None:
        return attack.kind.fit(attack, model, images, terms, device)
    settings = {**replace(attack, surrogate="").as_dict(), "eps": eps, "norm": norm, "seed": seed}
    told = {"fitted": settings, "model": digest or describe_module(model), "images": describe_images(images)}
    kept = AttackCache(cache, {**told, "device": torch.device(device).type})
    known = kept.load("fitted")
    if known is None:
        known = {"fitted": attack.kind.fit(attack, model, images, terms, device)}
        kept.save("fitted", known)
    return known["fitted"].to(device)


def round_to_8_bits(attacked: torch.Tensor, clean: torch.Tensor, eps: float) -> torch.Tensor:
    """Attacked images as an 8-bit file would hold them, still within an L-infinity radius.

    Args:
        attacked, clean: N x C x H x W in [0, 1]; ``clean`` already has 8 bits.
        eps: radius in [0, 1]; below 1/255 nothing is left of the attack.
    """
    levels = int(255 * eps + 1e-6)
    return (clean + ((attacked - clean) * 255).round().clamp(-levels, levels) / 255).clamp(0, 1)


@torch.no_grad()
def predict_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of one batch in eval mode, float32."""
    with eval_mode(model):
        return as_logits(model(images))
