"""GPU check: run and measure on your GPU what a CPU cannot show. Prints one table, to paste into an issue.

    python -m tests.gpu_check                     # eight minutes at most, with a GPU of 40 GB or more
    python -m tests.gpu_check --batch_size=4      # with 16 GB
    python -m tests.gpu_check --device=cpu --n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --merges=300 --rows=30 \
        --batch_size=2 --steps=1                  # a minute on a CPU, to try this script

It downloads nothing, since weights and data are random. Its temporary files take 4 GB. A training speed is that of
the second half of the steps in log.csv. MFU is relative to the data sheet's peak, as in train.py's log. A row that
fails shows its error; the traceback goes to standard error, and the exit code is 1.
"""
import csv
import gc
import itertools
import json
import time
import traceback
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import numpy as np
import torch

import chat
import config
import finetune
import train
from data.conversation import assemble
from data.datasets import SPLITS, write_chats, write_meta, write_tokens
from data.files import write_text
from data.tokenizer import SPLIT_PATTERN, get_tokenizer
from model import GPT, GPTConfig
from runtime import log
from runtime.checkpoint import model_state, save_checkpoint
from runtime.devices import mixed_precision, pick_device
from tests.bench import nanogpt_step, python, quiet, temporary_folder

ACCUMULATION = 4  # micro-batches per step of GPT-2
SIDE = 8192  # of the matrices whose product is timed


@dataclass
class Settings:
    device: str = "cuda"  # cuda, cuda:1, or cpu to try this script, with small sizes
    batch_size: int = 16  # windows per micro-batch of GPT-2
    block_size: int = 1024  # GPT-2's sizes
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    merges: int = 50_000  # of the tokenizer
    rows: int = 5_000  # chats to finetune on
    steps: int = 20  # training steps to measure, after as many warmup steps
    new_tokens: int = 200  # in each reply from chat.py


class Check:
    """What the rows share: settings, a folder with generated data, the device and its peak FLOP/s."""

    def __init__(self, cfg, folder):
        self.cfg, self.folder, self.gpt2_speeds = cfg, folder, {}
        self.device, self.dtype, _ = pick_device(cfg.device, "bfloat16")
        self.on_gpu = self.device.type == "cuda"
        self.sheet = log.peak_flops(self.device, self.dtype)
        a = torch.randn(SIDE, SIDE, device=self.device, dtype=self.dtype)
        self.measured = 2 * SIDE**3 / min(self.seconds(lambda: a @ a) for _ in range(20))
        self.sizes = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
        self.shape = GPTConfig(256 + cfg.merges + 4, **self.sizes)

    def seconds(self, function):
        """Return the seconds that function() takes on the device."""
        synchronize = torch.cuda.synchronize if self.on_gpu else lambda device: None
        synchronize(self.device)
        began = time.perf_counter()
        function()
        synchronize(self.device)
        return time.perf_counter() - began

    def start(self):
        """Free what earlier rows left, and measure the peak memory from here."""
        torch.compiler.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self):
        return f"{torch.cuda.max_memory_allocated(self.device) / 2**30 if self.on_gpu else 0:.1f} GiB"

    @cached_property
    def uninterrupted(self):
        return small_run(self, out="uninterrupted")

    def run(self, script, recipe=None, out="out", **settings):
        """Run train.py or finetune.py in this process; return the steps in its log.csv, [{column: number}, ...]."""
        self.start()
        flags = {"out_dir": self.folder / out, "device": self.cfg.device, "dtype": "bfloat16", "eval_tokens": 1,
                 "sample_interval": 0, "eval_interval": 10**6, "max_iters": 2 * self.cfg.steps} | settings
        quiet(script.main, *([config.REPO / "config" / recipe] if recipe else []),
              *(f"--{name}={value}" for name, value in flags.items()))
        lines = (self.folder / out / "log.csv").read_text(encoding="utf-8").splitlines()
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines) if row["loss"]]


