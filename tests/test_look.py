"""The page that looks inside: its numbers against transformers' and sample's, in a real browser."""
import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from pictures.look import habits, head_scores, look, write_page

import chat
import model as code
from data.conversation import encode_conversation, special_ids
from data.tokenizer import build, get_tokenizer
from model import GPT, GPTConfig, make_fast, sample
from pictures import look as pictures_look

REPO = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
CHAT = encode_conversation([{"role": "user", "content": "Hi you"},
                            {"role": "assistant", "content": "Oh my word"}], BYTES)


def tiny(vocab_size=260, sharpness=20, **changes):
    """A random model that is sure of something, and whose heads look somewhere."""
    torch.manual_seed(0)
    shape = dict(block_size=64, n_layer=3, n_head=2, n_embd=16)
    made = GPT(GPTConfig(vocab_size, **{**shape, **changes})).eval()
    with torch.no_grad():
        made.wte.weight *= 30
        for block in made.h:
            block.attn.c_attn.weight *= sharpness
            block.mlp.c_proj.weight *= 20
    return made


# ---- the numbers ----

@pytest.fixture(scope="module")
def oracle():
    """transformers' GPT-2 in float64 with the same weights, reading CHAT: attention (L, nh, T, T),
    and the logits after the embeddings and after every block (L + 1, T, V)."""
    transformers = pytest.importorskip("transformers")
    ours, c = tiny(), tiny().config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_implementation="eager")).double().eval()
    weights = {}
    for name, tensor in code.stored_weights(ours).items():
        turned = tensor.t() if name.startswith("h.") and tensor.dim() == 2 else tensor
        weights[f"transformer.{name}"] = turned[:c.vocab_size] if name == "wte.weight" else turned
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    theirs.tie_weights()
    with torch.no_grad():
        out = theirs(torch.tensor([CHAT]), output_attentions=True, output_hidden_states=True)
        early = [theirs.lm_head(theirs.transformer.ln_f(x[0])) for x in out.hidden_states[:-1]]
    return torch.cat(out.attentions), torch.stack([*early, out.logits[0]])


def test_what_passes_by_is_what_transformers_computes(oracle):
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
        torch.testing.assert_close(page["lens_came"][:, t], p[:, t, i], **close)
        torch.testing.assert_close(page["came_p"][t], p[-1, t, i], **close)
        assert page["came_rank"][t] == 1 + (p[-1, t] > p[-1, t, i]).sum()
        torch.testing.assert_close(page["came"][t], levels[-1, t, i] - levels[-1, t].max(), **close)
    assert page["next_ids"].tolist() == levels[-1].topk(10).indices.tolist()


def test_the_rest_is_what_the_kept_logits_leave(oracle, monkeypatch):
    monkeypatch.setattr(pictures_look, "KEPT", 20)
    page, last = look(tiny(), BYTES, CHAT), oracle[1][-1]
    ordered = (last - last.amax(1, keepdim=True)).sort(1, descending=True).values
    torch.testing.assert_close(page["logits"].double(), ordered[:, :20], rtol=1e-4, atol=1e-5)
    for n, temperature in enumerate(page["stops"]["temperature"][1:]):
        rest = (ordered[:, 20:] / temperature).exp().sum(1)
        torch.testing.assert_close(page["rest"][:, n].double(), rest, rtol=2e-4, atol=1e-6)


def test_looking_leaves_nothing_behind():
    model = tiny()
    before = model(torch.tensor([CHAT]))
    look(model, BYTES, CHAT)
    assert torch.equal(model(torch.tensor([CHAT])), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(AssertionError):  # too long for the model
        look(model, BYTES, CHAT * 9)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "no biases"])
def test_other_kinds_of_weights(kind, tmp_path):
    model = tiny(bias=kind != "no biases")
    if kind == "int8":
        make_fast(model, int8=True)
    elif kind == "bfloat16":
        model = model.to(torch.bfloat16)
    page = look(model, BYTES, CHAT)
    with torch.no_grad():
        logits = model(torch.tensor([CHAT]))[0, :, :260].float()
    torch.testing.assert_close(page["lens_p"][-1], logits.softmax(-1).topk(3).values)
    torch.testing.assert_close(page["weights"].sum(-1), torch.ones(3, 3, 21), rtol=0.02, atol=0.02)
    write_page(tmp_path / "a.html", page)
    assert (tmp_path / "a.html").stat().st_size > 10_000


