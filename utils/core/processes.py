"""Work shared among the processes of one run, so that the result is that of one process.

Each process works on its own part and all of them know the whole afterwards. With one process nothing here costs or
changes anything. Processes are started by ``accelerate launch``, ``torchrun`` or ``accelerate.notebook_launcher``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Job = TypeVar("Job")
Result = TypeVar("Result")
_BatchNorm = nn.modules.batchnorm._BatchNorm


def join_others() -> None:
    """Meet the other processes of a launcher, where one has started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState  # slow to import; picks the backend and this process's device

        if parent_process():
            # forked by notebook_launcher: the threads of the notebook's OpenMP do not exist here, and are waited for
            torch.set_num_threads(1)
        # without a GPU Accelerate must be told so, or it starts the processes and does not make them share gradients
        PartialState(cpu=not torch.cuda.is_available())


def rank() -> int:
    """Number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and talks for all."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def share_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """``work`` of each job, in order; with several processes each does every n-th and gets the others' results.

    Args:
        work: gives plain values or tensors on the CPU.
    """
    if world_size() == 1:
        return [work(job) for job in jobs]
    mine = [work(job) for job in jobs[rank() :: world_size()]]
    parts: list[list[Result]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, mine)
    return [parts[place % world_size()][place // world_size()] for place in range(len(jobs))]


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, elementwise; ``values`` itself with one."""
    if world_size() == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


@contextmanager
def shared_batchnorm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers in train mode normalise by the batch of all processes; torch's own do so on GPUs only.

    Ioffe and Szegedy, 2015, arXiv:1502.03167, Algorithm 1, over the union of all processes' batches.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)] if world_size() > 1 else []
    for layer in layers:
        layer.forward = MethodType(_normalise, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def _normalise(layer: _BatchNorm, batch: torch.Tensor) -> torch.Tensor:
    if not layer.training:
        return type(layer).forward(layer, batch)
    from torch.distributed.nn.functional import all_reduce  # unlike dist's, it passes gradients back

    values = batch.float() if batch.dtype in (torch.float16, torch.bfloat16) else batch
    axes = [axis for axis in range(values.ndim) if axis != 1]
    local = values.sum(axes)
    counted = all_reduce(torch.cat([local, local.new_tensor([values.numel() / values.shape[1]])]))
    count, mean = counted[-1].detach(), counted[:-1] / counted[-1].detach()
    shape = [1, -1, *[1] * (values.ndim - 2)]
    centred = values - mean.view(shape)
    variance = all_reduce(centred.square().sum(axes)) / count
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.detach(), share)
            layer.running_var.lerp_(variance.detach() * count / (count - 1), share)
    scale = (variance + layer.eps).rsqrt()
    scaled = centred * (scale if layer.weight is None else layer.weight * scale).view(shape)
    if layer.bias is not None:
        scaled = scaled + layer.bias.view(shape)
    return scaled.to(batch.dtype)
