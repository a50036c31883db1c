"""Train a GPT from scratch, on plain text or on chats.

    python train.py config/train_recite.py                 # chats: minutes on a laptop
    python train.py config/train_shakespeare.py            # plain text
    python train.py config/train_recite.py --resume=True   # go on where a run stopped
    python train.py --eval_only=True --init_from=out/chat/best.pt    # only measure, write nothing
    python train.py --help                                 # every setting

    torchrun --nproc_per_node=8 train.py config/train_gpt2.py    # many GPUs: the same steps, sooner

It writes out_dir/best.pt, which chat.py talks to, out_dir/last.pt, which --resume goes on from,
log.csv and (where matplotlib is installed) loss.png.
"""
import config  # isort: skip  # first: from here on Ctrl-C leaves no traceback
import contextlib
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils._triton import has_triton

import model as gpt
from data.conversation import decode_conversation, encode_prompt, special_ids
from data.files import locked, write_atomically
from data.tokenizer import get_tokenizer
from data.tokens import SPLITS, ReadAhead, count_targets, folder_tokenizer, open_dataset, read_meta
from pictures import draw_losses


@dataclass
class LoopSettings:
    """What the training loop reads; finetune.py has these too."""
    # what and where
    data_dir: Path = Path("data/instruction")  # a prepared folder: train.bin, val.bin, meta.json
    out_dir: Path = Path("out/chat")  # where best.pt and last.pt go
    resume: bool = False  # go on from out_dir/last.pt
    eval_only: bool = False  # only measure init_from's model: loss, perplexity, bits per byte
    # one step
    batch_size: int = 8  # windows of block_size tokens; or chats, cut to it, as many tokens in all
    gradient_accumulation: int = 1  # batches of a step, over all processes: a multiple of them
    max_iters: int = 2000  # steps
    read_iters: int = 0  # the first steps, in which a chat's questions are learned too
    dropout: float = 0.0  # share of activations zeroed while training; slows memorizing
    # the optimizer
    optimizer: str = "muon"  # muon (the blocks' matrices; AdamW for the rest) or adamw (all)
    learning_rate: float = 0.01  # peak, of muon, or of adamw where it has all
    embedding_learning_rate: float = 0.003  # peak, of the AdamW beside muon
    warmup_iters: int = 20  # steps from near 0 to the peak
    decay: str = "linear"  # after that: linear, cosine or constant
    final_lr: float = 0.0  # where the decay ends, as a fraction of the peak
    weight_decay: float = 0.0  # pull of weights towards 0; not of norms and biases
    momentum: float = 0.9  # of muon: how much it keeps of the mean gradient so far
    beta1: float = 0.9  # of AdamW: the same
    beta2: float = 0.99  # of AdamW: how much it keeps of the mean squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # looking, saving
    log_interval: int = 50  # steps between progress lines
    eval_interval: int = 250  # steps between evaluations
    save_interval: int | str = "5m"  # between saves of last.pt: 500 means steps, 10m minutes
    sample_interval: int = 500  # steps between samples of what the model writes; 0: none
    sample_prompt: str | None = None  # what they go on from; None: something held out
    eval_tokens: int = 20_000  # tokens of an evaluation, of each split; with eval_only: all
    best_by: str = "val"  # best.pt has the lowest loss on val; or on train, to memorize
    patience: int = 0  # evaluations without a lower val loss, then it stops; 0: never
    # the machine
    seed: int = 1337  # of the first weights, the batches and the dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (weights stay float32)
    compile: str = "auto"  # torch.compile: auto, on or off


@dataclass
class Settings(LoopSettings):
    """The loop's settings, and those of a model made from scratch."""
    init_from: str = "scratch"  # or gpt2, gpt2-medium, ..., a folder, a .pt: weights and shape
    block_size: int = 128  # context length, in tokens; with eval_only: the model's
    n_layer: int = 4  # blocks, one after the other
    n_head: int = 4  # attention heads in each block
    n_embd: int = 256  # channels: the width of the model
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2


def train(s, model, dataset, device, dtype, resumed=None):
    """The training loop, until max_iters steps are done, patience ends or a signal comes.

    s: LoopSettings. model: a GPT on `device`. dataset: see data/tokens.py. resumed: the dict of a
    last.pt to go on from. Returns the number of the signal that stopped it, or 0.
    """
    optimizers = gpt.configure_optimizers(model, s, dtype)
    progress = restore(resumed, optimizers, device) if resumed else Progress()
    autocast = mixed_precision(device, dtype)  # products in bfloat16, weights and losses float32
    replica = make_replica(model, dataset, s)  # the same weights, compiled or shared
    log = Log(s.out_dir / "log.csv", device, dtype)
    saved, stopped_by = True, 0  # saved: whether the newest save worked
    saved_at = time.monotonic() if resumed else -math.inf  # so the first save is soon due
    model.train()
    with stop_signals() as signals:
        while not (stopped_by or is_over(s, progress)):
            began = time.perf_counter()
            if not evaluation_is_due(s, progress):  # a resumed run may owe one, and does it first
                progress.newest = train_step(
                    replica, optimizers, dataset, progress.step, s, device, autocast)
                progress.step += 1
                progress.step_seconds = time.perf_counter() - began
            # A signal to one process stops all of them, after the same step: they save, and end.
            stopped_by = signal_to_any(device, signals)

            # Once in a while: how well does it do on what it has not seen?
            losses = None
            if evaluation_is_due(s, progress) and not stopped_by:
                losses = [evaluate(replica, dataset, part, s, device, autocast) for part in SPLITS]
                stop_if_not_finite(sum(losses), f"the losses are {losses}", progress.step, s, model)
                progress.history.append((progress.step, *losses))
                stopped_by = signal_to_any(device, signals)
            progress.seconds += time.perf_counter() - began

            # Once in a while: say how it goes, and what the model writes by now.
            row = log_row(s, dataset, progress, losses)
            log.add(row, model, progress, now=stopped_by)
            if losses or progress.step % s.log_interval == 0 or progress.step == 1:
                log.print_line(progress, row, s)
            if s.sample_interval and progress.step % s.sample_interval == 0 and not stopped_by:
                print_sample(model, dataset, s)
            if losses:
                say_if_memorizing(progress)
                keep_best(s, model, dataset, progress)  # best.pt, if this is the lowest yet

            # Once in a while, when any process finds it due: save all that an exact resume needs.
            is_due = largest_over_ranks(device, save_is_due(s, log, progress.step, saved_at))
            if stopped_by or is_over(s, progress) or is_due:
                saved = save_last(s, model, dataset, progress, optimizers, device)
                saved_at = time.monotonic()
    report(s, dataset, progress, saved)
    return stopped_by


