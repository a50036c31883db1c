"""Attention written out: equal to the fused kernel, in a layer and in every form of a whole model."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures.look import record

import model as gpt
from model import GPT, GPTConfig, attention


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=260, block_size=32, n_layer=3, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes})).eval()


@torch.no_grad()
def attention_weights(model, ids):
    """Of every head, as the page shows them: (L, nh, T, T)."""
    return record(model, ids, len(ids))[1][:, 1:]


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


def attending(kernel):
    """CausalSelfAttention.forward with another kernel, and queries turned round."""
    def forward(self, x, layer_cache=None, start=0):
        q, k, v = (z.view(1, -1, self.n_head, 8).transpose(1, 2) for z in self.c_attn(x).split(16, dim=2))
        return self.c_proj(kernel(-q, k, v).transpose(1, 2).reshape(x.shape))
    return forward


BAND = torch.ones(5, 5).tril().triu(-1).bool()
SCALED, EVERY = F.scaled_dot_product_attention, torch.ones(5, 5).bool()


@pytest.mark.parametrize("kernel, seen, scale", [
    (lambda q, k, v: SCALED(q, k, v, is_causal=True), EVERY.tril(), 8**-0.5),
    (lambda q, k, v: SCALED(q, k, v, BAND), BAND, 8**-0.5), (lambda q, k, v: SCALED(q, k, v), EVERY, 8**-0.5),
    (lambda q, k, v: SCALED(q, k, v, attn_mask=BAND[None, None].expand(1, 2, 5, 5), scale=0.1), BAND, 0.1),
    (lambda q, k, v: attention(q, k, v)[0], EVERY.tril(), 8**-0.5),
    (lambda q, k, v: F.softmax(q @ k.mT, 3) @ v, EVERY, 1), (lambda q, k, v: torch.softmax(q @ k.mT, 3) @ v, EVERY, 1)])
def test_the_weights_of_a_model_that_its_reader_changed_are_those_it_uses(kernel, seen, scale, monkeypatch):
    monkeypatch.setattr(gpt.CausalSelfAttention, "forward", attending(kernel))
    model, ids = tiny(n_layer=2), [5, 9, 5, 200, 7]
    found, block = attention_weights(model, ids), model.h[0]
    x = block.ln_1(model.wte(torch.tensor(ids)) + model.wpe.weight[:5])
    q, k, _ = (z.view(5, 2, 8).transpose(0, 1).double() for z in block.attn.c_attn(x).split(16, dim=1))
    scores = (-q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found[0].double(), scores.softmax(-1), rtol=1e-4, atol=1e-6)
    assert len(found) == 2 and not found[0].equal(found[1])


def test_attention_that_cannot_be_seen_is_one_line(monkeypatch):
    monkeypatch.setattr(gpt.CausalSelfAttention, "forward", attending(lambda q, k, v: v.cumsum(2)))
    with pytest.raises(ValueError, match="attention of block 1 cannot be seen"):
        attention_weights(tiny(), [1, 2, 3])


def test_the_weights_of_the_faster_forms_of_a_model_are_those_of_the_model():
    ids, wanted = [5, 9, 5, 200, 7], attention_weights(tiny(), [5, 9, 5, 200, 7])
    for int8, rtol in ((False, 1e-4), (True, 0.02)):
        model = tiny()
        gpt.make_fast(model, int8)
        torch.testing.assert_close(attention_weights(model, ids), wanted, rtol=rtol, atol=1e-6)
    found = attention_weights(tiny().bfloat16(), ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-6)
