"""GPT-2's weights in and out, against transformers, safetensors and a small model hub on this computer."""
import hashlib
import json
import math
import os
import re
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import chat
import data.download
import model as m
from data.conversation import encode_conversation, encode_prompt
from data.files import write_safetensors
from data.tokenizer import (
    END_OF_TEXT,
    ROLE_TOKENS,
    SPACE_BEHIND_PATTERN,
    SPLIT_PATTERN,
    get_tokenizer,
    train_bpe,
)
from model import GPT, GPTConfig, load_gpt2
from tests.conftest import serving
from tests.test_safety import FORK, ended

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: these tests need no hub
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SHAPES = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25)}
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers has them as (in, out)
PROPERTY = settings(max_examples=60, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


class Parts(SimpleNamespace):
    """Values with names, which a failing test does not spell out."""
    __repr__ = object.__repr__


def hf_gpt2(n_embd=64, n_head=1, vocab_size=100, n_layer=2, seed=0):
    """A GPT-2 by transformers whose every number is random, so that a forgotten bias or norm shows."""
    torch.manual_seed(seed)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=n_head, attn_pdrop=0,
        resid_pdrop=0, embd_pdrop=0, initializer_range=1.2 / n_embd**0.5, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager"))
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() == 1:  # the residual stream starts small, and c_proj's biases add to it
                p.add_((0.01 if name.endswith("c_proj.bias") else 0.2) * torch.randn_like(p))
    return hf.eval()


def random_ids(vocab_size, *shape, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-4):
    """No number differs by more than `tolerance` of the largest."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm(torch.inf) <= tolerance * theirs.norm(torch.inf)


@torch.no_grad()
def same_logits(gpt, hf):
    vocab_size = hf.config.vocab_size
    ids = random_ids(vocab_size, 2, 20)
    close(gpt(ids)[..., :vocab_size], hf(ids).logits)


@pytest.fixture(scope="module")
def tiny():
    return hf_gpt2()


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


def tensors_of(hf):
    """The tensors of a transformers model with the names of its file, each with memory of its own."""
    return {name: t.detach().clone() for name, t in hf.state_dict().items() if name != "lm_head.weight"}


# ---- the four shapes ----

@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """(a GPT-2 of one of the four shapes by transformers, the same loaded from its file by model.py)."""
    n_embd, n_head = SHAPES[request.param]
    hf = hf_gpt2(n_embd, n_head, vocab_size=1000, n_layer=1)
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    gpt = load_gpt2(str(folder)).eval()
    (folder / "model.safetensors").unlink()
    return hf, gpt


def test_the_logits_of_each_shape_are_those_of_transformers(pair):
    hf, gpt = pair
    assert (gpt.config.n_embd, gpt.config.n_head) == (hf.config.n_embd, hf.config.n_head)
    same_logits(gpt, hf)


def test_twelve_layers_and_all_50257_ids_are_read_in_order(tmp_path):
    hf = hf_gpt2(n_embd=128, n_head=2, vocab_size=50257, n_layer=12)
    hf.save_pretrained(tmp_path)
    gpt = load_gpt2(tmp_path, vocab_size=50257)
    assert gpt.config.n_layer == 12
    same_logits(gpt, hf)


@torch.no_grad()
def test_50_greedy_ids_of_each_shape_are_the_likeliest_of_transformers(pair):
    hf, gpt = pair
    prompt = random_ids(1000, 14).tolist()
    ids = list(gpt.generate(prompt, 50, temperature=0))
    likeliest = hf(torch.tensor([prompt + ids[:-1]])).logits.argmax(-1)[0, len(prompt) - 1:]
    assert len(ids) == 50 and len(set(ids)) > 5
    assert ids == likeliest.tolist()  # each the greedy choice after those before it, so the same text


def test_the_gradients_of_each_shape_are_those_of_transformers(pair):
    hf, gpt = pair
    ids = random_ids(1000, 2, 9)
    F.cross_entropy(hf(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    (gpt(ids[:, :-1], ids[:, 1:].contiguous()) / ids[:, 1:].numel()).backward()
    theirs = dict(hf.transformer.named_parameters())
    assert theirs.keys() == {name for name, _ in gpt.named_parameters()}
    for name, p in gpt.named_parameters():
        expected = theirs[name].grad
        ours = p.grad[:1000] if name == "wte.weight" else p.grad
        close(ours, expected.t() if name.endswith(TURNED) else expected)
    assert not gpt.wte.weight.grad[1000:].any()


# ---- the ways in ----

@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_as_good_as_its_folder(tiny, tiny_folder, kind):
    same_logits(load_gpt2(kind(tiny_folder / "model.safetensors")), tiny)


def test_a_file_without_config_json_has_heads_of_64_as_gpt2_has(tmp_path):
    hf = hf_gpt2(n_embd=192, n_head=3)
    safetensors.save_file(tensors_of(hf), tmp_path / "weights.safetensors")
    same_logits(load_gpt2(tmp_path / "weights.safetensors"), hf)


def test_the_heads_are_those_config_json_states(tmp_path):
    hf = hf_gpt2(n_embd=64, n_head=4)
    hf.save_pretrained(tmp_path)
    same_logits(load_gpt2(tmp_path), hf)


def test_a_folder_with_only_pytorch_model_bin_is_read(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "pytorch_model.bin")
    same_logits(load_gpt2(tmp_path), tiny)


def test_a_pytorch_model_bin_from_before_torch_1_6_is_read_as_gpt2s_own_is_one(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same_logits(load_gpt2(tmp_path), tiny)


def test_names_without_transformer_before_them_are_read(tiny, tmp_path):
    tiny.transformer.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert "wte.weight" in f.keys()
    same_logits(load_gpt2(tmp_path), tiny)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_mask_buffers_and_the_tied_head_are_passed_over(tiny, tmp_path, prefix, dtype):
    tensors = {prefix + name.removeprefix("transformer."): t for name, t in tensors_of(tiny).items()}
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(dtype)
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tiny.lm_head.weight.detach().clone()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    same_logits(load_gpt2(tmp_path), tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_becomes_float32(tmp_path, dtype):
    hf = hf_gpt2().to(dtype)
    hf.save_pretrained(tmp_path)
    gpt = load_gpt2(tmp_path)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    same_logits(gpt, hf.float())


def test_all_that_is_loaded_can_be_trained_and_starts_with_the_dropout_asked_for(tiny_folder):
    gpt = load_gpt2(tiny_folder, dropout=0.3)
    assert gpt.lm_head.weight is gpt.wte.weight
    assert all(p.requires_grad and p.is_leaf for p in gpt.parameters())
    assert {d.p for d in gpt.modules() if isinstance(d, torch.nn.Dropout)} == {0.3}


def test_a_folder_without_weights_is_an_error_that_says_what_to_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + ".*gpt2-xl"):
        load_gpt2(tmp_path)


# ---- the vocabulary and the positions ----

@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A small GPT-2 with GPT-2's own vocabulary: (model by transformers, folder)."""
    hf, folder = hf_gpt2(vocab_size=50257), tmp_path_factory.mktemp("wide")
    with torch.no_grad():
        hf.transformer.wte.weight += 0.1 * torch.randn(64)  # so that the mean is not 0
    hf.save_pretrained(folder)
    return hf, folder


def test_gpt2s_vocabulary_gets_three_new_rows_near_the_mean_and_keeps_the_old(wide_folder):
    hf, folder = wide_folder
    old, table = hf.transformer.wte.weight.detach(), load_gpt2(folder).wte.weight.detach()
    assert table.shape == (50304, 64) and table[:50257].equal(old)
    new, mean = table[50257:50260], old.mean(0)
    assert new.isfinite().all() and (new - mean).norm(dim=1).max() < 0.1 * (old - mean).norm(dim=1).mean()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (new[i] - new[j]).abs().max() > 1e-6


@torch.no_grad()
def test_three_ids_more_change_no_logit_and_the_padding_has_none(wide_folder):
    hf, folder = wide_folder
    gpt = load_gpt2(folder)
    ids = random_ids(50257, 1, 9)
    logits = gpt(ids)
    assert gpt.config.vocab_size == 50260
    close(logits[..., :50257], hf(ids).logits)
    assert logits[..., :50260].isfinite().all() and (logits[..., 50260:] == -torch.inf).all()


@torch.no_grad()
def test_gpt2s_own_vocabulary_size_leaves_logits_of_exactly_its_ids(wide_folder):
    hf, folder = wide_folder
    gpt = load_gpt2(folder, vocab_size=50257)
    logits = gpt(random_ids(50257, 1, 9))
    assert gpt.config.vocab_size == 50257
    assert logits[..., :50257].isfinite().all() and (logits[..., 50257:] == -torch.inf).all()


def test_padded_ids_are_never_sampled_and_new_ones_are(tiny_folder):
    gpt = load_gpt2(tiny_folder, vocab_size=103)  # the table has 128 rows
    seen = set(gpt.generate([1], 1000, temperature=1e4, seed=0))
    assert gpt.wte.weight.shape[0] == 128
    assert max(seen) < 103 and seen >= {100, 101, 102}


def test_a_smaller_vocabulary_is_refused_with_both_numbers(tiny_folder):
    with pytest.raises(ValueError, match="vocab_size=99.* 100 "):
        load_gpt2(tiny_folder, vocab_size=99)


@torch.no_grad()
def test_a_shorter_block_size_crops_the_positions(tiny, tiny_folder):
    gpt = load_gpt2(tiny_folder, block_size=24)
    assert gpt.config.block_size == 24
    assert gpt.wpe.weight.equal(tiny.transformer.wpe.weight[:24])
    same_logits(gpt, tiny)


def test_a_longer_block_size_is_refused_with_both_numbers(tiny_folder):
    with pytest.raises(ValueError, match=r"block_size=65\D.* 64 "):
        load_gpt2(tiny_folder, block_size=65)


# ---- the way out ----

FAMILY = "👨\u200d👩\u200d👧\u200d👦"  # one emoji, four joined by zero-width joiners
PARAGRAPH = ("Où est le café?  Ça, c'est à 3.14 km; naïve Ærøskøbing, Straße, 東京都, здравствуйте, नमस्ते."
             f"\n\n\tif x_1 == 10**6:\n        return '👋🏽 {FAMILY} 🇫🇷 e\u0301'   \r\n \n\n  I'll we've "
             "they'D   1,234,567   ...!?  __init__ \u00a0\u2003 end  ")
EXPORTS = {"gpt2": dict(n_head=4, n_embd=64), "bpe": dict(n_head=2, n_embd=32, bias=False),
           "space": dict(n_head=2, n_embd=32),
           "bytes": dict(n_head=3, n_embd=48)}


@pytest.fixture(scope="module", params=EXPORTS)
def export(request, tmp_path_factory):
    """A checkpoint with one of the four kinds of tokenizer, exported by the command line."""
    spec, folder = request.param, tmp_path_factory.mktemp(request.param)
    if spec in ("bpe", "space"):
        spec = train_bpe([PARAGRAPH] * 3, 420, SPACE_BEHIND_PATTERN if spec == "space" else SPLIT_PATTERN)
    enc = request.getfixturevalue("gpt2_vocabulary") if spec == "gpt2" else get_tokenizer(spec)
    torch.manual_seed(5)
    gpt = GPT(GPTConfig(vocab_size=enc.n_vocab, block_size=64, n_layer=2, **EXPORTS[request.param])).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    m.save_checkpoint(folder / "best.pt", m.model_checkpoint(gpt, spec, "chat", step=1, max_iters=1))
    m.main([f"--checkpoint={folder / 'best.pt'}", f"--export={folder / 'hf'}"])
    return Parts(gpt=gpt, enc=enc, folder=folder / "hf",
                 tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "hf"))


