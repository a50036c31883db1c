"""finetune.py on toy chats: what is learned, how gradients add up, epochs, going on, and what goes wrong."""
import contextlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data.export import write_hf_model
from data.tokens import ChatDataset, open_dataset

import config
import data.text
import finetune
import prepare_alpaca
import train
from model import GPT, GPT2_NAMES, GPTConfig, load_checkpoint, model_from_checkpoint, to_gpt2_names
from tests.conftest import POSIX, error_of_script
from tests.test_safety import FORK, ended

REPO = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("neither_drawn_nor_measured")
CPU = torch.device("cpu")
START, USER, ASSISTANT, END = 256, 257, 258, 259  # of the bytes tokenizer
SHAPE = dict(block_size=64, n_layer=1, n_head=2, n_embd=16)
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ROWS = [{"instruction": f"Count {'on and ' * (i % 3)}on from {word}.",
         "output": ", ".join((2 * WORDS)[i:i + 3])}
        for i, word in enumerate(WORDS)]  # each fits into a context of 64, but no two do


def prepare(folder, rows, *flags, tokenizer="bytes"):
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_alpaca.main([f"--source={folder / 'rows.json'}", f"--out_dir={folder}", "--val_fraction=0.25",
                         f"--tokenizer={tokenizer}", *flags])
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with chat/ (9 rows to train on, 3 held out), text/ and base/, a model trained on the text."""
    root = tmp_path_factory.mktemp("finetune")
    prepare(root / "chat", ROWS)
    (root / "words.txt").write_text(" ".join(WORDS) * 12, encoding="utf-8")
    data.text.main([f"--source={root / 'words.txt'}", f"--out_dir={root / 'text'}", "--tokenizer=bytes"])
    train.main([f"--{name}={value}" for name, value in SHAPE.items()] + [
        f"--data_dir={root / 'text'}", f"--out_dir={root / 'base'}", "--batch_size=2", "--max_iters=7",
        "--warmup_iters=0", "--device=cpu"])
    return root


def flags(made, out_dir, **changes):
    knobs = dict(init_from=made / "base" / "best.pt", data_dir=made / "chat", out_dir=out_dir, epochs=2,
                 batch_size=4, learning_rate=1e-3, warmup_iters=2, log_interval=100, device="cpu")
    return [f"--{name}={value}" for name, value in {**knobs, **changes}.items()]


def run(made, out_dir, **changes):
    """Finetune; returns last.pt."""
    finetune.main(flags(made, out_dir, **changes))
    return load_checkpoint(out_dir / "last.pt")


def error_of(monkeypatch, arguments, script=finetune):
    return error_of_script(monkeypatch, script, arguments)


def toy(dataset, **changes):
    """A model whose every number is random, so that a forgotten bias or norm shows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(dataset.vocab_size, **{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def evaluate(model, dataset, split):
    """The mean loss over all of a split."""
    s = finetune.Settings(eval_tokens=10**6)
    return train.evaluate(model, dataset, split, s, CPU, contextlib.nullcontext())


def write_folder(model, folder):
    """The model as a folder of transformers."""
    folder.mkdir()
    write_hf_model(folder, model.config, to_gpt2_names(model))


# What is learned

QUESTION, ANSWER = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "A")))
AGAIN, BYE = ({"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "ok")))
TWO_TURNS = [START, USER, 72, 105, END, ASSISTANT, 65, END, USER, 63, END, ASSISTANT, 111, 107]  # and END
TWO_TARGETS, TWO_WHERE = [65, END, 111, 107, END], [5, 6, 11, 12, 13]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A prepared folder with one conversation of two turns, and the same held out."""
    rows = [{"messages": [QUESTION, ANSWER, AGAIN, BYE]}] * 2
    return prepare(tmp_path_factory.mktemp("hand") / "chat", rows, "--drop_duplicates=False")


def test_of_two_turns_both_answers_and_their_ends_are_the_targets(by_hand):
    ids, targets, where = open_dataset(by_hand, 64, 1).batch("train", 0)
    assert ids.tolist() == [TWO_TURNS]
    assert (targets.tolist(), where.tolist()) == (TWO_TARGETS, TWO_WHERE)


def test_in_a_batch_shorter_rows_are_padded_behind_and_the_padding_is_no_target(tmp_path):
    short = {"messages": [{**QUESTION, "content": "a"}, {**ANSWER, "content": "b"}]}
    long = {"messages": [QUESTION, ANSWER, AGAIN, BYE]}
    folder = prepare(tmp_path / "chat", [short, short, long, long], "--drop_duplicates=False")
    dataset = open_dataset(folder, 64, 1)
    lengths = dataset.lengths["train"].tolist()
    ids, targets, where = dataset.rows("train", np.array([lengths.index(7), lengths.index(15)]))
    assert ids.tolist() == [[START, USER, 97, END, ASSISTANT, 98, END] + 7 * [START], TWO_TURNS]
    assert targets.tolist() == [98, END, *TWO_TARGETS]
    assert where.tolist() == [4, 5, *(14 + t for t in TWO_WHERE)]


def test_the_loss_of_a_known_batch_is_that_of_float64_by_hand(by_hand):
    dataset = open_dataset(by_hand, 64, 1)
    model = toy(dataset)
    with torch.no_grad():
        logits = toy(dataset).double()(torch.tensor([TWO_TURNS]))[0, :, :260].numpy()  # (14, 260)
    assert logits.dtype == np.float64
    losses = [np.log(np.exp(logits[t]).sum()) - logits[t, i] for t, i in zip(TWO_WHERE, TWO_TARGETS)]
    for split in ("train", "val"):
        loss = evaluate(model, dataset, split)
        assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert step_on(model, dataset, [[0]])[0] == pytest.approx(np.mean(losses), rel=1e-6)


def test_both_scripts_measure_a_model_on_chats_alike_and_write_nothing(made, tmp_path, capsys):
    said = []
    for script in (finetune, train):
        capsys.readouterr()
        script.main(["--eval_only=True", f"--init_from={made / 'base' / 'best.pt'}", "--device=cpu",
                     f"--data_dir={made / 'chat'}", f"--out_dir={tmp_path / 'out'}"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "epochs" not in said[0] and not (tmp_path / "out").exists()
    dataset = open_dataset(made / "chat", 64, 8)
    model = model_from_checkpoint(load_checkpoint(made / "base" / "best.pt"))
    for split in ("train", "val"):
        loss = evaluate(model, dataset, split)
        found = re.search(rf"^{split}: loss (\S+)  .*  (\S+) bits per byte", said[0], re.MULTILINE)
        answers = [ids[ids.index(ASSISTANT) + 1:] for ids in dataset.conversations(split)]  # each with its end
        bits = loss / math.log(2) * sum(map(len, answers)) / sum(len(ids) - 1 for ids in answers)
        assert (float(found[1]), float(found[2])) == pytest.approx((loss, bits), abs=1e-4)


# One gradient, however the conversations are dealt out

class Chosen:
    """A dataset whose i-th batch holds the conversations of batches[i], given as their numbers."""

    def __init__(self, dataset, batches):
        self.dataset, self.batches = dataset, batches

    def batch(self, split, index):
        return self.dataset.rows(split, np.array(self.batches[index]))

    def eval_batches(self, split, max_tokens):
        return (self.batch(split, index) for index in range(len(self.batches)))


class Descent:
    """Weights minus learning rate times gradient, in the shape that train_step wants an optimizer; keeps
    the last gradient."""

    def __init__(self, model, rate):
        self.named, self.param_groups = dict(model.named_parameters()), [{"peak_lr": rate}]

    def step(self):
        self.gradient = {name: p.grad.clone() for name, p in self.named.items()}
        for p in self.named.values():
            p.data -= self.param_groups[0]["lr"] * p.grad

    def zero_grad(self, set_to_none):
        for p in self.named.values():
            p.grad = None


def step_on(model, dataset, batches, wrapped=None, step=0, batches_a_step=None):
    """train_step's (loss, norm, how much was read) on chosen batches, and the gradient."""
    descent = Descent(model, rate=0.1)
    s = finetune.Settings(gradient_accumulation=batches_a_step or len(batches), warmup_iters=0, grad_clip=0.0,
                          decay="constant", max_iters=10)
    results = train.train_step(wrapped or model, [descent], Chosen(dataset, batches), step, s, CPU,
                               contextlib.nullcontext())
    return *results, descent.gradient


def test_8_conversations_give_one_gradient_in_one_batch_in_8_and_in_unequal_ones(made):
    dataset = open_dataset(made / "chat", 64, 1)
    targets = [len(dataset.rows("train", np.array([i]))[1]) for i in range(8)]
    assert len(set(targets)) > 3, "equal conversations would hide a wrong weight"
    loss, norm, _, whole = step_on(toy(dataset), dataset, [list(range(8))])
    dealt = ([[i] for i in range(8)], [[7, 2], [5, 1], [4, 0], [3, 6]], [[0], [6, 1, 2, 5, 4], [3, 7]])
    for batches in dealt:
        other_loss, other_norm, _, gradient = step_on(toy(dataset), dataset, batches)
        assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-5)
        for name, expected in whole.items():
            torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6, msg=name)


