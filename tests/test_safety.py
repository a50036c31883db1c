"""Training that loses no work: killed at any moment, signals, full disks, NaN, no memory, many processes."""
import csv
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from data.tokens import TokenDataset

import config
import data.text
import finetune
import prepare_alpaca
import train
from model import load_checkpoint
from tests.conftest import POSIX

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
MODEL = dict(n_layer=1, n_head=2, n_embd=16, block_size=32)
LOOP = dict(batch_size=2, max_iters=12, dropout=0.2, warmup_iters=2, learning_rate=0.01, eval_interval=5,
            eval_tokens=200, log_interval=1, sample_interval=0, device="cpu")
if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")  # children of a process that has torch: they start at once
    FORK.set_forkserver_preload([__name__, "matplotlib.figure", "torch._dynamo"])
else:
    FORK = multiprocessing.get_context("spawn")
LENDS_NOTHING = pytest.mark.skipif(sys.platform == "darwin", reason="macOS lends more memory than there is")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with text/ and chat/, both prepared, and base.pt, a model to finetune."""
    root = tmp_path_factory.mktemp("safety")
    rows = [{"instruction": f"Count {'on ' * (i % 4)}from {word}.", "output": " ".join(WORDS[i:i + 3])}
            for i, word in enumerate(WORDS)]
    (root / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "words.txt").write_text(" ".join(WORDS) * 12, encoding="utf-8")
    prepare_alpaca.main([f"--source={root / 'rows.json'}", f"--out_dir={root / 'chat'}", "--tokenizer=bytes",
                         "--val_fraction=0.25"])
    data.text.main([f"--source={root / 'words.txt'}", f"--out_dir={root / 'text'}", "--val_fraction=0.3",
                    "--tokenizer=bytes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *args: None)
        train.main(flags(root, train, root / "base", max_iters=2))
    return root


def flags(made, script, out_dir, **changes):
    own = {**MODEL, "data_dir": made / "text"} if script is train else \
        {"init_from": made / "base" / "best.pt", "data_dir": made / "chat"}
    return [f"--{name}={value}" for name, value in {**LOOP, **own, "out_dir": out_dir, **changes}.items()]


def run(made, script, out_dir, **changes):
    """Train or finetune in this process; returns last.pt."""
    script.main(flags(made, script, out_dir, **changes))
    return load_checkpoint(out_dir / "last.pt")


def print_to(said):
    """From now on what this process prints is added to the file `said`."""
    with open(said, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)


def in_child(name, arguments, said, patch, draw, environment):
    train.peak_flops = lambda *args: 1e12
    if not draw:
        train.draw_losses = lambda *args: None
    os.environ.update(environment)
    print_to(said)
    if patch:
        patch()
    sys.argv = [name, *arguments]
    try:
        config.run(importlib.import_module(name).main)
        leave(0)
    except SystemExit as left:
        leave(left.code if isinstance(left.code, int) else print(left.code, file=sys.stderr) or 1)
    except BaseException:
        leave(traceback.print_exc() or 1)


def leave(code):
    """End this process as a program ends: without freeing an error's frames, where torch may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(script, arguments, said, patch=None, draw=False, **environment):
    """A process of its own that runs a script's main after patch(); what it prints is added to `said`."""
    child = FORK.Process(target=in_child, args=(script.__name__, arguments, said, patch, draw, environment))
    child.start()
    return child


def ended(*children):
    """Their exit codes, once they have ended."""
    for child in children:
        child.join(180)  # a busy machine may need a minute
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def read_log(out_dir):
    """The rows of log.csv; each has all columns, and the steps are 1, 2, 3 and so on."""
    with open(out_dir / "log.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def curve(out_dir):
    """What of log.csv does not depend on the clock."""
    return [[row[name] for name in ("epoch", "loss", "lr", "norm", "tokens", "train_loss", "val_loss")]
            for row in read_log(out_dir)]


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
    """Assert that two folders hold the same run, but for the clock and the settings that say how."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(out_dir / name), load_checkpoint(straight / name)
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "step_seconds", "settings"}:
            assert same(ours[key], theirs[key]), (name, key)
    assert curve(out_dir) == curve(straight)


def before_step(wanted, act):
    """Wrap train.train_step so that act() is called before step `wanted` (counted from 1) is computed."""
    real = train.train_step

    def step(model, optimizers, dataset, number, *args):
        if number + 1 == wanted:
            act()
        return real(model, optimizers, dataset, number, *args)
    train.train_step = step


DRAW, PEAK_FLOPS = train.draw_losses, train.peak_flops


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    """before_step, used in a test itself, lasts until the test's end; only tests of loss.png and of the share
    of the peak wait for these."""
    monkeypatch.setattr(train, "train_step", train.train_step)
    monkeypatch.setattr(train, "draw_losses", lambda *args: False)
    monkeypatch.setattr(train, "peak_flops", lambda *args: 1e12)


@pytest.fixture
def pictures(unpatched, monkeypatch):
    """Losses are drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train, "draw_losses", DRAW)


# Going on

class Crash(Exception):
    """Nothing that the loop knows: no more is saved."""


