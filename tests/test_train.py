"""train.py on toy folders: the schedule, the step, resuming bit for bit, saving, and what goes wrong."""
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data.export import write_hf_model
from data.tokens import open_dataset
from torch.utils.flop_counter import FlopCounterMode

import config
import data.text
import prepare_alpaca
import train
from data.tokenizer import get_tokenizer
from model import (
    GPT,
    GPTConfig,
    attention,
    load_checkpoint,
    model_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
    to_gpt2_names,
)
from tests.conftest import POSIX, error_of_script, largest_file

pytestmark = pytest.mark.usefixtures("neither_drawn_nor_measured")
CPU = torch.device("cpu")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=2, max_iters=6, warmup_iters=2,
            learning_rate=0.01, eval_interval=100, eval_tokens=200, log_interval=100, device="cpu")

# Both take far longer than a short run itself: only tests that are about them have them.
DRAW, PEAK_FLOPS = train.draw_losses, train.peak_flops
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared toy data: {"text": folder, "chat": folder}."""
    root = tmp_path_factory.mktemp("toy")
    rows = [{"instruction": f"Count {'on ' * (i % 4)}from {word}.", "output": " ".join(WORDS[i:i + 3])}
            for i, word in enumerate(WORDS)]  # of several lengths
    (root / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "words.txt").write_text(" ".join(WORDS) * 12, encoding="utf-8")
    prepare_alpaca.main([f"--source={root / 'rows.json'}", f"--out_dir={root / 'chat'}", "--tokenizer=bytes",
                         "--val_fraction=0.25"])
    data.text.main([f"--source={root / 'words.txt'}", f"--out_dir={root / 'text'}", "--val_fraction=0.3"])
    return {"text": root / "text", "chat": root / "chat", "rows": root / "rows.json"}


def flags(folder, out_dir, **changes):
    settings = {**TINY, "data_dir": folder, "out_dir": out_dir, **changes}
    return [f"--{name}={value}" for name, value in settings.items()]


def run(folder, out_dir, **changes):
    """Train; returns last.pt."""
    train.main(flags(folder, out_dir, **changes))
    return load_checkpoint(out_dir / "last.pt")


def toy(dataset, **changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=dataset.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes}))


def loss_of(model, dataset, split, max_tokens=10**6):
    s = train.Settings(eval_tokens=max_tokens)
    return train.evaluate(model, dataset, split, s, CPU, contextlib.nullcontext())


# The schedule

def test_warm_up_rises_in_equal_parts_and_ends_at_the_peak():
    s = train.Settings(warmup_iters=4, max_iters=24)
    assert [train.lr_factor(step, s) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.lr_factor(0, replace(s, warmup_iters=0)) == 1.0


@pytest.mark.parametrize("decay, final_lr, quarter, middle, last, end", [
    ("linear", 0.0, 0.75, 0.5, 0.05, 0.0),
    ("linear", 0.2, 0.8, 0.6, 0.24, 0.2),
    ("cosine", 0.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.cos(math.pi / 20)) / 2, 0.0),
    ("cosine", 0.1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 20)), 0.1),
    ("constant", 0.0, 1.0, 1.0, 1.0, 1.0),
])
def test_the_decay_goes_from_the_peak_to_final_lr(decay, final_lr, quarter, middle, last, end):
    s = train.Settings(warmup_iters=4, max_iters=24, decay=decay, final_lr=final_lr)  # decays over 20 steps
    factors = [train.lr_factor(step, s) for step in (4, 9, 14, 23, 24)]
    assert factors == pytest.approx([1, quarter, middle, last, end])


@pytest.mark.parametrize("setting", [
    "block_size=0", "n_layer=0", "n_head=-1", "n_embd=0", "batch_size=0", "gradient_accumulation=0",
    "max_iters=0", "log_interval=0", "eval_interval=0", "eval_tokens=0", "learning_rate=0.0",
    "learning_rate=-1.0", "embedding_learning_rate=0.0", "weight_decay=-0.1", "grad_clip=-1.0",
    "warmup_iters=-1", "seed=-1", "dropout=1.0", "dropout=-0.1", "beta1=1.0", "beta2=2.0", "final_lr=1.5",
    "final_lr=-0.5", "optimizer=sgd", "decay=step", "best_by=luck", "compile=yes"])
def test_a_setting_out_of_range_is_refused_by_name_and_value(setting):
    with pytest.raises(ValueError, match=f"^{re.escape(setting)}:"):
        train.check_settings(config.load(train.Settings, [f"--{setting}"]))


def test_the_defaults_and_the_extremes_are_accepted():
    train.check_settings(train.Settings())
    train.check_settings(train.Settings(block_size=1, n_layer=1, max_iters=1, grad_clip=0, warmup_iters=0,
                                        final_lr=1, dropout=0.0, seed=0, beta1=0.0, weight_decay=0.0))


# The step

class PlainDescent:
    """Weights minus learning rate times gradient, in the shape that train_step wants an optimizer."""

    def __init__(self, model, rate):
        self.param_groups = [{"params": list(model.parameters()), "peak_lr": rate, "lr": None}]

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None


def step_once(model, dataset, step=0, rate=0.5, **changes):
    s = train.Settings(**{**dict(warmup_iters=0, grad_clip=0.0, max_iters=10, decay="constant"), **changes})
    descent = PlainDescent(model, rate)
    return train.train_step(model, [descent], dataset, step, s, CPU, contextlib.nullcontext())


def length(tensors):
    """The Euclidean norm of all their numbers together."""
    return math.sqrt(sum((t.detach()**2).sum().item() for t in tensors))


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_accumulated_batches_count_every_target_alike(folders, kind):
    dataset = open_dataset(folders[kind], 32, 2)
    stepped, model = toy(dataset), toy(dataset)
    batches = [dataset.batch("train", i) for i in (4, 5, 6, 7)]  # those of step 1
    loss, norm, work = step_once(stepped, dataset, step=1, gradient_accumulation=4)
    losses = []  # by hand: minus the log-probability of every target, one row at a time
    for idx, targets, where in batches:
        where = range(idx.size) if where is None else where
        for position, target in zip(where, targets):
            b, t = divmod(int(position), idx.shape[1])
            losses.append(-model(torch.tensor(idx[b:b + 1]))[0, t].log_softmax(-1)[target])
    mean = torch.stack(losses).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert norm == pytest.approx(length(p.grad for p in model.parameters()), rel=1e-4)
    assert work == (sum(targets.size for _, targets, _ in batches), sum(idx.size for idx, _, _ in batches),
                    sum(len(idx) * idx.shape[1]**2 for idx, _, _ in batches))
    if kind == "chat":
        assert len({len(targets) for _, targets, _ in batches}) > 1, "equal batches would hide a wrong weight"
    for ours, p in zip(stepped.parameters(), model.parameters()):
        torch.testing.assert_close(ours, p.detach() - 0.5 * p.grad, rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_to_the_norm_asked_for(folders):
    dataset = open_dataset(folders["chat"], 32, 2)
    free, clipped, start = toy(dataset), toy(dataset), toy(dataset)
    _, norm, _ = step_once(free, dataset, rate=1.0)
    assert step_once(clipped, dataset, rate=1.0, grad_clip=norm / 4)[1] == pytest.approx(norm)  # as it was

    def moved(model):
        return length(a - b for a, b in zip(model.parameters(), start.parameters()))
    assert moved(free) == pytest.approx(norm, rel=1e-3)
    assert moved(clipped) == pytest.approx(norm / 4, rel=1e-3)


@pytest.mark.parametrize("optimizer, rate", [("muon", 0.02), ("adamw", 0.01)])
def test_a_tiny_model_learns_a_few_chats(tmp_path, folders, optimizer, rate):
    rows = json.loads(folders["rows"].read_text(encoding="utf-8"))[:8]
    (tmp_path / "few.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_alpaca.main([f"--source={tmp_path / 'few.json'}", f"--out_dir={tmp_path / 'few'}",
                         "--tokenizer=bytes", "--val_fraction=0.25"])
    dataset = open_dataset(tmp_path / "few", 64, 6)
    assert len(dataset.conversations("train")) == 6
    model = toy(dataset, block_size=64, n_layer=2, n_embd=32)
    before = loss_of(model, dataset, "train")
    s = train.Settings(data_dir=tmp_path / "few", out_dir=tmp_path / "out", optimizer=optimizer,
                       learning_rate=rate, embedding_learning_rate=0.01, warmup_iters=10, max_iters=150,
                       eval_interval=150)
    assert train.train(s, model, dataset, CPU, torch.float32) == 0
    after = loss_of(model, dataset, "train")
    assert before == pytest.approx(math.log(260), abs=0.3) and after < 0.2 * before


# What a step costs

@pytest.mark.parametrize("bias", [True, False])
def test_the_operations_of_a_step_are_those_of_its_matrix_products(bias, monkeypatch):
    config = GPTConfig(vocab_size=100, block_size=32, n_layer=3, n_head=2, n_embd=24, bias=bias)
    model = GPT(config)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v)[0])
    idx, where = torch.zeros(5, 20, dtype=torch.long), torch.tensor([1, 2, 30, 31, 32, 77, 99])
    with FlopCounterMode(display=False) as counted:
        model(idx, torch.zeros(7, dtype=torch.long), where).backward()
    assert model.flops(7, 5 * 20, 5 * 20 * 20) == counted.get_total_flops()


def test_the_operations_of_a_step_by_hand():
    model = GPT(GPTConfig(vocab_size=60, block_size=8, n_layer=1, n_head=1, n_embd=2))  # 64 rows in the head
    block = 3 * (2 * 2 * 6 + 2 * 2 * 2 + 2 * 2 * 8 + 2 * 8 * 2)  # c_attn, c_proj, c_fc, c_proj: for a token
    assert model.flops(0, 1, 0) == block == 288
    assert model.flops(1, 0, 0) == 3 * 2 * 2 * 64  # the head, for a target
    assert model.flops(0, 0, 1) == 3 * (2 * 2 + 2 * 2)  # query * key, weight * value, for a pair


def test_the_peak_of_a_cpu_is_what_it_can_do_now():
    peak = PEAK_FLOPS(CPU, torch.float32)
    a, began = torch.ones(512, 512), time.perf_counter()
    a @ a
    assert 1e8 < peak < 1e14 and peak > 0.01 * 2 * 512**3 / (time.perf_counter() - began)


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H800 PCIe", 756), ("NVIDIA GeForce RTX 5090", 209), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA B200", 2250),
    ("NVIDIA L40", None), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce GTX 1080", None), ("Tesla T4", None)])
def test_the_peak_of_a_gpu_is_its_makers_figure_in_bfloat16_and_unknown_for_others(monkeypatch, name,
                                                                                  teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert PEAK_FLOPS(cuda, torch.bfloat16) == (teraflops and teraflops * 1e12)
    assert PEAK_FLOPS(cuda, torch.float32) is None
    monkeypatch.setattr(train, "ranks", lambda: (0, 8))
    assert PEAK_FLOPS(cuda, torch.bfloat16) == (teraflops and 8 * teraflops * 1e12)


# A GPU, as far as a CPU can tell

def test_batches_go_to_a_gpu_from_pinned_memory_and_to_others_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: seen.append("pinned") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: seen.append(non_blocking) or t)
    for device in ("cuda", "mps"):
        idx, targets, where = train.to_device((np.arange(3), np.arange(4), None), torch.device(device))
        assert idx.tolist() == [0, 1, 2] and targets.tolist() == [0, 1, 2, 3] and where is None
    assert seen == ["pinned", "pinned", True, True, False, False]  # only from pinned memory is it safe not to wait


LONG = dict(max_iters=10**8, batch_size=32, gradient_accumulation=16)


@pytest.mark.parametrize("device, kind, triton, compiler, changes, expected", [
    ("cuda", "text", True, True, LONG, ("on", "it pays")),
    ("cuda", "text", True, True, {}, ("off", "short")),
    ("cuda", "text", False, True, LONG, ("off", "Triton")),
    ("cuda", "text", True, False, LONG, ("off", "C compiler")),
    ("cuda", "chat", True, True, LONG, ("off", "text")),
    ("mps", "text", True, True, LONG, ("off", "a GPU")),
    ("cpu", "text", True, True, LONG, ("off", "a GPU"))])
def test_compiling_is_left_off_where_it_cannot_work_or_would_not_pay(folders, monkeypatch, device, kind,
                                                                     triton, compiler, changes, expected):
    dataset = open_dataset(folders[kind], 32, 2)
    monkeypatch.setattr(train, "has_triton", lambda: triton)
    monkeypatch.setattr(shutil, "which", lambda name: name if compiler else None)
    compiles, why = train.pick_compile(train.Settings(**changes), toy(dataset), dataset, torch.device(device))
    assert compiles == expected[0] and expected[1] in why


def test_where_compiling_fails_one_line_says_why_and_what_to_do(folders, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nand a page of that")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    line = error_of(monkeypatch, flags(folders["text"], tmp_path, compile="on"))
    assert "compile=on" in line and "No working C++ compiler found" in line and "--compile=off" in line
    assert "a page" not in line


def test_text_is_compiled_for_each_of_its_shapes_and_chats_for_all_of_them(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: asked.update({model: dynamic}))
    for kind in ("text", "chat"):
        train.make_replica(kind, SimpleNamespace(kind=kind), train.Settings(compile="on"))
    assert asked == {"text": False, "chat": None}


def test_cudnns_attention_is_for_text_alone(folders, tmp_path):
    for kind, is_on in (("chat", False), ("text", True)):
        run(folders[kind], tmp_path / kind, max_iters=1)
        assert torch.backends.cuda.cudnn_sdp_enabled() is is_on


def test_a_macs_random_state_is_saved_and_put_back(monkeypatch):
    state, put_back = torch.arange(44, dtype=torch.uint8), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", put_back.append)
    states = train.rng_states(torch.device("mps"))
    assert [len(mine) for mine in states] == [2]
    train.restore_rng(states, torch.device("mps"))
    train.restore_rng([states[0][:1]], torch.device("mps"))  # of an older last.pt, or of another device
    assert put_back == [state]


def one_of_one(monkeypatch):
    """The variables that torchrun sets for a single process."""
    for name, value in dict(WORLD_SIZE=1, RANK=0, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))


def test_several_processes_on_a_mac_are_refused(monkeypatch):
    one_of_one(monkeypatch)
    with pytest.raises(ValueError, match="device=mps.*--device=cpu"), train.processes(torch.device("mps")):
        pass


@POSIX
def test_processes_part_when_all_went_well_and_else_leave_each_other_alone(monkeypatch):
    one_of_one(monkeypatch)
    with train.processes(CPU):
        assert dist.is_initialized()
    assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), train.processes(CPU):
        1 / 0
    assert dist.is_initialized()
    dist.destroy_process_group()


@POSIX
def test_nccl_knows_its_gpu_and_waits_for_a_long_download(monkeypatch):
    one_of_one(monkeypatch)
    asked = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.update(more, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with train.processes(torch.device("cuda")) as device:
        assert asked["backend"] == "nccl" and asked["device_id"] == device == torch.device("cuda:0")
    assert asked["timeout"].total_seconds() >= 3600  # 6 GB, at 2 MB/s


def test_the_recipe_of_gpt2_has_the_steps_batch_and_rates_of_llm_cs_command():
    """-b 64 -t 1024 on 8 GPUs, -d 524288, -l 0.0006, -u 700, -q 0.0, -c 0.1, 18,865 steps, cosine."""
    s = config.load(train.Settings, ["config/train_gpt2.py"], "")
    assert s.batch_size * s.block_size * s.gradient_accumulation == 524288
    assert (s.max_iters, s.learning_rate, s.warmup_iters, s.weight_decay) == (18865, 6e-4, 700, 0.1)
    for step in (700, 5000, 10000, 18864):
        wanted = 0.5 * (1 + math.cos(math.pi * (step - 700) / (18865 - 700)))
        assert train.lr_factor(step, s) == pytest.approx(wanted, abs=1e-9)


def test_the_peak_of_other_devices_is_unknown():
    assert PEAK_FLOPS(torch.device("mps"), torch.float32) is None


# Evaluation

@pytest.mark.parametrize("kind", ["text", "chat"])
def test_an_evaluation_repeats_itself_and_takes_no_random_numbers(folders, kind):
    dataset = open_dataset(folders[kind], 32, 2)
    model = toy(dataset, dropout=0.5).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses = [loss_of(model, dataset, "val", 200) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model.h[0].training


def test_an_evaluation_is_the_mean_over_targets_of_every_conversation(folders):
    dataset = open_dataset(folders["chat"], 64, 1)
    model, total, count = toy(dataset, block_size=64), 0.0, 0
    sizes = [len(targets) for _, targets, _ in dataset.eval_batches("val", 10**6)]
    assert len(set(sizes)) > 1, "equal batches would hide a wrong weight"
    for ids in dataset.conversations("val"):
        logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        for t in range(ids.index(258), len(ids) - 1):  # from <|assistant|> on, the next token is the answer's
            total, count = total - logits[t, ids[t + 1]].item(), count + 1
    assert loss_of(model, dataset, "val") == pytest.approx(total / count, rel=1e-5)


# Only measuring

def measured(folder, out_dir, capsys, script_flags=()):
    """What --eval_only prints of each split: {split: (loss, perplexity, bits per byte, targets, bytes)}."""
    capsys.readouterr()
    train.main(["--eval_only=True", f"--data_dir={folder}", f"--out_dir={out_dir}", "--device=cpu",
                "--batch_size=3", *script_flags])
    number = r"([\d.,]+|nan)"
    lines = re.findall(rf"^(train|val): loss {number}  perplexity {number}  {number} bits per byte  "
                       rf"\({number} targets, {number} bytes\)$", capsys.readouterr().out, re.MULTILINE)
    return {split: tuple(float(n.replace(",", "")) for n in numbers) for split, *numbers in lines}


@pytest.fixture(scope="module")
def to_measure(tmp_path_factory):
    """A folder with text/ in byte pairs, model.pt, a model whose every number is random, and hf/, the same for
    transformers."""
    root = tmp_path_factory.mktemp("measure")
    text = "".join(f"The {a} and the {b}: naïve, no? Yes!\n" for a in WORDS for b in WORDS[::-1])
    (root / "text.txt").write_text(text, encoding="utf-8")
    data.text.main([f"--source={root / 'text.txt'}", f"--out_dir={root / 'text'}", "--tokenizer=bpe",
                    "--vocab_size=300", "--val_fraction=0.2"])
    dataset = open_dataset(root / "text", 32, 2)
    model = toy(dataset)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    save_checkpoint(root / "model.pt", model_checkpoint(model, dataset.tokenizer, "text", step=1, max_iters=1))
    (root / "hf").mkdir()
    write_hf_model(root / "hf", model.config, to_gpt2_names(model))
    return root


@pytest.mark.parametrize("block_size", [None, 12])
def test_measuring_gives_the_loss_of_transformers_in_float64_over_everything(to_measure, tmp_path, capsys,
                                                                            block_size):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(to_measure / "hf").double().eval()
    flags = [f"--init_from={to_measure / 'model.pt'}", *([f"--block_size={block_size}"] if block_size else [])]
    found = measured(to_measure / "text", tmp_path / "out", capsys, flags)
    assert list(found) == ["val", "train"] and not (tmp_path / "out").exists()
    enc, length = get_tokenizer(to_measure / "text" / "tokenizer.json"), block_size or 32
    for split, (loss, perplexity, bits, n_targets, n_bytes) in found.items():
        ids = np.fromfile(to_measure / "text" / f"{split}.bin", np.uint16).tolist()
        assert (len(ids) - 1) % length > 1, "the last window is a shorter one"
        losses = []
        for start in range(0, len(ids) - 1, length):
            window = torch.tensor(ids[start:start + length + 1])
            logits = theirs(window[None, :-1]).logits[0].log_softmax(-1)
            losses += (-logits[torch.arange(len(window) - 1), window[1:]]).tolist()
        mean, text = sum(losses) / len(losses), enc.decode_bytes(ids[1:])
        assert (n_targets, n_bytes) == (len(losses), len(text)) and len(losses) == len(ids) - 1
        assert loss == pytest.approx(mean, abs=6e-5) and perplexity == pytest.approx(math.exp(mean), abs=6e-3)
        assert bits == pytest.approx(sum(losses) / math.log(2) / len(text), abs=6e-5)
        dataset = open_dataset(to_measure / "text", length, 3)
        model = model_from_checkpoint(load_checkpoint(to_measure / "model.pt"))
        assert loss_of(model, dataset, split, None) == pytest.approx(mean, rel=1e-6)


def test_bits_per_byte_of_bytes_are_the_loss_in_bits_in_the_log_and_the_report_too(folders, tmp_path, capsys):
    run(folders["text"], tmp_path / "out", eval_interval=4, max_iters=6)
    said = re.search(r"validation (\S+), (\S+) bits per byte$", capsys.readouterr().out, re.MULTILINE)
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["step"] for row in rows if row["val_bits_per_byte"]] == ["4", "6"]
    assert (rows[-1]["val_loss"], rows[-1]["val_bits_per_byte"]) == said.groups()
    assert float(said[2]) == pytest.approx(float(said[1]) / math.log(2), abs=2e-4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    found = measured(folders["text"], tmp_path / "out", capsys, [f"--init_from={tmp_path / 'out' / 'best.pt'}"])
    for split, (loss, perplexity, bits, n_targets, n_bytes) in found.items():
        size = (folders["text"] / f"{split}.bin").stat().st_size // 2
        assert n_targets == n_bytes == size - 1
        assert bits == pytest.approx(loss / math.log(2), abs=2e-4)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before, "it writes nothing"


def test_bits_per_byte_of_chats_are_for_the_assistants_words(folders, tmp_path, capsys):
    run(folders["chat"], tmp_path, max_iters=1, block_size=64)
    found = measured(folders["chat"], tmp_path, capsys, [f"--init_from={tmp_path / 'best.pt'}"])
    rows = json.loads(folders["rows"].read_text(encoding="utf-8"))
    assert found["train"][4] + found["val"][4] == sum(len(row["output"]) for row in rows)
    assert found["train"][3] + found["val"][3] == sum(len(row["output"]) + 1 for row in rows)
    for loss, _, bits, n_targets, n_bytes in found.values():
        assert bits == pytest.approx(loss * n_targets / n_bytes / math.log(2), abs=2e-4)


def test_a_loss_for_no_byte_has_no_bits_per_byte_and_a_huge_one_no_perplexity(folders, monkeypatch, capsys):
    assert math.isnan(train.bits_per_byte(2.0, 5, 0)) and train.bits_per_byte(math.log(2), 6, 3) == 2
    dataset = open_dataset(folders["text"], 32, 2)
    for loss, said in ((1e4, "perplexity inf"), (math.nan, "perplexity nan")):
        monkeypatch.setattr(train, "evaluate", lambda *args: loss)  # noqa: B023
        train.measure(train.Settings(), toy(dataset), dataset, CPU, torch.float32)
        assert capsys.readouterr().out.count(said) == 2


def test_measuring_takes_everything_unless_its_settings_say_less(to_measure, tmp_path, capsys):
    (tmp_path / "some.py").write_text("eval_tokens = 40\nblock_size = 8\n", encoding="utf-8")
    for argv, wanted in (([], (0, None)), (["--block_size=128"], (128, None)), (["--eval_tokens=20000"], (0, 20000)),
                         ([str(tmp_path / "some.py")], (8, 40))):
        s = train.load_settings(train.Settings, [*argv, "--eval_only=True"], "")
        assert (s.block_size, s.eval_tokens) == wanted
        assert s.data_dir == config.load(train.Settings, []).data_dir
    s = train.load_settings(train.Settings, [], "")
    assert (s.block_size, s.eval_tokens) == (128, 20_000)
    found = measured(to_measure / "text", tmp_path, capsys,
                     [f"--init_from={to_measure / 'model.pt'}", str(tmp_path / "some.py")])
    assert found["val"][3] == found["train"][3] == 40


@pytest.mark.parametrize("flags, said", [
    ([], "--init_from="), (["--init_from=gpt2", "--resume=True"], "--resume"),
    (["--init_from=gpt2", "--eval_tokens=0"], "eval_tokens=0"), (["--init_from=gpt2", "--block_size=-1"], "block_size=-1"),
    (["--init_from=MODEL"], "--tokenizer="), (["--init_from=gpt2"], "--tokenizer=gpt2")])
def test_what_cannot_be_measured_is_one_line_and_writes_nothing(folders, to_measure, tmp_path, monkeypatch, flags,
                                                                said):
    flags = [flag.replace("MODEL", str(to_measure / "model.pt")) for flag in flags]
    line = error_of(monkeypatch, ["--eval_only=True", f"--data_dir={folders['text']}",
                                  f"--out_dir={tmp_path / 'out'}", "--device=cpu", *flags])
    assert said in line and not list(tmp_path.iterdir())


def test_a_long_evaluation_says_how_far_it_is(folders, monkeypatch, capsys):
    clock = itertools.count(0, 4)  # seconds; it is asked before the first batch and after each
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    dataset = open_dataset(folders["text"], 16, 1)
    batches = list(train.Told(dataset, 200).eval_batches("train", 160))
    assert len(batches) == 10
    assert capsys.readouterr().out.splitlines() == [
        "  train: 48 of 200 targets  4 targets/s  38s left", "  train: 96 of 200 targets  4 targets/s  26s left",
        "  train: 144 of 200 targets  4 targets/s  14s left"]


# Stopping and going on (bit for bit: tests/test_safety.py)

class SignalWhen(io.StringIO):
    """A standard output; a SIGTERM comes while a line with `text` is printed."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, line):
        if self.text and self.text in line:
            self.text = None
            signal.raise_signal(signal.SIGTERM)
        return super().write(line)


