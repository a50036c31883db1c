"""Train a GPT from scratch, on plain text or on chats.

    python train.py config/train_chat.py                 # the small instruction data, minutes on a laptop
    python train.py config/train_shakespeare.py          # plain text
    python train.py config/train_chat.py --resume=True   # go on where a run stopped
    python train.py --help                               # every setting

It writes out_dir/best.pt, which chat.py talks to, and out_dir/last.pt, which --resume goes on from.
"""
import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import config
from data.tokens import folder_tokenizer, open_dataset, read_meta
from model import (
    GPT,
    GPT2_NAMES,
    GPTConfig,
    load_checkpoint,
    model_checkpoint,
    model_from_checkpoint,
    pick_device,
    save_checkpoint,
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
    eval_tokens: int = 20_000  # tokens of an evaluation, of each split; always the same ones
    best_by: str = "val"  # best.pt has the lowest loss on val; or on train, for a model that shall memorize
    patience: int = 0  # stop after so many evaluations without a lower validation loss; 0: never
    # the machine
    seed: int = 1337  # of the first weights, the batches and the dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (matrix products; weights stay float32)
    compile: str = "auto"  # torch.compile: auto, on or off


@dataclass
class Settings(LoopSettings):
    """The loop's settings, and those of a model made from scratch."""
    init_from: str = "scratch"  # scratch; or gpt2, gpt2-medium, ..., a folder or a .pt: the model there
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
        need(getattr(s, name, 1) >= 1, name, "1 or more")  # a model found somewhere has its own shape
    for name in ("learning_rate", "embedding_learning_rate"):
        need(getattr(s, name) > 0, name, "above 0")
    for name in ("weight_decay", "grad_clip", "warmup_iters", "patience"):
        need(getattr(s, name) >= 0, name, "0 or more")
    need(0 <= s.seed < 2**63, "seed", "from 0 to 2**63 - 1")
    for name in ("dropout", "momentum", "beta1", "beta2"):
        need(0 <= getattr(s, name) < 1, name, "from 0 to below 1")
    need(0 <= s.final_lr <= 1, "final_lr", "from 0 to 1, a fraction of the peak")
    for name, choices in (("optimizer", ("muon", "adamw")), ("decay", ("linear", "cosine", "constant")),
                          ("best_by", ("val", "train")), ("compile", ("auto", "on", "off"))):
        need(getattr(s, name) in choices, name, " or ".join(choices))


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


def duration(seconds):
    """Seconds as people say them: 45s, 3m05s, 2h10m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def is_memorizing(history):
    """Whether validation has turned up while training still falls: history is a list of (step, train loss,
    validation loss); the last two validation losses must both lie over the lowest, and rise."""
    if len(history) < 3:
        return False
    best = min(history, key=lambda entry: entry[2])
    (_, train_before, val_before), (_, train_now, val_now) = history[-2:]
    return best[2] * 1.01 < val_before < val_now and train_now < train_before < best[1]


def not_finite(step, what, s):
    """The error of a run that has left the real numbers."""
    return ValueError(f"step {step}: {what}; the last good checkpoint is kept. Try a lower learning_rate "
                      f"(now {s.learning_rate:g}) or more warmup_iters")


def rng_states(device):
    """The states of the random generators that dropout uses."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def restore_rng(states, device):
    """Put back what rng_states returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def restore_optimizer(optimizer, state):
    """Take over an optimizer's momenta from a checkpoint, but keep the learning rates, decay and so on of
    this run's settings."""
    mine = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, mine):
        group.update(values)


def evaluations_since_best(history):
    """How many evaluations have gone by since the lowest validation loss; history as in is_memorizing."""
    losses = [val_loss for _, _, val_loss in history]
    return len(losses) - 1 - losses.index(min(losses))


