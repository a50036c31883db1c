"""Save best.pt and last.pt of a run, and resume exactly from last.pt."""
import contextlib
import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from config import UserError
from data.files import lock_folder
from runtime.checkpoint import load_checkpoint, model_state, save_checkpoint
from runtime.distributed import is_rank_0

# Settings that must not change when a run is resumed.
SAME_SETTINGS = ("init_from", "block_size", "n_layer", "n_head", "n_embd", "bias", "optimizer",
                 "fused", "batch_size", "gradient_accumulation", "best_by", "seed",
                 "prompt_loss_iters")


@dataclass
class TrainState:
    """The state of a run, besides its model and optimizers."""
    step: int = 0  # steps done; it also numbers the next micro-batches: see train_step
    seconds: float = 0.0  # of training, over all resumptions
    best: float = math.inf  # the lowest cfg.best_by loss so far
    history: list = field(default_factory=list)  # (step, train loss, val loss) of each evaluation


def lowest(history):
    """Return the entry of a history with the lowest validation loss."""
    return min(history, key=lambda entry: entry[2])


def save(cfg, name, model, dataset, state, optimizers=None):
    """Write a checkpoint into out_dir, on rank 0. With the optimizers, it has everything that an
    exact resume needs. Raises OSError."""
    if not is_rank_0():
        return
    extra = {}
    if optimizers:  # their settings, such as learning rates, are not saved
        extra["optimizer_states"] = [o.state_dict()["state"] for o in optimizers]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(cfg).items()}
    save_checkpoint(cfg.out_dir / name, model_state(
        model, dataset.tokenizer, dataset.kind, turns=dataset.turns, data=dataset.fingerprint,
        settings=settings, max_iters=cfg.max_iters, **asdict(state), **extra))


def save_is_due(cfg, step, saved_at):
    """Whether cfg.save_interval has passed: a number of steps, or of minutes since `saved_at`."""
    every = str(cfg.save_interval)
    if every.endswith("m"):
        return time.monotonic() - saved_at >= 60 * float(every[:-1])
    return step % int(every) == 0


def load_last(cfg):
    """Return the dict of out_dir/last.pt, or None if there is none. Raises UserError if that run
    had a different model, batch size or seed."""
    path = cfg.out_dir / "last.pt"
    if not path.exists():
        print(f"{path}: no such checkpoint; starting from scratch", flush=True)
        return None
    resumed = load_checkpoint(path)
    for name in SAME_SETTINGS:
        then, now = resumed.get("settings", {}).get(name), getattr(cfg, name, None)
        if then != now:
            raise UserError(f"{path}: was made with {name}={then}; use that, not {name}={now}")
    return resumed


def restore(resumed, optimizers):
    """Load the optimizers' state from a last.pt's dict; return its TrainState, or a new one for
    None. Learning rates, weight decay and so on stay those of this run."""
    if not resumed:
        return TrainState()
    for optimizer, state in zip(optimizers, resumed["optimizer_states"], strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return TrainState(**{f.name: resumed[f.name] for f in fields(TrainState)})


def lock_out_dir(cfg):
    """Context manager: keep other runs out of out_dir. Raises UserError if one is training."""
    is_writer = is_rank_0() and not cfg.eval_only
    return lock_folder(cfg.out_dir) if is_writer else contextlib.nullcontext()
