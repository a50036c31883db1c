"""A folder for transformers: its logits, tokenizer and chat template against transformers itself."""
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import UserError
from data.conversation import encode_conversation, encode_prompt
from data.tokenizer import (
    END_OF_TEXT,
    ROLE_TOKENS,
    SPLIT_PATTERN,
    TRAILING_SPACE_PATTERN,
    get_tokenizer,
    train_bpe,
)
from model import GPT, GPTConfig, load_gpt2
from runtime import export
from runtime.checkpoint import model_state, save_checkpoint
from tests.test_gguf import PARAGRAPH, exported_to, random_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: these tests need no hub
transformers = pytest.importorskip("transformers")

FAMILY = "👨\u200d👩\u200d👧\u200d👦"  # one emoji, four joined by zero-width joiners
SHAPES = {"gpt2": dict(n_head=4, n_embd=16), "bpe": dict(bias=False), "trailing space": {}, "bytes": dict(n_head=3, n_embd=48)}
PROPERTY = settings(max_examples=40, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, tmp_path_factory):
    """Export a checkpoint with one of the four kinds of tokenizer, on the command line."""
    name, folder = request.param, tmp_path_factory.mktemp("export")
    patterns = {"bpe": SPLIT_PATTERN, "trailing space": TRAILING_SPACE_PATTERN}
    spec = train_bpe([PARAGRAPH] * 3, 420, patterns[name]) if name in patterns else name
    enc = request.getfixturevalue("gpt2_vocabulary") if spec == "gpt2" else get_tokenizer(spec)
    gpt = random_model(spec, **SHAPES[name])
    path = exported_to(folder, gpt, spec, out="hf")
    return SimpleNamespace(gpt=gpt, enc=enc, folder=path, tokenizer=transformers.AutoTokenizer.from_pretrained(path))


@torch.no_grad()
def test_transformers_and_a_reloaded_model_have_the_same_logits(exported):
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert type(hf) is transformers.GPT2LMHeadModel
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    n, prompt = exported.enc.n_vocab, torch.randint(exported.enc.n_vocab, (1, 10))
    ours = exported.gpt(prompt)[..., :n]
    torch.testing.assert_close(hf.eval()(prompt).logits, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_gpt2(exported.folder).eval()(prompt)[..., :n], ours, rtol=1e-4, atol=1e-4)
    ends = [exported.enc.encode_single_token(token) for token in (END_OF_TEXT, "<|end|>")]
    assert hf.generation_config.eos_token_id == ends
    theirs = hf.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=ends[0])[0, 10:].tolist()
    assert list(exported.gpt.generate(prompt[0].tolist(), 30, temperature=0, stop_ids=ends)) == \
        [i for i in theirs if i not in ends]


PIECES = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u200d", "é", "e\u0301", "👋", FAMILY, "12", "7", "'ll",
                          "'s", "the", " The", "__", "...", "<|", "|>", "東京", "\x1c", "\u0085", "²", "Ⅷ"])
TEXT = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=20).map("".join)).filter(
    lambda text: not any(token in text for token in (END_OF_TEXT, *ROLE_TOKENS)))


@PROPERTY
@given(text=TEXT)
@example(PARAGRAPH)
@example(f"{FAMILY} " * 3)
def test_the_tokenizer_gives_the_same_ids_and_text(exported, text):
    ids = exported.tokenizer.encode(text)
    assert ids == exported.enc.encode_ordinary(text) and len(exported.tokenizer) == exported.enc.n_vocab
    assert exported.tokenizer.decode(ids) == text


@PROPERTY
@given(texts=st.lists(TEXT, min_size=2, max_size=3))
@example([" Leading and trailing \n", "\n\nAn answer\n", PARAGRAPH])
@example(["", "", ""])
def test_the_chat_template_renders_our_chat_format(exported, texts):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    for prompt, expected in ((False, encode_conversation(messages, exported.enc)), (True, encode_prompt(messages, exported.enc))):
        assert exported.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("out", ["hf", "it.gguf"])
@pytest.mark.parametrize("path, module, parameter", [
    ("ln_f", torch.nn.LayerNorm(32, bias=False), "ln_f.bias"),
    ("lm_head", torch.nn.Linear(32, 320, bias=False), "lm_head.weight")], ids=["norm without bias", "untied head"])
def test_a_model_that_is_not_gpt2_is_refused(path, module, parameter, out, tmp_path, monkeypatch):
    class Edited(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.set_submodule(path, module)

    monkeypatch.setattr("model.GPT", Edited)
    gpt = Edited(GPTConfig(260, 64, n_layer=2, n_head=2, n_embd=32))
    save_checkpoint(tmp_path / "best.pt", model_state(gpt, "bytes", "chat", step=1, max_iters=1))
    with pytest.raises(UserError, match=f"^{parameter} is .*GPT-2's parameters"):
        export.main([f"--checkpoint={tmp_path / 'best.pt'}", f"--out={tmp_path / out}"])
    assert not (tmp_path / out).is_file() and not (tmp_path / out / "model.safetensors").exists()
