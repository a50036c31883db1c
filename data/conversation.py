"""The chat format: all code that writes or reads it.

A conversation is a list of messages, {"role": "user" or "assistant", "content": text}, alternating,
the user first. As token ids it is

    <|endoftext|> <|user|> How are you? <|end|> <|assistant|> Fine, thanks. <|end|> <|user|> ...

where each `<|...|>` is a single id. A model is trained on the ids after `<|assistant|>`, up to and
including `<|end|>`: it learns to answer and to stop, not to ask. Text is always encoded as ordinary
text: typing "<|end|>" produces harmless tokens, never the one that ends a turn.
"""
import numpy as np

from data.rows import check_characters, check_text, read_conversations, read_rows  # noqa: F401
from data.tokenizer import END_OF_TEXT, ROLE_TOKENS

USER, ASSISTANT, END = ROLE_TOKENS


def special_ids(enc):
    """Return the ids of <|endoftext|>, <|user|>, <|assistant|> and <|end|> in a tokenizer."""
    return tuple(enc.encode_single_token(token) for token in (END_OF_TEXT, *ROLE_TOKENS))


def encode_conversation(messages, enc):
    """Encode messages: <|endoftext|>, then for each message its role, its text and <|end|>."""
    return assemble([(m["role"], enc.encode_ordinary(m["content"])) for m in messages], enc)


def assemble(messages, enc):
    """Return the ids of a conversation from (role, ids of the text) pairs."""
    end_of_text, user, assistant, end = special_ids(enc)
    ids = [end_of_text]
    for role, text in messages:
        ids += [user if role == "user" else assistant, *text, end]
    return ids


def prompt_ids(messages, enc):
    """Return assemble's ids and <|assistant|>: the prompt that the model's reply continues."""
    return [*assemble(messages, enc), special_ids(enc)[2]]


def encode_prompt(messages, enc):
    """Encode messages that end with the user's, plus <|assistant|> to start the model's turn."""
    return [*encode_conversation(messages, enc), special_ids(enc)[2]]


def turns_to_messages(turns):
    """Convert [(question ids, answer ids), ...] to [(role, ids), ...]."""
    return [pair for question, answer in turns
            for pair in (("user", question), ("assistant", answer))]


def supervised(ids, enc):
    """Return which of `ids` the model is trained to predict, as booleans: the assistant's text and
    its <|end|>. (In the first prompt_loss_iters steps, all tokens are: see ChatDataset.) A pure
    function of the ids, (n,) -> (n,): a token is supervised if it is none of the markers
    <|endoftext|>, <|user|> and <|assistant|>, and the last marker before it is <|assistant|>."""
    ids = np.asarray(ids)  # <|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello <|end|>
    end_of_text, user, assistant, _ = special_ids(enc)
    is_marker = np.isin(ids, (end_of_text, user, assistant))  # 1 1 0 0 1 0 0
    positions = np.where(is_marker, np.arange(len(ids)), 0)  # 0 1 0 0 4 0 0: of the markers
    last = np.maximum.accumulate(positions)  # 0 1 1 1 4 4 4: of the last marker so far
    return (ids[last] == assistant) & ~is_marker  # Hello and its <|end|>


def decode_conversation(ids, enc):
    """Decode ids to messages, the inverse of encode_conversation."""
    end_of_text, user, assistant, end = special_ids(enc)
    messages, text = [], []
    for i in ids:
        if i in (user, assistant):
            messages.append({"role": "user" if i == user else "assistant", "content": ""})
            text = []
        elif i == end:
            messages[-1]["content"] = enc.decode(text)
        elif i != end_of_text:
            text.append(i)
    return messages


def to_text(messages):
    """Return messages as readable text, role tokens spelled out. Nothing reads this back."""
    return "\n".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def chat_template(turns=None):
    """Return the format as a Jinja template, for tools that render chats by template. (They turn a
    typed "<|end|>" into the token; encode_conversation does not.)

    turns: how many of the most recent questions the model sees; None: all; 0: a base model, which
    continues the newest text. A system message is put before the first question.
    """
    if turns == 0:
        return "{{ messages[-1]['content'] or '" + END_OF_TEXT + "' }}"
    newest = f"[-{2 * turns - 1}:]" if turns else ""
    # Without Jinja, llama.cpp mistakes a template that contains <|assistant|> for Phi-3's, with
    # newlines between messages. So the token is written in two halves here.
    return ("{% set system = '' %}{% set chat = messages %}"
            "{% if messages[0]['role'] == 'system' %}"
            "{% set system = messages[0]['content'] + '\n' %}{% set chat = messages[1:] %}"
            "{% endif %}" + END_OF_TEXT + "{% for m in chat" + newest + " %}"
            "{{ '<|' + m['role'] + '|>' }}{% if loop.first %}{{ system }}{% endif %}"
            "{{ m['content'] + '" + END + "' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assist' + 'ant|>' }}{% endif %}")