def crash():
    raise Crash


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_a_run_that_crashes_often_goes_on_from_the_newest_save_and_ends_the_same(made, tmp_path, monkeypatch,
                                                                                 script, optimizer):
    knobs = dict(save_interval=3, optimizer=optimizer, gradient_accumulation=2)
    run(made, script, tmp_path / "straight", **knobs)
    out_dir, saved = tmp_path / "out", 0
    for wanted in (3, 5, 8, 12):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(train, "train_step", train.train_step)
            before_step(wanted, crash)
            run(made, script, out_dir, resume=saved > 0, **knobs)
        assert [row["step"] for row in read_log(out_dir)] == [str(i) for i in range(1, wanted)]
        saved = max(step for step in (0, 3, 6, 9) if step < wanted)  # not at evaluations, 5 and 10
        if saved:
            assert load_checkpoint(out_dir / "last.pt")["step"] == saved
        torch.manual_seed(99)
    run(made, script, out_dir, resume=True, **knobs)
    assert_same_run(out_dir, tmp_path / "straight")


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_minutes_are_a_save_interval_too(made, tmp_path, script):
    before_step(4, crash)
    with pytest.raises(Crash):
        run(made, script, tmp_path, save_interval="0.0m")  # it has always gone by
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_rates_and_lengths_may_change_and_momenta_stay(made, tmp_path, monkeypatch):
    before = run(made, train, tmp_path, max_iters=4)
    begun = []
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "train_step", lambda model, optimizers, *args: begun.append(
            [optimizer.state_dict() for optimizer in optimizers]) or crash())
        run(made, train, tmp_path, max_iters=20, resume=True, learning_rate=0.5, weight_decay=0.25)
    for ours, theirs in zip(begun[0], before["optimizers"], strict=True):
        assert same(ours["state"], theirs["state"]) and ours["state"]
    assert {group["weight_decay"] for ours in begun[0] for group in ours["param_groups"]} >= {0.25}
    run(made, train, tmp_path, max_iters=6, resume=True, learning_rate=0.5, decay="constant")
    assert [float(row["lr"]) for row in read_log(tmp_path)[4:]] == [0.5, 0.5]


def test_finetuning_goes_on_for_more_epochs(made, tmp_path):
    knobs = dict(max_iters=0, eval_interval=0, decay="constant")
    first = run(made, finetune, tmp_path / "more", epochs=1, **knobs)
    more = run(made, finetune, tmp_path / "more", epochs=3, resume=True, **knobs)
    assert more["step"] > 2 * first["step"]
    run(made, finetune, tmp_path / "straight", epochs=3, **knobs)
    assert curve(tmp_path / "more")[-1] == curve(tmp_path / "straight")[-1]


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
@pytest.mark.parametrize("max_iters", [4, 3])
def test_a_finished_run_that_is_resumed_says_how_it_ended_and_changes_nothing(made, tmp_path, capsys, script,
                                                                             max_iters):
    run(made, script, tmp_path, max_iters=4)
    files = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "best.pt", "log.csv")}
    capsys.readouterr()
    run(made, script, tmp_path, max_iters=max_iters, resume=True)
    said = capsys.readouterr().out
    assert "4 steps in" in said and f"step 4, and no step is left: max_iters={max_iters};" in said
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_a_new_run_says_that_it_replaces_an_earlier_one(made, tmp_path, capsys):
    run(made, train, tmp_path, max_iters=1)
    assert "replaced" not in capsys.readouterr().out
    run(made, train, tmp_path, max_iters=1)
    assert f"{tmp_path / 'best.pt'} of an earlier run will be replaced" in capsys.readouterr().out


def test_a_run_resumed_past_its_new_end_before_any_evaluation_is_no_traceback(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "train_step", train.train_step)
        before_step(4, crash)
        run(made, train, tmp_path, save_interval=3)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(made, train, tmp_path, max_iters=2, resume=True)])
    try:
        config.run(train.main)
    except SystemExit as left:
        assert "max_iters" in str(left.code)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_resuming_with_other_text_is_refused_by_name(made, tmp_path):
    run(made, train, tmp_path / "out", max_iters=1)
    (tmp_path / "words.txt").write_text(" ".join(WORDS[::-1]) * 12, encoding="utf-8")
    data.text.main([f"--source={tmp_path / 'words.txt'}", f"--out_dir={tmp_path / 'text'}",
                    "--val_fraction=0.3", "--tokenizer=bytes"])
    with pytest.raises(ValueError, match=f"last.pt.*other data.*{re.escape(str(tmp_path / 'text'))}"):
        run(made, train, tmp_path / "out", resume=True, data_dir=tmp_path / "text")
    shutil.copytree(made / "text", tmp_path / "moved")  # the same data elsewhere
    assert run(made, train, tmp_path / "out", resume=True, data_dir=tmp_path / "moved")["step"] == 12


# Killed

@pytest.mark.parametrize("broken", [
    lambda last: last.pop("history"), lambda last: last.pop("rng"),
    lambda last: last.update(rng=[[torch.zeros(3)]]), lambda last: last["optimizers"].pop(),
    lambda last: last["optimizers"][1]["param_groups"].pop(), lambda last: last.update(history=[(1, 2)]),
    lambda last: last.update(history=None), lambda last: last.update(settings=[])])
def test_a_last_pt_that_cannot_be_gone_on_with_is_one_line(made, tmp_path, broken):
    run(made, train, tmp_path, max_iters=2)
    last = torch.load(tmp_path / "last.pt")
    broken(last)
    torch.save(last, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="^.*last.pt: ") as caught:
        train.main(flags(made, train, tmp_path, resume=True))
    assert "\n" not in str(caught.value)


def assert_whole(out_dir):
    """Assert that the checkpoints there can be read to the last byte; returns how many there are."""
    found = [load_checkpoint(path) for path in (out_dir / "last.pt", out_dir / "best.pt") if path.exists()]
    for checkpoint in found:
        assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    return len(found)