def speed(steps):
    """Return (tokens per second, milliseconds per step) of the second half of a run's steps."""
    steps = steps[len(steps) // 2:]
    seconds = sum(step["seconds"] for step in steps)
    return sum(step["tokens"] for step in steps) / seconds, 1000 * seconds / len(steps)


def compare(steps, others):
    """Return how close the losses of two runs are. Raises RuntimeError for a difference of 1% or more."""
    largest = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, others, strict=True))
    if not largest < 0.01:
        raise RuntimeError(f"the losses differ by {largest:.1%}")
    return "same losses: yes, " + (f"to within {largest:.0e}" if largest else "exactly")


def generate_data(check):
    """Write what the rows need: a tokenizer of GPT-2's size, random text in its ids and in bytes, chats, base.pt."""
    rng, folder, n_ids, count = np.random.default_rng(0), check.folder, 256 + check.cfg.merges, check.cfg.rows
    pairs = itertools.islice(itertools.product(range(256), repeat=2), check.cfg.merges)
    spec = {"pattern": SPLIT_PATTERN, "merges": list(map(list, pairs))}
    write_text(folder / "tokenizer.json", json.dumps(spec))
    meta = {"kind": "text", "tokenizer": "../tokenizer.json", "vocab_size": n_ids + 4}
    for name, high, more in (("tokens", n_ids, {}), ("bytes", 256, {"tokenizer": "bytes", "vocab_size": 260})):
        (folder / name).mkdir()
        for split in SPLITS:
            write_tokens(folder / name / f"{split}.bin", [rng.integers(0, high, 200_000)])
        write_meta(folder / name, meta | more)

    # Lengths like Alpaca's: a mean of 80 tokens, and a few of 500 and more.
    lengths = zip(*(rng.lognormal(np.log(median), spread, 2 * count).astype(int) + 1
                    for median, spread in ((13, 0.6), (36, 0.95))))
    enc = get_tokenizer(spec)
    chats = [(assemble(zip(("user", "assistant"), (rng.integers(0, n_ids, n) for n in pair)), enc), None, "")
             for pair in lengths]
    (folder / "chats").mkdir()
    write_meta(folder / "chats", meta | {"kind": "chat"} | write_chats(
        folder / "chats", {"train": chats[:count], "val": chats[count:]}))
    save_checkpoint(folder / "base.pt", model_state(GPT(check.shape), spec, "text", step=0, max_iters=0))


# ---- the rows: functions of a Check that return a result as text ----

def gpt2(check, compiled):
    """Train GPT-2 with train.py."""
    steps = check.run(train, "train_gpt2.py", data_dir=check.folder / "tokens", batch_size=check.cfg.batch_size,
                      gradient_accumulation=ACCUMULATION, compile=compiled, **check.sizes)
    check.gpt2_speeds[compiled] = speed(steps)[0]
    return describe(check, check.gpt2_speeds[compiled])


def nanogpt(check, compiled):
    """Train GPT-2 as nanoGPT's train.py does."""
    check.start()
    model = GPT(check.shape).to(check.device)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-6, (0.9, 0.95), weight_decay=0.1, fused=True)
    step = nanogpt_step(check.folder / "tokens", model, optimizer, check.cfg.batch_size, ACCUMULATION,
                        mixed_precision(check.device, check.dtype), compiled)

    def take_steps():
        for _ in range(check.cfg.steps):
            step()

    take_steps()  # warmup
    theirs = check.cfg.steps * ACCUMULATION * check.cfg.batch_size * check.cfg.block_size / check.seconds(take_steps)
    ours = check.gpt2_speeds.get(compiled)
    return describe(check, theirs) + (f"; ours is {ours / theirs:.2f} times as fast" if ours else "")


def describe(check, tokens_per_second):
    """Return a training speed of GPT-2, its MFU and the peak memory, as text."""
    T, n = check.cfg.block_size, check.cfg.block_size * check.cfg.batch_size
    flops = GPT(check.shape).flops(n, n, n * T) / n * tokens_per_second
    return (f"{tokens_per_second:,.0f} tokens/s, MFU {flops / check.sheet:.1%} ({flops / check.measured:.1%} of the "
            f"matrix product), {check.memory()}")


