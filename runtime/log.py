"""The training log: a row of log.csv for every step, the progress line, speed and MFU."""
import math
import re
import time

import torch

from data.files import write_text
from runtime.distributed import is_rank_0, rank_and_world_size

# Peak dense bfloat16 FLOP/s by a part of the device's name (data sheets); the first that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
              "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 5090": 209e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}


def peak_flops(device, dtype):
    """Peak FLOP/s of all ranks' devices: the data sheet's for a GPU in bfloat16, the fastest large
    matmul measured now for a CPU, nan where it is not known."""
    if device.type == "cpu":
        a = torch.ones(1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        return 2 * 1024**3 / min(seconds)  # ranks on one machine share its cores
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return rank_and_world_size()[1] * peak
    return math.nan


class Logger:
    """Writes out_dir/log.csv and prints progress lines, on rank 0. Another logger (wandb,
    TensorBoard) takes the same rows: numbers by name."""

    COLUMNS = ("step", "epoch", "loss", "lr", "norm", "tokens", "seconds", "tokens_per_second",
               "mfu", "train_loss", "val_loss", "val_bits_per_byte")

    def __init__(self, path, first_step, device, dtype):
        self.path, self.enabled = path, is_rank_0()
        self.tokens = self.seconds = self.flops = 0.0  # since the last progress line
        if not self.enabled:
            return
        self.peak = peak_flops(device, dtype)
        kept = []
        if first_step and path.exists():  # a run that was killed wrote rows that come again
            rows = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            kept = rows[:first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join([",".join(self.COLUMNS), *kept]) + "\n")

    def log(self, row):
        """Append a row, a dict of numbers with some of COLUMNS and "flops". Raises OSError."""
        if not self.enabled:
            return
        if "flops" in row:
            row = row | {"tokens_per_second": row["tokens"] / row["seconds"],
                         "mfu": row["flops"] / row["seconds"] / self.peak}
            self.tokens += row["tokens"]
            self.seconds += row["seconds"]
            self.flops += row["flops"]
        values = (f"{row[name]:.8g}" if name in row else "" for name in self.COLUMNS)
        with open(self.path, "a", encoding="utf-8", newline="\n") as f:
            f.write(",".join(values) + "\n")

    def print_step(self, row, max_iters, seconds_per_step):
        """Print the progress line of a row; speeds are means since the last one."""
        if not self.enabled:
            return
        mfu = self.flops / self.seconds / self.peak  # model FLOPs utilization
        left = seconds_per_step * (max_iters - row["step"])
        print(f"step {row['step']:>5}/{max_iters}  epoch {row['epoch']:.2f}  loss "
              f"{row['loss']:.4f}  norm {row['norm']:.2f}  {self.tokens / self.seconds:,.0f} "
              f"tokens/s  MFU {'n/a' if math.isnan(mfu) else f'{mfu:.0%}'}  {duration(left)} left",
              flush=True)
        self.tokens = self.seconds = self.flops = 0.0


def bits_per_byte(loss, n_targets, n_bytes):
    """Convert a mean loss per target, in nats, to bits per byte of the text that the targets encode
    (see count_targets in data/datasets.py); nan for no bytes."""
    return loss * n_targets / n_bytes / math.log(2) if n_bytes else math.nan


def duration(seconds):
    """Format seconds: 45s, 3m05s, 2h10m, 13d04h."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
