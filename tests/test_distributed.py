"""Several processes take the same steps as one: shared micro-batches, one gradient, one writer, clean stops."""
import functools
import math
import os
import re
import signal
import sys
import time

import pytest
import torch

import config
import finetune
import train
from data.datasets import TextDataset
from runtime.checkpoint import load_checkpoint
from tests.conftest import POSIX
from tests.processes import FORK, exit_codes, free_port, start, start_ranks
from tests.toy_runs import (
    assert_same_run,
    before_step,
    flags,
    make_quick,
    quick,
    read_log,
    run,
    toys,
)

__all__ = ["quick", "toys"]  # fixtures
pytestmark = POSIX


def output(folder, rank=0):
    return (folder / f"output{rank}").read_text(encoding="utf-8")


def assert_close_runs(out_dir, alone):
    """Assert that two runs took the same steps, apart from the order of sums."""
    for ours, theirs in zip(read_log(out_dir), read_log(alone), strict=True):
        for name in ("epoch", "lr", "tokens"):
            assert ours[name] == theirs[name]
        for name in ("loss", "train_loss", "val_loss", "norm"):
            assert (ours[name] == theirs[name] == "" or
                    float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4))
    ours, theirs = (load_checkpoint(folder / "last.pt")["model"] for folder in (out_dir, alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("script, optimizer, count", [("train", "muon", 3), ("finetune", "adamw", 2)])
def test_several_ranks_take_the_same_steps_as_one_and_only_rank_0_writes(toys, tmp_path, script, optimizer, count):
    module = {"train": train, "finetune": finetune}[script]
    settings = dict(gradient_accumulation=6, optimizer=optimizer, sample_interval=6)
    ranks = start_ranks(script, flags(toys, module, tmp_path / "many", **settings), tmp_path, make_quick, count)
    run(toys, module, tmp_path / "alone", **settings)
    assert exit_codes(*ranks) == [0] * count, output(tmp_path)
    assert_close_runs(tmp_path / "many", tmp_path / "alone")
    assert len(re.findall(r"^step .*  norm ", output(tmp_path), re.M)) == 12 and f"processes: {count}" in output(tmp_path)
    assert not any(output(tmp_path, rank) for rank in range(1, count))


def note_batches_and_syncs(notes):
    """Append every batch that is read and every gradient all-reduce to the file notes + rank."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    make_quick()
    parallel = torch.nn.parallel.DistributedDataParallel
    real_batch, real_init = TextDataset.batch, parallel.__init__

    def note(line):
        with open(f"{notes}{os.environ['RANK']}", "a", encoding="utf-8") as f:
            f.write(f"{line}\n")

    def batch(self, split, index):
        note(f"{split} {index}")
        return real_batch(self, split, index)

    def sync(state, bucket):
        note("sync")
        return default_hooks.allreduce_hook(state, bucket)

    def init(self, *args, **kwargs):
        real_init(self, *args, **kwargs)
        self.register_comm_hook(None, sync)
    TextDataset.batch, parallel.__init__ = batch, init


def test_ranks_take_micro_batches_round_robin_and_sync_gradients_once_a_step(toys, tmp_path):
    patch = functools.partial(note_batches_and_syncs, tmp_path / "notes")
    argv = flags(toys, train, tmp_path / "two", gradient_accumulation=4)
    assert exit_codes(*start_ranks("train", argv, tmp_path, patch)) == [0, 0], output(tmp_path)
    for rank in (0, 1):
        notes = (tmp_path / f"notes{rank}").read_text(encoding="utf-8").splitlines()
        mine = [f"train {4 * step + i}" for step in range(12) for i in range(4) if i % 2 == rank]
        assert notes == [line for i in range(0, 24, 2) for line in (*mine[i:i + 2], "sync")]


def test_two_ranks_evaluate_the_same_as_one_and_write_nothing(toys, tmp_path):
    argv = ["--eval_only=True", f"--init_from={toys / 'base' / 'best.pt'}", f"--data_dir={toys / 'text'}",
            "--device=cpu", f"--out_dir={tmp_path / 'out'}", "--batch_size=2"]
    alone = start("train", argv, tmp_path / "alone", make_quick)
    assert exit_codes(*start_ranks("train", argv, tmp_path, make_quick), alone) == [0, 0, 0]
    together, alone = output(tmp_path).splitlines(), (tmp_path / "alone").read_text(encoding="utf-8").splitlines()
    assert together[-2:] == alone[-2:] and [line.split()[0] for line in alone[-2:]] == ["val:", "train:"]
    assert output(tmp_path, 1) == "" and not (tmp_path / "out").exists()


def test_micro_batches_that_do_not_divide_among_the_ranks_give_a_one_line_error(toys, tmp_path):
    argv = flags(toys, train, tmp_path / "out", gradient_accumulation=3)
    assert exit_codes(*start_ranks("train", argv, tmp_path, make_quick)) == [1, 1]
    lines = [line for line in output(tmp_path).splitlines() if "gradient_accumulation=3: " in line]
    assert len(lines) == 1 and "2 processes" in lines[0] and "Traceback" not in output(tmp_path)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(toys, tmp_path):
    out_dir = tmp_path / "out"
    both = start_ranks("train", flags(toys, train, out_dir, max_iters=10**6, gradient_accumulation=2), tmp_path, make_quick)
    while both[0].is_alive() and not (out_dir / "log.csv").exists() or len((out_dir / "log.csv").read_bytes()) < 600:
        time.sleep(0.01)
    os.kill(both[1].pid, signal.SIGTERM)
    assert exit_codes(*both) == [143, 143]
    assert load_checkpoint(out_dir / "last.pt")["step"] == len(read_log(out_dir))


def spoil_gradient_on_rank_1():
    make_quick()
    real, calls = train.setup.gpt.GPT.forward, iter(range(1000))

    def forward(self, *args):
        if os.environ["RANK"] == "1" and next(calls) == 3:
            self.h[0].mlp.c_fc.bias.register_hook(lambda grad: grad * math.nan)
        return real(self, *args)
    train.setup.gpt.GPT.forward = forward


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(toys, tmp_path):
    argv = flags(toys, train, tmp_path / "out", gradient_accumulation=2, save_interval=1)
    assert exit_codes(*start_ranks("train", argv, tmp_path, spoil_gradient_on_rank_1)) == [1, 1]
    assert re.search("^error: step 3: .*gradient norm nan", output(tmp_path), re.M), output(tmp_path)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 3


def worker(deaths, argv):
    """Run as one of torchrun's processes, which kills itself at each (restart, rank, step) in deaths."""
    make_quick()
    for restart, rank, step in deaths:
        if (restart, rank) == (int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])):
            before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["train.py", *argv]
    config.run(train.main)


