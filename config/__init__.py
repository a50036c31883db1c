"""Settings: a script's dataclass, then config files, then flags.

    python train.py config/train_recite.py --batch_size=16 --learning_rate=1e-3

A setting is a field of the dataclass, such as `batch_size: int = 32  # sequences per step`. A
config file is Python that assigns to these names; names that start with `_` are ignored.
"""
import ast
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import typing
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
RENAMED = {"read_iters": "prompt_loss_iters", "bpe_bytes": "bpe_chars",
           "space_behind": "trailing_space"}  # since version 1.0
NANOGPT = {"eval_iters": "eval_tokens", "lr_decay_iters": "max_iters", "min_lr": "final_lr",
           "dataset": "data_dir", "start": "prompt"}  # nanoGPT's settings, and the closest here


class UserError(Exception):
    """A mistake that a user can fix: printed as one line, without a traceback."""


def load(settings_class, argv, doc="", start=None, typed="the command line"):
    """Build settings_class from its defaults, or from `start`, an instance of it, then from the
    config files and flags in argv, in order. `typed` names the source of argv in messages. Raises
    UserError."""
    if "--help" in argv or "-h" in argv:
        print(describe(settings_class, doc))
        raise SystemExit(0)
    kinds = typing.get_type_hints(settings_class)
    values = dict(vars(start)) if start else {}
    for arg in argv:
        is_flag = arg.startswith("-")
        key, equals, text = arg.lstrip("-").partition("=")
        if is_flag and not equals:
            raise UserError(f"{arg}: has no value; write {arg}=VALUE")
        source = typed if is_flag else arg
        for name, value in ({key: text} if is_flag else read_config(arg)).items():
            name = RENAMED.get(name, name)
            if name not in kinds:
                close = difflib.get_close_matches(NANOGPT.get(name, name), kinds, 1, cutoff=0.6)
                hint = "--help lists all settings" if is_flag else "prefix your own names with _"
                hint = f"did you mean {close[0]!r}?" if close else hint
                raise UserError(f"{source}: there is no setting {name!r}; {hint}")
            value = parse(value, kinds[name]) if is_flag else value
            values[name] = cast(name, value, kinds[name], source)
    return settings_class(**values)


def local_path(text):
    """The path that a text names, where "~" is the home folder."""
    return Path(os.path.expanduser(text))


def read_config(arg):
    """Run the config file that arg names. Return {name: value}. Its errors keep their traceback."""
    path = local_path(arg)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{arg}: not a config file (config/ has them); settings are --NAME=VALUE")
    return {name: value for name, value in runpy.run_path(str(path)).items()
            if not name.startswith("_") and not inspect.ismodule(value)}


def parse(text, kind):
    """Convert a flag's text to a Python value; it stays text where `kind` allows text."""
    if {str, Path} & {kind, *typing.get_args(kind)}:
        return None if text == "None" and kind not in (str, Path) else text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)


def cast(name, value, kind, source):
    """Return `value` as the type `kind`. Raises UserError."""
    options = typing.get_args(kind) or (kind,)
    if Path in options and isinstance(value, str | Path) and str(value):
        return local_path(value)
    if type(value) in options:
        return value
    if float in options and type(value) is int:
        return float(value)
    if int in options and type(value) is float and value.is_integer():
        return int(value)
    names = " or ".join(option.__name__.replace("NoneType", "None") for option in options)
    raise UserError(f"{source}: {name}={value!r} is of type {type(value).__name__}, not {names}")


def describe(settings_class, doc=""):
    """The text of --help: every setting with its default and the comment after it."""
    source = "".join(map(inspect.getsource, settings_class.__mro__[-2::-1]))  # base classes first
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.M))
    lines = [f"{f'  --{field.name}={field.default}':<34} {comments.get(field.name, '')}"
             for field in dataclasses.fields(settings_class)]
    doc = (doc or "").strip()  # python -OO removes docstrings
    return "\n".join([doc, "\nSettings (flags, or name = value in a file):\n", *lines])


def check(cfg, **allowed):
    """Raise UserError for the first setting outside its range: (low, high), where None means no
    limit, or a tuple of the allowed strings. Skip settings that are None or not in cfg."""
    for name, values in allowed.items():
        value, low, high = getattr(cfg, name, None), values[0], values[-1]
        if value is None:
            continue
        if isinstance(low, str):
            if value not in values:
                raise UserError(f"{name}={value}: must be {' or '.join(values)}")
        elif low is not None and value < low:
            raise UserError(f"{name}={value}: must be at least {low}")
        elif high is not None and value > high:
            raise UserError(f"{name}={value}: must be at most {high}")


def shell_command(*words):
    """Return the words of a command as a line to paste into a shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run(main):
    """Call main(argv). UserError and OSError end it with one line and exit code 1, Ctrl-C 130."""
    argv = sys.argv[1:[*sys.argv, "#"].index("#")]  # zsh and cmd pass comments on as arguments
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # on Windows, a file's encoding may lack emoji
    try:
        main(argv)
        print(end="", flush=True)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        filename = getattr(error, "filename", None)  # str(error) would be "[Errno 2] No such ..."
        sys.exit(f"error: {filename}: {error.strerror}" if filename else f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