DEALT = [[0, 1, 2, 3], [4], [5, 6], [7], [8, 0, 1], [2], [3], [4, 5, 6, 7, 8], [1]]  # three steps of three


def three_steps(model, wrapped, dataset):
    """What three steps and an evaluation come to: numbers, and the weights behind them."""
    numbers = [step_on(model, dataset, DEALT, wrapped, step, 3)[:3] for step in range(3)]
    loss = evaluate(wrapped, Chosen(dataset, DEALT[:3]), "train")
    return {"numbers": numbers, "evaluated": loss, "weights": model.state_dict()}


def one_of_two(rank, folder, out):
    """A process of two; the first has two batches of each step, the second has one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(out / "meet").as_uri(), rank=rank, world_size=2)
    try:
        dataset = open_dataset(folder, 64, 1)
        model = toy(dataset)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        torch.save(three_steps(model, wrapped, dataset), out / f"{rank}.pt")
        dist.barrier()  # whoever leaves first would break the other's connection
    finally:
        dist.destroy_process_group()


@POSIX
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_learn_what_one_does_from_unequal_batches(made, tmp_path):
    both = [FORK.Process(target=one_of_two, args=(rank, made / "chat", tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    assert ended(*both) == [0, 0]
    dataset = open_dataset(made / "chat", 64, 1)
    model = toy(dataset)
    alone = three_steps(model, model, dataset)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
        for ours, theirs in zip(alone["numbers"], together["numbers"], strict=True):
            assert theirs[:2] == pytest.approx(ours[:2], rel=1e-5)  # loss and norm
            assert theirs[2] == ours[2], "how much was read, counted over both"
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(together["weights"][name], weight, rtol=0, atol=1e-6, msg=name)


def test_transformers_has_the_same_loss_and_gradients_with_labels_of_minus_100(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    dataset = open_dataset(made / "chat", 64, 1)
    ours = toy(dataset)
    write_folder(ours, tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", local_files_only=True)
    chats = [dataset.conversations("train")[i] for i in (0, 3, 5)]
    width = max(map(len, chats))
    ids = torch.tensor([chat + [START] * (width - len(chat)) for chat in chats])
    labels = torch.full_like(ids, -100)
    for row, chat in zip(labels, chats):
        begin = chat.index(ASSISTANT) + 1  # each has one answer, at the end
        row[begin:len(chat)] = torch.tensor(chat[begin:])
    result = theirs(input_ids=ids, labels=labels)
    result.loss.backward()
    loss, _, _, gradient = step_on(ours, dataset, [[0, 3, 5]])
    assert loss == pytest.approx(result.loss.item(), rel=1e-5)
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == gradient.keys()
    for name, mine in gradient.items():
        if re.search(r"c_\w+\.weight", name):  # their Conv1D keeps weights (in, out)
            mine = mine.T
        if name == "wte.weight":
            assert not mine[260:].any(), "rows of ids that do not exist"
            mine = mine[:260]
        torch.testing.assert_close(mine, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_a_conversation_has_the_same_logits_alone_and_padded_in_a_batch(made):
    dataset = open_dataset(made / "chat", 64, 1)
    model, chats = toy(dataset), dataset.conversations("train")
    assert len({len(chat) for chat in chats}) > 3
    together = model(torch.tensor(dataset.rows("train", np.arange(len(chats)))[0]))
    for chat, logits in zip(chats, together, strict=True):
        alone = model(torch.tensor([chat[:-1]]))[0]
        torch.testing.assert_close(logits[:len(chat) - 1], alone, rtol=0, atol=1e-5)


# From what it starts

@pytest.fixture
def begun(monkeypatch):
    """What the first step of a run is given: its number, the weights, and how many of the optimizers' states
    are filled."""
    seen, real = {}, train.train_step

    def step(model, optimizers, dataset, number, *args):
        if not seen:
            seen.update(step=number, states=sum(len(o.state) for o in optimizers),
                        weights={name: w.clone() for name, w in model.state_dict().items()})
        return real(model, optimizers, dataset, number, *args)
    monkeypatch.setattr(train, "train_step", step)
    return seen


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_gives_its_weights_and_nothing_else(made, tmp_path, begun, name):
    base = load_checkpoint(made / "base" / name)
    last = run(made, tmp_path, init_from=made / "base" / name)
    assert (begun["step"], begun["states"]) == (0, 0)
    for key, weight in base["model"].items():
        assert torch.equal(weight, begun["weights"][key]), key
    assert last["optimizers"][0]["state"][0]["step"] == last["step"] == last["max_iters"] != base["step"] == 7
    assert len(last["history"]) > 1 and all(step <= last["step"] for step, _, _ in last["history"])
    assert last["kind"] == "chat" and last["settings"]["init_from"] == str(made / "base" / name)
    assert not torch.equal(last["model"]["wte.weight"], base["model"]["wte.weight"])


@pytest.fixture(scope="module")
def gpt2_chat(tmp_path_factory, gpt2_vocabulary):
    """Chats in GPT-2's ids."""
    return prepare(tmp_path_factory.mktemp("gpt2") / "chat", ROWS, tokenizer="gpt2")


