"""Draw losses and learning curves with matplotlib; draw nothing if it is not installed."""
import csv
from importlib.util import find_spec

from data.files import write_atomically
from runtime.distributed import is_rank_0


def plot_losses(out_dir, history):
    """Draw out_dir/loss.png; history: (step, train loss, val loss) of each evaluation."""
    if is_rank_0():
        log = (out_dir / "log.csv").read_text(encoding="utf-8").splitlines()
        rows = [row for row in csv.DictReader(log) if row["loss"]]  # the last row has none
        each = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], "0.8"
        steps, train, val = zip(*history)
        lines = {"each step": each, "training": (steps, train, "o-"),
                 f"validation, lowest: {min(val):.2f}": (steps, val, "o-")}
        save_plot(out_dir / "loss.png", lines, xlabel="step", ylabel="loss, nats per target")


def plot_rows(path, results):
    """Draw results of `python -m tests.bench rows`: dicts with rows, "trained on", "held out"."""
    lines = {name: ([f"{row['rows']:,}" for row in results], [100 * row[name] for row in results],
                    "o-") for name in ("trained on", "held out")}
    save_plot(path, lines, xlabel="different generated rows", ylabel="exact match, %")


def save_plot(path, lines, **settings):
    """Write a PNG of {label: arguments of matplotlib's plot}. Raises OSError."""
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure
        axes = Figure(figsize=(8, 4.5), layout="constrained").subplots(subplot_kw=settings)
        for label, line in lines.items():
            axes.plot(*line, label=label, markersize=4)
        axes.legend()
        write_atomically(path, lambda f: axes.figure.savefig(f, dpi=100, format="png"))
