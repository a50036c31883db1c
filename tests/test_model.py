"""The NumPy lesson: every part of a GPT in a few lines of float64 NumPy, next to model.py's. Then gradients,
the KV cache, generation and sampling."""
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig, KVCache, sample

V, T, C, NH = 70, 16, 32, 2  # vocabulary, block size, channels, heads of the toy model


def toy(seed=0, spread=0.15, **changes):
    """Return a small GPT in which every parameter is random, so that a missing bias or norm changes logits."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**dict(vocab_size=V, block_size=T, n_layer=2, n_head=NH, n_embd=C), **changes}))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * spread)
    return gpt.eval()


def arrays(module):
    """Return a module's weights by name, as float64."""
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def random_x(*shape, seed=1):
    """Return the same random numbers twice: (a float64 array, a float32 tensor)."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x, torch.tensor(x, dtype=torch.float32)


def random_ids(*shape, seed=2):
    return torch.tensor(np.random.default_rng(seed).integers(0, V, shape))


def close(ours, oracle, atol=1e-5):
    np.testing.assert_allclose(ours.detach().double().numpy(), oracle, rtol=0, atol=atol)


# The lesson: one part after another, each in NumPy first. Here x is (T, C): one text, no batch.

# Embeddings: a vector for each token, plus one for its position.

def test_the_first_block_reads_token_plus_position_embeddings():
    gpt, ids, seen = toy(), random_ids(2, 5), []
    gpt.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gpt(ids)
    w = arrays(gpt)
    for row in range(2):
        close(seen[0][row], w["wte.weight"][ids[row]] + w["wpe.weight"][[0, 1, 2, 3, 4]])


@torch.no_grad()
def test_without_positions_the_order_of_earlier_tokens_does_not_matter():
    gpt, ids = toy(n_layer=1), torch.tensor([[3, 1, 4, 5]])
    swapped = ids[:, [1, 0, 2, 3]]
    assert (gpt(ids) - gpt(swapped))[0, -1, :V].abs().max() > 1e-2
    gpt.wpe.weight.zero_()
    torch.testing.assert_close(gpt(ids)[0, -1, :V], gpt(swapped)[0, -1, :V], rtol=0, atol=1e-5)


# Layer norm: normalize each token's channels before attention and before the MLP.

def np_layer_norm(x, w, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


@pytest.mark.parametrize("scale, shift", [(3, 5), (0.01, 0)])  # the second shows the 1e-5
def test_layer_norm_normalizes_then_scales_and_shifts(scale, shift):
    ln, (x, tx) = toy().h[0].ln_1, random_x(7, C)
    w = {f"ln.{name}": value for name, value in arrays(ln).items()}
    close(ln(tx * scale + shift), np_layer_norm(x * scale + shift, w, "ln"))


# Attention: each token attends to itself and the tokens before it.

def np_linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_one_head(q, k, v):
    scores = q @ k.T / np.sqrt(q.shape[1])  # (T, T): how well each query fits each key
    scores[np.triu_indices(len(q), 1)] = -np.inf  # the causal mask: no token attends to later ones
    return np_softmax(scores) @ v


def np_attention(x, w, name="", n_head=NH):
    q, k, v = np.split(np_linear(x, w, f"{name}c_attn"), 3, axis=1)  # (T, C) each
    heads = zip(*(np.split(z, n_head, axis=1) for z in (q, k, v)))  # n_head times three (T, hs)
    return np_linear(np.concatenate([np_one_head(*head) for head in heads], axis=1), w, f"{name}c_proj")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_and_written_out_attention_have_the_same_logits_and_gradients(dropout):
    ids, targets = random_ids(3, T), random_ids(3, T, seed=3)
    fused, written_out = (toy(fused=fused, dropout=dropout) for fused in (True, False))
    torch.testing.assert_close(fused(ids), written_out(ids), rtol=0, atol=1e-4)
    for name, gradient in gradients(fused, (ids, targets)).items():
        other = gradients(written_out, (ids, targets))[name]
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("n_head", [1, 4])
def test_attention_concatenates_its_heads_and_projects(n_head):
    attn, (x, tx) = toy(n_head=n_head).h[0].attn, random_x(3, 9, C)
    for row in range(3):
        close(attn(tx)[row], np_attention(x[row], arrays(attn), n_head=n_head))


# The MLP: each token separately, with a hidden layer of four times as many channels.

def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_mlp(x, w, name=""):
    return np_linear(np_gelu(np_linear(x, w, f"{name}c_fc")), w, f"{name}c_proj")


def test_mlp_is_two_linear_layers_around_a_tanh_gelu():
    mlp, (x, tx) = toy().h[0].mlp, random_x(4, C)
    assert mlp.c_fc.weight.shape == (4 * C, C)
    close(mlp(3 * tx), np_mlp(3 * x, arrays(mlp)))


# A block: attention and MLP each add to the residual stream.

def np_block(x, w, name=""):
    x = x + np_attention(np_layer_norm(x, w, f"{name}ln_1"), w, f"{name}attn.")
    return x + np_mlp(np_layer_norm(x, w, f"{name}ln_2"), w, f"{name}mlp.")


def test_a_block_adds_attention_and_mlp_to_the_residual_stream():
    block, (x, tx) = toy().h[1], random_x(8, C)
    close(block(tx[None])[0], np_block(x, arrays(block)))


# The head: weight tying. And the whole model.

def np_gpt(ids, w, n_layer=2):
    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for i in range(n_layer):
        x = np_block(x, w, f"h.{i}.")
    return np_layer_norm(x, w, "ln_f") @ w["wte.weight"].T


def test_the_head_is_tied_to_the_token_embedding_and_padding_gets_minus_infinity():
    gpt, (x, tx) = toy(), random_x(3, C)
    logits = gpt.head(tx)
    assert gpt.config.padded_vocab_size == logits.shape[1] == 128  # 70, rounded up to a multiple of 64
    close(logits[:, :V], x @ arrays(gpt)["wte.weight"][:V].T)
    assert (logits[:, V:] == -math.inf).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_model(bias):
    gpt, ids = toy(bias=bias), random_ids(3, T)
    assert any("bias" in name for name in arrays(gpt)) == bias
    logits = gpt(ids)
    for row in range(3):
        close(logits[row, :, :V], np_gpt(ids[row], arrays(gpt))[:, :V], atol=1e-4)


def test_dropout_is_active_only_in_training_and_in_all_four_places():
    gpt, ids = toy(), random_ids(1, T)
    attn, mlp = gpt.h[0].attn, gpt.h[0].mlp
    for module in (gpt.drop, attn.attn_dropout, attn.resid_dropout, mlp.dropout):
        module.p = 0.5
        gpt.eval()
        assert torch.equal(gpt(ids), gpt(ids))
        gpt.train()
        assert not torch.equal(gpt(ids), gpt(ids))
        module.p = 0.0
    assert torch.equal(gpt(ids), gpt(ids))
    gpt = toy(dropout=0.25)
    attn, mlp = gpt.h[1].attn, gpt.h[1].mlp
    assert gpt.drop.p == attn.attn_dropout.p == attn.resid_dropout.p == mlp.dropout.p == 0.25


# The loss and its gradient

def test_the_loss_is_the_sum_of_minus_log_probabilities():
    gpt, ids, targets = toy(), random_ids(2, 6), random_ids(2, 6, seed=3)
    by_hand = 0.0
    for row in range(2):
        probs = np_softmax(np_gpt(ids[row], arrays(gpt))[:, :V])
        by_hand -= sum(math.log(probs[t, targets[row, t]]) for t in range(6))
    assert gpt(ids, targets.flatten()).item() == pytest.approx(by_hand, abs=1e-3)


def gradients(gpt, *batches):
    gpt.zero_grad()
    for ids, targets in batches:
        gpt(ids, targets.flatten()).backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters()}


def test_projections_into_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(V, T, 8, NH, 64))
    for block in gpt.h:
        for layer, std in ((block.attn.c_attn, 0.02), (block.mlp.c_fc, 0.02),
                           (block.attn.c_proj, 0.005), (block.mlp.c_proj, 0.005)):  # 0.02 / sqrt(2 * 8)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


# FLOPs

@pytest.mark.parametrize("bias", [True, False])
def test_flops_are_those_that_torch_counts_in_the_matrix_products(bias):
    gpt = GPT(GPTConfig(vocab_size=100, block_size=32, n_layer=3, n_head=2, n_embd=24, bias=bias, fused=False))
    idx, positions = torch.zeros(5, 20, dtype=torch.long), torch.tensor([1, 2, 30, 31, 32, 77, 99])
    with FlopCounterMode(display=False) as counted:
        gpt(idx, torch.zeros(7, dtype=torch.long), positions).backward()
    assert gpt.flops(7, 5 * 20, 5 * 20 * 20) == counted.get_total_flops()


# The KV cache and generate

@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 1, 3, 6], [T]])
@torch.no_grad()
def test_with_a_cache_the_logits_are_those_of_the_full_forward_pass(sizes, fused):
    gpt, ids = toy(fused=fused), random_ids(1, T)
    full, cache, start = gpt(ids), KVCache(gpt), 0
    for size in sizes:
        logits = gpt.head(gpt.hidden(ids[:, start:start + size], cache, start))
        torch.testing.assert_close(logits[..., :V], full[:, start:start + size, :V], rtol=0, atol=1e-4)
        start += size
    assert start == T


@torch.no_grad()
def greedy_without_cache(gpt, ids, n):
    """Decode without a cache: past block_size the window slides by half a block; all of it is computed each time."""
    ids, start, block = list(ids), 0, gpt.config.block_size
    for _ in range(n):
        while len(ids) - start > block:
            start += block // 2
        ids.append(int(gpt(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[-n:]


def greedy(gpt, ids, n, cache=None):
    return list(gpt.generate(ids, n, temperature=0, cache=cache))


@pytest.mark.parametrize("length, n", [(3, 3 * T), (T - 1, 12), (T, 12), (T + 1, 12), (2 * T, 12), (3 * T + 3, 12)])
def test_generate_equals_no_cache_for_a_prompt_of_any_length_and_past_block_size(length, n):
    gpt, ids = toy(spread=0.4), random_ids(length).tolist()
    slow = greedy_without_cache(gpt, ids, n)
    assert len(set(slow)) > 4, "a model that repeats itself would show nothing"
    assert greedy(gpt, ids, n) == slow


def test_a_cache_kept_for_the_next_turn_saves_work_and_changes_no_id(monkeypatch):
    gpt = toy(spread=0.4)
    cache, first = KVCache(gpt), [3, 1, 4]
    replied = greedy(gpt, first, 4, cache)
    assert replied == greedy_without_cache(gpt, first, 4)
    second = [*first, *replied, 9, 2, 6]
    wanted, read, hidden = greedy_without_cache(gpt, second, 5), [], gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda idx, *args, **kwargs: read.append(idx.shape[1]) or hidden(
        idx, *args, **kwargs))
    assert greedy(gpt, second, 5, cache) == wanted
    assert read == [4, 1, 1, 1, 1]  # the reply's last token, the new message's three, then one by one


@pytest.mark.parametrize("other", [[3, 1, 4, 15, 9, 2, 6, 5], [7], [3], [3, 1, 4, 1, 5]])
def test_a_cache_of_different_ids_changes_nothing(other):
    gpt = toy(spread=0.4)
    cache = KVCache(gpt)
    greedy(gpt, [3, 1, 4, 1, 5, 9], 2 * T, cache)  # past block_size: the window has slid
    assert greedy(gpt, other, 10, cache) == greedy_without_cache(gpt, other, 10)
    greedy(gpt, [3, 1, 4, 1, 5, 9], 3, cache)
    assert greedy(gpt, other, 2 * T, cache) == greedy_without_cache(gpt, other, 2 * T)


def test_an_interrupted_generate_leaves_a_usable_cache():
    gpt = toy(spread=0.4)
    cache = KVCache(gpt)
    half = gpt.generate([3, 1, 4], 10, temperature=0, cache=cache)
    begun = [next(half), next(half)]
    half.close()
    assert greedy(gpt, [3, 1, 4, *begun], 5, cache) == greedy_without_cache(gpt, [3, 1, 4], 7)[2:]


def test_generate_does_not_touch_the_training_rng():
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


def test_padding_ids_are_never_sampled():
    gpt = toy()
    with torch.no_grad():
        gpt.wte.weight[V:100] = 1000.0
        gpt.wte.weight[100:] = -1000.0  # half of them would have huge logits, for any hidden state
    assert (gpt(random_ids(1, 4)).softmax(-1)[..., V:] == 0).all()
    for temperature in (0, 1.0, 50.0):
        assert all(i < V for i in gpt.generate([1], 60, temperature=temperature, seed=0))


@pytest.mark.parametrize("training", [True, False])
def test_generate_uses_no_dropout_and_restores_the_mode(training):
    gpt = toy(dropout=0.5)
    wanted = greedy(gpt, [3, 1], 6)
    gpt.train(training)
    assert greedy(gpt, [3, 1], 6) == wanted and gpt.training is training
    half = gpt.generate([3, 1], 6)
    next(half)
    half.close()
    assert gpt.training is training and gpt.h[0].training is training


# Sampling

def choices(logits, monkeypatch, **knobs):
    """Return {id: probability} of every id that `sample` could have chosen."""
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


@pytest.mark.parametrize("top_k, top_p, left", [
    (2, 1.0, {1, 3}),
    (0, 0.60, {1, 3}),  # 0.40 + 0.30
    (0, 0.80, {1, 3, 4}),  # 0.40 + 0.30 + 0.15
    (3, 0.80, {1, 3}),  # of the 0.85 that top_k leaves: 0.70 / 0.85 is over 0.80
])
def test_top_k_and_top_p_leave_these_candidates(top_k, top_p, left, monkeypatch):
    probs = torch.tensor([0.10, 0.40, 0.05, 0.30, 0.15])  # from most to least likely: ids 1, 3, 4, 0, 2
    assert choices(probs.log(), monkeypatch, top_k=top_k, top_p=top_p).keys() == left
    assert len(choices(torch.zeros(4), monkeypatch, top_p=0.5)) == 2  # 0.25 + 0.25 reaches 0.5


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.5])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (7, 1.0), (400, 1.0), (0, 0.01), (0, 0.5),
                                          (0, 0.93), (0, 0.9999), (7, 0.5), (20, 0.9)])
def test_candidates_and_probabilities_are_those_of_transformers(
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


@pytest.mark.parametrize("logits, penalty, said", [
    ([4.0, 3.0, 1.0], 2.0, [1, 0, 0, 0]),  # after 0: 2, 3, 1; after 0 and 1: 2, 1.5, 1
    ([4.0, 3.0, 1.0], 8.0, [1, 2, 0, 0]),  # 0.5, 3, 1; then 0.5, 0.375, 1; then 0.5, 0.375, 0.125
    ([-1.0, -1.5, -9.0], 2.0, [1, 0, 0, 0])])  # negative logits are multiplied: -2, -1.5, -9; then -2, -3, -9
def test_the_repetition_penalty_on_cases_by_hand(logits, penalty, said, monkeypatch):
    gpt = toy(vocab_size=3)
    monkeypatch.setattr(gpt, "head", lambda x: torch.tensor(logits).expand(*x.shape[:-1], 3).clone())
    assert list(gpt.generate([0], 4, temperature=0, repetition_penalty=penalty)) == said


@torch.no_grad()
def test_the_repetition_penalty_is_that_of_transformers_on_the_window(monkeypatch):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    gpt, given, ids, start = toy(spread=0.4), [], [3, 1, 4, 1], 0
    draw_one = torch.multinomial
    monkeypatch.setattr(torch, "multinomial",
                        lambda probs, *args, **knobs: given.append(probs) or draw_one(probs, *args, **knobs))
    said = list(gpt.generate(ids, 3 * T, repetition_penalty=1.7, seed=0, stop_ids=(1, V)))
    assert len(said) > 2 * T, "it must slide past block_size"
    for probs, i in zip(given, said):
        while len(ids) - start > T:
            start += T // 2
        window = torch.tensor([ids[start:]])
        plain = gpt(window)[:, -1, :V]
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(window, plain.clone())[0]
        wanted[1] = plain[0, 1]
        torch.testing.assert_close(probs.log(), wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)
        ids.append(i)


# torch.compile, without a compiler: tracing and gradients

def compiled(function):
    """Trace a function with torch.compile; fail if it would fall back to Python."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("picked", [None, [1, 2, 7, 12, 30]])
def test_compiled_loss_and_gradients_are_those_of_eager_mode(picked):
    gpt, ids, targets = toy(n_layer=1), random_ids(2, T), random_ids(2, T, seed=3).flatten()
    positions = None if picked is None else torch.tensor(picked)
    targets = targets if picked is None else targets[positions]
    losses, found = [], []
    for forward in (gpt, compiled(gpt)):
        gpt.zero_grad()
        losses.append(forward(ids, targets, positions))
        losses[-1].backward()
        found.append({name: p.grad.clone() for name, p in gpt.named_parameters()})
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)
