"""tests/bench.py: its parts run at toy size, and its copy of nanoGPT's forward pass has the same loss."""
import json

import pytest
import torch

from data.datasets import write_tokens
from model import GPT, GPTConfig
from runtime.checkpoint import model_state, save_checkpoint
from tests import bench


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Return settings of a benchmark of toy models."""
    for name, value in {"GPT2": GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32), "DECODE": ((8, 4), (16, 4)),
                        "llama": lambda model, dtype: None}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.alternate_steps, "__defaults__", (1, 16))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}, then."} for i in range(40)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    model = GPT(GPTConfig(260, block_size=16, n_layer=1, n_head=2, n_embd=32))
    save_checkpoint(tmp_path / "best.pt", model_state(model, "bytes", "text", step=1, max_iters=1,
                                                      settings={"data_dir": str(tmp_path)}))
    write_tokens(tmp_path / "val.bin", [list(range(50))])
    return bench.Settings(shakespeare=tmp_path / "text.txt", alpaca=str(tmp_path / "alpaca.json"), rows=20, runs=1,
                          checkpoint=tmp_path / "best.pt")


@pytest.mark.parametrize("part, n_rows", [("train", 1), ("step", 2), ("decode", 2), ("prefill", 1), ("int8", 1),
                                          ("finetune", 1)])
def test_a_part_measures_something(part, n_rows, toy, gpt2_vocabulary):
    rows = list(bench.PARTS[part](toy))
    assert len(rows) == n_rows
    assert all(min(*row["ours"], *row["peer"]) > 0 and row["ratio"] > 0 for row in rows)


def test_nanogpts_code_has_the_same_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=16))
    ids = torch.arange(34).view(2, 17)
    idx, targets = ids[:, :-1], ids[:, 1:]
    ours = model(idx, targets).item() / targets.numel()
    assert bench.nanogpt_loss(model)(idx, targets).item() == pytest.approx(ours, abs=1e-3)