@pytest.mark.parametrize("vocab_size", [50257, 50260])  # GPT-2 as it was made; and with the role tokens
def test_a_folder_with_gpt2s_vocabulary_is_finetuned(made, gpt2_chat, tmp_path, begun, vocab_size):
    torch.manual_seed(0)
    base = GPT(GPTConfig(vocab_size, 64, 2, 3, 12))
    write_folder(base, tmp_path / "hf")
    last = run(made, tmp_path / "out", init_from=tmp_path / "hf", data_dir=gpt2_chat, max_iters=2)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight[:vocab_size], begun["weights"][name][:vocab_size]), name
    assert (last["step"], last["tokenizer"], last["kind"]) == (2, "gpt2", "chat")
    assert last["config"] == {"vocab_size": 50260, "block_size": 64, "n_layer": 2, "n_head": 3, "n_embd": 12,
                              "dropout": 0.1, "bias": True}


def test_a_shorter_context_keeps_the_first_positions(made, tmp_path, begun):
    run(made, tmp_path, block_size=48)
    base, best = (load_checkpoint(folder / "best.pt") for folder in (made / "base", tmp_path))
    assert torch.equal(begun["weights"]["wpe.weight"], base["model"]["wpe.weight"][:48])
    assert best["config"]["block_size"] == 48 and best["model"]["wpe.weight"].shape == (48, 16)


