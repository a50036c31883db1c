"""GPT-2's weights, read from every kind of file, against transformers and the safetensors package."""
import json
import os
import re
import struct
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from config import UserError
from data.safetensors import read_safetensors, write_safetensors
from model import crop_block_size, load_gpt2
from tests.conftest import serving

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: these tests need no hub
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SHAPES = {"gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}  # layers, heads
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed by nanoGPT


def hf_gpt2(n_embd=64, n_head=1, n_layer=2, vocab_size=100, **options):
    """Return transformers' GPT-2 with random biases and norms too, so that a missing one changes logits."""
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=n_head, attn_pdrop=0,
        resid_pdrop=0, embd_pdrop=0, initializer_range=0.8 / n_embd**0.5, bos_token_id=0, eos_token_id=0, **options))
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return hf.eval()


@pytest.fixture(scope="module")
def tiny():
    return hf_gpt2()


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


def tensors_of(hf):
    """Return {name in a file: tensor} of a transformers model, each with its own memory."""
    return {name: t.detach().clone() for name, t in hf.state_dict().items() if name != "lm_head.weight"}


@torch.no_grad()
def assert_same_logits(gpt, hf, vocab_size=100, tolerance=1e-4):
    ids = torch.arange(40).view(2, 20) * 7 % vocab_size
    torch.testing.assert_close(gpt.eval()(ids)[..., :vocab_size], hf(ids).logits[..., :vocab_size], rtol=tolerance, atol=tolerance)


# ---- what is read ----

@pytest.mark.parametrize("n_layer, n_head, options", [
    *[(*SHAPES[name], {}) for name in SHAPES], (2, 16, {"activation_function": "gelu_pytorch_tanh"}), (2, 16, {"n_inner": 256}),
    (2, 16, {"reorder_and_upcast_attn": True})])
def test_logits_equal_those_of_transformers(n_layer, n_head, options, tmp_path):
    hf = hf_gpt2(4 * n_head, n_head, n_layer, **options)
    hf.save_pretrained(tmp_path)
    gpt = load_gpt2(str(tmp_path))
    assert (gpt.config.n_layer, gpt.config.n_head, gpt.config.n_embd) == (n_layer, n_head, 4 * n_head)
    assert_same_logits(gpt, hf)


