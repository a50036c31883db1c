"""The training log: a row of log.csv for every step, the progress line, speed and MFU."""
import math
import os
import re
import timeit
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch

from data.files import write_text
from runtime.distributed import is_rank_0, rank_and_world_size

# Peak dense bfloat16 FLOP/s by a part of the device's name (data sheets); the first match is used.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device, dtype):
    """Return the peak FLOP/s of all ranks: from the data sheet for a GPU in bfloat16, from the
    fastest of five large matmuls for a CPU, nan if it is not known."""
    if device.type == "cpu":
        a = torch.ones(1024, 1024, dtype=dtype)
        seconds = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
        return 2 * 1024**3 / seconds  # ranks on one machine share its cores
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return rank_and_world_size()[1] * peak
    return math.nan


class Logger:
    """Write log.csv and print progress lines, on rank 0."""

    COLUMNS = ("step", "epoch", "loss", "lr", "norm", "tokens", "seconds", "tokens_per_second",
               "mfu", "train_loss", "val_loss", "val_bits_per_byte")

    def __init__(self, path, first_step, device, dtype):
        self.path = path if is_rank_0() else Path(os.devnull)
        self.peak = peak_flops(device, dtype) if is_rank_0() else math.nan
        self.sums = Counter()  # of steps, tokens, seconds and flops since the last progress line
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = rows[1:first_step + 1]  # drop rows of steps that the resumed run repeats
        write_text(self.path, "\n".join([",".join(self.COLUMNS), *rows]) + "\n")

    def log(self, row):
        """Append a row, a dict of numbers with some of COLUMNS and "flops". Raises OSError."""
        if "flops" in row:
            row = row | {"tokens_per_second": row["tokens"] / row["seconds"],
                         "mfu": row["flops"] / row["seconds"] / self.peak}
            self.sums.update({name: row[name] for name in ("tokens", "seconds", "flops")}, steps=1)
        # wandb.log(row) would go here, behind `if is_rank_0()`, and wandb.init() into __init__.
        values = (f"{row[name]:.8g}" if name in row else "" for name in self.COLUMNS)
        with open(self.path, "a", encoding="utf-8", newline="\n") as f:
            f.write(",".join(values) + "\n")

    def print_step(self, row, max_iters):
        """Print the progress line of a row; speeds are means since the last one."""
        seconds = self.sums["seconds"]
        mfu = self.sums["flops"] / seconds / self.peak  # model FLOPs utilization
        steps_left = max_iters - row["step"]
        left = timedelta(seconds=int(seconds / self.sums["steps"] * steps_left))
        print(f"step {row['step']:>5}/{max_iters}  epoch {row['epoch']:.2f}  loss "
              f"{row['loss']:.4f}  norm {row['norm']:.2f}  {self.sums['tokens'] / seconds:,.0f} "
              f"tokens/s  MFU {mfu:.0%}  {left} left", flush=True)
        self.sums.clear()


def bits_per_byte(loss, n_targets, n_bytes):
    """Convert a mean loss per target, in nats, to bits per byte of text (nan for no bytes)."""
    return loss * n_targets / n_bytes / math.log(2) if n_bytes else math.nan
