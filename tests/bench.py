"""Benchmarks: this code and what a user would run instead, measured in turn on this machine.

    make bench                                     # prepare what the parts need, then run all: an hour
    python -m tests.bench finetune decode          # some parts

Parts, and about how many minutes they take on two cores: train, prefill, start and int8 1 each, step 3, decode 4,
vary 6, finetune 9, rules 24. vary and rules train models and print what they learn, not speeds.

A row of the table: what is measured, ours and the peer as median (min to max), and their ratio, above 1 if ours is
better. These are not tests: speeds vary by a third from minute to minute, and only ratios are meaningful.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import chat
import config
import data.rules
import data.text
import finetune
import prepare_alpaca
import runtime.export
import train
from config import UserError
from data.conversation import special_ids, supervised
from data.datasets import open_dataset
from data.download import download
from data.files import write_json
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, KVCache
from runtime.checkpoint import load_checkpoint, load_model, model_state, save_checkpoint
from runtime.fast_cpu import speed_up

CPU = torch.device("cpu")


@dataclass
class Settings:
    shakespeare: Path = Path("data/shakespeare/input.txt")  # tiny Shakespeare (data/text.py downloads it)
    alpaca: str = prepare_alpaca.Settings.source  # Stanford Alpaca: a file, or a URL
    rows: int = 400  # of Alpaca, for finetuning
    checkpoint: Path = Path("out/chat/best.pt")  # of the model whose int8 weights are evaluated
    runs: int = 3  # repetitions of each measurement; short ones have more


# ---- measuring ----

def in_turn(runs, **functions):
    """Call each function `runs` times, alternating: {name: [seconds, ...]}. A function may return its own seconds."""
    seconds = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            began = time.perf_counter()
            own = function()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return seconds


def per_second(count, seconds):
    """Convert {name: seconds for `count` of something} to speeds."""
    return {name: [count / second for second in values] for name, values in seconds.items()}


def line(what, ours, peer, unit, smaller=False):
    """Print and return a row of the table. ours, peer: lists of measurements. smaller: whether less is better."""
    medians = [statistics.median(values) for values in (ours, peer)]
    ratio = medians[1] / medians[0] if smaller else medians[0] / medians[1]
    cells = [f"{m:,.4g} ({min(v):,.4g} to {max(v):,.4g})" for m, v in zip(medians, (ours, peer))]
    print(f"{what:<52}{cells[0]:>28}{cells[1]:>28} {unit:<10}{ratio:>6.2f}", flush=True)
    return {"what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio}


def quiet(main, *argv):
    """Run a script's main without its output; return the seconds it takes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.monotonic()
        main(list(map(str, argv)))
        return time.monotonic() - began


