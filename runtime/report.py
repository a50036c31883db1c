"""What a run prints besides progress: samples, evaluations, overfitting, the final report."""
import math
import shlex
from importlib.util import find_spec

from config import UserError
from data.conversation import decode_conversation, encode_prompt, special_ids
from data.datasets import SPLITS, count_targets
from data.tokenizer import get_tokenizer
from runtime.distributed import is_rank_0
from runtime.log import bits_per_byte, duration
from runtime.plots import plot_losses
from runtime.resume import lowest
from runtime.terminal import show_progress


def log_row(cfg, dataset, state):
    """The part of a log row that is known before the step, with the losses of an evaluation."""
    row = {"step": state.step,
           "epoch": dataset.epochs("train", state.step * cfg.gradient_accumulation)}
    if state.history and state.history[-1][0] == state.step:
        _, row["train_loss"], row["val_loss"] = state.history[-1]
        row["val_bits_per_byte"] = bits_per_byte(
            row["val_loss"], *count_targets(dataset, "val", cfg.eval_tokens))
    return row


def report_evaluation(cfg, dataset, state):
    """Plot the losses and print the last ones; once, print that the model overfits."""
    plot_losses(cfg.out_dir, state.history)
    row = log_row(cfg, dataset, state)
    print(f"step {state.step:>5}/{cfg.max_iters}  epoch {row['epoch']:.2f}  train "
          f"{row['train_loss']:.4f}  val {row['val_loss']:.4f}  {row['val_bits_per_byte']:.4f} "
          "bits per byte", flush=True)
    if is_overfitting(state.history) and not state.overfit_warned:
        state.overfit_warned = True
        (low_step, low_train, low_val), (_, train, val) = lowest(state.history), state.history[-1]
        print(f"  Validation loss is rising, {low_val:.3f} at step {low_step}, {val:.3f} now; "
              f"training loss fell from {low_train:.3f} to {train:.3f}.\n"
              "  The model is overfitting: it memorizes more than it generalizes.", flush=True)


def is_overfitting(history):
    """Whether validation loss rises while training loss falls: the last two validation losses are
    1 % above the lowest, and rising. history: (step, train loss, val loss) of each evaluation."""
    if len(history) < 3:
        return False
    _, train_at_lowest, val_lowest = lowest(history)
    (_, train_before, val_before), (_, train_now, val_now) = history[-2:]
    val_rises = val_lowest * 1.01 < val_before < val_now
    train_falls = train_now < train_before < train_at_lowest
    return val_rises and train_falls


def print_sample(cfg, model, dataset):
    """Print what the model writes now, after cfg.sample_prompt, or a held-out question, or the
    start of a line."""
    if not is_rank_0():
        return
    enc, prompt = get_tokenizer(dataset.tokenizer), cfg.sample_prompt
    if dataset.kind == "chat":
        if prompt is None:
            prompt = decode_conversation(dataset.conversation("val", 0), enc)[0]["content"]
        ids = encode_prompt([{"role": "user", "content": prompt}], enc)
    else:
        prompt = "\n" if prompt is None else prompt
        ids = enc.encode_ordinary(prompt) or [special_ids(enc)[0]]
    reply = model.generate(ids, 50, stop_ids=special_ids(enc), seed=0, temperature=0.7, top_k=50)
    print(f"  sample: {prompt!r} -> {enc.decode(list(reply))!r}", flush=True)


def print_summary(cfg, dataset, state):
    """Print the result of a run, and the command that talks to the model."""
    print(f"{state.step} steps in {duration(state.seconds)}")
    if state.history:
        (step, train_loss, val_loss), low = state.history[-1], lowest(state.history)
        bits = bits_per_byte(val_loss, *count_targets(dataset, "val", cfg.eval_tokens))
        epoch = dataset.epochs("train", low[0] * cfg.gradient_accumulation)
        print(f"step {step}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}, "
              f"{bits:.4f} bits per byte\nlowest validation loss: {low[2]:.4f} at step {low[0]} "
              f"(epoch {epoch:.2f})")
        column = 1 + SPLITS.index(cfg.best_by)
        best = min(state.history, key=lambda entry: entry[column])
        print(f"best.pt has the lowest {cfg.best_by} loss, of step {best[0]}; talk to it:")
        print(f"    python chat.py --checkpoint={shlex.quote(str(cfg.out_dir / 'best.pt'))}")
    made = ", ".join(name for name in ("log.csv", "loss.png") if (cfg.out_dir / name).exists())
    picture = "" if find_spec("matplotlib") else " (for loss.png: pip install matplotlib)"
    print(f"{cfg.out_dir}: {made}{picture}", flush=True)


def run_eval(cfg, dataset, evaluate):
    """Print loss, perplexity and bits per byte of both splits. evaluate(dataset, split) returns the
    mean loss.

    Text is read in windows that do not overlap, so a token has half a window of context on average.
    Published figures often use overlapping windows, and are then lower.
    """
    for split in reversed(SPLITS):
        n_targets, n_bytes = count_targets(dataset, split, cfg.eval_tokens)
        loss = evaluate(WithProgress(dataset, n_targets), split)
        perplexity = math.inf if loss > 700 else math.exp(loss)  # float64 overflows
        print(f"{split}: loss {loss:.4f}  perplexity {perplexity:.2f}  "
              f"{bits_per_byte(loss, n_targets, n_bytes):.4f} bits per byte  ({n_targets:,} "
              f"targets, {n_bytes:,} bytes)", flush=True)


class WithProgress:
    """A dataset that shows the progress of its evaluation."""

    def __init__(self, dataset, n_targets):
        self.dataset, self.n_targets = dataset, n_targets

    def eval_batches(self, split, max_tokens):
        done = 0
        for batch in self.dataset.eval_batches(split, max_tokens):
            yield batch
            done += batch[1].size
            show_progress(split, done, self.n_targets)


def diverged(cfg, step, loss, norm, model):
    """The UserError for a loss or gradient that is not finite."""
    grads = {name: p.grad.abs().max().item()
             for name, p in model.named_parameters() if p.grad is not None}
    largest = max(grads, key=lambda name: (not math.isfinite(grads[name]), grads[name]))
    plain = largest.removeprefix("module.").removeprefix("_orig_mod.")  # DDP's, torch.compile's
    return UserError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}, the largest gradient "
        f"{grads[largest]:.3g} in {plain}. The last checkpoint is kept. Try a lower learning_rate "
        f"(now {cfg.learning_rate:g}), more warmup_iters (now {cfg.warmup_iters}) or a lower "
        f"grad_clip (now {cfg.grad_clip:g})")
