"""How fast it is, measured on the machine it runs on: ours and what a user would take instead, in turn.

    make bench                                     # everything, an hour, and before it what it needs
    python -m tests.bench finetune prepare         # some parts, in the environment of make test
    python -m tests.bench decode --json=bench.json

A line of the table: what, ours and the peer as medians (least to most), their ratio, above 1 where ours is
better, and the share of what the machine can do: of the FLOP/s of a large matrix product, or of the bytes/s
of reading memory, measured in turn with the rest. Never a test: machines vary by a third from minute to
minute, so only ratios mean something.
"""
import contextlib
import copy
import functools
import io
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data.export import write_gguf, write_hf_model
from data.tokens import SPLITS, ReadAhead, open_dataset, write_meta, write_tokens

import chat
import config
import data.rules
import data.text
import finetune
import prepare_alpaca
import train
from data.conversation import read_conversations, supervised
from data.files import write_json
from data.tokenizer import get_tokenizer
from model import (
    GPT,
    GPTConfig,
    KVCache,
    configure_optimizers,
    exported_weights,
    load_checkpoint,
    make_fast,
    model_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
    to_gpt2_names,
)
from pictures import draw_rows

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@dataclass
class Settings:
    shakespeare: Path = Path("data/shakespeare/input.txt")  # tiny Shakespeare (data/text.py downloads it)
    alpaca: str = prepare_alpaca.ALPACA_URL  # Stanford Alpaca: a file, or the address it is fetched from
    rows: int = 400  # of Alpaca, for finetuning
    checkpoint: Path = Path("out/chat/best.pt")  # of a model whose int8 weights are compared
    runs: int = 3  # repeats of each measurement; short ones are repeated more often
    json: Path | None = None  # where the table goes too, as JSON


def in_turn(runs, **functions):
    """Call each function `runs` times, one after the other in turn: {name: [seconds, ...]}. A function that
    returns a float has measured itself."""
    seconds = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            began = time.perf_counter()
            itself = function()
            seconds[name].append(itself if isinstance(itself, float) else time.perf_counter() - began)
    return seconds


def line(what, ours, peer, unit, target="", smaller=False, share=None):
    """One line of the table, printed and returned: lists of measurements, ours and the peer's; `smaller`
    where less is better; `share` of the machine's limit that ours reaches."""
    middle = [statistics.median(values) for values in (ours, peer)]
    ratio = middle[1] / middle[0] if smaller else middle[0] / middle[1]
    cells = [f"{m:,.4g} ({min(v):,.4g} to {max(v):,.4g})" for m, v in zip(middle, (ours, peer))]
    print(f"{what:<48}{cells[0]:>28}{cells[1]:>28} {unit:<10}{ratio:>6.2f}"
          f"{'' if share is None else f'{share:.0%}':>7}  {target}", flush=True)
    return {"what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "share": share,
            "target": target}


def quiet(function, *args):
    """Call function without its printing; returns (its result, seconds)."""
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.monotonic()
        result = function(*args)
        return result, time.monotonic() - began


