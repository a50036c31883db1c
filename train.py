"""Train a GPT from scratch, on plain text or on chats.

    python train.py config/train_chat.py                 # the small instruction data, minutes on a laptop
    python train.py config/train_shakespeare.py          # plain text
    python train.py config/train_chat.py --resume=True   # go on where a run stopped
    python train.py --help                               # every setting

    torchrun --nproc_per_node=8 train.py config/train_gpt2.py        # many GPUs: the same steps, sooner

It writes out_dir/best.pt, which chat.py talks to, out_dir/last.pt, which --resume goes on from, log.csv and
(where matplotlib is installed) loss.png.
"""
import contextlib
import csv
import functools
import gc
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import config
from data.conversation import decode_conversation, encode_prompt, special_ids
from data.tokenizer import get_tokenizer
from data.tokens import SPLITS, folder_tokenizer, open_dataset, read_meta
from model import (
    GPT,
    GPT2_NAMES,
    GPTConfig,
    load_checkpoint,
    model_checkpoint,
    model_from_checkpoint,
    pick_device,
    save_checkpoint,
    write_atomically,
)


@dataclass
class LoopSettings:
    """What the training loop reads; finetune.py has these too."""
    # what and where
    data_dir: Path = Path("data/instruction")  # a prepared folder: train.bin, val.bin, meta.json
    out_dir: Path = Path("out/chat")  # where best.pt and last.pt go
    resume: bool = False  # go on from out_dir/last.pt
    # one step
    batch_size: int = 8  # windows of text, or as many chats as fit into batch_size * block_size tokens
    gradient_accumulation: int = 1  # batches summed up for one step, over all processes
    max_iters: int = 2000  # steps
    dropout: float = 0.0  # share of activations zeroed while training; slows memorizing
    # the optimizer
    optimizer: str = "muon"  # muon (the blocks' matrices; AdamW for the rest) or adamw (all)
    learning_rate: float = 0.01  # peak, of muon, or of adamw where it has all
    embedding_learning_rate: float = 0.003  # peak, of the AdamW beside muon
    warmup_iters: int = 20  # steps from 0 to the peak
    decay: str = "linear"  # after that: linear, cosine or constant
    final_lr: float = 0.0  # where the decay ends, as a fraction of the peak
    weight_decay: float = 0.0  # pull of weights towards 0; not of norms and biases
    momentum: float = 0.9  # muon's
    beta1: float = 0.9  # AdamW's momentum
    beta2: float = 0.99  # AdamW's memory of squared gradients
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # looking, saving
    log_interval: int = 50  # steps between progress lines
    eval_interval: int = 250  # steps between evaluations, each saves last.pt too
    save_interval: int | str = "10m"  # last.pt is saved in between: 500, every so many steps; 10m, minutes
    sample_interval: int = 500  # steps between samples of what the model writes; 0: none
    sample_prompt: str | None = None  # what samples go on from; None: a held-out question, or a line's start
    eval_tokens: int = 20_000  # tokens of an evaluation, of each split; always the same ones
    best_by: str = "val"  # best.pt has the lowest loss on val; or on train, for a model meant to memorize
    patience: int = 0  # stop after so many evaluations without a lower validation loss; 0: never
    # the machine
    seed: int = 1337  # of the first weights, the batches and the dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (matrix products; weights stay float32)
    compile: str = "auto"  # torch.compile: auto, on or off


@dataclass
class Settings(LoopSettings):
    """The loop's settings, and those of a model made from scratch."""
    init_from: str = "scratch"  # or gpt2, gpt2-medium, ..., a folder, a .pt: that model, of its own shape
    block_size: int = 128  # context length, in tokens
    n_layer: int = 4  # blocks, one after the other
    n_head: int = 4  # attention heads in each block
    n_embd: int = 256  # channels: the width of the model
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2


