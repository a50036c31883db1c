"""Train a GPT from scratch, on plain text or on chats.

    python train.py config/train_recite.py                 # chats: a minute on a laptop
    python train.py config/train_shakespeare.py            # plain text
    python train.py config/train_recite.py --resume=True   # continue where a run stopped
    python train.py --eval_only=True --init_from=out/chat/best.pt    # evaluate, write nothing
    python train.py --help                                 # every setting

    torchrun --nproc_per_node=8 train.py config/train_gpt2.py    # many GPUs: the same steps, faster

It writes out_dir/best.pt (which chat.py loads), out_dir/last.pt (which --resume continues from),
log.csv and, if matplotlib is installed, loss.png.
"""
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from data.datasets import SPLITS
from runtime import distributed, report, resume, setup
from runtime.devices import explain_torch_errors, mixed_precision, pick_device, to_device
from runtime.distributed import all_reduce, rank_and_world_size
from runtime.log import Logger
from runtime.muon import Muon
from runtime.signals import stop_on_broken_pipe, stop_signals


@dataclass
class LoopSettings:
    """Settings of the training loop, shared with finetune.py. --help prints these comments."""
    # input and output
    data_dir: Path = Path("data/instruction")  # a prepared folder: train.bin, val.bin, meta.json
    out_dir: Path = Path("out/new")  # where best.pt, last.pt and log.csv go
    resume: bool = False  # continue from out_dir/last.pt, if there is one
    eval_only: bool = False  # only evaluate init_from's model: loss, perplexity, bits per byte
    # one step
    batch_size: int = 8  # windows per micro-batch, or chats of batch_size * block_size tokens
    gradient_accumulation: int = 1  # micro-batches per step: a multiple of the number of processes
    max_iters: int = 2000  # steps
    prompt_loss_iters: int = 0  # for this many initial steps, the loss covers prompts too
    dropout: float = 0.0  # fraction of activations zeroed in training; slows overfitting
    # the optimizer
    optimizer: str = "muon"  # muon (the blocks' matrices; AdamW for the rest) or adamw (all)
    learning_rate: float = 0.01  # peak rate of Muon, or of AdamW if optimizer is adamw
    embedding_learning_rate: float = 0.003  # peak rate of the AdamW used alongside Muon
    warmup_iters: int = 20  # steps from near 0 to the peak
    decay: str = "linear"  # after warmup: linear, cosine or constant
    final_lr: float = 0.0  # the decay ends at this fraction of the peak
    weight_decay: float = 0.0  # for matrices and embeddings, not for norms and biases
    momentum: float = 0.9  # for Muon
    beta1: float = 0.9  # for AdamW
    beta2: float = 0.99  # for AdamW
    grad_clip: float = 1.0  # clip the gradient norm to this value; 0: no clipping
    # logging, evaluating, saving
    log_interval: int = 50  # steps between progress lines
    eval_interval: int = 250  # steps between evaluations
    save_interval: int | str = "5m"  # how often to save last.pt: in steps (500) or minutes (10m)
    sample_interval: int = 500  # steps between generated samples; 0: none
    sample_prompt: str | None = None  # prompt of the samples; None: a held-out one
    eval_tokens: int = 20_000  # tokens per evaluation, from each split; with eval_only: all
    best_by: str = "val"  # best.pt has the lowest loss on this split: val, or train (to memorize)
    patience: int = 0  # early stopping after this many evaluations without a lower val loss; 0: off
    # the machine
    seed: int = 1337  # for the initial weights, the batches and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (weights stay float32)
    fused: bool = True  # attention in one fused kernel; False: the readable code in model.py
    compile: bool = False  # torch.compile: faster on a GPU; needs Triton and a C compiler


@dataclass
class Settings(LoopSettings):
    """The loop's settings, and the sizes of a new model."""
    init_from: str = "scratch"  # or take weights and sizes from gpt2, ..., a folder or a .pt
    block_size: int = 0  # context length, in tokens; 0: 128, or that of init_from
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 256  # channels: the width of the model
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2