def gpt2_shape(block_size=1024):
    """A GPT of GPT-2 124M's shape with random weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=block_size))


def chat_shape():
    """A GPT of the shape that make chat trains, with random weights."""
    torch.manual_seed(0)
    recipe = config.load(train.Settings, [str(REPO / "config/train_rules.py")], "")
    return GPT(GPTConfig(516, recipe.block_size, recipe.n_layer, recipe.n_head, recipe.n_embd)).eval()


def as_transformers(model):
    """The same model in transformers."""
    from transformers import GPT2LMHeadModel
    with tempfile.TemporaryDirectory() as folder:
        write_hf_model(Path(folder), model.config, to_gpt2_names(model))
        return GPT2LMHeadModel.from_pretrained(folder)


SIDE, PRODUCTS = 2048, 8  # of the large matrices; and how often they are multiplied, a second in all
READ = 2**29  # bytes


def large_product():
    """What shows the FLOP/s that this machine can do: a function that multiplies two float32 matrices."""
    a, b, c = torch.randn(3, SIDE, SIDE)

    def multiply():
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=c)
    return multiply


def share_of_peak(flops, seconds, product):
    """The share of the large product's FLOP/s that is reached; seconds: each time that `flops` took; product:
    each time that the large product took."""
    return flops / statistics.median(seconds) / (PRODUCTS * 2 * SIDE**3 / statistics.median(product))


def large_read():
    """What shows the bytes/s that this machine can read: a function that adds up READ bytes."""
    return torch.ones(READ // 4).sum


def forward_backward(s):
    """Forward and backward of GPT-2 124M on 4 x 256 tokens, a loss at every position."""
    model = gpt2_shape(256)
    peer = as_transformers(model).train()
    ids = torch.randint(0, 50257, (4, 257))
    x, y = ids[:, :-1], ids[:, 1:].reshape(-1)

    def ours():
        model(x, y).div(1024).backward()
        model.zero_grad()

    def theirs():
        peer(x, labels=x).loss.backward()
        peer.zero_grad()

    in_turn(1, ours=ours, peer=theirs)  # to warm up
    seconds = in_turn(s.runs, ours=ours, peer=theirs, product=large_product())
    share = share_of_peak(model.flops(1024, 1024, 4 * 256**2), seconds["ours"], seconds["product"])
    yield line("forward + backward, 124M, 4 x 256; transformers", seconds["ours"], seconds["peer"], "s",
               "1.05 or more; 68% or more", smaller=True, share=share)


def nanogpt_loss(model):
    """nanoGPT's forward, which it compiles, with a GPT's weights: a function of ids and targets. It has the
    erf form of GELU, a head for ids that do not exist too, the mean loss, and under autocast a residual
    stream in float32."""
    for block in model.h:
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.c_proj(F.gelu(mlp.c_fc(x)))

    def loss(idx, targets):
        x = model.wte(idx) + model.wpe.weight[:idx.shape[1]]
        for block in model.h:
            x = block(x)
        logits = F.linear(model.ln_f(x), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss


def nanogpt_step(dataset, model, batch_size, block_size, device, autocast, accumulation=1):
    """A training step as nanoGPT writes it: a slice of the memmap for each sample, drawn while the forward
    pass runs, and AdamW with foreach (quicker than nanoGPT's default on a CPU). On a GPU: fused, the forward
    pass compiled, pinned batches. `accumulation` batches make a step."""
    on_gpu, run, data = device.type == "cuda", nanogpt_loss(model), dataset.tokens["train"][0]
    fast = {"fused": True} if on_gpu else {"foreach": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), **fast)
    if on_gpu:
        run = torch.compile(run, dynamic=False)

    def draw():
        starts = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + block_size].astype(np.int64)) for i in starts])
        if on_gpu:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    batch = draw()

    def step():
        nonlocal batch
        for _ in range(accumulation):
            with autocast:
                loss = run(*batch)
            batch = draw()
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def shakespeare_step(s):
    """A whole training step at the Shakespeare shape against nanoGPT's way (with AdamW), and what Muon takes
    of one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        quiet(data.text.main, [f"--source={s.shakespeare}", f"--out_dir={folder}", "--tokenizer=bytes"])
        for batch_size in (12, 48):
            yield from steps_in_turn(open_dataset(folder, 64, batch_size), batch_size, 3 * s.runs)


def steps_in_turn(dataset, batch_size, runs, count=20):
    """The lines of `step` for one size of batch, `count` steps at a time."""
    loop = train.Settings(optimizer="adamw", batch_size=batch_size, block_size=64, learning_rate=1e-3)
    model, peer, fast = (GPT(GPTConfig(dataset.vocab_size, 64, 4, 4, 128)) for _ in range(3))
    optimizers = configure_optimizers(model, loop)
    muon = configure_optimizers(fast, replace(loop, optimizer="muon", embedding_learning_rate=1e-3))
    nanogpt = nanogpt_step(dataset, peer, batch_size, 64, CPU, contextlib.nullcontext())
    spent, number = [], iter(range(10**9))

    def ours():
        for _ in range(count):
            train.train_step(model, optimizers, dataset, next(number), loop, CPU, contextlib.nullcontext())

    def theirs():
        for _ in range(count):
            nanogpt()

    def with_muon():
        for _ in range(count):
            fast(*train.to_device(dataset.batch("train", next(number)), CPU)).backward()
            began = time.perf_counter()
            for optimizer in muon:
                optimizer.step()
            spent.append(1000 * (time.perf_counter() - began))
            fast.zero_grad()

    seconds = in_turn(runs, ours=ours, peer=theirs, muon=with_muon, product=large_product())
    ms = {name: [1000 * second / count for second in values] for name, values in seconds.items()}
    flops = count * model.flops(64 * batch_size, 64 * batch_size, batch_size * 64**2)
    share = share_of_peak(flops, seconds["ours"], seconds["product"])
    yield line(f"AdamW step, Shakespeare, batch {batch_size}; nanoGPT's way", ms["ours"], ms["peer"], "ms",
               "1 or more", smaller=True, share=share)
    yield line("  Muon + AdamW alone; the whole step", spent, ms["muon"], "ms",
               "15 ms or less; 10 or more at batch 48", smaller=True)


def gpu(s):
    """A training step of GPT-2 124M, 1,024 tokens of context, on a CUDA GPU: bfloat16, compiled, fused
    AdamW; 384 windows a step, in batches of 32, and as nanoGPT writes it in batches of 32 and of its own 12.
    """
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA GPU here")
        return
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device), flush=True)
    torch.set_float32_matmul_precision("high")
    yield from gpu_steps(GPTConfig(), 384, 32, 12, device, train.peak_flops(device, torch.bfloat16), s.runs)


