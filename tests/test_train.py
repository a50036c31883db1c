"""train.py and finetune.py on toy data: the schedule, one step, logs, checkpoints and errors."""
import contextlib
import math
import re
import shlex
from dataclasses import replace

import pytest
import torch

import config
import finetune
import model
import train
from chat import main as chat_main
from config import UserError
from data.datasets import open_dataset
from model import GPT, GPTConfig
from runtime import devices, report, setup
from runtime.checkpoint import load_checkpoint, load_model
from tests.conftest import POSIX, limit_file_size
from tests.toy_runs import (
    CPU,
    ROWS,
    SCRIPTS,
    SHAPE,
    curve,
    flags,
    prepare_chats,
    quick,
    read_log,
    run,
    toys,
)

__all__ = ["quick", "toys"]  # fixtures


def toy(dataset, **changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, "vocab_size": dataset.vocab_size, **changes}))


def loss_of(gpt, dataset, split, max_tokens=10**6):
    cfg = train.Settings(eval_tokens=max_tokens)
    return train.evaluate(gpt, dataset, split, cfg, CPU, contextlib.nullcontext())


# The schedule

def test_warmup_rises_linearly_to_the_peak():
    cfg = train.Settings(warmup_iters=4, max_iters=24)
    assert [train.lr_factor(step, cfg) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.lr_factor(0, replace(cfg, warmup_iters=0)) == 1.0


@pytest.mark.parametrize("decay, final_lr, quarter, middle, last, end", [
    ("linear", 0.0, 0.75, 0.5, 0.05, 0.0),
    ("linear", 0.2, 0.8, 0.6, 0.24, 0.2),
    ("cosine", 0.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.cos(math.pi / 20)) / 2, 0.0),
    ("cosine", 0.1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 20)), 0.1),
    ("constant", 0.0, 1.0, 1.0, 1.0, 1.0)])
def test_the_decay_falls_from_the_peak_to_final_lr(decay, final_lr, quarter, middle, last, end):
    cfg = train.Settings(warmup_iters=4, max_iters=24, decay=decay, final_lr=final_lr)  # decays over 20 steps
    factors = [train.lr_factor(step, cfg) for step in (4, 9, 14, 23, 24)]
    assert factors == pytest.approx([1, quarter, middle, last, end])


OUT_OF_RANGE = """block_size=-1 n_layer=0 n_head=-1 n_head=3 batch_size=0 gradient_accumulation=0 max_iters=0 eval_interval=0
eval_tokens=0 learning_rate=0.0 embedding_learning_rate=-1.0 weight_decay=-0.1 grad_clip=-1.0 warmup_iters=-1 seed=-1 dropout=1.0
beta1=1.0 beta2=2.0 final_lr=1.5 optimizer=sgd decay=step best_by=luck save_interval=0 save_interval=10s save_interval=-1m
save_interval=often""".split()


@pytest.mark.parametrize("script, setting", [*((train, setting) for setting in OUT_OF_RANGE), *(
    (finetune, setting) for setting in ("epochs=0", "block_size=-1", "max_iters=-1"))])
def test_a_setting_out_of_range_gives_an_error_with_its_name_and_value(toys, tmp_path, script, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"^{re.escape(setting)}:"):
        script.main(flags(toys, script, tmp_path, **{name: value}))
    assert not (tmp_path / "log.csv").exists()


# One step

def step_once(gpt, dataset, step=0, rate=0.5, **changes):
    """Take a step of plain gradient descent; return train_step's results."""
    cfg = train.Settings(**{**dict(warmup_iters=0, grad_clip=0.0, max_iters=10, decay="constant"), **changes})
    descent = torch.optim.SGD([{"params": gpt.parameters(), "peak_lr": rate}], 1)
    return train.train_step(gpt, [descent], dataset, step, cfg, CPU, contextlib.nullcontext())


def norm_of(tensors):
    return math.sqrt(sum((t.detach()**2).sum().item() for t in tensors))


