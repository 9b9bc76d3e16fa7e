"""Many processes as one: what torchrun starts are ranks of a group, each with the same network and its share of images.

    torchrun --nproc-per-node 8 train-cnn.py

Rank 0 alone reads and writes files and says how it goes; an error that every rank meets, such as a loss of NaN, is told
by each. Without torchrun there is one process, rank 0 of 1, and everything here does nothing.
"""

import contextlib
import gc
import inspect
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=1)  # for ranks that are slower: torchrun ends those that wait for one that has failed


@contextlib.contextmanager
def joined():
    """Inside, the processes that torchrun has started are a group: over NCCL between GPUs, over gloo between CPUs.

    The standard output of all but rank 0 is dropped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    # A DistributedDataParallel in a cycle of references holds the group's threads past its end, and one of them that
    # still wants Python while that is shutting down aborts the process.
    gc.collect()
    dist.destroy_process_group()  # not after an error, for NCCL would wait for ranks that are no longer there


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_main(function):
    """What function() returns on rank 0, on every rank: no other calls it, or needs the files that it reads.

    If it raises, so does rank 0, whose business it is to say why; the others exit with status 1.
    """
    if world_size() == 1:
        return function()
    outcome = [False, None]
    try:
        if rank() == 0:
            outcome = [True, function()]
    finally:
        # Whatever happened, for the others wait for it; if they are gone, what happened is to be said all the same.
        with contextlib.nullcontext() if outcome[0] else contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(outcome)
    succeeded, result = outcome
    if not succeeded:
        raise SystemExit(1)
    return result


def gather(value):
    """The values of all ranks, in their order, on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def share(batch):
    """Of a batch, a tensor (N, ...), the slice of this rank; all of it where there are fewer images than ranks."""
    return batch.tensor_split(world_size())[rank()] if len(batch) >= world_size() else batch


def replicated(network):
    """What is called in training: the network, of many processes wrapped so that backward passes average gradients.

    Batch norm's statistics are left to each rank until `average_statistics`: by default DistributedDataParallel sends
    them before every forward pass, and a defence needs several, some of which have no statistics of their own.
    """
    if world_size() == 1:
        return network
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(network, **{option: False})  # type: ignore[arg-type]  # one of two booleans


def average_statistics(network):
    """Let the statistics that batch norm has learnt on each rank become, on every rank, their mean."""
    if world_size() == 1:
        return
    for norm in (module for module in network.modules() if isinstance(module, _BatchNorm)):
        for statistic in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
            dist.all_reduce(statistic)
            statistic /= world_size()


def seed_noise(seed, epoch):
    """Let every rank draw noise of its own, such as a defence's random starts.

    Rank 0 goes on as it would alone. The others begin anew in each epoch, so that a resumed run need not know how far
    they were.
    """
    if rank() > 0:
        torch.manual_seed(seed + epoch * world_size() + rank())
