"""The safetensors format: read it memory-mapped, write it as float32.

8 bytes, the length of the header; the header; then the bytes of the tensors. The header is JSON:
{name: {"dtype": "F32", "shape": [...], "data_offsets": [start, stop]}}.
"""
import json
import struct

import numpy as np

from config import UserError
from data.files import write_atomically

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}


def read_safetensors(path):
    """Return {name: tensor}, mapped from the file: pages are read when used, and writing to a
    tensor leaves the file as it is. Raises UserError for a file that is damaged."""
    import torch
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="c")
        data_start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:data_start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= len(raw) - data_start:
                raise ValueError(f"{name!r} ends beyond the file")
            values = torch.from_numpy(raw[data_start + start:data_start + stop])
            if (data_start + start) % 4:  # torch views need aligned memory
                values = values.clone()
            tensors[name] = values.view(getattr(torch, DTYPES[entry["dtype"]])).view(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32, atomically. Raises OSError."""
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