def train_step(model, optimizers, dataset, step, s, device, autocast):
    """One step on the batches that belong to it: (mean loss per target, gradient norm, tokens read).

    The gradient is that of the mean over all the step's targets, however they fall into batches and
    processes. Raises ValueError if the loss or the gradient is not a finite number; the weights are then
    still those before.
    """
    rank, world = ranks()
    first = step * s.gradient_accumulation
    batches = [dataset.batch("train", first + i) for i in range(rank, s.gradient_accumulation, world)]
    count, read = sum_over_ranks(device, sum(targets.size for _, targets, _ in batches),
                                 sum(idx.size for idx, _, _ in batches))
    total = 0.0
    for i, batch in enumerate(batches):
        # Processes exchange gradients once a step, during the last backward; DDP takes their mean.
        alone = world > 1 and i < len(batches) - 1
        with model.no_sync() if alone else contextlib.nullcontext():
            with autocast:
                loss = model(*to_device(batch, device)) * (world / count)
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
    total, norm = sum_over_ranks(device, total.item() / world)[0], norm.item()
    if not math.isfinite(total + norm):
        raise not_finite(step + 1, f"the loss is {total} and the gradient norm {norm}", s)
    factor = get_lr(step, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm, read


def train(s, model, dataset, device, dtype, resumed=None):
    """The training loop: steps, evaluations, checkpoints, until max_iters or a signal.

    s: LoopSettings. model: a GPT on `device`. dataset: see data/tokens.py. resumed: the dict of a last.pt,
    whose optimizers, counters and random state are taken over. Returns the number of the signal that
    stopped it, or 0.
    """
    optimizers = model.configure_optimizers(s.optimizer, s.learning_rate, s.embedding_learning_rate,
                                            s.weight_decay, (s.beta1, s.beta2), s.momentum)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    run = torch.compile(model) if s.compile == "on" else model  # what computes; checkpoints take `model`
    start, history, best, told, spent = 0, [], math.inf, False, 0.0
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            restore_optimizer(optimizer, state)
        start, best, told, spent = (resumed[name] for name in ("step", "best", "told", "seconds"))
        history = [tuple(entry) for entry in resumed["history"]]
        restore_rng(resumed["rng"], device)
    model.train()

    def save(name, step, **extra):
        made = {"step": step, "max_iters": s.max_iters, "history": history, "seconds": spent,
                "data": dataset.fingerprint, "turns": dataset.turns,
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(s).items()}}
        try:
            checkpoint = model_checkpoint(model, dataset.tokenizer, dataset.kind, **made, **extra)
            save_checkpoint(s.out_dir / name, checkpoint)
            return True
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return False

    tokens, since, saved = 0, time.monotonic(), True
    with stop_signals() as caught:
        for step in range(start, s.max_iters):
            began = time.monotonic()
            loss, norm, read = train_step(run, optimizers, dataset, step, s, device, autocast)
            tokens, done = tokens + read, step + 1
            last = done == s.max_iters or bool(caught)
            line = f"step {done:>5}/{s.max_iters}  {epochs(dataset, done, s)}  loss {loss:.4f}"
            if last or done % s.eval_interval == 0:
                train_loss, val_loss = (evaluate(run, dataset, split, s.eval_tokens, device, autocast)
                                        for split in ("train", "val"))
                if not math.isfinite(train_loss + val_loss):
                    raise not_finite(done, f"the losses are {train_loss} and {val_loss}", s)
                history.append((done, train_loss, val_loss))
                line += f"  train {train_loss:.4f}  val {val_loss:.4f}"
            spent += time.monotonic() - began
            if last or done % s.eval_interval == 0 or done % s.log_interval == 0 or done == 1:
                speed = tokens / (time.monotonic() - since)
                left = spent / done * (s.max_iters - done)
                print(f"{line}  lr {get_lr(step, s) * s.learning_rate:.1e}  norm {norm:.2f}  {speed:,.0f} "
                      f"tokens/s  {duration(left)} left", flush=True)
                tokens, since = 0, time.monotonic()
            if last or done % s.eval_interval == 0:
                if not told and is_memorizing(history):
                    told = True
                    low = min(history, key=lambda entry: entry[2])
                    print(f"  Validation has turned up: {low[2]:.3f} at step {low[0]}, {val_loss:.3f} now, "
                          f"while the training loss fell from {low[1]:.3f} to {train_loss:.3f}. From here "
                          "on the model memorizes more than it generalizes.", flush=True)
                by = train_loss if s.best_by == "train" else val_loss
                better = by < best
                saved = not better or save("best.pt", done)
                best = by if better and saved else best
                saved &= save("last.pt", done, best=best, told=told, rng=rng_states(device),
                              optimizers=[optimizer.state_dict() for optimizer in optimizers])
                since = time.monotonic()
                if s.patience and not last and evaluations_since_best(history) >= s.patience:
                    print(f"stopped: {s.patience} evaluations without a lower validation loss (patience)")
                    break
            if last:
                break
    report(s, dataset, history, spent)
    if not saved:
        raise OSError(f"{s.out_dir}: the last checkpoint could not be saved; free some space and "
                      "--resume=True")
    return caught[0] if caught else 0