def check_settings(s):
    """Raise ValueError for the first setting out of its range."""
    def need(ok, name, what):
        if not ok:
            raise ValueError(f"{name}={getattr(s, name)}: must be {what}")

    for name in ("block_size", "n_layer", "n_head", "n_embd", "batch_size", "gradient_accumulation",
                 "max_iters", "log_interval", "eval_interval", "eval_tokens"):
        need(getattr(s, name, 1) >= 1, name, "1 or more")  # finetune.py has no n_layer and so on
    for name in ("learning_rate", "embedding_learning_rate"):
        need(getattr(s, name) > 0, name, "above 0")
    for name in ("weight_decay", "grad_clip", "warmup_iters", "patience"):
        need(getattr(s, name) >= 0, name, "0 or more")
    need(0 <= s.seed < 2**63, "seed", "from 0 to 2**63 - 1")
    for name in ("dropout", "momentum", "beta1", "beta2"):
        need(0 <= getattr(s, name) < 1, name, "from 0 to below 1")
    need(re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+m", str(s.save_interval)), "save_interval",
         "a number of steps (500) or of minutes (10m)")
    need(s.sample_interval >= 0, "sample_interval", "0 or more")
    need(0 <= s.final_lr <= 1, "final_lr", "from 0 to 1, a fraction of the peak")
    for name, choices in (("optimizer", ("muon", "adamw")), ("decay", ("linear", "cosine", "constant")),
                          ("best_by", ("val", "train")), ("compile", ("auto", "on", "off"))):
        need(getattr(s, name) in choices, name, " or ".join(choices))


# ---- a step ----

def get_lr(step, s):
    """The learning rate of a step, as a fraction of the peak: a linear warm-up, then the decay."""
    if step < s.warmup_iters:
        return (step + 1) / (s.warmup_iters + 1)
    done = (step - s.warmup_iters) / max(s.max_iters - s.warmup_iters, 1)
    left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[s.decay]
    return s.final_lr + (1 - s.final_lr) * max(left, 0.0)


def to_device(batch, device):
    """A dataset's (idx, targets, where), NumPy arrays or None, as tensors on the device."""
    return [None if a is None else torch.from_numpy(a).to(device, non_blocking=True) for a in batch]


def ranks():
    """(which process this is, how many train together): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(device, *numbers):
    """The sum of each number over all processes, as a list of floats."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64 if device.type != "mps" else None, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def not_finite(step, what, s, model):
    """The ValueError for a loss or gradient that is infinite or NaN. Names the parameter with the largest
    gradient."""
    rate = get_lr(step - 1, s) * s.learning_rate
    grads = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    largest = ""
    if grads:
        name = max(grads, key=lambda n: (not math.isfinite(grads[n]), grads[n]))
        plain = name.removeprefix("module.").removeprefix("_orig_mod.")  # of DDP and torch.compile
        largest = f", the largest gradient {grads[name]:.3g} in {plain}"
    return ValueError(f"step {step}: {what}; the learning rate was {rate:.2g}{largest}. The last good "
                      f"checkpoint is kept. Try a lower learning_rate (now {s.learning_rate:g}), more "
                      f"warmup_iters (now {s.warmup_iters}) or a " +
                      (f"lower grad_clip (now {s.grad_clip:g})" if s.grad_clip else "grad_clip of 1"))


