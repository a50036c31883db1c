"""All of GPT-2: attention, MLP, block, KV cache, generation, sampling, and OpenAI's weights.

`train.py` trains it and `chat.py` talks to it:

    python train.py config/train_recite.py
    python chat.py --init_from=gpt2 --prompt="Once upon a time"

Read it from the top: parts come first. A block is layer norm, attention, layer norm and an MLP. A
GPT is embeddings, a stack of blocks, and the token embeddings again as the output head, which gives
each token of the vocabulary a score, its logit; softmax turns logits into probabilities. Trailing
comments give shapes: B batch, T new tokens, S all tokens so far, C = n_embd channels, nh heads of
hs = C / nh channels, V vocabulary. Modules have GPT-2's own names, so that its files load.

New to PyTorch? Calling a module, as in self.attn(x), runs its forward. view is NumPy's reshape,
transpose(1, 2) swaps two axes and mT the last two, split(C, dim=2) cuts into pieces of size C.

Papers: Attention Is All You Need (Vaswani et al. 2017); Language Models are Unsupervised Multitask
Learners (Radford et al. 2019, "GPT-2").
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class GPTConfig:
    vocab_size: int = 50260  # GPT-2's 50257 token ids, <|user|>, <|assistant|>, <|end|>
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2
    fused: bool = True  # attention in one fused kernel; False: as written out below, slower

    @property
    def padded_vocab_size(self):
        """Rows of the embedding table: a multiple of 64 makes matrix products faster. The extra
        rows belong to no token: the head gives them a logit of -inf, so they are never sampled."""
        return (self.vocab_size + 63) // 64 * 64


def causal_mask(T, S, device):
    """(T, S) booleans: True where query i (of the last T) may attend to key j (of S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and the tokens before it, and takes a weighted mean of their
    values. The weights come from how well its query matches their keys."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.n_head = config.n_head
        self.fused = config.fused
        # One product computes each token's query (what it looks for), key (what it offers) and
        # value (what it passes on).
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0):
        """x: (B, T, C) -> (B, T, C). With a LayerCache that holds the previous `start` tokens, x
        has only the new ones."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        # Rotary positions (RoPE) would rotate q and k here, from position `start` on; drop wpe.
        if cache is not None:
            k, v = cache.store(k, v, start)  # (B, nh, S, hs)
        S = k.shape[2]
        if not self.fused:
            scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, nh, T, S)
            # No token attends to later ones: exp(-inf) = 0.
            scores = scores.masked_fill(~causal_mask(T, S, x.device), -math.inf)
            weights = self.attn_dropout(scores.softmax(dim=-1))  # each row sums to 1
            y = weights @ v  # (B, nh, T, hs)
        else:
            # The same in one fused kernel, which never stores the (T, S) weights. is_causal is for
            # T = S. After cached tokens, several new ones need an explicit mask, and a single one
            # needs none: it may attend to everything.
            mask = causal_mask(T, S, x.device) if start and T > 1 else None
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=start == 0,
                dropout_p=self.attn_dropout.p if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Process each token by itself: widen to 4 C channels, apply a nonlinearity (GELU, Hendrycks &
    Gimpel 2016, with GPT-2's tanh approximation), project back to C. SwiGLU would
    return c_proj(F.silu(gate(x)) * c_fc(x)) instead, where gate is another Linear like c_fc."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="tanh")
        return self.dropout(self.c_proj(x))


def layer_norm(config):
    """Layer norm (Ba et al. 2016): normalize each token's channels to mean 0 and variance 1, then
    apply a learned scale and shift. All norms are created here, where RMSNorm would go."""
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention moves information between tokens, and the MLP processes it. Both read x, the
    residual stream, through a layer norm and add their output to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), cache, start)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final layer norm, and the token embeddings
    again as the output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embeddings
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = layer_norm(config)
        self.init_weights()

    def init_weights(self):
        """Initial weights as in nanoGPT: normal(0, 0.02), biases 0, norms 1 (PyTorch's default)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of these are summed up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2 and name.endswith("weight"):
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, start=0):
        """Token ids (B, T) -> final hidden states (B, T, C). With a KVCache that holds the previous
        `start` tokens, idx has only the new ones."""
        T, block_size = idx.shape[1], self.config.block_size
        assert start + T <= block_size, f"{start + T} tokens, block_size {block_size}"
        x = self.drop(self.wte(idx) + self.wpe.weight[start:start + T])  # (B, T, C) + (T, C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layers[i], start)
        return self.ln_f(x)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., padded V), -inf for the padding. Weight tying
        (Press & Wolf 2017): the output matrix is the token embedding, so a logit measures how
        well that token's embedding matches x. An untied head would be a separate nn.Linear."""
        logits = F.linear(x, self.wte.weight)
        logits[..., self.config.vocab_size:] = -math.inf
        return logits

    def forward(self, idx, targets=None, loss_positions=None):
        """Return the logits (B, T, padded V), or with targets the loss.

        idx: token ids (B, T). targets: N next token ids, one for each position that counts toward
        the loss. loss_positions: the flat indices b * T + t (N,) of those positions; None: all
        B * T. The loss is a sum over targets, in nats.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)  # (B * T, C)
        if loss_positions is not None:
            x = x[loss_positions]  # (N, C): the head, the widest layer, skips the other positions
        logits = self.head(x).float()  # (N, padded V)
        # A sum, not a mean: batches of chats have unequal numbers of targets. The caller divides by
        # the number of targets in the whole step: see train_step in train.py.
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, *, stop_ids=(), seed=None, cache=None, **sampling):
        """Continue `ids` (a non-empty list): yield new ids one by one, stopping before any of
        stop_ids. Beyond block_size, the oldest ids leave the context (see window_start).

        The same seed gives the same ids. cache: a KVCache from an earlier call; the prefix of `ids`
        that it already holds is not computed again. sampling: temperature, top_k, top_p and
        repetition_penalty, see `sample`.
        """
        ids = list(ids)
        cache = KVCache(self) if cache is None else cache
        generator = seeded_generator(seed)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                window = ids[window_start(len(ids), self.config.block_size):]
                start = cache.keep_prefix(window)
                new = torch.tensor([window[start:]], device=self.wte.weight.device)  # (1, T)
                x = self.hidden(new, cache, start)  # (1, T, C); T is 1 after the prompt
                cache.ids = window
                logits = self.head(x[:, -1])[0, :self.config.vocab_size]  # (V,), without padding
                next_id = sample(logits.float().cpu(), window, generator, exempt=stop_ids,
                                 **sampling)
                if next_id in stop_ids:
                    return
                ids.append(next_id)
                yield next_id
        finally:
            self.train(was_training)

    def num_params(self):
        """Number of parameters, position embeddings and vocabulary padding included."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, targets, tokens, pairs):
        """Floating-point operations of a training step on `tokens` tokens, `targets` of which reach
        the output head; `pairs` counts pairs of a query and a key: T * T for each row. Each
        weight of a matrix costs 6 FLOPs per token (2 forward, 4 backward), attention 12 * C per
        pair and layer (Chowdhery et al. 2022, "PaLM", appendix B)."""
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() >= 2)
        in_weights = 6 * (matrices * tokens + self.wte.weight.numel() * targets)
        return in_weights + 12 * self.config.n_layer * self.config.n_embd * pairs