def gpu_steps(shape, windows, batch_size, nanogpt_batch_size, device, peak, runs):
    """The lines of `gpu` for one shape of model, `windows` a step and two sizes of batch."""
    loop = train.Settings(optimizer="adamw", batch_size=batch_size, learning_rate=6e-4, weight_decay=0.1,
                          beta2=0.95, gradient_accumulation=windows // batch_size,
                          compile="on" if device.type == "cuda" else "off")
    autocast, number = torch.autocast(device.type, torch.bfloat16), iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 50257, 10**6)
        counts = {f"{split}_tokens": write_tokens(Path(folder) / f"{split}.bin", [tokens])
                  for split in SPLITS}
        write_meta(folder, {"kind": "text", "tokenizer": "gpt2", "vocab_size": shape.vocab_size, **counts})
        dataset = ReadAhead(open_dataset(folder, shape.block_size, batch_size), 1, windows // batch_size)
        model, same, peer = (GPT(shape).to(device) for _ in range(3))
        run = train.make_replica(model, dataset, loop)
        optimizers = configure_optimizers(model, loop)
        steps = {"ours": lambda: train.train_step(run, optimizers, dataset, next(number), loop, device,
                                                  autocast)}
        for name, other, size in (("same", same, batch_size), ("peer", peer, nanogpt_batch_size)):
            steps[name] = nanogpt_step(dataset, other, size, shape.block_size, device, autocast,
                                       windows // size)

        def finished(step):
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        seconds = {}
        for name, step in steps.items():
            torch.compiler.reset()  # or the graph of one model would be tried for the next one too
            in_turn(2, **{name: functools.partial(finished, step)})  # to compile
            seconds |= in_turn(3 * runs, **{name: functools.partial(finished, step)})
    speed = {name: [windows * shape.block_size / second for second in values]
             for name, values in seconds.items()}
    each = model.flops(1, 1, shape.block_size)  # a token's, at block_size pairs a token
    share = statistics.median(speed["ours"]) * each / peak if peak else None
    targets = ("same", batch_size, ""), ("peer", nanogpt_batch_size, "1.2 or more; aim 50%")
    for name, size, target in targets:
        yield line(f"training, GPU; nanoGPT's way, batches of {size}", speed["ours"], speed[name], "tokens/s",
                   target, share=share)


class Llama:
    """llama.cpp with our own GGUF of a model and a thread for each of ours. It has a process of its own: in one,
    its threads and PyTorch's would slow each other down."""

    def __init__(self, model, dtype):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/it.gguf"
            write_gguf(path, model.config, exported_weights(model), "gpt2", dtype)
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_llama,
                                            (path, model.config.block_size, torch.get_num_threads()))
            self.reading([0])  # the file is open by then

    def reading(self, ids):
        """Seconds to read a prompt, as it measures itself."""
        return self.pool.submit(ask_llama, ids, 1).result()["prompt_ms"] / 1000

    def writing(self, ids, new):
        """Seconds for `new` tokens behind the first, as it measures itself."""
        return self.pool.submit(ask_llama, ids, new + 1).result()["predicted_ms"] / 1000


@contextlib.contextmanager
def llamas(model):
    """{"float32": a Llama, "int8": one}, or None for each where llama.cpp is not installed."""
    dtypes = {"float32": "float32", "int8": "q8_0"}
    peers = {name: Llama(model, dtype) if find_spec("xllamacpp") else None for name, dtype in dtypes.items()}
    try:
        yield peers
    finally:
        for peer in filter(None, peers.values()):
            peer.pool.shutdown()


def start_llama(path, context, threads):
    """In a process of its own: llama.cpp's server, with a file."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.ui, params.fit_params = True, False, False
    start_llama.server = xllamacpp.Server(params)


def ask_llama(ids, new):
    """There: what it says of its time for a prompt and `new` tokens."""
    return start_llama.server.handle_completions({
        "prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False})["timings"]


def beside_llama(what, name, speed, target):
    """The line of a table that has llama.cpp as the peer, if it is installed."""
    if peer := speed.get(f"{name}; llama.cpp"):
        yield line(f"{what}; llama.cpp", speed[name], peer, "tokens/s", target)
    else:
        print(f"{what}; llama.cpp: pip install xllamacpp, and it is compared", flush=True)


def fast(model, int8=False):
    """A copy of a model as chat.py has it."""
    model = copy.deepcopy(model).eval()
    make_fast(model, int8)
    return model


def writing(model, ids, new):
    """Seconds for `new` tokens behind the first one, which takes reading the prompt."""
    made = model.generate(ids, new + 1, temperature=0)
    next(made)
    began = time.perf_counter()
    assert len(list(made)) == new
    return time.perf_counter() - began


def decode(s):
    """Tokens a second for one conversation: GPT-2 124M, 128 new ones behind 64 and behind 900; and the model
    that make chat trains."""
    model = gpt2_shape().eval()
    peer, ids = as_transformers(model).eval(), torch.randint(0, 50257, (900,)).tolist()
    ours = {"float32": fast(model), "int8": fast(model, int8=True)}

    @torch.no_grad()
    def transformers():
        seconds = []
        for new in (1, 129):
            began = time.perf_counter()
            peer.generate(torch.tensor([ids[:64]]), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                          pad_token_id=50256)
            seconds.append(time.perf_counter() - began)
        return seconds[1] - seconds[0]

    functions, cases = {"transformers": transformers, "read": large_read()}, {}
    with llamas(model) as llama:
        for name in ours:
            for context, new in ((64, 128), (900, 64)):
                case = f"{name}, {new} tokens behind {context}"
                cases[case] = (name, context, new)
                functions[case] = functools.partial(writing, ours[name], ids[:context], new)
                if llama[name]:
                    functions[f"{case}; llama.cpp"] = functools.partial(llama[name].writing, ids[:context], new)
        seconds = in_turn(max(s.runs, 5), **functions)
    bandwidth = READ / statistics.median(seconds["read"])
    weights = model.num_params() - model.wpe.weight.numel()  # all are read for each token
    for case, (name, context, new) in cases.items():
        speed = {which: [new / second for second in values] for which, values in seconds.items()}
        share = weights * {"float32": 4, "int8": 1}[name] * statistics.median(speed[case]) / bandwidth
        if context == 64:
            yield line(f"decode, 124M, {case}; transformers", speed[case], speed["transformers"], "tokens/s",
                       share=share)
        yield from beside_llama(f"decode, 124M, {case}", case, speed, "1 or more, aim of int8 1.1")
    small = chat_shape()
    seconds = in_turn(max(s.runs, 5), plain=lambda: writing(small, list(range(64)), 128),
                      fast=functools.partial(writing, fast(small), list(range(64)), 128))
    speed = {name: [128 / second for second in values] for name, values in seconds.items()}
    yield line("decode, make chat's shape; PyTorch's layers", speed["fast"], speed["plain"], "tokens/s", "2 or more")


def prefill(s):
    """Reading a prompt of 512 tokens, to the first new one; and a second turn after 900 tokens of a chat."""
    model = gpt2_shape().eval()
    peer, ids = as_transformers(model).eval(), torch.randint(0, 50257, (932,)).tolist()
    ours = {"float32": fast(model), "int8": fast(model, int8=True)}
    cache = KVCache(ours["float32"])

    def first(which, n, **more):
        next(ours[which].generate(ids[:n], 1, temperature=0, **more))

    @torch.no_grad()
    def theirs():
        peer(torch.tensor([ids[:512]]), use_cache=True, logits_to_keep=1)

    def second_turn():
        del cache.ids[900:]
        first("float32", 932, cache=cache)

    first("float32", 932, cache=cache)
    functions = {"transformers": theirs, "second": second_turn, "whole": lambda: first("float32", 932),
                 "product": large_product()}
    for name in ours:
        functions[name] = functools.partial(first, name, 512)
    with llamas(model) as llama:
        for name in filter(llama.get, ours):
            functions[f"{name}; llama.cpp"] = functools.partial(llama[name].reading, ids[:512])
        seconds = in_turn(max(s.runs, 5), **functions)
    speed = {name: [512 / second for second in values] for name, values in seconds.items()}
    flops = model.flops(1, 512, 512**2) / 3  # forward only
    yield line("prefill, 124M, 512 tokens; transformers", speed["float32"], speed["transformers"], "tokens/s",
               "1.2 or more", share=share_of_peak(flops, seconds["float32"], seconds["product"]))
    for name, target in (("float32", "2 or more"), ("int8", "1.5 or more")):
        yield from beside_llama(f"prefill, 124M, 512 tokens, {name}", name, speed, target)
    yield line("second turn, 900 + 32 tokens; from the start", seconds["second"], seconds["whole"], "s",
               "10 or more", smaller=True)


def load(s):
    """From a checkpoint file to the first logits, GPT-2 124M; and a whole chat.py, beyond `import torch`."""
    with tempfile.TemporaryDirectory() as folder:
        folder, model = Path(folder), gpt2_shape()
        made = {"step": 1, "max_iters": 1, "turns": 1}
        save_checkpoint(folder / "best.pt", model_checkpoint(model, "gpt2", "chat", **made))
        (folder / "hf").mkdir()
        write_hf_model(folder / "hf", model.config, to_gpt2_names(model))
        ids = torch.tensor([[1, 2, 3]])

        @torch.no_grad()
        def ours():
            loaded = model_from_checkpoint(load_checkpoint(folder / "best.pt")).eval()
            make_fast(loaded)
            loaded(ids)

        @torch.no_grad()
        def theirs():
            from transformers import GPT2LMHeadModel
            GPT2LMHeadModel.from_pretrained(folder / "hf").eval()(ids)

        def python(*argv):
            subprocess.run([sys.executable, *map(str, argv)], cwd=REPO, check=True, stdout=subprocess.DEVNULL)

        theirs()  # imports
        seconds = in_turn(s.runs, ours=ours, peer=theirs, torch=lambda: python("-c", "import torch"),
                          chat=lambda: python("chat.py", f"--checkpoint={folder / 'best.pt'}", "--prompt=Hi",
                                              "--max_new_tokens=1"))
        yield line("load 124M to first logits; transformers", seconds["ours"], seconds["peer"], "s", "",
                   smaller=True)
        beyond = statistics.median(seconds["chat"]) - statistics.median(seconds["torch"])
        yield line("chat.py to its first token; import torch", seconds["chat"], seconds["torch"], "s",
                   f"{beyond:.2f} s beyond; 1 or less", smaller=True)


@torch.no_grad()
def int8_quality(s):
    """Perplexity with int8 weights and with float32 ones, on 50,000 tokens held out from the data that the
    checkpoint was trained on, read in windows and (as a chat writes) token by token."""
    checkpoint = load_checkpoint(s.checkpoint, "Name one that was trained: --checkpoint=FILE.")
    tokens = np.fromfile(Path(checkpoint["settings"]["data_dir"]) / "val.bin", np.uint16)[:50_000]
    exact, small = model_from_checkpoint(checkpoint).eval(), model_from_checkpoint(checkpoint).eval()
    make_fast(exact)
    make_fast(small, int8=True)
    for name in ("in windows", "token by token"):
        loss = dict.fromkeys(("float32", "int8"), 0.0)
        for which, model in (("float32", exact), ("int8", small)):
            for start in range(0, len(tokens) - 1, model.config.block_size):
                ids = torch.from_numpy(tokens[start:start + model.config.block_size + 1].astype(np.int64))
                cache = KVCache(model)
                logits = model(ids[None, :-1])[0] if name == "in windows" else torch.cat(
                    [model.head(model.hidden(i.view(1, 1), cache, t))[0] for t, i in enumerate(ids[:-1])])
                loss[which] += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        perplexity = {which: math.exp(total / (len(tokens) - 1)) for which, total in loss.items()}
        yield line(f"perplexity, int8, {name}; float32", [perplexity["int8"]], [perplexity["float32"]], "",
                   "0.99 or more", smaller=True)


def growth(s):
    """How cost grows: a step's time by batch, context and width; memory by input size and by steps."""
    base = {"batch": 16, "context": 128, "width": 128}
    for name, values in (("batch", (8, 16, 32, 64)), ("context", (64, 128, 256, 512)),
                         ("width", (64, 128, 256, 512))):
        for value in values:
            shape = {**base, name: value}
            model = GPT(GPTConfig(256, shape["context"], 4, 4, shape["width"]))
            ids = torch.randint(0, 256, (shape["batch"], shape["context"] + 1))

            def step(model=model, ids=ids):
                model(ids[:, :-1], ids[:, 1:].reshape(-1)).backward()
                model.zero_grad()

            seconds = statistics.median(in_turn(3 * s.runs, step=step)["step"])
            print(f"forward + backward at {name} {value:<6}{1e3 * seconds:>10.1f} ms"
                  f"{1e6 * seconds / ids[:, 1:].numel():>10.2f} us a token", flush=True)
            yield {"what": f"forward + backward, {name} {value}", "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        text = s.shakespeare.read_text(encoding="utf-8")
        for times in (64, 8, 1):  # the last is small: what is read of a memmap counts as memory too
            (Path(folder) / "text.txt").write_text(text * times, encoding="utf-8")
            most = memory_of([REPO / "data" / "text.py", f"--source={folder}/text.txt",
                              f"--out_dir={folder}"])
            print(f"memory of preparing {times * len(text) / 1e6:>6.1f} MB of text {most / 1e6:>10.0f} MB")
            yield {"what": f"memory of preparing text x {times}", "bytes": most}
        for steps in (500, 5000):
            most = memory_of([REPO / "train.py", f"--data_dir={folder}", f"--out_dir={folder}/out",
                              "--n_layer=1", "--n_embd=32", "--block_size=32", f"--max_iters={steps}"])
            print(f"memory of training {steps:>6} steps {most / 1e6:>10.0f} MB")
            yield {"what": f"memory of training {steps} steps", "bytes": most}


# Linux counts a process's peak (ru_maxrss) from that of the process that started it: ours, which is large.
PEAK = """
import resource, runpy, sys
sys.argv, sys.path[0] = sys.argv[1:], "."
runpy.run_path(sys.argv[0], run_name="__main__")
if sys.platform == "linux":
    with open("/proc/self/status", encoding="utf-8") as f:
        peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak, file=sys.stderr)
"""


def memory_of(argv):
    """Run a script: the bytes of memory it had at its peak."""
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, argv)], cwd=REPO, check=True, encoding="utf-8",
                          capture_output=True)
    return int(done.stderr.split()[-1])


