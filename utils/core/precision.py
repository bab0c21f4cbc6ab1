"""What models compute in. Images, perturbations, losses and weights are always float32."""

from __future__ import annotations

import warnings

import torch

#: ``auto`` is bfloat16 on a GPU that has it. Never float16: an attack's input gradient would underflow in it.
PRECISIONS = ("auto", "fp32", "bf16")


def emulates_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` is a CPU that only imitates bfloat16, which costs far more than it saves."""
    return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def uses_bf16(precision: str, device: torch.device | str) -> bool:
    """Whether ``precision``, one of ``PRECISIONS``, means bfloat16 on ``device``; warns where that is emulated.

    Raises:
        ValueError: another word.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "bf16" and emulates_bf16(device):
        warnings.warn(
            "this CPU has no bfloat16 and imitates it, an order of magnitude slower than float32: "
            "take precision 'auto' or 'fp32'",
            stacklevel=2,
        )
    if precision != "auto":
        return precision == "bf16"
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """Inside, models compute in ``precision``; their weights and logits stay float32.

    Not Accelerate's own, which stays on a model after the training and would weaken its evaluation; without a cache of
    cast weights, which would hide what :func:`utils.training.optimization.perturbed_weights` does to them.
    """
    bf16 = uses_bf16(precision, device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16, cache_enabled=False)
