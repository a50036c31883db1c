"""The device and its dtype, mixed precision, torch.compile, and running out of memory."""
import contextlib
import os
import shutil
import sys

import torch

from config import UserError

COMPILE_MIN_FLOPS = 1e16  # of a run, for which compiling pays: a minute or two on an A100


def pick_device(device="auto", dtype="auto"):
    """Resolve "auto" or a name: (torch.device, torch.dtype, a text that says why). A Mac's GPU
    (mps) is used by name only, since PyTorch computes some things wrong on it. Raises UserError for
    a device that this machine does not have, or an unknown dtype."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(best if device == "auto" else device)
    except RuntimeError:
        raise UserError(f"device={device!r} is not a device; use auto, cpu, cuda, cuda:1 or "
                        "mps") from None
    has_mps = torch.backends.mps.is_available()
    missing = picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count()
    if picked.type not in ("cpu", best, "mps" if has_mps else "cpu") or missing:
        raise UserError(f"device={device!r} is not available on this machine; use auto or {best}")
    # Emulated bfloat16, as on a T4 or V100, is slower than float32.
    has_bfloat16 = picked.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False)
    if dtype == "bfloat16" and picked.type == "cuda" and not has_bfloat16:
        raise UserError(f"dtype=bfloat16: {picked} does not support it; use float32")
    name = ("bfloat16" if has_bfloat16 else "float32") if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: use auto, float32 or bfloat16 (chat.py: or int8)")
    hint = "; there is mps too: --device=mps" if has_mps and device == "auto" else ""
    return picked, getattr(torch, name), f"{picked}, {name}{hint}"


def mixed_precision(device, dtype):
    """Context manager: matrix products in `dtype`; weights and losses stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """Convert a dataset's (idx, targets, loss_positions), NumPy arrays or None, to tensors on the
    device. From pinned memory a GPU copies while it computes."""
    tensors = [None if a is None else torch.from_numpy(a) for a in batch]
    pin = device.type == "cuda"
    return [t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=pin)
            for t in tensors]


def pick_compile(cfg, model, dataset, device):
    """Resolve compile=auto: (whether to compile, a text that says why)."""
    if cfg.compile != "auto":
        return cfg.compile == "on", "as set"
    if device.type != "cuda" or dataset.kind != "text":  # chats have hundreds of shapes
        return False, "it pays for text on a GPU"
    from torch.utils._triton import has_triton
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if not has_triton() or (sys.platform != "win32" and not any(map(shutil.which, compilers))):
        return False, "it needs Triton and a C compiler"
    tokens = cfg.max_iters * cfg.gradient_accumulation * cfg.batch_size * dataset.block_size
    if model.flops(tokens, tokens, tokens * dataset.block_size) < COMPILE_MIN_FLOPS:
        return False, "too short a run"
    return True, "it pays for text on a GPU"


@contextlib.contextmanager
def explain_torch_errors(cfg):
    """Context manager: turn out-of-memory errors, failed compilation and DDP's unused parameters
    into a UserError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if out_of_memory or "allocate memory" in str(error) or "out of memory" in str(error):
            raise UserError(f"out of memory; the last checkpoint is kept; {smaller_batches(cfg)}"
                            ) from error
        if "parameters that were not used" in str(error):
            raise UserError("a parameter of model.py is unused in the forward pass, which DDP does "
                            "not allow; remove it, or train without torchrun") from error
        if cfg.compile == "on" and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            cause = str(getattr(error, "inner_exception", error)).split("\n")[0]
            raise UserError(f"compile=on: torch.compile failed ({cause}); use --compile=off"
                            ) from error
        raise


def smaller_batches(cfg):
    """Advice where a step does not fit into memory: smaller micro-batches, as many tokens a
    step."""
    if cfg.batch_size == 1:
        return "use a smaller --block_size, or a smaller model"
    factor = 2 if cfg.batch_size % 2 == 0 else cfg.batch_size  # an odd one becomes 1
    return (f"use --batch_size={cfg.batch_size // factor} --gradient_accumulation="
            f"{cfg.gradient_accumulation * factor}, which is the same number of tokens a step")