def prepare(s):
    """Preparing all of Alpaca, against tiktoken's encoding of the same strings alone."""
    with tempfile.TemporaryDirectory() as folder:
        source = prepare_alpaca.fetch(s.alpaca, Path(folder))
        texts = [m["content"] for messages, _ in read_conversations(source) for m in messages]
        enc = get_tokenizer("gpt2")
        seconds = in_turn(s.runs, raw=lambda: enc.encode_ordinary_batch(texts), ours=lambda: quiet(
            prepare_alpaca.main, [f"--source={source}", f"--out_dir={folder}/alpaca"]))
    yield line("prepare Alpaca; tiktoken's encode alone", seconds["ours"], seconds["raw"], "s",
               "0.5 or more", smaller=True)


def finetune_alpaca(s):
    """Finetuning, GPT-2 124M, float32: supervised tokens a second of finetune.py's step and of the usual loop
    over transformers (random batches of 8, padded), on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = json.loads(prepare_alpaca.fetch(s.alpaca, folder).read_text(encoding="utf-8"))
        rows = random.Random(0).sample(rows, min(s.rows * 21 // 20, len(rows)))
        write_json(folder / "rows.json", rows)
        quiet(prepare_alpaca.main, [f"--source={folder / 'rows.json'}", f"--out_dir={folder}"])
        dataset = open_dataset(folder, 1024, 1)
        chats = dataset.conversations("train")
    enc, model = get_tokenizer("gpt2"), gpt2_shape()
    peer = as_transformers(model).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)
    settings = finetune.Settings(learning_rate=1e-5, warmup_iters=0, max_iters=10**6, dropout=0.0)
    optimizers = configure_optimizers(model, settings)
    order = torch.randperm(len(chats)).tolist()
    padded = [[chats[i] for i in order[n:n + 8]] for n in range(0, len(order), 8)]

    def their_step(batch):
        longest = max(map(len, batch))
        ids = torch.tensor([row + [dataset.pad_id] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        right = np.array([np.pad(supervised(row, enc), (0, longest - len(row))) for row in batch])
        labels = torch.where(torch.from_numpy(right), ids, -100)
        peer(ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(right.sum())

    def our_step(step):
        targets = dataset.batch("train", step)[1].size
        train.train_step(model, optimizers, dataset, step, settings, CPU, contextlib.nullcontext())
        return targets

    speeds = {"ours": [], "peer": []}
    steps = dataset.batches_until("train", 1)
    for part in range(s.runs):  # each run is a part of the epoch
        for name, items, do in (("ours", range(steps), our_step), ("peer", padded, their_step)):
            began = time.perf_counter()
            targets = sum(do(item) for item in items[part::s.runs])
            speeds[name].append(targets / (time.perf_counter() - began))
    yield line(f"finetune, {len(chats)} Alpaca rows, 124M; transformers", speeds["ours"], speeds["peer"],
               "targets/s", "2 or more")


def train_and_measure(argv, folder, out_dir):
    """Run train.py's loop: (seconds of training and saving, loss on all of the validation text)."""
    s = config.load(train.Settings, [str(REPO / "config/train_shakespeare.py"), f"--data_dir={folder}",
                                     f"--out_dir={out_dir}", "--eval_interval=1000000", "--eval_tokens=64",
                                     "--sample_interval=0", *argv])
    torch.manual_seed(s.seed)
    dataset = open_dataset(folder, s.block_size, s.batch_size, s.seed)
    model = GPT(GPTConfig(dataset.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))
    _, seconds = quiet(train.train, s, model, dataset, CPU, torch.float32)
    model = model_from_checkpoint(load_checkpoint(s.out_dir / "last.pt"))
    return seconds, train.evaluate(model, dataset, "val", replace(s, eval_tokens=10**9), CPU,
                                   contextlib.nullcontext())