def train_step(model, optimizers, dataset, step, s, device, autocast):
    """Step number `step`, from 0. With one batch and one process it is no more than this:
    (model(idx, targets, where) / n_targets).backward(), and a step of each optimizer.

    Returns (mean loss per target, gradient norm, counts), these the step's (targets, tokens read,
    pairs of tokens in attention). The gradient is that of the mean over all targets, in whatever
    batches. Raises ValueError for a loss or a gradient that is not finite; the weights then stay.
    """
    # A batch depends on its number alone, so a resumed run finds its place in the data by the step.
    # Gradient accumulation: a step has several batches, and the processes deal them out like cards.
    rank, world_size = ranks()
    first_batch = step * s.gradient_accumulation
    batches = [dataset.batch("train", first_batch + i)
               for i in range(rank, s.gradient_accumulation, world_size)]
    n_targets = sum(targets.size for _, targets, _ in batches)
    n_tokens = sum(idx.size for idx, _, _ in batches)
    n_pairs = sum(idx.size * idx.shape[1] for idx, _, _ in batches)  # of each row, T * T
    n_targets, n_tokens, n_pairs = sum_over_ranks(device, n_targets, n_tokens, n_pairs)
    # The model sums the loss over a batch's targets, and backward adds to p.grad. DDP (PyTorch's
    # DistributedDataParallel) averages p.grad over processes; we want the sum: hence world_size.
    scale = world_size / n_targets
    step_loss = 0.0
    for i, batch in enumerate(batches):
        idx, targets, where = to_device(batch, device)
        with exchange_gradients(model, i == len(batches) - 1):  # between processes, once a step
            with autocast:
                loss = model(idx, targets, where) * scale
            loss.backward()
        step_loss += loss.detach()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    [step_loss] = sum_over_ranks(device, step_loss.item() / world_size)  # undoes scale's factor
    said = f"the loss is {step_loss} and the gradient norm {norm.item()}"
    stop_if_not_finite(step_loss + norm.item(), said, step + 1, s, model)  # finite only if both are
    if s.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, s)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step_loss, norm.item(), (n_targets, n_tokens, n_pairs)


