"""How fast it is, measured on the machine it runs on, ours and the other in turn.

    python -m tests.bench                                       # everything
    python -m tests.bench shakespeare --source=input.txt        # one part
"""
import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import data.text
import train
from data.tokens import open_dataset
from model import GPT, GPTConfig, load_checkpoint, model_from_checkpoint, pick_device

REPO = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    source: Path = Path("data/shakespeare/input.txt")  # tiny Shakespeare
    runs: int = 1  # repeats of each measurement; medians are shown


def quiet(function, *args):
    """Call function without its printing; returns (its result, seconds)."""
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.monotonic()
        result = function(*args)
        return result, time.monotonic() - began


def train_and_measure(argv, folder, out_dir):
    """Run train.py's loop: (seconds of training and saving, loss on all of the validation text)."""
    s = config.load(train.Settings, [str(REPO / "config/train_shakespeare.py"), f"--data_dir={folder}",
                                     f"--out_dir={out_dir}", "--eval_interval=1000000", "--eval_tokens=64",
                                     *argv])
    device, dtype, _ = pick_device("cpu", "float32")
    torch.manual_seed(s.seed)
    dataset = open_dataset(folder, s.block_size, s.batch_size, s.seed)
    model = GPT(GPTConfig(dataset.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))
    _, seconds = quiet(train.train, s, model, dataset, device, dtype)
    model = model_from_checkpoint(load_checkpoint(s.out_dir / "last.pt"))
    return seconds, train.evaluate(model, dataset, "val", 10**9, device, contextlib.nullcontext())


def shakespeare(settings):
    """Time to a validation loss: Muon against AdamW with nanoGPT's recipe for a CPU, the same model."""
    adamw = ["--optimizer=adamw", "--batch_size=12", "--max_iters=2000", "--learning_rate=1e-3",
             "--final_lr=0.1", "--decay=cosine", "--warmup_iters=100", "--weight_decay=0.1", "--beta1=0.9",
             "--beta2=0.99"]
    with tempfile.TemporaryDirectory() as folder:
        quiet(data.text.main, [f"--source={settings.source}", f"--out_dir={folder}", "--tokenizer=bytes"])
        for run in range(settings.runs):
            rows = [(name, *train_and_measure(argv, folder, f"{folder}/{run}/{name}")) for name, argv in (
                ("short", SHORT), ("adamw", adamw), ("long", []))]
            base = rows[1][1]
            title = f"tiny Shakespeare, run {run + 1}"
            print(f"{title:<26}{'validation':>12}{'seconds':>10}{'of AdamW':>10}")
            for (_, seconds, loss), name in zip(rows, (
                    "Muon, " + SHORT[0][2:], "AdamW, nanoGPT's recipe", "Muon, as configured")):
                print(f"{name:<26}{loss:>12.4f}{seconds:>10.1f}{seconds / base:>10.2f}", flush=True)


# A shorter run likes shorter memories.
SHORT = ["--max_iters=205", "--learning_rate=2.5e-2", "--momentum=0.85", "--beta1=0.8", "--beta2=0.95",
         "--warmup_iters=5"]
PARTS = {"shakespeare": shakespeare}


def main(argv):
    names = [arg for arg in argv if not arg.startswith("-")]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r}; parts are {', '.join(PARTS)}")
    settings = config.load(Settings, [arg for arg in argv if arg.startswith("-")], __doc__)
    for name in names or PARTS:
        PARTS[name](settings)


if __name__ == "__main__":
    config.run(main)