@pytest.mark.parametrize("changed", ["activation", "head", "untied"])
def test_a_model_that_its_reader_changed_is_not_exported(changed, tmp_path, monkeypatch):
    class Untied(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head = torch.nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    if changed == "activation":
        monkeypatch.setattr(F, "gelu", lambda x, approximate: F.relu(x).square())
    elif changed == "head":
        head = GPT.head
        monkeypatch.setattr(GPT, "head", lambda self, x: 3 * torch.tanh(head(self, x) / 3))
    else:
        monkeypatch.setattr(m, "GPT", Untied)
    torch.manual_seed(5)
    gpt = m.GPT(GPTConfig(260, 64, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    m.save_checkpoint(tmp_path / "best.pt", m.model_checkpoint(gpt, "bytes", "chat", step=1, max_iters=1))
    for out in ("hf", "it.gguf"):
        with pytest.raises(ValueError, match="best.pt: model.py was changed"):
            m.main([f"--checkpoint={tmp_path / 'best.pt'}", f"--export={tmp_path / out}"])
        assert not (tmp_path / out).exists()


def test_transformers_opens_an_export_and_has_the_same_logits(export):
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(export.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(hf) is transformers.GPT2LMHeadModel and hf.config.vocab_size == export.enc.n_vocab
    same_logits(export.gpt, hf.eval())


def test_transformers_continues_greedily_with_the_same_ids_and_ends_as_chat_does(export):
    hf = transformers.AutoModelForCausalLM.from_pretrained(export.folder).eval()
    ends = [export.enc.encode_single_token(token) for token in (END_OF_TEXT, "<|end|>")]
    assert hf.generation_config.eos_token_id == ends
    prompt = random_ids(export.enc.n_vocab, 1, 10)
    theirs = hf.generate(prompt, max_new_tokens=50, do_sample=False, pad_token_id=ends[0])[0, 10:].tolist()
    assert list(export.gpt.generate(prompt[0].tolist(), 50, temperature=0, stop_ids=ends)) == \
        [i for i in theirs if i not in ends]


@torch.no_grad()
def test_an_export_comes_in_again_with_the_same_logits(export):
    again = load_gpt2(export.folder).eval()
    ids = random_ids(export.enc.n_vocab, 2, 30)
    assert again.config.vocab_size == export.enc.n_vocab and again.config.block_size == 64
    n = export.enc.n_vocab
    close(again(ids)[..., :n], export.gpt(ids)[..., :n])


def test_chat_opens_an_export_in_gpt2s_ids_and_refuses_another(export, gpt2_vocabulary, capsys):
    argv = [f"--init_from={export.folder}", "--prompt=Once", "--temperature=0", "--max_new_tokens=3",
            "--device=cpu", "--json=True"]
    if export.enc.n_vocab == 50260:
        chat.main(argv)
        ids = list(export.gpt.generate(export.enc.encode_ordinary("Once"), 3, temperature=0,
                                       stop_ids=range(50256, 50260)))
        assert json.loads(capsys.readouterr().out)["text"] == export.enc.decode(ids)
    else:
        with pytest.raises(ValueError, match=f"{export.enc.n_vocab} ids are not GPT-2's"):
            chat.main(argv)


def test_the_special_tokens_of_an_export_have_their_ids(export):
    for token in (END_OF_TEXT, *ROLE_TOKENS):
        i = export.enc.encode_single_token(token)
        assert export.tokenizer.convert_tokens_to_ids(token) == i and export.tokenizer.encode(token) == [i]
    assert len(export.tokenizer) == export.enc.n_vocab


PIECES = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u200d", "é", "e\u0301", "👋", FAMILY,
                          "12", "7", "'ll", "'s", "the", " The", "__", "...", "<|", "|>", "東京", "\x1c",
                          "\u0085", "²", "Ⅷ"])
TEXT = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=20).map("".join)).filter(
    lambda text: not any(token in text for token in (END_OF_TEXT, *ROLE_TOKENS)))