@pytest.mark.parametrize("kind, prompt_loss_batches", [("text", 0), ("chat", 0), ("chat", 100)])
def test_the_gradient_is_that_of_the_mean_over_all_targets_of_the_step(toys, kind, prompt_loss_batches):
    dataset = open_dataset(toys / kind, 64, 2, 0, prompt_loss_batches)
    stepped, gpt = toy(dataset), toy(dataset)
    batches = [dataset.batch("train", i) for i in (4, 5, 6, 7)]  # those of step 1
    loss, norm, counts = step_once(stepped, dataset, step=1, gradient_accumulation=4)
    losses = []  # by hand: minus the log-probability of every target, one row at a time
    for idx, targets, positions in batches:
        for position, target in zip(range(idx.size) if positions is None else positions, targets):
            b, t = divmod(int(position), idx.shape[1])
            losses.append(-gpt(torch.tensor(idx[b:b + 1]))[0, t].log_softmax(-1)[target])
    mean = torch.stack(losses).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert norm == pytest.approx(norm_of(p.grad for p in gpt.parameters()), rel=1e-4)
    assert counts == (len(losses), sum(idx.size for idx, _, _ in batches),
                      sum(len(idx) * idx.shape[1]**2 for idx, _, _ in batches))
    if kind == "chat":
        assert len({len(targets) for _, targets, _ in batches}) > 1, "equal batches would hide a wrong weight"
    for ours, p in zip(stepped.parameters(), gpt.parameters()):
        torch.testing.assert_close(ours, p.detach() - 0.5 * p.grad, rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_to_grad_clip(toys):
    dataset = open_dataset(toys / "chat", 64, 2)
    free, clipped, start = toy(dataset), toy(dataset), toy(dataset)
    _, norm, _ = step_once(free, dataset, rate=1.0)
    assert step_once(clipped, dataset, rate=1.0, grad_clip=norm / 4)[1] == pytest.approx(norm)  # before clipping

    def moved(gpt):
        return norm_of(a - b for a, b in zip(gpt.parameters(), start.parameters()))
    assert moved(free) == pytest.approx(norm, rel=1e-3)
    assert moved(clipped) == pytest.approx(norm / 4, rel=1e-3)


@pytest.mark.parametrize("optimizer, rate", [("muon", 0.02), ("adamw", 0.01)])
def test_a_tiny_model_memorizes_a_few_chats(tmp_path, optimizer, rate):
    prepare_chats(tmp_path / "few", ROWS[:8])
    dataset = open_dataset(tmp_path / "few", 64, 6)
    train.main([f"--data_dir={tmp_path / 'few'}", f"--out_dir={tmp_path}", "--block_size=64", "--n_layer=2", "--n_head=2",
                "--n_embd=32", f"--optimizer={optimizer}", f"--learning_rate={rate}", "--embedding_learning_rate=0.01",
                "--batch_size=6", "--max_iters=100", "--best_by=train", "--sample_interval=0"])
    after = loss_of(load_model(load_checkpoint(tmp_path / "best.pt")), dataset, "train")
    before = loss_of(toy(dataset), dataset, "train")
    assert before == pytest.approx(math.log(260), abs=0.3) and after < 0.2 * before


# What is logged

def test_every_step_has_a_log_row_that_includes_its_evaluation(toys, tmp_path, capsys):
    last = run(toys, train, tmp_path, eval_interval=5, gradient_accumulation=2)
    rows = read_log(tmp_path)
    assert len(rows) == 13 and rows[12]["loss"] == "", "the last evaluation follows the last step"
    evaluated = {int(r["step"]): (float(r["train_loss"]), float(r["val_loss"])) for r in rows if r["val_loss"]}
    assert sorted(evaluated) == [5, 10, 12]
    for step, train_loss, val_loss in last["history"]:
        assert evaluated[step] == pytest.approx((train_loss, val_loss), rel=1e-6)
    dataset = open_dataset(toys / "text", 64, 2)
    for row in rows[:12]:
        step = int(row["step"])
        assert int(row["tokens"]) == 2 * 2 * 64
        assert float(row["lr"]) == pytest.approx(0.01 * train.lr_factor(step, train.Settings(warmup_iters=2, max_iters=12)))
        assert float(row["epoch"]) == pytest.approx(step * 2 * 2 * 64 / dataset.n_tokens("train"), rel=1e-6)
        assert float(row["mfu"]) > 0 and float(row["tokens_per_second"]) > 0
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^step +(\d+)/12 .* loss", out, re.M)] == list(range(12))
    assert all(len(line) <= 100 for line in out.splitlines() if line.startswith("step"))
    loss = load_model(load_checkpoint(tmp_path / "last.pt"))
    assert loss_of(loss, dataset, "val", 200) == pytest.approx(evaluated[12][1], rel=1e-5)


@SCRIPTS
def test_best_pt_is_the_model_of_the_lowest_loss_without_an_optimizer(toys, tmp_path, script):
    last = run(toys, script, tmp_path, max_iters=30, eval_interval=3, learning_rate=0.1, best_by="train", dropout=0.0)
    best = load_checkpoint(tmp_path / "best.pt")
    lowest = min(last["history"], key=lambda entry: entry[1])
    assert best["step"] == lowest[0] and "optimizer_states" in last and "optimizer_states" not in best
    dataset = open_dataset(toys / ("text" if script is train else "chat"), 64, 2)
    assert loss_of(load_model(best), dataset, "train", 200) == pytest.approx(lowest[1], rel=1e-5)


@POSIX
def test_printed_commands_work_in_a_folder_with_a_space(toys, tmp_path, capsys):
    best = tmp_path / "my data" / "best.pt"
    run(toys, train, best.parent)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["python", "chat.py", f"--checkpoint={best}"]
    chat_main([*command[2:], "--prompt=one", "--device=cpu"])
    with pytest.raises(UserError, match=re.escape(f" '--init_from={best}', or gpt2")):
        train.main(["--eval_only=True", f"--out_dir={best.parent}"])


def test_a_run_without_resume_replaces_the_earlier_one(toys, tmp_path):
    first = run(toys, train, tmp_path)
    rows, second = curve(tmp_path), run(toys, train, tmp_path)
    assert first["history"] == second["history"] and curve(tmp_path) == rows


@SCRIPTS
def test_samples_are_printed_every_sample_interval_and_do_not_change_training(toys, tmp_path, capsys, script):
    run(toys, script, tmp_path / "none", max_iters=6)
    assert "  sample: " not in capsys.readouterr().out
    run(toys, script, tmp_path / "some", sample_interval=3, sample_prompt="one two", max_iters=6)
    assert capsys.readouterr().out.count("\n  sample: 'one two' -> ") == 2
    run(toys, script, tmp_path / "all", sample_interval=1, max_iters=6)
    assert capsys.readouterr().out.count("\n  sample: ") == 6
    assert curve(tmp_path / "none") == curve(tmp_path / "some") == curve(tmp_path / "all")


@pytest.mark.parametrize("history, expected", [
    ([], False),
    ([(1, 3.0, 3.0), (2, 2.0, 3.1)], False),  # too few
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.1), (4, 1.0, 2.2)], True),
    ([(1, 2.0, 2.0), (2, 1.5, 2.1), (3, 1.0, 2.2)], True),
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 1.9), (4, 1.0, 1.8)], False),  # still improving
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.1), (4, 1.0, 2.05)], False),  # up once, then down
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.01), (4, 1.0, 2.015)], False),  # within 1%: noise
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 2.1, 2.1), (4, 2.2, 2.2)], False)])  # training loss rises too
def test_overfitting_is_validation_loss_rising_twice_while_training_loss_falls(history, expected):
    assert report.is_overfitting(history) is expected