def lr_factor(step, s):
    """What the peak learning rates are multiplied by: a linear warm-up from near 0 to 1, then the
    decay to final_lr, which is such a factor too."""
    if step < s.warmup_iters:
        return (step + 1) / (s.warmup_iters + 1)
    done = (step - s.warmup_iters) / max(s.max_iters - s.warmup_iters, 1)  # from 0 to 1
    left = {"linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "constant": 1.0}[s.decay]
    return s.final_lr + (1 - s.final_lr) * max(left, 0.0)


@torch.no_grad()
def evaluate(model, dataset, split, s, device, autocast):
    """Mean loss per target, in nats, over the same s.eval_tokens tokens of a split each time. It
    draws no random number, so training goes on as if nothing had happened."""
    rank, world_size = ranks()
    model.eval()
    total_loss, n_targets = 0.0, 0
    for i, batch in enumerate(dataset.eval_batches(split, s.eval_tokens)):
        if i % world_size == rank:  # the processes share the batches
            idx, targets, where = to_device(batch, device)
            with autocast:
                total_loss += model(idx, targets, where).item()
            n_targets += targets.numel()
    model.train()
    total_loss, n_targets = sum_over_ranks(device, total_loss, n_targets)
    return total_loss / n_targets


# ==================================================================================================
# The idea ends here. Below, in the order in which the loop asks for it: where a run stands,
# processes, signals, the log, what is said, saving and resuming. Then measuring only, and starting.
# ==================================================================================================

# ---- where a run stands ----

@dataclass
class Progress:
    """Where a run stands. A checkpoint holds it, and a resumed run goes on from it."""
    step: int = 0  # steps done
    newest: tuple = ()  # what train_step returned of the newest
    step_seconds: float = 0.0  # how long that took
    seconds: float = 0.0  # of training, over all resumptions
    best: float = math.inf  # lowest loss of s.best_by that best.pt was saved with
    told: bool = False  # whether memorizing was pointed out
    history: list = field(default_factory=list)  # (step, train loss, val loss) of every evaluation


def epochs(dataset, step, s):
    """How many times the training data has been read after `step` steps."""
    return dataset.epochs("train", step * s.gradient_accumulation)


def lowest(history):
    """The entry of a history with the lowest validation loss."""
    return min(history, key=lambda entry: entry[2])


def is_over(s, progress):
    """Whether a run is at its end: all its steps are done and evaluated, or patience is over."""
    if evaluation_is_due(s, progress):
        return False
    return progress.step >= s.max_iters or patience_is_over(s, progress.history)


def evaluation_is_due(s, progress):
    """Whether the newest step is one to evaluate after, and was not: a signal stops a run before
    its evaluation, and then the run that goes on begins with that. So a stop leaves no trace."""
    was_evaluated = progress.history and progress.history[-1][0] == progress.step
    if was_evaluated or not progress.newest:
        return False
    return progress.step == s.max_iters or progress.step % s.eval_interval == 0


def patience_is_over(s, history):
    """Whether s.patience evaluations have gone by without a lower validation loss."""
    if not s.patience or not history:
        return False
    return len(history) - 1 - history.index(lowest(history)) >= s.patience


def stop_if_not_finite(number, what, step, s, model):
    """Raise a ValueError where a loss or gradient is infinite or not a number. It names the
    parameter with the largest gradient."""
    if math.isfinite(number):
        return
    rate = lr_factor(step - 1, s) * s.learning_rate
    grads = {name: p.grad.abs().max().item()
             for name, p in model.named_parameters() if p.grad is not None}
    largest = ""
    if grads:
        name = max(grads, key=lambda n: (not math.isfinite(grads[n]), grads[n]))
        plain = name.removeprefix("module.").removeprefix("_orig_mod.")  # DDP's, torch.compile's
        largest = f", the largest gradient {grads[name]:.3g} in {plain}"
    clip = f"lower grad_clip (now {s.grad_clip:g})" if s.grad_clip else "grad_clip of 1"
    raise ValueError(f"step {step}: {what}; the learning rate was {rate:.2g}{largest}. The last "
                     f"good checkpoint is kept. Try a lower learning_rate (now "
                     f"{s.learning_rate:g}), more warmup_iters (now {s.warmup_iters}) or a {clip}")


# ---- devices, and processes: one without torchrun, or several that train together ----

@contextlib.contextmanager
def processes(device):
    """Within it, the processes that torchrun started, if it did, are joined by torch.distributed;
    yields this one's device. Only the first of them prints. Raises ValueError where a process has
    no GPU, or a device cannot be shared out."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "mps":
        raise ValueError("device=mps: cannot be used by several processes; leave torchrun out, or "
                         "use --device=cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"process {number} has no GPU, this machine has {count}: use torchrun "
                             f"--nproc_per_node={count}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    # A store for each restart: in torchrun's, addresses of processes that died may still be there.
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"restart {restarts()}", store),
        rank=rank, world_size=world_size, device_id=device if on_gpu else None,
        timeout=timedelta(hours=2))  # the others wait while the first downloads gpt2-xl
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            yield device
    dist.destroy_process_group()  # not where this one failed: the others may be waiting for it


def restarts():
    """How often torchrun --max-restarts has started us again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def mixed_precision(device, dtype):
    """A context in which matrix products are of `dtype`; float32 is that of the weights anyway."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_replica(model, dataset, s):
    """What the loop calls: the model itself, or its weights compiled, and shared out to many
    processes."""
    if s.compile == "on":
        # Text has one or two shapes, and gets a graph for each; chats have hundreds, which share.
        model = torch.compile(model, dynamic=False if dataset.kind == "text" else None)
    if dist.is_initialized():  # gradients are sent from where they are made, not from a copy
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def ranks():
    """(which process this is, how many train together): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Whether this is the process that writes files."""
    return ranks()[0] == 0


def sum_over_ranks(device, *numbers):
    """The sum of each number over all processes, as a list."""
    return reduce_over_ranks(device, numbers, dist.ReduceOp.SUM)


def largest_over_ranks(device, number):
    """The largest that any process has: so they decide alike, or some would wait for others."""
    return reduce_over_ranks(device, [number], dist.ReduceOp.MAX)[0]


def reduce_over_ranks(device, numbers, operation):
    """Each number combined over all processes; as they are where there is one process."""
    if not dist.is_initialized():
        return list(numbers)
    combined = torch.tensor([float(number) for number in numbers], dtype=torch.float64,
                            device=device)
    dist.all_reduce(combined, operation)
    return combined.tolist()


def to_device(batch, device):
    """A dataset's (idx, targets, where), NumPy arrays or None, as tensors on the device."""
    tensors = [None if a is None else torch.from_numpy(a) for a in batch]
    pinned = device.type == "cuda"  # from pinned memory a GPU copies while it computes
    if pinned:
        tensors = [None if t is None else t.pin_memory() for t in tensors]
    # MPS, if it is not made to wait, may read a tensor after it is gone.
    return [None if t is None else t.to(device, non_blocking=pinned) for t in tensors]


def exchange_gradients(model, now):
    """A context for backward: DDP averages gradients over the processes within it only if `now`."""
    if now or not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


# ---- signals ----

@contextlib.contextmanager
def stop_signals():
    """Within it, the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) is noted in the list it
    yields, for the loop to save and end; one more than a second later ends the program at once."""
    caught, first_at = [], 0.0
    names = "SIGINT", "SIGTERM", "SIGHUP"  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # A shell has some ignored: nohup SIGHUP, and & in a script SIGINT.
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def handler(number, frame):
        nonlocal first_at
        if not caught:
            caught.append(number)
            first_at = time.monotonic()
            print(f"\n{signal.Signals(number).name}: finishing the step, then saving (again: leave "
                  "at once)", file=sys.stderr, flush=True)
        elif time.monotonic() - first_at >= 1:  # sooner: a shell and torchrun pass on the first
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def signal_to_any(device, signals):
    """The largest number of a signal that came to any process, or 0. signals: this one's."""
    return largest_over_ranks(device, max(signals, default=0))


# ---- the log ----

# Dense bfloat16 FLOP/s that makers state, by a part of the device's name; the first that fits.
PEAKS = {"H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
         "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
         "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 5090": 209e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}


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
        for part, peak in PEAKS.items():
            if re.search(rf"\b{part}\b", name):
                return ranks()[1] * peak
    return None


def log_row(s, dataset, progress, losses):
    """What is logged of a step, as text: {column: value}. losses: [train, val] where it was
    evaluated. Another logger (wandb, TensorBoard) takes such a row in the loop, beside log.add."""
    loss, norm, _ = progress.newest
    row = {"step": progress.step, "epoch": f"{epochs(dataset, progress.step, s):.2f}",
           "loss": f"{loss:.4f}", "norm": f"{norm:.2f}",
           "lr": f"{lr_factor(progress.step - 1, s) * s.learning_rate:.2e}"}
    if losses:
        bits = bits_per_byte(losses[1], *count_targets(dataset, "val", s.eval_tokens))
        row |= {"train_loss": f"{losses[0]:.4f}", "val_loss": f"{losses[1]:.4f}",
                "val_bits_per_byte": f"{bits:.4f}"}
    return row


class Log:
    """out_dir/log.csv, a row for every step, and the line that a person sees. Only the first
    process has the file."""

    COLUMNS = ("step", "epoch", "loss", "lr", "norm", "tokens", "seconds", "peak_share",
               "train_loss", "val_loss", "val_bits_per_byte")

    def __init__(self, path, device, dtype):
        self.path, self.warned, self.unwritten = path, False, b""
        self.first_step, self.begun, self.proven = None, False, False
        self.device, self.dtype = device, dtype
        self.peak = peak_flops(device, dtype) if is_first() else None  # FLOP/s of the machine
        self.tokens = self.seconds = self.flops = 0.0  # since the last line

    def add(self, row, model, progress, now=False):
        """Write a row, a dict of COLUMNS; what a full disk refuses is kept for the next time.

        An earlier run's file is replaced when this run's second step has shown that the first was
        good, or its evaluation has; or `now`.
        """
        self.proven = self.first_step is not None or "val_loss" in row
        self.first_step = self.first_step or row["step"]
        if not is_first():
            return
        _, _, counts = progress.newest
        tokens, flops, seconds = counts[1], model.flops(*counts), progress.step_seconds
        if self.peak and flops / seconds > self.peak:  # it was measured while something else ran
            self.peak = max(self.peak, peak_flops(self.device, self.dtype))
        share = f"{flops / seconds / self.peak:.3f}" if self.peak else "n/a"
        row = {**row, "tokens": int(tokens), "seconds": f"{seconds:.4f}", "peak_share": share}
        text = ",".join(str(row.get(name, "")) for name in self.COLUMNS) + "\n"
        self.unwritten += text.encode("utf-8")
        if self.proven or now:
            try:
                self.write()
            except OSError as error:
                if not self.warned:
                    print(f"warning: {self.path}: {error}; going on", file=sys.stderr, flush=True)
                self.warned = True
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds

    def write(self):
        """Write the rows that are not yet in the file. Raises OSError."""
        if not self.begun or not self.path.exists():  # somebody may have deleted it
            self.begin()
        with open(self.path, "ab", buffering=0) as f:
            while self.unwritten:
                self.unwritten = self.unwritten[f.write(self.unwritten):]

    def begin(self):
        """The file anew: of an earlier one it keeps the rows before this run's first. A run that
        was stopped later than it was saved left more, and perhaps half a row."""
        kept = []
        if self.first_step > 1 and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for row in text.splitlines(keepends=True)[1:]:
                step = row.partition(",")[0]
                if row.endswith("\n") and step.isdecimal() and int(step) < self.first_step:
                    kept.append(row)
        whole = ",".join(self.COLUMNS) + "\n" + "".join(kept)
        write_atomically(self.path, lambda f: f.write(whole.encode("utf-8")))
        self.begun = True

    def print_line(self, progress, row, s):
        """Print the line of a step; speeds are of all steps since the last one."""
        seconds = max(self.seconds, 1e-9)
        left = progress.seconds / progress.step * (s.max_iters - progress.step)
        share = f"{self.flops / seconds / self.peak:.0%}" if self.peak else "n/a"
        how = f"norm {row['norm']}  {self.tokens / seconds:,.0f} tokens/s"
        if "val_loss" in row:
            how = f"train {row['train_loss']}  val {row['val_loss']}"
        print(f"step {progress.step:>5}/{s.max_iters}  epoch {row['epoch']}  loss {row['loss']}"
              f"  {how}  {share} of peak  {duration(left)} left", flush=True)
        self.tokens = self.seconds = self.flops = 0.0


def duration(seconds):
    """Seconds as people say them: 45s, 3m05s, 2h10m, 13d04h."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


# ---- what only tells: it must not end a run ----

@contextlib.contextmanager
def only_telling(what):
    """Within it, any error becomes a warning."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {error}; going on", file=sys.stderr, flush=True)


