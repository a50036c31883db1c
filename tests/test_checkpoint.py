"""runtime/checkpoint.py: what is saved can be loaded, version 1.0's files too; a damaged or hostile file gives a one-line
error and executes nothing."""
import math
import os
import re

import pytest
import torch

import model
from config import UserError
from runtime.checkpoint import (
    load_checkpoint,
    load_model,
    load_pretrained,
    model_state,
    save_checkpoint,
)
from tests.test_model import NH, C, T, close, np_gpt, random_ids, toy


def save_toy(path, **changes):
    gpt = toy(vocab_size=260)  # as many ids as the tokenizer "bytes" has
    save_checkpoint(path, {**model_state(gpt, "bytes", "text", step=3, max_iters=5), **changes})
    return gpt


def test_a_checkpoint_restores_the_same_logits(tmp_path):
    gpt, ids = save_toy(tmp_path / "new" / "best.pt"), random_ids(2, T)
    checkpoint = load_checkpoint(tmp_path / "new" / "best.pt")
    assert (checkpoint["tokenizer"], checkpoint["kind"], checkpoint["step"]) == ("bytes", "text", 3)
    assert torch.equal(load_model(checkpoint).eval()(ids), gpt(ids))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["best.pt"]


@pytest.mark.parametrize("changes, turns", [({"kind": "text"}, 0), ({"kind": "chat"}, 1), ({"kind": "chat", "turns": 4}, 4)])
def test_the_number_of_turns_in_training(tmp_path, changes, turns):
    save_toy(tmp_path / "best.pt", **changes)
    assert load_pretrained(tmp_path / "best.pt")[1:] == ("bytes", turns)


def test_a_checkpoint_of_version_1_0_loads(tmp_path):
    """With the names, shapes and other entries that version 1.0 wrote."""
    shapes = {"wte.weight": (320, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        for name, out, n_in in (("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", 4 * C, C),
                                ("mlp.c_proj", C, 4 * C)):
            shapes |= {f"h.{i}.{name}.weight": (out, n_in), f"h.{i}.{name}.bias": (out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (C,), f"h.{i}.{name}.bias": (C,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = dict(vocab_size=260, block_size=T, n_layer=2, n_head=NH, n_embd=C, dropout=0.1, bias=True)
    torch.save({"config": config, "model": weights, "tokenizer": "bytes", "kind": "chat", "turns": 2, "step": 3,
                "max_iters": 5, "trial": [0.5, 1.0], "told": False, "newest": (1.0, 2.0, (3, 4, 5)),
                "step_seconds": 0.1}, tmp_path / "best.pt")
    gpt, ids = load_model(load_checkpoint(tmp_path / "best.pt")).eval(), random_ids(1, T)
    close(gpt(ids)[0, :, :260], np_gpt(ids[0], {n: w.double().numpy() for n, w in weights.items()})[:, :260])


def test_a_loaded_model_can_be_trained_and_its_file_does_not_change(tmp_path):
    save_toy(tmp_path / "best.pt")
    before = (tmp_path / "best.pt").read_bytes()
    gpt = load_model(load_checkpoint(tmp_path / "best.pt"), dropout=0.25)
    assert gpt.config.dropout == 0.25
    gpt(random_ids(1, 4), random_ids(1, 4).flatten()).backward()
    torch.optim.SGD(gpt.parameters(), lr=0.1).step()
    assert (tmp_path / "best.pt").read_bytes() == before


class Bomb:
    """Creates a folder if it is unpickled unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_never_executes_code(tmp_path):
    save_toy(tmp_path / "best.pt", extra=Bomb(tmp_path / "owned"))
    with pytest.raises(UserError, match="best.pt"):
        load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "owned").exists()


def test_a_missing_checkpoint_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path)) + ": no such checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [b"garbage", bytes(range(256)) * 20, b"PK\x03\x04" + bytes(100), b"", "0.5", "0.99"])
def test_a_damaged_file_gives_a_one_line_error(tmp_path, content):
    path = tmp_path / "best.pt"
    save_toy(path)
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[:int(float(content) * len(whole))])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: not a checkpoint, or damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken, named", [
    (lambda c: c.pop("config"), "config"), (lambda c: c["config"].update(n_hedd=2), "n_hedd"),
    (lambda c: c["config"].update(n_layer=3), "h.2.ln_1"), (lambda c: c["config"].update(n_embd=2 * C), "wte.weight"),
    (lambda c: c["model"]["h.1.mlp.c_fc.bias"].fill_(math.nan), "h.1.mlp.c_fc.bias contains NaN"),
    (lambda c: c["model"].pop("ln_f.bias"), "ln_f.bias"), (lambda c: c["model"].update(more=torch.zeros(2)), "more")])
def test_contents_that_do_not_fit_give_a_one_line_error_that_names_them(tmp_path, broken, named):
    path = tmp_path / "best.pt"
    save_toy(path)
    checkpoint = torch.load(path)
    broken(checkpoint)
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match=f"best.pt: .*{named}") as caught:
        load_model(load_checkpoint(path), source=path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_fit_an_edited_model_py_is_refused(monkeypatch):
    checkpoint = model_state(toy(), "bytes", "text")
    monkeypatch.setattr(model, "layer_norm", lambda config: torch.nn.RMSNorm(config.n_embd))
    with pytest.raises(UserError, match="^best.pt: does not fit this model.py.*ln_1.bias.*undo your edit"):
        load_model(checkpoint, source="best.pt")