def test_a_signal_between_a_step_and_the_next_saves_too(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", SignalWhen("3/6"))
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(folders["text"], tmp_path, log_interval=1))
    assert stopped.value.code == 143
    assert load_checkpoint(tmp_path / "last.pt")["step"] in (3, 4)


def test_after_a_run_signals_mean_what_they_meant_before(folders, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(folders["text"], tmp_path, max_iters=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_first_signal_is_noted_and_the_second_ends_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # at once: torchrun, or a shell, passes on what all got
        assert caught == [signal.SIGTERM]
        now += 2
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("before, caught", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_stops_a_run_but_under_nohup_it_goes_on(before, caught):
    was = signal.signal(signal.SIGHUP, before)
    try:
        with train.stop_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals == [signal.SIGHUP] * caught and signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, was)


@pytest.mark.parametrize("change", ["n_embd=32", "n_layer=2", "n_head=1", "block_size=16", "batch_size=3",
                                    "gradient_accumulation=2", "seed=5", "optimizer=adamw", "bias=False"])
def test_resuming_with_another_model_is_refused_by_name(folders, tmp_path_factory, change):
    out_dir = tmp_path_factory.getbasetemp() / "resume_me"
    if not out_dir.exists():
        run(folders["text"], out_dir, max_iters=1)
    name, _, value = change.partition("=")
    with pytest.raises(ValueError, match=f"last.pt.*{name}=.*{change}"):
        run(folders["text"], out_dir, resume=True, **{name: value})


def test_resuming_from_a_best_pt_is_refused(folders, tmp_path):
    run(folders["text"], tmp_path)
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt.*optimizer"):
        run(folders["text"], tmp_path, resume=True)


def test_resuming_with_another_tokenizer_is_refused(folders, tmp_path):
    run(folders["chat"], tmp_path / "out")
    prepare_alpaca.main([f"--source={folders['rows']}", f"--out_dir={tmp_path / 'bpe'}", "--tokenizer=bpe",
                         "--vocab_size=260", "--val_fraction=0.25"])
    with pytest.raises(ValueError, match="last.pt.*tokenizer"):
        run(tmp_path / "bpe", tmp_path / "out", resume=True)


def test_resuming_what_was_never_begun_says_what_to_do(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="last.pt.*without --resume"):
        run(folders["text"], tmp_path, resume=True)


def test_resuming_keeps_the_best_so_far(folders, tmp_path, monkeypatch):
    run(folders["text"], tmp_path, max_iters=3)
    best = (tmp_path / "best.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *args: 99.0)  # from now on it is worse
    last = run(folders["text"], tmp_path, max_iters=6, resume=True)
    assert [step for step, _, _ in last["history"]] == [3, 6]
    assert (tmp_path / "best.pt").read_bytes() == best


# What is saved

@pytest.mark.parametrize("best_by, column", [("train", 1), ("val", 2)])
def test_best_pt_has_the_lowest_loss_and_no_optimizer(folders, tmp_path, best_by, column):
    last = run(folders["chat"], tmp_path, max_iters=80, eval_interval=5, n_embd=32, block_size=64,
               best_by=best_by)
    best = load_checkpoint(tmp_path / "best.pt")
    assert len(last["history"]) == 16
    lowest = min(last["history"], key=lambda entry: entry[column])
    by_the_other = min(last["history"], key=lambda entry: entry[3 - column])
    assert lowest[0] != by_the_other[0], "both would be the same checkpoint"
    assert best["step"] == lowest[0]
    dataset = open_dataset(folders["chat"], 64, 2)
    loss = loss_of(model_from_checkpoint(best), dataset, best_by, 200)
    assert loss == pytest.approx(lowest[column], rel=1e-5)
    assert "optimizers" in last and "optimizers" not in best
    assert best["kind"] == "chat" and best["tokenizer"] == "bytes"


SAFE = SimpleNamespace(proven=True)  # a log whose run has had a good step


@pytest.mark.parametrize("interval, due", [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), ("4", [4]), ("007", [])])
def test_a_save_is_due_every_so_many_steps(interval, due):
    s = train.Settings(save_interval=interval)
    train.check_settings(s)
    assert [step for step in range(1, 7) if train.save_is_due(s, SAFE, step, 0.0)] == due


@pytest.mark.parametrize("interval, seconds", [("10m", 600), ("0.5m", 30), (".1m", 6)])
def test_a_save_is_due_after_so_many_minutes(monkeypatch, interval, seconds):
    s = train.Settings(save_interval=interval)
    train.check_settings(s)
    monkeypatch.setattr(train.time, "monotonic", lambda: 5000.0)
    assert train.save_is_due(s, SAFE, 7, 5000.0 - seconds - 0.01)
    assert not train.save_is_due(s, SAFE, 7, 5000.0 - seconds + 0.01)


@pytest.mark.parametrize("interval", ["0", "-5", "m", "10s", "10 m", "1.5", "often", "", "1m2", "-1m"])
def test_a_save_interval_that_is_neither_steps_nor_minutes_is_refused(interval):
    with pytest.raises(ValueError, match=f"^save_interval={interval}:"):
        train.check_settings(train.Settings(save_interval=interval))


def test_an_earlier_last_pt_is_replaced_as_soon_as_the_run_is_known_to_be_good():
    s = train.Settings(save_interval="5m")
    assert train.save_is_due(s, SAFE, 2, -math.inf), "a kill would leave another run's file beside this one's log"
    assert not train.save_is_due(s, SimpleNamespace(proven=False), 1, -math.inf)


HEADER = "step,epoch,loss,lr,norm,tokens,seconds,peak_share,train_loss,val_loss,val_bits_per_byte\n"


def test_a_log_of_a_new_run_begins_anew_and_that_of_a_resumed_one_loses_later_and_torn_rows(
        tmp_path, monkeypatch):
    path = tmp_path / "new" / "log.csv"
    monkeypatch.setattr(train, "peak_flops", lambda *_: 1e6)
    model = SimpleNamespace(flops=lambda targets, tokens, pairs: targets)

    def step(tokens, flops, seconds):
        return train.Progress(newest=(0.0, 0.0, (flops, tokens, 0)), step_seconds=seconds)

    log = train.Log(path, "cpu", "float32")
    log.add({"step": 1, "epoch": "0.50", "loss": "3.0000", "lr": "1e-3", "norm": "2.00"}, model, step(64, 1e6, 0.5))
    assert not path.exists()  # whether the first step was good shows after it
    log.add({"step": 2, "loss": "2.0000", "train_loss": "2.1", "val_loss": "2.2"}, model,
            step(32.0, 1e5, 2))
    first, second = "1,0.50,3.0000,1e-3,2.00,64,0.5000,2.000,,,\n", "2,,2.0000,,,32,2.0000,0.050,2.1,2.2,\n"
    assert path.read_text(encoding="utf-8") == HEADER + first + second
    monkeypatch.setattr(train, "peak_flops", lambda *_: None)

    def add(number):
        train.Log(path, "cpu", "float32").add({"step": number}, model, step(1, 1, 1), now=True)
        return path.read_text(encoding="utf-8")
    assert add(2) == HEADER + first + (second := "2,,,,,1,1.0000,n/a,,,\n")
    with open(path, "ab") as f:
        f.write(b"\xff,damaged\n3;0,7;a spreadsheet's\n3,0.7")  # the last as a kill leaves it
    assert add(4) == HEADER + first + second + "4,,,,,1,1.0000,n/a,,,\n"
    path.unlink()  # while it runs, or before
    assert add(5) == HEADER + "5,,,,,1,1.0000,n/a,,,\n"
    assert add(1) == HEADER + "1,,,,,1,1.0000,n/a,,,\n"


def test_without_resume_a_run_begins_anew(folders, tmp_path):
    first, second = run(folders["text"], tmp_path), run(folders["text"], tmp_path)
    assert first["history"] == second["history"] and second["step"] == 6


@pytest.mark.parametrize("history, expected", [
    ([], False),
    ([(1, 3.0, 3.0), (2, 2.0, 3.1)], False),  # too few to say
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.1), (4, 1.0, 2.2)], True),
    ([(1, 2.0, 2.0), (2, 1.5, 2.1), (3, 1.0, 2.2)], True),
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 1.9), (4, 1.0, 1.8)], False),  # still better
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.1), (4, 1.0, 2.05)], False),  # up once, then down
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 1.5, 2.01), (4, 1.0, 2.015)], False),  # within one per cent: noise
    ([(1, 3.0, 3.0), (2, 2.0, 2.0), (3, 2.1, 2.1), (4, 2.2, 2.2)], False),  # training rises as well
])
def test_memorizing_is_validation_rising_twice_while_training_falls(history, expected):
    assert train.is_memorizing(history) is expected


