"""Several processes that train or test one network together. torchrun starts them, and each has a rank from 0.

    torchrun --nproc-per-node 8 train-cnn.py

Every process holds the same network and takes its share of the images. Only rank 0 reads and writes files and prints
results. If all ranks meet the same error, such as a loss of NaN, each of them prints it. Without torchrun there is one
process, and the functions here change nothing.
"""

import contextlib
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.constants import UserError
from utils.quoting import one_line

T = TypeVar("T")

# How long a rank waits for a slower one. If a rank fails, torchrun ends those that wait for it.
PATIENCE = timedelta(days=1)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started into a group: through NCCL between GPUs, through gloo between CPUs.

    Inside, only rank 0 prints to standard output. Raises UserError if the processes do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot join, so start them with torchrun: {one_line(error)}") from error
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    # A DistributedDataParallel in a reference cycle keeps the group's threads alive. If one of them needs Python while
    # Python is shutting down, the process aborts.
    gc.collect()
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that have ended


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_main(function: Callable[[], T]) -> T:
    """Call function() on rank 0 only, and return its result on every rank.

    If it raises, rank 0 raises the same error and reports it; the other ranks exit with status 1.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [False, None]
    try:
        if rank() == 0:
            outcome = [True, function()]
    finally:
        # After an error too, because the other ranks wait for this message. If they are gone, the error must not hide.
        with contextlib.nullcontext() if outcome[0] else contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(outcome)
    succeeded, result = outcome
    if not succeeded:
        raise SystemExit(1)
    return result


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share(batch: Tensor) -> Tensor:
    """The slice of a batch (N, ...) for this rank; the whole batch if it has fewer images than there are ranks."""
    return batch.tensor_split(world_size())[rank()] if len(batch) >= world_size() else batch


def replicated(network: nn.Module) -> nn.Module:
    """The module to call in training: the network, wrapped if several processes must average their gradients.

    Each rank keeps its own batch-norm statistics until `average_statistics`. By default, DistributedDataParallel would
    send them before every forward pass. A defence makes several passes in a step, and some of them keep no statistics.
    """
    if world_size() == 1:
        return network
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return DistributedDataParallel(network, **{option: False})  # type: ignore[arg-type]  # both options are booleans


def average_statistics(network: nn.Module) -> None:
    """Replace batch norm's running statistics, on every rank, by their mean over all ranks."""
    if world_size() == 1:
        return
    for norm in (module for module in network.modules() if isinstance(module, _BatchNorm)):
        for statistic in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
            dist.all_reduce(statistic)
            statistic /= world_size()


def seed_noise(seed: int, epoch: int) -> None:
    """Give every rank random numbers of its own, for example for a defence's random starts.

    Rank 0 continues the sequence that it would draw alone. The other ranks are seeded again in each epoch, so that a
    resumed run does not need their earlier states.
    """
    if rank() > 0:
        torch.manual_seed(seed + epoch * world_size() + rank())