def test_a_longer_context_than_was_learned_is_refused(made, tmp_path, monkeypatch):
    line = error_of(monkeypatch, flags(made, tmp_path / "out", block_size=65))
    assert "block_size=65" in line and "64" in line and not (tmp_path / "out").exists()


def test_train_goes_on_from_a_checkpoint_too(made, tmp_path, begun):
    train.main([f"--init_from={made / 'base' / 'best.pt'}", f"--data_dir={made / 'text'}", "--block_size=64",
                f"--out_dir={tmp_path}", "--batch_size=2", "--max_iters=3", "--device=cpu"])
    assert (begun["step"], begun["states"]) == (0, 0)
    for name, weight in load_checkpoint(made / "base" / "best.pt")["model"].items():
        assert torch.equal(weight, begun["weights"][name]), name
    last = load_checkpoint(tmp_path / "last.pt")
    assert (last["step"], last["kind"]) == (3, "text")
    assert [step for step, _, _ in last["history"]] == [3]


# Epochs

@pytest.fixture
def read(monkeypatch):
    """The questions in every batch that a run trains on, in order (evaluations read no batch by number)."""
    batches, real = [], ChatDataset.batch

    def batch(self, split, index):
        ids, targets, where = real(self, split, index)
        batches.append([tuple(row[:row.index(END)]) for row in ids.tolist()])
        return ids, targets, where
    monkeypatch.setattr(ChatDataset, "batch", batch)
    return batches