def epochs(dataset, step, s):
    """How often the training data has been read after `step` steps, as "epoch 1.25"."""
    return f"epoch {dataset.epochs('train', step * s.gradient_accumulation):.2f}"


def report(s, dataset, history, spent):
    """Say how the run went, and what to do with it."""
    step, train_loss, val_loss = history[-1]
    low = min(history, key=lambda entry: entry[2])
    kept = min(history, key=lambda entry: entry[1]) if s.best_by == "train" else low
    print(f"{step} steps in {duration(spent)}: training loss {train_loss:.4f}, validation {val_loss:.4f} "
          f"(lowest {low[2]:.4f} at step {low[0]}, {epochs(dataset, low[0], s)})")
    print(f"best.pt holds step {kept[0]} ({epochs(dataset, kept[0], s)}), the lowest {s.best_by} loss; talk "
          f"to it: "
          f"python chat.py --checkpoint={s.out_dir / 'best.pt'}", flush=True)


def load_base(s):
    """The model that s.init_from names, for the ids of s.data_dir and a context of s.block_size (0: all that
    it has learned). Raises ValueError or OSError: no such model, or one with another tokenizer."""
    tokenizer, vocab_size = folder_tokenizer(s.data_dir), read_meta(s.data_dir)["vocab_size"]
    path = config.local_path(s.init_from)
    is_checkpoint = path.suffix == ".pt"
    checkpoint = load_checkpoint(path, "Train one first.") if is_checkpoint else {"tokenizer": "gpt2"}
    unknown = ValueError(f"init_from={s.init_from}: was not made with the tokenizer of data_dir={s.data_dir} "
                         "and its role tokens; prepare the data with the model's own: --tokenizer=" +
                         ("FILE, the tokenizer.json beside the data it was trained on" if is_checkpoint
                          and checkpoint["tokenizer"] != "gpt2" else "gpt2"))
    if checkpoint["tokenizer"] != tokenizer:
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
    torch.manual_seed(s.seed)
    resumed = load_resumed(s) if s.resume else None
    model = model_from_checkpoint(resumed, dropout=s.dropout) if resumed else make_model(s)
    dataset = open_dataset(s.data_dir, model.config.block_size, s.batch_size, s.seed)
    if resumed and resumed["data"] != dataset.fingerprint:
        raise ValueError(f"{s.out_dir / 'last.pt'}: was made with other data (data_dir="
                         f"{resumed['settings']['data_dir']}, as it was then) than data_dir={s.data_dir} is "
                         "now; use the same, or another out_dir")
    return model.to(device), dataset, resumed


def run(s, model, dataset, device, dtype, why, resumed):
    """Say what is about to be trained, train it, and leave with the signal's exit code if one stopped it."""
    torch.set_float32_matmul_precision("high")
    reason = "as set"
    if s.compile == "auto":
        s.compile = "on" if device.type == "cuda" and dataset.kind == "text" else "off"
        reason = "it pays on a GPU with batches of one shape"
    print(f"{s.data_dir}: {len(dataset.tokens['train']):,} training tokens, {dataset.vocab_size} ids")
    print(f"model: {model.num_params():,} parameters, {model.config.n_layer} layers x "
          f"{model.config.n_embd}; device: {why}; compile {s.compile} ({reason}); optimizer {s.optimizer}",
          flush=True)
    if resumed:
        print(f"resumed at step {resumed['step']}")
    stopped_by = train(s, model, dataset, device, dtype, resumed)
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def new_model(s):
    """The model that the settings describe, or the one that init_from names."""
    if s.init_from != "scratch":
        return load_base(s)
    return GPT(GPTConfig(read_meta(s.data_dir)["vocab_size"], s.block_size, s.n_layer, s.n_head, s.n_embd,
                         s.dropout, s.bias))


def main(argv):
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, s.dtype)
    model, dataset, resumed = set_up(s, device, new_model)
    run(s, model, dataset, device, dtype, why, resumed)


if __name__ == "__main__":
    config.run(main)