# ---- the KV cache ----

class LayerCache:
    """One layer's keys and values of all tokens so far, so that they are computed only once."""

    def __init__(self, config, device, dtype):
        shape = (1, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (1, nh, block_size, hs)
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def store(self, k, v, start):
        """Store k and v, both (1, nh, T, hs), at `start`; return all so far, (1, nh, S, hs)."""
        stop = start + k.shape[2]
        self.k[:, :, start:stop] = k
        self.v[:, :, start:stop] = v
        return self.k[:, :, :stop], self.v[:, :, :stop]


class KVCache:
    """The LayerCache of every layer, and the token ids that they hold."""

    def __init__(self, model):
        weight = model.wte.weight
        self.layers = [LayerCache(model.config, weight.device, weight.dtype) for _ in model.h]
        self.ids = []

    def keep_prefix(self, ids):
        """Keep the prefix that the cache shares with `ids`, and return its length: at most
        len(ids) - 1, since the hidden state of the last token is needed to sample the next."""
        n = min(common_prefix(self.ids, ids), len(ids) - 1)
        del self.ids[n:]  # now, since an interrupted forward pass may overwrite their keys
        return n


def common_prefix(a, b):
    """Return the length of the longest common prefix of two lists of ids."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def window_start(length, block_size):
    """Where the context of a text of `length` tokens starts: 0 while it fits. After that the window
    slides by half of block_size, not by one token, since each slide changes all positions and costs
    a new prefill. With block_size 8, texts of up to 8 tokens start at 0, those of 9 to 12 at 4."""
    if length <= block_size:
        return 0
    slide = max(block_size // 2, 1)
    return math.ceil((length - block_size) / slide) * slide


# ---- sampling ----

def seeded_generator(seed):
    """A separate random generator, so sampling does not touch the training RNG. seed None: a
    random seed."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(logits, context, generator, *, temperature=1.0, top_k=0, top_p=1.0,
           repetition_penalty=1.0, exempt=()):
    """Choose the next token id from logits (V,), which it modifies. A new argument also needs a
    setting in chat.py, named in SAMPLING.

    repetition_penalty: above 1, ids in `context` become less likely (Keskar et al. 2019), except
    those in `exempt`, so that replies can end. temperature: 0 takes the most likely id, 1 samples
    the model's own distribution. top_k: keep the k most likely ids; 0: all. top_p: keep the most
    likely ids that make up this probability (nucleus sampling, Holtzman et al. 2020).
    """
    if repetition_penalty != 1:
        seen = list(set(context).difference(exempt))
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if temperature < 1e-5:  # dividing by less would overflow float32
        return int(logits.argmax())
    ids = torch.arange(len(logits))
    if top_k:
        logits, ids = logits.topk(min(top_k, len(logits)))
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        probs, order = probs.sort(descending=True)
        ids = ids[order]
        before = probs.cumsum(-1) - probs  # the probability of all more likely ids
        probs[before >= top_p] = 0
    return int(ids[torch.multinomial(probs, 1, generator=generator)])