# A shorter run likes shorter memories.
SHORT_STEPS = 210
SHORT = [f"--max_iters={SHORT_STEPS}", "--learning_rate=2.5e-2", "--embedding_learning_rate=1.4e-2",
         "--momentum=0.85", "--beta1=0.7", "--beta2=0.95", "--warmup_iters=5", "--final_lr=0.05"]


def shakespeare(s):
    """Time to a validation loss: Muon, with settings tuned for this, against AdamW with nanoGPT's published
    recipe for a CPU; the same model, each run with another seed."""
    adamw = ["--optimizer=adamw", "--batch_size=12", "--max_iters=2000", "--learning_rate=1e-3",
             "--final_lr=0.1", "--decay=cosine", "--warmup_iters=100", "--weight_decay=0.1", "--beta1=0.9",
             "--beta2=0.99"]
    with tempfile.TemporaryDirectory() as folder:
        quiet(data.text.main, [f"--source={s.shakespeare}", f"--out_dir={folder}", "--tokenizer=bytes"])
        rows = {"short": [], "adamw": [], "long": []}
        for run in range(s.runs):
            for name, argv in (("short", SHORT), ("adamw", adamw), ("long", [])):
                rows[name].append(train_and_measure([*argv, f"--seed={1337 + run}"], folder,
                                                    f"{folder}/{name}{run}"))
    seconds, losses = ({name: [row[i] for row in rows[name]] for name in rows} for i in (0, 1))
    shown = {"short": (f"Muon, {SHORT_STEPS} steps", "4 or more; aim 6"), "long": ("Muon", "1 or more")}
    for name, (what, target) in shown.items():
        yield line(f"Shakespeare: {what}; AdamW, nanoGPT's recipe", seconds[name], seconds["adamw"], "s",
                   target, smaller=True)
        yield line("  and the validation loss reached", losses[name], losses["adamw"], "nats", "",
                   smaller=True)