def train_step(model, optimizers, dataset, step, s, device, autocast):
    """One step on the batches that belong to it: (mean loss per target, gradient norm, work), where work is
    (targets, tokens read, pairs of tokens in attention), over all processes.

    The gradient is that of the mean over all the step's targets, however they fall into batches and
    processes. Raises ValueError if the loss or the gradient is not a finite number; the weights are then
    still those before.
    """
    rank, world = ranks()
    first = step * s.gradient_accumulation
    batches = [dataset.batch("train", first + i) for i in range(rank, s.gradient_accumulation, world)]
    work = sum_over_ranks(device, *map(sum, zip(*((targets.size, idx.size, idx.size * idx.shape[1])
                                                  for idx, targets, _ in batches))))
    total = 0.0
    for i, batch in enumerate(batches):
        # Processes exchange gradients once a step, during the last backward; DDP takes their mean.
        alone = world > 1 and i < len(batches) - 1
        with model.no_sync() if alone else contextlib.nullcontext():
            with autocast:  # the model sums over a batch's targets; work[0] is how many the whole step has
                loss = model(*to_device(batch, device)) * (world / work[0])
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    total = sum_over_ranks(device, total.item() / world)[0]
    if not math.isfinite(total + norm.item()):
        raise not_finite(step + 1, f"the loss is {total} and the gradient norm {norm.item()}", s, model)
    if s.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, norm)
    factor = get_lr(step, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm.item(), work


# ---- how it goes ----

@torch.no_grad()
def evaluate(model, dataset, split, max_tokens, device, autocast):
    """Mean loss per target, in nats, over the dataset's fixed evaluation batches of a split, which the
    processes share. Takes nothing from any random generator that training uses."""
    rank, world = ranks()
    model.eval()
    total, count = 0.0, 0
    for i, (idx, targets, where) in enumerate(dataset.eval_batches(split, max_tokens)):
        if i % world == rank:
            with autocast:
                total += model(*to_device((idx, targets, where), device)).item()
            count += targets.size
    model.train()
    total, count = sum_over_ranks(device, total, count)
    return total / count


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds it, and a resumed run goes on from it."""
    step: int = 0  # steps done
    seconds: float = 0.0  # of training, over all resumptions
    best: float = math.inf  # lowest loss of s.best_by that best.pt was saved with
    told: bool = False  # whether memorizing was pointed out
    history: list = field(default_factory=list)  # (step, train loss, val loss) of every evaluation


def epochs(dataset, step, s):
    """How many times the training data has been read after `step` steps."""
    return dataset.epochs("train", step * s.gradient_accumulation)


def is_memorizing(history):
    """Whether validation has turned up while training still falls: history is a list of (step, train loss,
    validation loss); the last two validation losses must both lie over the lowest, and rise."""
    if len(history) < 3:
        return False
    best = min(history, key=lambda entry: entry[2])
    (_, train_before, val_before), (_, train_now, val_now) = history[-2:]
    return best[2] * 1.01 < val_before < val_now and train_now < train_before < best[1]


def tell_memorizing(history):
    """Say that validation has turned up; see is_memorizing."""
    low, now = min(history, key=lambda entry: entry[2]), history[-1]
    print(f"  Validation has turned up: {low[2]:.3f} at step {low[0]}, {now[2]:.3f} now, while the training "
          f"loss fell from {low[1]:.3f} to {now[1]:.3f}. From here on the model memorizes more than it "
          "generalizes.", flush=True)


def evaluations_since_best(history):
    """How many evaluations have gone by since the lowest validation loss; history as in is_memorizing."""
    losses = [val_loss for _, _, val_loss in history]
    return len(losses) - 1 - losses.index(min(losses))


def duration(seconds):
    """Seconds as people say them: 45s, 3m05s, 2h10m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


# Dense bfloat16 FLOP/s that makers state, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
         "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}


def peak_flops(device, dtype):
    """FLOP/s that all processes' devices can do: the maker's figure for a GPU in bfloat16, a quick
    measurement of a matrix product for a CPU, None where it is not known."""
    if device.type == "cpu":
        a = torch.ones(1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        return 2 * 1024**3 / min(seconds)  # processes on one machine share its cores
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        found = (peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name))
        return ranks()[1] * peak if (peak := next(found, None)) else None
    return None


class Log:
    """out_dir/log.csv, a row for every step, and the line that a person sees."""

    COLUMNS = ("step", "epoch", "loss", "lr", "norm", "tokens", "seconds", "peak_share", "train_loss",
               "val_loss")

    def __init__(self, path, at, measure_peak):
        """Rows after step `at.step`, of a run that was stopped later than it was saved, are left out.
        measure_peak(): FLOP/s that the machine can do, or None."""
        kept = [",".join(self.COLUMNS) + "\n"]
        if at.step and path.exists():
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            kept += [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= at.step]
        write_atomically(path, lambda f: f.write("".join(kept).encode("utf-8")))
        self.path, self.warned, self.unwritten = path, False, b""
        self.measure_peak, self.peak = measure_peak, measure_peak()
        self.tokens = self.seconds = self.flops = 0.0  # since the last line

    def add(self, row, tokens, flops, seconds):
        """Write a row, a dict of COLUMNS; what a full disk refuses is kept for the next time."""
        if self.peak and flops / seconds > self.peak:  # then something else was running when it was measured
            self.peak = max(self.peak, self.measure_peak())
        row = {**row, "tokens": int(tokens), "seconds": f"{seconds:.4f}",
               "peak_share": f"{flops / seconds / self.peak:.3f}" if self.peak else "n/a"}
        self.unwritten += (",".join(str(row.get(name, "")) for name in self.COLUMNS) + "\n").encode("utf-8")
        try:
            with open(self.path, "ab", buffering=0) as f:
                while self.unwritten:
                    self.unwritten = self.unwritten[f.write(self.unwritten):]
        except OSError as error:
            if not self.warned:
                print(f"warning: {self.path}: {error}; going on", file=sys.stderr, flush=True)
            self.warned = True
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds

    def tell(self, at, row, s):
        """Print the line of a step; speeds are of all steps since the last one."""
        seconds, left = max(self.seconds, 1e-9), at.seconds / at.step * (s.max_iters - at.step)
        losses = f"  train {row['train_loss']}  val {row['val_loss']}" if "val_loss" in row else ""
        share = f"{self.flops / seconds / self.peak:.0%}" if self.peak else "n/a"
        print(f"step {at.step:>5}/{s.max_iters}  epoch {row['epoch']}  loss {row['loss']}{losses}  "
              f"lr {row['lr']}  norm {row['norm']}  {self.tokens / seconds:,.0f} tokens/s  {share} of peak  "
              f"{duration(left)} left", flush=True)
        self.tokens = self.seconds = self.flops = 0.0


def sample_text(model, dataset, s):
    """What the model writes now: after sample_prompt, or after a held-out question or a line's start."""
    enc, prompt = get_tokenizer(dataset.tokenizer), s.sample_prompt
    if dataset.kind == "chat":
        if prompt is None:
            prompt = decode_conversation(dataset.conversations("val")[0], enc)[0]["content"]
        ids = encode_prompt([{"role": "user", "content": prompt}], enc)
    else:
        prompt = "\n" if prompt is None else prompt
        ids = enc.encode_ordinary(prompt) or [special_ids(enc)[0]]
    said = model.generate(ids, 50, temperature=0.7, top_k=50, seed=0, stop_ids=special_ids(enc))
    return f"{prompt!r} -> {enc.decode(list(said))!r}"


def draw_losses(out_dir, history):
    """Where matplotlib is installed, loss.png in out_dir: every step's loss of log.csv, the evaluations, and
    where validation was lowest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(out_dir / "log.csv", encoding="utf-8") as f:  # its last row is torn where the disk is full
        every = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(f) if row["lr"]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*every), color="0.8", linewidth=1, label="each step")
    at, train_losses, val_losses = zip(*history)
    axes.plot(at, train_losses, "o-", markersize=3, label="training")
    axes.plot(at, val_losses, "o-", markersize=3, label="validation")
    low = min(history, key=lambda entry: entry[2])
    if low is not history[-1]:
        axes.axvline(low[0], color="0.5", linestyle=":")
        late = low[0] > at[-1] / 2  # the words stand where there is more room
        axes.annotate(f"lowest validation loss, {low[2]:.2f}\nfrom here on: memorizing", (low[0], 0.97),
                      xycoords=("data", "axes fraction"), xytext=(-8 if late else 8, 0), va="top",
                      textcoords="offset points", ha="right" if late else "left")
    axes.set(xlabel="step", ylabel="loss, nats per target", title=str(out_dir))
    axes.legend()
    try:
        write_atomically(out_dir / "loss.png", lambda f: figure.savefig(f, dpi=100, format="png"))
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)


def report(s, dataset, at):
    """Say how the run went, and what to do with what it made."""
    if not at.history:
        return
    (step, train_loss, val_loss), low = at.history[-1], min(at.history, key=lambda entry: entry[2])
    kept = min(at.history, key=lambda entry: entry[1 + SPLITS.index(s.best_by)])
    print(f"{step} steps in {duration(at.seconds)}: training loss {train_loss:.4f}, validation "
          f"{val_loss:.4f} (lowest {low[2]:.4f} at step {low[0]}, epoch {epochs(dataset, low[0], s):.2f})")
    print(f"best.pt holds step {kept[0]} (epoch {epochs(dataset, kept[0], s):.2f}), the lowest {s.best_by} "
          f"loss; talk to it: python chat.py --checkpoint={s.out_dir / 'best.pt'}")
    print(f"{s.out_dir}: log.csv" + (", loss.png" if find_spec("matplotlib") else "; and where matplotlib is "
                                     "installed (pip install matplotlib), loss.png"), flush=True)


# ---- saving, and going on from it ----

def rng_states(device):
    """The states of the random generators that dropout uses, of every process: a list of lists."""
    mine = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    states = [mine] * ranks()[1]
    if len(states) > 1:
        dist.all_gather_object(states, mine)
    return states


def restore_rng(states, device):
    """Put back this process's part of what rng_states returned, where it has one."""
    for mine in states[ranks()[0]:][:1]:
        torch.set_rng_state(mine[0])
        if device.type == "cuda" and len(mine) > 1:
            torch.cuda.set_rng_state(mine[1], device)


def restore_optimizer(optimizer, state):
    """Take over an optimizer's momenta from a checkpoint, but keep the learning rates, decay and so on of
    this run's settings."""
    mine = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, mine):
        group.update(values)