def torchrun(path, options, deaths, argv):
    """Run torchrun's agent with two workers, in a process that has imported torch."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch
    with open(path, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    launch, _, _ = run.config_from_args(run.parse_args(
        ["--nproc_per_node=2", "--monitor-interval=0.1", "--master-addr=127.0.0.1", f"--master-port={free_port()}", *options, "no program"]))
    launch.start_method = "fork"
    elastic_launch(launch, worker)(deaths, argv)


def test_torchrun_restarts_killed_ranks_and_the_run_ends_the_same(toys, tmp_path):
    settings = dict(gradient_accumulation=2, save_interval=3, resume=True)
    straight = start_ranks("train", flags(toys, train, tmp_path / "straight", **settings), tmp_path, make_quick)
    agent = FORK.Process(target=torchrun, args=(
        tmp_path / "agent", ["--max-restarts=2"], [(0, 1, 5), (1, 0, 8)], flags(toys, train, tmp_path / "out", **settings)))
    agent.start()
    assert exit_codes(agent, *straight) == [0, 0, 0], (tmp_path / "agent").read_text(encoding="utf-8")
    assert re.findall(r"resumed at step (\d+)", (tmp_path / "agent").read_text(encoding="utf-8")) == ["3", "6"]
    assert_same_run(tmp_path / "out", tmp_path / "straight")
