"""Draw losses with matplotlib; draw nothing if it is not installed."""
import csv
from importlib.util import find_spec

from data.files import write_atomically
from runtime.distributed import is_rank_0


def plot_losses(out_dir, history):
    """Draw out_dir/loss.png; history: (step, train loss, val loss) of each evaluation. Raises
    OSError."""
    if not is_rank_0() or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure
    log = (out_dir / "log.csv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(log) if row["loss"]]  # the last row has none
    steps, train, val = zip(*history)
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    axes.set(xlabel="step", ylabel="loss, nats per target")
    axes.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], "0.8",
              label="each step")
    axes.plot(steps, train, "o-", markersize=4, label="training")
    axes.plot(steps, val, "o-", markersize=4, label=f"validation, lowest: {min(val):.2f}")
    axes.legend()
    write_atomically(out_dir / "loss.png", lambda f: axes.figure.savefig(f, dpi=100, format="png"))
