"""Files that are written whole or not at all, JSON, and the safetensors format."""
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import torch


def write_atomically(path, write):
    """Call write(f) so that `path` is never half-written: to a file beside it, to the disk, then
    renamed over it. Raises OSError (disk full, no permission); an older file then stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: could not be saved ({cause}); "
                      "an earlier file there is untouched") from error


def write_json(path, value):
    """Write a value as JSON; see write_atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


# ---- safetensors ----
# 8 bytes, the length of the header; the header; then the bytes of the tensors.
# The header is JSON: {name: {"dtype": ..., "shape": [...], "data_offsets": [start, stop]}}.

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "U8": torch.uint8}


def read_safetensors(path):
    """Yield (name, tensor) for each tensor of a safetensors file, the largest first, in memory of
    its own.

    Every number is checked before it is used. Raises ValueError for a file that is cut short or
    says anything impossible.
    """
    with open(path, "rb") as f:
        data_start, entries = read_safetensors_header(f, path)
        for name, dtype, shape, start, stop in entries:
            # NumPy's memory is reused better than torch's, once freed.
            raw = np.empty(stop - start, np.uint8)
            f.seek(data_start + start)
            if f.readinto(raw) != stop - start:
                raise broken(path, f"{name!r} is cut short")
            tensor = torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0)
            yield name, tensor.view(shape)
            del raw, tensor


def read_safetensors_header(f, path):
    """(where the tensors' bytes begin, [(name, dtype, shape, start, stop), ...], the largest
    first)."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    if not 2 <= length <= min(size - 8, 100_000_000):
        raise broken(path, "its header does not fit in it")
    try:
        header = json.loads(f.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        found = [(name, entry["dtype"], list(entry["shape"]), list(entry["data_offsets"]))
                 for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = None
    if not found:
        raise broken(path, "its header is broken or empty")
    entries = []
    for name, kind, shape, offsets in found:
        if not isinstance(kind, str) or kind not in DTYPES:
            raise broken(path, f"{name!r} is of unknown type {kind!r}")
        whole_numbers = all(type(n) is int and n >= 0 for n in shape + offsets)
        if len(offsets) != 2 or not whole_numbers or math.prod(n or 1 for n in shape) >= 2**60:
            raise broken(path, f"{name!r} has impossible numbers")
        start, stop = offsets
        if not start <= stop <= size - 8 - length:
            raise broken(path, f"{name!r} ends beyond the file")
        if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
            raise broken(path, f"{name!r} has another size than its shape")
        entries.append((name, DTYPES[kind], shape, start, stop))

    def bytes_of(entry):
        *_, start, stop = entry
        return stop - start

    return 8 + length, sorted(entries, key=bytes_of, reverse=True)


def broken(path, what):
    """The error for a safetensors file that cannot be read."""
    return ValueError(f"{path}: not a whole safetensors file ({what}); fetch it again")


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32 in the format that read_safetensors reads; never half a
    file."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        stop = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.detach().float().cpu().contiguous().numpy().data)

    write_atomically(path, write)