# ---- OpenAI's weights ----

# GPT-2's files store these as (in, out), as its Conv1D layers do; nn.Linear stores (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_gpt2(name_or_path, vocab_size=None, dropout=0.0):
    """Return GPT-2 with its pretrained weights, as a GPT.

    name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), or a local folder or
    file (see data/weights.py). vocab_size: ids that the file does not have get new embedding rows.
    None: as many as the file has, but 50260 for GPT-2's 50257. Raises UserError or OSError.
    """
    from config import UserError
    from data.tokenizer import GPT2_VOCAB_SIZE
    from data.weights import read_gpt2
    weights, sizes = read_gpt2(name_or_path)  # {GPT-2's name: tensor}, the fields of GPTConfig
    rows = sizes.pop("vocab_size")
    if vocab_size is None:
        vocab_size = GPTConfig.vocab_size if rows == GPT2_VOCAB_SIZE else rows
    if vocab_size < rows:
        raise UserError(f"vocab_size={vocab_size}: {name_or_path} has {rows} ids; use that or more")
    config = GPTConfig(vocab_size=vocab_size, dropout=dropout, **sizes)
    weights = transpose_conv1d(weights)
    weights["wte.weight"] = grow_embedding(weights["wte.weight"], config)
    model = empty_model(config)
    load_weights(model, weights, name_or_path)
    return model


def transpose_conv1d(weights):
    """Transpose the matrices of CONV1D among {name: tensor}: from GPT-2's layout to nn.Linear's,
    or back."""
    return {name: tensor.t().contiguous() if name.endswith(CONV1D) else tensor
            for name, tensor in weights.items()}


def grow_embedding(table, config):
    """Add rows for new token ids to an embedding table: (rows, C) -> (padded V, C). They start at
    the mean of the pretrained rows plus a little noise (Hewitt 2021); the padding is 0."""
    rows, V = table.shape[0], config.vocab_size
    grown = torch.zeros(config.padded_vocab_size, table.shape[1])
    grown[:rows] = table
    noise = torch.randn(V - rows, table.shape[1], generator=seeded_generator(0))
    grown[rows:V] = table.mean(0) + 0.01 * table.std() * noise
    return grown


class SkipInit(TorchFunctionMode):
    """Context manager: save the time of initializing new modules whose weights will be loaded.
    PyTorch calls this in place of each torch function; nn.init passes `tensor` by keyword."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config):
    """Return a GPT with uninitialized weights, for load_weights to replace."""
    with SkipInit():
        return GPT(config)


def load_weights(model, weights, source):
    """Replace a model's weights with {name: tensor}, without copying. Raises UserError, naming the
    source, if they do not match the model or are not finite. They must be float32."""
    from config import UserError
    for name, tensor in weights.items():
        if not tensor.sum().isfinite():  # ten times faster than tensor.isfinite()
            raise UserError(f"{source}: {name} contains NaN or inf; use an intact copy")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip()  # the first line only names the class
        raise UserError(f"{source}: does not fit this model.py ({problem}); use weights of this "
                        "architecture, or undo your edit to model.py") from error


def crop_block_size(model, block_size):
    """Shorten a model's context to its first block_size positions (RoPE has no wpe to crop)."""
    assert block_size <= model.config.block_size
    model.config.block_size = block_size
    model.wpe = nn.Embedding.from_pretrained(model.wpe.weight[:block_size].detach().clone(),
                                             freeze=False)
