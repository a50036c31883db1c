"""Distributed training with torchrun: ranks, all-reduce, DDP. Without torchrun: one rank, 0."""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from config import UserError


@contextlib.contextmanager
def process_group(device):
    """Context manager: join torchrun's processes, and yield this rank's device. Only rank 0 prints.
    Raises UserError if there are fewer GPUs than ranks."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    if backend == "nccl":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} has no GPU of its own; start fewer processes")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # A prefix for each restart: torchrun's store still has the addresses of ranks that died.
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            device_id=device if backend == "nccl" else None,
                            timeout=timedelta(hours=2))  # rank 0 may have to download gpt2-xl
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    yield device
    dist.destroy_process_group()  # not after an error: the other ranks may be waiting for this one


def rank_and_world_size():
    """Return this process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_rank_0():
    """Whether this process writes files."""
    return rank_and_world_size()[0] == 0


@contextlib.contextmanager
def rank_0_first():
    """Context manager: rank 0 runs the block before the others, for downloads that they share."""
    if not is_rank_0():
        dist.barrier()
    yield
    if dist.is_initialized() and is_rank_0():
        dist.barrier()


def all_reduce(device, *numbers):
    """Return the sum of each number over all ranks, as a list."""
    if not dist.is_initialized():
        return list(numbers)
    summed = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def wrap_model(model, dataset, compiled):
    """Wrap the model in torch.compile and, if distributed, in DDP. The weights are shared."""
    if compiled:
        # Text has one or two shapes, each with a graph of its own; chats share a dynamic one.
        model = torch.compile(model, dynamic=False if dataset.kind == "text" else None)
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model