# What is tried on the small instruction data: a name and what differs from config/train_recite.py at 400 steps.
VARIED = {
    "as it is": [],
    "batch 1/2, twice the steps": ["--batch_size=4", "--max_iters=800"],
    "batch x 2, half the steps": ["--batch_size=16", "--max_iters=200"],
    "learning rates / 4": ["--learning_rate=3.5e-3", "--embedding_learning_rate=1.75e-3"],
    "learning rates x 4": ["--learning_rate=5.6e-2", "--embedding_learning_rate=2.8e-2"],
    "AdamW for all, 1e-3": ["--optimizer=adamw", "--learning_rate=1e-3"],
    "2 layers": ["--n_layer=2"],
    "8 layers": ["--n_layer=8"],
    "64 wide": ["--n_embd=64"],
    "256 wide": ["--n_embd=256"],
    "context 32, same tokens a step": ["--block_size=32", "--batch_size=32"],
    "context 256, same tokens a step": ["--block_size=256", "--batch_size=4"],
    "dropout 0.2": ["--dropout=0.2"],
    "200 steps": ["--max_iters=200"],
    "800 steps": ["--max_iters=800"],
}


def vary(s):
    """What batch, learning rate, depth, width and context do on the small instruction data: time, losses, and
    answers right among the held-out rows and as many that were trained on."""
    print(f"{'config/train_recite.py, 400 steps, but':<34}{'parameters':>11}{'seconds':>9}{'training':>10}"
          f"{'lowest val':>12}{'right: trained':>16}{'held out':>10}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        quiet(prepare_alpaca.main, [str(REPO / "config/prepare_instruction.py"), f"--out_dir={folder}"])
        for name, argv in VARIED.items():
            _, seconds = quiet(train.main, [str(REPO / "config/train_recite.py"), f"--data_dir={folder}",
                                            f"--out_dir={folder / 'out'}", "--max_iters=400", *argv,
                                            "--eval_interval=100", "--device=cpu"])
            checkpoint = load_checkpoint(folder / "out" / "best.pt")
            model, enc = model_from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint["tokenizer"])
            right = {}
            for group, rows in chat.rows_to_score(folder, 0).items():
                scored = [chat.score_row(model, enc, messages) for messages, _ in rows]
                short_enough = [row for row in scored if row]
                right[group] = sum(row["right"] for row in short_enough) / len(short_enough)
            losses = list(zip(*checkpoint["history"]))
            result = {"what": name, "parameters": model.num_params(), "seconds": seconds,
                      "train_loss": losses[1][-1], "val_loss": min(losses[2]), **right}
            print(f"{name:<34}{result['parameters']:>11,}{seconds:>9.0f}{result['train_loss']:>10.3f}"
                  f"{result['val_loss']:>12.3f}{right['trained on']:>16.0%}{right['held out']:>10.0%}",
                  flush=True)
            yield result


