"""An attack as a plain value, and the register of what can be run.

To add an attack, put one file into ``utils/attacks/kinds`` with one class in it::

    @register("my_attack")
    class MyAttack(Kind):
        title = "Mine-{steps}"

        def __call__(self, budget, model, images, labels, terms):
            return ...  # attacked images within terms.eps

Then ``Attack("my_attack", steps=20)`` runs in every suite, notebook and command.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from utils.attacks.balls import Draws
from utils.attacks.gradient import LOSSES
from utils.core.checks import choice, number, whole
from utils.core.radii import NORM_TITLES, check_eps
from utils.data.sets import ImageSet

_LOSS_TITLES = {"ce": "", "margin": " margin", "nll": ""}


@dataclass(frozen=True)
class Terms:
    """On which terms an attack runs; see :meth:`Attack.__call__`."""

    eps: float
    norm: str = "linf"
    draws: Draws = None
    batch_size: int | None = None
    assume_checked: bool = False
    fitted: torch.Tensor | None = None
    within: torch.Tensor | None = None

    @property
    def seed(self) -> int:
        """A seed below 2**31 from the first generator, for attacks that take one for a whole batch."""
        first = next(iter(self.draws), None) if isinstance(self.draws, Sequence) else self.draws
        return 0 if first is None else first.initial_seed() % 2**31

    @property
    def learnt(self) -> torch.Tensor:
        """What :meth:`Kind.fit` gave.

        Raises:
            ValueError: the attack was not fitted.
        """
        if self.fitted is None:
            raise ValueError("this attack is first fitted on images that are not attacked: name them as fit_on")
        return self.fitted


class Kind(ABC):
    """How one attack runs; its budget comes with each call.

    Attributes:
        title: for plots and tables, with the fields of :class:`Attack` in braces.
        sees: what of the model it uses: its ``gradient``, its ``answers`` alone, ``both``, or ``nothing``.
        norms: in which it runs.
        options: names that :attr:`Attack.options` may have; None takes any.
        takes_loss: whether :attr:`Attack.loss` is its loss.
        times: between the title and the number of starts.
        fits: whether :meth:`fit` comes first, on images that are not those attacked.
        stays_within: whether it can leave alone what lies outside of :attr:`Terms.within`.
    """

    title: ClassVar[str]
    sees: ClassVar[str] = "gradient"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    options: ClassVar[tuple[str, ...] | None] = None
    takes_loss: ClassVar[bool] = False
    times: ClassVar[str] = "x"
    fits: ClassVar[bool] = False
    stays_within: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        budget: Attack,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        terms: Terms,
    ) -> torch.Tensor:
        """Adversarial images of the shape of ``images``, in [0, 1] and within ``terms.eps``."""

    def fit(
        self, budget: Attack, model: nn.Module, images: ImageSet, terms: Terms, device: torch.device | str
    ) -> torch.Tensor:
        """What :attr:`Terms.fitted` is, of an attack that :attr:`fits`: learnt on images, once for each radius."""
        raise TypeError(f"{self.title_of(budget)} is not fitted on images")

    def title_of(self, budget: Attack) -> str:
        """The title with its budget."""
        return self.title.format(**vars(budget))

    def steps(self, budget: Attack) -> int:
        """Points at which one start asks the model about one image, about."""
        return budget.steps

    def refills(self, budget: Attack) -> bool:
        """See :attr:`Attack.refills`."""
        return False

    def files(self, options: Mapping[str, Any]) -> list[Path]:
        """Files that options name: with other content it is another attack."""
        return []

    def check_classes(self, classes: int) -> None:  # noqa: B027 - most attacks take any number
        """See :meth:`Attack.check_classes`."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that this attack does not know.

        Raises:
            ValueError: it does not.
        """
        wrong = [name for name in options if self.options is not None and name not in self.options]
        if wrong:
            raise ValueError(f"this attack takes {self._known_options()}, not {', '.join(wrong)}")

    def _known_options(self) -> str:
        return f"the options {', '.join(self.options)}" if self.options else "no options"


_KINDS: dict[str, Kind] = {}


def register(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Make a class known as ``Attack(name)``.

    Raises:
        ValueError: the name is taken.
    """

    def add(kind: type[Kind]) -> type[Kind]:
        if name in _KINDS:
            raise ValueError(f"there are two attacks of the name {name!r}: {type(_KINDS[name])} and {kind}")
        _KINDS[name] = kind()
        return kind

    return add


@cache
def known_attacks() -> Mapping[str, Kind]:
    """Name -> kind of every attack in ``utils/attacks/kinds``."""
    package = importlib.import_module("utils.attacks.kinds")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _KINDS


