"""Attacked accuracy, measured one way for every notebook, table and record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.attacks import check_eps, fgsm, pgd
from utils.data import ImageSet
from utils.metrics import predict
from utils.reproducibility import generator

NEVER = -1


@dataclass(frozen=True)
class Attack:
    """An attack and its budget; the radius is given when it runs.

    Attributes:
        name: ``fgsm`` or ``pgd``.
        steps, restarts, alpha, loss, random_start: see :func:`utils.attacks.pgd`; FGSM uses
            ``loss`` alone.
    """

    name: str = "pgd"
    steps: int = 20
    restarts: int = 1
    alpha: float | None = None
    loss: str = "ce"
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.name not in ("fgsm", "pgd"):
            raise ValueError(f"attack must be fgsm or pgd, not {self.name!r}")

    @property
    def title(self) -> str:
        """For plots and tables."""
        if self.name == "fgsm":
            return "FGSM"
        return f"PGD-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        eps: float,
        draws: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Adversarial images; at ``eps`` 0 the images themselves."""
        if check_eps(eps) == 0:
            return images
        if self.name == "fgsm":
            return fgsm(model, images, labels, eps=eps, loss=self.loss)
        return pgd(
            model,
            images,
            labels,
            eps=eps,
            alpha=self.alpha,
            steps=self.steps,
            restarts=self.restarts,
            random_start=self.random_start,
            loss=self.loss,
            generator=draws,
        )


@dataclass
class RobustnessCurve:
    """Robust accuracy over radii for one model and attack.

    An image is robust at a radius if it is right without attack and was broken neither there nor
    at any smaller radius: a larger ball contains the smaller ones.

    Attributes:
        attack: the budget, as plain values, with its title.
        epsilons: radii in [0, 1], ascending, the first 0.
        robust_accuracy: share of all images, 0..1, for each radius; the first is clean accuracy.
        first_broken: for each image the index into ``epsilons`` at which it was first wrong (0:
            without attack), ``NEVER`` if it stood.
        n_images, n_subjects: how many.
        max_norm: largest L-infinity distance that an adversarial image had at each radius.
        seconds: wall time.
    """

    attack: dict[str, Any]
    epsilons: list[float]
    robust_accuracy: list[float]
    first_broken: list[int] = field(repr=False)
    n_images: int
    n_subjects: int
    max_norm: list[float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)


def robustness_curve(
    model: nn.Module,
    images: ImageSet,
    *,
    attack: Attack,
    epsilons: Sequence[float],
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> RobustnessCurve:
    """Attack all images at growing radii, the survivors of one radius at the next.

    Args:
        epsilons: radii in [0, 1]; 0 is added and the order does not matter.
        seed: of the random starts.

    Raises:
        ValueError: a radius outside [0, 1]; NaN logits.
    """
    radii = sorted({0.0, *(check_eps(eps) for eps in epsilons)})
    begun = time.perf_counter()
    logits = predict(model, images, batch_size=batch_size, device=device)
    if logits.isnan().any():
        raise ValueError("the model gives NaN logits on clean images; its weights are damaged")
    first_broken = torch.where(logits.argmax(1) == images.labels, NEVER, 0)
    norms = [0.0]
    with tqdm(total=len(images) * (len(radii) - 1), desc=attack.title, leave=False) as bar:
        for step, eps in enumerate(radii[1:], start=1):
            alive = torch.nonzero(first_broken == NEVER)[:, 0]
            bar.update(len(images) - len(alive))
            norms.append(0.0)
            for batch in alive.split(batch_size) if len(alive) else ():
                fooled, norm = _attack_part(model, images, batch, attack, eps, seed, device)
                first_broken[batch[fooled]] = step
                norms[-1] = max(norms[-1], norm)
                bar.set_postfix(eps=f"{255 * eps:g}/255", robust=f"{(first_broken == NEVER).float().mean():.1%}")
                bar.update(len(batch))
    stands = [((first_broken == NEVER) | (first_broken > step)).double().mean().item() for step in range(len(radii))]
    return RobustnessCurve(
        attack={"title": attack.title, **asdict(attack)},
        epsilons=radii,
        robust_accuracy=stands,
        first_broken=first_broken.tolist(),
        n_images=len(images),
        n_subjects=len(images.subjects.unique()),
        max_norm=norms,
        seconds=time.perf_counter() - begun,
    )


def _attack_part(
    model: nn.Module,
    images: ImageSet,
    index: torch.Tensor,
    attack: Attack,
    eps: float,
    seed: int,
    device: torch.device | str,
) -> tuple[torch.Tensor, float]:
    clean, labels = images.pixels(index, device), images.labels[index].to(device)
    draws = generator(seed, eps, int(index[0]))
    adversarial = attack(model, clean, labels, eps=eps, draws=draws)
    fooled = predict_batch(model, adversarial).argmax(1) != labels
    return fooled.cpu(), (adversarial - clean).abs().max().item()


@torch.no_grad()
def predict_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of one batch in eval mode, float32."""
    was_training = model.training
    model.eval()
    logits = model(images).float()
    model.train(was_training)
    return logits


@dataclass
class AdversarialExample:
    """One attacked image.

    Attributes:
        image: float tensor 1 x H x W in [0, 1], attacked.
        label, clean, attacked: class indices: the truth, and the model's answer before and after.
    """

    image: torch.Tensor
    label: int
    clean: int
    attacked: int


def adversarial_examples(
    model: nn.Module,
    images: ImageSet,
    *,
    attacks: Sequence[tuple[Attack, float]],
    n: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[list[AdversarialExample]]:
    """The same ``n`` images under each of several attacks.

    Images that are right without attack come first, one of each class in turn.

    Args:
        attacks: pairs of attack and radius.

    Returns:
        one list of ``n`` examples for each attack.
    """
    clean = predict(model, images, device=device).argmax(1)
    chosen = spread_over_classes(images.labels, clean == images.labels, n)
    pixels, labels = images.pixels(chosen, device), images.labels[chosen].to(device)
    rows = []
    for attack, eps in attacks:
        attacked = attack(model, pixels, labels, eps=eps, draws=generator(seed, "examples"))
        answers = predict_batch(model, attacked).argmax(1).tolist()
        rows.append(
            [
                AdversarialExample(image.cpu(), int(label), int(clean[index]), answer)
                for image, label, index, answer in zip(attacked, labels, chosen, answers)
            ]
        )
    return rows


def spread_over_classes(labels: torch.Tensor, preferred: torch.Tensor, n: int) -> torch.Tensor:
    """Indices of ``n`` images: preferred ones first, the classes in turn."""
    order = []
    for keep in (preferred, ~preferred):
        groups = [torch.nonzero(keep & (labels == label))[:, 0].tolist() for label in labels.unique()]
        longest = max(map(len, groups), default=0)
        order += [group[rank] for rank in range(longest) for group in groups if rank < len(group)]
    return torch.tensor(order[:n])
