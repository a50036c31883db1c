"""Print what a run reports besides progress: samples, evaluations, overfitting, the result."""
import math
from datetime import timedelta

from config import UserError, shell_command
from data.conversation import decode_conversation, encode_prompt, special_ids
from data.datasets import SPLITS, count_targets
from data.tokenizer import get_tokenizer
from runtime.distributed import is_rank_0
from runtime.log import bits_per_byte
from runtime.plots import plot_losses
from runtime.resume import lowest


def log_row(cfg, dataset, state):
    """Return the log row entries known before the step: step, epoch, losses if just evaluated."""
    epoch = dataset.epochs("train", state.step * cfg.gradient_accumulation)
    row = {"step": state.step, "epoch": epoch}
    if state.history and state.history[-1][0] == state.step:
        _, row["train_loss"], row["val_loss"] = state.history[-1]
        row["val_bits_per_byte"] = bits_per_byte(
            row["val_loss"], *count_targets(dataset, "val", cfg.eval_tokens))
    return row


def report_evaluation(cfg, dataset, state):
    """Plot the losses, print the last ones, and print once that the model overfits."""
    plot_losses(cfg.out_dir, state.history)
    row = log_row(cfg, dataset, state)
    print(f"step {state.step:>5}/{cfg.max_iters}  epoch {row['epoch']:.2f}  train "
          f"{row['train_loss']:.4f}  val {row['val_loss']:.4f}  {row['val_bits_per_byte']:.4f} "
          "bits per byte", flush=True)
    earlier = [is_overfitting(state.history[:n]) for n in range(len(state.history))]
    if is_overfitting(state.history) and not any(earlier):
        (low_step, low_train, low_val), (_, train, val) = lowest(state.history), state.history[-1]
        intended = " (intended: best_by=train)" if cfg.best_by == "train" else ""
        print(f"  Validation loss is rising, {low_val:.3f} at step {low_step}, {val:.3f} now; "
              f"training loss fell from {low_train:.3f} to {train:.3f}.\n  The model is "
              f"overfitting{intended}: it memorizes more than it generalizes.", flush=True)


def is_overfitting(history):
    """Whether training loss falls, and the last two validation losses are rising and over 1% above
    the lowest. history: (step, train loss, val loss) of each evaluation."""
    if len(history) < 3:
        return False
    _, train_at_lowest, val_lowest = lowest(history)
    (_, train_before, val_before), (_, train_now, val_now) = history[-2:]
    val_rises = val_lowest * 1.01 < val_before < val_now
    return val_rises and train_now < train_before < train_at_lowest


def print_sample(cfg, model, dataset):
    """Print what the model generates for cfg.sample_prompt, a held-out question, or a newline."""
    if not is_rank_0():
        return
    enc, prompt = get_tokenizer(dataset.tokenizer), cfg.sample_prompt
    if dataset.kind == "chat":
        if prompt is None:
            prompt = decode_conversation(dataset.conversations("val")[0], enc)[0]["content"]
        ids = encode_prompt([{"role": "user", "content": prompt}], enc)
    else:
        prompt = "\n" if prompt is None else prompt
        ids = enc.encode_ordinary(prompt) or [special_ids(enc)[0]]
    reply = model.generate(ids, 50, stop_ids=special_ids(enc), seed=0, temperature=0.7, top_k=50)
    print(f"  sample: {prompt!r} -> {enc.decode(list(reply))!r}", flush=True)


def print_summary(cfg, state):
    """Print the result of a run, and the command that tries the model."""
    print(f"{state.step} steps in {timedelta(seconds=int(state.seconds))}; {cfg.out_dir} has "
          "log.csv and, if matplotlib is installed, loss.png")
    if state.history:
        step, _, val_loss = lowest(state.history)
        print(f"lowest validation loss: {val_loss:.4f} at step {step}\nbest.pt has the lowest "
              f"{cfg.best_by} loss; try it:\n    " + shell_command(
                  "python", "chat.py", f"--checkpoint={cfg.out_dir / 'best.pt'}"), flush=True)


def run_eval(cfg, dataset, evaluate):
    """Print loss, perplexity and bits per byte of both splits. evaluate(split) returns the mean
    loss. Text windows do not overlap; published figures with overlapping ones are lower."""
    for split in reversed(SPLITS):
        n_targets, n_bytes = count_targets(dataset, split, cfg.eval_tokens)
        loss = evaluate(split)
        print(f"{split}: loss {loss:.4f}  perplexity {math.exp(loss):.2f}  "
              f"{bits_per_byte(loss, n_targets, n_bytes):.4f} bits per byte  ({n_targets:,} "
              f"targets, {n_bytes:,} bytes)", flush=True)


def diverged(cfg, step, loss, norm):
    """Return the UserError for a loss or gradient that is not finite."""
    return UserError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}. The last checkpoint is "
        f"kept. Try a lower learning_rate (now {cfg.learning_rate:g}), more warmup_iters or a "
        "lower grad_clip")