def test_every_conversation_is_seen_once_an_epoch_in_another_order_each_time(made, tmp_path, read):
    last = run(made, tmp_path / "one", epochs=4)
    rows = [row for batch in read for row in batch]
    chats = open_dataset(made / "chat", 64, 1).conversations("train")
    assert Counter(rows) == {tuple(chat[:chat.index(END)]): 4 for chat in chats} and len(chats) == 9
    epochs = [rows[i:i + 9] for i in range(0, 36, 9)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert last["step"] == len(read)
    first = [*read]
    read.clear()
    run(made, tmp_path / "same", epochs=4)
    assert read == first
    read.clear()
    run(made, tmp_path / "other", epochs=4, seed=2)
    assert read != first


@pytest.mark.parametrize("accumulation, steps, evaluated", [
    (1, 27, [9, 18, 27]), (2, 14, [5, 10, 14]), (9, 3, [1, 2, 3]), (20, 2, [1, 2]), (100, 1, [1])])
def test_the_steps_of_3_epochs_of_9_batches(made, tmp_path, read, capsys, accumulation, steps, evaluated):
    last = run(made, tmp_path, epochs=3, batch_size=1, gradient_accumulation=accumulation)
    assert last["step"] == last["max_iters"] == steps
    assert [step for step, _, _ in last["history"]] == evaluated
    assert len(read) == steps * accumulation and all(len(batch) == 1 for batch in read)
    assert set(Counter(row for (row,) in read[:27]).values()) == {3}
    said = capsys.readouterr().out
    assert f": {steps:,} steps are " in said and "epochs of 9 conversations" in said


def test_max_iters_and_eval_interval_can_be_given_instead(made, tmp_path):
    last = run(made, tmp_path, epochs=3, batch_size=1, max_iters=5, eval_interval=2)
    assert last["max_iters"] == 5 and [step for step, _, _ in last["history"]] == [2, 4, 5]


def test_chats_with_no_answer_in_a_short_context_are_counted_and_left_out(made, tmp_path, read, capsys):
    chats = open_dataset(made / "chat", 64, 1).conversations("train")
    block_size = sorted(chat.index(ASSISTANT) for chat in chats)[3]  # of some, the answer begins in there
    kept = sum(chat.index(ASSISTANT) < block_size for chat in chats)
    assert 0 < kept < 9
    run(made, tmp_path, block_size=block_size)
    assert len({row for batch in read for row in batch}) <= kept
    said = capsys.readouterr().out
    assert f"epochs of {kept} conversations" in said and f"{9 - kept} conversations are left out" in said


def test_patience_stops_and_best_pt_is_of_the_lowest_validation_loss(made, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 3.0, 2.0, 2.0, 1.5, 2.5, 1.0, 2.1])  # training, validation, training, ...
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    last = run(made, tmp_path, epochs=9, batch_size=1, patience=2)
    assert last["history"] == [(9, 3.0, 3.0), (18, 2.0, 2.0), (27, 1.5, 2.5), (36, 1.0, 2.1)]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 18
    said = capsys.readouterr().out
    assert "patience" in said and "step 18 (epoch 2.00)" in said
    assert "step    36/81  epoch 4.00" in said


def test_best_pt_answers_with_the_loss_that_the_run_measured(made, tmp_path):
    last = run(made, tmp_path, epochs=6, learning_rate=0.03, eval_tokens=10**6)
    best, dataset = load_checkpoint(tmp_path / "best.pt"), open_dataset(made / "chat", 64, 1)
    loss = evaluate(model_from_checkpoint(best), dataset, "val")
    assert loss == pytest.approx(min(val for _, _, val in last["history"]), rel=1e-5)
    assert loss < last["history"][0][2]


# Stopping and going on

def stop_at(monkeypatch, wanted):
    """A SIGTERM arrives while step `wanted` (counted from 0) is computed."""
    real = train.train_step

    def step_then_signal(*args):
        result = real(*args)
        if args[3] == wanted:
            signal.raise_signal(signal.SIGTERM)
        return result
    monkeypatch.setattr(train, "train_step", step_then_signal)


LONG = dict(epochs=3, batch_size=1, gradient_accumulation=2, dropout=0.2)  # 14 steps


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    """Of a run that was never stopped: last.pt, and where it left the random numbers."""
    return run(made, tmp_path_factory.mktemp("straight"), **LONG), torch.get_rng_state()