def restore(resumed, optimizers, device):
    """Put the optimizers and random generators where last.pt left them; returns its Progress."""
    for optimizer, state in zip(optimizers, resumed["optimizers"]):
        restore_optimizer(optimizer, state)
    restore_rng(resumed["rng"], device)
    return Progress(resumed["step"], resumed["seconds"], resumed["best"], resumed["told"],
                    [tuple(entry) for entry in resumed["history"]])


def save_is_due(s, step, saved_at):
    """Whether save_interval has gone by: steps, or minutes since `saved_at`."""
    every = str(s.save_interval)
    if every.endswith("m"):
        return time.monotonic() - saved_at >= 60 * float(every[:-1])
    return step % int(every) == 0


def save(s, name, model, dataset, at, **extra):
    """Write a checkpoint into out_dir; returns whether it could be. An earlier one of that name stays where
    it could not, and the run goes on."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(s).items()}
    checkpoint = model_checkpoint(model, dataset.tokenizer, dataset.kind, turns=dataset.turns,
                                  data=dataset.fingerprint, settings=settings, max_iters=s.max_iters,
                                  **asdict(at), **extra)
    try:
        save_checkpoint(s.out_dir / name, checkpoint)
        return True
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return False


# ---- the loop ----

def evaluate_splits(model, dataset, at, s, device, autocast):
    """Evaluate both splits and note it in at.history; returns the log's columns. Raises ValueError for a loss
    that is no finite number."""
    losses = [evaluate(model, dataset, split, s.eval_tokens, device, autocast) for split in SPLITS]
    if not math.isfinite(sum(losses)):
        raise not_finite(at.step, f"the losses are {losses[0]} and {losses[1]}", s, model)
    at.history.append((at.step, *losses))
    return {"train_loss": f"{losses[0]:.4f}", "val_loss": f"{losses[1]:.4f}"}


def keep_best(s, model, dataset, at, first):
    """After an evaluation: save best.pt if its loss is the lowest, draw the losses, and say so, once, when
    memorizing begins. `first`: whether this process is the one that writes."""
    loss = at.history[-1][1 + SPLITS.index(s.best_by)]
    if first and not at.told and is_memorizing(at.history):
        at.told = True
        tell_memorizing(at.history)
    if loss < at.best and (not first or save(s, "best.pt", model, dataset, at)):
        at.best = loss
    if first:
        draw_losses(s.out_dir, at.history)
        gc.collect()  # figures refer to themselves, and the loop makes too few objects for them to go soon


@contextlib.contextmanager
def stop_signals():
    """Within it, the first Ctrl-C or SIGTERM is noted in the list it yields, for the loop to end in order;
    a second one ends the program at once."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving (again: leave at once)",
              file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def out_of_memory(error, s):
    """Where an error says that memory ran out, the ValueError that names smaller batches of the same tokens
    per step; None for other errors."""
    said = "allocate memory" in str(error) or "out of memory" in str(error)  # a CPU says so, or MPS
    if not said and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return None
    factor = next((n for n in range(2, s.batch_size + 1) if s.batch_size % n == 0), None)
    smaller = (f"--batch_size={s.batch_size // factor} --gradient_accumulation="
               f"{s.gradient_accumulation * factor}, the same tokens per step" if factor else
               "a smaller --block_size, or a smaller model")
    return ValueError(f"out of memory; the last checkpoint is kept. Try {smaller}")


