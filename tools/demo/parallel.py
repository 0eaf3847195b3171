"""Training by several processes, one a GPU, as `torchrun` starts them; one process is the special case."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch
from torch import distributed


def join(device: str) -> tuple[torch.device, int]:
    """Joins the other processes, if there are any; all but the first print nothing from then on.

    Returns:
        The device of this process, and its rank.
    """
    if "RANK" not in os.environ:
        return torch.device(device), 0
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = distributed.get_rank()
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if device == "cpu":
        return torch.device(device), rank
    own = torch.device(device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own, rank


def first() -> bool:
    """Whether this process is the only or the first one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def same_start(parameters: Iterable[torch.Tensor]) -> None:
    """Gives every process the parameters of the first one, in place."""
    if distributed.is_initialized():
        for parameter in parameters:
            distributed.broadcast(parameter.detach(), src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Puts the mean over processes in place of every gradient."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for waiting in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        waiting.wait()
    torch._foreach_div_(gradients, distributed.get_world_size())


def agreed(number: int, device: torch.device) -> int:
    """Returns the number that the first process has."""
    if not distributed.is_initialized():
        return number
    told = torch.tensor(number, device=device)
    distributed.broadcast(told, src=0)
    return int(told)
