"""Is this an image like those that the model knows? Asked before any answer is given.

The nearest neighbour among the training slices decides (Sun et al., 2022, arXiv:2204.06507, on pixels instead of
features). All public slices lie on one atlas, so that a foreign image is far from each of them; a network's features do
not see it: those of the committed ones hardly tell a rotated slice from an upright one, see ``benchmarks/scans.json``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from utils.core.paths import atomic_write
from utils.data.sets import ImageSet

GATE = "gate.safetensors"
#: Pixels a side at which images are compared, and how many training slices are kept at most.
SIDE = 24
REFERENCES = 960
#: An image farther away than this share of the validation slices is doubtful; one farther than the farthest of them by
#: this factor is refused.
_DOUBT_SHARE, _REFUSE_FACTOR = 0.99, 1.1
#: So much farther than any kept training slice may an image's mean and spread of grey lie, as a share. Of 1,280 test
#: slices none does; one at half its brightness nearly always.
_GREY_SLACK = 0.1
#: The same of fine detail, beyond all training slices: of 1,280 test slices none lies there.
_DETAIL_SLACK = 0.05
#: Share of a head's slices above which it is they that decide.
_MOST = 0.5
#: Grey levels of 255 up to which a pixel is background.
_BACKGROUND = 5
#: Second differences in both directions at once: flat areas and straight edges give nothing (Immerkaer, 1996).
_GRAIN = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
ACCEPTED, DOUBTFUL, REFUSED = "accepted", "doubtful", "refused"

#: What may have been done to a slice that is refused, and how it is undone.
TURNS = {
    "upside down": lambda images: images.flip(-2),
    "turned by 180 degrees": lambda images: images.flip(-1, -2),
    "turned by 90 degrees clockwise": lambda images: images.rot90(1, (-2, -1)),
    "turned by 90 degrees anticlockwise": lambda images: images.rot90(-1, (-2, -1)),
    "inverted, dark for bright": lambda images: 1 - images,
    "inverted and upside down": lambda images: 1 - images.flip(-2),
}


@dataclass(frozen=True)
class Gate:
    """Training slices, and how far from the nearest of them an image may be.

    Attributes:
        references: uint8 R x SIDE x SIDE.
        doubtful, refused: distances, in [0, 2], above which an image is so.
        shape: height and width of the slices of the data set.
        fingerprint: of the data.
        trained: int64, sorted: by :func:`pixel_digests` all training slices; empty in gates from before it.
        detail: lowest and highest :func:`fine_detail` of all training slices; without limits in gates from before it.
    """

    references: torch.Tensor
    doubtful: float
    refused: float
    shape: tuple[int, int]
    fingerprint: str
    trained: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    detail: tuple[float, float] = (0.0, math.inf)

    def among_training(self, images: torch.Tensor) -> torch.Tensor:
        """Which images are, pixel by pixel, slices that the model was trained on, bool N.

        A copy that was turned, resized or compressed again is not known; what is told so is certain.

        Args:
            images: uint8 N x 1 x H x W.
        """
        return torch.isin(pixel_digests(images), self.trained)

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """Distance of each image to the nearest of ``references``, once brightness and contrast are taken off, N.

        It has a gradient, so that it can be attacked: :class:`utils.evaluation.detectors.GateDetector`.

        Args:
            images: N x 1 x H x W in [0, 1].
        """
        known = _comparable(self.references[:, None].to(images) / 255)
        return torch.cdist(_comparable(images), known).amin(1).float()

    def unlike_in_grey(self, images: torch.Tensor) -> torch.Tensor:
        """Which images are darker, brighter, flatter or harsher than all kept training slices, bool N.

        Brightness and contrast, which a model sees, are taken off before distances are measured.

        Args:
            images: N x 1 x H x W in [0, 1].
        """
        known, own = _greys(self.references[:, None].to(images) / 255), _greys(images)
        low, high = known.amin(0) * (1 - _GREY_SLACK), known.amax(0) * (1 + _GREY_SLACK)
        return ((own < low) | (own > high)).any(1)

    def grey_reason(self, images: torch.Tensor) -> str:
        """What is unlike in the greys of images, N x 1 x H x W in [0, 1], in words."""
        known, own = 255 * _greys(self.references[:, None].to(images) / 255), 255 * _greys(images).median(0).values
        low, high = known.amin(0), known.amax(0)
        return (
            f"its brightness or contrast is another (mean {own[0]:.0f} of 255, spread {own[1]:.0f}; kept training "
            f"slices have {low[0]:.0f} to {high[0]:.0f} and {low[1]:.0f} to {high[1]:.0f}), and the model may answer "
            "otherwise to the same slice once it is scaled"
        )

    def unlike_in_detail(self, images: torch.Tensor) -> torch.Tensor:
        """Which images are grainier or smoother than all training slices, bool N.

        Noise, blur and thick slices leave the distance as it is, which is one of pooled images.

        Args:
            images: N x 1 x H x W in [0, 1], of the training slices' size.
        """
        low, high = self.detail
        own = fine_detail(images)
        return (own < low * (1 - _DETAIL_SLACK)) | (own > high * (1 + _DETAIL_SLACK))

    def detail_reason(self, images: torch.Tensor) -> str:
        """What is unlike in the fine detail of images, N x 1 x H x W in [0, 1], in words."""
        own, (low, high) = float(fine_detail(images).median()), self.detail
        causes = "noise or motion" if own > high else "blur, thick slices, or a picture that was enlarged"
        return (
            f"its fine detail is another ({100 * own:.1f} % of its contrast; training slices have {100 * low:.1f} to "
            f"{100 * high:.1f} %), as by {causes}, and the model may answer otherwise to the same slice without it"
        )

    def of_case(self, images: torch.Tensor) -> tuple[str, str, torch.Tensor]:
        """Verdict on slices of one head together, why, and the distance of each.

        The middle one in the order of distances decides; of those that pass, the greys and the detail of most.

        Args:
            images: N x 1 x H x W in [0, 1], of the training slices' size.
        """
        distances = self.distances(images)
        verdict = self.verdict(float(distances.median()))
        if verdict != ACCEPTED:
            return verdict, self.reason(images, verdict), distances
        for unlike, reason in (
            (self.unlike_in_grey, self.grey_reason),
            (self.unlike_in_detail, self.detail_reason),
        ):
            if unlike(images).float().mean() > _MOST:
                return DOUBTFUL, reason(images), distances
        return ACCEPTED, "", distances

    def verdict(self, distance: float) -> str:
        """``accepted``, ``doubtful`` or ``refused``."""
        if distance > self.refused:
            return REFUSED
        return DOUBTFUL if distance > self.doubtful else ACCEPTED

    def reason(self, images: torch.Tensor, verdict: str = REFUSED) -> str:
        """Why images are not accepted, as far as it can be told, in words.

        Args:
            images: N x 1 x H x W in [0, 1].
        """
        if (images.amax((1, 2, 3)) - images.amin((1, 2, 3)) < 2 / 255).all():
            return "it shows nothing"
        best = {name: float(self.distances(undo(images)).median()) for name, undo in TURNS.items()}
        name = min(best, key=best.__getitem__)
        if best[name] <= self.doubtful:
            return f"it looks like a slice that is {name}"
        if verdict == DOUBTFUL:
            return f"it is farther from the kept training slices than {_DOUBT_SHARE:.0%} of the validation slices are"
        return "no training slice looks like it: another plane or height, a skull that is still there, or no such MRI"

    def save(self, folder: Path) -> None:
        """Write ``gate.safetensors``."""
        told = {
            "doubtful": repr(self.doubtful),
            "refused": repr(self.refused),
            "shape": "x".join(map(str, self.shape)),
            "fingerprint": self.fingerprint,
        }
        if math.isfinite(self.detail[1]):
            told["detail"] = "to".join(map(repr, self.detail))
        content = {"references": self.references.contiguous(), "trained": self.trained}
        # one entry a line of the header would be written in changing order
        atomic_write(Path(folder) / GATE, lambda path: save_file(content, path, metadata={"gate": _joined(told)}))

    @classmethod
    def load(cls, folder: Path) -> Gate:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: it does not exist; the message says how it is made.
            ValueError: it is damaged.
        """
        path = Path(folder) / GATE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so it cannot be told which images the model knows: run "
                f"{calibrating(Path(folder))} first"
            )
        try:
            with safe_open(path, "pt") as opened:
                told = dict(entry.split("=", 1) for entry in (opened.metadata() or {})["gate"].split(";"))
                references = opened.get_tensor("references")
                names = set(opened.keys())
                trained = {name: opened.get_tensor(name) for name in names & {"trained"}}
            height, width = map(int, told["shape"].split("x"))
            low, high = map(float, told.get("detail", "0to" + repr(math.inf)).split("to"))
            return cls(
                references,
                float(told["doubtful"]),
                float(told["refused"]),
                (height, width),
                told["fingerprint"],
                detail=(low, high),
                **trained,
            )
        except Exception as error:  # a damaged file makes safetensors raise almost anything
            raise ValueError(f"{path} is not a readable gate ({error}); run python -m utils calibrate again") from error