def rows_so_far(out_dir):
    try:
        return (out_dir / "log.csv").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


@POSIX
@pytest.mark.parametrize("script, save_interval", [(train, 1), (train, 3), (finetune, 2)],
                         ids=["train-1", "train-3", "finetune-2"])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(made, tmp_path, script, save_interval):
    """Twelve kills: after a few more rows of log.csv and a moment, or, every other time, while last.pt is being
    saved. Then it may end, and is compared with a run that nothing disturbed."""
    kills, out_dir, said = 12, tmp_path / "out", tmp_path / "said"
    knobs = dict(eval_interval=40, max_iters=6 * kills, save_interval=save_interval)
    assert ended(start(script, flags(made, script, tmp_path / "straight", **knobs), said)) == [0]
    moments, in_a_save = random.Random(save_interval), 0

    def saving():
        return list(out_dir.glob(".last.pt.*.part"))

    def again():
        for part in saving():
            part.unlink()
        resume = (out_dir / "last.pt").exists()
        return start(script, flags(made, script, out_dir, resume=resume, **knobs), said, draw=save_interval == 3)

    for number in range(kills):
        wanted, child = rows_so_far(out_dir) + moments.randrange(6), again()
        while child.is_alive() and not (saving() if number % 2 else rows_so_far(out_dir) > wanted):
            time.sleep(0.0002)
        time.sleep(moments.random() * (0.001 if number % 2 else 0.004))
        child.kill()
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0), said.read_text(encoding="utf-8")
        in_a_save += bool(saving())
        assert_whole(out_dir)
    assert in_a_save, "no kill fell into a save"
    assert ended(again()) == [0], said.read_text(encoding="utf-8")
    assert assert_whole(out_dir) == 2
    assert_same_run(out_dir, tmp_path / "straight")
    assert len(read_log(out_dir)) == 6 * kills


# Signals

def wait_for(condition):
    patience = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.002)


@POSIX
@pytest.mark.parametrize("script, number", [(train, "SIGINT"), (finetune, "SIGTERM"), (train, "SIGHUP")])
def test_a_signal_at_any_moment_saves_what_log_csv_tells_of(made, tmp_path, script, number):
    number = signal.Signals[number]
    child = start(script, flags(made, script, tmp_path, max_iters=10**4), tmp_path / "said")
    wait_for(lambda: (tmp_path / "log.csv").exists() and len((tmp_path / "log.csv").read_bytes()) > 1500)
    os.kill(child.pid, number)
    assert ended(child) == [128 + number]
    last, rows = load_checkpoint(tmp_path / "last.pt"), read_log(tmp_path)
    assert last["step"] == len(rows) and [step for step, *_ in last["history"]] == [
        int(row["step"]) for row in rows if row["val_loss"]] == list(range(5, last["history"][-1][0] + 1, 5))
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert f"{number.name}: finishing the step" in said and "with --resume=True goes on from" in said


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
@pytest.mark.parametrize("knobs", [{}, dict(learning_rate=1.0, patience=1, max_iters=40)], ids=["steps", "patience"])
def test_a_run_that_is_stopped_often_is_the_one_that_is_not(made, tmp_path, monkeypatch, script, knobs):
    run(made, script, tmp_path / "straight", **knobs)
    out_dir, evaluated = tmp_path / "out", []
    evaluate = train.evaluate
    for step in (1, 3, 5, 6, 10, 12):  # 5, 10: an evaluation is due; 12: the last
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", train.train_step)
            patch.setattr(train, "evaluate", lambda *args: evaluated.append(args) or evaluate(*args))
            before_step(step, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit) as stopped:
                run(made, script, out_dir, resume=step > 1, **knobs)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert load_checkpoint(out_dir / "last.pt")["step"] == len(read_log(out_dir)) == step
        assert load_checkpoint(out_dir / "best.pt")["step"] == {1: 1, 3: 1, 5: 1, 6: 5, 10: 5, 12: 10}[step]
    assert len(evaluated) == 4  # both splits, twice: when it goes on, not when it stops
    run(made, script, out_dir, resume=True, **knobs)
    assert_same_run(out_dir, tmp_path / "straight")
    run(made, script, out_dir, resume=True, **knobs)  # and goes no further
    assert_same_run(out_dir, tmp_path / "straight")


