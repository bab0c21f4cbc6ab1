"""Modes that a model is in for a while, and leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; each module's own mode again afterwards, always."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # of hundreds of modules nearly all are in their mode already, and setting one takes longer than looking
        if any(mode for _, mode in modes):
            model.eval()
        yield model
    finally:
        # set directly: train(mode) would also change children and may be overridden
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and frozen parameters inside; each module's and parameter's own state again afterwards, always."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with eval_mode(model):
        try:
            for parameter, flag in flags:
                if flag:
                    parameter.requires_grad_(False)
            yield model
        finally:
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
