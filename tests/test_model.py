"""model.py piece by piece. The first part is a lesson: the parts of a GPT one by one, each first in a few
lines of NumPy in float64. What follows holds the rest to its promises: gradients, cache, sampling, Muon."""
import copy
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from model import GPT, GPTConfig, KVCache, Muon, newton_schulz, sample
from tests.conftest import largest_file

V, T, C, NH = 70, 16, 32, 2  # vocabulary, block size, channels, heads of the toy model
RATES = dict(learning_rate=0.01, embedding_learning_rate=0.003, weight_decay=0.1, momentum=0.9, beta1=0.9,
             beta2=0.99)


def toy(seed=0, spread=0.15, **changes):
    """A small GPT whose every number is random, so that a forgotten bias or norm shows."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**dict(vocab_size=V, block_size=T, n_layer=2, n_head=NH, n_embd=C), **changes}))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * spread)
    return gpt.eval()


def arrays(module):
    """A module's weights by name, as float64."""
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def random_x(*shape, seed=1):
    """The same random numbers twice: (a float64 array, a float32 tensor)."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x, torch.tensor(x, dtype=torch.float32)


def random_ids(*shape, seed=2):
    return torch.tensor(np.random.default_rng(seed).integers(0, V, shape))


def close(ours, oracle, atol=1e-5):
    np.testing.assert_allclose(ours.detach().double().numpy(), oracle, rtol=0, atol=atol)


# The lesson: the parts of a GPT one by one, each first in NumPy. There x is (T, C): one text, no batch.

# Tokens become vectors: what each is, and where it stands.

def test_what_enters_the_first_block_is_token_plus_position_embedding():
    gpt, ids, seen = toy(), random_ids(2, 5), []
    gpt.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gpt(ids)
    w = arrays(gpt)
    for row in range(2):
        close(seen[0][row], w["wte.weight"][ids[row]] + w["wpe.weight"][[0, 1, 2, 3, 4]])


@torch.no_grad()
def test_without_positions_a_layer_could_not_tell_the_order_of_earlier_tokens():
    gpt, ids = toy(n_layer=1), torch.tensor([[3, 1, 4, 5]])
    swapped = ids[:, [1, 0, 2, 3]]
    assert (gpt(ids) - gpt(swapped))[0, -1, :V].abs().max() > 1e-2
    gpt.wpe.weight.zero_()
    torch.testing.assert_close(gpt(ids)[0, -1, :V], gpt(swapped)[0, -1, :V], rtol=0, atol=1e-5)


# Before each part, layer norm puts a token's channels on one scale.

def np_layer_norm(x, w, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


@pytest.mark.parametrize("scale, shift", [(3, 5), (0.01, 0)])  # the second shows the 1e-5
def test_layer_norm_makes_mean_0_and_variance_1_then_scales_and_shifts(scale, shift):
    ln, (x, tx) = toy().h[0].ln_1, random_x(7, C)
    w = {f"ln.{name}": value for name, value in arrays(ln).items()}
    close(ln(tx * scale + shift), np_layer_norm(x * scale + shift, w, "ln"))


# Attention: every token looks at itself and the tokens before it.

def np_linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_one_head(q, k, v):
    scores = q @ k.T / np.sqrt(q.shape[1])  # (T, T): how well each query fits each key
    scores[np.triu_indices(len(q), 1)] = -np.inf  # the causal mask: what comes later is not to be seen
    return np_softmax(scores) @ v


def np_heads(x, w, name, n_head):
    q, k, v = np.split(np_linear(x, w, f"{name}c_attn"), 3, axis=1)  # (T, C) each
    heads = zip(*(np.split(z, n_head, axis=1) for z in (q, k, v)))  # n_head times three (T, hs)
    return [np_one_head(*head) for head in heads]


def np_attention(x, w, name="", n_head=NH):
    return np_linear(np.concatenate(np_heads(x, w, name, n_head), axis=1), w, f"{name}c_proj")


def test_attention_written_out_is_a_masked_softmax_of_scaled_products():
    q, k, v = (random_x(5, 8, seed=seed) for seed in range(3))
    y, weights = m.attention(*(z[1][None, None] for z in (q, k, v)))
    close(y[0, 0], np_one_head(q[0], k[0], v[0]))
    close(weights[0, 0].sum(1), np.ones(5))


def test_a_later_token_cannot_change_an_earlier_logit():
    gpt, ids = toy(), random_ids(1, T)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % V
    before, after = gpt(ids)[0, :, :V], gpt(changed)[0, :, :V]
    assert torch.equal(before[:9], after[:9])
    assert all((before[t] - after[t]).abs().max() > 1e-4 for t in range(9, T))


def test_the_first_token_attends_only_to_itself():
    attn, (x, tx) = toy().h[0].attn, random_x(5, C)
    w = arrays(attn)
    value = np_linear(x, w, "c_attn")[0, 2 * C:]  # whatever the query says, all weight is on its own value
    close(attn(tx[None])[0, 0], np_linear(value, w, "c_proj"))


def test_each_head_fills_its_own_channels():
    attn, (x, tx), hs = toy(n_head=4).h[0].attn, random_x(6, C), C // 4
    with torch.no_grad():  # a last projection that changes nothing shows the heads side by side
        attn.c_proj.weight.copy_(torch.eye(C))
        attn.c_proj.bias.zero_()
    for h, head in enumerate(np_heads(x, arrays(attn), "", 4)):
        close(attn(tx[None])[0][:, h * hs:(h + 1) * hs], head)


def test_attention_is_its_heads_side_by_side_and_a_projection():
    attn, (x, tx) = toy().h[0].attn, random_x(3, 9, C)
    for row in range(3):
        close(attn(tx)[row], np_attention(x[row], arrays(attn)))


# The MLP: each token by itself, through four times as many channels.

def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_mlp(x, w, name=""):
    return np_linear(np_gelu(np_linear(x, w, f"{name}c_fc")), w, f"{name}c_proj")


def test_mlp_is_two_linear_layers_around_a_tanh_gelu():
    mlp, (x, tx) = toy().h[0].mlp, random_x(4, C)
    assert mlp.c_fc.weight.shape == (4 * C, C)
    close(mlp(3 * tx), np_mlp(3 * x, arrays(mlp)))


# A block: both add to the residual stream, which goes on past them.

def np_block(x, w, name=""):
    x = x + np_attention(np_layer_norm(x, w, f"{name}ln_1"), w, f"{name}attn.")
    return x + np_mlp(np_layer_norm(x, w, f"{name}ln_2"), w, f"{name}mlp.")


def test_a_block_adds_attention_and_mlp_to_the_residual_stream():
    block, (x, tx) = toy().h[1], random_x(8, C)
    close(block(tx[None])[0], np_block(x, arrays(block)))


@torch.no_grad()
def test_a_block_whose_parts_say_nothing_passes_the_stream_on():
    block, (_, tx) = toy().h[0], random_x(1, 8, C)
    for p in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
        p.zero_()
    assert torch.equal(block(tx), tx)


# The head: the token embeddings once more. And all of it.

def np_gpt(ids, w, n_layer=2):
    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for i in range(n_layer):
        x = np_block(x, w, f"h.{i}.")
    return np_layer_norm(x, w, "ln_f") @ w["wte.weight"].T


def test_the_head_and_the_token_embedding_stay_one_table():
    gpt = toy()
    same = [gpt, m.model_from_checkpoint(m.model_checkpoint(gpt, "bytes", "text")), copy.deepcopy(gpt),
            toy().to(torch.bfloat16), toy().double()]
    for optimizer in ("adamw", "muon"):
        same.append(toy())
        optimizers = m.configure_optimizers(same[-1], SimpleNamespace(optimizer=optimizer, **RATES))
        before = same[-1].wte.weight.detach().clone()
        same[-1](random_ids(2, 5), random_ids(2, 5, seed=3).flatten()).backward()
        for each in optimizers:
            each.step()
        assert not torch.equal(same[-1].wte.weight, before)
    for each in same:
        assert each.lm_head.weight is each.wte.weight and each.lm_head.bias is None
        assert not any("lm_head" in name for name, _ in each.named_parameters()), "counted twice"


def test_the_head_is_the_token_embedding_and_ids_that_do_not_exist_get_minus_infinity():
    gpt, (x, tx) = toy(), random_x(3, C)
    logits = gpt.head(tx)
    assert gpt.config.padded_vocab_size == logits.shape[1] == 128  # 70, up to a multiple of 64
    close(logits[:, :V], x @ arrays(gpt)["wte.weight"][:V].T)
    assert (logits[:, V:] == -math.inf).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_model(bias):
    gpt, ids = toy(bias=bias), random_ids(3, T)
    logits = gpt(ids)
    for row in range(3):
        close(logits[row, :, :V], np_gpt(ids[row], arrays(gpt))[:, :V], atol=1e-4)


def test_without_bias_no_layer_has_one():
    gpt = toy(bias=False)
    assert not [name for name, _ in gpt.named_parameters() if "bias" in name]


def test_dropout_acts_in_training_only_and_in_all_its_places():
    gpt, ids = toy(), random_ids(1, T)
    attn, mlp = gpt.h[0].attn, gpt.h[0].mlp
    places = (gpt.drop, "p"), (attn, "dropout"), (attn.resid_dropout, "p"), (mlp.dropout, "p")
    for module, name in places:
        setattr(module, name, 0.5)
        gpt.eval()
        assert torch.equal(gpt(ids), gpt(ids)), name
        gpt.train()
        assert not torch.equal(gpt(ids), gpt(ids)), name
        setattr(module, name, 0.0)
    assert torch.equal(gpt(ids), gpt(ids))
    gpt = toy(dropout=0.25)
    attn, mlp = gpt.h[1].attn, gpt.h[1].mlp
    assert gpt.drop.p == attn.dropout == attn.resid_dropout.p == mlp.dropout.p == 0.25


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="n_embd=30.*n_head=4"):
        GPT(GPTConfig(V, T, 1, 4, 30))


# The loss and its gradient

def test_the_loss_is_the_sum_of_minus_log_probabilities():
    gpt, ids, targets = toy(), random_ids(2, 6), random_ids(2, 6, seed=3)
    by_hand = 0.0
    for row in range(2):
        probs = np_softmax(np_gpt(ids[row], arrays(gpt))[:, :V])
        by_hand -= sum(math.log(probs[t, targets[row, t]]) for t in range(6))
    assert gpt(ids, targets.flatten()).item() == pytest.approx(by_hand, abs=1e-3)


def test_where_picks_the_positions_that_count():
    gpt, ids = toy(), random_ids(2, 6)
    picked = [(0, 2), (0, 5), (1, 0), (1, 4)]  # row, position
    wanted = [11, 5, 69, 0]
    by_hand = 0.0
    for (row, t), target in zip(picked, wanted):
        by_hand -= math.log(np_softmax(np_gpt(ids[row], arrays(gpt))[:, :V])[t, target])
    where = torch.tensor([row * 6 + t for row, t in picked])
    assert gpt(ids, torch.tensor(wanted), where).item() == pytest.approx(by_hand, abs=1e-3)


def gradients(gpt, *batches):
    gpt.zero_grad()
    for ids, targets in batches:
        gpt(ids, targets.flatten()).backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters()}


def test_the_gradient_of_eight_rows_is_the_sum_of_each_rows():
    gpt, ids, targets = toy(), random_ids(8, T), random_ids(8, T, seed=3)
    at_once = gradients(gpt, (ids, targets))
    one_by_one = gradients(gpt, *((ids[i:i + 1], targets[i:i + 1]) for i in range(8)))
    for name in at_once:
        torch.testing.assert_close(at_once[name], one_by_one[name], rtol=1e-4, atol=1e-4)


def test_ids_that_do_not_exist_get_no_gradient():
    gpt = toy()
    grad = gradients(gpt, (random_ids(2, 6), random_ids(2, 6, seed=3)))["wte.weight"]
    assert (grad[:V] != 0).any() and (grad[V:] == 0).all()


def test_a_new_model_finds_every_token_about_as_likely():
    torch.manual_seed(0)
    gpt, ids, targets = GPT(GPTConfig(V, T, 2, NH, C)), random_ids(8, T), random_ids(8, T, seed=3)
    assert gpt(ids, targets.flatten()).item() / (8 * T) == pytest.approx(math.log(V), abs=0.1)


def test_what_adds_to_the_residual_stream_starts_smaller():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(V, T, 8, NH, 64))
    for block in gpt.h:
        for layer, std in ((block.attn.c_attn, 0.02), (block.mlp.c_fc, 0.02),
                           (block.attn.c_proj, 0.005), (block.mlp.c_proj, 0.005)):  # 0.02 / sqrt(2 * 8)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


# The KV cache and generate

@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 1, 3, 6], [T]])
@torch.no_grad()
def test_with_a_cache_the_logits_are_those_of_the_full_forward(sizes):
    gpt, ids = toy(), random_ids(1, T)
    full, cache, start = gpt(ids), KVCache(gpt), 0
    for size in sizes:
        logits = gpt.head(gpt.hidden(ids[:, start:start + size], cache, start))
        torch.testing.assert_close(logits[..., :V], full[:, start:start + size, :V], rtol=0, atol=1e-4)
        start += size
    assert start == T


@torch.no_grad()
def greedy_without_cache(gpt, ids, n):
    """The slow way: past block_size the window moves by half a block, and all of it is computed each time."""
    ids, start, block = list(ids), 0, gpt.config.block_size
    for _ in range(n):
        while len(ids) - start > block:
            start += block // 2
        ids.append(int(gpt(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[-n:]


def greedy(gpt, ids, n, cache=None):
    return list(gpt.generate(ids, n, temperature=0, cache=cache))


def test_generate_equals_the_slow_way_far_past_block_size():
    gpt = toy(spread=0.4)
    slow = greedy_without_cache(gpt, [3, 1, 4], 3 * T)
    assert len(set(slow)) > 8, "a model that repeats itself would show nothing"
    assert greedy(gpt, [3, 1, 4], 3 * T) == slow


@pytest.mark.parametrize("length", [T - 1, T, T + 1, 2 * T, 3 * T + 3])
def test_generate_takes_a_prompt_of_any_length(length):
    gpt, ids = toy(spread=0.4), random_ids(length).tolist()
    assert greedy(gpt, ids, 12) == greedy_without_cache(gpt, ids, 12)


def test_a_cache_kept_for_the_next_turn_changes_nothing_but_the_work(monkeypatch):
    gpt = toy(spread=0.4)
    cache, first = KVCache(gpt), [3, 1, 4]
    replied = greedy(gpt, first, 4, cache)
    assert replied == greedy_without_cache(gpt, first, 4)
    second = [*first, *replied, 9, 2, 6]
    wanted, read, hidden = greedy_without_cache(gpt, second, 5), [], gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda idx, *args, **knobs: read.append(idx.shape[1]) or hidden(
        idx, *args, **knobs))
    assert greedy(gpt, second, 5, cache) == wanted
    assert read == [4, 1, 1, 1, 1]  # the reply's last token, the new message's three, then one by one


@pytest.mark.parametrize("other", [[3, 1, 4, 15, 9, 2, 6, 5], [7], [3], [3, 1, 4, 1, 5]])
def test_a_cache_that_holds_something_else_changes_nothing(other):
    gpt = toy(spread=0.4)
    cache = KVCache(gpt)
    greedy(gpt, [3, 1, 4, 1, 5, 9], 2 * T, cache)  # past the border: what it holds begins anew
    assert greedy(gpt, other, 10, cache) == greedy_without_cache(gpt, other, 10)
    greedy(gpt, [3, 1, 4, 1, 5, 9], 3, cache)
    assert greedy(gpt, other, 2 * T, cache) == greedy_without_cache(gpt, other, 2 * T)


def test_generate_left_half_way_leaves_a_cache_that_can_be_used():
    gpt = toy(spread=0.4)
    cache = KVCache(gpt)
    half = gpt.generate([3, 1, 4], 10, temperature=0, cache=cache)
    begun = [next(half), next(half)]
    half.close()
    assert greedy(gpt, [3, 1, 4, *begun], 5, cache) == greedy_without_cache(gpt, [3, 1, 4], 7)[2:]


def test_the_same_seed_makes_the_same_ids():
    gpt = toy()
    first, again, other = (list(gpt.generate([1, 2], 20, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other and len(first) == 20


def test_generate_leaves_the_random_numbers_of_training_alone():
    gpt, before = toy(), torch.get_rng_state()
    for seed in (3, None):
        list(gpt.generate([1], 5, seed=seed))
    assert torch.equal(before, torch.get_rng_state())


def test_generation_ends_before_a_stop_id():
    gpt = toy(spread=0.4)
    free = greedy(gpt, [3, 1, 4], 20)
    stop = free[6]
    assert list(gpt.generate([3, 1, 4], 20, temperature=0, stop_ids=(stop, 0))) == free[:min(
        i for i, token in enumerate(free) if token in (stop, 0))]
    assert list(gpt.generate([3, 1, 4], 20, temperature=0, stop_ids=free[:1])) == []


def test_ids_that_do_not_exist_are_never_sampled():
    gpt = toy()
    with torch.no_grad():
        gpt.wte.weight[V:100] = 1000.0
        gpt.wte.weight[100:] = -1000.0  # one half of them has huge logits, whatever the hidden state
    assert (gpt(random_ids(1, 4)).softmax(-1)[..., V:] == 0).all()
    for temperature in (0, 1.0, 50.0):
        assert all(i < V for i in gpt.generate([1], 60, temperature=temperature, seed=0))


@pytest.mark.parametrize("training", [True, False])
def test_generate_drops_nothing_out_and_restores_the_mode(training):
    gpt = toy(dropout=0.5)
    wanted = greedy(gpt, [3, 1], 6)
    gpt.train(training)
    assert greedy(gpt, [3, 1], 6) == wanted and gpt.training is training
    half = gpt.generate([3, 1], 6)
    next(half)
    half.close()
    assert gpt.training is training and gpt.h[0].training is training


# Sampling

PROBS = [0.10, 0.40, 0.05, 0.30, 0.15]  # by likelihood: ids 1, 3, 4, 0, 2


def draw(n, probs=PROBS, temperature=1.0, top_k=0, top_p=1.0):
    generator, logits = torch.Generator().manual_seed(0), torch.tensor(probs).log()
    return [sample(logits, [], generator, temperature=temperature, top_k=top_k, top_p=top_p)
            for _ in range(n)]


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"top_k": 1}, {"top_k": 1, "temperature": 9.0},
                                   {"top_p": 0.01}, {"temperature": 0.01}])
def test_only_the_likeliest_is_left(knobs):
    assert set(draw(200, **knobs)) == {1}


@pytest.mark.parametrize("top_k, top_p, left", [
    (0, 1.0, {0, 1, 2, 3, 4}),
    (2, 1.0, {1, 3}),
    (4, 1.0, {1, 3, 4, 0}),
    (9, 1.0, {0, 1, 2, 3, 4}),
    (0, 0.35, {1}),  # 0.40 is enough
    (0, 0.60, {1, 3}),  # 0.40 + 0.30
    (0, 0.80, {1, 3, 4}),  # 0.40 + 0.30 + 0.15
    (0, 0.90, {1, 3, 4, 0}),  # 0.40 + 0.30 + 0.15 + 0.10
    (0, 0.99, {0, 1, 2, 3, 4}),
    (3, 0.60, {1, 3}),
    (3, 0.80, {1, 3}),  # of the 0.85 that top_k leaves: 0.70 / 0.85 is over 0.80
])
def test_top_k_and_top_p_leave_these_candidates(top_k, top_p, left):
    assert set(draw(500, top_k=top_k, top_p=top_p)) == left


def test_top_p_keeps_no_more_than_the_smallest_set_that_reaches_it():
    assert len(set(draw(300, probs=[0.25, 0.25, 0.25, 0.25], top_p=0.5))) == 2  # 0.25 + 0.25 reaches 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    n = 4000
    wanted = np_softmax(np.log(PROBS) / temperature)
    counts = np.bincount(draw(n, temperature=temperature), minlength=5)
    np.testing.assert_array_less(np.abs(counts - n * wanted), 4 * np.sqrt(n * wanted * (1 - wanted)))


def choices(logits, monkeypatch, **knobs):
    """{id: probability} of all that `sample` could have chosen."""
    asked, chosen, n = [], {}, 0

    def pick_nth(probs, *_, **__):
        asked[:] = probs.tolist()
        return torch.tensor([n])
    monkeypatch.setattr(torch, "multinomial", pick_nth)
    while n == 0 or n < len(asked):
        i = sample(logits.clone(), [], None, **knobs)
        if asked[n] > 0:
            chosen[i] = asked[n]
        n += 1
    return chosen


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (7, 1.0), (400, 1.0), (0, 0.01), (0, 0.5),
                                          (0, 0.93), (0, 0.9999), (7, 0.5), (20, 0.9)])
def test_the_candidates_and_their_probabilities_are_those_of_transformers(
        temperature, top_k, top_p, monkeypatch):
    from transformers.generation import logits_process
    logits = torch.randn(60, generator=torch.Generator().manual_seed(top_k)) * 3
    warped = logits_process.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        warped = logits_process.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = logits_process.TopPLogitsWarper(top_p)(None, warped)
    wanted = {i: p for i, p in enumerate(warped[0].softmax(-1).tolist()) if p > 0}
    found = choices(logits, monkeypatch, temperature=temperature, top_k=top_k, top_p=top_p)
    total = sum(found.values())  # multinomial does not need it to be 1
    assert {i: p / total for i, p in found.items()} == pytest.approx(wanted, rel=1e-4)


def with_logits(monkeypatch, *logits):
    """A model of so many ids that always has these logits."""
    gpt = toy(vocab_size=len(logits))
    monkeypatch.setattr(gpt, "head", lambda x: torch.tensor(logits).expand(*x.shape[:-1], -1).clone())
    return gpt


@pytest.mark.parametrize("logits, penalty, said", [
    ([4.0, 3.0, 1.0], 1.0, [0, 0, 0, 0]),
    ([4.0, 3.0, 1.0], 1.2, [0, 0, 0, 0]),  # 4 / 1.2 is over 3
    ([4.0, 3.0, 1.0], 2.0, [1, 0, 0, 0]),  # 0 was said: 2, 3, 1; and 1 too: 2, 1.5, 1
    ([4.0, 3.0, 1.0], 8.0, [1, 2, 0, 0]),  # 0.5, 3, 1; then 0.5, 0.375, 1; then 0.5, 0.375, 0.125
    ([-1.0, -1.5, -9.0], 2.0, [1, 0, 0, 0]),  # what is below 0 is multiplied: -2, -1.5, -9; then -2, -3, -9
    ([0.0, -0.5, -0.5], 9.0, [0, 0, 0, 0])])
def test_the_repetition_penalty_of_cases_by_hand(logits, penalty, said, monkeypatch):
    gpt = with_logits(monkeypatch, *logits)
    assert list(gpt.generate([0], 4, temperature=0, repetition_penalty=penalty)) == said


def test_a_stop_id_is_not_penalized_or_a_reply_would_never_end(monkeypatch):
    gpt = with_logits(monkeypatch, 4.0, 3.0, 1.0)
    assert list(gpt.generate([0, 1], 4, temperature=0, repetition_penalty=9.0, stop_ids=(0,))) == []


@torch.no_grad()
def test_the_repetition_penalty_is_that_of_transformers_for_what_the_window_holds(monkeypatch):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    gpt, given, ids, start = toy(spread=0.4), [], [3, 1, 4, 1], 0
    draw_one = torch.multinomial
    monkeypatch.setattr(torch, "multinomial",
                        lambda probs, *args, **knobs: given.append(probs) or draw_one(probs, *args, **knobs))
    said = list(gpt.generate(ids, 3 * T, repetition_penalty=1.7, seed=0, stop_ids=(1, V)))
    assert len(said) > 2 * T, "it must go past the border"
    for probs, i in zip(given, said):
        while len(ids) - start > T:
            start += T // 2
        window = torch.tensor([ids[start:]])
        plain = gpt(window)[:, -1, :V]
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(window, plain.clone())[0]
        wanted[1] = plain[0, 1]
        torch.testing.assert_close(probs.log(), wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)
        ids.append(i)


# Compiled (torch.compile without a compiler behind it: what it sees of the model, and its gradients)

def compiled(function):
    """The function as torch.compile traces it, which fails where it would have to fall back to Python."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@torch.no_grad()