def test_a_stop_in_an_evaluation_is_taken_before_another_step(made, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def stopped(model, dataset, split, *args):
        if split == "train":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(model, dataset, split, *args)
    monkeypatch.setattr(train, "evaluate", stopped)
    with pytest.raises(SystemExit):
        run(made, train, tmp_path)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == last["history"][-1][0] == len(read_log(tmp_path)) == 5


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_not_disturbed(made, tmp_path):
    run(made, train, tmp_path / "straight")

    def second():
        refused = f"^{re.escape(str(tmp_path / 'out'))}: process {os.getpid()} has been writing there since"
        with torch.random.fork_rng(), pytest.raises(OSError, match=refused):
            run(made, train, tmp_path / "out", seed=2)
    before_step(7, second)
    run(made, train, tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best.pt", "last.pt", "log.csv"]


@pytest.mark.parametrize("script, bad, line", [
    (train, dict(learning_rate=1e30), "^step 2: .*learning_rate"),
    (train, dict(learning_rate=1e30, resume=True, max_iters=20), "^step 14: .*learning_rate"),
    pytest.param(train, dict(batch_size=10**12), "^out of memory", marks=LENDS_NOTHING),
    (finetune, dict(learning_rate=1e30), "^step 2: .*learning_rate")])
def test_a_bad_setting_costs_nothing_of_an_earlier_run(made, tmp_path, script, bad, line):
    knobs = dict(optimizer="adamw", save_interval=1, warmup_iters=0)
    run(made, script, tmp_path, **knobs)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=line):
        run(made, script, tmp_path, **{**knobs, **bad})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@LENDS_NOTHING
@pytest.mark.parametrize("absurd", ["n_embd=100000", "n_layer=1000000000", f"block_size={10**12}",
                                    f"block_size={10**18}"])
def test_a_model_beyond_memory_is_one_line(made, tmp_path, absurd):
    name, value = absurd.split("=")
    with pytest.raises(ValueError, match="^out of memory; .*smaller model: n_layer, n_embd, block_size$"):
        run(made, train, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def long_step():
    """A step of 50 seconds, and a clock that goes twenty times too fast."""
    clock = time.monotonic
    train.time.monotonic = lambda: 20 * clock()
    before_step(3, functools.partial(time.sleep, 50))


@POSIX
def test_a_second_ctrl_c_leaves_within_a_step(made, tmp_path):
    child = start(train, flags(made, train, tmp_path, save_interval=1), tmp_path / "said", long_step)
    wait_for(lambda: (tmp_path / "last.pt").exists() and load_checkpoint(tmp_path / "last.pt")["step"] == 2)
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    wait_for(lambda: "SIGINT: finishing" in (tmp_path / "said").read_text(encoding="utf-8"))
    time.sleep(0.1)  # within a second, by its clock, it might be the first once more
    assert child.is_alive()
    began = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    assert ended(child) == [130] and time.monotonic() - began < 40, "it waited for the step of 50 seconds"
    assert "Traceback" not in (tmp_path / "said").read_text(encoding="utf-8")
    assert load_checkpoint(tmp_path / "last.pt")["step"] == len(read_log(tmp_path)) == 2


# What only tells

class Closed:
    """A stream that nobody reads once training has begun, or on a disk that is full then."""

    def write(self, text):
        if text.startswith(("step", "SIG", "warning")):
            raise BrokenPipeError

    def flush(self):
        pass


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_output_that_nobody_takes_ends_no_run(made, tmp_path, monkeypatch, script):
    run(made, script, tmp_path / "straight", sample_interval=4)
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(train, "draw_losses", lambda *args: 1 / 0)
    monkeypatch.setattr(train.gpt.GPT, "generate", lambda *args, **knobs: 1 / 0)
    before_step(5, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        run(made, script, tmp_path / "out", sample_interval=4)
    run(made, script, tmp_path / "out", sample_interval=4, resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def test_what_is_printed_after_a_passing_error_is_there(monkeypatch):
    class FullForOnce(io.StringIO):
        def write(self, text):
            if text == "two":
                raise OSError(28, "No space left on device")
            return super().write(text)

    out, err = FullForOnce(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with train.unfailing_output():
        for text in ("one", "two", "three"):
            print(text)
    assert out.getvalue().split() == ["one", "three"] and err.getvalue().count("No space left") == 1


def close_the_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)


@POSIX
def test_a_program_whose_reader_has_left_trains_to_its_end(made, tmp_path):
    child = start(train, flags(made, train, tmp_path), tmp_path / "said", close_the_pipe)
    assert ended(child) == [0] and load_checkpoint(tmp_path / "last.pt")["step"] == 12


@pytest.mark.parametrize("harm", [
    lambda out_dir: (out_dir / "log.csv").unlink(), pytest.param(shutil.rmtree, marks=POSIX),
    lambda out_dir: (out_dir / "log.csv").write_bytes(b"\xffstep;loss\n1;0,5\n")],
    ids=["log.csv deleted", "folder deleted", "log.csv damaged"])
def test_files_that_disappear_or_change_end_no_run(made, tmp_path, pictures, harm):
    out_dir = tmp_path / "a$b_{$c"  # in a picture's title half a formula
    before_step(7, lambda: harm(out_dir))
    run(made, train, out_dir, eval_interval=12, save_interval=3)
    assert (out_dir / "log.csv").read_bytes().decode(errors="replace").splitlines()[-1].startswith("12,")
    run(made, train, out_dir, eval_interval=12, resume=True, max_iters=14)
    assert (out_dir / "best.pt").exists() and load_checkpoint(out_dir / "last.pt")["step"] == 14
    assert (out_dir / "loss.png").exists()


def test_the_report_claims_only_what_is_there(made, tmp_path, capsys, monkeypatch):
    save = train.gpt.save_checkpoint

    def full(path, checkpoint):
        if path.name == "best.pt":
            raise OSError(f"{path}: could not be saved ([Errno 28] No space left on device)")
        save(path, checkpoint)
    monkeypatch.setattr(train.gpt, "save_checkpoint", full)
    run(made, train, tmp_path)
    said = capsys.readouterr().out
    assert "best.pt" not in said and "loss.png" not in said.replace("then loss.png too", "")
    assert f"last.pt holds step 12; talk to it:\n    python chat.py --checkpoint={tmp_path / 'last.pt'}\n" in said
    assert f"{tmp_path}: log.csv" in said


# A full disk

@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place):
    with open(place / "ballast", "wb", buffering=0) as f:
        for size in (4096, 1):
            try:
                while f.write(bytes(size)):
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_a_disk_that_fills_up_costs_neither_the_old_checkpoint_nor_a_row(made, tmp_path, small_disk, capsys,
                                                                        script, request):
    knobs = dict(max_iters=110, save_interval=10, eval_interval=50, log_interval=100)
    run(made, script, tmp_path / "straight", **knobs)
    request.getfixturevalue("pictures")
    out_dir, seen = small_disk / "out", {}

    def look(name):
        seen[name] = load_checkpoint(out_dir / "last.pt")["step"]

    def free():
        look("full")
        seen["rows when full"] = rows_so_far(out_dir)
        seen["half a file"] = list(out_dir.glob(".*.part"))
        (small_disk / "ballast").unlink()
    before_step(16, lambda: fill(small_disk))
    before_step(93, free)
    before_step(102, lambda: look("freed"))
    capsys.readouterr()
    run(made, script, out_dir, **knobs)
    said = capsys.readouterr()
    assert seen["full"] == 10 and seen["freed"] == 100 and 16 < seen["rows when full"] < 90
    assert seen["half a file"] == []
    for name in ("last.pt", "best.pt", "log.csv"):
        assert f"warning: {out_dir / name}: " in said.err
    assert said.err.count("log.csv") == 1, "told once"
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (out_dir, tmp_path / "straight"))
    assert all(same(ours[key], theirs[key]) for key in ("step", "model", "optimizers", "rng", "history"))
    assert curve(out_dir) == curve(tmp_path / "straight")
    assert sorted(path.name for path in out_dir.iterdir()) == ["best.pt", "last.pt", "log.csv", "loss.png"]


def test_a_file_reaches_the_disk_before_it_gets_its_name(made, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def sync(fd):
        done.append(os.readlink(f"/proc/self/fd/{fd}") if Path("/proc/self/fd").exists() else "synced")
        fsync(fd)

    def rename(part, path):
        assert done and done[-1] in (str(part), "synced")
        done.append(replace(part, path) or f"{path} is there")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    run(made, train, tmp_path, max_iters=1)
    for name in ("last.pt", "best.pt", "log.csv"):
        assert f"{tmp_path / name} is there" in done


def little_room():
    import resource
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def full():
        out_dir = next(arg for arg in sys.argv if arg.startswith("--out_dir=")).partition("=")[2]
        for fd in (1, 2):  # the limit would be theirs too
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        size = (Path(out_dir) / "log.csv").stat().st_size + 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # of any file
    before_step(5, full)
    before_step(16, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_a_row_of_which_the_disk_took_two_bytes_does_not_end_the_run_and_is_completed(made, tmp_path, script):
    pytest.importorskip("resource")
    knobs = dict(max_iters=20, eval_interval=10)
    run(made, script, tmp_path / "straight", **knobs)
    child = start(script, flags(made, script, tmp_path / "out", **knobs), tmp_path / "said", little_room,
                  draw=True)
    assert ended(child) == [0]
    assert curve(tmp_path / "out") == curve(tmp_path / "straight")
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 20


# What no checkpoint should hold

@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "ln_f.bias"])
@pytest.mark.parametrize("value, grad_clip", [(math.nan, 1.0), (math.inf, 0.0)])
def test_a_gradient_that_is_no_number_is_named_and_nothing_is_overwritten(made, tmp_path, monkeypatch, script,
                                                                         name, value, grad_clip):
    real, before = train.train_step, {}

    def step(model, optimizers, dataset, number, *args):
        if number == 3:  # the fourth
            before.update({path.name: path.read_bytes() for path in tmp_path.glob("*.pt")})
            model.get_parameter(name).register_hook(lambda grad: grad * 0 + value)
        return real(model, optimizers, dataset, number, *args)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ValueError) as caught:
        run(made, script, tmp_path, save_interval=1, eval_interval=2, grad_clip=grad_clip,
            learning_rate=0.003)
    line = str(caught.value)
    assert re.search(r"^step 4\b.*gradient norm (nan|inf)", line) and "\n" not in line
    assert re.search(rf"largest gradient (nan|inf) in {re.escape(name)}\b", line)
    assert "the learning rate was 0.0027," in line  # one step of ten after the peak
    assert all(advice in line for advice in ("learning_rate", "warmup_iters", "grad_clip"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
    assert sorted(before) == ["best.pt", "last.pt"] and len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_a_loss_that_is_no_number_keeps_the_save_before_it(made, tmp_path, monkeypatch, script):
    real, calls = train.gpt.GPT.forward, iter(range(100))

    def forward(*args):
        in_training = len(args) > 2  # with targets
        return real(*args) * (math.nan if in_training and next(calls) == 2 else 1)

    monkeypatch.setattr(train.gpt.GPT, "forward", forward)
    with pytest.raises(ValueError, match="^step 3: the loss is nan.*learning_rate"):
        run(made, script, tmp_path, save_interval=1, eval_interval=100)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == 2 and assert_whole(tmp_path) == 2


@pytest.mark.parametrize("where", ["step", "evaluation"])
@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_where_memory_runs_out_one_line_says_what_fits(made, tmp_path, monkeypatch, script, where):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee more lines")
    if where == "step":
        before_step(3, full)
    else:
        monkeypatch.setattr(train, "evaluate", full)
    monkeypatch.setattr(sys, "argv", ["x", *flags(made, script, tmp_path, save_interval=1, batch_size=6,
                                                  eval_interval=3, gradient_accumulation=5)])
    with pytest.raises(SystemExit) as left:
        config.run(script.main)
    assert "out of memory" in left.value.code and "\n" not in left.value.code
    assert "--batch_size=3 --gradient_accumulation=10," in left.value.code
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_another_error_of_the_step_is_passed_on_as_it_is(made, tmp_path):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def wrong():
        raise error
    before_step(2, wrong)
    with pytest.raises(RuntimeError) as caught:
        run(made, train, tmp_path)
    assert caught.value is error


# What a person sees

def test_log_csv_can_be_read_while_it_runs_and_has_every_figure(made, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", PEAK_FLOPS)
    grown = []
    for step in (5, 12):
        before_step(step, lambda: grown.append(len(read_log(tmp_path))))
    last = run(made, train, tmp_path)
    assert grown == [4, 11]  # whether the first step was good shows after it
    rows = read_log(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "loss", "lr", "norm", "tokens", "seconds", "peak_share",
                             "train_loss", "val_loss", "val_bits_per_byte"]
    assert [row["step"] for row in rows if row["val_loss"]] == ["5", "10", "12"]
    for row, (_, *losses) in zip([row for row in rows if row["val_loss"]], last["history"], strict=True):
        assert [float(row["train_loss"]), float(row["val_loss"])] == pytest.approx(losses, abs=1e-4)
    assert all(row["tokens"] == "64" and float(row["seconds"]) > 0 for row in rows)  # 2 windows of 32
    assert all(0 <= float(row["peak_share"]) < 1 and float(row["norm"]) > 0 for row in rows)
    rates = [0.01 / 3, 0.02 / 3, *(0.01 * (1 - i / 10) for i in range(10))]  # warm-up, then linear
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=5e-3)
    tokens = (made / "text" / "train.bin").stat().st_size / 2
    assert [float(row["epoch"]) for row in rows] == pytest.approx([64 * i / tokens for i in range(1, 13)],
                                                                  abs=0.006)


def test_the_line_of_a_step_has_every_figure_in_its_place(made, tmp_path, capsys):
    run(made, train, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    shape = (r"step +\d+/12  epoch [\d.]+  loss [\d.]+  (train [\d.]+  val [\d.]+|norm [\d.]+  [\d,]+ tokens/s)  "
             r"\d+% of peak  \d+s left")
    assert all(re.fullmatch(shape, line) for line in lines), lines
    assert ["  val " in line for line in lines] == [step in (5, 10, 12) for step in range(1, 13)]


@pytest.mark.parametrize("losses", [{}, dict(train_loss="10.8012", val_loss="10.7995")])
def test_the_line_of_a_long_run_fits_100_columns(tmp_path, capsys, losses):
    log = train.Log(tmp_path / "log.csv", torch.device("cpu"), torch.float32)
    log.tokens, log.seconds, log.flops = 10 * 524_288, 10.0, 4.5e12
    row = {"epoch": "19.80", "loss": "10.8249", "norm": "10.35", **losses}
    log.print_line(train.Progress(step=1, seconds=60.2), row, train.Settings(max_iters=18_865))
    said = capsys.readouterr().out
    assert len(said.rstrip()) <= 100 and said.endswith("45% of peak  13d03h left\n"), said


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_loss_png_is_a_small_picture_drawn_at_every_evaluation(made, tmp_path, capsys, script, pictures):
    png, drawn = tmp_path / "loss.png", []
    for step in (5, 6, 11):
        before_step(step, lambda: drawn.append(png.exists() and png.read_bytes()))
    run(made, script, tmp_path)
    assert drawn[0] is False and len({*drawn, png.read_bytes()}) == 4
    for picture in (*drawn[1:], png.read_bytes()):
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
        assert 1000 < len(picture) < 300_000
    assert "loss.png" in capsys.readouterr().out


def test_without_matplotlib_one_line_says_how_to_get_it_and_all_else_is_the_same(made, tmp_path, monkeypatch,
                                                                                capsys, pictures):
    run(made, train, tmp_path / "straight")  # with matplotlib
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    capsys.readouterr()
    run(made, train, tmp_path / "out")
    said = capsys.readouterr()
    assert (said.out + said.err).count("pip install matplotlib") == 1
    assert not (tmp_path / "out" / "loss.png").exists()
    assert_same_run(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("script", [train, finetune], ids=["train", "finetune"])
def test_samples_are_written_as_often_as_asked_for_and_disturb_nothing(made, tmp_path, capsys, script):
    run(made, script, tmp_path / "none", sample_interval=0, max_iters=6)
    assert "  sample: " not in capsys.readouterr().out
    run(made, script, tmp_path / "all", sample_interval=1, max_iters=6)
    assert capsys.readouterr().out.count("\n  sample: ") == 6
    run(made, script, tmp_path / "some", sample_interval=3, sample_prompt="one two", max_iters=6)
    assert capsys.readouterr().out.count("\n  sample: 'one two' -> ") == 2
    for name in ("all", "some"):
        assert_same_run(tmp_path / name, tmp_path / "none")


# Many processes

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(script, arguments, tmp_path, patch=None, count=2):
    """Processes that train together, as torchrun would start them; rank 1 prints to tmp_path/said1."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    return [start(script, arguments, tmp_path / f"said{rank}", patch, RANK=str(rank), LOCAL_RANK=str(rank),
                  **common) for rank in range(count)]


def note(line):
    """Of this process, beside what it prints."""
    with open(f"{os.environ['NOTES']}{os.environ['RANK']}", "a", encoding="utf-8") as f:
        f.write(f"{line}\n")


def note_batches_and_exchanges():
    """Write down every batch that is read and every exchange of gradients."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    parallel = torch.nn.parallel.DistributedDataParallel
    batch_of, made_of = TokenDataset.batch, parallel.__init__

    def batch(self, split, index):
        note(f"{split} {index}")
        return batch_of(self, split, index)

    def exchange(state, bucket):
        note("exchange")
        return default_hooks.allreduce_hook(state, bucket)

    def init(self, *args, **kwargs):
        made_of(self, *args, **kwargs)
        self.register_comm_hook(None, exchange)
    TokenDataset.batch, parallel.__init__ = batch, init


def assert_close_runs(out_dir, alone):
    """Assert that two runs took the same steps, but for the order of sums."""
    for ours, theirs in zip(read_log(out_dir), read_log(alone), strict=True):
        for name in ("epoch", "lr", "tokens"):
            assert ours[name] == theirs[name]
        for name in ("loss", "train_loss", "val_loss", "norm"):
            assert (ours[name] == theirs[name] == "" or
                    float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4))
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (out_dir, alone))
    assert ours["model"].keys() == theirs["model"].keys()
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, rtol=1e-3, atol=2e-5)


@POSIX
def test_two_processes_share_a_steps_batches_and_exchange_gradients_once(made, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    arguments = flags(made, train, tmp_path / "two", gradient_accumulation=4)
    environment = dict(NOTES=str(tmp_path / "notes"))
    patch = functools.partial(with_environment, environment, note_batches_and_exchanges)
    assert ended(*ranks(train, arguments, tmp_path, patch)) == [0, 0]
    for rank in (0, 1):
        notes = (tmp_path / f"notes{rank}").read_text(encoding="utf-8").splitlines()
        mine = [f"train {4 * step + i}" for step in range(12) for i in range(4) if i % 2 == rank]
        assert notes == [line for i in range(0, 24, 2) for line in (*mine[i:i + 2], "exchange")]


@POSIX
def test_two_processes_measure_what_one_does_and_leave_the_folder_as_it_is(made, tmp_path):
    out = shutil.copytree(made / "base", tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}
    arguments = ["--eval_only=True", f"--init_from={out / 'best.pt'}", f"--data_dir={made / 'text'}", "--device=cpu",
                 f"--out_dir={out}", "--batch_size=2"]
    alone = start(train, arguments, tmp_path / "alone")
    assert ended(*ranks(train, arguments, tmp_path), alone) == [0, 0, 0]
    together, alone = ((tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("said0", "alone"))
    assert "; 2 processes" in together[1] and len(alone) == 5
    assert together[-2:] == alone[-2:] and [line.split()[0] for line in alone[-2:]] == ["val:", "train:"]
    assert (tmp_path / "said1").read_bytes() == b"" and before.keys() >= {out / "last.pt"}
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def with_environment(environment, patch):
    os.environ.update(environment)
    patch()


@POSIX
@pytest.mark.parametrize("script, optimizer, count", [(train, "muon", 3), (finetune, "adamw", 2)])
def test_many_processes_take_the_steps_of_one_and_only_the_first_writes(made, tmp_path, script, optimizer,
                                                                       count):
    knobs = dict(gradient_accumulation=6, dropout=0.0, optimizer=optimizer, sample_interval=6)
    run(made, script, tmp_path / "alone", **knobs)
    assert ended(*ranks(script, flags(made, script, tmp_path / "many", **knobs), tmp_path,
                        count=count)) == [0] * count
    assert_close_runs(tmp_path / "many", tmp_path / "alone")
    first, *others = ((tmp_path / f"said{rank}").read_text(encoding="utf-8") for rank in range(count))
    assert len(re.findall(r"^step ", first, re.M)) == 12 and f"{count} processes" in first
    assert not re.search(r"^(step|  sample|model)", "".join(others), re.M)
    assert len(load_checkpoint(tmp_path / "many" / "last.pt")["rng"]) == count


@POSIX
def test_dropout_differs_between_processes_and_a_resumed_pair_goes_on_with_it(made, tmp_path):
    def pair(out_dir, patch=None, **more):
        arguments = flags(made, train, tmp_path / out_dir, gradient_accumulation=2, save_interval=3, **more)
        return ended(*ranks(train, arguments, tmp_path, patch))
    assert pair("straight") == [0, 0]
    mine, other = load_checkpoint(tmp_path / "straight" / "last.pt")["rng"]
    assert not same(mine, other)
    assert 0 not in pair("out", crash_at_8) and load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 6
    assert pair("out", resume=True) == [0, 0]
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def crash_at_8():
    before_step(8, crash)


@POSIX
def test_batches_that_do_not_divide_among_the_processes_are_one_line(made, tmp_path):
    arguments = flags(made, train, tmp_path / "out", gradient_accumulation=3)
    assert ended(*ranks(train, arguments, tmp_path)) == [1, 1]
    lines = [line for line in (tmp_path / "said0").read_text(encoding="utf-8").splitlines()
             if "gradient_accumulation=3" in line]
    assert len(lines) == 1 and "2 processes" in lines[0]
    assert "Traceback" not in (tmp_path / "said0").read_text(encoding="utf-8")
    assert not (tmp_path / "out").exists()


@POSIX
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_in_order(made, tmp_path, rank):
    out_dir = tmp_path / "out"
    both = ranks(train, flags(made, train, out_dir, max_iters=10**4, gradient_accumulation=2), tmp_path)
    wait_for(lambda: (out_dir / "log.csv").exists() and len((out_dir / "log.csv").read_bytes()) > 600)
    os.kill(both[rank].pid, signal.SIGTERM)
    assert ended(*both) == [143, 143]
    assert load_checkpoint(out_dir / "last.pt")["step"] == len(read_log(out_dir))


@POSIX
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_on_one_process_stops_both(made, tmp_path, value):
    patch = functools.partial(spoil_on_rank_1, value)
    both = ranks(train, flags(made, train, tmp_path / "out", gradient_accumulation=2, save_interval=1),
                 tmp_path, patch)
    assert ended(*both) == [1, 1]
    line = (tmp_path / "said0").read_text(encoding="utf-8").splitlines()[-1]
    assert re.search(r"error: step 4: .*\bin h.0.mlp.c_fc.bias\b", line), line
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == len(read_log(tmp_path / "out")) == 3


@POSIX
def test_a_parameter_that_nothing_uses_is_told_where_processes_train_together(made, tmp_path):
    both = ranks(train, flags(made, train, tmp_path / "out", gradient_accumulation=2), tmp_path, use_no_mlp)
    assert ended(*both) == [1, 1]
    line = (tmp_path / "said0").read_text(encoding="utf-8").splitlines()[-1]
    assert line.startswith("error: a parameter of model.py has no part in the loss"), line


def use_no_mlp():
    train.gpt.Block.forward = lambda self, x, cache=None, start=0: x + self.attn(self.ln_1(x), cache, start)


def spoil_on_rank_1(value):
    real = train.gpt.GPT.forward
    calls = iter(range(1000))

    def forward(self, *args):
        if os.environ["RANK"] == "1" and next(calls) == 3:
            bias = self.h[0].mlp.c_fc.bias
            bias.register_hook(lambda grad: grad * 0 + value)
        return real(self, *args)
    train.gpt.GPT.forward = forward


def train_in_trouble(trouble, arguments):
    """One of torchrun's processes: train.py, to which at {(which start, rank, step): signal} that happens;
    a signal below 0 goes to torchrun."""
    real = train.train_step

    def step(model, optimizers, dataset, number, *args):
        here = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"]), number + 1
        if (wanted := trouble.get(here)):
            os.kill(os.getpid() if wanted > 0 else os.getppid(), abs(wanted))
        return real(model, optimizers, dataset, number, *args)

    train.train_step, train.draw_losses = step, lambda *args: None
    train.peak_flops = lambda *args: 1e12
    sys.argv = ["train.py", *arguments]
    config.run(train.main)


def torchrun(said, options, trouble, arguments):
    """torchrun itself, with two processes: forks of this one that train_in_trouble."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch
    print_to(said)
    argv = ["--nproc_per_node=2", "--monitor-interval=0.1", "--master-addr=127.0.0.1",
            f"--master-port={free_port()}", *options, "no program"]
    launch, _, _ = run.config_from_args(run.parse_args(argv))
    launch.start_method = "fork"
    elastic_launch(launch, train_in_trouble)(trouble, arguments)


def under_torchrun(tmp_path, *args):
    """(torchrun's exit code, all that was printed)"""
    agent = FORK.Process(target=torchrun, args=(tmp_path / "agent", *args))
    agent.start()
    agent.join(180)
    code = agent.exitcode  # None: it hung
    agent.terminate()  # it then ends its processes
    agent.join()
    return code, (tmp_path / "agent").read_text(encoding="utf-8")


@POSIX
def test_processes_that_die_are_started_again_by_torchrun_and_end_as_if_nothing_had_been(made, tmp_path):
    knobs = dict(gradient_accumulation=2, save_interval=3)
    straight = ranks(train, flags(made, train, tmp_path / "straight", **knobs), tmp_path)
    kill = {(0, 1, 5): 9, (1, 0, 8): 9}  # rank 1 in step 5; started again, rank 0 in step 8
    code, said = under_torchrun(tmp_path, ["--max-restarts=2"], kill,
                                flags(made, train, tmp_path / "out", **knobs))
    assert code == 0, said
    assert ended(*straight) == [0, 0]
    assert re.findall(r"resumed at step (\d+)", said) == ["3", "6"]
    assert_same_run(tmp_path / "out", tmp_path / "straight")


@POSIX
def test_a_sigterm_to_torchrun_stops_all_in_order(made, tmp_path):
    arguments = flags(made, train, tmp_path / "out", max_iters=10**4, gradient_accumulation=2)
    code, said = under_torchrun(tmp_path, [], {(0, 0, 8): -signal.SIGTERM}, arguments)
    assert code not in (0, None), said
    last, rows = load_checkpoint(tmp_path / "out" / "last.pt"), read_log(tmp_path / "out")
    assert last["step"] == len(rows) >= 8


@POSIX
def test_processes_that_die_before_their_first_save_do_not_go_on_from_an_older_run(made, tmp_path):
    before = run(made, train, tmp_path / "out", max_iters=7)
    knobs = dict(TORCHELASTIC_RESTART_COUNT="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1",
                 MASTER_ADDR="127.0.0.1")
    for count, patch, code in (("0", crash_at_3, 1), ("1", None, 0)):  # torchrun starts, and starts again
        knobs |= dict(TORCHELASTIC_RESTART_COUNT=count, MASTER_PORT=str(free_port()))
        assert ended(start(train, flags(made, train, tmp_path / "out"), tmp_path / "said", patch,
                           **knobs)) == [code]
    assert before["step"] == 7 and "resumed at step 2\n" in (tmp_path / "said").read_text(encoding="utf-8")
    run(made, train, tmp_path / "straight")
    assert curve(tmp_path / "out") == curve(tmp_path / "straight")


def crash_at_3():
    before_step(3, crash)