def train(s, model, dataset, device, dtype, resumed=None):
    """The training loop: steps, evaluations, checkpoints, until max_iters or a signal.

    s: LoopSettings. model: a GPT on `device`. dataset: see data/tokens.py. resumed: the dict of a last.pt,
    whose optimizers, counters and random state are taken over. Returns the number of the signal that
    stopped it, or 0.
    """
    optimizers = model.configure_optimizers(s.optimizer, s.learning_rate, s.embedding_learning_rate,
                                            s.weight_decay, (s.beta1, s.beta2), s.momentum)
    at = restore(resumed, optimizers, device) if resumed else Progress()
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    wrapped = torch.compile(model) if s.compile == "on" else model  # computes; checkpoints take `model`
    if dist.is_initialized():
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
    first = ranks()[0] == 0  # of all processes, this one writes
    log = Log(s.out_dir / "log.csv", at, functools.partial(peak_flops, device, dtype)) if first else None
    saved, saved_at, stop = True, time.monotonic(), 0
    model.train()
    with stop_signals() as caught:
        while at.step < s.max_iters:
            began = time.perf_counter()
            loss, norm, work = train_step(wrapped, optimizers, dataset, at.step, s, device, autocast)
            at.step += 1
            stop, due = sum_over_ranks(device, len(caught), first and save_is_due(s, at.step, saved_at))
            last = stop or at.step == s.max_iters
            look = last or at.step % s.eval_interval == 0
            row = {"step": at.step, "epoch": f"{epochs(dataset, at.step, s):.2f}", "loss": f"{loss:.4f}",
                   "lr": f"{get_lr(at.step - 1, s) * s.learning_rate:.2e}", "norm": f"{norm:.2f}"}
            seconds = time.perf_counter() - began  # without the evaluation
            if look:
                row |= evaluate_splits(wrapped, dataset, at, s, device, autocast)
            at.seconds += time.perf_counter() - began
            if first:
                log.add(row, work[1], model.flops(*work), seconds)
                if look or at.step % s.log_interval == 0 or at.step == 1:
                    log.tell(at, row, s)
                if s.sample_interval and at.step % s.sample_interval == 0:
                    print(f"  sample: {sample_text(model, dataset, s)}", flush=True)
            if look:
                keep_best(s, model, dataset, at, first)
                if not last and s.patience and evaluations_since_best(at.history) >= s.patience:
                    last = True
                    print(f"stopped: {s.patience} evaluations without a lower validation loss (patience)")
            if look or due:
                rng = rng_states(device)
                saved = not first or save(s, "last.pt", model, dataset, at, rng=rng,
                                          optimizers=[optimizer.state_dict() for optimizer in optimizers])
                saved_at = time.monotonic()
            if last:
                break
    if first:
        report(s, dataset, at)
        if not saved:
            raise OSError(f"{s.out_dir}: the last checkpoint could not be saved; free some space and "
                          "--resume=True")
    return caught[0] if caught else signal.SIGTERM if stop else 0


