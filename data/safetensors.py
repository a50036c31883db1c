"""The safetensors format: read it memory-mapped, write it as float32.

A file has the header's length in 8 bytes, the header, then the tensors' bytes. The header is JSON:
{name: {"dtype": "F32", "shape": [...], "data_offsets": [start, stop]}}.
"""
import json
import struct

import numpy as np

from data.files import write_atomically

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "BOOL": "bool", "U8": "uint8", "I64": "int64"}


def read_safetensors(path):
    """Return {name: tensor}, mapped from the file: pages are read when used, and writing to a
    tensor leaves the file as it is. A damaged file may raise any exception."""
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    return {name: view_tensor(raw[start:], **entry) for name, entry in header.items()}


def view_tensor(data, dtype, shape, data_offsets):
    """Return the tensor that a header entry describes: a view of `data`, or a copy if unaligned."""
    import torch
    dtype, (start, stop) = getattr(torch, DTYPES[dtype]), data_offsets
    values = torch.from_numpy(data[start:stop])
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()
    return values.view(dtype).view(shape)


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
