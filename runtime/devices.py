"""Pick the device and dtype, use mixed precision, and explain PyTorch's errors in one line."""
import contextlib
import re

import torch

from config import UserError

ADVICE = {  # keyed by a pattern in PyTorch's error message
    "MemoryError|out of memory|allocate memory":
        "out of memory; the last checkpoint is kept; use a smaller --batch_size with more "
        "--gradient_accumulation, a smaller --block_size or a smaller model",
    "BackendCompilerFailed|InductorError|TritonMissing":
        "torch.compile failed; install Triton and a C compiler, or use --compile=False"}


def pick_device(device="auto", dtype="auto"):
    """Resolve "auto" or names to (torch.device, torch.dtype, a description). "auto" never selects a
    Mac's GPU (mps), where PyTorch computes some things incorrectly. Raises UserError for a device
    that this machine does not have, or a dtype that the device does not support."""
    names = ["auto", "cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in names:
        raise UserError(f"device={device!r} is not available here; use {', '.join(names)}")
    if device == "auto":
        device = "cuda" if "cuda" in names else "cpu"
    dtypes = ["auto", "float32", "bfloat16"]
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):  # a T4 or V100
        dtypes.remove("bfloat16")  # emulated, it is slower than float32
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} is not supported on {device}; use {', '.join(dtypes)}")
    if dtype == "auto":
        dtype = dtypes[-1] if on_gpu else "float32"
    return torch.device(device), getattr(torch, dtype), f"{device}, {dtype}"


def mixed_precision(device, dtype):
    """Context manager: compute matrix products in `dtype`; weights and losses stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """Convert a dataset's batch, NumPy arrays or None, to tensors on the device."""
    return [None if a is None else torch.from_numpy(a).to(device) for a in batch]


@contextlib.contextmanager
def explain_torch_errors():
    """Context manager: turn the PyTorch errors listed in ADVICE into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        for pattern, advice in ADVICE.items():
            if re.search(pattern, repr(error)):
                raise UserError(advice) from error
        raise
