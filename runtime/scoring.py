"""Score a chat model: exact match and F1 by category, on held-out and on training rows.

    python chat.py --score=data/instruction
"""
from collections import Counter, defaultdict
from pathlib import Path

import torch

from config import UserError
from data import conversation as chats
from data.datasets import open_dataset, read_meta, row_categories
from data.files import write_json
from data.rules import result_of
from data.tokenizer import get_tokenizer
from runtime.terminal import note, show_progress


def score_chats(session, cfg):
    """Answer the last question of each row greedily, print a table by category, and write every
    answer to a JSON file. Raises UserError or OSError."""
    if not session.trained_turns:
        raise UserError(f"score={cfg.score}: a base model does not answer; use a model trained on "
                        "chats, or multiple choice")
    rows, answers = rows_to_score(cfg.score, cfg.score_rows), []
    for n, (group, messages, category) in enumerate(rows, 1):
        if answer := score_row(session.model, session.enc, messages):
            if category.endswith("(work)"):  # only the result counts, not the steps before it
                answer["exact"] = result_of(answer["answer"]) == result_of(answer["expected"])
            answers.append({"rows": group, "category": category, **answer})
        show_progress("rows", n, len(rows))
    cells = defaultdict(list)  # of categories, of the parts before their "/", and of all
    for a in answers:
        for name in {a["category"], a["category"].partition("/")[0], "all"} - {""}:
            cells[name == "all", name, a["rows"]].append(a)
    summary = [{"category": name, "rows": group, **means(cells[is_all, name, group])}
               for is_all, name, group in sorted(cells)]
    write_scores(cfg, len(rows), summary, answers)
    print(f"{'category':<24}{'rows':<12}{'exact match':>18}{'F1':>8}{'loss':>8}")
    for x in summary:
        exact = f"{x['exact']} of {x['n']} {x['exact'] / x['n']:>5.0%}"
        print(f"{x['category']:<24}{x['rows']:<12}{exact:>18}{x['f1']:>8.2f}{x['loss']:>8.3f}")
    note("exact match: the same words, or for (work) the same result; F1: word overlap; loss: mean "
         "over the expected answer's tokens")


def rows_to_score(source, wanted):
    """Return [(group, messages, category), ...] of a file or a prepared folder. wanted: rows per
    group, evenly spaced; 0: all of a file, or all held-out rows and as many training rows."""
    if not source.is_dir():
        rows = chats.read_conversations(source)
        return [("rows", *row) for row in evenly_spaced(rows, wanted)]
    if read_meta(source)["kind"] != "chat":
        raise UserError(f"score={source}: contains plain text; use a folder or a file of chats")
    dataset, rows = open_dataset(source, block_size=2**20, batch_size=1), []
    enc = get_tokenizer(dataset.tokenizer)
    for split, group in (("val", "held out"), ("train", "trained on")):
        ids = dataset.conversations(split)
        wanted = wanted or len(ids)
        rows += [(group, chats.decode_conversation(row, enc), category) for row, category in
                 evenly_spaced(list(zip(ids, row_categories(source, split, len(ids)))), wanted)]
    return rows


@torch.no_grad()
def score_row(model, enc, messages):
    """Compare the greedy answer to a conversation's last question with the expected one: a dict, or
    None for a row longer than the context. loss: mean over the expected tokens, in nats."""
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
    """Return the overlap of two texts' words, from 0 to 1, as in SQuAD (Rajpurkar et al. 2016)."""
    answer, expected = Counter(answer.split()), Counter(expected.split())
    total = answer.total() + expected.total()
    return 2 * (answer & expected).total() / total if total else 1.0


def means(answers):
    """Return one table row's scores; the loss is the mean over all tokens of the answers."""
    n, n_tokens = len(answers), sum(a["tokens"] for a in answers)
    exact, f1 = sum(a["exact"] for a in answers), sum(a["f1"] for a in answers) / n
    loss = sum(a["loss"] * a["tokens"] for a in answers) / n_tokens
    return {"n": n, "exact": exact, "f1": f1, "loss": loss}


def evenly_spaced(rows, wanted):
    """Return `wanted` of the rows, evenly spaced, or all if wanted is 0 or there are fewer."""
    count = min(wanted or len(rows), len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


def write_scores(cfg, n_rows, summary, answers):
    """Write a score to a JSON file. Raises UserError if no row fits into the context."""
    if not answers:
        raise UserError(f"score={cfg.score}: no rows fit into this model's context; shorten them")
    if n_rows > len(answers):
        note(f"rows left out because they exceed this model's context: {n_rows - len(answers)}")
    folder = Path("out", Path(cfg.init_from).name) if cfg.init_from else cfg.checkpoint
    folder = folder.parent if folder.suffix == ".pt" else folder
    path = cfg.score_file or folder / "score.json"
    write_json(path, {"model": cfg.init_from or str(cfg.checkpoint), "scored": str(cfg.score),
                      "summary": summary, "answers": answers})
    note(f"every answer: {path}")
