"""Training in several processes, started by torchrun: ranks, all-reduce, DDP. Without torchrun all
of it works as one process of rank 0."""
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
    """Context manager: join the processes that torchrun started, and yield this rank's device. Only
    rank 0 prints. Raises UserError where a rank has no GPU."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    on_gpu = device.type == "cuda"
    if device.type == "mps":
        raise UserError("device=mps: several processes cannot share it; leave out torchrun, or use "
                        "--device=cpu")
    if on_gpu:
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"rank {local_rank} has no GPU, this machine has {count}; use torchrun "
                            f"--nproc_per_node={count}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # A prefix for each restart: torchrun's store still has the addresses of ranks that died.
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank,
                            world_size=world_size, device_id=device if on_gpu else None,
                            timeout=timedelta(hours=2))  # rank 0 may have to download gpt2-xl
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        with contextlib.redirect_stdout(devnull if dist.get_rank() else sys.stdout):
            yield device
    dist.destroy_process_group()  # not after an error: the other ranks may be waiting for this one


def rank_and_world_size():
    """(this process's rank, the number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_rank_0():
    """Whether this process writes files."""
    return rank_and_world_size()[0] == 0


@contextlib.contextmanager
def rank_0_first():
    """Context manager: rank 0 runs the block before the others, for downloads that they share."""
    rank, world_size = rank_and_world_size()
    if rank:
        dist.barrier()
    yield
    if world_size > 1 and rank == 0:
        dist.barrier()


def all_reduce(device, *numbers):
    """Return the sum of each number over all ranks, as a list."""
    if not dist.is_initialized():
        return list(numbers)
    summed = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def wrap_model(model, dataset, use_compile):
    """Wrap the model in torch.compile and, for several processes, DDP; it shares the weights."""
    if use_compile:
        # Text has one or two shapes, each with a graph of its own; chats share a dynamic one.
        model = torch.compile(model, dynamic=False if dataset.kind == "text" else None)
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def sync_gradients(model, enabled):
    """Context manager for a backward pass: DDP averages gradients over the ranks only if
    enabled."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