@only_telling("the sample")
def print_sample(model, dataset, s):
    """Print what the model writes now: after sample_prompt, or after a held-out question or a
    line's start."""
    if not is_first():
        return
    enc, prompt = get_tokenizer(dataset.tokenizer), s.sample_prompt
    if dataset.kind == "chat":
        if prompt is None:
            prompt = decode_conversation(dataset.conversations("val")[0], enc)[0]["content"]
        ids = encode_prompt([{"role": "user", "content": prompt}], enc)
    else:
        prompt = "\n" if prompt is None else prompt
        ids = enc.encode_ordinary(prompt) or [special_ids(enc)[0]]
    said = model.generate(ids, 50, stop_ids=special_ids(enc), seed=0, temperature=0.7, top_k=50)
    print(f"  sample: {prompt!r} -> {enc.decode(list(said))!r}", flush=True)


def say_if_memorizing(progress):
    """Once, when validation turns up, say so; see is_memorizing."""
    if progress.told or not is_memorizing(progress.history):
        return
    progress.told = True
    (low_step, low_train, low_val), (_, train, val) = lowest(progress.history), progress.history[-1]
    print(f"  Validation has turned up: {low_val:.3f} at step {low_step}, {val:.3f} now; training "
          f"fell from {low_train:.3f} to {train:.3f}.\n"
          "  From here on the model memorizes more than it generalizes.", flush=True)


