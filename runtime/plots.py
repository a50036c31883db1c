"""Draw losses and learning curves with matplotlib; draw nothing where it is not installed."""
import csv
from importlib.util import find_spec

from data.files import write_atomically
from runtime.distributed import is_rank_0


def plot_losses(out_dir, history):
    """Draw out_dir/loss.png; history: (step, train loss, val loss) of each evaluation."""
    if not is_rank_0():
        return
    with open(out_dir / "log.csv", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["loss"]]  # the last row has none
    each = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], "0.8"
    steps, train, val = zip(*history)
    lines = {"each step": each, "training": (steps, train, "o-"), "validation": (steps, val, "o-"),
             f"lowest: {min(val):.2f}": (steps[val.index(min(val))], min(val), "kx")}
    save_plot(out_dir / "loss.png", lines, title=str(out_dir).replace("$", r"\$"), xlabel="step",
              ylabel="loss, nats per target")


def plot_rows(path, results):
    """Draw results of `python -m tests.bench rows`: dicts with rows, "trained on", "held out"."""
    counts = [f"{result['rows']:,}" for result in results]  # as text: evenly spaced
    lines = {name: (counts, [100 * result[name] for result in results], "o-")
             for name in ("trained on", "held out")}
    save_plot(path, lines, title="Reciting, and knowing the rule", ylabel="exact match, %",
              ylim=(-3, 103), xlabel="different generated rows, in the same number of steps")


def save_plot(path, lines, **settings):
    """Write a PNG of {label: arguments of matplotlib's plot}. Raises OSError."""
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure
        axes = Figure(figsize=(8, 4.5), layout="constrained").subplots(subplot_kw=settings)
        for label, line in lines.items():
            axes.plot(*line, label=label, markersize=4)
        axes.legend()
        write_atomically(path, lambda f: axes.figure.savefig(f, dpi=100, format="png"))
