"""How fast it is, measured on the machine it runs on: ours and what a user would take instead, in turn.

    pip install -r requirements-dev.txt            # the peers
    python -m tests.bench                          # everything
    python -m tests.bench finetune prepare         # some parts
    python -m tests.bench decode --json=bench.json

A line of the table: what, ours and the peer as medians (least to most), and their ratio, above 1 where ours
is better. Never a test: machines vary by a third from minute to minute, so only ratios mean something.
"""
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import chat
import config
import data.text
import finetune
import prepare_alpaca
import train
from data.conversation import read_conversations, supervised
from data.tokenizer import get_tokenizer
from data.tokens import open_dataset
from model import GPT, GPTConfig, load_checkpoint, model_from_checkpoint, write_json

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@dataclass
class Settings:
    shakespeare: Path = Path("data/shakespeare/input.txt")  # tiny Shakespeare (data/text.py downloads it)
    alpaca: str = prepare_alpaca.ALPACA_URL  # Stanford Alpaca: a file, or the address it is fetched from
    rows: int = 400  # of Alpaca, for finetuning
    runs: int = 3  # repeats of each measurement
    json: Path | None = None  # where the table goes too, as JSON


def in_turn(runs, **functions):
    """Call each function `runs` times, one after the other in turn: {name: [seconds, ...]}."""
    seconds = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def line(what, ours, peer, unit, target="", smaller=False):
    """One line of the table, printed and returned: lists of measurements, ours and the peer's; `smaller`
    where less is better."""
    middle = [statistics.median(values) for values in (ours, peer)]
    ratio = middle[1] / middle[0] if smaller else middle[0] / middle[1]
    cells = [f"{m:,.4g} ({min(v):,.4g} to {max(v):,.4g})" for m, v in zip(middle, (ours, peer))]
    print(f"{what:<44}{cells[0]:>28}{cells[1]:>28} {unit:<10}{ratio:>6.2f}  {target}", flush=True)
    return {"what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target}


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


def as_transformers(model):
    """The same model in transformers."""
    from transformers import GPT2LMHeadModel
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder)


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
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5)
    settings = finetune.Settings(learning_rate=1e-5, warmup_iters=0, max_iters=10**6, dropout=0.0)
    optimizers = model.configure_optimizers("adamw", 1e-5, 1e-5, 0.0, (0.9, 0.99))
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
                                     *argv])
    torch.manual_seed(s.seed)
    dataset = open_dataset(folder, s.block_size, s.batch_size, s.seed)
    model = GPT(GPTConfig(dataset.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))
    _, seconds = quiet(train.train, s, model, dataset, CPU, torch.float32)
    model = model_from_checkpoint(load_checkpoint(s.out_dir / "last.pt"))
    return seconds, train.evaluate(model, dataset, "val", 10**9, CPU, contextlib.nullcontext())


def shakespeare(s):
    """Time to a validation loss: Muon against AdamW with nanoGPT's recipe for a CPU, the same model."""
    adamw = ["--optimizer=adamw", "--batch_size=12", "--max_iters=2000", "--learning_rate=1e-3",
             "--final_lr=0.1", "--decay=cosine", "--warmup_iters=100", "--weight_decay=0.1", "--beta1=0.9",
             "--beta2=0.99"]
    with tempfile.TemporaryDirectory() as folder:
        quiet(data.text.main, [f"--source={s.shakespeare}", f"--out_dir={folder}", "--tokenizer=bytes"])
        rows = {name: [train_and_measure(argv, folder, f"{folder}/{name}{run}") for run in range(s.runs)]
                for name, argv in (("short", SHORT), ("adamw", adamw), ("long", []))}
    seconds, losses = ({name: [row[i] for row in rows[name]] for name in rows} for i in (0, 1))
    for name, what, target in (("short", "Muon, 205 steps", "4 or more"), ("long", "Muon", "1 or more")):
        yield line(f"Shakespeare: {what}; AdamW, nanoGPT's recipe", seconds[name], seconds["adamw"], "s",
                   target, smaller=True)
        yield line("  and the validation loss reached", losses[name], losses["adamw"], "nats", "",
                   smaller=True)


# What is tried on the small instruction data: a name and what differs from config/train_chat.py at 400 steps.
VARIED = {
    "as it is": [],
    "batch 1/2, twice the steps": ["--batch_size=4", "--max_iters=800"],
    "batch x 2, half the steps": ["--batch_size=16", "--max_iters=200"],
    "learning rates / 4": ["--learning_rate=5e-3", "--embedding_learning_rate=2.5e-3"],
    "learning rates x 4": ["--learning_rate=8e-2", "--embedding_learning_rate=4e-2"],
    "AdamW for all, 3e-3": ["--optimizer=adamw", "--learning_rate=3e-3"],
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
    print(f"{'config/train_chat.py, 400 steps, but':<34}{'parameters':>11}{'seconds':>9}{'training':>10}"
          f"{'lowest val':>12}{'right: trained':>16}{'held out':>10}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        quiet(prepare_alpaca.main, [str(REPO / "config/prepare_instruction.py"), f"--out_dir={folder}"])
        for name, argv in VARIED.items():
            _, seconds = quiet(train.main, [str(REPO / "config/train_chat.py"), f"--data_dir={folder}",
                                            f"--out_dir={folder / 'out'}", "--max_iters=400", *argv,
                                            "--eval_interval=100", "--device=cpu"])
            checkpoint = load_checkpoint(folder / "out" / "best.pt")
            model, enc = model_from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint["tokenizer"])
            right = {}
            for group, rows in chat.rows_to_score(folder, 0).items():
                scored = [chat.score_row(model, enc, messages) for messages, _ in rows]
                right[group] = sum(r is not None and r["right"] for r in scored) / len(rows)
            losses = list(zip(*checkpoint["history"]))
            result = {"what": name, "parameters": model.num_params(), "seconds": seconds,
                      "train_loss": losses[1][-1], "val_loss": min(losses[2]), **right}
            print(f"{name:<34}{result['parameters']:>11,}{seconds:>9.0f}{result['train_loss']:>10.3f}"
                  f"{result['val_loss']:>12.3f}{right['trained on']:>16.0%}{right['held out']:>10.0%}",
                  flush=True)
            yield result


# A shorter run likes shorter memories.
SHORT = ["--max_iters=205", "--learning_rate=2.5e-2", "--momentum=0.85", "--beta1=0.8", "--beta2=0.95",
         "--warmup_iters=5"]
PARTS = {"prepare": prepare, "finetune": finetune_alpaca, "shakespeare": shakespeare, "vary": vary}


def main(argv):
    names = [arg for arg in argv if not arg.startswith("-")]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r}; parts are {', '.join(PARTS)}")
    s = config.load(Settings, [arg for arg in argv if arg.startswith("-")], __doc__)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"{'what; the peer':<44}{'ours':>28}{'peer':>28} {'':<10}{'ratio':>6}  target")
    results = [result for name in names or PARTS for result in PARTS[name](s)]
    if s.json:
        write_json(s.json, results)


if __name__ == "__main__":
    config.run(main)