def test_compiled_the_hidden_states_of_a_chat_are_those_of_plain_python():
    gpt, ids, start = toy(n_layer=1), random_ids(1, T), 0
    hidden, wanted = compiled(gpt.hidden), gpt.hidden(ids)
    cache = KVCache(gpt)
    for size in (8, 4, 1, 1):  # the prompt (T == S); the next message (1 < T < S); token by token
        found = hidden(ids[:, start:start + size], cache, start)
        torch.testing.assert_close(found, wanted[:, start:start + size], rtol=0, atol=1e-5)
        start += size


@pytest.mark.parametrize("picked", [None, [1, 2, 7, 12, 30]])
def test_compiled_the_loss_and_the_gradients_are_those_of_plain_python(picked):
    gpt, ids, targets = toy(n_layer=1), random_ids(2, T), random_ids(2, T, seed=3).flatten()
    where = None if picked is None else torch.tensor(picked)
    targets = targets if picked is None else targets[where]
    losses, found = [], []
    for forward in (gpt, compiled(gpt)):
        gpt.zero_grad()
        losses.append(forward(ids, targets, where))
        losses[-1].backward()
        found.append({name: p.grad.clone() for name, p in gpt.named_parameters()})
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_residual_stream_is_in_bfloat16_compiled_or_not():
    gpt, ids, targets, seen = toy(n_layer=1), random_ids(2, T), random_ids(2, T, seed=3).flatten(), []
    for module in (*gpt.h, gpt.ln_f):
        module.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    wanted = gpt(ids, targets).item()
    assert seen == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt(ids, targets).item() == pytest.approx(wanted, rel=0.01)
        assert seen[2:] == [torch.bfloat16] * 2
        assert compiled(toy(n_layer=1))(ids, targets).item() == pytest.approx(wanted, rel=0.01)


