"""A model whose passes ``torch.compile`` has fused, for attacks that take longer than the compiler does."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

#: Programs that torch may keep for one ``forward``: those of all models of a class count together, a few a model, and
#: torch goes on without compiling, with one line in its log, once its own limit of 8 is reached.
PROGRAMS = 64


class Compiled(nn.Module):
    """``model`` with its passes compiled at the first call; itself where that is not possible.

    It shares the model's weights and modes. Answers and gradients differ from the model's by rounding, so what an
    attack finds with it is to be judged by the model itself.

    Args:
        model: takes N x C x H x W.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.failed = False
        self._fused: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Answers of the model."""
        if self.failed or len(images) == 1:  # a single image would be compiled anew
            return self.model(images)
        try:
            if self._fused is None:
                self._fused = self._compile(images)
            return self._fused(images)
        except Exception as error:
            self.failed = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"the model cannot be compiled and runs as it is: {reason[0]}", stacklevel=2)
            return self.model(images)

    def _compile(self, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        # one program for every number of images, which changes with each image that is misclassified
        fused = torch.compile(self.model.forward, dynamic=True)
        if images.requires_grad:
            # the gradient is compiled when it is first taken, which would be outside the caller's try
            probe = images.detach().clone().requires_grad_(True)
            torch.autograd.grad(fused(probe).sum(), probe)
        return fused