def calibrating(folder: Path) -> str:
    """The command that makes the model of a folder ready for scans of one's own."""
    command = "python -m utils calibrate"
    if folder.parent.name == "checkpoints":
        return f"{command} --root {folder.parents[1]} --model {folder.name}"
    return f"{command} --model {folder} --data FOLDER, with the prepared images that it was trained on,"


def fit_gate(train: ImageSet, validation: ImageSet) -> Gate:
    """The gate of a data set.

    Args:
        train: whose slices are kept, spread over the patients.
        validation: of other patients, on whose slices the distances are chosen.

    Raises:
        ValueError: no validation images.
    """
    if not len(validation):
        raise ValueError("a gate needs validation images, on which its distance is chosen")
    kept = train.balanced_subset(REFERENCES)
    pooled = torch.cat([_pooled(kept.pixels(part)) for part in torch.arange(len(kept)).split(512)])
    references = (pooled * 255).round().to(torch.uint8)[:, 0]
    height, width = train.images.shape[-2:]
    open_gate = Gate(references, 2.0, 2.0, (int(height), int(width)), train.info.get("fingerprint", ""))
    parts = torch.arange(len(validation)).split(512)
    found = torch.cat([open_gate.distances(validation.pixels(part)) for part in parts])
    doubtful, farthest = float(found.quantile(_DOUBT_SHARE)), float(found.max())
    limits = (round(doubtful, 4), round(_REFUSE_FACTOR * max(farthest, doubtful), 4))
    fine = torch.cat([fine_detail(train.pixels(part)) for part in torch.arange(len(train)).split(512)])
    return replace(
        open_gate,
        doubtful=limits[0],
        refused=limits[1],
        trained=pixel_digests(train.images).sort().values,
        detail=(round(float(fine.min()), 5), round(float(fine.max()), 5)),
    )


