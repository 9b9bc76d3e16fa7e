"""Many processes as one: what torchrun starts are ranks of a group, each with the same network and its share of images.

    torchrun --nproc-per-node 8 train-cnn.py

Rank 0 alone reads and writes files and speaks. Without torchrun there is one process, rank 0 of 1, and everything here
does nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn


@contextlib.contextmanager
def joined():
    """Inside, the processes that torchrun has started are a group: over NCCL between GPUs, over gloo between CPUs.

    The standard output of all but rank 0 is dropped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
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
        dist.broadcast_object_list(outcome)  # whatever happened, for the others wait for it
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


def average(network, examples):
    """After a backward pass on so many `examples` of this rank: let all ranks go on with the same, as one would.

    Gradients, and the statistics that batch norm has learnt, become their means over the images of all ranks. They
    travel together, as one flat tensor, after the backward pass: DistributedDataParallel would send them meanwhile, but
    its hooks expect one forward pass for each backward pass, and a defence makes several.
    """
    if world_size() == 1:
        return
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tensors = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    tensors += [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_ones(1)]) * examples
    dist.all_reduce(flat)
    *means, _ = (flat / flat[-1]).split([*(tensor.numel() for tensor in tensors), 1])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def seed_noise(seed, epoch):
    """Let every rank draw noise of its own, such as a defence's random starts.

    Rank 0 goes on as it would alone. The others begin anew in each epoch, so that a resumed run need not know how far
    they were.
    """
    if rank() > 0:
        torch.manual_seed(seed + epoch * world_size() + rank())