def fake_losses(monkeypatch, *losses):
    """Make evaluations return these validation losses, and falling training losses."""
    values = iter([loss for i, val in enumerate(losses) for loss in (3.0 - 0.5 * i, val)])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(values))


def test_overfitting_is_reported_once(toys, tmp_path, monkeypatch, capsys):
    fake_losses(monkeypatch, 3.0, 2.0, 2.1, 2.2, 2.3)
    run(toys, train, tmp_path, max_iters=5, eval_interval=1)
    assert capsys.readouterr().out.count("The model is overfitting") == 1


@SCRIPTS
def test_early_stopping_after_patience_evaluations_without_a_lower_val_loss(toys, tmp_path, monkeypatch, script):
    fake_losses(monkeypatch, 3.0, 2.0, 2.5, 1.9, 2.0, 2.2)
    last = run(toys, script, tmp_path, eval_interval=1, patience=2)
    assert last["step"] == 6 and load_checkpoint(tmp_path / "best.pt")["step"] == 4
    monkeypatch.undo()
    again = run(toys, script, tmp_path, eval_interval=1, patience=2, resume=True)
    assert again["step"] == 6, "a run that has stopped early stays stopped"


def test_eval_only_prints_the_loss_over_all_of_both_splits_and_writes_nothing(toys, tmp_path, capsys):
    outputs = []
    for script in (train, finetune):
        capsys.readouterr()
        script.main(["--eval_only=True", f"--init_from={toys / 'base' / 'best.pt'}", "--device=cpu",
                     f"--data_dir={toys / 'chat'}", f"--out_dir={tmp_path / 'out'}"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and not (tmp_path / "out").exists()
    dataset, gpt = open_dataset(toys / "chat", 64, 8), load_model(load_checkpoint(toys / "base" / "best.pt"))
    for split in ("train", "val"):
        loss = loss_of(gpt, dataset, split)
        replies = [ids[ids.index(258) + 1:] for ids in dataset.conversations(split)]  # with <|end|>
        bits = loss / math.log(2) * sum(map(len, replies)) / sum(len(ids) - 1 for ids in replies)
        line = re.search(rf"^{split}: loss (\S+)  perplexity (\S+)  (\S+) bits per byte", outputs[0], re.M)
        found = [float(text) for text in line.groups()]
        assert found == pytest.approx([loss, math.exp(loss), bits], rel=1e-3)
    with pytest.raises(UserError, match="eval_only=True: name the model"):
        train.main(["--eval_only=True"])


# The model to start from

def test_finetuning_counts_epochs_and_starts_with_the_base_models_weights(toys, tmp_path, capsys, monkeypatch):
    base, seen, real = load_checkpoint(toys / "base" / "best.pt"), [], train.train_step

    def step(gpt, optimizers, dataset, number, *args):
        seen.append((number, {name: w.clone() for name, w in gpt.state_dict().items()},
                     sum(len(o.state) for o in optimizers)))
        return real(gpt, optimizers, dataset, number, *args)
    monkeypatch.setattr(train, "train_step", step)
    last = run(toys, finetune, tmp_path, max_iters=0, eval_interval=0, epochs=3)
    dataset = open_dataset(toys / "chat", 64, 2)
    assert last["step"] == last["max_iters"] == dataset.batches_until("train", 3)
    assert len(last["history"]) == 3
    assert f"{last['step']} steps, 3.0 epochs of 9 conversations" in capsys.readouterr().out
    number, weights, states = seen[0]
    assert (number, states) == (0, 0)
    for name, weight in base["model"].items():
        assert torch.equal(weight, weights[name]), name


def test_a_shorter_context_crops_the_positions_and_a_longer_one_is_refused(toys, tmp_path):
    last = run(toys, finetune, tmp_path, max_iters=1, block_size=48)
    assert last["config"]["block_size"] == 48 and last["model"]["wpe.weight"].shape == (48, 16)
    with pytest.raises(UserError, match="^block_size=65: .*64 positions"):
        run(toys, finetune, tmp_path / "longer", max_iters=1, block_size=65)


def test_the_written_out_attention_is_trained_if_fused_is_false(toys, tmp_path, monkeypatch):
    fused = run(toys, train, tmp_path / "fused", dropout=0.0)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    written_out = run(toys, train, tmp_path / "written_out", fused=False, dropout=0.0)
    for name, weight in fused["model"].items():
        torch.testing.assert_close(written_out["model"][name], weight, rtol=0, atol=2e-3, msg=name)
    assert written_out["config"]["fused"] is False


@pytest.mark.parametrize("change, message", [
    ({"data_dir": "text"}, "data_dir=.*plain text.*prepare_alpaca.py"),
    ({"init_from": "no.pt"}, "no.pt: no such checkpoint"),
    ({"init_from": "gpt-2"}, "gpt-2: contains none of model.safetensors.*gpt2-medium"),
    ({"init_from": "gpt2"}, "init_from=gpt2: has a different tokenizer.*--tokenizer=gpt2")])
def test_a_base_model_or_data_that_do_not_fit_give_a_one_line_error(toys, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("runtime.checkpoint.load_gpt2", lambda name, dropout: GPT(GPTConfig(**SHAPE)) if name == "gpt2" else
                        model.load_gpt2(name))
    if "data_dir" in change:
        change = {"data_dir": toys / "text"}
    with pytest.raises(UserError, match=message):
        run(toys, finetune, tmp_path / "out", **change)
    assert not (tmp_path / "out" / "log.csv").exists()


def test_the_tokenizer_named_in_the_error_works(toys, tmp_path):
    bpe = prepare_chats(tmp_path / "bpe", ROWS, "--vocab_size=270", tokenizer="bpe")
    run(toys, train, tmp_path / "base", data_dir=bpe, max_iters=1)
    base = tmp_path / "base" / "best.pt"
    with pytest.raises(UserError, match="different tokenizer.*--tokenizer=FILE.*tokenizer.json"):
        run(toys, finetune, tmp_path / "out", init_from=base)
    again = prepare_chats(tmp_path / "again", ROWS[::-1], tokenizer=bpe / "tokenizer.json")
    assert run(toys, finetune, tmp_path / "out", init_from=base, data_dir=again, max_iters=1)["step"] == 1


# Errors

@pytest.mark.parametrize("script, value", [(train, math.inf), (finetune, math.nan)], ids=["inf", "nan"])
def test_a_gradient_that_is_not_finite_stops_the_run_and_nothing_is_overwritten(toys, tmp_path, monkeypatch, script, value):
    real, before = train.train_step, {}

    def step(gpt, optimizers, dataset, number, *args):
        if number == 3:
            before.update({path.name: path.read_bytes() for path in tmp_path.glob("*.pt")})
            gpt.get_parameter("h.0.mlp.c_fc.weight").register_hook(lambda grad: grad * 0 + value)
        return real(gpt, optimizers, dataset, number, *args)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(UserError, match=r"^step 3: .*gradient norm (nan|inf)\..*learning_rate"):
        run(toys, script, tmp_path, save_interval=1, eval_interval=2)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
    assert sorted(before) == ["best.pt", "last.pt"] and len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_learning_rate_far_too_high_never_replaces_a_good_checkpoint(toys, tmp_path, optimizer):
    settings = dict(eval_interval=1, optimizer=optimizer, warmup_iters=0)
    run(toys, train, tmp_path, max_iters=3, **settings)
    with pytest.raises(UserError, match="learning_rate.*1e\\+30"):
        run(toys, train, tmp_path, resume=True, learning_rate=1e30, embedding_learning_rate=1e30, **settings)
    dataset = open_dataset(toys / "text", 64, 2)
    for name in ("best.pt", "last.pt"):
        assert loss_of(load_model(load_checkpoint(tmp_path / name)), dataset, "val") < 6, name


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee more"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB, max allowed: 6.80 GB)")])
def test_out_of_memory_gives_a_one_line_error_that_recommends_a_smaller_batch(toys, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(UserError, match="^out of memory; .*--batch_size.*--gradient_accumulation.*--block_size"):
        run(toys, train, tmp_path)


@SCRIPTS
def test_a_full_disk_ends_the_run_with_a_one_line_error_and_keeps_the_last_save(toys, tmp_path, script):
    run(toys, script, tmp_path, max_iters=4)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    with limit_file_size(5000), pytest.raises(OSError, match="File too large"):
        run(toys, script, tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_second_run_into_the_same_folder_is_refused(toys, tmp_path):
    cfg = setup.load_settings(train.Settings, [f"--out_dir={tmp_path}"], "")
    with train.resume.lock_out_dir(cfg), pytest.raises((UserError, OSError), match=re.escape(str(tmp_path))):
        run(toys, train, tmp_path)


# Devices

def test_auto_picks_the_cpu_in_float32_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device()[:2] == (CPU, torch.float32)
    assert devices.pick_device("cpu", "bfloat16")[:2] == (CPU, torch.bfloat16)
    for device in ("gpu", "tpu!", "cuda", "cuda:1", "mps", "meta"):
        with pytest.raises(UserError, match=f"device='{device}'.*auto"):
            devices.pick_device(device)
    with pytest.raises(UserError, match="dtype='half'.*float32"):
        devices.pick_device("cpu", "half")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device()[0] == CPU, "auto never selects mps"
    assert devices.pick_device("mps")[:2] == (torch.device("mps"), torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_computes_in_bfloat16_unless_it_is_emulated(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert devices.pick_device()[:2] == (torch.device("cuda"), torch.bfloat16 if native else torch.float32)
    with pytest.raises(UserError, match="device='cuda:1'"):
        devices.pick_device("cuda:1")
    if not native:
        with pytest.raises(UserError, match="dtype='bfloat16' .*cuda.*float32"):
            devices.pick_device("cuda", "bfloat16")


@pytest.mark.parametrize("script, recipe", [
    (train if path.name.startswith("train_") else finetune, path)
    for path in sorted((config.REPO / "config").glob("[tf]*_*.py"))], ids=lambda value: getattr(value, "stem", ""))
def test_the_recipes_load_and_name_their_command(script, recipe):
    may_be_0 = ("block_size", "max_iters", "eval_interval") if script is finetune else ()
    cfg = setup.load_settings(script.Settings, [str(recipe)], "", may_be_0)
    text = recipe.read_text(encoding="utf-8")
    assert f"{script.__name__}.py config/{recipe.name}" in text
    assert cfg.out_dir.parts[-2] == "out"


def test_bfloat16_training_on_a_cpu_stays_close_to_float32(toys, tmp_path):
    exact, rough = (run(toys, train, tmp_path / d, dtype=d, dropout=0.0)["history"][-1] for d in ("float32", "bfloat16"))
    assert rough[1:] == pytest.approx(exact[1:], rel=0.02) and rough != exact
