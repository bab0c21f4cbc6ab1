"""Procedural axial brain phantoms: images that may be shared, for a first run without any data.

A phantom is drawn from the shares of ventricles and sulci that the real images have, so that the
stage of dementia shows where it shows in a brain. It is no anatomical model and no patient.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import scipy  # loads its parts at their first use

from utils.core.checks import choice, number, whole
from utils.data.classes import CLASSES
from utils.data.raw_images import RawImages

_SIDE = 128
_CENTRE = (62.5, 64.0)
_SEMI_AXES = (50.0, 52.0)
_WHITE, _CORTEX, _DEEP_GREY, _VENTRICLE, _SULCUS = 0.94, 0.60, 0.76, 0.14, 0.22
_EXPOSURE = 233.0
#: What each tissue's brightness becomes in the second contrast, in which fluid is bright and white matter dark.
_T2 = ((_VENTRICLE, _SULCUS, _CORTEX, _DEEP_GREY, _WHITE), (0.95, 0.88, 0.62, 0.50, 0.40))
CONTRASTS = ("T1", "T2")
_ANGLES = 190

#: Share of the brain that is ventricle, and that is dark sulcus: mean and standard deviation over
#: the patients of each class of the real images.
VENTRICLE_SHARE = {
    "Non": (0.066, 0.035),
    "VeryMild": (0.092, 0.035),
    "Mild": (0.115, 0.028),
    "Moderate": (0.130, 0.030),
}
SULCUS_SHARE = {"Non": (0.224, 0.03), "VeryMild": (0.264, 0.03), "Mild": (0.289, 0.03), "Moderate": (0.305, 0.03)}


@dataclass(frozen=True)
class PhantomConfig:
    """What to generate.

    Attributes:
        n_subjects: patients, dealt to the four classes in turn; at least 8.
        n_levels: slices a patient, from the basal ganglia up to the roof of the ventricles.
        difficulty: spread of the patients around their class relative to the real one. At 1 the
            classes overlap as they do in the real images, where nobody tells all four apart; at 0
            every patient is its class's mean.
        seed: equal seeds give equal images.
        contrast: ``T1``, or ``T2``: the same heads with bright fluid, and noise of their own.
    """

    n_subjects: int = 64
    n_levels: int = 8
    difficulty: float = 0.2
    seed: int = 0
    contrast: str = "T1"

    def __post_init__(self) -> None:
        choice("contrast", self.contrast, CONTRASTS)
        whole("n_subjects", self.n_subjects, 8)
        whole("n_levels", self.n_levels, 1)
        whole("seed", self.seed, 0)
        number("difficulty", self.difficulty, least=0, most=2)


def make_phantoms(config: PhantomConfig | None = None, *, size: int | None = None) -> RawImages:
    """Draw all slices of all phantom patients.

    Args:
        config: what to generate; None takes the defaults.
        size: side in pixels of the stored images; None is 128.

    Returns:
        images with their patients named; ``info`` holds the configuration.
    """
    config = config or PhantomConfig()
    with ThreadPoolExecutor(max_workers=2) as pool:
        stacks = list(pool.map(lambda subject: _draw_subject(config, subject), range(config.n_subjects)))
    pixels = np.concatenate(stacks)
    if size and size != _SIDE:
        from PIL import Image

        pixels = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BOX)) for p in pixels])
    subject = np.repeat(np.arange(config.n_subjects), config.n_levels)
    labels = subject % len(CLASSES)
    paths = [
        f"{CLASSES[label]}/subject_{patient:03d}_level_{level:02d}.png"
        for patient, label, level in zip(subject, labels, np.tile(np.arange(config.n_levels), config.n_subjects))
    ]
    folders = _published_folders(config)
    return RawImages(
        pixels, labels, paths, CLASSES, folders, "phantom", subjects=subject, info={"phantom": asdict(config)}
    )


def _published_folders(config: PhantomConfig) -> list[str]:
    """Train and test folders cut by image, the way the public data sets do it."""
    rng = np.random.default_rng([config.seed, 1])
    return np.where(rng.random(config.n_subjects * config.n_levels) < 0.2, "test", "train").tolist()


def _draw_subject(config: PhantomConfig, subject: int) -> np.ndarray:
    rng = np.random.default_rng([config.seed, 0, subject])
    name = CLASSES[subject % len(CLASSES)]
    ventricle = _draw_share(rng, *VENTRICLE_SHARE[name], config.difficulty)
    sulcus = _draw_share(rng, *SULCUS_SHARE[name], config.difficulty)
    anatomy = _Anatomy(rng)
    levels = np.linspace(0, 1, config.n_levels) if config.n_levels > 1 else np.array([0.5])
    # another scan of the same head
    rng = rng if config.contrast == "T1" else np.random.default_rng([config.seed, 2, subject])
    return np.stack([anatomy.slice(level, ventricle, sulcus, rng, config.contrast) for level in levels])


def _draw_share(rng: np.random.Generator, mean: float, deviation: float, difficulty: float) -> float:
    return max(0.3 * mean, mean + difficulty * deviation * float(np.clip(rng.standard_normal(), -2, 2)))


class _Anatomy:
    """What one patient's slices share (pose, warp, asymmetry, folds), and the slice being drawn."""

    def __init__(self, rng: np.random.Generator) -> None:
        rows, columns = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
        x, y = (columns - _CENTRE[0]) / _SEMI_AXES[0], (rows - _CENTRE[1]) / _SEMI_AXES[1]
        self.grid = x, y
        bend = scipy.ndimage.gaussian_filter(rng.standard_normal((2, _SIDE, _SIDE)), (0, 18, 18), mode="wrap")
        bend *= 0.02 / bend.std()
        angle, shift = rng.normal(0, 0.03), rng.normal(0, 0.012, 2)
        x, y = x + bend[0] + shift[0], y + bend[1] + shift[1]
        self.x = np.cos(angle) * x - np.sin(angle) * y
        self.y = np.sin(angle) * x + np.cos(angle) * y
        self.asymmetry = rng.normal(0, 0.08)
        self.theta = np.arctan2(self.x, -self.y)
        folds = rng.standard_normal((7, 10, _ANGLES))
        self.folds = scipy.ndimage.gaussian_filter(folds, (1.1, 1.6, 1.1), mode=("nearest", "nearest", "wrap"))
        self.folds /= self.folds.std()
        self.phase = rng.uniform(0, _ANGLES)

    def slice(
        self, level: float, ventricle: float, sulcus: float, rng: np.random.Generator, contrast: str = "T1"
    ) -> np.ndarray:
        """One uint8 slice; ``level`` runs from 0 (basal ganglia) to 1 (roof of the ventricles)."""
        self.radius = _outline_radius(*self.grid, level)
        self.brain = self.radius < 1
        tissue = np.full((_SIDE, _SIDE), _WHITE, dtype=np.float32)
        tissue = _blend(tissue, _DEEP_GREY, self._deep_grey(level))
        tissue = np.minimum(tissue, self._cortex(level, sulcus))
        share = ventricle * (0.55 + 0.9 * np.exp(-(((level - 0.72) / 0.3) ** 2)))
        tissue = _blend(tissue, _VENTRICLE, _share_mask(self._ventricles(level), share, self.brain, 0.02))
        tissue = tissue if contrast == "T1" else np.interp(tissue, *_T2).astype(np.float32)
        tissue = scipy.ndimage.gaussian_filter(tissue, 0.5)
        light = _EXPOSURE * (1 + 0.03 * rng.standard_normal())
        noise = 0.045 * scipy.ndimage.gaussian_filter(rng.standard_normal((_SIDE, _SIDE)), 0.5)
        image = (tissue + noise) * light * (1 - 0.06 * self.radius**2)
        return np.where(self.brain, image.clip(2, 255), 0).astype(np.uint8)

    def _cortex(self, level: float, sulcus: float) -> np.ndarray:
        """Brightness by distance from the nearest sulcus, so scaled that ``sulcus`` of the brain is dark."""
        field = self._fold_field(level)
        shares = np.array([0.45, 1.0, 1.45, 1.8, 2.2]) * sulcus
        distances = np.quantile(field[self.brain], shares.clip(max=0.95))
        return np.interp(field, distances, [_SULCUS, _SULCUS + 0.1, _CORTEX, _CORTEX + 0.1, _WHITE])

    def _fold_field(self, level: float) -> np.ndarray:
        """Small where a sulcus is: distance from the zero crossings of polar noise, and fissures."""
        depth = np.clip((1 - self.radius) / 0.46, 0, 1)
        wiggle = 1.3 * np.sin(4 * depth + 7 * self.theta + self.phase) + 0.9 * np.sin(9 * depth - 11 * self.theta)
        turn = (self.theta / (2 * np.pi) * _ANGLES + self.phase + 3 * level + wiggle) % _ANGLES
        # two extra columns on either side make the interpolation periodic in the angle
        periodic = np.concatenate([self.folds[..., -2:], self.folds, self.folds[..., :2]], axis=-1)
        places = np.stack([np.full_like(turn, 6 * level), 9 * depth, turn + 2])
        crossing = np.abs(scipy.ndimage.map_coordinates(periodic, places, order=1, mode="nearest"))
        field = crossing + 1.0 * depth**4 + 0.15 * np.exp(-(((self.radius - 1) / 0.03) ** 2))
        # folds end in the white matter; only fissures may reach further in
        field = np.where(depth >= 1, 5.0, field)
        return np.minimum(field, self._fissures(level))

    def _fissures(self, level: float) -> np.ndarray:
        x, y = np.abs(self.x), self.y
        middle = np.abs(self.x + 0.015 * np.sin(14 * y + self.phase))
        midline = 22 * middle + 12 * np.clip(0.5 + 0.08 * level - np.abs(y), 0, None)
        insula = np.abs(x - 0.60 - 0.05 * np.sin(9 * y + self.phase)) + 0.6 * np.clip(np.abs(y + 0.02) - 0.2, 0, None)
        sylvian = np.abs(y - 0.02 - 0.2 * (x - 0.6) - 0.03 * np.sin(20 * x)) + np.clip(0.58 - x, 0, None)
        cistern = 4.5 * np.hypot(0.8 * self.x, self.y + 0.18) - 0.1 + 6 * level
        lateral = np.minimum(9 * insula, 8 * sylvian) + 0.15 + 1.2 * level
        return np.minimum(np.minimum(midline, lateral), cistern)

    def _deep_grey(self, level: float) -> np.ndarray:
        x, y = np.abs(self.x), self.y
        fade = np.clip(1.4 - 1.8 * level, 0, 1)
        thalamus = _ellipse(x, y, 0.15, 0.16, 0.13, 0.20, 0.25)
        putamen = _ellipse(x, y, 0.38, -0.06, 0.10, 0.26, -0.25)
        caudate = _ellipse(x, y, 0.19, -0.30, 0.07, 0.13, 0.2)
        return fade * np.clip(thalamus + putamen + caudate, 0, 1)

    def _ventricles(self, level: float) -> np.ndarray:
        """Implicit distance to the lateral ventricles: commas below, a V in the middle, bananas on top."""
        x = np.abs(self.x) * (1 + self.asymmetry * np.sign(self.x))
        y = self.y
        high = np.clip((level - 0.35) / 0.4, 0, 1)
        front_tip, back_tip = -0.44 + 0.02 * high, 0.52 - 0.1 * high
        front = _stroke(x, y, (0.24 - 0.06 * high, front_tip), (0.06 + 0.03 * high, -0.16), 0.05)
        back = _stroke(
            x, y, (0.28 - 0.08 * high, back_tip), (0.07 + 0.03 * high, 0.22 - 0.1 * high), 0.01 + 0.04 * high
        )
        body = _stroke(x, y, (0.08 + 0.02 * high, -0.2), (0.09 + 0.02 * high, 0.18), 0.05) + 0.5 * (1 - high)
        third = _stroke(x, y, (0.0, 0.02), (0.0, 0.22), 0.0) + 0.03 + 0.5 * high
        return np.minimum(np.minimum(front, back + 0.1 * np.clip(0.25 - level, 0, 1)), np.minimum(body, third))


def _outline_radius(x: np.ndarray, y: np.ndarray, level: float) -> np.ndarray:
    """1 on the outline of the brain: an egg, narrower behind and, towards the base, at the temples."""
    waist = 0.06 * (1 - level) * np.exp(-(((y - 0.38) / 0.12) ** 2))
    return np.hypot(x * (1 + 0.09 * y + waist), y * (1 + 0.04 * level) + 0.03 * level)


def _ellipse(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float, tilt: float) -> np.ndarray:
    cos, sin = np.cos(tilt), np.sin(tilt)
    u, v = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
    return np.clip(6 * (1 - np.hypot(u / rx, v / ry)), 0, 1)


def _stroke(
    x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float], width: float
) -> np.ndarray:
    """Distance to a line segment, less ``width``."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - width


def _share_mask(field: np.ndarray, share: float, brain: np.ndarray, softness: float) -> np.ndarray:
    """Soft mask of the smallest values of ``field``, so many that they fill ``share`` of the brain."""
    threshold = np.quantile(field[brain], min(share, 1.0))
    return np.clip(0.5 + (threshold - field) / (2 * softness), 0, 1)


def _blend(base: np.ndarray, value: float, mask: np.ndarray) -> np.ndarray:
    return base + (value - base) * mask