@PROPERTY
@given(text=TEXT)
@example(PARAGRAPH)
@example("")
@example(f"{FAMILY} " * 3)
def test_the_tokenizer_of_an_export_makes_the_same_ids_and_turns_them_back(export, text):
    ids = export.tokenizer.encode(text)
    assert ids == export.enc.encode_ordinary(text)
    assert export.tokenizer.decode(ids) == text


@PROPERTY
@given(texts=st.lists(TEXT, min_size=2, max_size=3))
@example(["What is 2+2?", "It is 4."])
@example([" Leading and trailing \n", "\n\nAn answer\n", PARAGRAPH])
@example(["", "", ""])
def test_the_chat_template_of_an_export_renders_the_ids_of_our_chat_format(export, texts):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    def rendered(add_generation_prompt):
        return export.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False,
                                                    add_generation_prompt=add_generation_prompt)

    assert rendered(False) == encode_conversation(messages, export.enc)
    assert rendered(True) == encode_prompt(messages, export.enc)


# ---- hostile files ----

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The parts of a whole file of one layer: header (a dict) and data (bytes)."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    tensors = tensors_of(hf_gpt2(n_layer=1, vocab_size=20))
    safetensors.save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return Parts(header=json.loads(content[8:8 + length]), data=content[8 + length:],
                 content=content)


