"""runtime/plots.py: what the plots show, read back from matplotlib's axes."""
import sys

import pytest

from runtime.plots import plot_losses

HEADER = ("step,epoch,loss,lr,norm,tokens,seconds,tokens_per_second,mfu,train_loss,val_loss,val_bits_per_byte\n")
LOG = HEADER + "0,0.00,5.5,1e-3,1.0,64,0.1,640,0.5,5.6,5.7,\n1,0.5,4.5,1e-3,1.0,64,0.1,640,0.5,,,\n2,1,,,,,,,,3.5,4.25,\n"
HISTORY = [(0, 5.6, 5.7), (1, 4.0, 4.125), (2, 3.5, 4.25)]


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes of each figure that is saved."""
    figure, axes = pytest.importorskip("matplotlib.figure"), []
    savefig = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, *args, **named: axes.extend(self.axes) or savefig(self, *args, **named))
    return axes


def curves(axes):
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.get_lines()}


@pytest.mark.parametrize("log, each_step", [(LOG, [(0, 5.5), (1, 4.5)]), (HEADER, [])])
def test_the_losses_of_a_run(tmp_path, drawn, log, each_step):
    out_dir = tmp_path / "a $ and $\\frac{"  # not formulas
    out_dir.mkdir()
    (out_dir / "log.csv").write_text(log, encoding="utf-8")
    plot_losses(out_dir, HISTORY)
    assert curves(drawn[0]) == {"each step": each_step, "training": [(0, 5.6), (1, 4.0), (2, 3.5)],
                                "validation, lowest: 4.12": [(0, 5.7), (1, 4.125), (2, 4.25)]}
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG") and len(list(out_dir.iterdir())) == 2


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "log.csv").write_text(LOG, encoding="utf-8")
    plot_losses(tmp_path, HISTORY)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
