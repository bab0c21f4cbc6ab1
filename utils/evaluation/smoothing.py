"""What a patient's answer is certified to bear: randomised smoothing (Cohen et al., 2019, arXiv:1902.02918).

The smoothed model answers what the model answers most often to the image with Gaussian noise. If that answer has a
probability of at least p under the noise, no change of an L2 length below ``sigma * Phi^-1(p)`` can change it. p is
bounded from below by Clopper and Pearson, so that each radius is wrong with a probability of at most ``error``.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy  # loads its parts at their first use
import torch
from torch import nn

from utils.core.checks import number, whole
from utils.core.modes import eval_mode

#: Nobody is certified: the answer under noise is too close to a draw.
ABSTAINS = -1


@dataclass(frozen=True)
class Certificate:
    """What is certain of one answer.

    Attributes:
        answer: the class; ``ABSTAINS`` where none is certain.
        radius: L2 length below which no change alters it; 0 where it abstains.
        share: of the noisy images that got this answer.
    """

    answer: int
    radius: float
    share: float


def certify(
    model: nn.Module,
    image: torch.Tensor,
    *,
    sigma: float,
    draws: torch.Generator,
    first: int = 100,
    samples: int = 1000,
    error: float = 0.001,
    batch_size: int = 100,
) -> Certificate:
    """The certificate of one image, by algorithm CERTIFY of the paper.

    Args:
        model: gives logits; ``image`` may be a patient's slices as channels.
        image: 1 x C x H x W.
        sigma: standard deviation of the noise, above 0.
        draws: CPU generator of the noise.
        first: noisy images that choose the answer.
        samples: others that bound its probability.
        error: probability with which the radius may be too large.

    Raises:
        ValueError: a bad number.
    """
    number("sigma", sigma, above=0)
    number("error", error, above=0, below=1)
    whole("first", first, 1)
    whole("samples", samples, 1)
    guessed = int(noisy_counts(model, image, sigma=sigma, samples=first, draws=draws, batch_size=batch_size).argmax())
    counts = noisy_counts(model, image, sigma=sigma, samples=samples, draws=draws, batch_size=batch_size)
    hits = int(counts[guessed])
    low = lower_bound(hits, samples, error)
    if low <= 0.5:
        return Certificate(ABSTAINS, 0.0, hits / samples)
    return Certificate(guessed, sigma * float(scipy.stats.norm.ppf(low)), hits / samples)


def lower_bound(hits: int, samples: int, error: float) -> float:
    """One-sided lower bound of a probability (Clopper and Pearson, 1934).

    >>> round(lower_bound(100, 100, 0.001), 4)
    0.9333
    """
    return float(scipy.stats.beta.ppf(error, hits, samples - hits + 1)) if hits else 0.0


@torch.no_grad()
def noisy_counts(
    model: nn.Module, image: torch.Tensor, *, sigma: float, samples: int, draws: torch.Generator, batch_size: int = 100
) -> torch.Tensor:
    """How often each class is the answer to an image 1 x C x H x W with noise, int64 K."""
    found: torch.Tensor | None = None
    with eval_mode(model):
        for start in range(0, samples, batch_size):
            count = min(batch_size, samples - start)
            noise = torch.randn((count, *image.shape[1:]), generator=draws).to(image)
            logits = model(image + sigma * noise)
            counts = torch.bincount(logits.argmax(1).cpu(), minlength=logits.shape[1])
            found = counts if found is None else found + counts
    if found is None:
        raise ValueError(f"samples must be at least 1, not {samples}")
    return found


class Smoothed(nn.Module):
    """The mean probability over fixed noise, through which a smoothed model is attacked (Salman et al., 2019,
    arXiv:1906.04584).

    Args:
        model: gives logits N x K.
        sigma: of the noise.
        samples: noisy copies of each image.
        seed: of the noise.

    Raises:
        ValueError: a bad number.
    """

    def __init__(self, model: nn.Module, sigma: float, *, samples: int = 8, seed: int = 0) -> None:
        super().__init__()
        number("sigma", sigma, above=0)
        whole("samples", samples, 1)
        self.model, self.sigma, self.samples, self.seed = model, sigma, samples, seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities N x K."""
        draws = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.samples, *images.shape[1:]), generator=draws).to(images)
        noisy = (images[:, None] + self.sigma * noise).flatten(0, 1)
        chances = self.model(noisy).log_softmax(-1).unflatten(0, (len(images), self.samples))
        return chances.logsumexp(1) - torch.tensor(float(self.samples)).log()
