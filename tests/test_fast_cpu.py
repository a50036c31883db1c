"""Fast decoding on a CPU: against the plain model in float64 and transformers; edited models are left unchanged."""
import math

import pytest
import torch
import torch.nn.functional as F

import model as code
from model import GPT, MLP, CausalSelfAttention, GPTConfig, KVCache
from runtime.fast_cpu import speed_up

T, C = 24, 32
IDS = torch.randint(70, (1, T), generator=torch.Generator().manual_seed(1))


def toy(spread=0.3, **changes):
    """Return a GPT with weights so large that every part of it affects the logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=100, block_size=T, n_layer=3, n_head=2, n_embd=C) | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


@torch.no_grad()
def logits_of(model, *sizes):
    """Return logits (1, T, V) of the first IDS, read in pieces with one cache."""
    cache, start, logits = KVCache(model), 0, []
    for size in sizes:
        logits.append(model.head(model.hidden(IDS[:, start:start + size], cache, start)))
        start += size
    return torch.cat(logits, dim=1)[..., :model.config.vocab_size]


@pytest.mark.parametrize("sizes", [[T], [1] * T, [6, 1, 4, 1, 1, 3, 8]])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"fused": False}, {"n_head": 8, "n_layer": 1}])
def test_logits_equal_the_plain_models_in_float64(changes, sizes):
    plain = toy(**changes)
    fast = speed_up(plain)
    assert fast is not plain
    found, wanted = logits_of(fast, *sizes), plain.double()(IDS)[..., :100]
    assert found.dtype == torch.float32 and (found - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"n_embd": 40, "n_head": 5, "vocab_size": 70}])
def test_int8_logits_are_close_to_float32s_and_to_each_other_in_decoding_and_prefill(changes):
    plain = toy(spread=0.1, **{"n_embd": 64, **changes})
    fast, wanted = speed_up(plain, int8=True), logits_of(plain, T)
    found = logits_of(fast, T)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert (logits_of(fast, *[1] * T) - found).norm() < 0.03 * wanted.norm()
    assert (fast(IDS)[..., plain.config.vocab_size:] == -math.inf).all(), "padding"
    x, V = plain.hidden(IDS), plain.config.vocab_size
    assert 0 < (fast.head(x) - plain.head(x))[..., :V].norm() < 0.05 * wanted.norm(), "the head is int8 too"


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_it_shares_the_weights_and_generates_from_its_logits(int8, capsys):
    plain = toy()
    before, fast = plain(IDS), speed_up(plain, int8)
    ids, cache = list(fast.generate([5, 3], 2 * T, temperature=0)), KVCache(fast)  # longer than the context
    for i, new in enumerate(([5, 3], *([i] for i in ids[:T - 2]))):
        logits = fast.head(fast.hidden(torch.tensor([new]), cache, i + 1 if i else 0))[0, -1]
        assert logits.argmax() == ids[i]
    if not int8:
        assert ids == list(plain.generate([5, 3], 2 * T, temperature=0))
    addresses = {p.data_ptr() for p in plain.parameters()}
    assert {p.data_ptr() for p in fast.parameters()} <= addresses
    assert fast.num_params() == sum(p.numel() for p in plain.parameters())
    assert type(plain) is GPT and torch.equal(plain(IDS), before) and plain.wte.weight.requires_grad
    half = toy().bfloat16()
    assert speed_up(half, int8) is half
    assert all(speed_up(tiny, int8) is not tiny for tiny in (toy(block_size=n) for n in (1, 2, 3)))
    assert capsys.readouterr() == ("", "")


def attention(mask=code.causal_mask, rotate=lambda z, start: z):
    """Return a CausalSelfAttention.forward that a reader may have edited."""
    def forward(self, x, cache=None, start=0):
        q, k, v = (z.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(x.shape[2], dim=2))
        k, v = cache.store(rotate(k, start), v, start)
        y = F.scaled_dot_product_attention(rotate(q, start), k, v, attn_mask=mask(x.shape[1], k.shape[2], "cpu"))
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))
    return CausalSelfAttention, "forward", forward


def window(n):
    return attention(lambda T, S, device: code.causal_mask(T, S, device).triu(S - T + 1 - n))


def rope(z, start):
    angles = torch.arange(start, start + z.shape[2])[:, None] / 10 ** torch.arange(z.shape[3] // 2)
    a, b = z.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


EDITS = {"window": window(12), "long window": window(300), "RoPE": attention(rotate=rope),
         "ReLU": (MLP, "forward", lambda self, x: self.c_proj(self.c_fc(x).relu())),
         # With these, decoding is computed as before, and prefill runs the edited code.
         "no causal mask": attention(lambda T, S, device: torch.ones(T, S).bool()),
         "RMSNorm": (code, "layer_norm", lambda config: torch.nn.RMSNorm(config.n_embd))}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_generates_what_it_computes(edit, monkeypatch, capsys):
    monkeypatch.setattr(*EDITS[edit])
    plain = toy(block_size=400)
    made = speed_up(plain)
    assert (made is plain) == (edit not in ("no causal mask", "RMSNorm"))
    assert (speed_up(plain, int8=True) is plain) == ("model.py was edited" in capsys.readouterr().err) == (made is plain)
    sizes = (9, 1, 1, 4, *[1] * (T - 15))
    torch.testing.assert_close(logits_of(made, *sizes), logits_of(plain, *sizes), rtol=1e-4, atol=1e-3)