def test_a_run_that_memorizes_says_so_once(folders, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 3.0, 2.0, 2.0, 1.5, 2.1, 1.0, 2.2, 0.5, 2.3])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    run(folders["text"], tmp_path, max_iters=5, eval_interval=1)
    assert capsys.readouterr().out.count("Validation has turned up") == 1


def test_an_edit_that_forgets_the_cache_is_told_and_trained_all_the_same(folders, tmp_path, monkeypatch, capsys):
    run(folders["text"], tmp_path, max_iters=1)
    assert "KV cache" not in capsys.readouterr().err
    forward = train.gpt.Block.forward
    monkeypatch.setattr(train.gpt.Block, "forward", lambda self, x, *args: forward(self, x + x.roll(1, 1), *args))
    run(folders["text"], tmp_path, max_iters=1)
    assert capsys.readouterr().err.count("warning: the KV cache: model.py computes something else") == 1
    monkeypatch.setattr(train.gpt.GPT, "hidden", lambda self, idx: self.wte(idx))  # which has none
    run(folders["text"], tmp_path, max_iters=1, sample_interval=0)
    assert "warning: the KV cache: " in capsys.readouterr().err


# What goes wrong

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_learning_rate_far_too_high_never_replaces_a_good_checkpoint(folders, tmp_path, optimizer):
    knobs = dict(eval_interval=1, optimizer=optimizer, warmup_iters=0)
    run(folders["text"], tmp_path, max_iters=3, **knobs)
    with pytest.raises(ValueError, match="learning_rate.*1e\\+30"):
        run(folders["text"], tmp_path, resume=True, learning_rate=1e30, embedding_learning_rate=1e30, **knobs)
    for name in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(tmp_path / name)
        dataset = open_dataset(folders["text"], 32, 2)
        assert loss_of(model_from_checkpoint(checkpoint), dataset, "val") < 6, name


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 4000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.29 GB, max "
                 "allowed: 6.80 GB). Tried to allocate 1024.00 MB on private pool.")],
    ids=["cuda", "python", "cpu", "mps"])