@dataclass(frozen=True)
class Attack:
    """An attack and its budget; the radius is given when it runs.

    Attributes:
        name: of :func:`known_attacks`: ``fgsm``, ``pgd``, ``apgd``, ``apgd_t`` (targeted), ``square`` (black box),
            ``noise`` (random signs: no attack, but what one must beat), ``autoattack``, …
        steps: gradient steps, or queries of ``square``.
        restarts: independent starts.
        alpha, loss, random_start: see :func:`utils.attacks.gradient.pgd`.
        targets: classes that ``apgd_t`` tries.
        stop_when_fooled: see :func:`utils.attacks.gradient.pgd`.
        surrogate: name of another model whose gradient is used; "" attacks the model itself.
        options: what only this attack knows.
    """

    name: str = "pgd"
    steps: int = 20
    restarts: int = 1
    alpha: float | None = None
    loss: str = "ce"
    random_start: bool = True
    targets: int = 3
    stop_when_fooled: bool = False
    surrogate: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.name not in known_attacks():
            raise ValueError(f"attack must be one of {', '.join(known_attacks())}, not {self.name!r}")
        choice("loss", self.loss, LOSSES)
        for name in ("steps", "restarts", "targets"):
            whole(name, getattr(self, name), 1)
        if self.alpha is not None:
            number("alpha", self.alpha, above=0)
        self.kind.check_options(self.options)

    @property
    def kind(self) -> Kind:
        """What runs."""
        return known_attacks()[self.name]

    @property
    def title(self) -> str:
        """For plots and tables."""
        title = self.kind.title_of(self)
        title += f"{self.kind.times}{self.restarts}" if self.restarts > 1 else ""
        title += _LOSS_TITLES[self.loss] if self.kind.takes_loss else ""
        return title + (f" from {self.surrogate}" if self.surrogate else "")

    @property
    def passes(self) -> int:
        """Passes through the model for one image that nothing breaks, about: what a progress bar counts."""
        each = 2 if self.kind.sees in ("gradient", "both") else 1
        return each * self.restarts * self.kind.steps(self)

    @property
    def refills(self) -> bool:
        """Whether the attack drops broken images by itself and fills its passes up with the next ones."""
        return self.kind.refills(self)

    def rounds(self) -> Iterator[Attack]:
        """The attack as attacks between which the caller drops broken images: one a start, unless it does so itself."""
        return iter([self]) if self.refills else (replace(self, restarts=1) for _ in range(self.restarts))

    def check_norm(self, norm: str) -> None:
        """Refuse, before any work, a norm in which this attack does not run.

        Raises:
            ValueError: it does not.
        """
        if norm not in self.kind.norms:
            known = " or ".join(NORM_TITLES[name] for name in self.kind.norms)
            raise ValueError(f"{self.title} is an attack in {known}, not in {NORM_TITLES[norm]}")

    def check_within(self, within: torch.Tensor | None) -> None:
        """Refuse, before any work, to attack a part of the images by an attack that would change the rest.

        Raises:
            ValueError: it would.
        """
        if within is not None and (self.stop_when_fooled or not self.kind.stays_within):
            able = ", ".join(name for name, kind in known_attacks().items() if kind.stays_within)
            raise ValueError(
                f"{self.title} cannot stay within a part of the image; without stop_when_fooled can: {able}"
            )

    def check_classes(self, classes: int) -> None:
        """Refuse, before any work, a model with a number of classes that this attack is not defined for.

        Raises:
            ValueError: AutoAttack on fewer than four classes.
        """
        self.kind.check_classes(classes)

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        eps: float,
        norm: str = "linf",
        draws: Draws = None,
        batch_size: int | None = None,
        assume_checked: bool = False,
        fitted: torch.Tensor | None = None,
        within: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adversarial images; at ``eps`` 0 the images themselves.

        ``batch_size`` bounds the images a pass of an attack that :attr:`refills`; others take all at once. For
        ``assume_checked`` see :func:`utils.attacks.gradient.fgsm`; for ``fitted``, :meth:`Kind.fit`; ``within`` is 1
        where an image may be changed and 0 elsewhere.

        Raises:
            ValueError: another norm, an attack that should have been fitted, or one that cannot stay within a part.
        """
        self.check_norm(norm)
        self.check_within(within)
        if check_eps(eps, norm) == 0:
            return images
        terms = Terms(eps, norm, draws, batch_size, assume_checked, fitted, within)
        return self.kind(self, model, images, labels, terms)

    def settings(self) -> dict[str, Any]:
        """Plain values, of which ``Attack(**settings)`` makes the same attack; unused ``options`` are left out."""
        return {name: value for name, value in asdict(self).items() if name != "options" or value}

    def as_dict(self) -> dict[str, Any]:
        """Title and :meth:`settings`, for records."""
        return {"title": self.title, **self.settings()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Attack:
        """The attack that :meth:`as_dict` or :meth:`settings` gave.

        Raises:
            TypeError, ValueError: no such attack, or settings that it does not take.
        """
        return cls(**{name: value for name, value in plain.items() if name != "title"})


def describe(attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Attacks as plain values, with their titles."""
    return [attack.as_dict() for attack in attacks]