def test_who_wrote_what_and_where_the_page_opens():
    page = look(tiny(), BYTES, CHAT)
    assert page["roles"] == ["special", "special", *["user"] * 6, "special", "special",
                             *["assistant"] * 10, "special"]
    assert BYTES.decode(CHAT[:page["chosen"] + 1]).endswith("Oh ")  # then came the second word
    one_word = encode_conversation([{"role": "user", "content": "Hi you"},
                                    {"role": "assistant", "content": "Oh"}], BYTES)
    assert BYTES.decode(one_word[:look(tiny(), BYTES, one_word)["chosen"] + 1]).endswith("O")
    text = list(b"once upon a time it was")
    page = look(tiny(), BYTES, text, start=11)
    assert page["roles"] == ["user"] * 11 + ["assistant"] * 12
    assert bytes(text[11:page["chosen"] + 1]) == b" time "
    assert bytes(text[:look(tiny(), BYTES, text)["chosen"] + 1]) == b"once "
    assert look(tiny(), BYTES, [65])["chosen"] == 0
    assert look(tiny(), BYTES, text[:5], start=5)["chosen"] == 4  # the model said nothing
    with pytest.raises(ValueError, match="no token"):
        look(tiny(), BYTES, [])


def test_of_a_long_text_the_newest_tokens_are_shown():
    whole, part = look(tiny(), BYTES, CHAT), look(tiny(), BYTES, CHAT, longest=8)
    assert part["ids"] == CHAT[-8:] and part["hidden"] == 13 and part["habits"] == whole["habits"]
    assert part["roles"] == whole["roles"][-8:] and part["chosen"] == max(whole["chosen"] - 13, 0)
    torch.testing.assert_close(part["weights"], whole["weights"][:, :, -8:, -8:])
    torch.testing.assert_close(part["lens_p"], whole["lens_p"][:, -8:])


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
    layers = [head_scores(torch.stack(heads)[None], [7, 8, 7, 8])
              for heads in ([to_first, to_first], [to_previous, to_same])]
    assert habits(layers)[1] == ("previous token      layer 2 head 1: 1.00   "
                                 "layer 1 head 1: 0.33   layer 1 head 2: 0.33")
    assert habits([head_scores(torch.ones(1, 2, 1, 1), [5])]) == []


@pytest.mark.parametrize("shape, tokens, limit", [
    (dict(vocab_size=1028, n_layer=4, n_head=4, n_embd=128), 100, 400_000),
    # GPT-2's heads. Its texts, 10 + 13 * 3 for each token, may be 160,000 bytes more than these.
    (dict(vocab_size=1028, n_layer=12, n_head=12, n_embd=48), 200, 3_000_000 - 160_000)])