@pytest.mark.parametrize("batch_size, accumulation", [(2, 1), (8, 5), (9, 2), (7, 1), (13, 3), (15, 4),
                                                      (1, 1), (1, 6)])
def test_out_of_memory_names_a_smaller_batch_of_the_same_tokens(error, batch_size, accumulation):
    s = train.Settings(batch_size=batch_size, gradient_accumulation=accumulation)
    with pytest.raises(ValueError, match="^out of memory; ") as raised, \
            train.enough_memory(train.smaller_batches(s)):
        raise error
    line = str(raised.value)
    found = re.search(r"--batch_size=(\d+) --gradient_accumulation=(\d+)\b", line)
    if batch_size == 1:
        assert not found and "block_size" in line
    else:
        smaller, more = map(int, found.groups())
        assert 1 <= smaller < batch_size and smaller * more == batch_size * accumulation
        train.check_settings(replace(s, batch_size=smaller, gradient_accumulation=more))


def test_out_of_memory_leaves_other_errors_as_they_are():
    for said in ("shapes cannot be multiplied", "", "unsupported memory format option"):
        with pytest.raises(RuntimeError, match=f"^{said}$"), train.enough_memory("advice"):
            raise RuntimeError(said)


def error_of(monkeypatch, arguments):
    return error_of_script(monkeypatch, train, arguments)


