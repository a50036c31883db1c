"""Toy data and toy training runs that several test files share."""
import csv
import json

import pytest
import torch

import data.text
import finetune
import prepare_alpaca
import train
from runtime.checkpoint import load_checkpoint

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ROWS = [{"instruction": f"Count {'on and ' * (i % 3)}on from {word}.", "output": ", ".join((2 * WORDS)[i:i + 3])}
        for i, word in enumerate(WORDS)]  # each fits into a context of 64, but no two do
TEXT = " ".join(WORDS) * 12
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=64)
LOOP = dict(batch_size=2, max_iters=12, dropout=0.2, warmup_iters=2, learning_rate=0.01, eval_interval=5,
            eval_tokens=200, log_interval=1, sample_interval=0, device="cpu")
CPU = torch.device("cpu")


def prepare_chats(folder, rows=ROWS, *flags, tokenizer="bytes"):
    """Prepare a folder of chats; return it."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_alpaca.main([f"--source={folder / 'rows.json'}", f"--out_dir={folder}", "--val_fraction=0.25",
                         f"--tokenizer={tokenizer}", *flags])
    return folder


def prepare_text(folder, text=TEXT):
    """Prepare a folder of plain text; return it."""
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text(text, encoding="utf-8")
    data.text.main([f"--source={folder / 'words.txt'}", f"--out_dir={folder}", "--val_fraction=0.3"])
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with chat/ and text/, both prepared, and base/, a model trained on the text."""
    root = tmp_path_factory.mktemp("toys")
    prepare_chats(root / "chat")
    prepare_text(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.report.plot_losses", lambda *args: None)
        train.main(flags(root, train, root / "base", max_iters=7))
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip plotting the losses and measuring the CPU's peak, which take longer than a toy run."""
    monkeypatch.setattr("runtime.report.plot_losses", lambda *args: None)
    monkeypatch.setattr("runtime.log.peak_flops", lambda *args: 1e12)


def make_quick():
    """Do the same in a child process."""
    import runtime.log
    import runtime.report
    runtime.report.plot_losses = lambda *args: None
    runtime.log.peak_flops = lambda *args: 1e12


def flags(toys, script, out_dir, **changes):
    """Return the command line of a toy run."""
    own = SHAPE | {"data_dir": toys / "text"} if script is train else \
        {"init_from": toys / "base" / "best.pt", "data_dir": toys / "chat"}
    return [f"--{name}={value}" for name, value in (LOOP | own | {"out_dir": out_dir} | changes).items()]


def run(toys, script, out_dir, **changes):
    """Train or finetune in this process; return last.pt."""
    script.main(flags(toys, script, out_dir, **changes))
    return load_checkpoint(out_dir / "last.pt")


def read_log(out_dir):
    """Return the rows of log.csv as dicts of text; assert that their steps are 0, 1, 2 and so on."""
    with open(out_dir / "log.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == [str(i) for i in range(len(rows))]
    return rows


def curve(out_dir):
    """Return the columns of log.csv that do not depend on the clock."""
    clock = {"seconds", "tokens_per_second", "mfu"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_log(out_dir)]


def same(a, b):
    """Whether two parts of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out_dir, straight):
    """Assert that two folders contain the same run, apart from the clock and the settings."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(out_dir / name), load_checkpoint(straight / name)
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "settings"}:
            assert same(ours[key], theirs[key]), (name, key)
    assert curve(out_dir) == curve(straight)


class Crash(Exception):
    """An error that nothing catches, so nothing more is saved."""


def crash():
    raise Crash


def before_step(wanted, act):
    """Wrap train.train_step: call act() before step `wanted`, counted from 0, is computed."""
    real = train.train_step

    def step(model, optimizers, dataset, number, *args):
        if number == wanted:
            act()
        return real(model, optimizers, dataset, number, *args)
    train.train_step = step


SCRIPTS = pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