@pytest.mark.parametrize("sharpness", [1, 6])  # heads that look everywhere, or at some tokens
def test_a_page_is_small(tmp_path, shape, tokens, limit, sharpness):
    spec = {"pattern": r"[\s\S]", "merges": [[i % 256, i // 256 + 97] for i in range(768)]}
    ids = torch.randint(1028, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny(block_size=256, sharpness=sharpness, **shape)
    write_page(tmp_path / "a.html", look(model, get_tokenizer(spec), ids))
    assert 100_000 < (tmp_path / "a.html").stat().st_size < limit


def test_every_function_that_the_page_names_is_there():
    html = (REPO / "pictures" / "look.html").read_text(encoding="utf-8")
    assert html.count("DATA") == 1 and "http:" not in html and "https:" not in html
    named = re.findall(r"<code>([\w/]+\.py): (\w+)</code>", html)
    assert len(named) == 4
    for file, name in named:
        assert f"\ndef {name}(" in (REPO / file).read_text(encoding="utf-8")
    lines = look(tiny(), BYTES, CHAT)["lines"]
    assert set(re.findall(r'data-code="([\w.]+)"', html)) == set(lines)
    source = Path(code.__file__).read_text(encoding="utf-8").split("\n")
    for name, line in lines.items():
        assert f"def {name.rpartition('.')[2]}(" in source[line - 1]


# ---- from the chat ----

ASKED = [*CHAT[:2], *b"hi", *CHAT[8:10]]


@pytest.mark.parametrize("turns, said, ids, chosen", [
    (1, b"you", [*ASKED, *b"you", CHAT[-1]], 6), (0, b"you", [*b"hiyou"], 2),
    (1, b"y" * 58, [*ASKED, *b"y" * 58], 6),  # the context is full: <|end|> is never read
    (0, b"y" * 80, [*b"y" * 64], 0)])  # more than the context
def test_the_chat_shows_what_was_seen_last(tmp_path, capsys, turns, said, ids, chosen):
    talk, path = chat.Talk(tiny(), BYTES, turns), tmp_path / "b.html"
    with pytest.raises(ValueError, match="nothing was said"):
        chat.command(talk, chat.Settings(), "/look")
    talk.history = [(list(b"hi"), list(said))]
    chat.command(talk, chat.Settings(), f"/look {path}")
    out, err = capsys.readouterr()
    assert out == "" and "previous token" in err and err.endswith(f"{path}: open it in a browser\n")
    html = path.read_text(encoding="utf-8")
    page = json.loads(re.search(r'type="application/json" id="data">(.*)</script>', html)[1])
    assert page["ids"] == ids and page["chosen"] == chosen
    assert page["roles"][chosen] == "assistant"


# ---- in a browser ----

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


class Browser:
    """A headless Chromium, which obeys JSON that ends in a zero byte (Chrome DevTools Protocol)."""

    def __init__(self, folder):
        read, self.to = os.pipe()
        self.said, write = os.pipe()

        def wire():  # it reads from 3 and writes to 4
            import fcntl  # which Windows has not
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            close_fds=False, preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.buffer, self.events, self.last, self.session = b"", [], 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target,
                                               flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.last += 1
        request = {"id": self.last, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(request).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.said], [], [], 60)[0], f"no answer to {method}"
                got = os.read(self.said, 2**20)
                assert got, "the browser is gone"
                self.buffer += got
            message, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, width=1200, scheme="light"):
        """Show a page, drawn; returns the milliseconds that it took."""
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 500)
        self.call("Page.navigate", url="about:blank")
        self.events = []
        self.call("Page.navigate", url=path.as_uri())
        for _ in range(600):
            if ready := self.js("document.documentElement?.dataset.ready"):
                self.js("undefined")  # events of the page come before this answer
                assert not [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
                return float(ready)
            time.sleep(0.05)
        raise AssertionError(f"not drawn: {self.events}")

    def point(self, css, n=0, click=True):
        """Move the mouse to the middle of the n-th match, and click."""
        x, y = self.js(f"""(found => {{ found.scrollIntoView({{ block: "center" }});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})(all("{css}")[{n}])""")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased") if click else ("mouseMoved",):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, times=1):
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                          windowsVirtualKeyCode=KEYS[key])

    def bars(self):
        """The rows of "What comes next": (text of its share, whether it is the one that came)."""
        return self.js("""all("#bars .row").map(row => [row.lastChild.textContent,
            row.classList.contains("came")])""")

    def close(self):
        os.close(self.to)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.said)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or os.name == "nt":
        pytest.skip("no Chromium here, or none that obeys a pipe: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def chat_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("look") / "a.html"
    write_page(path, look(tiny(), BYTES, CHAT))
    return path


def fair(logits, temperature, top_k, top_p):
    """What sample draws by, in float64: logits (V,) -> probabilities (V,)."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    order = logits.argsort(descending=True)[:top_k or None]
    p = (logits[order] / temperature).softmax(0)
    p[p.cumsum(0) - p >= top_p - 1e-12 if top_p < 1 else slice(0, 0)] = 0
    return torch.zeros_like(logits).index_put((order,), p / p.sum())


SETTINGS = [(temperature, top_k, top_p) for temperature in (0, 0.05, 0.5, 1, 2)
            for top_k in (0, 1, 3, 10) for top_p in (1, 0.05, 0.5, 0.9)]


@pytest.mark.parametrize("kept", [20, 256])
def test_the_page_draws_by_the_rules_of_sample(browser, oracle, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(pictures_look, "KEPT", kept)
    write_page(tmp_path / "a.html", look(tiny(), BYTES, CHAT))
    browser.open(tmp_path / "a.html")
    beyond = 0
    for t in (0, 7, 12, 19):
        logits = oracle[1][-1, t]
        order = logits.argsort(descending=True)
        got = browser.js(f"{json.dumps(SETTINGS)}.map(s => odds({t}, ...s))")
        for setting, page in zip(SETTINGS, got):
            wanted, p = fair(logits, *setting), torch.tensor(page["p"], dtype=torch.float64)
            close = dict(rtol=1e-4, atol=1e-6)
            if page.get("beyond"):  # then what the page says may be too high, by its smallest
                beyond += 1
                assert kept < 256 and (p >= wanted[order[:kept]] - 1e-6).all()
                close = dict(rtol=1e-4 + float(p[-1]), atol=1e-6)
            torch.testing.assert_close(p, wanted[order[:kept]], **close)
            if page["came"] is not None:
                torch.testing.assert_close(float(page["came"]), float(wanted[CHAT[t + 1]]), **close)
    assert bool(beyond) == (kept == 20)


def test_fair_is_what_sample_draws_by(oracle, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "multinomial",
                        lambda p, *_, **__: seen.append(p) or torch.tensor([0]))
    for temperature, top_k, top_p in SETTINGS:
        logits = oracle[1][-1, 7].float()
        if temperature:
            sample(logits, [], None, temperature=temperature, top_k=top_k, top_p=top_p)
            drawn = torch.zeros(260)
            drawn[:len(seen[-1])] = seen[-1] / seen[-1].sum()
            wanted = fair(logits.double(), temperature, top_k, top_p)
            torch.testing.assert_close(drawn.sort().values, wanted.float().sort().values,
                                       rtol=1e-3, atol=1e-5)


def shown(p):
    number = "< 0.1" if 0 < p < 0.001 else "> 99.9" if 0.999 < p < 1 else f"{100 * p:.1f}"
    return f"{number} %".replace(" ", "\u00a0")


def test_a_reader_clicks_and_moves_sliders_and_reads_the_models_numbers(browser, oracle, chat_page):
    attentions, levels = oracle
    browser.open(chat_page)
    t = 12  # the page opens at the space behind "Oh"
    assert browser.js("state.token") == t
    assert "the model said m" in browser.js("$('#story').innerText")

    def check(t, temperature, top_k, top_p):
        p = fair(levels[-1, t], temperature, top_k, top_p)
        best, after = levels[-1, t].topk(10).indices.tolist(), CHAT[t + 1]
        wanted = [(i, p[i]) for i in best] + ([] if after in best else [(after, p[after])])
        assert browser.bars() == [[shown(float(share)), i == after] for i, share in wanted]

    check(t, 1, 0, 1)
    browser.point("#pieces label", 14)
    check(14, 1, 0, 1)
    assert browser.js("all('#looks input')[14].checked")  # all sections are about it
    browser.js("$('[name=temperature]').focus()")
    browser.press("ArrowLeft", 10)
    assert browser.js("$('[name=temperature]').ariaValueText") == "0.5"
    check(14, 0.5, 0, 1)
    browser.js("$('[name=top_k]').focus()")
    browser.press("ArrowLeft", 17)
    check(14, 0.5, 3, 1)
    browser.js("$('[name=top_p]').focus()")
    browser.press("ArrowLeft", 11)
    assert browser.js("state.top_p") == 0.5
    check(14, 0.5, 3, 0.5)
    browser.point("#pieces label", 20)  # the last token, after which nothing came
    assert "nothing came" in browser.js("$('#story').innerText")
    assert not any(came for _, came in browser.bars())

    browser.point("#pieces label", 14)
    for layer in range(4):
        rows = browser.js(f"[...all('#lens .row')[{layer}].children].map(x => x.textContent)")
        p = levels[layer, 14].softmax(0)
        for cell, share in zip(rows[:3], p.topk(3).values):
            assert cell.endswith(" " + shown(float(share)))
        assert rows[-1] == shown(float(p[CHAT[15]]))

    browser.point("#heads label", 1 * 3 + 2)  # layer 2, head 2; the mean over heads comes first
    assert browser.js("[state.layer, state.head]") == [1, 2]
    weights = attentions[1, 1, 14, :15]
    told = re.findall(r"([\d.]+)\u00a0%", browser.js("$('#where').innerText"))
    assert [float(x) for x in told] == pytest.approx(
        (100 * weights.sort(descending=True).values[:5]).tolist(), abs=0.3)  # they are in 255ths
    drawn = [float(w) for w in weights[:14] if round(float(w) * 255) / 255 >= 0.01]
    assert browser.js("$('svg').children.length") == len(drawn)
    width = browser.js("+$('svg').children[0].getAttribute('stroke-width')")
    assert width == pytest.approx(1 + 8 * drawn[0], abs=0.03)
    assert browser.js("all('#looks .masked').length") == len(CHAT) - 15
    browser.point("#looks label", 3, click=False)  # lines from another, while one points at it
    assert browser.js("all('#looks .masked').length") == len(CHAT) - 4
    assert browser.js("state.token") == 14
    browser.point("#heads label", 3)
    told = browser.js("page.weights[1][0].map(row => [...row])")
    torch.testing.assert_close(torch.tensor(told) / 255, attentions[1].mean(0).float(),
                               rtol=0, atol=0.003)


def test_a_matrix_is_dark_where_the_weight_is_and_hatched_where_masked(browser, oracle, chat_page):
    browser.open(chat_page)
    browser.point("#heads label", 1)
    scale = -(-700 // len(CHAT))
    pixels = browser.js(f"""(pen => ids.map((_, i) => ids.map((_, j) => [...pen.getImageData(
        j * {scale} + 4, i * {scale} + 4, 1, 1).data])))($("#matrix canvas").getContext("2d"))""")
    for i, row in enumerate(pixels):
        for j, (red, _, blue, alpha) in enumerate(row):
            if j > i:
                assert abs(red - blue) < 8 and alpha in (0x20, 0x60)
            else:
                assert abs((alpha / 255)**2 - float(oracle[0][0, 0, i, j])) < 0.01


def test_arrow_keys_choose_tokens_and_heads_and_tab_goes_on(browser, chat_page):
    browser.open(chat_page)
    browser.press("ArrowRight")
    browser.press("ArrowLeft", 3)
    assert browser.js("state.token") == 10
    browser.press("Tab")
    assert browser.js("document.activeElement.name") == "temperature"
    browser.press("Tab", 3)
    before = browser.js("state.layer * 3 + state.head")
    browser.press("ArrowRight")
    assert browser.js("document.activeElement.name") == "heads"
    assert browser.js("state.layer * 3 + state.head") == (before + 1) % 9


EVIL = ["<script>window.ran = 1</script>", "</script>", "<!--<script>", "]]>", "&lt;b&gt;",
        "${window.ran=1}", "<img src=x onerror=window.ran=1>", "\u2028", "\u2029", "\u202egnp.exe",
        "\x00\x01", "\x1b[31m", "DATA", "\"'\\", "a\nb", "\ufeff", "naïve 👋"]


def test_text_shows_and_never_runs(browser, tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in EVIL]
    enc = build("evil", r"[\s\S]", tokens)
    ids = [special_ids(enc)[0], *range(256, 256 + len(EVIL)), 0xe2]
    write_page(tmp_path / "a.html", look(tiny(enc.n_vocab), enc, ids))
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "\u2028" not in text
    browser.open(tmp_path / "a.html")
    assert browser.js("page.ids.slice(1, -1).map(id => page.texts[id])") == EVIL
    chips = browser.js("all('#pieces label').map(chip => chip.innerText)")
    for token, chip in zip(EVIL[:7], chips[1:]):
        assert chip == token.replace(" ", "·")
    assert chips[8:11] == ["[U+2028]", "[U+2029]", "[U+202E]gnp.exe"] and chips[11] == "[U+0][U+1]"
    assert chips[-1] == "<e2>" and chips[15] == "a↵b" and chips[17] == "naïve·👋"
    for t in range(len(ids)):
        browser.js(f"choose({{ token: {t} }})")
    assert browser.js("window.ran") is None and browser.js("document.scripts.length") == 2
    assert not browser.js("all('img').length")


def test_a_page_asks_for_nothing_else(browser, chat_page):
    browser.open(chat_page)
    asked = {e["params"]["request"]["url"] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"}
    assert asked == {chat_page.as_uri()}


def luminance(colour):
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055)**2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_can_be_read_in_both_schemes_and_on_a_phone(browser, chat_page, scheme, width):
    browser.open(chat_page, width, scheme)
    names = ["card", "paper", "ink", "soft", "green", "blue", "purple"]
    colours = browser.js(f"""{names}.map(name => getComputedStyle(document.documentElement)
        .getPropertyValue("--" + name).trim())""")
    light = {name: luminance(colour) for name, colour in zip(names, colours)}
    assert (light["card"] < 0.1) == (scheme == "dark")
    for name in names[2:]:
        for ground in names[:2]:
            low, high = sorted([light[name], light[ground]])
            assert (high + 0.05) / (low + 0.05) > 4.5, (name, ground)  # WCAG 2, AA
    sizes = browser.js("all('body *').map(x => parseFloat(getComputedStyle(x).fontSize))")
    assert min(sizes) >= 12
    assert browser.js("document.documentElement.scrollWidth") <= width


def test_a_page_prints_to_one_page(browser, chat_page):
    browser.open(chat_page)
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27,
                                        paperHeight=11.69)["data"])
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    assert browser.js("document.body.style.cssText") == ""


def test_gpt2s_heads_are_drawn_in_seconds(browser, tmp_path):
    ids = torch.randint(256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny(block_size=256, n_layer=12, n_head=12, n_embd=48)
    write_page(tmp_path / "a.html", look(model, BYTES, ids, start=100))
    assert browser.open(tmp_path / "a.html", 390) < 10_000  # ms; a tenth where nothing else runs
    assert browser.js("document.documentElement.scrollWidth") <= 390
    assert browser.js("all('#heads canvas').length") == 12 * 13