def test_when_saving_fails_training_goes_on_to_the_end_and_exits_with_1(folders, tmp_path, monkeypatch,
                                                                       capsys):
    monkeypatch.setattr(train, "draw_losses", DRAW)
    with largest_file(5000):
        last = error_of(monkeypatch, flags(folders["text"], tmp_path, eval_interval=3))
    said = capsys.readouterr()
    assert re.search(r"step +6/6", said.out)
    lines = [*said.err.splitlines(), last]
    assert [line.split(":")[0] for line in lines] == ["warning"] * (len(lines) - 1) + ["error"]
    for name in ("best.pt", "last.pt"):
        assert any(str(tmp_path / name) in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"], "what fits, and no half a file"


def test_a_save_that_failed_once_is_made_up_for(folders, tmp_path, monkeypatch):
    real, losses, tried = train.gpt.save_checkpoint, iter(range(100)), []

    def save(path, checkpoint):
        tried.append(path)
        if len(tried) == 1:  # the disk is full at the first evaluation, and free again at the next
            raise OSError(f"{path}: disk full")
        real(path, checkpoint)
    monkeypatch.setattr(train.gpt, "save_checkpoint", save)
    monkeypatch.setattr(train, "evaluate", lambda *args: float(next(losses)))  # worse each time
    assert run(folders["text"], tmp_path, max_iters=4, eval_interval=1)["step"] == 4
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2  # the best of those that could be saved


def test_text_too_short_for_a_window_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Far too short.", encoding="utf-8")
    data.text.main([f"--source={tmp_path / 'short.txt'}", f"--out_dir={tmp_path / 'short'}"])
    capsys.readouterr()
    line = error_of(monkeypatch, flags(tmp_path / "short", tmp_path / "out"))
    assert "train.bin" in line and "block_size=32" in line
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide_the_width_end_as_one_line(folders, tmp_path, monkeypatch):
    line = error_of(monkeypatch, flags(folders["text"], tmp_path, n_head=3))
    assert "n_embd=16" in line and "n_head=3" in line