# ---- starting ----

def load_base(s):
    """The model that s.init_from names, for the ids of s.data_dir and a context of s.block_size (0: all that
    it has learned). Raises ValueError or OSError: no such model, or one with another tokenizer."""
    tokenizer, vocab_size = folder_tokenizer(s.data_dir), read_meta(s.data_dir)["vocab_size"]
    path = config.local_path(s.init_from)
    is_checkpoint = path.suffix == ".pt"
    checkpoint = load_checkpoint(path, "Train one first.") if is_checkpoint else {"tokenizer": "gpt2"}
    theirs = checkpoint["tokenizer"]
    unknown = ValueError(f"init_from={s.init_from}: was not made with the tokenizer of data_dir={s.data_dir} "
                         "and its role tokens; prepare the data with the model's own: --tokenizer=" +
                         (theirs if isinstance(theirs, str) else
                          "FILE, the tokenizer.json beside the data it was trained on"))
    if not is_checkpoint and s.init_from not in GPT2_NAMES and not (path / "config.json").exists() and \
            path.suffix != ".safetensors":
        raise ValueError(f"init_from={s.init_from}: no model there; name a best.pt, a folder with a "
                         f"config.json and weights, or one of {', '.join(GPT2_NAMES)}")
    if theirs != tokenizer:
        raise unknown
    if is_checkpoint:
        model = model_from_checkpoint(checkpoint, dropout=s.dropout)
        if s.block_size:
            model.crop_block_size(s.block_size)
    else:
        source = s.init_from if s.init_from in GPT2_NAMES else path
        model = GPT.from_pretrained(source, None, s.block_size or None, s.dropout)
    if model.config.vocab_size != vocab_size:
        raise unknown
    return model


