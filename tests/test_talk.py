"""A conversation of chat.py with tiny models of random weights: its cache, its border, its commands. They say
noise, in double precision, so that no rounding decides between two tokens; the oracles need no cache."""
import copy
import dataclasses
import io
import json
import random
import re
import sys
import unicodedata

import pytest
import torch

import chat
from data.conversation import read_conversations
from data.tokenizer import SPLIT_PATTERN, get_tokenizer
from model import GPT, GPTConfig

BYTES = get_tokenizer("bytes")
# "aaa" is one id and so is "the"; random weights say such texts in other ids than the tokenizer would.
PAIRS = get_tokenizer({"pattern": SPLIT_PATTERN, "merges": [[97, 97], [256, 97], [116, 104], [258, 101]]})
ROLES = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
GREEDY = chat.Settings(temperature=0, max_new_tokens=12)
SEEDED = chat.Settings(temperature=1.5, top_k=0, max_new_tokens=12, seed=3)


def special(enc):
    return [enc.n_vocab - 4 + i for i in range(4)]  # the last ids, in the order of ROLES


def noise(block_size=64, seed=0, enc=BYTES, **changes):
    """A model that says random things, at temperature 0 too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=enc.n_vocab, block_size=block_size, n_layer=2, n_head=2,
                                    n_embd=16), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    return model.double().eval()


def new_talk(block_size=64, turns=50, seed=0, enc=BYTES):
    return chat.Talk(noise(block_size, seed, enc), enc, turns)


def ids(text, enc=BYTES):
    return enc.encode_ordinary(text)


def say(talk, text, s=GREEDY):
    """Say something and return the ids of the reply."""
    chat.say(talk, ids(text, talk.enc), s, True)
    return talk.history[-1][1]


def one_by_one(history):
    """The messages of a talk as (role, ids) pairs."""
    return [pair for asked, said in history for pair in (("user", asked), ("assistant", said))]


def framed(said, enc):
    """The chat format by hand: what the model reads before it answers the last of (role, ids) pairs."""
    start, user, assistant, end = special(enc)
    read = [start]
    for role, text in said:
        read += [user if role == "user" else assistant, *text, end]
    return [*read, assistant]


def prompt_by_hand(said, enc, turns, block_size, longest):
    """What is read of a chat: the last `turns` messages of the person's, of those the whole turns that fit,
    or of the last message its end."""
    room = min(longest, block_size // 4)
    last = 2 * turns - 1
    views = [framed(said[k:], enc) for k in range(len(said)) if len(said) - k <= last and k % 2 == 0]
    fitting = [view for view in views if len(view) <= block_size - room]
    if fitting:
        return fitting[0]
    role, text = said[-1]
    return framed([(role, text[len(text) - (block_size - room - 4):])], enc)


@torch.no_grad()
def greedy_by_hand(model, prompt, longest, stops):
    """The likeliest token again and again, each time computed anew, until the context is full."""
    read = list(prompt)
    for _ in range(min(longest, model.config.block_size - len(prompt) + 1)):
        likeliest = int(model(torch.tensor([read]))[0, -1].argmax())
        if likeliest in stops:
            break
        read.append(likeliest)
    return read[len(prompt):]


def count_reads(talk, monkeypatch):
    """How many positions the model computes, call by call, from now on."""
    reads, hidden = [], talk.model.hidden
    monkeypatch.setattr(talk.model, "hidden", lambda idx, *rest, **more: reads.append(idx.shape[1]) or
                        hidden(idx, *rest, **more))
    return reads


# The cache

@pytest.mark.parametrize("enc", [BYTES, PAIRS], ids=["bytes", "pairs"])
@pytest.mark.parametrize("s", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_new_turn_reads_only_its_own_tokens(enc, s, monkeypatch, capsys):
    canonical = []
    for seed in range(4):
        talk, unread = new_talk(500, seed=seed, enc=enc), None
        reads = count_reads(talk, monkeypatch)
        for text in ("aaa, the first", "", "aa 🙂"):
            reads.clear()
            said = say(talk, text, s)
            if unread is not None:  # <|end|> of the reply, <|user|>, text, <|end|>, <|assistant|>
                assert reads[0] == unread + len(ids(text, enc)) + 4
            assert reads[1:] == [1] * (len(reads) - 1)
            unread = talk.last["stop"] == "max_new_tokens"  # then the last token said was not read
            canonical.append(ids(enc.decode(said), enc) == said)
    assert not all(canonical), "some replies must be such that encoding their text gives other ids"


@pytest.mark.parametrize("enc", [BYTES, PAIRS], ids=["bytes", "pairs"])
@pytest.mark.parametrize("block_size, turns", [(32, 50), (48, 50), (64, 3), (64, 1), (61, 2)])
def test_greedy_replies_with_a_kept_cache_are_those_computed_anew_across_the_border(
        enc, block_size, turns, capsys):
    talk, notes = new_talk(block_size, turns, 1, enc), []
    texts = ("Hm?", "the aaa", "", "x" * 90, "🙂🙂", "a", "b", "and so on, and on", "c")
    for text in texts:
        said = [*one_by_one(talk.history), ("user", ids(text, enc))]
        prompt = prompt_by_hand(said, enc, turns, block_size, GREEDY.max_new_tokens)
        wanted = greedy_by_hand(talk.model, prompt, GREEDY.max_new_tokens, special(enc))
        assert say(talk, text) == wanted
        assert talk.last["prompt_tokens"] == len(prompt)
        notes.append(capsys.readouterr().err)
    assert "too long" in notes[3] and len(talk.history) == len(texts)
    assert turns < 3 or any("oldest" in note for note in notes)


@pytest.mark.parametrize("block_size", [32, 64, 500])
def test_seeded_replies_with_a_kept_cache_are_those_of_a_fresh_one(block_size, capsys):
    kept = new_talk(block_size)
    for text in ("Hm?", "and", "so on", "x" * 70, "", "🙂🙂", "end"):
        fresh = chat.Talk(kept.model, BYTES, kept.turns)
        fresh.history = copy.deepcopy(kept.history)
        assert say(kept, text, SEEDED) == say(fresh, text, SEEDED)
        assert kept.history == fresh.history


# The border

def border_talk(monkeypatch, said=b"x" * 500, block_size=64, turns=50):
    """A talk whose model says chosen bytes for ever, and a list of the prompts it gets."""
    talk, prompts = new_talk(block_size, turns), []

    def generate(prompt, longest, **knobs):
        prompts.append(list(prompt))
        yield from said[:max(longest, 0)]
    monkeypatch.setattr(talk.model, "generate", generate)
    return talk, prompts


def test_whole_oldest_turns_are_left_out_room_is_kept_and_a_note_says_so(monkeypatch, capsys):
    talk, prompts = border_talk(monkeypatch, b"yes")  # a turn is 3 + 3 and 4 of frame: 10 of 64 - 16 = 48
    notes = []
    for text in ("one", "two", "six", "ten", "won", "too"):
        say(talk, text, chat.Settings(max_new_tokens=200))
        notes.append(capsys.readouterr().err)
    assert [len(prompt) for prompt in prompts] == [7, 17, 27, 37, 47, 47]
    seen = [part for text in ("two", "six", "ten", "won")
            for part in (("user", ids(text)), ("assistant", ids("yes")))]
    assert prompts[5] == framed([*seen, ("user", ids("too"))], BYTES)
    assert notes[:5] == [""] * 5 and notes[5].count("\n") == 1 and "oldest turns are left out" in notes[5]
    assert len(talk.history) == 6, "what the model does not see is still said"


def test_a_note_is_grey_only_in_a_terminal_and_without_no_color(monkeypatch, capsys):
    for tty, variables, shown in [(True, {}, "\x1b[90mso\x1b[0m\n"), (True, {"NO_COLOR": "1"}, "so\n"),
                                  (False, {}, "so\n")]:
        monkeypatch.delenv("NO_COLOR", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stderr, "isatty", lambda tty=tty: tty)
        chat.note("so")
        assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize("block_size", range(1, 13))
@pytest.mark.parametrize("text", ["", "a", "a" * 40])
def test_a_context_of_a_few_tokens_is_no_reason_to_fail(block_size, text, capsys):
    talk = new_talk(block_size)
    for s in (GREEDY, SEEDED, chat.Settings(max_new_tokens=1)):
        say(talk, text, s)
    assert len(talk.history) == 3


@pytest.mark.parametrize("longest, message, said, stop", [
    (200, 10, 64 - 14 + 1, "context"), (51, 10, 51, "max_new_tokens"), (50, 10, 50, "max_new_tokens"),
    (200, 300, 17, "context"), (5, 300, 5, "max_new_tokens")])  # clipped, such that a quarter, or 5, is free
def test_a_reply_that_reaches_the_border_says_why_it_ended(longest, message, said, stop, monkeypatch, capsys):
    talk, _ = border_talk(monkeypatch)
    say(talk, "?" * message, chat.Settings(max_new_tokens=longest))
    assert (talk.last["tokens"], talk.last["stop"]) == (said, stop)
    assert talk.last["text"] == "x" * said


def test_a_reply_that_ends_by_itself_says_so(monkeypatch, capsys):
    talk, _ = border_talk(monkeypatch, b"Well.")
    say(talk, "?", chat.Settings(max_new_tokens=50))
    assert (talk.last["text"], talk.last["tokens"], talk.last["stop"]) == ("Well.", 5, "end")
    assert talk.last["prompt_tokens"] == 5


# Ctrl-C

def test_after_ctrl_c_at_any_moment_the_next_reply_is_that_of_a_fresh_talk(capsys):
    model, calls = noise(200), []

    def stopped_at(n):
        """A talk of two messages, the second stopped as the model computes for the n-th time."""
        talk = chat.Talk(model, BYTES, 50)
        say(talk, "Hm?")

        def interrupt(*_):  # between two layers: the first has cached the tokens, the second has not
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
        calls.clear()
        hook = model.h[1].register_forward_pre_hook(interrupt)
        say(talk, "And so on")
        hook.remove()
        return talk

    whole = stopped_at(0).history[-1][1]
    computed = len(calls)
    assert computed > 5
    for n in range(1, computed + 1):
        talk = stopped_at(n)
        assert [len(turn) for turn in talk.history] == [2, 2]
        assert talk.history[-1][1] == whole[:n - 1] and talk.last["stop"] == "interrupted"
        fresh = chat.Talk(model, BYTES, 50)
        fresh.history = copy.deepcopy(talk.history)
        assert say(talk, "So?") == say(fresh, "So?")


def test_ctrl_c_before_the_model_is_asked_leaves_whole_turns(monkeypatch, capsys):
    talk, assemble = new_talk(), chat.chats.assemble
    say(talk, "Hm?")
    before = copy.deepcopy(talk.history)

    def interrupt(*_):
        monkeypatch.setattr(chat.chats, "assemble", assemble)
        raise KeyboardInterrupt
    monkeypatch.setattr(chat.chats, "assemble", interrupt)
    chat.say(talk, ids("a very long message"), GREEDY, True)
    assert talk.history == [*before, (ids("a very long message"), [])]  # to /retry
    say(talk, "So?")
    assert all(len(turn) == 2 for turn in talk.history) and talk.history[-1][0] == ids("So?")


# Any message at all

def any_message(rng, n):
    """Text as people, programs and cats type it; of 80 one is huge."""
    kind = n % 8
    length = 100_000 if n % 80 == 40 else rng.choice((0, 1, 5, 30, 100))
    anything = [chr(rng.randrange(0x110000)) for _ in range(length)]  # surrogates too
    return {1: "".join(chr(rng.randrange(32)) for _ in range(length)),
            2: "".join(rng.choice(ROLES) for _ in range(length // 5)),
            3: "".join(rng.choice((*ROLES, "<|", "|>", *anything[:3])) for _ in range(length // 3)),
            4: "👩\u200d💻é\u0301" * (length // 5), 5: " \t\r\n" * (length // 4), 6: "a" * length,
            7: "/help " * (length // 5)}.get(kind, "".join(anything))


@pytest.mark.parametrize("block_size, turns, enc", [(32, 50, BYTES), (64, 3, PAIRS), (48, 1, BYTES)])
def test_hundreds_of_random_messages_do_no_harm(block_size, turns, enc, monkeypatch, capsys):
    rng, talk = random.Random(block_size), new_talk(block_size, turns, enc=enc)
    asked, generate = [], talk.model.generate

    def noted(prompt, *rest, **knobs):
        asked[:] = [list(prompt), []]
        for i in generate(prompt, *rest, **knobs):
            asked[1].append(i)
            yield i
    monkeypatch.setattr(talk.model, "generate", noted)
    start, user, assistant, end = special(enc)
    for n in range(120):
        text = any_message(rng, n)
        s = chat.Settings(temperature=rng.choice((0, 1, 9)), max_new_tokens=8, seed=n)
        chat.say(talk, ids(text, enc), s, False)
        prompt, said = asked
        roles = [i for i in prompt if i >= start]  # of the frame, and none that was typed
        turns_read = (len(roles) - 4) // 4
        assert roles == [start, *[user, end, assistant, end] * turns_read, user, end, assistant]
        assert 0 <= turns_read < turns and len(prompt) + len(said) <= block_size + 1
        last = prompt[len(prompt) - 1 - prompt[::-1].index(user) + 1:-2]
        typed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
        assert typed.endswith(enc.decode_bytes(last)) and (len(last) > 0 or not text or block_size < 8)
        read = len(ids(text, enc)) + 4 <= block_size - 8
        assert (enc.decode_bytes(last) == typed) == (read or typed == b"")
        # What is printed is what the model said, with a replacement character only for broken bytes of it.
        assert capsys.readouterr().out == enc.decode_bytes(said).decode("utf-8", "replace") + "\n"
        assert not set(said) & {start, user, assistant, end}
        # What is kept is what could be read.
        kept, replied = talk.history[-1]
        assert len(kept) <= block_size and len(replied) <= 8
        assert len(talk.cache.ids) <= block_size
    assert len(talk.history) == 120
    assert all(layer.k.shape == (1, 2, block_size, 8) for layer in talk.cache.layers)


CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))


def test_control_characters_of_a_reply_are_shown_in_a_terminal_and_passed_on_in_a_pipe(monkeypatch, capsys):
    said = f"a\x1b[31m{CONTROLS}é🙂\u2028".encode()
    talk, _ = border_talk(monkeypatch, said, 500)
    say(talk, "?")
    assert capsys.readouterr().out.encode() == said[:GREEDY.max_new_tokens] + b"\n"
    whole = chat.Settings(max_new_tokens=len(said))
    say(talk, "?", whole)
    assert capsys.readouterr().out.encode() == said + b"\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say(talk, "?", whole)
    shown = capsys.readouterr().out
    assert shown.startswith("a␛[31m␀␁") and shown.endswith("é🙂\u2028\n")
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert len(shown) == len(said.decode()) + 1


def test_each_character_is_passed_on_before_the_model_goes_on(monkeypatch):
    written, talk = io.BytesIO(), new_talk()

    def generate(*_, **__):
        for n, i in enumerate("hé!".encode()):
            assert written.getvalue() == (b"", b"h", b"h", "hé".encode())[n]
            yield i
    monkeypatch.setattr(talk.model, "generate", generate)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    say(talk, "?")
    assert written.getvalue() == "hé!\n".encode()


# Commands

def obey(talk, line, s=GREEDY):
    return chat.command(talk, s, line)


def read_ids(shown):
    """The numbers that /tokens shows, where there is no colour."""
    return [int(i) for i in re.findall(r"\[(\d+)\] ", shown)]


def test_help_lists_every_command(capsys):
    assert obey(new_talk(), "/help") == GREEDY
    listed = re.findall(r"^(/\w+)", capsys.readouterr().err, re.MULTILINE)
    assert {"/help", "/reset", "/undo", "/retry", "/set", "/save", "/load", "/tokens", "/quit"} <= {*listed}
    assert chat.COMMANDS == listed


def test_quit_ends_it_and_reset_forgets(capsys):
    talk = new_talk()
    first = say(talk, "Hm?")
    assert obey(talk, "/quit") is None
    say(talk, "and more")
    assert obey(talk, "/reset") == GREEDY and talk.history == []
    assert say(talk, "Hm?") == first and len(talk.history) == 1


def test_undo_takes_the_last_turn_back(capsys):
    talk = new_talk()
    say(talk, "Hm?")
    before = copy.deepcopy(talk.history)
    second = say(talk, "and more")
    obey(talk, "/undo")
    assert talk.history == before
    assert say(talk, "and more") == second
    obey(talk, "/undo  ")
    obey(talk, "/undo")
    assert talk.history == []


@pytest.mark.parametrize("turns", [50, 0])
def test_retry_says_another_reply_to_the_same_message(turns, capsys):
    talk = new_talk(turns=turns)
    say(talk, "Hm?", SEEDED)
    first = say(talk, "and more", SEEDED)
    replies = set()
    for _ in range(3):
        obey(talk, "/retry", SEEDED)
        *before, (text, again) = talk.history
        assert (text, len(before)) == (ids("and more"), 1 if turns else 0)
        replies.add(tuple(again))
    assert len(replies | {tuple(first)}) > 2, "the seed would say the same again"


def test_set_changes_several_settings_and_shows_all_that_can_be(capsys):
    s = obey(new_talk(), "/set temperature=0.7 --top_k=1e2  seed=5 turns=2")
    assert s == dataclasses.replace(GREEDY, temperature=0.7, top_k=100, seed=5, turns=2)
    assert GREEDY.temperature == 0 and GREEDY.top_k == 50, "the earlier ones are as they were"
    shown = dict(pair.split("=") for pair in capsys.readouterr().err.split())
    assert shown == {"temperature": "0.7", "top_k": "100", "top_p": "1.0", "repetition_penalty": "1.0",
                     "max_new_tokens": "12", "seed": "5", "turns": "2"}
    assert obey(new_talk(), "/set", s) == s
    assert obey(new_talk(), "/set seed=None", s).seed is None


def test_set_turns_is_how_many_messages_are_read(monkeypatch, capsys):
    talk, prompts = border_talk(monkeypatch, b"yes", 200)
    s = GREEDY
    for text, turns in (("one", 1), ("two", 3), ("six", 3), ("ten", 2)):
        s = obey(talk, f"/set turns={turns}", s)
        say(talk, text, s)
    assert [prompt.count(special(BYTES)[1]) for prompt in prompts] == [1, 2, 3, 2]


def test_set_turns_0_goes_back_to_how_it_was_trained(capsys):
    talk = new_talk(turns=4)
    obey(talk, "/set turns=0", obey(talk, "/set turns=2"))
    assert talk.turns == 4


def test_a_model_of_text_stays_one_whatever_is_set(monkeypatch, capsys):
    talk, prompts = border_talk(monkeypatch, b"d", turns=0)
    say(talk, "abc", obey(talk, "/set turns=3"))
    assert prompts == [ids("abc")]


def test_saved_chats_are_read_by_the_reader_of_instruction_files(tmp_path, capsys):
    talk, path = new_talk(), tmp_path / "deep" / "chat.jsonl"
    talk.history = [(ids("hé\n🙂\u2028<|end|>"), ids('"a"\\')), (ids(""), [0xff, 0x41])]
    obey(talk, f"/save  {path} ")
    assert capsys.readouterr().err == f"{path}: saved\n"
    assert read_conversations(path) == [([
        {"role": "user", "content": "hé\n🙂\u2028<|end|>"}, {"role": "assistant", "content": '"a"\\'},
        {"role": "user", "content": ""}, {"role": "assistant", "content": "\ufffdA"}], "")]
    assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("enc", [BYTES, PAIRS], ids=["bytes", "pairs"])
def test_a_loaded_chat_goes_on_as_the_saved_one(enc, tmp_path, capsys):
    talk, other = new_talk(enc=enc), new_talk(enc=enc)
    talk.history = [(ids("the aaa", enc), ids("hé 🙂\n", enc)), (ids("<|user|>", enc), ids("", enc))]
    wanted = copy.deepcopy(talk.history)
    obey(talk, f"/save {tmp_path / 'chat.jsonl'}")
    say(other, "something else")
    assert obey(other, f"/load {tmp_path / 'chat.jsonl'}") == GREEDY
    assert other.history == wanted
    assert say(other, "So?") == say(talk, "So?")


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "category": "x"},
    {"messages": [{"role": "user", "content": "a", "name": "Al"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
    {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
])
def test_a_foreign_row_is_loaded_and_never_saved_over(tmp_path, capsys, row):
    talk, path = new_talk(), tmp_path / "row.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    obey(talk, f"/load {path}")
    assert talk.history[0][0][-1:] == ids("a") and talk.history[0][1] == ids("b")
    with pytest.raises(ValueError, match="is there already, and holds something else"):
        obey(talk, f"/save {path}")
    assert path.read_text(encoding="utf-8") == json.dumps(row)


def test_rows_of_any_layout_are_scored(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"conversations": [{"from": "human", "value": "c"}, '
                    '{"from": "gpt", "value": "d"}], "category": "x"}\n', encoding="utf-8")
    rows = chat.rows_to_score(path, 0)["rows"]
    assert [([m["content"] for m in said], category) for said, category in rows] == [
        (["a", "b"], ""), (["c", "d"], "x")]
    path.write_text('{"prompt": "a", "completion": "b", "label": false}', encoding="utf-8")
    with pytest.raises(ValueError, match="row 1: 'label' is false") as caught:
        chat.rows_to_score(path, 0)
    assert "--bad_rows" not in str(caught.value)  # a flag of another script


def test_of_a_file_of_several_chats_the_last_is_loaded(tmp_path, capsys):
    rows = [{"instruction": q, "output": "x"} for q in ("first", "last")]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    talk = new_talk()
    obey(talk, f"/load {tmp_path / 'rows.json'}")
    assert talk.history == [(ids("last"), ids("x"))]


def test_a_later_state_of_a_chat_replaces_an_earlier_one_and_nothing_else(tmp_path, capsys):
    talk, path = new_talk(), tmp_path / "chat.jsonl"
    for text in ("one", "two"):
        say(talk, text)
        obey(talk, f"/save {path}")
    later = path.read_bytes()
    assert len(read_conversations(path)[0][0]) == 4
    other = new_talk(seed=5)
    say(other, "one")
    obey(talk, "/undo")
    for someone in (other, talk):  # another chat, and less of this one
        with pytest.raises(ValueError, match="is there already"):
            obey(someone, f"/save {path}")
    two, notes, empty = tmp_path / "two.jsonl", tmp_path / "notes.txt", tmp_path / "empty"
    two.write_bytes(later * 2)
    notes.write_text("my notes", encoding="utf-8")
    empty.touch()
    say(talk, "two")
    for kept in (two, notes, empty):
        before = kept.read_bytes()
        with pytest.raises(ValueError, match=re.escape(str(kept))):
            obey(talk, f"/save {kept}")
        assert kept.read_bytes() == before
    obey(talk, f"/save {path}")
    assert path.read_bytes() == later


@pytest.mark.parametrize("enc", [BYTES, PAIRS], ids=["bytes", "pairs"])
@pytest.mark.parametrize("block_size, turns", [(200, 2), (64, 50)])
def test_tokens_shows_exactly_the_ids_that_were_read_and_said(block_size, turns, enc, capsys):
    talk = new_talk(block_size, turns, enc=enc)
    for text in ("the aaa", "🙂", "last", "x" * 70, "and on"):
        said = say(talk, text)
        read = one_by_one(talk.history)[:-1]
        prompt = prompt_by_hand(read, enc, turns, block_size, GREEDY.max_new_tokens)
        capsys.readouterr()
        obey(talk, "/tokens")
        out, err = capsys.readouterr()
        assert out == "" and read_ids(err) == [*prompt, *said, special(enc)[3]]
        assert all(role in err for role in ROLES)


def test_tokens_in_a_terminal_are_coloured_by_role_and_obey_nothing(monkeypatch, capsys):
    talk = new_talk()
    talk.history = [(ids("\x1b a"), ids("\x07\n"))]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    obey(talk, "/tokens")
    err = capsys.readouterr().err
    found = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m\x1b\[90m\[(\d+)\]\x1b\[0m", err)
    assert found == [("35", "<|endoftext|>", "256"), ("35", "<|user|>", "257"), ("36", "␛", "27"),
                     ("36", "·", "32"), ("36", "a", "97"), ("35", "<|end|>", "259"),
                     ("35", "<|assistant|>", "258"), ("32", "␇", "7"), ("32", "↵", "10"),
                     ("35", "<|end|>", "259")]
    assert not set(re.sub(r"\x1b\[\d+m", "", err)) & set(CONTROLS) - {"\n"}


@pytest.mark.parametrize("way", ["undo", "load", "set"])
def test_tokens_of_a_chat_that_has_become_shorter_are_all_its_ids(way, tmp_path, monkeypatch, capsys):
    talk, _ = border_talk(monkeypatch, b"yes", turns=3)
    say(talk, "Hm?")
    obey(talk, f"/save {tmp_path / 'chat.jsonl'}")
    say(talk, "and more")
    before = copy.deepcopy(talk.history)
    say(talk, "x" * 30)  # leaves out both turns before
    if way == "undo":
        obey(talk, "/undo")
    elif way == "load":
        obey(talk, f"/load {tmp_path / 'chat.jsonl'}")
    else:
        obey(talk, "/set turns=1")
    capsys.readouterr()
    obey(talk, "/tokens")
    wanted = {"undo": before, "load": before[:1], "set": talk.history[-1:]}[way]
    assert read_ids(capsys.readouterr().err) == framed(one_by_one(wanted), BYTES)[:-1]


BAD = ["/set temperature=-1", "/set temperature=0.3 top_k=-1", "/set top_p=0", "/set max_new_tokens=0",
       "/set repetition_penalty=0.5", "/set seed=-1", "/set turns=-1", "/set temperature=hot",
       "/set temperature", "/set =", "/set =1", "/set --help", "/set dtype=bfloat16", "/set prompt=x",
       "/set checkpoint=x.pt", "/set json=True", "/set config/x.py", "/save", "/load",
       "/load FOLDER/no.jsonl", "/load FOLDER", "/save FOLDER", "/load FOLDER/notes.txt",
       "/load FOLDER/row.json", "/load FOLDER/no_rows.json", "/load FOLDER/deep.json",
       "/load ~no_such_user/x", "/save FOLDER/notes.txt/x",
       "/save FOLDER/" + "x" * 5000, "/load a\0b", "/resett", "/frobnicate", "/", "/HELP", "/quit?"]


@pytest.mark.parametrize("line", BAD, ids=[line[:40].replace("\0", "NUL") for line in BAD])
def test_an_error_of_a_command_is_a_line_and_changes_nothing(line, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("my notes", encoding="utf-8")
    (tmp_path / "row.json").write_text('[{"prompt": "a"}]', encoding="utf-8")
    (tmp_path / "no_rows.json").write_text("[]", encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    talk = new_talk()
    say(talk, "Hm?")
    s, before, files = copy.copy(GREEDY), copy.deepcopy(talk.history), sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        obey(talk, line.replace("FOLDER", str(tmp_path)), s)
    assert str(error.value) and "\n" not in str(error.value)
    assert talk.history == before and talk.turns == 50 and s == GREEDY and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("name", ["/undo", "/retry", "/tokens", "/save x.jsonl"])
def test_before_anything_was_said_there_is_nothing_to_take_back_or_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nothing was said yet"):
        obey(new_talk(), name)
    assert not list(tmp_path.iterdir())


def test_a_text_model_loads_no_chat(tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    talk = new_talk(turns=0)
    with pytest.raises(ValueError, match="no turns"):
        obey(talk, f"/load {tmp_path / 'rows.json'}")
    assert talk.history == []


@pytest.mark.parametrize("typed, meant", [("/rest", "/reset"), ("/udno", "/undo"), ("/tokes", "/tokens"),
                                          ("/frobnicate", "/help lists"), ("/sav x", "/save")])
def test_of_an_unknown_command_the_nearest_is_named(typed, meant):
    with pytest.raises(ValueError, match=re.escape(typed.split()[0]) + ".*" + meant):
        obey(new_talk(), typed)


@pytest.mark.parametrize("line", ["/tokens", "a long message"])
def test_ctrl_c_while_nothing_is_said_yet_keeps_the_chat(line, monkeypatch, capsys):
    talk, _ = border_talk(monkeypatch, b"yes")

    def interrupt(*_):
        monkeypatch.setattr(chat, "token_pieces", lambda *_: [])
        monkeypatch.setattr(talk, "enc", BYTES)
        raise KeyboardInterrupt

    def lines(tty):
        yield "Hm?"
        monkeypatch.setattr(chat, "token_pieces", interrupt)
        monkeypatch.setattr(talk, "enc", copy.copy(BYTES))
        monkeypatch.setattr(talk.enc, "encode_ordinary", interrupt)
        yield line
        yield from ("So?", "/quit")
    monkeypatch.setattr(chat, "read_messages", lines)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    try:
        chat.chat(talk, GREEDY)
    except KeyboardInterrupt:
        pytest.fail("it left the chat")
    assert [bytes(text) for turn in talk.history for text in turn] == [b"Hm?", b"yes", b"So?", b"yes"]


def test_what_only_looks_like_a_command_is_a_message(monkeypatch, capsys):
    talk, prompts = border_talk(monkeypatch, b"yes", 500)
    lines = ["/etc/passwd is what?", "/help", "a /reset", "/set temperature=-1", "//", "/nothing here",
             "/usr/bin", "/quit now", "never read"]
    monkeypatch.setattr(chat, "read_messages", lambda tty: iter(lines))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    chat.chat(talk, GREEDY)
    assert [asked for asked, _ in talk.history] == [*map(ids, (lines[0], lines[2], lines[4], lines[6]))]
    out, err = capsys.readouterr()
    assert out == "yes\n" * 4
    assert all(part in err for part in ("this list", "temperature=-1.0: must be 0 or more", "/nothing"))


@pytest.mark.parametrize("tty", [True, False])
def test_exit_and_quit_are_messages_in_a_pipe_only(tty, monkeypatch, capsys):
    talk = new_talk()
    monkeypatch.setattr(chat, "read_messages", lambda tty: iter(["exit", "quit"]))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: tty, raising=False)
    chat.chat(talk, GREEDY)
    assert len(talk.history) == (0 if tty else 2)
    assert capsys.readouterr().err.count("/quit") == (2 if tty else 0)
