"""Chat with a model that train.py or finetune.py made.

    python chat.py                                         # out/chat/best.pt; /help lists commands
    python chat.py --prompt="What is the plural of box?"   # one reply, then exit
    python chat.py < questions.txt                         # one message per line, one reply each
    python chat.py --json=True < questions.txt             # each reply as a line of JSON
    python chat.py --score=data/instruction                # exact match and F1 by category
    python chat.py --init_from=gpt2 --score=data/hellaswag/hellaswag_val.jsonl   # multiple choice
    python chat.py --look=out/look.html --prompt="What is the plural of box?"    # see inside it
    python chat.py --init_from=gpt2 --prompt="Once upon a time"    # GPT-2 itself continues text

Only replies go to standard output, everything else to standard error. A base model, trained on
plain text, continues your text instead of answering. If the context is full, old turns are dropped
(`chat_prompt`), a reply stops (`reply`), and a base model's context slides (`model.window_start`).
"""
import codecs
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import model as gpt
from config import UserError
from data.conversation import prompt_ids, special_ids, turns_to_messages
from data.tokenizer import get_tokenizer
from runtime import terminal
from runtime.checkpoint import load_pretrained
from runtime.devices import pick_device
from runtime.fast_cpu import speed_up


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # the model to chat with
    init_from: str | None = None  # instead of checkpoint: gpt2, gpt2-medium, ... or a folder
    prompt: str | None = None  # one message: print the reply and exit
    look: Path | None = None  # with prompt: write a page that shows the inside of the model
    json: bool = False  # each reply as a line of JSON: text, tokens, seconds, stop, ...
    turns: int = 0  # how many of your last messages the model sees; 0: as in training
    max_new_tokens: int = 200  # longest reply, in tokens
    temperature: float = 0.5  # 0: always the most likely token; 1: the model's own distribution
    top_k: int = 50  # sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # sample from the most likely tokens that make up this probability; 1: all
    repetition_penalty: float = 1.0  # 1 to 10; above 1, tokens already used become less likely
    seed: int | None = None  # the same seed gives the same replies; None: a random one
    score: Path | None = None  # compute the score on a prepared folder or a file of rows
    score_rows: int = 0  # rows per split; 0: whole file, or all held-out and as many training rows
    score_file: Path | None = None  # where all answers go; None: score.json next to the checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32, bfloat16, or int8 (int8 weights, CPU only)

    # Not settings, since they have no annotation.
    SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # passed to model.sample
    CHANGEABLE = (*SAMPLING, "max_new_tokens", "seed", "turns")  # what /set may change

    def __post_init__(self):
        config.check(self, turns=(0, None), max_new_tokens=(1, None), temperature=(0, None),
                     top_k=(0, None), top_p=(1e-9, 1), repetition_penalty=(1, 10), seed=(0, None),
                     score_rows=(0, None))
        if self.look and self.prompt is None:
            raise UserError(f"look={self.look}: needs --prompt=TEXT; in a chat, use /look")