def load_resumed(s):
    """last.pt to go on from. Raises ValueError where there is none, or it was made with another model, batch
    or seed."""
    path = s.out_dir / "last.pt"
    resumed = load_checkpoint(path, "Start without --resume=True.")
    if "optimizers" not in resumed:
        raise ValueError(f"{path}: holds no optimizer state, so a run cannot go on from it; it may be a "
                         "best.pt")
    for name in ("init_from", "block_size", "n_layer", "n_head", "n_embd", "bias", "optimizer", "batch_size",
                 "gradient_accumulation", "best_by", "seed"):
        then, now = resumed["settings"].get(name), getattr(s, name, None)
        if then != now:
            raise ValueError(f"{path}: was made with {name}={then}, this run has {name}={now}; use the same, "
                             "or another out_dir")
    if resumed["tokenizer"] != folder_tokenizer(s.data_dir):
        raise ValueError(f"{path}: was made with another tokenizer than that of data_dir={s.data_dir}; use "
                         "the same data, or another out_dir")
    return resumed


def set_up(s, device, make_model):
    """What a run starts from: (model, dataset, the dict of last.pt or None). make_model(s) makes the model
    where the run does not resume. Raises ValueError or OSError."""
    rank, world = ranks()
    if s.gradient_accumulation % world:
        raise ValueError(f"gradient_accumulation={s.gradient_accumulation}: must be a multiple of the "
                         f"{world} processes, which share the batches of a step")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (s.out_dir / "last.pt").exists():
        s.resume = True  # torchrun --max-restarts started us again
    elif not s.resume and rank == 0 and dist.is_initialized() and (s.out_dir / "last.pt").exists():
        os.replace(s.out_dir / "last.pt", s.out_dir / "last.pt.old")  # or a restart would go on from it
    torch.manual_seed(s.seed)
    resumed = load_resumed(s) if s.resume else None
    if rank:
        dist.barrier()  # the first process may have to download the model
    model = model_from_checkpoint(resumed, dropout=s.dropout) if resumed else make_model(s)
    if world > 1 and rank == 0:
        dist.barrier()
    dataset = open_dataset(s.data_dir, model.config.block_size, s.batch_size, s.seed)
    if resumed and resumed["data"] != dataset.fingerprint:
        raise ValueError(f"{s.out_dir / 'last.pt'}: was made with other data (data_dir="
                         f"{resumed['settings']['data_dir']}, as it was then) than data_dir={s.data_dir} is "
                         "now; use the same, or another out_dir")
    torch.manual_seed(s.seed + rank)  # of dropout
    return model.to(device), dataset, resumed


