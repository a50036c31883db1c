"""Scores of a chat model: exact match and F1 by category, held-out rows next to trained ones.

    python chat.py --score=data/instruction
"""
from collections import Counter, defaultdict
from pathlib import Path

import torch

import config
from config import UserError
from data import conversation as chats
from data.datasets import open_dataset, read_meta, row_categories
from data.files import write_json
from data.tokenizer import get_tokenizer
from runtime.terminal import note, show_progress


def score_chats(session, cfg):
    """Answer the last question of each row greedily, print a table by category, and write every
    answer to a JSON file. Raises UserError or OSError."""
    if not session.trained_turns:
        raise UserError(f"score={cfg.score}: a base model gives no answers; use a model trained on "
                        "chats, or a file of multiple choice (see runtime/multiple_choice.py)")
    groups, answers = rows_to_score(cfg.score, cfg.score_rows), []
    for group, rows in groups.items():
        for n, (messages, category) in enumerate(rows, 1):
            if answer := score_row(session.model, session.enc, messages):
                answers.append({"rows": group, "category": category, **answer})
            show_progress(group, n, len(rows))
    check_lengths(sum(map(len, groups.values())), len(answers), cfg)
    summary = summarize(answers)
    print(f"{'category':<24}{'rows':<12}{'exact match':>18}{'F1':>8}{'loss':>8}")
    for x in summary:
        exact = f"{x['exact']} of {x['n']} {x['exact'] / x['n']:>5.0%}"
        print(f"{x['category']:<24}{x['rows']:<12}{exact:>18}{x['f1']:>8.2f}{x['loss']:>8.3f}")
    note("exact match: the same words; F1: overlap of the words; loss: of the expected answer")
    write_scores(cfg, summary, answers)


def rows_to_score(source, wanted):
    """{"held out": rows, "trained on": rows} of a prepared folder, {"rows": rows} of a file; rows
    are (messages, category) pairs, `wanted` of each, evenly spaced. wanted 0: all of a file, all
    held-out rows and as many trained ones. Raises UserError or OSError."""
    if not source.is_dir():
        rows = chats.read_conversations(source)
        return {"rows": evenly_spaced(rows, wanted or len(rows))}
    if read_meta(source)["kind"] != "chat":
        raise UserError(f"score={source}: contains plain text; use a folder or a file of chats")
    dataset = open_dataset(source, block_size=2**20, batch_size=1)
    enc, groups = get_tokenizer(dataset.tokenizer), {}
    for split, group in (("val", "held out"), ("train", "trained on")):
        ids = dataset.conversations(split)
        wanted = wanted or len(ids)
        rows = evenly_spaced(list(zip(ids, row_categories(source, split, len(ids)))), wanted)
        groups[group] = [(chats.decode_conversation(row, enc), category) for row, category in rows]
    return groups


@torch.no_grad()
def score_row(model, enc, messages):
    """Compare the greedy answer to a conversation's last question with the expected one: a dict, or
    None if it is longer than the context. loss: mean over the expected tokens, in nats."""
    ids, block_size = chats.encode_conversation(messages, enc), model.config.block_size
    start = len(chats.encode_prompt(messages[:-1], enc))  # of the answer
    if len(ids) > block_size + 1:
        return None
    idx, targets, positions = (torch.tensor(x, device=model.wte.weight.device) for x in (
        [ids[:-1]], ids[start:], range(start - 1, len(ids) - 1)))
    loss = model(idx, targets, positions).item()
    answer = enc.decode(list(model.generate(ids[:start], block_size - start + 1, temperature=0,
                                            stop_ids=chats.special_ids(enc))))
    expected = messages[-1]["content"]
    return {"question": messages[-2]["content"], "expected": expected, "answer": answer,
            "exact": answer.split() == expected.split(), "f1": token_f1(answer, expected),
            "loss": loss / len(targets), "tokens": len(targets)}


def token_f1(answer, expected):
    """Overlap of two texts' words, 0 to 1: the harmonic mean of precision and recall (as for SQuAD,
    Rajpurkar et al. 2016)."""
    answer, expected = Counter(answer.split()), Counter(expected.split())
    total = answer.total() + expected.total()
    return 2 * (answer & expected).total() / total if total else 1.0


def summarize(answers):
    """Summarize answers by category, by the part before a category's "/", and all; the loss is the
    mean over all their tokens."""
    cells, summary = defaultdict(list), []
    for a in answers:
        for name in {a["category"], a["category"].partition("/")[0], "all"} - {""}:
            cells[name, a["rows"]].append(a)
    for name, group in sorted(cells, key=lambda cell: (cell[0] == "all", cell[0])):
        rows = cells[name, group]
        loss = sum(a["loss"] * a["tokens"] for a in rows) / sum(a["tokens"] for a in rows)
        summary.append({"category": name, "rows": group, "n": len(rows),
                        "exact": sum(a["exact"] for a in rows),
                        "f1": sum(a["f1"] for a in rows) / len(rows), "loss": loss})
    return summary


def evenly_spaced(rows, wanted):
    """`wanted` of the rows, evenly spaced, or all if there are fewer."""
    count = min(wanted, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


def check_lengths(n_rows, n_scored, cfg):
    """Note how many rows do not fit into the context. Raises UserError if none is left."""
    if not n_scored:
        raise UserError(f"score={cfg.score}: no rows fit into this model's context; use others")
    if n_rows > n_scored:
        note(f"{n_rows - n_scored} rows are longer than this model's context and were left out")


def write_scores(cfg, summary, answers):
    """Write a score to a JSON file, and note its name. Raises OSError."""
    folder = (config.repo_folder() / "out" / Path(cfg.init_from).name if cfg.init_from else
              cfg.checkpoint.parent)
    path = cfg.score_file or folder / "score.json"
    write_json(path, {"model": cfg.init_from or str(cfg.checkpoint), "scored": str(cfg.score),
                      "summary": summary, "answers": answers})
    note(f"every answer: {path}")
