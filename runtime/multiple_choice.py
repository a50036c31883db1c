"""Multiple choice: which choice a model finds most likely. For HellaSwag, or your own rows.

    python -m runtime.multiple_choice    # download HellaSwag's validation set: 10,042 rows, 12 MB
    python chat.py --init_from=gpt2 --score=data/hellaswag/hellaswag_val.jsonl

A row of HellaSwag has a context and four endings, one written by a person and three by a model
(Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"). A base model reads
`ctx`, a space, and an ending, as in Karpathy's build-nanogpt, which reports, for OpenAI's weights,
28.59% (gpt2) and 38.42% (gpt2-xl) by the sum, 29.55% and 48.93% by the mean over tokens.
"""
import math
from reprlib import repr as short

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import config
from config import UserError
from data.conversation import check_characters, check_text, prompt_ids, read_rows, special_ids
from data.download import download
from runtime.scoring import evenly_spaced, score_chats, write_scores
from runtime.terminal import show_progress

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

# The fields of a row: question, choices, index of the correct one. HellaSwag's, and others.
LAYOUTS = (("ctx", "endings", "label"), ("question", "choices", "answer"))
PADDING = -1  # after an ending that is shorter than another one


def score(session, cfg):
    """Score cfg.score, multiple choice or chats: print a summary, write all answers to a JSON file.
    Choices are compared by the sum of their tokens' log-probabilities, and by the mean, which does
    not favor short choices. Raises UserError or OSError."""
    rows = [] if cfg.score.is_dir() else read_rows(cfg.score)
    if not any(isinstance(row, dict) and {"endings", "choices"} & row.keys() for row in rows):
        return score_chats(session, cfg)
    rows = [(n, *read_choices(row, f"{cfg.score}, row {n}")) for n, row in enumerate(rows, 1)]
    rows, answers = evenly_spaced(rows, cfg.score_rows), []
    for done, (number, question, choices, answer) in enumerate(rows, 1):
        context, endings = encode_choices(question, choices, session)
        lengths = [len(ending) for ending in endings]
        if len(context) + max(lengths) <= session.model.config.block_size + 1:  # last: not read
            sums = log_likelihoods(session.model, context, endings)
            means = [x / n for x, n in zip(sums, lengths)]
            answers.append({"row": number, "question": question, "choices": choices,
                            "answer": answer, "tokens": lengths, "log_likelihoods": sums,
                            "sum": sums.index(max(sums)), "mean": means.index(max(means))})
        show_progress("rows", done, len(rows))
    summary = [accuracy(answers, by) for by in ("sum", "mean") if answers]
    write_scores(cfg, len(rows), summary, answers)
    for x in summary:
        print(f"most likely by the {x['by'] + ':':<6}{x['correct']:>7,} of {x['n']:,} correct, "
              f"accuracy {x['accuracy']:.2%} ± {x['standard_error']:.2%}")
    print(f"chance: accuracy {sum(1 / len(a['choices']) for a in answers) / len(answers):.2%}")


def read_choices(row, where):
    """Return (question, choices, index of the correct one). The UserError names `where`."""
    names = next((names for names in LAYOUTS if isinstance(row, dict) and {*names} <= {*row}), None)
    if not names:
        raise UserError(f"{where}: must have the fields {' or '.join(map(str, LAYOUTS))}, found "
                        f"{short(row)}")
    question, choices, answer = check_text(row, names[0], where), row[names[1]], row[names[2]]
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where}: field {names[1]!r} must be a list of two or more texts, none of "
                        f"them empty, found {short(choices)}")
    check_characters([question, *choices], where)
    if str(answer) not in map(str, range(len(choices))):  # the hub's rows have it as text
        raise UserError(f"{where}: field {names[2]!r} must be a number from 0 to "
                        f"{len(choices) - 1}, found {short(answer)}")
    return question, choices, int(answer)


def encode_choices(question, choices, session):
    """Return the ids of the context, and those of each choice. A base model reads the question, a
    space and a choice. A chat model gets the question, and answers with a choice."""
    enc, question = session.enc, session.enc.encode_ordinary(question)
    end_of_text, _, _, end = special_ids(enc)
    if session.trained_turns:
        endings = [[*enc.encode_ordinary(choice), end] for choice in choices]
        return prompt_ids([("user", question)], enc), endings
    return question or [end_of_text], [enc.encode_ordinary(" " + choice) for choice in choices]


@torch.no_grad()
def log_likelihoods(model, context, endings):
    """Return the log-probability, in nats, of each of the endings (ids) after the context (ids)."""
    device = model.wte.weight.device
    endings = pad_sequence([torch.tensor(ending, device=device) for ending in endings],
                           batch_first=True, padding_value=PADDING)  # (B, N)
    context = torch.tensor(context, device=device).expand(len(endings), -1)
    idx = torch.cat([context, endings[:, :-1].clamp(min=0)], dim=1)  # no token sees later padding
    x = model.hidden(idx)[:, context.shape[1] - 1:]  # (B, N, C): those that predict the endings
    logits = model.head(x).float()  # (B, N, padded V)
    losses = F.cross_entropy(logits.mT, endings, ignore_index=PADDING, reduction="none")
    return (-losses.sum(1)).tolist()


def accuracy(answers, by):
    """Return the accuracy p by "sum" or "mean", and its standard error sqrt(p (1 - p) / n)."""
    n, correct = len(answers), sum(answer[by] == answer["answer"] for answer in answers)
    error = math.sqrt(correct / n * (1 - correct / n) / n)
    return {"by": by, "n": n, "correct": correct, "accuracy": correct / n, "standard_error": error}


def main(argv):
    """Download HellaSwag's validation set, unless it exists. Raises OSError."""
    if argv:
        return print(__doc__ or "")
    path = "data/hellaswag/hellaswag_val.jsonl"
    print(config.shell_command("python", "chat.py", f"--score={download(URL, path, SHA256)}"))


if __name__ == "__main__":
    config.run(main)