@pytest.mark.parametrize("stops", [[4], [0, 2, 8, 12]])  # the epochs end within steps 4, 8 and 13
def test_stopped_and_resumed_equals_straight_through_bit_for_bit_without_the_base(
        made, tmp_path, monkeypatch, straight, stops):
    shutil.copy(made / "base" / "best.pt", tmp_path / "base.pt")
    knobs = dict(**LONG, init_from=tmp_path / "base.pt")
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, stop)
            run(made, tmp_path / "out", resume=stop != stops[0], **knobs)
        assert stopped.value.code == 143
        assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == stop + 1
        (tmp_path / "base.pt").unlink(missing_ok=True)
        torch.manual_seed(12345)  # another process would have other random numbers
    resumed, (expected, random) = run(made, tmp_path / "out", resume=True, **knobs), straight
    assert torch.equal(torch.get_rng_state(), random)
    assert resumed["step"] == expected["step"] == 14 and resumed["history"][-1] == expected["history"][-1]
    for name, weight in expected["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


@pytest.mark.parametrize("change", ["init_from=gpt2", "block_size=48", "batch_size=3",
                                    "gradient_accumulation=2", "seed=5", "optimizer=muon", "best_by=train"])
def test_resuming_with_another_setting_is_refused_by_name(made, tmp_path_factory, monkeypatch, change):
    out_dir = tmp_path_factory.getbasetemp() / "resume_finetuning"
    if not out_dir.exists():
        run(made, out_dir, max_iters=1)
    name, _, value = change.partition("=")
    line = error_of(monkeypatch, flags(made, out_dir, max_iters=2, resume=True, **{name: value}))
    assert str(out_dir / "last.pt") in line and change in line and line.count(f"{name}=") == 2


def test_resuming_with_other_chats_is_refused(made, tmp_path, monkeypatch):
    run(made, tmp_path / "out", max_iters=1)
    other = prepare(tmp_path / "other", ROWS[:8])
    line = error_of(monkeypatch, flags(made, tmp_path / "out", max_iters=2, resume=True, data_dir=other))
    assert "other data" in line and str(other) in line


# What goes wrong

def as_a_program(path, arguments, folder):
    """Run a script as Python runs it, in a process of its own; what it prints goes to two files."""
    for fd, name in ((1, "said"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)), fd)
    os.chdir(folder)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def test_plain_text_is_one_line_and_exit_code_1(made, tmp_path):
    arguments = flags(made, tmp_path / "out", data_dir=made / "text")
    program = FORK.Process(target=as_a_program, args=(REPO / "finetune.py", arguments, tmp_path))
    program.start()
    assert ended(program) == [1] and (tmp_path / "said").read_bytes() == b""
    errors = (tmp_path / "errors").read_text(encoding="utf-8")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert f"data_dir={made / 'text'}" in errors and "prepare_alpaca.py" in errors
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_tokenizer_is_refused_with_what_to_do(made, tmp_path, monkeypatch):
    bpe = prepare(tmp_path / "bpe", ROWS, "--vocab_size=270", tokenizer="bpe")
    base = made / "base" / "best.pt"
    line = error_of(monkeypatch, flags(made, tmp_path / "out", data_dir=bpe))
    assert f"init_from={base}" in line and f"data_dir={bpe}" in line and "--tokenizer=" in line
    train.main([f"--init_from={base}", f"--data_dir={made / 'chat'}", f"--out_dir={tmp_path / 'more'}",
                "--block_size=64", "--max_iters=1", "--device=cpu"])  # of the right one it is taken
    line = error_of(monkeypatch, [f"--init_from={base}", f"--data_dir={bpe}", f"--out_dir={tmp_path / 'out'}",
                                  "--device=cpu"], train)
    assert f"init_from={base}" in line and f"data_dir={bpe}" in line
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_that_an_error_names_is_the_one_that_works(made, tmp_path, monkeypatch):
    bpe = prepare(tmp_path / "bpe", ROWS, "--vocab_size=270", tokenizer="bpe")
    train.main([*(f"--{name}={value}" for name, value in SHAPE.items()), f"--data_dir={bpe}",
                f"--out_dir={tmp_path / 'base'}", "--max_iters=1", "--device=cpu"])
    base = tmp_path / "base" / "best.pt"
    line = error_of(monkeypatch, flags(made, tmp_path / "out", init_from=base))
    assert "--tokenizer=" in line and "tokenizer.json" in line
    again = prepare(tmp_path / "again", ROWS[::-1], tokenizer=bpe / "tokenizer.json")
    assert run(made, tmp_path / "out", init_from=base, data_dir=again, max_iters=1)["step"] == 1


