"""runtime/look.py: its numbers against those of transformers and sample, its page in a real browser."""
import functools
import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import model as code
from data.conversation import encode_conversation
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, sample
from runtime import look as look_module
from runtime.fast_cpu import speed_up
from runtime.look import head_patterns, look, write_page

REPO = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
CHAT = encode_conversation([{"role": "user", "content": "Hi you"},
                            {"role": "assistant", "content": "Oh my word"}], BYTES)


def tiny(vocab_size=260, sharpness=20, **changes):
    """Return a random model with confident predictions and sharp attention."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, **dict(block_size=64, n_layer=3, n_head=2, n_embd=16) | changes)).eval()
    with torch.no_grad():
        model.wte.weight *= 30
        for block in model.h:
            block.attn.c_attn.weight *= sharpness
            block.mlp.c_proj.weight *= 20
    return model


# ---- the numbers ----

@pytest.fixture(scope="module")
def oracle():
    """Run transformers' GPT-2 in float64 with tiny's weights on CHAT; return attention (L, nh, T, T), and the logits
    after the embeddings and after every block (L + 1, T, V)."""
    transformers = pytest.importorskip("transformers")
    ours, c = tiny(), tiny().config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.padded_vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_implementation="eager")).double().eval()
    theirs.transformer.load_state_dict(code.transpose_conv1d(ours.state_dict()))
    with torch.no_grad():
        out = theirs(torch.tensor([CHAT]), output_attentions=True, output_hidden_states=True)
        early = [theirs.lm_head(theirs.transformer.ln_f(x[0])) for x in out.hidden_states[:-1]]
    return torch.cat(out.attentions), torch.stack([*early, out.logits[0]])[..., :c.vocab_size]


def test_all_numbers_are_those_of_transformers(oracle):
    attentions, levels = oracle
    page, close = look(tiny(), BYTES, CHAT), dict(rtol=1e-4, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(page["weights"][:, 1:], attentions, **close)
    torch.testing.assert_close(page["weights"][:, 0], attentions.mean(1), **close)
    assert attentions.amax(-1)[..., 5:].mean() > 0.4 and page["weights"].shape == (3, 3, 21, 21)
    p = levels.softmax(-1)
    best = p.topk(3)
    assert page["lens_ids"].tolist() == best.indices.tolist()
    torch.testing.assert_close(page["lens_p"], best.values, **close)
    for t, i in enumerate(CHAT[1:]):
        torch.testing.assert_close(page["lens_target_p"][:, t], p[:, t, i], **close)
        torch.testing.assert_close(page["target_p"][t], p[-1, t, i], **close)
        assert page["target_rank"][t] == 1 + (p[-1, t] > p[-1, t, i]).sum()
        torch.testing.assert_close(page["target_logit"][t], levels[-1, t, i] - levels[-1, t].max(), **close)
    assert page["next_ids"].tolist() == levels[-1].topk(10).indices.tolist()


@pytest.mark.parametrize("fused", [True, False])
def test_look_leaves_the_model_as_it_was(fused):
    model = tiny(fused=fused)
    before = model(torch.tensor([CHAT]))
    look(model, BYTES, CHAT)
    with pytest.raises(AssertionError):  # too long for the model
        look(model, BYTES, CHAT * 9)
    assert torch.equal(model(torch.tensor([CHAT])), before)
    assert [block.attn.fused for block in model.h] == [fused] * 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["float32 on a CPU", "int8", "bfloat16", "no biases"])
@torch.no_grad()
def test_every_form_of_a_model(kind, tmp_path):
    model = tiny(bias=kind != "no biases")
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind != "no biases":
        model = speed_up(model, int8=kind == "int8")
        assert type(model) is not GPT
    page = look(model, BYTES, CHAT)
    logits = model(torch.tensor([CHAT]))[0, :, :260].float()
    close = dict(rtol=0.02, atol=0.02) if kind == "bfloat16" else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(page["lens_p"][-1], logits.softmax(-1).topk(3).values, **close)
    torch.testing.assert_close(page["weights"].sum(-1), torch.ones(3, 3, 21), rtol=0.02, atol=0.02)
    assert page["parameters"] == model.num_params()
    write_page(tmp_path / "a.html", page)
    assert (tmp_path / "a.html").stat().st_size > 10_000


def test_an_edited_attention_shows_its_weights(monkeypatch):
    monkeypatch.setattr(code, "causal_mask", lambda T, S, device: torch.ones(T, S, dtype=torch.bool).tril().triu(-1))
    assert (look(tiny(), BYTES, CHAT)["weights"].count_nonzero(-1)[:, :, 1:] == 2).all(), "a window of two tokens"


def test_roles_and_where_the_page_opens():
    page = look(tiny(), BYTES, CHAT)
    assert page["roles"] == ["special", "special", *["user"] * 6, "special", "special",
                             *["assistant"] * 10, "special"]
    assert BYTES.decode(CHAT[:page["chosen"] + 1]).endswith("O")  # the reply's first token
    text = list(b"once upon a time it was")
    page = look(tiny(), BYTES, text, start=11)
    assert page["roles"] == ["user"] * 11 + ["assistant"] * 12
    assert bytes(text[11:page["chosen"] + 1]) == b" "
    assert bytes(text[:look(tiny(), BYTES, text)["chosen"] + 1]) == b"o"
    assert look(tiny(), BYTES, [65])["chosen"] == 0
    assert look(tiny(), BYTES, text[:5], start=5)["chosen"] == 4  # the model wrote nothing


def test_only_the_newest_tokens_of_a_long_text_are_shown():
    whole, part = look(tiny(), BYTES, CHAT), look(tiny(), BYTES, CHAT, longest=8)
    assert part["ids"] == CHAT[-8:] and part["hidden"] == 13
    assert part["roles"] == whole["roles"][-8:] and part["chosen"] == max(whole["chosen"] - 13, 0)
    torch.testing.assert_close(part["weights"], whole["weights"][:, :, -8:, -8:])
    torch.testing.assert_close(part["lens_p"], whole["lens_p"][:, -8:])


def test_head_patterns_by_hand():
    to_previous, to_first, to_same = torch.zeros(3, 4, 4)
    to_previous[[0, 1, 2, 3], [0, 0, 1, 2]] = 1
    to_first[:, 0] = 1
    to_same[[0, 1, 2, 3], [0, 1, 0, 1]] = 1  # of the ids 7 8 7 8
    mean = torch.ones(4, 4)
    weights = torch.stack([torch.stack([mean, to_first, to_first]), torch.stack([mean, to_previous, to_same])])
    names, scores = zip(*(re.split("  +", line, maxsplit=1) for line in head_patterns(weights, [7, 8, 7, 8])[1:]))
    assert names == ("previous token", "first token", "same token earlier")
    assert scores == ("layer 2 head 1: 1.00   layer 1 head 1: 0.33   layer 1 head 2: 0.33",
                      "layer 1 head 1: 1.00   layer 1 head 2: 1.00   layer 2 head 1: 0.33",
                      "layer 2 head 2: 1.00   layer 1 head 1: 0.50   layer 1 head 2: 0.50")
    assert len(head_patterns(weights, [1, 2, 3, 4])) == 3


@pytest.mark.parametrize("shape, tokens, limit", [
    (dict(vocab_size=1028, n_layer=4, n_head=4, n_embd=128), 100, 400_000),
    # GPT-2's heads; its texts may be 160,000 bytes more than these.
    (dict(vocab_size=1028, n_layer=12, n_head=12, n_embd=48), 200, 3_000_000 - 160_000)])
def test_a_page_is_small(tmp_path, shape, tokens, limit):
    spec = {"pattern": r"[\s\S]", "merges": [[i % 256, i // 256 + 97] for i in range(768)]}
    ids = torch.randint(1028, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny(block_size=256, sharpness=6, **shape)
    write_page(tmp_path / "a.html", look(model, get_tokenizer(spec), ids))
    assert 100_000 < (tmp_path / "a.html").stat().st_size < limit


def test_functions_that_the_page_names_exist():
    page = (REPO / "runtime" / "look.html").read_text(encoding="utf-8")
    assert page.count("DATA") == 1 and "http:" not in page and "https:" not in page and "default-src 'unsafe-inline'" in page
    named = re.findall(r"<code>([\w/]+\.py): (\w+)</code>", page)
    assert len(named) == 4
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (REPO / file).read_text(encoding="utf-8"), re.M)


# ---- in a browser ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
RUN = """<script>(async () => {
  const result = document.createElement("pre");
  onerror = onunhandledrejection = event => { result.append(JSON.stringify(`ERROR ${event.reason ?? event}`)); };
  await ready;
  result.append(JSON.stringify((() => { SCRIPT })()));
  document.documentElement.append(Object.assign(result, { id: "result" }));
})();</script>"""


def chromium(path, *flags):
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync", f"user-data-dir={path}.profile", *flags]
    return subprocess.run([CHROMIUM, *(f"--{flag}" for flag in flags), path.as_uri()], check=True, timeout=100,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()


def in_browser(folder, page, script, width=1200):
    """Run JavaScript in a page after it is drawn; return its result."""
    write_page(folder / "a.html", page)
    with open(folder / "a.html", "a", encoding="utf-8") as f:
        f.write(RUN.replace("SCRIPT", script))
    dom = chromium(folder / "a.html", "virtual-time-budget=60000", "dump-dom", f"window-size={width},900")
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))


def expected(logits, temperature, top_k, top_p):
    """Return the distribution that sample draws from: logits (V,) -> probabilities (V,)."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr(torch, "multinomial", lambda p, *_, **__: drawn.append(p / p.sum()) or torch.tensor([0]))
        sample(logits.clone(), [], None, temperature=temperature, top_k=top_k, top_p=top_p)
    p = drawn[0].sort(descending=True).values  # the largest belongs to the largest logit
    return torch.zeros_like(logits).index_put((logits.argsort(descending=True)[:len(p)],), p)