def train(cfg, model, dataset, device, dtype, resumed=None):
    """Train until max_iters, early stopping, or a signal.

    cfg: LoopSettings. model: a GPT on `device`. dataset: see data/datasets.py. resumed: what a
    last.pt contains. Returns the signal that stopped it, or 0. Raises UserError or OSError."""
    optimizers = configure_optimizers(model, cfg, dtype)
    state = resume.restore(resumed, optimizers)
    autocast = mixed_precision(device, dtype)  # matrix products in bfloat16 on a GPU
    wrapped = distributed.wrap_model(model, dataset, cfg.compile)  # compiled, in DDP
    logger = Logger(cfg.out_dir / "log.csv", state.step, device, dtype)
    stop, saved_at = False, time.monotonic()
    save_due = not resumed  # once at the start, to find out whether the disk has room
    model.train()
    with stop_signals() as signals:
        while not stop:
            # 1. Evaluate on both splits, and keep the best model so far.
            if evaluation_is_due(cfg, state):
                losses = {s: evaluate(wrapped, dataset, s, cfg, device, autocast) for s in SPLITS}
                state.history.append((state.step, losses["train"], losses["val"]))
                if losses[cfg.best_by] < state.best:
                    state.best = losses[cfg.best_by]
                    resume.save(cfg, "best.pt", model, dataset, state)
                with stop_on_broken_pipe(signals):
                    report.report_evaluation(cfg, dataset, state)
            if state.step >= cfg.max_iters or is_out_of_patience(cfg, state.history):
                logger.log(report.log_row(cfg, dataset, state))
                break

            # 2. Save everything that an exact resume needs.
            if save_due:
                resume.save(cfg, "last.pt", model, dataset, state, optimizers)
                saved_at = time.monotonic()

            # 3. Take one step.
            began = time.perf_counter()
            loss, norm, (targets, tokens, pairs) = train_step(
                wrapped, optimizers, dataset, state.step, cfg, device, autocast)
            save_due = resume.save_is_due(cfg, state.step + 1, saved_at)
            loss, tokens, pairs, save_due, stop = all_reduce(  # sums; any rank can ask to stop
                device, loss, tokens, pairs, save_due, bool(signals))
            seconds = time.perf_counter() - began

            # 4. Log.
            row = report.log_row(cfg, dataset, state) | {
                "loss": loss, "norm": norm, "lr": cfg.learning_rate * lr_factor(state.step, cfg),
                "tokens": tokens, "seconds": seconds, "flops": model.flops(targets, tokens, pairs)}
            logger.log(row)
            state.step += 1  # row has the step just taken
            state.seconds += seconds
            with stop_on_broken_pipe(signals):
                if row["step"] % cfg.log_interval == 0:
                    logger.print_step(row, cfg.max_iters)
                if cfg.sample_interval and state.step % cfg.sample_interval == 0:
                    report.print_sample(cfg, model, dataset)
    resume.save(cfg, "last.pt", model, dataset, state, optimizers)
    with stop_on_broken_pipe(signals):
        report.print_summary(cfg, state)
    if stop:
        return signals[0] if signals else signal.SIGTERM  # another rank received it
    return 0


def train_step(model, optimizers, dataset, step, cfg, device, autocast):
    """Take step `step`, counted from 0. With one micro-batch and one rank this is just
    (model(idx, targets, loss_positions) / n_targets).backward(), and a step of each optimizer.

    Returns this rank's share of the mean loss, the gradient norm, and counts (targets of all ranks;
    tokens and attention pairs of this rank). The gradient is that of the mean over all the step's
    targets, however they are spread over micro-batches and ranks. Raises UserError for a loss or
    gradient that is not finite, before any weight changes.
    """
    # A micro-batch and its dropout depend only on its number, so a resumed run repeats them.
    # With gradient accumulation a step has several of them, which the ranks take round-robin.
    rank, world_size = rank_and_world_size()
    first = step * cfg.gradient_accumulation
    micro_batches = range(first, first + cfg.gradient_accumulation)
    n_targets = sum(dataset.n_targets("train", i) for i in micro_batches)
    mine = micro_batches[rank::world_size]
    step_loss, n_tokens, n_pairs = 0.0, 0, 0
    for i in mine:
        idx, targets, loss_positions = to_device(dataset.batch("train", i), device)
        torch.manual_seed(cfg.seed + i)  # for dropout
        if world_size > 1:  # DDP averages the gradients of all ranks, once a step
            model.require_backward_grad_sync = i == mine[-1]
        with autocast:
            loss_sum = model(idx, targets, loss_positions)
        # backward adds to p.grad. DDP takes the mean over ranks: times world_size, it is the sum.
        (loss_sum * (world_size / n_targets)).backward()
        step_loss += loss_sum.detach()
        n_tokens += idx.numel()
        n_pairs += idx.numel() * idx.shape[1]  # T * T for each row
    step_loss = float(step_loss) / n_targets
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not math.isfinite(step_loss + norm):
        raise report.diverged(cfg, step, step_loss, norm)
    if cfg.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step_loss, norm.item(), (n_targets, n_tokens, n_pairs)