def test_gradients_equal_those_of_transformers(tiny, tiny_folder):
    gpt, ids = load_gpt2(tiny_folder), torch.arange(40).view(2, 20)
    logits = tiny(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gpt(ids[:, :-1], ids[:, 1:].contiguous()).backward()
    for name, p in tiny.transformer.named_parameters():
        ours = gpt.get_parameter(name).grad[:100] if name == "wte.weight" else gpt.get_parameter(name).grad
        torch.testing.assert_close(ours, p.grad.t() if name.endswith(LINEAR) else p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("save", [
    lambda hf, folder: hf.transformer.save_pretrained(folder),  # names without "transformer."
    lambda hf, folder: torch.save(hf.state_dict(), folder / "pytorch_model.bin"),
    lambda hf, folder: torch.save(hf.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    lambda hf, folder: safetensors.save_file(tensors_of(hf) | {  # as in OpenAI's own file
        "lm_head.weight": hf.lm_head.weight.detach().clone(), "h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}, folder / "model.safetensors")],
    ids=["short names", "bin", "old bin", "masks and tied head"])
def test_every_layout_of_a_file_is_read(save, tiny, tmp_path):
    save(tiny, tmp_path)
    assert_same_logits(load_gpt2(tmp_path), tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_becomes_float32_and_heads_have_64_channels_without_a_config(dtype, tmp_path):
    hf = hf_gpt2(192, 3).to(dtype)
    safetensors.save_file(tensors_of(hf), tmp_path / "any name.safetensors")
    gpt = load_gpt2(tmp_path / "any name.safetensors")
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    assert_same_logits(gpt, hf.float())


def test_a_shorter_context_keeps_the_first_positions(tiny, tiny_folder):
    gpt = load_gpt2(tiny_folder)
    crop_block_size(gpt, 24)
    assert gpt.config.block_size == 24 and gpt.wpe.weight.requires_grad
    assert_same_logits(gpt, tiny)


# ---- config.json and the tokenizer ----

OPTIONS = [
    ("activation_function", "relu"), ("activation_function", "gelu"), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("layer_norm_epsilon", 1e-6), ("add_cross_attention", True),
    ("tie_word_embeddings", False), ("n_inner", 100), ("model_type", "gpt_neo"), ("n_layer", 1),
    ("quantization_config", {"bits": 4}), ("vocab_size", 99), ("n_head", 3)]


@pytest.mark.parametrize("config, message", [
    *[({key: value}, f"{key}={value!r}") for key, value in OPTIONS],
    *[(text, "it or its config.json is damaged") for text in ("", "{")]], ids=lambda x: str(x)[:40])
def test_a_config_that_is_damaged_or_computes_something_else_is_refused(config, message, tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    if isinstance(config, dict):
        config = json.dumps(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | config)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match=f"model.safetensors: .*{re.escape(message)}"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("name, change, message", [
    ("lm_head.weight", lambda _: torch.zeros(100, 64), "lm_head.weight differs from wte.weight"),
    ("transformer.h.1.mlp.c_fc.weight", lambda t: t.fill_(torch.nan), "h.1.mlp.c_fc.weight contains NaN or inf")])
def test_an_untied_head_and_weights_that_are_not_finite_are_refused(name, change, message, tiny, tmp_path):
    tensors = tensors_of(tiny)
    safetensors.save_file(tensors | {name: change(tensors.get(name))}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_gpt2(tmp_path)


@pytest.fixture(scope="module")
def wide():
    """Return a GPT-2 with its own vocabulary and two more tokens, in few channels."""
    return hf_gpt2(8, 2, 1, vocab_size=50259)


def save_wide(hf, folder, rows):
    """Save the first `rows` rows of the vocabulary."""
    wte = {"transformer.wte.weight": hf.transformer.wte.weight[:rows].detach().clone()}
    safetensors.save_file(tensors_of(hf) | wte, folder / "model.safetensors")
    (folder / "config.json").write_text('{"n_head": 2}', encoding="utf-8")


def test_role_tokens_start_near_the_mean_and_change_no_other_logit(wide, tmp_path):
    save_wide(wide, tmp_path, 50257)
    gpt, old = load_gpt2(tmp_path), wide.transformer.wte.weight[:50257].detach()
    new, mean = gpt.wte.weight[50257:50260].detach(), old.mean(0)
    assert gpt.config.vocab_size == 50260 and gpt.wte.weight.shape == (50304, 8)
    assert 0 < (new - mean).norm(dim=1).max() < 0.1 * (old - mean).norm(dim=1).mean()
    assert len(new.unique(dim=0)) == 3
    assert_same_logits(gpt, wide, 50257)
    logits = gpt(torch.tensor([[1, 2]]))
    assert logits[..., :50260].isfinite().all() and (logits[..., 50260:] == -torch.inf).all()
    assert load_gpt2(tmp_path, vocab_size=50257).config.vocab_size == 50257
    with pytest.raises(UserError, match=r"vocab_size=50256: .* 50257 ids"):
        load_gpt2(tmp_path, vocab_size=50256)


@pytest.mark.parametrize("added, file", [(1, "model.safetensors"), (2, "model.safetensors"), (47, "ckpt.pt")])
def test_added_tokens_and_padding_are_left_out_with_a_note(added, file, wide, tmp_path, capsys):
    if file == "ckpt.pt":
        torch.save(nanogpt_checkpoint(wide, 50304), tmp_path / file)
    else:
        save_wide(wide, tmp_path, 50257 + added)
    gpt = load_gpt2(tmp_path)
    assert gpt.config.vocab_size == 50260 and f"the other {added} are added tokens" in capsys.readouterr().err
    assert_same_logits(gpt, wide, 50257)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_different_tokenizer_is_refused(name, wide, tmp_path, gpt2_vocabulary):
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    save_wide(wide, tmp_path, 50257)
    characters = bytes_to_unicode()
    vocab = {"".join(characters[b] for b in token): i for token, i in gpt2_vocabulary._mergeable_ranks.items()}
    for ids in (vocab, {token: i ^ 1 for token, i in vocab.items()}):
        content = ids if name == "vocab.json" else {"model": {"vocab": ids}}
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        assert loads(tmp_path) == (ids is vocab)


# ---- nanoGPT ----

def nanogpt_checkpoint(hf, padded_rows, bias=True, compiled=True):
    """Return what nanoGPT's train.py saves for a model with these weights."""
    model = {name: t.t().contiguous() if name.endswith(LINEAR) else t for name, t in hf.state_dict().items()
             if bias or not name.endswith(".bias")}
    wte, cfg = model["transformer.wte.weight"], hf.config
    wte = torch.cat([wte, wte.new_zeros(padded_rows - len(wte), cfg.n_embd)])
    model |= {"transformer.wte.weight": wte, "lm_head.weight": wte}
    args = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "block_size": 64, "bias": bias,
            "vocab_size": padded_rows, "dropout": 0.0}
    model = {"_orig_mod." * compiled + name: t for name, t in model.items()}
    return {"model": model, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.0),
            "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
            "config": {"dataset": "shakespeare_char", "compile": True}}


@pytest.mark.parametrize("bias, compiled", [(True, True), (False, False)])
def test_a_checkpoint_of_nanogpt_is_read(bias, compiled, tmp_path):
    hf = hf_gpt2(32, 4, activation_function="gelu")  # exact in nanoGPT, approximated by GPT-2
    if not bias:
        for name, p in hf.named_parameters():
            p.data *= not name.endswith(".bias")
    checkpoint = nanogpt_checkpoint(hf, 100, bias, compiled)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    gpt = load_gpt2(tmp_path / "ckpt.pt")
    assert gpt.config.bias == bias
    assert_same_logits(gpt, hf, tolerance=0.002)


# ---- damaged and hostile files ----

@pytest.fixture(scope="module")
def whole():
    """Return a whole safetensors file of one layer: its bytes, its header, its data."""
    content = safetensors.save(tensors_of(hf_gpt2(n_layer=1, vocab_size=20).transformer))
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return content, json.loads(content[8:start]), content[start:]


def loads(path):
    """Return whether a file loads and computes. If not, assert that the UserError is one line that names it."""
    try:
        gpt = load_gpt2(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    return gpt(torch.tensor([[0]])).shape[:2] == (1, 1)


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    path, (content, _, data) = tmp_path / "model.safetensors", whole
    start = len(content) - len(data)
    for cut in {0, 1, 7, 8, 9, start - 1, start, start + 1, len(content) - 1, *range(0, len(content), 9973)}:
        path.write_bytes(content[:cut])
        assert not loads(path), cut
    path.write_bytes(content)
    assert loads(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_a_truncated_torch_file_is_refused_and_no_pickle_is_executed(name, zipped, tiny, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / name
    torch.save(tiny.state_dict() if "bin" in name else nanogpt_checkpoint(tiny, 100), path,
               _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert loads(path)
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert not loads(path), cut
    torch.save({"wte.weight": Trap()}, path, _use_new_zipfile_serialization=zipped)
    assert not loads(path) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [
    {}, [], 7, torch.zeros(3), {1: torch.zeros(3)}, {"wte.weight": 7}, {"wte.weight": [1.0]},
    {"wte.weight": torch.zeros(3), "wpe.weight": torch.zeros(3)}, {"wte.weight": torch.zeros(20, 64)},
    {"model_args": 7, "model": {}}, {"model_args": {}, "model": 7}, {"config": {}, "model": {}}], ids=str)
def test_a_file_without_gpt2s_weights_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "pytorch_model.bin")
    assert not loads(tmp_path)


HEADERS = [b"", b"{}", b"[]", b"{", b"\xff\xfe{}", b'{"wte.weight": null}', b'{"wte.weight": {}}']
FIELDS = {  # None: the tensor is missing
    "ln_f.weight": [{"dtype": "F33"}, {"dtype": "F16"}, {"shape": [65]}, {"shape": [2, 32]}, {"data_offsets": [0, 257]}],
    "h.0.attn.c_attn.weight": [{"shape": [192, 64]}], "wpe.weight": [{"shape": [128, 32]}],
    "wte.weight": [{"shape": [1280]}, {"shape": [40, 32]}, None], "ln_f.bias": [None], "h.0.mlp.c_proj.weight": [None],
    "extra": [{}], "h.": [{}]}


@pytest.mark.parametrize("change", HEADERS + [(name, entry) for name in FIELDS for entry in FIELDS[name]], ids=lambda x: str(x)[:40])
def test_a_damaged_header_or_an_impossible_tensor_is_refused(change, whole, tmp_path):
    if isinstance(change, tuple):
        name, entry = change
        header = whole[1] | {name: whole[1].get(name, whole[1]["ln_f.weight"]) | (entry or {})}
        change = json.dumps({key: header[key] for key in header if entry is not None or key != name}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(change)) + change + whole[2])
    assert not loads(tmp_path / "a.safetensors")


def test_what_is_written_opens_with_the_safetensors_package_and_ours(tmp_path):
    tensors = {"a": torch.randn(3, 5), "transposed": torch.randn(4, 6).t(), "ünï \"x\"": torch.randn(7),
               "scalar": torch.tensor(2.5), "half": torch.randn(2, 3).half(), "empty": torch.zeros(0, 3)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    for found in (safetensors.load_file(tmp_path / "a.safetensors"), read_safetensors(tmp_path / "a.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(found[name].equal(tensor.float()) for name, tensor in tensors.items())


# ---- the download ----

def test_a_model_by_name_is_downloaded_once(tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "hub" / "openai-community" / "gpt2" / "resolve" / "main" / "model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((tiny_folder / "model.safetensors").read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("GPT2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(server):
        assert_same_logits(load_gpt2("gpt2"), tiny)
        assert f"to {tmp_path / 'cache' / 'gpt2' / 'model.safetensors'}" in capsys.readouterr().err
        with pytest.raises(OSError, match="gpt2-xl/resolve.*404"):
            load_gpt2("gpt2-xl")
    assert_same_logits(load_gpt2("gpt2"), tiny)  # without a server


def test_a_folder_without_weights_is_refused_with_the_alternatives(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*model.safetensors.*gpt2-xl"):
        load_gpt2(tmp_path)