def is_memorizing(history):
    """Whether validation has turned up while training still falls: history is a list of (step,
    train loss, validation loss); the last two validation losses must both lie over the lowest, and
    rise."""
    if len(history) < 3:
        return False
    _, train_at_lowest, val_lowest = lowest(history)
    (_, train_before, val_before), (_, train_now, val_now) = history[-2:]
    val_rises = val_lowest * 1.01 < val_before < val_now
    train_falls = train_now < train_before < train_at_lowest
    return val_rises and train_falls


def bits_per_byte(loss, n_targets, n_bytes):
    """A mean loss per target, in nats, as bits for each byte of text that the targets stand for
    (see count_targets); not a number where they stand for none."""
    return loss * n_targets / n_bytes / math.log(2) if n_bytes else math.nan


def report(s, dataset, progress, saved):
    """Say how the run went, and what to do with what it made, as far as that is there. Raises
    OSError where its last.pt could not be saved."""
    if patience_is_over(s, progress.history):
        print(f"stopped: {s.patience} evaluations without a lower validation loss (patience)")
    done = f"{progress.step} steps in {duration(progress.seconds)}"
    if progress.history:
        (step, train_loss, val_loss), low = progress.history[-1], lowest(progress.history)
        bits = bits_per_byte(val_loss, *count_targets(dataset, "val", s.eval_tokens))
        at = "" if step == progress.step else f" at step {step}"
        done += (f": training loss {train_loss:.4f}, validation {val_loss:.4f}{at}, {bits:.4f} "
                 f"bits per byte\nlowest validation loss: {low[2]:.4f} at step {low[0]} (epoch "
                 f"{epochs(dataset, low[0], s):.2f})")
    print(done)
    column, best, last = 1 + SPLITS.index(s.best_by), s.out_dir / "best.pt", s.out_dir / "last.pt"
    kept = [entry[0] for entry in progress.history if entry[column] == progress.best]
    if kept and best.exists():
        print(f"best.pt holds step {kept[0]}, the lowest {s.best_by} loss; talk to it:\n"
              f"    python chat.py --checkpoint={best}")
    elif saved and last.exists():
        print(f"last.pt holds step {progress.step}; talk to it:\n"
              f"    python chat.py --checkpoint={last}")
    made = ", ".join(name for name in ("log.csv", "loss.png") if (s.out_dir / name).exists())
    picture = "" if find_spec("matplotlib") else " (pip install matplotlib: then loss.png too)"
    if made:
        print(f"{s.out_dir}: {made}{picture}", flush=True)
    if not saved:
        raise OSError(f"{s.out_dir}: the last checkpoint could not be saved; free some space and "
                      "--resume=True")


# ---- saving, and going on from it ----

def keep_best(s, model, dataset, progress):
    """After an evaluation: save best.pt if its loss is the lowest, and draw the losses."""
    loss = progress.history[-1][1 + SPLITS.index(s.best_by)]
    if loss < progress.best and save(s, "best.pt", model, dataset, progress):
        progress.best = loss
    if is_first():
        with only_telling(s.out_dir / "loss.png"):
            draw_losses(s.out_dir, progress.history)


def save_is_due(s, log, step, saved_at):
    """Whether last.pt may be replaced (see Log.add), and save_interval has gone by: steps, or
    minutes since `saved_at`; or nothing was saved yet."""
    every = str(s.save_interval)
    if not log.proven:
        return False
    if saved_at == -math.inf:
        return True
    if every.endswith("m"):
        return time.monotonic() - saved_at >= 60 * float(every[:-1])
    return step % int(every) == 0


def save_last(s, model, dataset, progress, optimizers, device):
    """Save last.pt, all that an exact resume needs; returns whether it could be."""
    saved = save(s, "last.pt", model, dataset, progress, rng=rng_states(device),
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])
    if progress.best == math.inf and not (s.out_dir / "best.pt").exists():
        save(s, "best.pt", model, dataset, progress)  # to talk to before the first evaluation
    return saved


def save(s, name, model, dataset, progress, **extra):
    """The first process writes a checkpoint into out_dir; returns whether it could be. An earlier
    one of that name stays where it could not, and the run goes on."""
    if not is_first():
        return True
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(s).items()}
    checkpoint = gpt.model_checkpoint(
        model, dataset.tokenizer, dataset.kind, turns=dataset.turns, data=dataset.fingerprint,
        settings=settings, max_iters=s.max_iters, **asdict(progress), **extra)
    try:
        gpt.save_checkpoint(s.out_dir / name, checkpoint)
        return True
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return False


def rng_states(device):
    """The states of the random generators that dropout uses, of every process: a list of lists."""
    mine = [torch.get_rng_state()]
    if device.type == "cuda":
        mine.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        mine.append(torch.mps.get_rng_state())
    states = [mine] * ranks()[1]
    if len(states) > 1:
        dist.all_gather_object(states, mine)
    return states


def restore_rng(states, device):
    """Put back this process's part of what rng_states returned, where it has one."""
    rank = ranks()[0]
    if rank >= len(states):
        return
    of_cpu, *of_device = states[rank]
    torch.set_rng_state(of_cpu)
    if of_device and device.type == "cuda":
        torch.cuda.set_rng_state(of_device[0], device)
    elif of_device and device.type == "mps":
        torch.mps.set_rng_state(of_device[0])


