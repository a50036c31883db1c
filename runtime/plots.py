"""What people look at: the losses of a run, how many answers are right (both drawn by matplotlib,
where it is installed), and in look.py the inside of a model. The README's pictures lie beside."""
import csv
import gc

from data.files import write_atomically


def plot_losses(out_dir, history):
    """Where matplotlib is installed, loss.png in out_dir: every step's loss of log.csv, the
    evaluations, and where validation was lowest. history: (step, train loss, val loss) of each
    evaluation. Raises what matplotlib or a damaged log.csv raises."""
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
    axes.set(xlabel="step", ylabel="loss, nats per target")
    axes.set_title(str(out_dir), parse_math=False)  # a $ in a name is no formula
    axes.legend()
    write_atomically(out_dir / "loss.png", lambda f: figure.savefig(f, dpi=100, format="png"))
    # Figures refer to themselves, and training makes too few objects for them to go soon.
    gc.collect()


def plot_rows(path, results):
    """Where matplotlib is installed, a picture of python -m tests.bench rows: over the number of
    different rows, the shares right of those trained on and of held-out ones. results: dicts with
    rows, "trained on" and "held out"."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(results))  # 0 has no place on a logarithmic axis
    for name, marker in (("trained on", "s--"), ("held out", "o-")):
        axes.plot(places, [100 * result[name] for result in results], marker, label=name)
    axes.set_xticks(places, [f"{result['rows']:,}" for result in results])
    axes.set(xlabel="different generated rows, in the same number of steps", ylim=(-3, 103),
             ylabel="answers right, %", title="Reciting, and knowing the rule")
    axes.legend()
    write_atomically(path, lambda f: figure.savefig(f, dpi=100, format="png"))