# How many different rows the model of config/train_rules.py sees, in how many steps; and how many it is asked.
ROWS, ROW_STEPS, ASKED = (0, 300, 1_000, 3_000, 10_000, 30_000, 100_000), 1600, 300


def share_right(checkpoint, conversations):
    """The share of conversations whose last answer a model gives word for word, always the likeliest token."""
    model, enc = model_from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint["tokenizer"])
    make_fast(model)
    scored = [chat.score_row(model, enc, messages) for messages in conversations]
    return sum(row["right"] for row in scored if row) / len(scored)


def rows(s):
    """Reciting or learning the rule: one model and one number of steps on more and more different rows; how
    many it answers right of those it was trained on, and of held-out words and numbers. Draws the table."""
    print(f"{'generated rows':>14}{'read':>8}{'training loss':>15}{'right: trained on':>19}{'held out':>10}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {count: folder / f"{count}.json" for count in ROWS[1:]}
        for count, path in files.items():
            quiet(data.rules.main, [f"--rows={count}", f"--out={path}"])
        asked = folder / "held_out.json"
        quiet(data.rules.main, [f"--rows={ASKED}", "--operands=held_out", f"--out={asked}"])
        prepare = [str(REPO / "config/prepare_rules.py"), f"--out_dir={folder / 'data'}"]
        quiet(prepare_alpaca.main, [*prepare, f"--extra={files[ROWS[-1]]}"])  # one tokenizer for all
        tokenizer = (folder / "data" / "tokenizer.json").rename(folder / "tokenizer.json")
        for count in ROWS:
            quiet(prepare_alpaca.main, [*prepare, f"--tokenizer={tokenizer}", f"--extra={files.get(count)}"])
            quiet(train.main, [str(REPO / "config/train_rules.py"), f"--data_dir={folder / 'data'}",
                               f"--out_dir={folder / 'out'}", f"--max_iters={ROW_STEPS}", "--device=cpu",
                               f"--read_iters={ROW_STEPS * 7 // 10}", f"--eval_interval={ROW_STEPS}"])
            checkpoint = load_checkpoint(folder / "out" / "best.pt")
            source = files.get(count) or REPO / "data/instruction/instruction-data.json"
            trained = [messages for messages, _ in chat.rows_to_score(source, ASKED)["rows"]]
            held_out = [messages for messages, _ in read_conversations(asked)]
            dataset = open_dataset(folder / "data", 256, 4)
            result = {"what": "rows", "rows": count, "epochs": dataset.epochs("train", ROW_STEPS),
                      "train_loss": checkpoint["history"][-1][1],
                      "trained on": share_right(checkpoint, trained),
                      "held out": share_right(checkpoint, held_out)}
            results.append(result)
            print(f"{count:>14,}{result['epochs']:>7.1f}x{result['train_loss']:>15.3f}"
                  f"{result['trained on']:>19.0%}{result['held out']:>10.0%}", flush=True)
            yield result
    draw_rows(REPO / "out" / "rows.png", results)


# Each part, and about how many minutes it takes on two cores.
PARTS = {"train": (forward_backward, 1), "step": (shakespeare_step, 3), "gpu": (gpu, 2), "decode": (decode, 4),
         "prefill": (prefill, 1), "load": (load, 1), "prepare": (prepare, 1), "finetune": (finetune_alpaca, 9),
         "shakespeare": (shakespeare, 11), "int8": (int8_quality, 1), "growth": (growth, 3), "vary": (vary, 15),
         "rows": (rows, 15)}


def described():
    """The text of --help: of the parts, too."""
    lines = [__doc__, "Parts, and about how many minutes each takes on two cores:", ""]
    for name, (part, minutes) in PARTS.items():
        lines += textwrap.wrap(" ".join(part.__doc__.split()), 98, initial_indent=f"  {name:<12}{minutes:>3}  ",
                               subsequent_indent=" " * 19)
    return "\n".join(lines)


def main(argv):
    names = [arg for arg in argv if not arg.startswith("-")]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r}; parts are {', '.join(PARTS)}")
    s = config.load(Settings, [arg for arg in argv if arg.startswith("-")], described())
    names = names or list(PARTS)
    shakespeare = "python -m data.text config/prepare_shakespeare.py, or --shakespeare=FILE"
    for parts, path, remedy in (({"step", "shakespeare", "growth"}, s.shakespeare, shakespeare),
                                ({"int8"}, s.checkpoint, "make chat, or --checkpoint=FILE")):
        wanted = ", ".join(sorted(parts.intersection(names)))
        if wanted and not path.is_file():
            raise ValueError(f"{path}: no such file, and {wanted} needs it: {remedy}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"{'what; the peer':<48}{'ours':>28}{'peer':>28} {'':<10}{'ratio':>6}{'share':>7}  target")
    results = []
    for name in names:
        part, _ = PARTS[name]
        try:
            results += part(s)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} compares with {error.name}, which is not installed: "
                             "pip install -r requirements-dev.txt") from error
        if s.json:
            write_json(s.json, results)


if __name__ == "__main__":
    config.run(main)