@pytest.mark.parametrize("script", [finetune, train])
def test_gpt2_on_chats_in_bytes_is_refused_before_anything_is_downloaded(made, tmp_path, monkeypatch, script):
    def fetched(name):
        raise AssertionError(f"{name} was fetched")
    monkeypatch.setattr("model.fetch_gpt2", fetched)
    line = error_of(monkeypatch, ["--init_from=gpt2", f"--data_dir={made / 'chat'}", "--device=cpu",
                                  f"--out_dir={tmp_path}"], script)
    assert "init_from=gpt2" in line and f"data_dir={made / 'chat'}" in line and "--tokenizer=gpt2" in line


def test_a_folder_with_another_vocabulary_is_refused(made, gpt2_chat, tmp_path, monkeypatch):
    write_folder(GPT(GPTConfig(300, 64, 1, 2, 16)), tmp_path / "hf")
    line = error_of(monkeypatch, flags(made, tmp_path / "out", init_from=tmp_path / "hf", data_dir=gpt2_chat))
    assert f"init_from={tmp_path / 'hf'}" in line and str(gpt2_chat) in line


def test_a_base_that_is_not_there_is_one_line(made, gpt2_chat, tmp_path, monkeypatch):
    line = error_of(monkeypatch, flags(made, tmp_path / "out", init_from=tmp_path / "no.pt"))
    assert str(tmp_path / "no.pt") in line
    line = error_of(monkeypatch, flags(made, tmp_path / "out", init_from="gpt-2", data_dir=gpt2_chat))
    assert "gpt-2" in line and all(name in line for name in GPT2_NAMES)


def test_a_base_cut_short_is_one_line(made, tmp_path, monkeypatch):
    base = tmp_path / "base.pt"
    base.write_bytes((made / "base" / "best.pt").read_bytes()[:-20])
    assert str(base) in error_of(monkeypatch, flags(made, tmp_path / "out", init_from=base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["epochs=0", "epochs=-1", "block_size=-1", "max_iters=-1",
                                     "eval_interval=-1", "patience=-1", "batch_size=0", "dropout=1.0",
                                     "gradient_accumulation=0"])
def test_a_setting_out_of_range_is_refused_by_name_and_value(made, tmp_path, monkeypatch, setting):
    name, _, value = setting.partition("=")
    assert f"error: {setting}:" in error_of(monkeypatch, flags(made, tmp_path, **{name: value}))


# The recipes

def recipes(settings, script):
    """{out_dir: settings} of the config files for `python script`, and of its defaults."""
    files = [path for path in (REPO / "config").glob("*.py") if path.stem != "__init__" and
             f"python {script} config/{path.name}" in path.read_text(encoding="utf-8")]
    loaded = [config.load(settings, argv) for argv in ([], *([str(path)] for path in files))]
    return {REPO / s.out_dir: s for s in loaded}


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("finetune_*.py")), ids=lambda path: path.stem)
def test_a_recipe_has_chats_in_the_ids_of_what_it_starts_from(path):
    s = config.load(finetune.Settings, [str(path)])
    train.check_settings(replace(s, block_size=1, max_iters=1, eval_interval=1))
    above = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"python finetune.py config/{path.name}" in line for line in above)
    named = re.findall(r"config/\w+\.py", " ".join(above))
    assert all((REPO / name).is_file() for name in named), named
    prepared = recipes(prepare_alpaca.Settings, "prepare_alpaca.py")
    chats = prepared[REPO / s.data_dir]
    if s.init_from in GPT2_NAMES:
        assert chats.tokenizer == "gpt2"
        return
    assert Path(s.init_from).name == "best.pt"
    base = recipes(train.Settings, "train.py")[(REPO / s.init_from).parent]
    assert s.block_size <= base.block_size
    ours, theirs = (REPO / (p.out_dir / "tokenizer.json" if p.tokenizer == "bpe" else p.tokenizer)
                    for p in (chats, prepared[REPO / base.data_dir]))
    assert ours == theirs
