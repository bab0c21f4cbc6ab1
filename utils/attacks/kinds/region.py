"""PGD that may change only a part of the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.gradient import pgd
from utils.data.anatomy import PARTS, part_masks
from utils.data.decode import decode_grey


@register("region")
class RegionPGD(Kind):
    """PGD inside a part of the slice, or a mask of one's own.

    After the idea of Kryptonite (arXiv:2108.10251), whose method is not public.

    What it finds lies in the ball of the whole image, so that it is never stronger than PGD there.
    """

    title = "PGD-{steps}"
    takes_loss = True

    def title_of(self, budget: Attack) -> str:
        part, mask = budget.options.get("part"), budget.options.get("mask")
        return f"{super().title_of(budget)} in the {part or f'mask {Path(str(mask)).name}'}"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return pgd(
            model,
            images,
            labels,
            alpha=budget.alpha,
            steps=budget.steps,
            random_start=budget.random_start,
            loss=budget.loss,
            mask=_mask(budget.options, images),
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def files(self, options: Mapping[str, Any]) -> list[Path]:
        return [Path(options["mask"])] if "mask" in options else []

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) == {"mask"}:
            read_mask(options["mask"])
        elif set(options) != {"part"} or options["part"] not in PARTS:
            raise ValueError(
                f"a region attack takes the option part, one of {', '.join(PARTS)}, or mask, a picture that is white "
                "where a slice may be changed, and no other"
            )


def read_mask(path: str | Path) -> torch.Tensor:
    """A picture as a mask: 1 where it is brighter than half of white, float32 1 x 1 x H x W.

    Raises:
        ValueError, OSError: no picture that can be read, or one that is black everywhere.
    """
    if not isinstance(path, (str, Path)):
        raise ValueError(f"mask must be the path of a picture, not {path!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"the mask {path} does not exist; name a picture that is white where may be changed")
    found = torch.from_numpy(decode_grey(Path(path)) > 127)
    if not found.any():
        raise ValueError(f"the mask {path} is white nowhere, so that nothing may be changed")
    return found[None, None].float()


def _mask(options: Mapping[str, Any], images: torch.Tensor) -> torch.Tensor:
    mask = read_mask(options["mask"]) if "mask" in options else part_masks(images, options["part"])
    return mask.to(images)
