"""A resumed run equals an uninterrupted one, bit for bit, after crashes, kill -9, signals and broken pipes."""
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
import torch

import finetune
import train
from config import UserError
from runtime.checkpoint import load_checkpoint
from runtime.signals import stop_signals
from tests.conftest import POSIX
from tests.processes import exit_codes, start
from tests.toy_runs import (
    ROWS,
    TEXT,
    Crash,
    assert_same_run,
    before_step,
    crash,
    curve,
    flags,
    make_quick,
    prepare_chats,
    prepare_text,
    quick,
    read_log,
    run,
    same,
    toys,
)

__all__ = ["quick", "toys"]  # fixtures


@contextlib.contextmanager
def ended_at(step, act=crash):
    """Context manager: call act(), which ends the run, before a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises((Crash, SystemExit)) as ended:
        patch.setattr(train, "train_step", train.train_step)  # to undo before_step
        before_step(step, act)
        yield ended


@pytest.mark.parametrize("script, optimizer", [(train, "muon"), (finetune, "adamw")], ids=["train", "finetune"])
def test_a_run_that_crashes_often_resumes_from_its_last_save_and_ends_the_same(toys, tmp_path, script, optimizer):
    settings = dict(save_interval=3, optimizer=optimizer, gradient_accumulation=2)
    run(toys, script, tmp_path / "straight", **settings)
    out_dir, saved = tmp_path / "out", None
    for step in (0, 2, 5, 6, 11):
        with ended_at(step):
            run(toys, script, out_dir, resume=saved is not None, **settings)
        assert len(read_log(out_dir)) == step
        saved = step // 3 * 3  # also at evaluations, after steps 5 and 10
        assert load_checkpoint(out_dir / "last.pt")["step"] == saved
        torch.manual_seed(99)  # another process would have different random numbers
    run(toys, script, out_dir, resume=True, **settings)
    assert_same_run(out_dir, tmp_path / "straight")


@pytest.mark.parametrize("script, steps", [(train, [0, 1, 7, 11]), (finetune, [4])], ids=["train", "finetune"])
def test_a_run_stopped_by_signals_resumes_and_ends_the_same(toys, tmp_path, script, steps):
    settings = dict(gradient_accumulation=2, max_iters=12)
    run(toys, script, tmp_path / "straight", **settings)
    for number, step in enumerate(steps):
        with ended_at(step, lambda: signal.raise_signal(signal.SIGTERM)) as stopped:
            run(toys, script, tmp_path / "out", resume=number > 0, **settings)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == step + 1
        torch.manual_seed(99)
    run(toys, script, tmp_path / "out", resume=True, **settings)
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def test_a_finetuning_run_resumes_without_its_base_model(toys, tmp_path):
    shutil.copy(toys / "base" / "best.pt", tmp_path / "base.pt")
    settings = dict(init_from=tmp_path / "base.pt", save_interval=3)
    with ended_at(4):
        run(toys, finetune, tmp_path / "out", **settings)
    (tmp_path / "base.pt").unlink()
    assert run(toys, finetune, tmp_path / "out", resume=True, **settings)["step"] == 12


def test_resume_starts_from_scratch_without_a_last_pt_and_changes_nothing_in_a_finished_run(toys, tmp_path, capsys):
    run(toys, train, tmp_path / "a", resume=True)
    assert "last.pt: no such checkpoint; starting from scratch" in capsys.readouterr().out
    for resume in (False, True):
        run(toys, train, tmp_path / "b", resume=resume)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_rates_and_lengths_may_change_on_resume_and_momentum_buffers_stay(toys, tmp_path, monkeypatch):
    before, seen = run(toys, train, tmp_path, max_iters=4), []
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "train_step", lambda gpt, optimizers, *args: seen.append(
            [optimizer.state_dict() for optimizer in optimizers]) or crash())
        run(toys, train, tmp_path, max_iters=20, resume=True, weight_decay=0.25)
    for ours, theirs in zip(seen[0], before["optimizer_states"], strict=True):
        assert same(ours["state"], theirs) and theirs
    assert {group["weight_decay"] for ours in seen[0] for group in ours["param_groups"]} == {0.25, 0.0}
    run(toys, train, tmp_path, max_iters=6, resume=True, learning_rate=0.5, decay="constant")
    assert [float(row["lr"]) for row in read_log(tmp_path)[4:6]] == [0.5, 0.5]


@pytest.mark.parametrize("change", ["n_embd=32", "n_layer=2", "block_size=32", "batch_size=3", "gradient_accumulation=2",
                                    "seed=5", "optimizer=adamw", "bias=False", "best_by=train", "init_from=gpt2"])
def test_resuming_with_a_different_model_or_batch_gives_an_error_that_names_it(toys, tmp_path_factory, change):
    out_dir = tmp_path_factory.getbasetemp() / "resume_me"
    if not out_dir.exists():
        run(toys, train, out_dir, max_iters=1)
    name, _, value = change.partition("=")
    with pytest.raises(UserError, match=f"last.pt: .*{name}=.*{change}"):
        run(toys, train, out_dir, resume=True, **{name: value})


def test_resuming_with_different_data_is_refused_and_with_a_moved_copy_is_not(toys, tmp_path):
    run(toys, train, tmp_path / "text", max_iters=1)
    run(toys, finetune, tmp_path / "chat", max_iters=1)
    prepare_text(tmp_path / "other_text", TEXT[::-1])
    prepare_chats(tmp_path / "other_tokenizer", ROWS, "--vocab_size=260", tokenizer="bpe")
    with pytest.raises(UserError, match=f"last.pt: .*different data.*{re.escape(str(tmp_path / 'other_text'))}"):
        run(toys, train, tmp_path / "text", resume=True, data_dir=tmp_path / "other_text")
    with pytest.raises(UserError, match="last.pt: .*different data"):
        run(toys, finetune, tmp_path / "chat", resume=True, data_dir=tmp_path / "other_tokenizer")
    shutil.copytree(toys / "text", tmp_path / "moved")
    assert run(toys, train, tmp_path / "text", resume=True, data_dir=tmp_path / "moved")["step"] == 12


# kill -9

@POSIX
def test_a_run_killed_ten_times_ends_as_if_uninterrupted(toys, tmp_path):
    """Kill a run ten times: after a few more rows of log.csv or, every other time, while last.pt is written."""
    kills, out_dir, output = 10, tmp_path / "out", tmp_path / "output"
    settings = dict(eval_interval=20, max_iters=6 * kills, save_interval=3)
    straight = start("finetune", flags(toys, finetune, tmp_path / "straight", **settings), output, make_quick)
    moments, while_saving = random.Random(3), 0

    def rows():
        path = out_dir / "log.csv"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 0

    def saving():
        return [path for path in out_dir.glob(".last.pt*") if path.name != ".lock"]

    for number in range(kills):
        for path in saving():
            path.unlink()  # what an earlier kill left
        wanted = rows() + moments.randrange(6)
        child = start("finetune", flags(toys, finetune, out_dir, resume=True, **settings), output, make_quick)
        while child.is_alive() and not (saving() if number % 2 else rows() > wanted):
            time.sleep(0.0005)
        while_saving += bool(saving())
        child.kill()
        child.join()
        for name in ("last.pt", "best.pt"):
            if (out_dir / name).exists():
                load_checkpoint(out_dir / name)  # whole
    assert while_saving > 1, "no kill hit a save"
    last = start("finetune", flags(toys, finetune, out_dir, resume=True, **settings), output, make_quick)
    assert exit_codes(straight, last) == [0, 0], output.read_text(encoding="utf-8")
    assert_same_run(out_dir, tmp_path / "straight")


# Signals and pipes

def test_another_signal_over_a_second_later_quits_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr("runtime.signals.time.monotonic", lambda: now)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a shell and torchrun may both send the first
        assert caught[0] == signal.SIGTERM
        now += 2
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("before, caught", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_stops_a_run_but_not_under_nohup(before, caught):
    was = signal.signal(signal.SIGHUP, before)
    try:
        with stop_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals == [signal.SIGHUP] * caught and signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, was)


class BrokenAfter:
    """A stdout whose reader exits once it has seen `text`."""

    def __init__(self, text):
        self.text, self.broken = text, False

    def write(self, line):
        if self.broken:
            raise BrokenPipeError(32, "Broken pipe")
        self.broken = self.text in line
        return len(line)

    def flush(self):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # /dev/null stays open as stdout
@pytest.mark.parametrize("script, text", [(train, "step     4/12"), (finetune, "val")], ids=["train", "finetune"])
def test_a_run_stopped_by_a_broken_pipe_saves_and_resumes(toys, tmp_path, monkeypatch, script, text):
    run(toys, script, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "stdout", BrokenAfter(text))
        run(toys, script, tmp_path / "out")
    assert stopped.value.code == 128 + signal.SIGPIPE
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] in (5, 6, 7)
    run(toys, script, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "straight")


@POSIX
def test_sigterm_to_a_process_saves_and_exits_with_its_code(toys, tmp_path):
    child = start("train", flags(toys, train, tmp_path / "out", max_iters=10**6), tmp_path / "output", make_quick)
    log = tmp_path / "out" / "log.csv"
    while child.is_alive() and not (log.exists() and len(log.read_bytes()) > 600):
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGTERM)
    assert exit_codes(child) == [143]
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == len(curve(tmp_path / "out"))
    assert "--resume=True continues from" in (tmp_path / "output").read_text(encoding="utf-8")


def test_a_save_interval_in_minutes(toys, tmp_path, monkeypatch):
    now = 5000.0
    monkeypatch.setattr("runtime.resume.time.monotonic", lambda: now)
    real = train.train_step

    def step(*args):
        nonlocal now
        now += 40
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    with ended_at(5):
        run(toys, train, tmp_path, save_interval="1m")
    assert load_checkpoint(tmp_path / "last.pt")["step"] in (3, 4)