@contextlib.contextmanager
def processes(device):
    """Within it, the processes that torchrun started, if it did, are joined by torch.distributed; yields this
    one's device. Only the first of them prints. Raises ValueError where a process has no GPU."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"process {number} has no GPU, this machine has {count}: use torchrun "
                             f"--nproc_per_node={count}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    # A store for each restart: in torchrun's, the addresses of processes that died may still be there.
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore("restart " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with contextlib.redirect_stdout(nowhere) if dist.get_rank() else contextlib.nullcontext():
                yield device
    finally:
        dist.destroy_process_group()


def run(s, model, dataset, device, dtype, why, resumed):
    """Say what is about to be trained, train it, and leave with the signal's exit code if one stopped it.
    Raises ValueError or OSError, the first of them where memory runs out too."""
    torch.set_float32_matmul_precision("high")
    reason = "as set"
    if s.compile == "auto":
        s.compile = "on" if device.type == "cuda" and dataset.kind == "text" else "off"
        reason = "it pays on a GPU with batches of one shape"
    print(f"{s.data_dir}: {dataset.n_tokens('train'):,} training tokens, {dataset.vocab_size} ids")
    print(f"model: {model.num_params():,} parameters, {model.config.n_layer} layers x "
          f"{model.config.n_embd}; device: {why}; compile {s.compile} ({reason}); optimizer {s.optimizer}" +
          (f"; {ranks()[1]} processes" if ranks()[1] > 1 else ""), flush=True)
    if (s.out_dir / "best.pt").exists() and not resumed:
        print(f"{s.out_dir / 'best.pt'} of an earlier run will be replaced (--out_dir=FOLDER keeps it)")
    if resumed:
        print(f"resumed at step {resumed['step']}" + ("" if resumed["step"] < s.max_iters else
              f", and nothing is left to do: max_iters={s.max_iters}; a larger one trains on"), flush=True)
    try:
        stopped_by = train(s, model, dataset, device, dtype, resumed)
    except (RuntimeError, MemoryError) as error:
        if advice := out_of_memory(error, s):
            raise advice from error
        raise
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def new_model(s):
    """The model that the settings describe, or the one that init_from names."""
    if s.init_from != "scratch":
        return load_base(s)
    return GPT(GPTConfig(read_meta(s.data_dir)["vocab_size"], s.block_size, s.n_layer, s.n_head, s.n_embd,
                         s.dropout, s.bias))


def main(argv):
    """Train as the settings say. Raises ValueError or OSError for a mistake that a user can fix."""
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, s.dtype)
    with processes(device) as device:
        model, dataset, resumed = set_up(s, device, new_model)
        run(s, model, dataset, device, dtype, why, resumed)


if __name__ == "__main__":
    config.run(main)