# Faster ways, in a model that only answers

@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_made_fast_the_logits_and_the_greedy_ids_stay_what_they_were(bias):
    plain, fast, ids = toy(bias=bias, spread=0.4), toy(bias=bias, spread=0.4), random_ids(3, T)
    m.make_fast(fast)
    swapped = [layer for layer in fast.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(swapped) == 4 * 2 + 1 and {type(layer) for layer in swapped} == {m.FastLinear}
    wanted = plain(ids)
    torch.testing.assert_close(fast(ids), wanted, rtol=1e-5, atol=1e-4)
    for row in range(3):
        close(fast(ids)[row, :, :V], np_gpt(ids[row], arrays(plain))[:, :V], atol=1e-3)
    cache, start = KVCache(fast), 0
    for size in (6, 1, 4, 1, 1, 3):  # one token goes through numpy, more through PyTorch, on one cache
        logits = fast.head(fast.hidden(ids[:1, start:start + size], cache, start))
        torch.testing.assert_close(logits, wanted[:1, start:start + size], rtol=1e-5, atol=1e-4)
        start += size
    for prompt in ([3, 1, 4], random_ids(2 * T).tolist()):
        assert greedy(fast, prompt, 3 * T) == greedy(plain, prompt, 3 * T)


@torch.no_grad()
def test_one_token_in_numpy_is_the_model_in_float64():
    plain, fast, ids = toy(spread=0.4), toy(spread=0.4), random_ids(1, T)
    m.make_fast(fast)
    wanted = plain.double()(ids)[0, :, :V]
    cache = KVCache(fast)
    for t in range(T):
        x = fast.hidden(ids[:, t:t + 1], cache, t)
        assert x.shape == (1, 1, plain.config.n_embd) and x.dtype == torch.float32
        error = fast.head(x)[0, 0, :V] - wanted[t]
        assert error.norm() < 1e-5 * wanted[t].norm()


@torch.no_grad()
def test_one_token_of_a_fast_model_goes_through_none_of_pytorchs_layers(monkeypatch):
    fast = toy()
    m.make_fast(fast)
    cache = KVCache(fast)
    fast.hidden(random_ids(1, 4), cache, 0)
    monkeypatch.setattr(m.Block, "forward", None)
    fast.hidden(random_ids(1, 1), cache, 4)


def windowed(newest):
    """CausalSelfAttention.forward, by which a token sees itself and those before it, `newest` in all."""
    def forward(self, x, layer_cache=None, start=0):
        q, k, v = (z.view(1, x.shape[1], self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        if layer_cache is None:  # all at once
            near = m.causal_mask(x.shape[1], x.shape[1], "cpu").triu(1 - newest)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
            return self.c_proj(y.transpose(1, 2).reshape(x.shape))
        k, v = layer_cache.append(k, v, start)
        y = m.attention(q, k[:, :, -newest:], v[:, :, -newest:])[0]
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))
    return forward


def without_positions(self, idx, cache=None, start=0):
    x = self.wte(idx)
    for i, block in enumerate(self.h):
        x = block(x, cache.layers[i] if cache else None, start)
    return self.ln_f(x)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_a_linear_layer_of_a_readers_own_stays_as_it_is(int8):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    gpt, ids = toy(), random_ids(1, T)
    gpt.h[0].mlp.c_fc.__class__ = Scaled
    before = gpt(ids)
    m.make_fast(gpt, int8)
    assert type(gpt) is GPT and type(gpt.h[0].mlp.c_fc) is Scaled
    torch.testing.assert_close(gpt(ids), before, rtol=0, atol=0.2 if int8 else 1e-4)


@pytest.mark.parametrize("owner, name, changed", [
    (m, "layer_norm", lambda config: torch.nn.RMSNorm(config.n_embd)),
    (torch.nn.functional, "gelu", lambda x, approximate: torch.relu(x)),
    (m.CausalSelfAttention, "forward", windowed(12)), (m.CausalSelfAttention, "forward", windowed(300)),
    (m.GPT, "hidden", without_positions)])
@torch.no_grad()
def test_a_model_that_its_reader_changed_is_not_replaced_by_the_one_in_numpy(owner, name, changed, monkeypatch):
    unchanged = toy(block_size=400)
    m.make_fast(unchanged)
    assert type(unchanged) is m.FastGPT
    monkeypatch.setattr(owner, name, changed)
    gpt = toy(block_size=400)
    m.make_fast(gpt)
    assert type(gpt) is GPT


def shifted(self, x, layer_cache=None, start=0):
    x = x + torch.nn.functional.pad(x, (0, 0, 1, -1))  # each token with the one before, of those that are new
    x = x + self.attn(self.ln_1(x), layer_cache, start)
    return x + self.mlp(self.ln_2(x))


def window_where_all_is_new(self, x, layer_cache=None, start=0):
    """A window of 8, but only where T = S."""
    return windowed(8 if layer_cache is None else 999)(self, x, layer_cache, start)


@pytest.mark.parametrize("block_size", [1, 2, 3, 40])
def test_a_cache_that_is_forgotten_in_an_edit_is_noticed(block_size, monkeypatch):
    for gpt in (toy(block_size=block_size), GPT(GPTConfig(V, block_size, 4, NH, C)).train()):
        assert m.cache_agrees(gpt)
    assert gpt.training
    for owner, forward in ((m.Block, shifted), (m.CausalSelfAttention, window_where_all_is_new)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", forward)
            for gpt in (toy(block_size=block_size), GPT(GPTConfig(V, block_size, 4, NH, C))):  # large weights, first ones
                assert m.cache_agrees(gpt) == (block_size == 1 or owner is m.CausalSelfAttention and block_size < 9)


def test_in_bfloat16_a_model_stays_as_it_is():
    gpt = toy().to(torch.bfloat16)
    for int8 in (False, True):
        m.make_fast(gpt, int8)
        assert type(gpt) is m.GPT and gpt.wte.weight.requires_grad
        assert type(gpt.h[0].mlp.c_fc) is torch.nn.Linear


# Weights in int8

def int8_layer(rows=24, columns=32, bias=True, seed=0):
    """(an Int8Linear, the weights it was made of, its bias, the weights it stands for in float64: each byte
    times its row's scale, plus its row's smallest value, as the table has them)"""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    b = torch.randn(rows, generator=generator) if bias else None
    layer = m.Int8Linear(weight, b)
    table = layer.table.numpy()
    numbers = np.ascontiguousarray(table[:, -8:]).view(np.float32).astype(np.float64)  # scale, smallest
    values = table[:, :-8] * numbers[:, :1] + numbers[:, 1:]  # (bags * in, width)
    stands_for = values.reshape(-1, columns, layer.width).transpose(0, 2, 1).reshape(rows, columns)
    return layer, weight, b, torch.from_numpy(stands_for)


@pytest.mark.parametrize("rows", [24, 7, 1, 1000])
def test_int8_weights_are_within_half_a_step_of_the_real_ones(rows):
    layer, weight, _, stands_for = int8_layer(rows)
    assert layer.table.dtype == torch.uint8 and layer.table.numel() == weight.numel() * (1 + 8 / layer.width)
    assert rows % layer.width == 0 and layer.width <= 384
    blocks = weight.view(layer.bags, layer.width, -1)  # of each, one input's weights share a scale
    step = (blocks.amax(1) - blocks.amin(1)).double() / 255  # (bags, in)
    step = step.repeat_interleave(layer.width, 0)
    assert ((weight.double() - stands_for).abs() <= step / 2 * (1 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (64,), (1, 1), (2, 3), (1, 70)])
@torch.no_grad()
def test_an_int8_layer_computes_with_the_weights_it_stands_for(shape, bias):
    layer, _, b, stands_for = int8_layer(bias=bias)
    x = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ stands_for.T + (0 if b is None else b.double())
    found = layer(x)
    assert found.shape == (*shape, 24) and found.dtype == torch.float32
    close(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_an_int8_layer_is_near_the_real_one(rows):
    layer, weight, b, _ = int8_layer(400, 300)
    x = random_x(rows, 300)[1]
    error = layer(x) - (x @ weight.T + b)
    assert error.norm() < 0.01 * (x @ weight.T).norm()


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_weights_of_zero_stay_so_in_int8(rows):
    for b in (None, torch.tensor([1.0, 2.0, 3.0])):
        layer = m.Int8Linear(torch.zeros(3, 8), b)
        assert torch.equal(layer(torch.full((rows, 8), 5.0)), (torch.zeros(3) if b is None else b).expand(rows, 3))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_model_in_int8_has_nearly_the_same_logits_with_a_cache_too(bias):
    gpt, ids = toy(bias=bias, n_embd=64), random_ids(1, T)
    wanted, embeddings = gpt(ids)[..., :V], gpt.wte.weight.clone()
    m.make_fast(gpt, int8=True)
    assert not [layer for layer in gpt.modules() if isinstance(layer, torch.nn.Linear)]
    assert len([layer for layer in gpt.modules() if isinstance(layer, m.Int8Linear)]) == 4 * 2 + 1
    assert torch.equal(gpt.wte.weight, embeddings), "ids are still looked up as they were"
    found = gpt(ids)
    assert (found[..., V:] == -math.inf).all()
    cache = KVCache(gpt)
    stepwise = torch.cat([gpt.head(gpt.hidden(ids[:, t:t + 1], cache, t)) for t in range(T)], 1)
    torch.testing.assert_close(stepwise, found, rtol=1e-4, atol=1e-4)
    for logits in (found, stepwise):
        error = logits[..., :V] - wanted
        assert 0 < error.norm() < 0.03 * wanted.norm()


def test_a_model_in_int8_generates_what_its_logits_say():
    gpt = toy(spread=0.4)
    m.make_fast(gpt, int8=True)
    cache = KVCache(gpt)
    said = greedy(gpt, [3, 1, 4], 10, cache)
    assert len(said) == 10 and greedy(gpt, [3, 1, 4], 10) == said
    with torch.no_grad():
        cache, start = KVCache(gpt), 0
        for new, i in zip([[3, 1, 4], *([i] for i in said)], said):
            logits = gpt.head(gpt.hidden(torch.tensor([new]), cache, start))
            assert int(logits[0, -1].argmax()) == i
            start += len(new)


@pytest.mark.parametrize("int8", [False, True])
def test_a_fast_model_has_as_many_parameters_as_before(int8):
    gpt = toy()
    size = gpt.num_params()
    m.make_fast(gpt, int8)
    assert gpt.num_params() == size


# Muon and the optimizers

@pytest.mark.parametrize("rows, cols", [(24, 8), (8, 24), (16, 16)])
def test_newton_schulz_sets_singular_values_near_1_and_keeps_the_vectors(rows, cols):
    rng = np.random.default_rng(0)
    k = min(rows, cols)
    matrices, batch = [], []
    for scale in (1.0, 1e-3, 100.0):  # the size of a gradient does not matter
        u, _ = np.linalg.qr(rng.normal(size=(rows, k)))
        v, _ = np.linalg.qr(rng.normal(size=(cols, k)))
        matrices.append((u, v))
        batch.append(u @ np.diag(scale * np.geomspace(1, 0.003, k)) @ v.T)
    out = newton_schulz(torch.tensor(np.stack(batch), dtype=torch.float32)).double().numpy()
    assert out.shape == (3, rows, cols)
    for (u, v), x in zip(matrices, out):
        values = np.linalg.svd(x, compute_uv=False)
        assert 0.4 < values.min() and values.max() < 1.6
        inside = u.T @ x @ v  # in the basis of the input's singular vectors
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-3
        assert np.diag(inside).min() > 0.4


def np_orthogonalize(x):
    """What newton_schulz does to one matrix, by its singular values, in float64."""
    u, values, v = np.linalg.svd(x, full_matrices=False)
    values = values / np.linalg.norm(values)
    for a, b, c in m.NEWTON_SCHULZ_ROUNDS:
        values = a * values + b * values**3 + c * values**5
    return u @ np.diag(values) @ v


def test_muon_steps_equal_a_plain_loop_over_matrices():
    gpt, lr, decay, momentum = toy(), 0.02, 0.1, 0.95
    params = {name: p for name, p in gpt.h.named_parameters() if p.dim() == 2}
    assert len(params) == 8  # four matrices in each of two blocks
    expected = {name: p.detach().double().numpy() for name, p in params.items()}
    buffers = {name: 0.0 for name in params}
    optimizer, rng = Muon(params.values(), lr, momentum, decay), np.random.default_rng(0)
    for _ in range(2):
        for name, p in params.items():
            grad = rng.normal(size=p.shape)
            p.grad = torch.tensor(grad, dtype=torch.float32)
            buffers[name] = momentum * buffers[name] + (1 - momentum) * grad
            look_ahead = momentum * buffers[name] + (1 - momentum) * grad  # Nesterov's
            squares = np.split(look_ahead, 3) if "c_attn" in name else [look_ahead]  # q, k, v apart
            update = np.concatenate([0.2 * math.sqrt(max(x.shape)) * np_orthogonalize(x) for x in squares])
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        optimizer.step()
    for name, p in params.items():
        close(p, expected[name], atol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizers_hold_every_weight_once_and_decay_no_vector(name):
    gpt = toy()
    optimizers = m.configure_optimizers(gpt, SimpleNamespace(optimizer=name, **RATES))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gpt.parameters())
    for group in groups:
        assert {group["weight_decay"] > 0} == {p.dim() == 2 for p in group["params"]}
        assert group["peak_lr"] == group["lr"]


class Edited(GPT):
    """What readers do: a head of its own, gains of any dimensions, one more layer outside of the blocks, a matrix in a
    block that nothing uses, and one that is kept as it is; buffers and a plain tensor that hold what is computed."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(C, config.padded_vocab_size, bias=False)
        self.more = torch.nn.Linear(C, C)
        self.gain, self.gains = torch.nn.Parameter(torch.tensor(1.5)), torch.nn.Parameter(torch.ones(NH, 1, C // NH))
        self.per_head = torch.nn.Parameter(torch.ones(NH, C // NH))
        self.h[0].unused = torch.nn.Linear(C, C)
        self.h[1].mlp.c_fc.weight = self.h[0].mlp.c_fc.weight
        self.h[1].attn.c_proj.weight.requires_grad = False
        self.register_buffer("kept", torch.arange(C) % 5 > 0)  # booleans
        self.register_buffer("computed", torch.arange(C) / C, persistent=False)
        self.plain = torch.arange(C) / C
        self.init_weights()

    def hidden(self, idx, cache=None, start=0):
        x = self.more(super().hidden(idx, cache, start)) * self.gain * (self.gains[:, 0] * self.per_head).reshape(C)
        return (x + self.computed + self.plain) * self.kept


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_whatever_a_reader_adds_is_trained_but_what_is_unused_or_kept(name):
    torch.manual_seed(0)
    gpt = Edited(GPTConfig(V, T, 2, NH, C))
    assert (gpt.per_head == 1).all(), "what is no layer's weight begins as its maker says"
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    optimizers = m.configure_optimizers(gpt, SimpleNamespace(optimizer=name, **{**RATES, "weight_decay": 0}))
    for _ in range(2):
        gpt(random_ids(2, T), random_ids(2, T, seed=3).flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    kept = {name for name, p in gpt.named_parameters() if p.equal(before[name])}
    assert kept == {"h.0.unused.weight", "h.0.unused.bias", "h.1.attn.c_proj.weight"}


def test_what_a_reader_adds_comes_back_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m, "GPT", Edited)
    gpt, ids = Edited(GPTConfig(260, T, 2, NH, C)).eval(), random_ids(2, T)
    m.save_checkpoint(tmp_path / "a.pt", m.model_checkpoint(gpt, "bytes", "text", step=1, max_iters=2))
    again = m.model_from_checkpoint(m.load_checkpoint(tmp_path / "a.pt"))
    assert again.lm_head.weight is not again.wte.weight and torch.equal(again.eval()(ids), gpt(ids))
    assert again.h[1].mlp.c_fc.weight is again.h[0].mlp.c_fc.weight and again.num_params() == gpt.num_params()
    assert capsys.readouterr().err == ""


def test_without_the_line_that_ties_it_the_head_has_weights_of_its_own(tmp_path):
    text, line = Path(m.__file__).read_text(encoding="utf-8"), "        self.lm_head.weight = self.wte.weight"
    assert text.count(line) == 1
    (tmp_path / "untied_model.py").write_text(text.replace(line, "        "), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import untied_model as u
    torch.manual_seed(0)
    gpt, ids = u.GPT(u.GPTConfig(260, T, 2, NH, C)).eval(), random_ids(2, T)
    assert 0.018 < gpt.lm_head.weight.std() < 0.022 and gpt.num_params() == toy(vocab_size=260).num_params() + 320 * C
    again = u.model_from_checkpoint(u.model_checkpoint(gpt, "bytes", "text"))
    assert torch.equal(again.eval()(ids), gpt(ids))


def test_muon_has_the_blocks_matrices_and_adamw_the_rest_each_at_its_rate():
    gpt = toy()
    rates = {id(p): (type(optimizer).__name__, group["peak_lr"])
             for optimizer in m.configure_optimizers(gpt, SimpleNamespace(optimizer="muon", **RATES))
             for group in optimizer.param_groups for p in group["params"]}
    for name, p in gpt.named_parameters():
        of_a_block = name.startswith("h.") and p.dim() == 2
        assert rates[id(p)] == (("Muon", 0.01) if of_a_block else ("AdamW", 0.003)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muons_products_are_of_the_dtype_that_was_chosen(dtype):
    gpt = toy()
    muon, _ = m.configure_optimizers(gpt, SimpleNamespace(optimizer="muon", **RATES), dtype)
    before, seen = gpt.h[0].mlp.c_fc.weight.detach().clone(), []
    gpt(random_ids(2, T), random_ids(2, T).flatten()).backward()
    with SeeProducts(seen):
        muon.step()
    assert set(seen) == {dtype} and len(seen) == 3 * 4 * len(muon.param_groups)  # three a round, of four
    assert gpt.h[0].mlp.c_fc.weight.dtype == torch.float32 and not gpt.h[0].mlp.c_fc.weight.equal(before)


class SeeProducts(TorchDispatchMode):
    """Within it, the dtype of each batch of matrix products goes into a list."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_adamw_is_fused_wherever_torch_can(monkeypatch, kind):
    gpt, asked = toy(), []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **_: asked.append(fused) or
                        SimpleNamespace(param_groups=[]))
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device(kind))
    m.configure_optimizers(gpt, SimpleNamespace(optimizer="adamw", **RATES))
    assert asked == [kind in _get_fused_kernels_supported_devices()] == [True]


# Checkpoints

def save_toy(path, seed=0, **changes):
    gpt = toy(seed=seed, vocab_size=260)  # that many ids has the tokenizer "bytes"
    made = m.model_checkpoint(gpt, "bytes", kind="text", step=3, max_iters=5)
    m.save_checkpoint(path, {**made, **changes})
    return gpt


def test_a_checkpoint_gives_back_the_same_logits(tmp_path):
    gpt, ids = save_toy(tmp_path / "new" / "best.pt"), random_ids(2, T)
    checkpoint = m.load_checkpoint(tmp_path / "new" / "best.pt")
    assert (checkpoint["tokenizer"], checkpoint["kind"], checkpoint["step"]) == ("bytes", "text", 3)
    assert torch.equal(m.model_from_checkpoint(checkpoint).eval()(ids), gpt(ids))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["best.pt"]


def test_a_checkpoint_of_before_there_was_an_lm_head_is_read(tmp_path):
    """Names and shapes as the first versions wrote them."""
    shapes = {"wte.weight": (320, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        shapes |= {f"h.{i}.ln_1.weight": (C,), f"h.{i}.ln_1.bias": (C,), f"h.{i}.ln_2.weight": (C,),
                   f"h.{i}.ln_2.bias": (C,), f"h.{i}.attn.c_attn.weight": (3 * C, C),
                   f"h.{i}.attn.c_attn.bias": (3 * C,), f"h.{i}.attn.c_proj.weight": (C, C),
                   f"h.{i}.attn.c_proj.bias": (C,), f"h.{i}.mlp.c_fc.weight": (4 * C, C),
                   f"h.{i}.mlp.c_fc.bias": (4 * C,), f"h.{i}.mlp.c_proj.weight": (C, 4 * C),
                   f"h.{i}.mlp.c_proj.bias": (C,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = dict(vocab_size=260, block_size=T, n_layer=2, n_head=NH, n_embd=C, dropout=0.1, bias=True)
    torch.save({"config": config, "model": weights, "tokenizer": "bytes", "kind": "text", "step": 3,
                "max_iters": 5}, tmp_path / "best.pt")
    gpt, ids = m.model_from_checkpoint(m.load_checkpoint(tmp_path / "best.pt")).eval(), random_ids(1, T)
    named = {name: weight.double().numpy() for name, weight in weights.items()}
    close(gpt(ids)[0, :, :260], np_gpt(ids[0], named)[:, :260])
    assert m.model_checkpoint(gpt, "bytes", "text")["model"].keys() == weights.keys(), "and is written so"


def test_a_checkpoint_needs_no_trust(tmp_path):
    gpt = save_toy(tmp_path / "best.pt")
    loaded = torch.load(tmp_path / "best.pt", weights_only=True)  # no pickled code in it
    assert set(loaded["model"]) == {name for name, _ in gpt.named_parameters()}
    assert loaded["config"]["n_embd"] == C


class Bomb:
    """Unpickled without care, it leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path):
    torch.save({"config": {}, "tokenizer": "bytes", "model": Bomb(tmp_path / "owned")}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt"):
        m.load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "owned").exists()


def test_a_loaded_model_can_be_trained_and_the_file_does_not_change(tmp_path):
    save_toy(tmp_path / "best.pt")
    before = (tmp_path / "best.pt").read_bytes()
    gpt = m.model_from_checkpoint(m.load_checkpoint(tmp_path / "best.pt"), dropout=0.25)
    assert gpt.config.dropout == 0.25
    gradients(gpt, (random_ids(1, 4), random_ids(1, 4)))
    torch.optim.SGD(gpt.parameters(), lr=0.1).step()
    assert (tmp_path / "best.pt").read_bytes() == before


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_checkpoint_cut_short_is_refused_by_name(tmp_path, part):
    path = tmp_path / "best.pt"
    save_toy(path)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        m.load_checkpoint(path)


@pytest.mark.parametrize("content", [b"garbage", bytes(range(256)) * 20, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        m.load_checkpoint(path)


@pytest.mark.parametrize("stranger", [{"weights": 1}, [1, 2, 3]])
def test_another_programs_checkpoint_is_refused_by_name(tmp_path, stranger):
    path = tmp_path / "best.pt"
    torch.save(stranger, path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        m.load_checkpoint(path)


def test_a_missing_checkpoint_or_a_folder_is_named_with_the_hint(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(path)) + ".*Bake one"):
            m.load_checkpoint(path, "Bake one.")


def test_weights_that_do_not_fit_the_config_are_a_users_mistake(tmp_path):
    save_toy(tmp_path / "best.pt")
    checkpoint = m.load_checkpoint(tmp_path / "best.pt")
    checkpoint["config"] = {**checkpoint["config"], "n_embd": 2 * C}
    with pytest.raises(ValueError, match="fit"):
        m.model_from_checkpoint(checkpoint)


def test_positions_that_a_reader_froze_stay_frozen_in_a_shorter_context():
    gpt = toy()
    gpt.wpe.weight.requires_grad = False
    for block_size in (T, T - 1):
        m.crop_block_size(gpt, block_size)
        assert gpt.wpe.weight.shape == (block_size, C) and not gpt.wpe.weight.requires_grad
    with pytest.raises(ValueError, match=f"block_size={T}"):
        m.crop_block_size(gpt, T)


def test_a_weight_of_integers_is_refused():
    checkpoint = m.model_checkpoint(toy(), "bytes", "text")
    checkpoint["model"]["h.0.ln_1.bias"] = torch.zeros(C, dtype=torch.int64)
    with pytest.raises(ValueError, match="h.0.ln_1.bias is of type torch.int64"):
        m.model_from_checkpoint(checkpoint)


def test_weights_of_another_model_py_are_told_with_the_file_and_the_cause(monkeypatch):
    checkpoint = m.model_checkpoint(toy(bias=False), "bytes", "text")
    monkeypatch.setattr(m, "layer_norm", lambda config: torch.nn.LayerNorm(config.n_embd, elementwise_affine=False))
    with pytest.raises(ValueError, match="^best.pt: the tensor h.0.ln_1.weight is none of .*It was made by another model.py"):
        m.model_from_checkpoint(checkpoint, source="best.pt")
    monkeypatch.setattr(m, "layer_norm", lambda config: torch.nn.LayerNorm(config.n_embd))
    with pytest.raises(ValueError, match="^best.pt: the tensor h.0.ln_1.bias is missing.*It was made by another model.py"):
        m.model_from_checkpoint(checkpoint, source="best.pt")


@pytest.mark.parametrize("owner, name, changed", [
    (m, "layer_norm", lambda config: torch.nn.RMSNorm(config.n_embd)),
    (torch.nn.functional, "gelu", lambda x, approximate: torch.relu(x)),
    (m.CausalSelfAttention, "forward", windowed(8)),
    (m.GPT, "head", lambda self, x: 2 * torch.tanh(self.lm_head(x) / 2)), (m.GPT, "hidden", without_positions)])
def test_who_loads_weights_into_a_model_py_that_computes_something_else_is_warned(owner, name, changed, capsys,
                                                                                 monkeypatch):
    checkpoint = m.model_checkpoint(toy(block_size=32, bias=False), "bytes", "text")
    for dropout in (0.0, 0.5):
        m.model_from_checkpoint(checkpoint, dropout)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(owner, name, changed)
    m.model_from_checkpoint(checkpoint, source="best.pt")
    assert re.match("warning: best.pt was trained with another model.py than", capsys.readouterr().err)


def test_a_full_disk_leaves_the_earlier_checkpoint_as_it_was(tmp_path):
    path = tmp_path / "best.pt"
    save_toy(path)
    before = path.read_bytes()
    with largest_file(20_000):
        for size in (100_000, 6_000):  # far over the limit, and over it with the last few bytes
            with pytest.raises(OSError, match=f"^{re.escape(str(path))}:"):
                m.save_checkpoint(path, {"model": {"w": torch.zeros(size)}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_on_windows_a_checkpoint_is_read_whole_so_that_it_can_be_replaced(tmp_path, monkeypatch):
    gpt = save_toy(tmp_path / "last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        loaded = m.load_checkpoint(tmp_path / "last.pt")["model"]
    with open(tmp_path / "last.pt", "r+b") as f:
        f.write(bytes(os.path.getsize(tmp_path / "last.pt")))  # what is mapped changes with the file
    for name, weight in m.stored_weights(gpt).items():
        assert weight.equal(loaded[name]), name


# Devices

@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_what_there_is(only_cpu):
    assert m.pick_device()[:2] == (torch.device("cpu"), torch.float32)
    assert m.pick_device("cpu", "bfloat16")[:2] == (torch.device("cpu"), torch.bfloat16)


def test_a_macs_gpu_is_used_by_name_only(only_cpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, _, why = m.pick_device()
    assert device == torch.device("cpu") and "--device=mps" in why
    assert m.pick_device("mps")[:2] == (torch.device("mps"), torch.float32)


@pytest.mark.parametrize("device", ["gpu", "tpu!", "cuda", "cuda:1", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(only_cpu, device):
    with pytest.raises(ValueError, match=f"device='{device}'.*auto"):
        m.pick_device(device)


def test_the_second_gpu_of_a_machine_with_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    assert m.pick_device("cuda:0")[:2] == (torch.device("cuda:0"), torch.bfloat16)
    with pytest.raises(ValueError, match="device='cuda:1'"):
        m.pick_device("cuda:1")


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    device, dtype, why = m.pick_device()
    assert (device, dtype) == (torch.device("cuda"), torch.float32) and "this GPU has no bfloat16" in why
    assert m.pick_device("cuda", "float32")[2] == "cuda (as set), float32 (as set)"
    with pytest.raises(ValueError, match="dtype=bfloat16: cuda.*float32"):
        m.pick_device("cuda", "bfloat16")


@pytest.mark.parametrize("dtype", ["float64", "half", "float16", "load", ""])
def test_a_precision_that_is_not_offered_is_refused(only_cpu, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'.*float32"):
        m.pick_device("cpu", dtype)


def test_one_flipped_bit_anywhere_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "best.pt"
    gpt = save_toy(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for p in gpt.parameters():
        raw = p.detach().numpy().tobytes()[:32]
        at = whole.index(raw) + rng.integers(len(raw))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*damaged.*checksum"):
            m.load_checkpoint(path)


def nan_weight(weights):
    weights["h.1.mlp.c_fc.bias"][3] = math.nan


@pytest.mark.parametrize("broken, told", [
    (lambda c: c.pop("step"), "step"), (lambda c: c.update(max_iters="5"), "max_iters"),
    (lambda c: c.update(model=[1]), "model"), (lambda c: c.update(kind="image"), "image"),
    (lambda c: c.update(kind="chat", turns=0), "turns"), (lambda c: c["config"].update(n_hedd=2), "n_hedd"),
    (lambda c: c["config"].update(n_layer=10**9), "fit"), (lambda c: c["config"].update(n_embd=32.0), "n_embd=32.0"),
    (lambda c: c["config"].update(n_head=0), "n_head=0"), (lambda c: c["config"].update(block_size=10**12), "fit"),
    (lambda c: c["config"].update(vocab_size=261), "261"), (lambda c: c.update(tokenizer="gpt2"), "50260"),
    (lambda c: c.update(tokenizer={"pattern": "x*", "merges": []}), "pattern"),
    (lambda c: c.update(tokenizer=7), "pattern and merges"), (lambda c: c.pop("kind"), "KeyError"),
    (lambda c: nan_weight(c["model"]), r"h\.1\.mlp\.c_fc\.bias.*not finite"),
    (lambda c: c["model"].update({"ln_f.bias": c["model"]["ln_f.bias"].double()}), r"ln_f\.bias.*float64"),
    (lambda c: c["model"].update({"ln_f.bias": 3}), "AttributeError")])
def test_contents_that_cannot_be_right_are_one_line(tmp_path, broken, told):
    path = tmp_path / "best.pt"
    save_toy(path)
    checkpoint = torch.load(path)
    broken(checkpoint)
    m.save_checkpoint(path, checkpoint)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{told}.*make a new one") as caught:
        m.load_checkpoint(path)
    assert "\n" not in str(caught.value)