class ChatSession:
    """A conversation with a model. Its KV cache is kept, so a turn computes only new tokens."""

    def __init__(self, model, enc, trained_turns):
        self.model, self.enc, self.cache = model, enc, gpt.KVCache(model)
        self.trained_turns = trained_turns  # of the longest chat in training; 0: a base model
        self.turns = trained_turns  # how many of the user's last messages the model sees
        self.history = []  # the turns: [(the user's ids, the model's ids), ...]
        self.n_dropped = 0  # how many of the last self.turns turns did not fit into the context
        self.prompt, self.stop = [], ""  # of the last reply: what the model read, why it ended

    def reply(self, question, cfg):
        """Answer a message, given as ids: yield the reply as text, never half a character. It ends
        at <|end|>, after max_new_tokens, or when the context is full: self.stop says which.
        The turn is in self.history from the start, even if the caller stops early. Raises UserError
        if the logits are not finite."""
        if self.trained_turns:  # a chat model
            self.prompt, question = self.chat_prompt(question, cfg)
            # + 1: the last token is not fed back to the model, so it needs no position.
            limit = min(cfg.max_new_tokens, self.model.config.block_size - len(self.prompt) + 1)
        else:
            self.history = []  # a base model continues each text separately
            self.prompt = question or [special_ids(self.enc)[0]]  # no text: <|endoftext|>
            limit = cfg.max_new_tokens
        answer = []
        self.history.append((question, answer))
        # A character may consist of several tokens: the decoder waits for the last of them.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self.generate(limit, cfg):
            answer.append(token)
            if text := decoder.decode(self.enc.decode_single_token_bytes(token)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
        at_limit = "max_new_tokens" if limit == cfg.max_new_tokens else "context"
        self.stop = "end" if len(answer) < limit else at_limit

    def generate(self, limit, cfg):
        """Yield the ids of the reply to self.prompt, at most `limit`."""
        sampling = {name: getattr(cfg, name) for name in cfg.SAMPLING}
        try:
            # It stops before it yields <|end|> or another special id, so none is ever printed.
            yield from self.model.generate(self.prompt, limit, stop_ids=special_ids(self.enc),
                                           seed=cfg.seed, cache=self.cache, **sampling)
        except RuntimeError as error:
            if not any(text in str(error) for text in ("probability tensor", "QuantizationParams")):
                raise
            raise UserError("the logits contain NaN or inf: the weights are damaged; use a "
                            "different checkpoint") from error

    def chat_prompt(self, question, cfg):
        """Return the prompt and the question (truncated if it is too long), both as ids. Print a
        note if the model does not see all messages."""
        self.turns, block_size = cfg.turns or self.trained_turns, self.model.config.block_size
        max_prompt = block_size - min(cfg.max_new_tokens, block_size // 4)  # room for the reply
        earlier = self.history[-(self.turns - 1):] if self.turns > 1 else []  # [-0:] would be all
        turns, kept = trim(earlier, question, max_prompt, self.enc)
        n_dropped = len(earlier) - len(turns)
        if len(kept) < len(question):
            terminal.note("(the message is too long for this model, which reads only the last "
                          f"{len(kept)} tokens)")
        elif n_dropped > self.n_dropped:
            terminal.note("(the context is full: the oldest turns are left out)")
        self.n_dropped = n_dropped
        return chat_ids(turns, kept, self.enc), kept


def chat_ids(turns, question, enc):
    """The ids of a prompt: earlier turns, the question, and <|assistant|>."""
    return prompt_ids([*turns_to_messages(turns), ("user", question)], enc)


def trim(turns, question, max_prompt, enc):
    """Drop whole turns, oldest first, until the prompt has at most max_prompt ids; return the turns
    and the question. A question that is too long by itself is cut at the start."""
    while turns and len(chat_ids(turns, question, enc)) > max_prompt:
        turns = turns[1:]
    too_many = len(chat_ids(turns, question, enc)) - max_prompt
    return turns, question[max(too_many, 0):]


def print_reply(session, question, cfg):
    """Print the reply to a message, given as ids: piece by piece, or as a line of JSON."""
    began, pieces = time.perf_counter(), []
    for piece in session.reply(question, cfg):
        pieces.append(piece)
        if not cfg.json:
            shown = piece.translate(terminal.CONTROL_PICTURES) if sys.stdout.isatty() else piece
            print(shown, end="", flush=True)
    seconds, n_tokens = time.perf_counter() - began, len(session.history[-1][1])
    record = {"text": "".join(pieces), "tokens": n_tokens, "seconds": round(seconds, 4),
              "tokens_per_second": round(n_tokens / max(seconds, 1e-6), 2),
              "prompt_tokens": len(session.prompt), "stop": session.stop}
    print(json.dumps(record, ensure_ascii=False) if cfg.json else "", flush=True)
    if not n_tokens:
        terminal.note("(the reply is empty)")
    elif session.stop == "context":
        terminal.note("(the reply stops here: the context is full)")


def chat(session, cfg):
    """Answer messages from standard input until it ends; in a terminal, run /commands too."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    for line in filter(None, terminal.typed_lines() if tty else map(str.strip, sys.stdin)):
        try:
            if tty and terminal.COMMAND_LINE.match(line):
                cfg = terminal.run_command(session, cfg, line, print_reply)
                if cfg is None:  # /quit
                    return
            else:  # as ordinary text: a typed <|end|> never becomes the special token
                print_reply(session, session.enc.encode_ordinary(line), cfg)
        except (KeyboardInterrupt, UserError, OSError) as error:
            if not tty:
                raise
            terminal.note(" (stopped)" if isinstance(error, KeyboardInterrupt) else error)


def load_session(cfg):
    """Load the model that the settings name. Return (ChatSession, lines that describe it).
    Raises UserError or OSError."""
    int8 = cfg.dtype == "int8"
    device, dtype, why = pick_device(cfg.device, "float32" if int8 else cfg.dtype)
    if int8 and device.type != "cpu":
        raise UserError(f"dtype=int8: only on a CPU, not on {device}; add --device=cpu")
    source = cfg.init_from or cfg.checkpoint
    model, tokenizer, trained_turns = load_pretrained(source)
    torch.backends.cuda.enable_cudnn_sdp(False)  # slow: it makes a new plan for every length
    fast = speed_up(model.to(device, dtype).eval(), int8)  # `model` on a GPU or in bfloat16
    weights = ", int8 weights" if int8 and fast is not model else ""
    about = f"{source}: {model.num_params():,} parameters\n{why}{weights}"
    return ChatSession(fast, get_tokenizer(tokenizer), trained_turns), about


def main(argv):
    """Score, answer one prompt, or chat, as the settings say. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    terminal.use_utf8()
    session, about = load_session(cfg)
    if cfg.score:
        from runtime.multiple_choice import score  # a chat starts sooner without it
        return score(session, cfg)
    if cfg.prompt is None:
        terminal.greet(session, cfg, about)
        return chat(session, cfg)
    print_reply(session, session.enc.encode_ordinary(cfg.prompt), cfg)
    if cfg.look:
        terminal.show_look(session, cfg.look)


if __name__ == "__main__":
    gc.freeze()  # skip garbage collection of imported objects: saves 0.1 s
    config.run(main)
