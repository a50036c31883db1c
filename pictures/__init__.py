"""What people look at: the losses of a run, and where the heads of a model look. matplotlib draws
them where it is installed; the pictures of the README lie beside this file."""
import csv
import gc
import sys

import torch

from data.files import write_atomically
from model import attention


def draw_losses(out_dir, history):
    """Where matplotlib is installed, loss.png in out_dir: every step's loss of log.csv, the
    evaluations, and where validation was lowest. history: (step, train loss, val loss) of each
    evaluation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    # Its last row is torn where the disk is full.
    with open(out_dir / "log.csv", encoding="utf-8") as f:
        every = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(f) if row["lr"]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*every), color="0.8", linewidth=1, label="each step")
    steps, train_losses, val_losses = zip(*history)
    axes.plot(steps, train_losses, "o-", markersize=3, label="training")
    axes.plot(steps, val_losses, "o-", markersize=3, label="validation")
    low = min(history, key=lambda entry: entry[2])
    if low is not history[-1]:
        axes.axvline(low[0], color="0.5", linestyle=":")
        late = low[0] > steps[-1] / 2  # the words stand where there is more room
        words = f"lowest validation loss, {low[2]:.2f}\nfrom here on: memorizing"
        axes.annotate(words, (low[0], 0.97), xycoords=("data", "axes fraction"), va="top",
                      xytext=(-8 if late else 8, 0), textcoords="offset points",
                      ha="right" if late else "left")
    axes.set(xlabel="step", ylabel="loss, nats per target", title=str(out_dir))
    axes.legend()
    try:
        write_atomically(out_dir / "loss.png", lambda f: figure.savefig(f, dpi=100, format="png"))
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    # Figures refer to themselves, and training makes too few objects for them to go soon.
    gc.collect()


# ---- where the heads look ----

@torch.no_grad()
def attention_weights(model, ids):
    """Where every head looks: ids, a list of T -> (n_layer, nh, T, T) in float32, rows the tokens
    that look, columns those looked at. What each layer's c_attn computes is listened to, and
    `attention` of model.py says what the fused kernel does not."""
    weights = []

    def listen(module, args, output):
        q, k, v = (z.unflatten(2, (model.config.n_head, -1)).transpose(1, 2)  # (1, nh, T, hs)
                   for z in output.chunk(3, dim=2))
        weights.append(attention(q, k, v)[1].float().cpu())

    hooks = [block.attn.c_attn.register_forward_hook(listen) for block in model.h]
    try:
        model.hidden(torch.tensor([ids], device=model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(weights)


def head_scores(weights, ids):
    """Three habits of every head, from 0 to 1: weights (n_layer, nh, T, T), T ids -> {name:
    (n_layer, nh)}.

    previous token: the mean weight that a token gives to the one before it. first token: that it
    gives to the very first. same token earlier: that it gives to all earlier occurrences of itself,
    over the tokens that have any. All means are over the tokens after the first.
    """
    ids = torch.tensor(ids)
    same = (ids[:, None] == ids).tril(-1).float()  # (T, T)
    repeated = same.any(1)
    scores = {"previous token": weights.diagonal(-1, 2, 3).mean(-1),
              "first token": weights[..., 1:, 0].mean(-1)}
    if repeated.any():
        scores["same token earlier"] = (weights * same).sum(-1)[..., repeated].mean(-1)
    return scores


def habits(weights, ids):
    """Lines that name, for each habit of head_scores, the three heads that have it most."""
    lines = []
    for name, scores in head_scores(weights, ids).items() if len(ids) > 1 else ():
        n_head, flat = scores.shape[1], scores.flatten()
        best = [f"layer {i // n_head + 1} head {i % n_head + 1}: {flat[i]:.2f}"
                for i in flat.argsort(descending=True)[:3].tolist()]
        lines.append(f"{name:<20}" + "   ".join(best))
    return lines


def draw_attention(path, weights, pieces, longest=40):
    """Write a grid of pictures, a row for each layer and a column for each head, of where the last
    tokens look; pieces: their texts. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [piece.replace("$", r"\$") for piece in pieces][-longest:]
    n_layer, n_head = weights.shape[:2]
    size = max(9 / n_head, 1.2)
    figure = Figure(figsize=(size * n_head + 1.2, size * n_layer + 1.2), layout="constrained")
    grid = figure.subplots(n_layer, n_head, sharex=True, sharey=True, squeeze=False)
    for layer in range(n_layer):
        for head in range(n_head):
            axes = grid[layer, head]
            axes.imshow(weights[layer, head, -longest:, -longest:].numpy(), cmap="Blues",
                        vmin=0, vmax=1, aspect="auto")
            axes.tick_params(length=0, labelsize=5)
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            axes.set_yticks(range(len(shown)), shown)
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    return True