DECAYS = {"linear": lambda done: 1 - done,  # done goes from 0 to 1
          "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
          "constant": lambda done: 1.0}


def lr_factor(step, cfg):
    """The learning rate schedule, as a fraction of the peak: linear warmup from near 0 to 1, then
    the decay to final_lr."""
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(cfg.max_iters - cfg.warmup_iters, 1)
    return cfg.final_lr + (1 - cfg.final_lr) * DECAYS[cfg.decay](done)


def configure_optimizers(model, cfg, dtype=torch.float32):
    """Return a list of optimizers: AdamW (Loshchilov & Hutter 2019) for all parameters, or Muon for
    the blocks' matrices (with matmuls in `dtype`) and AdamW for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if p.dim() >= 2 and n.startswith("h.")}
    tables = {n: p for n, p in trained.items() if p.dim() >= 2 and n not in matrices}
    vectors = [p for p in trained.values() if p.dim() < 2]  # norms and biases: no weight decay
    use_muon = cfg.optimizer == "muon"
    decayed = tables if use_muon else matrices | tables
    groups = [{"params": list(decayed.values()), "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw_lr = cfg.embedding_learning_rate if use_muon else cfg.learning_rate
    optimizers = [torch.optim.AdamW(groups, adamw_lr, (cfg.beta1, cfg.beta2), fused=True)]
    if use_muon:
        optimizers.insert(0, Muon(matrices, cfg.learning_rate, cfg.momentum, cfg.weight_decay,
                                  dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def evaluate(model, dataset, split, cfg, device, autocast):
    """Return a split's mean loss per target, in nats, over the same cfg.eval_tokens tokens each
    time. Use no random numbers, so that evaluating does not affect training."""
    rank, world_size = rank_and_world_size()
    model.eval()
    total_loss, n_targets = 0.0, 0
    for i, batch in enumerate(dataset.eval_batches(split, cfg.eval_tokens)):
        if i % world_size == rank:
            idx, targets, loss_positions = to_device(batch, device)
            with autocast:
                total_loss += model(idx, targets, loss_positions).item()
            n_targets += targets.numel()
    model.train()
    total_loss, n_targets = all_reduce(device, total_loss, n_targets)
    return total_loss / n_targets


def evaluation_is_due(cfg, state):
    """Whether to evaluate before the next step: every eval_interval steps and at the end, unless a
    resumed run has that evaluation already."""
    if state.history and state.history[-1][0] == state.step:
        return False
    return state.step == cfg.max_iters or (state.step > 0 and state.step % cfg.eval_interval == 0)


def is_out_of_patience(cfg, history):
    """Early stopping: whether cfg.patience evaluations have passed without a lower val loss."""
    if not cfg.patience or not history:
        return False
    return len(history) - 1 - history.index(resume.lowest(history)) >= cfg.patience


def main(argv):
    """Train as the settings say. Raises UserError or OSError for a mistake that a user can fix."""
    cfg = setup.load_settings(Settings, argv, __doc__)
    run(cfg, setup.new_model)


def run(cfg, make_model, set_steps=None):
    """Train the model that make_model(cfg) returns, or the one restored from last.pt; with
    eval_only, evaluate it. set_steps(cfg, dataset) returns cfg with epochs converted to steps."""
    config.check(cfg, decay=tuple(DECAYS))
    device, dtype, device_text = pick_device(cfg.device, cfg.dtype)
    with (distributed.process_group(device) as device, resume.lock_out_dir(cfg),
          explain_torch_errors()):
        model, dataset, resumed = setup.set_up(cfg, device, make_model)
        if set_steps and not cfg.eval_only:
            cfg = set_steps(cfg, dataset)
        setup.print_setup(cfg, model, dataset, device_text, resumed)
        if cfg.eval_only:
            autocast = mixed_precision(device, dtype)
            return report.run_eval(cfg, dataset, lambda split: evaluate(
                model, dataset, split, cfg, device, autocast))
        stopped_by = train(cfg, model, dataset, device, dtype, resumed)
    if stopped_by:
        print(f"the same command with --resume=True continues from {cfg.out_dir / 'last.pt'}")
        raise SystemExit(128 + stopped_by)


if __name__ == "__main__":
    config.run(main)