def restore(resumed, optimizers, device):
    """Put the optimizers and random generators where last.pt left them; returns its Progress. (Its
    place in the data is the step: see train_step.)"""
    try:
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            restore_optimizer(optimizer, state)
        restore_rng(resumed["rng"], device)
        # An older version kept fewer of them.
        kept = {name: resumed[name] for name in Progress.__annotations__ if name in resumed}
        kept["history"] = [(int(step), float(train_loss), float(val_loss))
                           for step, train_loss, val_loss in resumed["history"]]
        return Progress(**kept)
    except Exception as error:  # made by another version, or by an optimizer that was edited since
        raise ValueError("last.pt: its optimizers, random numbers or history do not fit this run "
                         f"({type(error).__name__}); start without --resume=True") from error


def restore_optimizer(optimizer, state):
    """Take over an optimizer's momenta from a checkpoint, but keep the peak learning rates, decay
    and so on of this run's settings."""
    theirs = "params", "lr"  # lr: each step sets it
    mine = [{k: v for k, v in group.items() if k not in theirs} for group in optimizer.param_groups]
    groups = [{**group, **values}
              for group, values in zip(state["param_groups"], mine, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def load_resumed(s):
    """last.pt to go on from. Raises ValueError where there is none, or it was made with another
    model, batch or seed."""
    path = s.out_dir / "last.pt"
    resumed = gpt.load_checkpoint(path, "Start without --resume=True.")
    settings = resumed.get("settings")
    if not {"optimizers", "rng", "history", "data"} <= resumed.keys() or type(settings) is not dict:
        raise ValueError(f"{path}: holds no optimizer state, so a run cannot go on from it; it may "
                         "be a best.pt")
    for name in ("init_from", "block_size", "n_layer", "n_head", "n_embd", "bias", "optimizer",
                 "batch_size", "gradient_accumulation", "best_by", "seed", "read_iters"):
        now = getattr(s, name, None)
        then = settings.get(name, 0 if name == "read_iters" else None)  # it came later
        if then != now:
            raise ValueError(f"{path}: was made with {name}={then}, this run has {name}={now}; use "
                             "the same, or another out_dir")
    return resumed


# ---- only measuring ----

def measure(s, model, dataset, device, dtype):
    """Print the loss, the perplexity and the bits per byte of both splits.

    Text is read in windows that do not overlap, so a token has half a window before it on average.
    Published figures often slide the window on by a part of its length, and are then lower.
    """
    for split in reversed(SPLITS):
        n_targets, n_bytes = count_targets(dataset, split, s.eval_tokens)
        loss = evaluate(model, Told(dataset, n_targets), split, s, device,
                        mixed_precision(device, dtype))
        perplexity = math.inf if loss > 700 else math.exp(loss)  # which float64 cannot hold
        bits = bits_per_byte(loss, n_targets, n_bytes)
        print(f"{split}: loss {loss:.4f}  perplexity {perplexity:.2f}  {bits:.4f} bits per byte  "
              f"({n_targets:,} targets, {n_bytes:,} bytes)", flush=True)


class Told:
    """A dataset whose evaluation says how far it is every ten seconds, for n_targets in all."""

    def __init__(self, dataset, n_targets):
        self.dataset, self.n_targets = dataset, n_targets

    def eval_batches(self, split, max_tokens):
        """Those of the dataset; when the next one is asked for, the one before has been read."""
        began = told = time.monotonic()
        done = 0
        for batch in self.dataset.eval_batches(split, max_tokens):
            yield batch
            done += batch[1].size
            now = time.monotonic()
            if now - told >= 10:
                told, left = now, (now - began) * (self.n_targets - done) / done
                print(f"  {split}: {done:,} of {self.n_targets:,} targets  "
                      f"{done / (now - began):,.0f} targets/s  {duration(left)} left", flush=True)


# ---- what the machine cannot do ----

class Unfailing:
    """An output stream whose errors end no run: `| head` has left, a disk is full, a terminal is
    closed."""

    def __init__(self, stream, warn):
        self.stream, self.warn = stream, warn

    def __getattr__(self, name):  # all else is the stream's
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            act(*args)
        except Exception as error:
            if self.warn:
                self.warn = False
                print(f"warning: what is printed is lost: {error}; going on", file=sys.stderr)

    def finish(self):
        """Leave nothing unwritten, or Python does it as it ends, and fails."""
        try:
            self.stream.flush()
        except Exception:
            with contextlib.suppress(AttributeError, OSError):  # it may be no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unfailing_output():
    """Within it, nothing that is printed can end the program."""
    out, err = Unfailing(sys.stdout, warn=True), Unfailing(sys.stderr, warn=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.finish()


@contextlib.contextmanager
def enough_memory(advice):
    """Within it, an error that says that memory ran out becomes a ValueError with this advice."""
    try:
        yield
    except (ValueError, OSError):
        raise  # a message of ours, in which a file may have any name
    except Exception as error:
        kinds = torch.OutOfMemoryError, MemoryError, OverflowError
        words = "allocate memory", "out of memory", "verflow"  # a CPU's, MPS's, of absurd sizes
        if not isinstance(error, kinds) and not any(word in str(error) for word in words):
            raise
        raise ValueError(f"out of memory; {advice}") from error


def smaller_batches(s):
    """What to try where a step does not fit: smaller batches of the same tokens per step."""
    if s.batch_size == 1:
        return "a smaller --block_size, or a smaller model"
    factor = 2 if s.batch_size % 2 == 0 else s.batch_size  # an odd one goes down to 1
    return (f"--batch_size={s.batch_size // factor} --gradient_accumulation="
            f"{s.gradient_accumulation * factor}, the same tokens per step")


EARNS_COMPILING = 1e16  # floating-point operations of a run: a minute or two on an A100


def pick_compile(s, model, dataset, device):
    """What compile=auto comes to: ("on" or "off", why)."""
    if device.type != "cuda" or dataset.kind != "text":
        return "off", "it pays for text on a GPU"  # chats have hundreds of shapes
    if not has_triton():
        return "off", "it needs Triton"
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]  # Triton for Windows brings one
    if sys.platform != "win32" and not any(map(shutil.which, compilers)):
        return "off", "it needs a C compiler"
    tokens = s.max_iters * s.gradient_accumulation * s.batch_size * dataset.block_size
    if model.flops(tokens, tokens, tokens * dataset.block_size) < EARNS_COMPILING:
        return "off", "too short a run for the minute it takes"
    return "on", "it pays for text on a GPU"


@contextlib.contextmanager
def torch_errors(s):
    """Within it, an error of torch.compile becomes a ValueError of one line, and so does DDP's."""
    try:
        yield
    except RuntimeError as error:
        if "parameters that were not used" in str(error):
            raise ValueError("a parameter of model.py has no part in the loss, which processes "
                             "that train together do not allow: take it out, or leave torchrun "
                             "out") from error
        compiler_said = isinstance(error, torch._dynamo.exc.TorchDynamoException)
        if s.compile != "on" or not compiler_said or "out of memory" in str(error):
            raise
        cause, *_ = str(getattr(error, "inner_exception", error)).split("\n")
        raise ValueError(f"compile=on: this machine cannot compile the model ({cause}); use "
                         "--compile=off") from error


# ---- starting ----

def main(argv):
    """Train as the settings say. Raises ValueError or OSError for a mistake that a user can fix."""
    s = load_settings(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = gpt.pick_device(s.device, s.dtype)
    with processes(device) as device, alone_in(s):
        model, dataset, resumed = set_up(s, device, new_model)
        run(s, model, dataset, device, dtype, why, resumed)


def load_settings(settings_class, argv, doc):
    """The settings. With eval_only two have another default: a block_size of all that the model has
    learned, and eval_tokens None, all that there are."""
    s = config.load(settings_class, argv, doc)
    if not s.eval_only:
        return s
    defaults = replace(config.load(settings_class, []), block_size=0, eval_tokens=None)
    return config.load(settings_class, argv, start=defaults)


def check_settings(s, may_be_0=()):
    """Raise ValueError for the first setting out of its range. may_be_0: names of settings of which
    0 means as many as there are."""
    def need(ok, name, what):
        if not ok:
            raise ValueError(f"{name}={getattr(s, name)}: must be {what}")

    s.compile = {"True": "on", "False": "off"}.get(s.compile, s.compile)  # as nanoGPT has it
    if s.eval_only:
        may_be_0 = (*may_be_0, "block_size")
        if s.resume or s.init_from == "scratch":
            raise ValueError("eval_only=True: name the model to measure, and leave out --resume: "
                             f"--init_from={s.out_dir / 'best.pt'}, or gpt2")
    for name in ("block_size", "n_layer", "n_head", "n_embd", "epochs", "max_iters", "batch_size",
                 "gradient_accumulation", "log_interval", "eval_interval"):
        least = 0 if name in may_be_0 else 1
        need(getattr(s, name, 1) >= least, name, f"{least} or more")  # no script has all of them
    for name in ("weight_decay", "grad_clip", "warmup_iters", "patience", "read_iters",
                 "sample_interval"):
        need(getattr(s, name) >= 0, name, "0 or more")
    for name in ("learning_rate", "embedding_learning_rate"):
        need(getattr(s, name) > 0, name, "above 0")
    for name in ("dropout", "momentum", "beta1", "beta2"):
        need(0 <= getattr(s, name) < 1, name, "from 0 to below 1")
    need(0 <= s.final_lr <= 1, "final_lr", "from 0 to 1, a fraction of the peak")
    need(s.eval_tokens is None or s.eval_tokens >= 1, "eval_tokens", "1 or more")
    need(0 <= s.seed < 2**63, "seed", "from 0 to 2**63 - 1")
    need(re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+m", str(s.save_interval)), "save_interval",
         "a number of steps (500) or of minutes (10m)")
    for name, choices in (("optimizer", ("muon", "adamw")), ("best_by", ("val", "train")),
                          ("decay", ("linear", "cosine", "constant")),
                          ("compile", ("auto", "on", "off"))):
        need(getattr(s, name) in choices, name, " or ".join(choices))


@contextlib.contextmanager
def alone_in(s):
    """Within it no other run trains into out_dir. Raises OSError where one does already."""
    if not is_first() or s.eval_only:
        yield
        return
    with locked(s.out_dir):
        for name in ("best.pt", "last.pt", "log.csv", "loss.png"):
            for part in s.out_dir.glob(f".{name}.*.part"):  # of runs that were killed
                part.unlink(missing_ok=True)
        last = s.out_dir / "last.pt"
        begins = dist.is_initialized() and not s.resume and not restarts()
        if begins and last.exists():
            os.replace(last, s.out_dir / "last.pt.old")  # or torchrun's restart would go on from it
        yield


def set_up(s, device, make_model):
    """What a run starts from: (model, dataset, the dict of last.pt or None). make_model(s) makes
    the model where the run does not resume. Raises ValueError or OSError."""
    rank, world_size = ranks()
    if s.gradient_accumulation % world_size and not s.eval_only:
        raise ValueError(f"gradient_accumulation={s.gradient_accumulation}: must be a multiple of "
                         f"the {world_size} processes, which share the batches of a step")
    if restarts() and (s.out_dir / "last.pt").exists() and not s.eval_only:
        s.resume = True
    torch.manual_seed(s.seed)
    resumed = load_resumed(s) if s.resume else None
    if rank:
        dist.barrier()  # the first process may have to download the model
    with enough_memory("use a smaller model: n_layer, n_embd, block_size"):
        model = (gpt.model_from_checkpoint(resumed, s.dropout, s.out_dir / "last.pt") if resumed
                 else make_model(s))
        model.to(device)
    if world_size > 1 and rank == 0:
        dist.barrier()
    dataset = open_dataset(s.data_dir, model.config.block_size, s.batch_size, s.seed,
                           s.read_iters * s.gradient_accumulation)
    made_of = dataset.tokenizer, dataset.fingerprint
    if resumed and (resumed["tokenizer"], resumed["data"]) != made_of:
        raise ValueError(f"{s.out_dir / 'last.pt'}: was made with other data or another tokenizer "
                         f"(data_dir={resumed['settings'].get('data_dir')}, as it was then) than "
                         f"data_dir={s.data_dir} has now; use the same, or another out_dir")
    torch.manual_seed(s.seed + rank)  # of dropout
    return model, dataset, resumed


def new_model(s):
    """The model that the settings describe, or the one that init_from names."""
    if s.init_from != "scratch":
        return load_base(s)
    vocab_size = read_meta(s.data_dir)["vocab_size"]
    # All at once, or layers would be made until the system ends the program.
    torch.empty((vocab_size + s.block_size) * s.n_embd + 12 * s.n_layer * s.n_embd**2)
    # By name: a field that a reader adds to GPTConfig need only be a setting too.
    shape = {f.name: getattr(s, f.name) for f in fields(gpt.GPTConfig) if hasattr(s, f.name)}
    return gpt.GPT(gpt.GPTConfig(vocab_size=vocab_size, **shape))


def load_base(s):
    """The model that s.init_from names, for the ids of s.data_dir and a context of s.block_size (0:
    all that it has learned). Raises ValueError or OSError: no such model, or one with another
    tokenizer."""
    path, checkpoint, theirs = config.local_path(s.init_from), None, "gpt2"
    is_name = s.init_from in gpt.GPT2_NAMES
    if path.suffix == ".pt":
        checkpoint = gpt.load_checkpoint(path, "Train one first.")
        theirs = checkpoint["tokenizer"]
    elif not is_name and not (path / "config.json").exists() and path.suffix != ".safetensors":
        raise ValueError(f"init_from={s.init_from}: no model there; name a best.pt, a folder with "
                         f"a config.json and weights, or one of {', '.join(gpt.GPT2_NAMES)}"
                         " (and to go on with a run that stopped: --resume=True)")
    name = theirs if isinstance(theirs, str) else "FILE, the tokenizer.json beside its own data"
    other_tokenizer = ValueError(
        f"init_from={s.init_from}: was not made with the tokenizer of data_dir={s.data_dir} and "
        f"its role tokens; prepare the data with the model's own: --tokenizer={name}")
    if theirs != folder_tokenizer(s.data_dir):
        raise other_tokenizer  # before anything is downloaded
    if checkpoint:
        model = gpt.model_from_checkpoint(checkpoint, s.dropout, path)
        if s.block_size:
            gpt.crop_block_size(model, s.block_size)
    else:
        source = s.init_from if is_name else path
        model = gpt.load_gpt2(source, None, s.block_size or None, s.dropout)
    if model.config.vocab_size != read_meta(s.data_dir)["vocab_size"]:
        raise other_tokenizer
    return model


@unfailing_output()
def run(s, model, dataset, device, dtype, why, resumed):
    """Say what is about to be trained (or only measured), do it, and leave with the signal's exit
    code if one stopped it. Raises ValueError or OSError, the first of them where memory runs out
    too."""
    torch.set_float32_matmul_precision("high")
    get_tokenizer(dataset.tokenizer)  # it is needed later; where it cannot be had, say so now
    # cuDNN's attention plans anew for every shape, and chats have hundreds.
    torch.backends.cuda.enable_cudnn_sdp(dataset.kind == "text")
    reason = "as set"
    if s.compile == "auto":
        s.compile, reason = pick_compile(s, model, dataset, device)
    how, compiled = f"optimizer {s.optimizer}", f"; compile {s.compile} ({reason})"
    if s.eval_only:
        how, compiled = f"{s.batch_size} x {model.config.block_size} tokens at a time", ""
    world_size = ranks()[1]
    together = f"; {world_size} processes" if world_size > 1 else ""
    print(f"{s.data_dir}: {dataset.n_tokens('train'):,} training tokens, {dataset.vocab_size} ids\n"
          f"model: {model.num_params():,} parameters, {model.config.n_layer} layers x "
          f"{model.config.n_embd}; {how}{together}\ndevice: {why}{compiled}", flush=True)
    if not s.eval_only and is_first():
        with only_telling("the KV cache"):
            if not gpt.cache_agrees(model):
                raise ValueError("model.py computes something else with it than without, so chats "
                                 "and samples will not be what is trained here")
    if s.read_iters and not s.eval_only:
        print(f"up to step {s.read_iters} questions are learned too, and their loss is counted; "
              "then the answers alone", flush=True)
    if resumed:
        rest = ""
        if resumed["step"] >= s.max_iters:
            rest = f", and no step is left: max_iters={s.max_iters}; a larger one trains on"
        print(f"resumed at step {resumed['step']}{rest}", flush=True)
    if device.type == "cuda" and dataset.kind == "text":
        dataset = ReadAhead(dataset, world_size, s.gradient_accumulation // world_size)
    advice = f"the last checkpoint is kept. Try {smaller_batches(s)}"
    with enough_memory(advice), torch_errors(s):
        if s.eval_only:
            return measure(s, model, dataset, device, dtype)
        if not s.resume and (s.out_dir / "best.pt").exists():
            print(f"{s.out_dir / 'best.pt'} of an earlier run will be replaced (--out_dir=FOLDER "
                  "keeps it)", flush=True)
        stopped_by = train(s, model, dataset, device, dtype, resumed)
    if stopped_by:
        print(f"the same command with --resume=True goes on from {s.out_dir / 'last.pt'}")
        raise SystemExit(128 + int(stopped_by))


if __name__ == "__main__":
    config.run(main)
