"""Multiple choice: which of a question's choices a model finds most likely. HellaSwag, or any rows.

    python -m runtime.multiple_choice    # download HellaSwag's validation set: 10,042 rows, 12 MB
    python chat.py --init_from=gpt2 --score=data/hellaswag/hellaswag_val.jsonl

A row of HellaSwag has a context and four endings, one written by a person and three by a model
(Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?").

A base model reads `ctx`, a space, and an ending, as in Karpathy's build-nanogpt. That reports for
OpenAI's weights, on all rows, in hellaswag.py (h) and play.ipynb (p):

                    by the sum              by the mean over tokens
    gpt2                28.59 % (h)         29.55 % (h), 29.45 % (p)
    gpt2-medium                             37.52 % (p)
    gpt2-large                              43.20 % (p)
    gpt2-xl             38.42 % (h)         48.93 % (h), 48.89 % (p)
"""
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import config
from config import UserError
from data.conversation import check_characters, check_text, prompt_ids, read_rows, special_ids
from data.download import download, name_in
from model import KVCache
from runtime.scoring import check_lengths, evenly_spaced, write_scores
from runtime.terminal import note, show_progress

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

# The fields of a row: question, choices, index or text of the correct one. HellaSwag's own, others.
LAYOUTS = (("ctx", "endings", "label"), ("question", "choices", "answer"))
BATCH_TOKENS = 4096  # in the KV cache of a batch: 300 MB for the smallest GPT-2


def read_choices(path):
    """The rows of a file of multiple choice: [(question, choices, index of the correct one), ...].
    None for a folder, or a file without choices, which may contain chats. Raises UserError."""
    if path.is_dir():
        return None
    rows = read_rows(path)
    if not any(isinstance(row, dict) and {"endings", "choices"} & row.keys() for row in rows):
        return None
    return [to_choices(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def to_choices(row, where):
    """One row as (question, choices, index of the correct one). where: the file and row, for the
    UserError."""
    fields = row.keys() if isinstance(row, dict) else ()
    names = next((names for names in LAYOUTS if {*names} <= {*fields}), None)
    if not names:
        raise UserError(f"{where}: must have the fields {' or '.join(map(str, LAYOUTS))}, found "
                        f"{short(row)}")
    question, choices, answer = check_text(row, names[0], where), row[names[1]], row[names[2]]
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where}: field {names[1]!r} must be a list of two or more texts, none of "
                        f"them empty, found {short(choices)}")
    check_characters([question, *choices], where)
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    elif isinstance(answer, str) and answer.isascii() and answer.isdecimal():  # the hub's rows
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: field {names[2]!r} must be a number from 0 to "
                        f"{len(choices) - 1}, or the text of one choice, found {short(answer)}")
    return question, choices, answer


def score_choices(session, rows, cfg):
    """Find the most likely choice of each of read_choices's rows, by the sum of its tokens'
    log-probabilities and by their mean, which does not favour short choices. Print the accuracy and
    write every answer to a JSON file. Raises UserError or OSError."""
    answers, encoded, done = [], [], 0
    rows = evenly_spaced(list(enumerate(rows, 1)), cfg.score_rows or len(rows))
    for number, (question, choices, answer) in rows:
        if ids := encode_choices(question, choices, session):
            encoded.append(ids)
            answers.append(dict(row=number, question=question, choices=choices, answer=answer))
    check_lengths(len(rows), len(answers), cfg)
    if n_cropped := sum(cropped > 0 for _, _, cropped in encoded):
        note(f"{n_cropped} questions are too long for this model, which reads only their ends")
    for batch in batches(encoded):
        sums = log_likelihoods(session.model, [encoded[i] for i in batch]).tolist()
        for i, likelihoods in zip(batch, sums):
            lengths = [len(ending) for ending in encoded[i][1]]
            means = [x / n for x, n in zip(likelihoods, lengths)]
            answers[i] |= {"log_likelihoods": likelihoods, "tokens": lengths,
                           "sum": likelihoods.index(max(likelihoods)),
                           "mean": means.index(max(means))}
        done += len(batch)
        show_progress("rows", done, len(answers))
    summary = [accuracy(answers, by) for by in ("sum", "mean")]
    for x in summary:
        print(f"most likely by the {x['by'] + ':':<6}{x['correct']:>7,} of {x['n']:,} correct, "
              f"accuracy {x['accuracy']:.2%} ± {x['standard_error']:.2%}")
    chance = sum(1 / len(answer["choices"]) for answer in answers) / len(answers)
    print(f"chance: accuracy {chance:.2%}")
    write_scores(cfg, summary, answers)