def write_file(path, header, data):
    """A file of this header, a JSON value or the very bytes, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def loads_or_is_refused(path):
    """True if the file loads and computes; False for a ValueError that names the file; else it fails."""
    try:
        gpt = load_gpt2(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    assert gpt(torch.tensor([[0]])).shape[:2] == (1, 1)
    return True


def changed(good, name="ln_f.weight", **fields):
    """The good header with some fields of one tensor changed."""
    return {**good.header, name: {**good.header[name], **fields}}


def test_the_good_file_is_good(good, tmp_path):
    write_file(tmp_path / "a.safetensors", good.header, good.data)
    assert loads_or_is_refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(good, tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + good.content[8:])
    assert not loads_or_is_refused(path)


@pytest.mark.parametrize("header", [
    b"", b"{}", b"[]", b"null", b"7", b'"wte.weight"', b"{", b"not json", b"\xff\xfe{}", b"[" * 200_000,
    b'{"a":' * 200_000, b'{"wte.weight": ' + b"[" * 200_000, b'{"a": ' + b"9" * 10_000 + b"}",
    b'["wte.weight"]', b'{"__metadata__": {"format": "pt"}}', b'{"wte.weight": null}',
    b'{"wte.weight": []}', b'{"wte.weight": "F32"}', b'{"wte.weight": {}}',
    b'{"wte.weight": {"dtype": "F32", "shape": [1]}}'],
    ids=lambda header: header[:40].decode("latin1"))
def test_a_header_of_another_kind_is_refused(good, tmp_path, header):
    write_file(tmp_path / "a.safetensors", header, good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("fields", [
    {"dtype": "F33"}, {"dtype": "f32"}, {"dtype": None}, {"dtype": 32}, {"dtype": []},
    {"dtype": {"F32": 1}}, {"dtype": "F16"}, {"dtype": "U8"},
    {"shape": [True] * 2}, {"shape": ["64"]}, {"shape": "64"}, {"shape": [64.0]}, {"shape": [63]},
    {"shape": [65]}, {"shape": 64}, {"shape": None}, {"shape": {"64": 64}}, {"shape": [[64]]},
    {"shape": [-64]}, {"shape": [-8, -8]}, {"shape": [64, 0]}, {"shape": []}, {"shape": [2**62]},
    {"shape": [2**63, 2]}, {"shape": [10**4000]}, {"shape": [1] * 10_000}, {"shape": [8, 8]},
    {"data_offsets": []}, {"data_offsets": [0]}, {"data_offsets": [0, 256, 512]}, {"data_offsets": None},
    {"data_offsets": "ab"}, {"data_offsets": {"0": 0, "256": 1}}, {"data_offsets": [0.0, 256.0]},
    {"data_offsets": [False, 256]}, {"data_offsets": [-256, 0]}, {"data_offsets": [256, 0]},
    {"data_offsets": [0, 255]}, {"data_offsets": [0, 257]}, {"data_offsets": [10**9, 10**9 + 256]},
    {"data_offsets": [2**64, 2**64 + 256]}, {"data_offsets": [0, 10**30]}, {"data_offsets": [0, 0]}],
    ids=lambda fields: json.dumps(fields)[:50])
def test_an_impossible_entry_is_refused(good, tmp_path, fields):
    write_file(tmp_path / "a.safetensors", changed(good, **fields), good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 10**30], [2**63, 0]])
def test_an_empty_tensor_of_an_enormous_shape_is_refused(good, tmp_path, shape):
    header = changed(good, shape=shape, data_offsets=[0, 0])
    write_file(tmp_path / "a.safetensors", header, good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [[64, 3, 64], [12288], [192, 64], [1, 64, 192]])
def test_a_transposed_tensor_of_another_shape_is_refused_by_name(good, tmp_path, shape):
    write_file(tmp_path / "a.safetensors", changed(good, "h.0.attn.c_attn.weight", shape=shape), good.data)
    with pytest.raises(ValueError, match=r"a\.safetensors.*h\.0\.attn\.c_attn\.weight"):
        load_gpt2(tmp_path / "a.safetensors")


@pytest.mark.parametrize("wte, wpe", [([64, 20], [64, 64]), ([20, 64], [4096]), ([1280], [64, 64]),
                                      ([40, 32], [128, 32]), ([1280, 1], [4096, 1])])
def test_tables_of_another_shape_are_refused(good, tmp_path, wte, wpe):
    header = changed(good, "wte.weight", shape=wte)
    header["wpe.weight"] = {**header["wpe.weight"], "shape": wpe}
    write_file(tmp_path / "a.safetensors", header, good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


def test_tables_without_columns_are_refused(good, tmp_path):
    header = changed(good, "wte.weight", shape=[20, 0], data_offsets=[0, 0])
    header["wpe.weight"] = {**header["wpe.weight"], "shape": [64, 0], "data_offsets": [0, 0]}
    write_file(tmp_path / "a.safetensors", header, good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


def test_tensors_may_share_their_bytes(good, tmp_path):
    shared = good.header["h.0.ln_1.weight"]["data_offsets"]
    header = changed(good, "h.0.ln_2.weight", data_offsets=shared)
    write_file(tmp_path / "a.safetensors", header, good.data)
    gpt = load_gpt2(tmp_path / "a.safetensors")
    assert gpt.h[0].ln_2.weight.equal(gpt.h[0].ln_1.weight)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    path, start = tmp_path / "a.safetensors", len(good.content) - len(good.data)
    ends = {start + n for name, entry in good.header.items() if name != "__metadata__"
            for n in entry["data_offsets"]}
    cuts = {n + d for n in (0, 4, 8, 9, start // 2, start, *ends) for d in (-1, 0, 1)}
    cuts |= {len(good.content) - n for n in (1, 2, 3, 5, 100, 1000)}
    for cut in sorted(n for n in cuts if 0 <= n < len(good.content)):
        path.write_bytes(good.content[:cut])
        assert not loads_or_is_refused(path), cut


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "ln_f.bias", "h.0.ln_1.weight",
                                  "h.0.attn.c_attn.bias", "h.0.mlp.c_proj.weight"])
def test_a_missing_tensor_is_named(good, tmp_path, name):
    header = {key: entry for key, entry in good.header.items() if key != name}
    write_file(tmp_path / "a.safetensors", header, good.data)
    with pytest.raises(ValueError, match=rf"a\.safetensors.* {re.escape(name)} "):
        load_gpt2(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["h.0.attn.q_norm.weight", "extra", "score.weight", "h.0",
                                  "h.x.ln_1.weight", "h.", "h.-1.ln_1.weight", "h.00.ln_1.weight",
                                  "h.٣.ln_1.weight", "", "h." + "9" * 5000])
def test_an_unknown_tensor_is_named(good, tmp_path, name):
    write_file(tmp_path / "a.safetensors", {**good.header, name: good.header["ln_f.weight"]}, good.data)
    with pytest.raises(ValueError, match=rf"a\.safetensors.* {re.escape(name)} "):
        load_gpt2(tmp_path / "a.safetensors")


def test_a_layer_of_an_enormous_number_is_refused_without_building_so_many(good, tmp_path, monkeypatch):
    class Counted(m.Block):
        built = 0

        def __init__(self, config):
            Counted.built += 1
            assert Counted.built < 100, "built from a name in a stranger's file"
            super().__init__(config)

    monkeypatch.setattr(m, "Block", Counted)
    header = {**good.header, "h.999999999.ln_1.weight": good.header["ln_f.weight"]}
    write_file(tmp_path / "a.safetensors", header, good.data)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name, shape", [("ln_f.weight", [2, 32]), ("h.0.attn.c_attn.bias", [3, 64]),
                                         ("h.0.mlp.c_fc.weight", [256, 64]), ("wpe.weight", [128, 32])])
def test_a_tensor_of_another_shape_is_named(good, tmp_path, name, shape):
    write_file(tmp_path / "a.safetensors", changed(good, name, shape=shape), good.data)
    with pytest.raises(ValueError, match=rf"a\.safetensors.* {re.escape(name)} "):
        load_gpt2(tmp_path / "a.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6)
SIZES = st.lists(st.integers(-2, 5000) | st.sampled_from([0, 64, 256, 2**31, 2**63, 2**64]), max_size=4)


@settings(PROPERTY, max_examples=150)
@given(choice=st.data())
def test_a_header_with_anything_in_it_is_read_or_refused(good, tmp_path, choice):
    header = json.loads(json.dumps(good.header))
    for _ in range(choice.draw(st.integers(1, 3))):
        name = choice.draw(st.sampled_from(sorted(good.header)))
        field = choice.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all"]))
        value = choice.draw(JSON | SIZES | st.sampled_from(["F16", "BF16", "U8", "BOOL", "F64"]))
        if field == "all" or not isinstance(header[name], dict):
            header[name] = value
        else:
            header[name][field] = value
    write_file(tmp_path / "a.safetensors", header, good.data)
    loads_or_is_refused(tmp_path / "a.safetensors")


@settings(PROPERTY, max_examples=150)
@given(choice=st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused(good, tmp_path, choice):
    content = bytearray(good.content)
    start = len(good.content) - len(good.data)
    where = st.integers(0, 8) | st.integers(8, start)
    byte = st.integers(0, 255) | st.sampled_from(b'0129"[]{},.')
    for i, value in choice.draw(st.lists(st.tuples(where, byte), min_size=1, max_size=4)):
        content[i] = value
    (tmp_path / "a.safetensors").write_bytes(content)
    loads_or_is_refused(tmp_path / "a.safetensors")


@PROPERTY
@given(content=st.binary(max_size=60))
def test_any_bytes_at_all_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert not loads_or_is_refused(tmp_path / "a.safetensors")


class Trap:
    """Its pickle, opened carelessly, makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pytorch_model_bin_is_not_run(tmp_path):
    torch.save({"wte.weight": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_gpt2(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [
    {}, [], 7, torch.zeros(3), {1: torch.zeros(3)}, {"wte.weight": 7}, {"wte.weight": [1.0]},
    {"wte.weight": torch.zeros(3)}, {"wte.weight": torch.zeros(20, 64)},
    {"h.0.attn.c_attn.weight": torch.zeros(2, 2, 2)}],
    ids=lambda content: str(content)[:40].replace("\n", ""))
def test_a_pytorch_model_bin_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert not loads_or_is_refused(tmp_path)


def test_a_pytorch_model_bin_cut_short_is_refused(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for cut in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "pytorch_model.bin").write_bytes(content[:cut])
        assert not loads_or_is_refused(tmp_path), cut


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", "[" * 100_000, '{"n_head": "many"}',
                                  '{"n_head": null}', '{"n_head": Infinity}', '{"n_head": NaN}',
                                  '{"n_head": 0}', '{"n_head": -2}', '{"n_head": 7}', '{"n_head": 1000}',
                                  '{"n_head": [1]}'], ids=lambda text: text[:20])
def test_a_broken_config_json_is_passed_over_or_refused(good, tmp_path, text):
    write_file(tmp_path / "model.safetensors", good.header, good.data)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    loads_or_is_refused(tmp_path)


# ---- writing ----

def test_what_is_written_opens_with_the_safetensors_package(tmp_path):
    tensors = {"a": torch.randn(3, 5), "turned": torch.randn(4, 6).t(), "ünï \"x\"": torch.randn(7),
               "scalar": torch.tensor(2.5), "half": torch.randn(2, 3).half(), "empty": torch.zeros(0, 3),
               "weight": torch.nn.Parameter(torch.randn(2, 2, 2))}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = safetensors.load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32 and found[name].equal(tensor.detach().float())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_earlier_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"a\.safetensors.*No space left"):
        write_safetensors(path, {"a": torch.zeros(1000)})
    assert safetensors.load_file(path)["a"].equal(torch.ones(3)) and os.listdir(tmp_path) == [path.name]