def finetuning(check):
    steps = check.run(finetune, "finetune_alpaca.py", data_dir=check.folder / "chats",
                      init_from=check.folder / "base.pt")
    return "{:,.0f} tokens/s, {:.0f} ms per step, ".format(*speed(steps)) + check.memory()


def shakespeare(check, compiled):
    steps = check.run(train, "train_shakespeare.py", data_dir=check.folder / "bytes", compile=compiled,
                      max_iters=5 * check.cfg.steps)
    return "{:,.0f} tokens/s, {:.2f} ms per step".format(*speed(steps))


def reply(check):
    """Generate a reply of chat.py three times; the fastest counts."""
    check.start()
    cfg = chat.Settings(checkpoint=check.folder / "base.pt", device=check.cfg.device, dtype="bfloat16", seed=0,
                        max_new_tokens=check.cfg.new_tokens)
    session, _ = chat.load_session(cfg)
    ids = session.enc.encode_ordinary("Once upon a time")
    seconds = min(check.seconds(lambda: list(session.reply(ids, cfg))) for _ in range(3))
    return f"{len(session.history[-1][1]) / seconds:,.0f} tokens/s, {check.memory()}"


def small_run(check, script=train, **settings):
    """Train a small model with dropout and Muon; the schedule does not depend on max_iters."""
    return check.run(script, data_dir=check.folder / "bytes", block_size=check.cfg.block_size // 4, n_layer=2, dropout=0.1,
                     decay="constant", eval_interval=check.cfg.steps, gradient_accumulation=2, **settings)


def resumed(check):
    small_run(check, out="resumed", max_iters=check.cfg.steps)
    return compare(small_run(check, out="resumed", resume=True), check.uninterrupted)


def two_processes(check):
    if check.on_gpu and torch.cuda.device_count() < 2:
        return "skipped: only one GPU"
    both = SimpleNamespace(main=lambda argv: python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *argv))
    return compare(small_run(check, both, out="both"), check.uninterrupted)


ROWS = {"GPT-2 step": partial(gpt2, compiled=False),
        "nanoGPT's step": partial(nanogpt, compiled=False),
        "GPT-2 step, compiled": partial(gpt2, compiled=True),
        "nanoGPT's step, compiled": partial(nanogpt, compiled=True),
        "finetune_alpaca.py, random chats": finetuning,
        "train_shakespeare.py, random text": partial(shakespeare, compiled=False),
        "train_shakespeare.py, random text, compiled": partial(shakespeare, compiled=True),
        "chat.py, GPT-2, bfloat16": reply,
        "resumed run, uninterrupted run": resumed,
        "two processes, one process": two_processes}  # the last, since NCCL may hang


def main(argv):
    """Print the table. Raises UserError without a GPU that computes in bfloat16."""
    cfg, began, failed = config.load(Settings, argv, __doc__), time.monotonic(), False
    with temporary_folder() as folder:
        check = Check(cfg, folder)
        card = torch.cuda.get_device_name(check.device) if check.on_gpu else "CPU"
        print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, bfloat16. A large matrix product: "
              f"{check.measured / 1e12:.4g} TFLOP/s, the data sheet's peak: {check.sheet / 1e12:.4g}. GPT-2: "
              f"{cfg.n_layer} layers x {cfg.n_embd}, {ACCUMULATION} x {cfg.batch_size} x {cfg.block_size} tokens per "
              "step\n\n| what | result |\n|---|---|", flush=True)
        generate_data(check)
        for what, row in ROWS.items():
            try:
                result = row(check)
            except Exception as error:  # of any kind: the other rows still run
                traceback.print_exc()
                failed, result = True, "failed: " + f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"| {what} | {result.replace('|', '/')} |", flush=True)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main)