def encode_choices(question, choices, session):
    """The ids that a question's choices share, the list of each choice's own, and how many ids of
    the question were cropped. None if the longest choice leaves no room for it.

    A base model reads the question, a space and a choice. A chat model gets the question as the
    user's message and answers with a choice and <|end|>.
    """
    enc, block_size = session.enc, session.model.config.block_size
    end_of_text, _, _, end = special_ids(enc)
    question = enc.encode_ordinary(question)
    if session.trained_turns:
        endings = [[*enc.encode_ordinary(choice), end] for choice in choices]
        n_special = len(prompt_ids([("user", [])], enc))
    else:
        endings, n_special = [enc.encode_ordinary(" " + choice) for choice in choices], 0
    room = block_size + 1 - max(map(len, endings)) - n_special  # the last token is never read
    if room < 1:
        return None
    kept = question[-room:]
    context = prompt_ids([("user", kept)], enc) if n_special else kept or [end_of_text]
    return context, endings, len(question) - len(kept)


def batches(encoded):
    """Yield lists of indices into encode_choices's rows: of equally long contexts and as many
    endings, so that one pass reads them without padding, sorted by the longest ending."""
    groups = defaultdict(list)
    for i, (context, endings, _) in enumerate(encoded):
        groups[len(context), len(endings)].append((max(map(len, endings)), i))
    for (length, n_endings), rows in sorted(groups.items()):
        rows.sort()
        longest, _ = rows[-1]
        size = max(BATCH_TOKENS // ((length + longest) * n_endings), 1)
        for first in range(0, len(rows), size):
            yield [i for _, i in rows[first:first + size]]


@torch.no_grad()
def log_likelihoods(model, rows):
    """The log-probability of each ending after its context, in nats: (B, N) for B rows of
    encode_choices with N endings each and equally long contexts.

    The contexts are read once and repeated N times in the KV cache; then all endings are read, each
    together with the last id of the context, which predicts its first.
    """
    device, cache = model.wte.weight.device, KVCache(model)
    contexts = torch.tensor([context for context, _, _ in rows], device=device)  # (B, T)
    pairs = [(context, ending) for context, endings, _ in rows for ending in endings]
    idx = [torch.tensor([context[-1], *ending[:-1]]) for context, ending in pairs]
    targets = [torch.tensor(ending) for _, ending in pairs]
    # No token sees the padding after it; -1 marks it as not a target.
    idx = pad_sequence(idx, batch_first=True).to(device)  # (B * N, L)
    targets = pad_sequence(targets, batch_first=True, padding_value=-1).to(device)  # (B * N, L)
    start = contexts.shape[1] - 1
    repeat_cache(cache, len(rows), start + idx.shape[1])  # empty so far
    if start:
        model.hidden(contexts[:, :-1], cache)
    repeat_cache(cache, len(pairs) // len(rows), start + idx.shape[1])
    x = model.hidden(idx, cache, start)  # (B * N, L, C)
    logits = model.head(x).float().flatten(0, 1)  # (B * N * L, padded V)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
    return -losses.view(targets.shape).sum(1).view(len(rows), -1)


def repeat_cache(cache, times, length):
    """Repeat each row of a KVCache, keeping room for `length` tokens."""
    for layer in cache.layers:
        layer.k = layer.k[:, :, :length].repeat_interleave(times, dim=0)
        layer.v = layer.v[:, :, :length].repeat_interleave(times, dim=0)


def accuracy(answers, by):
    """The accuracy p of the choices by "sum" or "mean", and its standard error for n rows drawn at
    random, sqrt(p (1 - p) / n)."""
    n, correct = len(answers), sum(answer[by] == answer["answer"] for answer in answers)
    error = math.sqrt(correct / n * (1 - correct / n) / n)
    return {"by": by, "n": n, "correct": correct, "accuracy": correct / n, "standard_error": error}


@dataclass
class Settings:
    out_dir: Path = Path("data/hellaswag")  # where hellaswag_val.jsonl goes
    url: str = URL  # where it comes from; a mirror must have the same bytes


def main(argv):
    """Download the validation set, unless it exists, and read it. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    path = download(cfg.url, cfg.out_dir / name_in(cfg.url), SHA256, SIZE)
    print(f"{path}: {len(read_choices(path) or []):,} rows")


if __name__ == "__main__":
    config.run(main)
