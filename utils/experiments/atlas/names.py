"""Every attack by its name, alone, on the same slices: what each leaves, and what it costs."""

from __future__ import annotations

from tqdm.auto import tqdm

from utils.attacks.attack import Attack
from utils.attacks.library import LIBRARY
from utils.attacks.suites import Threat
from utils.core.parts import Part
from utils.core.radii import NORM_SIGNS, radius_label
from utils.experiments.atlas.bench import Bench

#: Radius of each norm.
EPS = {"linf": 2 / 255, "l2": 0.5, "l0": 16.0}
#: Those that take minutes a batch on a CPU.
LEFT_OUT = ("AutoAttack", "SparseFool")
#: Restarts of Pixle for each step of the others, fewer than torchattacks' own for the same reason.
_PIXLE = 0.5
#: At most so many steps and slices here; queries of Square for each step.
_STEPS, _IMAGES, _QUERIES = 10, 48, 10


class NameRow(Part):
    """One attack alone.

    Attributes:
        name, title, norm, radius: of the attack.
        robust: model -> share of slices that are right without attack and under it.
        seconds: of wall time an image, over both models.
    """

    name: str
    title: str
    norm: str
    radius: str
    robust: dict[str, float]
    seconds: float

    @property
    def within(self) -> str:
        """The radius with its norm, for tables and figures."""
        return self.radius if self.norm != "linf" else f"{NORM_SIGNS[self.norm]} {self.radius}"


class NamesFound(Part):
    """All attacks; ``clean``: model -> share that is right without attack."""

    images: int
    clean: dict[str, float]
    rows: list[NameRow]


def attacks(steps: int, classes: int) -> list[tuple[Attack, str]]:
    """Attacks of this repository, then those of torchattacks that so many classes allow, each with its norm."""
    own = [
        (Attack("noise"), "linf"),
        (Attack("fgsm"), "linf"),
        (Attack("ifgsm", steps=steps), "linf"),
        (Attack("pgd", steps=steps), "linf"),
        (Attack("pgd", steps=steps, loss="margin"), "linf"),
        (Attack("pgd_t", steps=steps, options={"target": "likeliest"}), "linf"),
        (Attack("pgd_t", steps=steps, options={"target": "least_likely"}), "linf"),
        (Attack("apgd", steps=steps), "linf"),
        (Attack("apgd_t", steps=steps), "linf"),
        (Attack("square", steps=_QUERIES * steps), "linf"),
        (Attack("universal", steps=steps), "linf"),
        (Attack("pgd", steps=steps), "l2"),
    ]
    fewer = {"Pixle": {"restarts": max(1, int(_PIXLE * steps))}}
    theirs = [
        (Attack(name, steps=_QUERIES * steps if name == "Square" else steps, options=fewer.get(name, {})), norm)
        for name, norms in LIBRARY.items()
        for norm in norms
        if name not in LEFT_OUT
    ]
    return own + [(attack, norm) for attack, norm in theirs if _defined(attack, classes)]


def _defined(attack: Attack, classes: int) -> bool:
    try:
        attack.check_classes(classes)
    except ValueError:
        return False
    return True


def measure(bench: Bench) -> NamesFound:
    """Each attack alone on the same slices."""
    images = bench.slices.balanced_subset(min(_IMAGES, bench.budget.images), bench.seed)
    rows, clean, train = [], {}, bench.train_slices()
    for attack, norm in tqdm(attacks(min(_STEPS, bench.budget.steps), len(bench.classes)), desc="by name", leave=False):
        seconds, robust = 0.0, {}
        for name, model in bench.models.items():
            curve = bench.attacked(model, images, attack, [EPS[norm]], threat=Threat(norm), fit_on=train)
            clean[name], robust[name] = curve.robust_accuracy
            seconds += curve.seconds
        rows.append(
            NameRow(
                name=attack.name,
                title=attack.title,
                norm=norm,
                radius=radius_label(EPS[norm], norm),
                robust=robust,
                seconds=seconds / len(images) / len(bench.models),
            )
        )
    return NamesFound(images=len(images), clean=clean, rows=rows)