def python(*argv):
    """Run Python in the repository; show only its errors."""
    subprocess.run([sys.executable, *argv], cwd=config.REPO, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def temporary_folder():
    """Context manager: a temporary folder, as a Path."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---- models ----

GPT2 = GPTConfig()  # the shape of GPT-2 124M


def gpt2_shape(block_size=GPT2.block_size):
    """Return a GPT of GPT-2 124M's shape, with random weights."""
    torch.manual_seed(0)
    return GPT(replace(GPT2, block_size=block_size))


def save(model, path):
    """Save a model as a checkpoint with GPT-2's tokenizer."""
    save_checkpoint(path, model_state(model, "gpt2", "chat", step=1, max_iters=1, turns=1))


def export(model, folder, name, *flags):
    """Export a model to a file or folder with this name, through runtime/export.py; return its path."""
    save(model, folder / "export.pt")
    quiet(runtime.export.main, f"--checkpoint={folder / 'export.pt'}", f"--out={folder / name}", *flags)
    return folder / name


def as_transformers(model):
    """Return the same model in transformers."""
    from transformers import GPT2LMHeadModel
    with temporary_folder() as folder:
        return GPT2LMHeadModel.from_pretrained(export(model, folder, "hf"))


# ---- training steps ----

def forward_backward(cfg):
    """Forward and backward pass of GPT-2 124M on 4 x 256 tokens, with a loss at every position."""
    T = min(256, GPT2.block_size)
    model = gpt2_shape(T)
    peer = as_transformers(model).train()
    ids = torch.randint(0, 50257, (4, T + 1))
    x, y = ids[:, :-1], ids[:, 1:].reshape(-1)

    def ours():
        model(x, y).div(y.numel()).backward()
        model.zero_grad()

    def theirs():
        peer(x, labels=x).loss.backward()
        peer.zero_grad()

    in_turn(1, ours=ours, peer=theirs)  # warmup
    seconds = in_turn(cfg.runs, ours=ours, peer=theirs)
    yield line(f"forward + backward, 124M, 4 x {T}; transformers", seconds["ours"], seconds["peer"], "s", True)


def nanogpt_loss(model):
    """Return nanoGPT's forward pass with a GPT's weights, a function of ids and targets. It has the exact GELU, logits for
    the vocabulary's padding, and a mean loss."""
    for block in model.h:
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.c_proj(F.gelu(mlp.c_fc(x)))

    def loss(idx, targets):
        x = model.wte(idx) + model.wpe.weight[:idx.shape[1]]
        for block in model.h:
            x = block(x)
        logits = F.linear(model.ln_f(x), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss


def nanogpt_step(folder, model, optimizer, batch_size, accumulation=1, autocast=None, compiled=False):
    """Return a training step like nanoGPT's: forward pass and loss compiled together, and the next batch, slices of the
    memmap, copied from pinned memory during the backward pass."""
    loss, tokens = nanogpt_loss(model), np.memmap(folder / "train.bin", np.uint16, "r")
    loss, autocast = torch.compile(loss) if compiled else loss, autocast or contextlib.nullcontext()
    T, device = model.config.block_size, model.wte.weight.device

    def batch():
        starts = torch.randint(len(tokens) - T, (batch_size,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + n:i + n + T].astype(np.int64)) for i in starts]) for n in (0, 1))
        return [(t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in (x, y)]

    following = batch()

    def step():
        nonlocal following
        for _ in range(accumulation):
            with autocast:
                mean_loss = loss(*following) / accumulation
            following = batch()
            mean_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def shakespeare_step(cfg):
    """A training step of the Shakespeare model with AdamW; nanoGPT's code."""
    with temporary_folder() as folder:
        quiet(data.text.main, f"--source={cfg.shakespeare}", f"--out_dir={folder}", "--tokenizer=bytes")
        for batch_size in (12, 48):
            yield alternate_steps(folder, batch_size, 3 * cfg.runs)


def alternate_steps(folder, batch_size, runs, count=20, T=64):
    """Return the row of `step` for one batch size, `count` steps at a time."""
    dataset, autocast, number = open_dataset(folder, T, batch_size), contextlib.nullcontext(), itertools.count()
    loop = train.Settings(optimizer="adamw", batch_size=batch_size, learning_rate=1e-3)
    model, peer = (GPT(GPTConfig(dataset.vocab_size, T, 4, 4, 128)) for _ in range(2))
    optimizers = train.configure_optimizers(model, loop)
    adamw = torch.optim.AdamW(peer.parameters(), 1e-3, (0.9, 0.99), foreach=True)  # faster on a CPU than nanoGPT's default
    nanogpt = nanogpt_step(folder, peer, adamw, batch_size)

    def ours():
        for _ in range(count):
            train.train_step(model, optimizers, dataset, next(number), loop, CPU, autocast)

    def theirs():
        for _ in range(count):
            nanogpt()

    seconds = in_turn(runs, ours=ours, peer=theirs)
    ms = {name: [1000 * second / count for second in values] for name, values in seconds.items()}
    return line(f"AdamW step, Shakespeare, batch {batch_size}; nanoGPT", ms["ours"], ms["peer"], "ms", True)


# ---- generating ----

def llama(model, dtype):
    """Start llama.cpp with our GGUF file of a model and the same number of threads, in a separate process, since in one
    process its threads and PyTorch's slow each other down. Returns a function (ids, number of new tokens, name of a
    timing) -> seconds, by its own measurement; None if it is not installed."""
    if not find_spec("xllamacpp"):
        print("llama.cpp is not compared: pip install xllamacpp", flush=True)
        return None
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with temporary_folder() as folder:
        path = export(model, folder, "model.gguf", f"--dtype={dtype}")
        pool.submit(start_llama, str(path), model.config.block_size, torch.get_num_threads()).result()
    return lambda ids, new, timing: pool.submit(ask_llama, ids, new).result()[timing] / 1000


def start_llama(path, context, threads):
    """In llama.cpp's process: start its server with a file."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.ui, params.fit_params = True, False, False
    start_llama.server = xllamacpp.Server(params)
    ask_llama([0], 1)  # opens the file


def ask_llama(ids, new):
    """In llama.cpp's process: return the timings of a prompt and `new` tokens, in milliseconds."""
    return start_llama.server.handle_completions({
        "prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False})["timings"]


def with_peers():
    """Return GPT-2 124M in chat.py, {"float32": model, "int8": model}; in transformers; in llama.cpp, by name."""
    model = gpt2_shape().eval()
    ours = {"float32": speed_up(model), "int8": speed_up(model, int8=True)}
    return ours, as_transformers(model).eval(), {"float32": llama(model, "float32"), "int8": llama(model, "q8_0")}


def time_decode(model, ids, new):
    """Return the seconds for `new` tokens after the first, whose time is that of the prefill."""
    tokens = model.generate(ids, new + 1, temperature=0)
    next(tokens)
    began = time.perf_counter()
    assert len(list(tokens)) == new
    return time.perf_counter() - began


DECODE = ((64, 128), (900, 64))  # tokens in the context and new ones


def decode(cfg):
    """Tokens per second of one conversation, GPT-2 124M: 128 new tokens after 64, and 64 new ones after 900."""
    (ours, peer, llamas), ids = with_peers(), torch.randint(0, 50257, (DECODE[-1][0],)).tolist()
    context, n_new = DECODE[0]

    def generate(n):
        peer.generate(torch.tensor([ids[:context]]), do_sample=False, min_new_tokens=n, max_new_tokens=n,
                      pad_token_id=50256)

    def transformers():
        [first], [all_] = in_turn(1, first=lambda: generate(1), all=lambda: generate(n_new + 1)).values()
        return all_ - first

    functions = {"transformers": transformers}
    for name in ours:
        for n, new in DECODE:
            functions[f"{name} {n}"] = functools.partial(time_decode, ours[name], ids[:n], new)
            if llamas[name]:
                functions[f"llama.cpp {name} {n}"] = functools.partial(
                    llamas[name], ids[:n], new + 1, "predicted_ms")
    seconds = in_turn(max(cfg.runs, 5), **functions)
    for name in ours:
        for n, new in DECODE:
            speed, case = per_second(new, seconds), f"{name} {n}"
            peers = [other for other in ("transformers" if n == context else "", f"llama.cpp {case}") if other in speed]
            for other in peers:
                yield line(f"decode, 124M, {name}, {new} tokens after {n}; {other.split()[0]}", speed[case],
                           speed[other], "tokens/s")


def prefill(cfg):
    """Prefill of 512 tokens, up to the first new one, GPT-2 124M."""
    (ours, peer, llamas), T = with_peers(), min(512, GPT2.block_size)
    ids = torch.randint(0, 50257, (T,)).tolist()

    @torch.no_grad()
    def transformers():
        peer(torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    functions = {"transformers": transformers}
    for name in ours:
        functions[name] = lambda model=ours[name]: list(model.generate(ids, 1, temperature=0))
        if llamas[name]:
            functions[f"llama.cpp {name}"] = functools.partial(llamas[name], ids, 1, "prompt_ms")
    seconds = in_turn(max(cfg.runs, 5), **functions)
    speed = per_second(T, seconds)
    for name, other in (("float32", "transformers"), ("float32", "llama.cpp float32"), ("int8", "llama.cpp int8")):
        if other in speed:
            yield line(f"prefill, 124M, {T} tokens, {name}; {other.split()[0]}", speed[name], speed[other], "tokens/s")


def start(cfg):
    """All of chat.py, from its start to the first token of GPT-2 124M, compared with `import torch`."""
    with temporary_folder() as folder:
        save(gpt2_shape(), folder / "best.pt")
        flags = [f"--checkpoint={folder / 'best.pt'}", "--prompt=Hi", "--max_new_tokens=1", "--device=cpu"]
        seconds = in_turn(cfg.runs, chat=lambda: python("chat.py", *flags), torch=lambda: python("-c", "import torch"))
    yield line("chat.py to its first token; import torch", seconds["chat"], seconds["torch"], "s", True)


@torch.no_grad()
def int8_quality(cfg):
    """Perplexity with int8 and with float32 weights, on 50,000 held-out tokens of the checkpoint's data, read token by
    token as in generation."""
    checkpoint = load_checkpoint(cfg.checkpoint)
    tokens = np.fromfile(Path(checkpoint["settings"]["data_dir"]) / "val.bin", np.uint16)[:50_000].astype(np.int64)
    model = load_model(checkpoint).eval()
    perplexity = {}
    for name, m in (("float32", speed_up(model)), ("int8", speed_up(model, int8=True))):
        loss, T = 0.0, m.config.block_size
        for first in range(0, len(tokens) - 1, T):
            ids, cache = torch.from_numpy(tokens[first:first + T + 1]), KVCache(m)
            logits = torch.cat([m.head(m.hidden(i.view(1, 1), cache, t))[0] for t, i in enumerate(ids[:-1])])
            loss += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        perplexity[name] = math.exp(loss / (len(tokens) - 1))
    yield line("perplexity, int8; float32", [perplexity["int8"]], [perplexity["float32"]], "", True)


# ---- whole training runs ----

def finetune_alpaca(cfg):
    """Finetuning GPT-2 124M in float32: targets per second of finetune.py's step and of the usual transformers
    training loop (random batches of 8, padded), on the same rows."""
    with temporary_folder() as folder:
        path = config.local_path(cfg.alpaca)
        if not path.is_file():
            path = folder / "alpaca.json"
            download(cfg.alpaca, path)
        rows = json.loads(path.read_text(encoding="utf-8"))
        write_json(folder / "rows.json", random.Random(0).sample(rows, min(cfg.rows * 21 // 20, len(rows))))
        quiet(prepare_alpaca.main, f"--source={folder / 'rows.json'}", f"--out_dir={folder}")
        dataset = open_dataset(folder, GPT2.block_size, 1)
        chats = dataset.conversations("train")
    enc, model = get_tokenizer("gpt2"), gpt2_shape()
    peer, pad_id = as_transformers(model).train(), special_ids(enc)[0]
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)
    loop = finetune.Settings(learning_rate=1e-5, warmup_iters=0, max_iters=10**6, dropout=0.0)
    optimizers = train.configure_optimizers(model, loop)
    order = torch.randperm(len(chats)).tolist()
    padded = [[chats[i] for i in order[n:n + 8]] for n in range(0, len(order), 8)]

    def their_step(batch):
        ids = torch.full((len(batch), max(map(len, batch))), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for b, row in enumerate(batch):
            row = torch.tensor(row)
            ids[b, :len(row)], mask[b, :len(row)] = row, 1
            labels[b, :len(row)] = torch.where(torch.from_numpy(supervised(row.numpy(), enc)), row, -100)
        peer(ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int((labels != -100).sum())

    def our_step(step):
        train.train_step(model, optimizers, dataset, step, loop, CPU, contextlib.nullcontext())
        return dataset.n_targets("train", step)

    speed, steps = {"ours": [], "peer": []}, range(dataset.batches_until("train", 1))
    for run in range(cfg.runs):  # each run is a part of the epoch
        for name, batches, step in (("ours", steps, our_step), ("peer", padded, their_step)):
            began = time.perf_counter()
            targets = sum(map(step, batches[run::cfg.runs]))
            speed[name].append(targets / (time.perf_counter() - began))
    yield line(f"finetune, {len(chats)} Alpaca rows, 124M; transformers", speed["ours"], speed["peer"], "targets/s")


def score(checkpoint, source, folder, rows=0):
    """Return the share of exact matches as chat.py scores them, by category, or for a prepared folder by split:
    {"held out": share, ...}."""
    quiet(chat.main, f"--checkpoint={checkpoint}", f"--score={source}", f"--score_rows={rows}", "--device=cpu",
          f"--score_file={folder / 'score.json'}")
    summary = json.loads((folder / "score.json").read_text(encoding="utf-8"))["summary"]
    return {row["category"] if row["rows"] == "rows" else row["rows"]: row["exact"] / row["n"] for row in summary}


def learn(recipe, folder, *flags):
    """Train with a recipe; return a result: the parameters, seconds of training and losses."""
    quiet(train.main, config.REPO / "config" / recipe, "--device=cpu", f"--out_dir={folder}", *flags)
    last = load_checkpoint(folder / "last.pt")
    _, train_losses, val_losses = zip(*last["history"])
    return {"parameters": load_model(last).num_params(), "seconds": last["seconds"], "training loss": train_losses[-1],
            "lowest val loss": min(val_losses)}


def show(result):
    """Print and return a result: {"what": text, name: number, ...}."""
    numbers = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3f}"
               for name, value in result.items() if name != "what"]
    print(f"{result['what']:<34}", ", ".join(numbers), flush=True)
    return result


VARIED = {  # a name, and what differs from config/train_recite.py with 400 steps
    "unchanged": [],
    "batch / 2, twice the steps": ["--batch_size=4", "--max_iters=800"],
    "learning rates / 4": ["--learning_rate=3.5e-3", "--embedding_learning_rate=1.75e-3"],
    "2 layers": ["--n_layer=2"], "8 layers": ["--n_layer=8"], "256 wide": ["--n_embd=256"],
    "context 32, same tokens per step": ["--block_size=32", "--batch_size=32"],
}


def vary(cfg):
    """The effect of batch size, learning rate, depth, width and context on the small instruction data: time, losses, and
    exact matches on held-out rows and on as many training rows."""
    with temporary_folder() as folder:
        quiet(prepare_alpaca.main, config.REPO / "config/prepare_instruction.py", f"--out_dir={folder}")
        for name, flags in VARIED.items():
            result = learn("train_recite.py", folder / "out", f"--data_dir={folder}", "--max_iters=400",
                           "--eval_interval=100", *flags)
            yield show({"what": name} | result | score(folder / "out" / "best.pt", folder, folder))


RULES = {"90,000 rows": [], "without the work": ["--work=False"], "9,000 rows": ["--rows=9000"], "900 rows": ["--rows=900"]}


def rules(cfg):
    """Memorizing, generalizing, showing the work: make chat's first stage on different rows. Exact matches on
    training rows, and on held-out words and numbers."""
    with temporary_folder() as folder:
        rows, held_out, best = folder / "rows.json", folder / "held_out.json", folder / "out" / "best.pt"
        quiet(data.rules.main, "--rows=2500", "--operands=held_out", f"--out={held_out}")
        for name, flags in RULES.items():
            quiet(data.rules.main, f"--out={rows}", *flags)
            quiet(prepare_alpaca.main, config.REPO / "config/prepare_rules.py", f"--out_dir={folder / 'data'}",
                  f"--extra={rows}")
            result = learn("train_rules.py", folder / "out", f"--data_dir={folder / 'data'}")
            known, new = score(best, rows, folder, 500), score(best, held_out, folder)
            yield show({"what": name} | result | {
                "trained on": known["all"], "held out": new["all"], "sums": new["rule/sum (work)"],
                "differences": new["rule/subtraction (work)"]})


# ---- the command ----

PARTS = {"train": forward_backward, "step": shakespeare_step, "decode": decode, "prefill": prefill, "start": start,
         "int8": int8_quality, "finetune": finetune_alpaca, "vary": vary, "rules": rules}


def main(argv):
    """Run the named parts, or all. Raises UserError or OSError for a missing file or package."""
    names = [arg for arg in argv if not arg.startswith("-")] or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"{name}: not a part; use {', '.join(PARTS)}")
    cfg = config.load(Settings, [arg for arg in argv if arg.startswith("-")], __doc__)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
          "float32")
    print(f"{'what; the peer':<52}{'ours':>28}{'peer':>28} {'':<10}{'ratio':>6}")
    for name in names:
        try:
            for _ in PARTS[name](cfg):
                pass  # it has printed the row
        except ModuleNotFoundError as error:
            raise UserError(f"{name}: needs {error.name}; pip install -r requirements-dev.txt") from error


if __name__ == "__main__":
    config.run(main)