def test_a_tensor_that_cannot_be_written_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    with pytest.raises(OSError, match=r"a\.safetensors"):
        write_safetensors(path, {"a": torch.zeros(1000), "b": torch.empty(5, device="meta")})
    assert safetensors.load_file(path)["a"].equal(torch.ones(3)) and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.weight"])
def test_weights_that_are_not_finite_are_named(tiny, tmp_path, name, number):
    tensors = tensors_of(tiny)
    full = next(key for key in tensors if key.endswith(name))
    tensors[full] = tensors[full].clone()
    tensors[full].view(-1)[-1] = number
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds numbers that are not finite"):
        load_gpt2(tmp_path)


# ---- the download ----

class Hub(BaseHTTPRequestHandler):
    """The model hub: a redirect that states size and hash, then the server's replies in turn."""

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.requests.append((self.path, wanted))
        if self.path == "/openai-community/gpt2/resolve/main/model.safetensors":
            tag = server.tag or hashlib.sha256(server.body).hexdigest()
            return self.answer(302, b"", {"Location": "/cdn/blob", "X-Linked-ETag": f'"{tag}"',
                                          "X-Linked-Size": len(server.body), "ETag": '"0123"'})
        reply = server.replies.pop(0) if server.replies and self.path == "/cdn/blob" else 404
        if reply in (404, 503):
            return self.answer(reply, b"oops")
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and reply != "ignores Range" else 0
        body = server.body[start:]
        self.answer(206 if start else 200, body[:reply] if isinstance(reply, int) else body,
                    {"Content-Length": len(body), "ETag": '"4567"',
                     "Content-Range": f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """A hub with one tiny GPT-2; hub.replies are its answers in turn: "whole", "ignores Range", 404, 503,
    or the number of bytes after which the connection breaks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.body = (tiny_folder / "model.safetensors").read_bytes()
    server.requests, server.replies, server.tag = [], [], None
    server.path = tmp_path / "cache" / "gpt2" / "model.safetensors"
    server.waits = []
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("GPT2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.download, "CHUNK", 1000)
    monkeypatch.setattr(data.download.time, "sleep", server.waits.append)
    with serving(server):
        yield server


def starts(hub):
    """From which byte on each request for the file itself was."""
    return [int(wanted[6:-1]) if wanted else 0 for path, wanted in hub.requests if path == "/cdn/blob"]


def test_gpt2_by_name_comes_from_the_hub_once_and_says_where_it_goes(hub, tiny, capsys):
    hub.replies = ["whole"]
    same_logits(load_gpt2("gpt2"), tiny)
    assert str(hub.path.parent) in capsys.readouterr().err
    assert hub.path.read_bytes() == hub.body
    assert sorted(os.listdir(hub.path.parent)) == [hub.path.name, hub.path.name + ".from"]
    assert len(hub.requests) == 2
    same_logits(load_gpt2("gpt2"), tiny)
    assert len(hub.requests) == 2 and m.fetch_gpt2("gpt2") == hub.path
    assert capsys.readouterr().err == ""


def test_weights_of_another_mirror_or_of_an_earlier_version_are_used_as_they_are(hub, monkeypatch):
    hub.replies = ["whole"]
    path = m.fetch_gpt2("gpt2")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    assert m.fetch_gpt2("gpt2") == path
    path.with_name(path.name + ".from").unlink()  # earlier versions wrote none
    assert m.fetch_gpt2("gpt2") == path and len(hub.requests) == 2


def test_a_broken_download_goes_on_where_it_stopped(hub):
    hub.replies = [50_000, 30_000, "whole"]
    assert m.fetch_gpt2("gpt2").read_bytes() == hub.body
    first, second, third = starts(hub)
    assert first == 0 < second <= 50_000 and second < third <= second + 30_000
    assert sorted(os.listdir(hub.path.parent)) == [hub.path.name, hub.path.name + ".from"]


def test_a_busy_hub_is_asked_again_after_a_wait(hub):
    hub.replies = [503, 503, "whole"]
    assert m.fetch_gpt2("gpt2").read_bytes() == hub.body
    assert len(hub.waits) == 2 and 0 < hub.waits[0] < hub.waits[1]


def test_a_hub_that_ignores_range_sends_it_all_again(hub):
    hub.replies = [50_000, "ignores Range"]
    assert m.fetch_gpt2("gpt2").read_bytes() == hub.body
    assert starts(hub)[1] > 0


def test_a_file_that_is_not_there_is_one_error(hub):
    hub.replies = [404]
    with pytest.raises(OSError, match="404"):
        load_gpt2("gpt2")
    assert not hub.path.exists() and not hub.waits


def test_a_hub_without_this_size_is_one_error(hub):
    with pytest.raises(OSError, match="gpt2-xl.*404.*HF_ENDPOINT.*--init_from=FILE"):
        load_gpt2("gpt2-xl")
    assert hub.requests == [("/openai-community/gpt2-xl/resolve/main/model.safetensors", None)]


def test_a_file_of_another_hash_gets_no_name(hub):
    hub.replies, hub.tag = ["whole"], "0" * 64
    with pytest.raises(OSError, match="sha256"):
        load_gpt2("gpt2")
    assert os.listdir(hub.path.parent) == []


def test_a_hub_that_breaks_off_for_ever_leaves_no_file(hub):
    hub.replies = [1000] * 50
    with pytest.raises(OSError, match="127.0.0.1"):
        load_gpt2("gpt2")
    assert not hub.path.exists()


def test_an_interrupted_download_is_gone_on_with_in_a_later_run(hub, monkeypatch):
    hub.replies = [50_000] + [503] * 20
    with pytest.raises(OSError):
        m.fetch_gpt2("gpt2")
    assert not hub.path.exists()
    hub.replies, hub.requests = ["whole"], []
    assert m.fetch_gpt2("gpt2").read_bytes() == hub.body
    assert 0 < starts(hub)[0] <= 50_000


# ---- the raw model, and its memory ----

@torch.no_grad()
def test_chat_goes_on_with_a_text_in_the_raw_model(wide_folder, gpt2_vocabulary, capsys):
    (hf, folder), enc = wide_folder, gpt2_vocabulary
    chat.main([f"--init_from={folder}", "--prompt=Once upon a time", "--temperature=0",
               "--max_new_tokens=10", "--device=cpu"])
    said = capsys.readouterr().out
    ids = enc.encode_ordinary("Once upon a time")
    for _ in range(10):
        ids.append(hf(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = enc.decode_bytes(ids[-10:]).decode("utf-8", errors="replace")
    assert not set(ids) & set(enc._special_tokens.values()) and len(expected.strip("\ufffd")) > 10
    assert said.endswith("\n") and said[:-1].rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert not any(token in said for token in (END_OF_TEXT, *ROLE_TOKENS))


PEAK = """
import sys, torch, model
def peak():  # of this program alone: ru_maxrss would start at that of the tests that started it
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
before = peak()
gpt = model.load_gpt2(path)
total = sum(p.sum().item() for p in gpt.parameters())  # every weight is looked at once
with open(path + ".peak", "w", encoding="utf-8") as f:
    print(peak() - before, file=f)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    C, path = 768, tmp_path / "model.safetensors"  # gpt2's width, and like gpt2 a third embeddings
    shapes = {"wte.weight": (20_000, C), "wpe.weight": (64, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(5):
        shapes |= {f"h.{i}.ln_1.weight": (C,), f"h.{i}.ln_1.bias": (C,), f"h.{i}.ln_2.weight": (C,),
                   f"h.{i}.ln_2.bias": (C,), f"h.{i}.attn.c_attn.weight": (C, 3 * C),
                   f"h.{i}.attn.c_attn.bias": (3 * C,), f"h.{i}.attn.c_proj.weight": (C, C),
                   f"h.{i}.attn.c_proj.bias": (C,), f"h.{i}.mlp.c_fc.weight": (C, 4 * C),
                   f"h.{i}.mlp.c_fc.bias": (4 * C,), f"h.{i}.mlp.c_proj.weight": (4 * C, C),
                   f"h.{i}.mlp.c_proj.bias": (C,)}
    safetensors.save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    size = path.stat().st_size
    process = FORK.Process(target=exec, args=(PEAK, {"path": str(path)}))
    process.start()
    assert ended(process) == [0] and 200e6 < size < 250e6
    path.unlink()
    peak = int((tmp_path / "model.safetensors.peak").read_text(encoding="utf-8"))
    assert 0.9 * size < peak < 1.3 * size, f"{peak / size:.2f} times the file"