def pixel_digests(images: torch.Tensor) -> torch.Tensor:
    """The first eight bytes of the SHA-256 of each image's pixels, int64 N.

    Args:
        images: uint8 N x C x H x W.
    """
    rows = images.cpu().contiguous().flatten(1).numpy()
    found = [int.from_bytes(hashlib.sha256(row).digest()[:8], "little", signed=True) for row in rows]
    return torch.tensor(found, dtype=torch.int64)


def fine_detail(images: torch.Tensor) -> torch.Tensor:
    """How strong grain is inside the head, as a share of the image's standard deviation, N.

    The estimate of Immerkaer (1996, doi:10.1006/cviu.1996.0060) of a noise's standard deviation, which fine anatomy
    adds to. It depends on the size of the image; a constant one has 0.

    Args:
        images: N x 1 x H x W in [0, 1].
    """
    grain = F.conv2d(images, torch.tensor(_GRAIN)[None, None].to(images)).abs().flatten(1)
    head = (images > _BACKGROUND / 255)[..., 1:-1, 1:-1].flatten(1)
    noise = math.sqrt(math.pi / 2) / 6 * (grain * head).sum(1) / head.sum(1).clamp(min=1)
    return noise / images.flatten(1).std(1).clamp(min=1e-3)


def _pooled(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, (SIDE, SIDE), mode="area")


def _greys(images: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the pooled pixels of each image, N x 2."""
    flat = _pooled(images).flatten(1)
    return torch.stack([flat.mean(1), flat.std(1)], 1)


def _comparable(images: torch.Tensor) -> torch.Tensor:
    """Pooled, centred and of unit length, N x SIDE²; a constant image becomes 0, which is far from all."""
    flat = _pooled(images).flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-3)


def _joined(told: dict[str, Any]) -> str:
    return ";".join(f"{name}={value}" for name, value in told.items())
