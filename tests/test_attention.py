"""Attention written out: equal to the fused kernel, and what chat.py says and draws of it."""
import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import chat
import model as gpt
from chat import Talk, show_attention
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, attention
from pictures import attention_weights, head_scores


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=260, block_size=32, n_layer=3, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes})).eval()


@pytest.mark.parametrize("T, S", [(7, 7), (1, 7), (3, 7)])
def test_attention_written_out_is_the_fused_kernel(T, S):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    y, weights = attention(q, k, v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, T))
    assert (weights.masked_select(~mask) == 0).all(), "a later token was seen"


def test_attention_by_hand():
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]], dtype=torch.float64)
    k, v = q.clone(), torch.tensor([[[[1.0, 10.0], [3.0, 30.0]]]], dtype=torch.float64)
    y, weights = attention(q, k, v)
    second = np.exp(4 / np.sqrt(2)) / (1 + np.exp(4 / np.sqrt(2)))  # scores 0 and 4, over the root of hs = 2
    np.testing.assert_allclose(weights[0, 0].numpy(), [[1, 0], [1 - second, second]])
    np.testing.assert_allclose(y[0, 0].numpy(), [[1, 10], [1 + 2 * second, 10 + 20 * second]])


def test_the_weights_of_a_model_are_those_it_uses(monkeypatch):
    model, ids = tiny(), [5, 9, 5, 200, 7]
    before = model(torch.tensor([ids]))
    weights = attention_weights(model, ids)
    assert weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(model(torch.tensor([ids])), before)
    used = iter(weights)
    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", lambda q, k, v, **_: next(used) @ v)
    torch.testing.assert_close(model(torch.tensor([ids])), before)  # written out = fused, in all layers
    assert not list(used)
    x = model.h[0].ln_1(model.wte(torch.tensor(ids)) + model.wpe.weight[:5])  # the first layer by hand
    q, k, _ = (z.view(5, 2, 8).transpose(0, 1) for z in model.h[0].attn.c_attn(x).split(16, dim=1))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(weights[0], scores.softmax(-1), rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_weights_of_the_faster_forms_of_a_model_are_those_of_the_model():
    ids, wanted = [5, 9, 5, 200, 7], attention_weights(tiny(), [5, 9, 5, 200, 7])
    for change, rtol in ((gpt.use_onednn, 1e-4), (gpt.quantize_int8, 0.02)):
        model = tiny()
        change(model)
        torch.testing.assert_close(attention_weights(model, ids), wanted, rtol=rtol, atol=1e-6)
    found = attention_weights(tiny().bfloat16(), ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-6)


def test_habits_of_heads_by_hand():
    to_previous, to_first, to_same = torch.zeros(3, 4, 4)
    to_previous[[0, 1, 2, 3], [0, 0, 1, 2]] = 1
    to_first[:, 0] = 1
    to_same[[0, 1, 2, 3], [0, 1, 0, 1]] = 1  # of the ids 7 8 7 8
    scores = head_scores(torch.stack([to_previous, to_first, to_same])[None], [7, 8, 7, 8])
    third = 1 / 3
    torch.testing.assert_close(scores["previous token"], torch.tensor([[1.0, third, 0.0]]))
    torch.testing.assert_close(scores["first token"], torch.tensor([[third, 1.0, third]]))
    torch.testing.assert_close(scores["same token earlier"], torch.tensor([[0.0, 0.5, 1.0]]))
    assert "same token earlier" not in head_scores(to_first[None, None], [1, 2, 3, 4])


def talk_that_said(text, **changes):
    talk = Talk(tiny(**changes), get_tokenizer("bytes"), turns=1)
    ids = list(text.encode())
    talk.history = [(ids, ids)]
    return talk


@pytest.mark.parametrize("text", ["hi $x$", "", "a" * 200])
def test_a_picture_of_every_head_and_a_line_for_every_habit(tmp_path, capsys, text):
    pytest.importorskip("matplotlib")
    talk = talk_that_said(text, n_layer=2, n_head=1 if len(text) > 40 else 2)  # it writes 40 texts at most
    show_attention(talk, tmp_path / "deep" / "a.png")
    png = (tmp_path / "deep" / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) < 300_000
    out, err = capsys.readouterr()
    assert out == "" and "previous token" in err and "first token" in err and "layer 1 head" in err


def test_without_matplotlib_the_habits_are_told_and_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    show_attention(talk_that_said("hello"), tmp_path / "a.png")
    err = capsys.readouterr().err
    assert "previous token" in err and "pip install matplotlib" in err and not list(tmp_path.iterdir())


def test_in_the_chat_and_where_nothing_was_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "show_attention", lambda talk, path: print(path))
    chat.command(talk_that_said("x"), chat.Settings(), f"/attention {tmp_path}/b.png")
    assert capsys.readouterr().out == f"{Path(tmp_path) / 'b.png'}\n"
    with pytest.raises(ValueError, match="nothing was said"):
        chat.command(Talk(tiny(), get_tokenizer("bytes"), 1), chat.Settings(), "/attention")