SETTINGS = list(itertools.product((0, 0.05, 0.5, 1, 2), (0, 1, 3, 10), (1, 0.05, 0.5, 0.9)))


@needs_chromium
@pytest.mark.parametrize("kept", [20, 256])
def test_the_page_computes_the_probabilities_of_sample(oracle, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(look_module, "KEPT", kept)
    positions, beyond = (0, 7, 12, 19), 0
    found = in_browser(tmp_path, look(tiny(), BYTES, CHAT), f"""
        return {list(positions)}.map(t => {json.dumps(SETTINGS)}.map(s => probs(t, ...s)))""")
    for t, pages in zip(positions, found):
        logits = oracle[1][-1, t]
        order = logits.argsort(descending=True)
        for setting, page in zip(SETTINGS, pages, strict=True):
            wanted, p = expected(logits, *setting), torch.tensor(page["p"], dtype=torch.float64)
            close = dict(rtol=1e-4, atol=1e-6)
            if setting[2] < 1 and wanted[order[kept:]].any():  # the page's may be too high by the smallest kept
                beyond += 1
                assert (p >= wanted[order[:kept]] - 1e-6).all()
                close = dict(rtol=1e-4 + float(p[-1]) / setting[2], atol=1e-6)
            torch.testing.assert_close(p, wanted[order[:kept]], **close)
            if page["target"] is not None:
                torch.testing.assert_close(float(page["target"]), float(wanted[CHAT[t + 1]]), **close)
    assert bool(beyond) == (kept == 20)


def shown(p):
    return f"{100 * p:.1f}\u00a0%"


@needs_chromium
def test_clicks_and_sliders_show_the_models_numbers(oracle, tmp_path):
    attentions, levels = oracle
    got = in_browser(tmp_path, look(tiny(), BYTES, CHAT), """
        const bars = () => all("#bars tr").map(x => [x.lastChild.textContent, x.classList.contains("target")]);
        const click = (css, n) => all(`${css} input`)[n].click(), story = () => $("#story").innerText;
        const masked = () => all("#attention .masked").length;
        const slide = (name, n) => {
          const slider = $(`[name=${name}]`);
          slider.value = n, slider.dispatchEvent(new Event("input", { bubbles: true }));
          return bars(); };
        const got = { token: state.token, story: story(), first: bars() };
        click("#pieces", 14);
        Object.assign(got, { second: bars(), same: all("#attention input")[14].checked,
          temperature: slide("temperature", 10), top_k: slide("top_k", 2), top_p: slide("top_p", 9),
          label: $("[name=temperature]").ariaValueText,
          lens: all("#lens tr").map(row => [...row.children].map(x => x.textContent)) });
        click("#heads", 5);
        Object.assign(got, { head: [state.layer, state.head], top_weights: $("#top_weights").innerText, masked: masked(),
          shades: all("#attention label").map(x => +x.style.getPropertyValue("--much")) });
        all("#attention label")[3].dispatchEvent(new Event("pointerenter"));
        Object.assign(got, { hovering: masked(), selected: state.token });
        click("#heads", 1);
        const pen = $("#matrix canvas").getContext("2d"), pixel = (i, j) => [...pen.getImageData(j, i, 1, 1).data];
        got.pixels = ids.map((_, i) => ids.map((_, j) => pixel(i, j)));
        click("#pieces", 20);
        return { ...got, end: [story(), bars()] };""")
    assert got["token"] == 10 and "the model wrote h" in got["story"]
    for name, t, setting in (("first", 10, (1, 0, 1)), ("second", 14, (1, 0, 1)), ("temperature", 14, (0.5, 0, 1)),
                             ("top_k", 14, (0.5, 3, 1)), ("top_p", 14, (0.5, 3, 0.5))):
        p, after = expected(levels[-1, t], *setting), CHAT[t + 1]
        best = levels[-1, t].topk(10).indices.tolist()
        rows = best if after in best else [*best, after]
        assert got[name] == [[shown(float(p[i])), i == after] for i in rows], name
    assert got["same"] and got["label"] == "0.5"
    for cells, logits in zip(got["lens"], levels[:, 14], strict=True):
        p = logits.softmax(0)
        assert [cell.rpartition(" ")[2] for cell in cells[1:4]] == [shown(float(x)) for x in p.topk(3).values]
        assert cells[-1] == shown(float(p[CHAT[15]]))
    assert got["head"] == [1, 2]  # layer 2, head 2; 0 is the mean over heads
    weights = attentions[1, 1, 14, :15]
    largest = (100 * weights.sort(descending=True).values[:5]).tolist()
    found = [float(x) for x in re.findall(r"([\d.]+)\u00a0%", got["top_weights"])]
    assert found == pytest.approx(largest, abs=0.3)  # the page has steps of 1 / 255
    assert got["shades"] == pytest.approx([*weights.tolist(), *[0] * (len(CHAT) - 15)], abs=0.003)
    assert (got["masked"], got["hovering"], got["selected"]) == (len(CHAT) - 15, len(CHAT) - 4, 14)
    for i, row in enumerate(got["pixels"]):
        for j, (red, _, blue, alpha) in enumerate(row):
            if j > i:  # masked: gray
                assert abs(red - blue) < 8 and alpha == 0x33
            else:
                assert abs((alpha / 255)**2 - float(attentions[0, 0, i, j])) < 0.01
    assert "the text ends" in got["end"][0] and not any(is_target for _, is_target in got["end"][1])


EVIL = ["<script>window.ran = 1</script>", "</script>", "<!--<script>", "]]>", "&lt;b&gt;", "${window.ran=1}",
        "<img src=x onerror=window.ran=1>", "\u2028", "\u2029", "\u202egnp.exe", "\x00\x01", "\x1b[31m", "DATA",
        "\"'\\", "a\nb", "\ufeff", "naïve 👋"]


@needs_chromium
def test_text_is_shown_and_never_run(tmp_path):
    merges = {}

    def token(text):  # the id of one token with this text
        first, *rest = text.encode()
        return functools.reduce(lambda left, byte: merges.setdefault((left, byte), 256 + len(merges)), rest, first)
    ids = [*map(token, EVIL), 0xe2]
    enc = get_tokenizer({"pattern": r"[\s\S]", "merges": list(map(list, merges))})
    page = look(tiny(enc.n_vocab), enc, ids)
    got = in_browser(tmp_path, page, """
        ids.forEach((_, t) => choose({ token: t }));
        return { ran: window.ran ?? null, images: all("img").length, scripts: document.scripts.length,
          texts: page.ids.slice(0, -1).map(id => page.texts[id]),
          chips: all("#pieces label").map(chip => chip.innerText) };""")
    write_page(tmp_path / "b.html", page)
    text = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "\u2028" not in text
    chips = got.pop("chips")
    assert got == {"ran": None, "images": 0, "scripts": 3, "texts": EVIL}  # the third is this test's
    assert chips[:7] == [text.replace(" ", "·") for text in EVIL[:7]]
    assert chips[7:11] == ["[U+2028]", "[U+2029]", "[U+202E]gnp.exe", "[U+0][U+1]"]
    assert chips[14] == "a↵b" and chips[16:] == ["naïve·👋", "<e2>"]


@needs_chromium
def test_all_heads_of_gpt2_fit_on_the_screen(tmp_path):
    ids = torch.randint(256, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    page = look(tiny(block_size=256, n_layer=12, n_head=12, n_embd=48), BYTES, ids, start=50)
    width = 500  # Chromium's windows cannot be narrower
    heads, scroll_width, smallest_font = in_browser(tmp_path, page, """
        return [all("#heads canvas").length, document.documentElement.scrollWidth,
          Math.min(...all("body *").map(x => parseFloat(getComputedStyle(x).fontSize)))];""", width)
    assert heads == 12 * 13 and scroll_width <= width and smallest_font >= 12
