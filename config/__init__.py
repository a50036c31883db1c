"""Settings: a script's dataclass, then config files, then flags, all through one check.

    python train.py config/train_recite.py --batch_size=16 --learning_rate=1e-3
    python train.py --help

A script declares its settings once, as a dataclass whose fields have a type, a default and a
comment:

    @dataclass
    class Settings:
        batch_size: int = 32  # sequences per step

A config file is Python: assignments to those names, arithmetic allowed. Names that start with `_`
are its own.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake that a user can fix: printed as one line, without a traceback."""


REPO = Path(__file__).resolve().parent.parent


def load(settings_class, argv, doc="", start=None, typed="the command line"):
    """Build settings_class from its defaults (or from `start`, one of it), then each config file
    and --key=value in argv, in order; messages call the place where these were typed `typed`.

    Relative paths (fields of type Path) count from the repository in defaults and config files, and
    from the current folder in flags. Raises ValueError naming the setting, the value and what to
    do; --help prints every setting and leaves.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(settings_class, doc))
        raise SystemExit(0)
    fields = typing.get_type_hints(settings_class)
    values = dict(vars(start)) if start else {
        f.name: cast(f.name, f.default, fields[f.name], "its default", repo_folder())
        for f in dataclasses.fields(settings_class)}
    for arg in argv:
        if not arg.startswith("-"):
            path = find_config(arg)
            for name, value in read_config(path).items():
                check_name(name, fields, path)
                values[name] = cast(name, value, fields[name], path, repo_folder())
            continue
        name, equals, text = arg.lstrip("-").partition("=")
        check_name(name, fields, typed)
        if not equals:
            value = "True" if fields[name] is bool else "VALUE"
            raise UserError(f"--{name} has no value: write --{name}={value}")
        values[name] = cast(name, parse(text, fields[name]), fields[name], typed, Path())
    return settings_class(**values)


def repo_folder():
    """The repository, written as short as can be: nothing when it is the current folder."""
    return Path() if Path.cwd() == REPO else REPO


def local_path(text):
    """A path that is written as text: as it stands, or where there is no such file, in the
    repository."""
    # An unknown ~user stays as it is, and is then no such file.
    path = Path(os.path.expanduser(text))
    is_in_repo_only = os.path.exists(REPO / path) and not os.path.exists(path)
    return REPO / path if is_in_repo_only else path


def is_file(text):
    """Whether a text, however long, is the name of a file, here or in the repository."""
    return os.path.isfile(local_path(text))


def find_config(arg):
    """The config file meant by arg: in the current folder, or in the repository."""
    for path in (Path(arg), REPO / arg):
        if path.is_file() and path.suffix == ".py":
            return path
        if path.exists():
            raise UserError(f"{arg}: is no config file; settings are written --name=value, "
                             f"such as --checkpoint={arg}")
    known = [f"config/{p.name}" for p in sorted((REPO / "config").glob("*.py"))]
    close = difflib.get_close_matches(arg, known, 1)
    hint = f"did you mean {close[0]}?" if close else "settings are written --name=value"
    raise UserError(f"{arg}: no such config file; {hint}")


def read_config(path):
    """The names that a config file assigns, as a dict."""
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the user's Python: any error is possible, and exit()
        frames = traceback.extract_tb(error.__traceback__)
        in_file = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = in_file[-1] if in_file else "?"
        if isinstance(error, SyntaxError):
            line = error.lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def check_name(name, fields, source):
    """Raise ValueError, with a guess at what was meant, for a name that is no setting. A config
    file's first lines are commands, of which the last says which script it is for."""
    if name in fields:
        return
    close = difflib.get_close_matches(name, fields, 1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
    if isinstance(source, Path):
        commands = re.match(r"(# (?:python|torchrun) .+\n)*", source.read_text(encoding="utf-8"))
        if commands[1]:
            hint += f" (the file is for {commands[1][2:].strip()})"
    raise UserError(f"{source}: there is no setting {name!r}; {hint}")


def parse(text, wanted):
    """A flag's text as a Python value; what is not a literal, or is wanted as text, stays text."""
    options = typing.get_args(wanted) or (wanted,)
    if str in options or Path in options:
        return None if text == "None" and type(None) in options else text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)


def cast(name, value, wanted, source, base):
    """`value` as the type `wanted`, or a ValueError. int is a float too, 1e3 is an int; nothing
    else is bent. Relative paths start at the folder `base`."""
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    options = typing.get_args(wanted) if union else (wanted,)
    if type(None) in options and (value is None or value == "None"):
        return None
    for option in options:
        if option is Path and isinstance(value, (str, Path)) and str(value):
            if "\0" in str(value):
                raise UserError(f"{source}: {name}={value!r}: no path can have this character")
            return base / os.path.expanduser(value)
        if option is int and type(value) is float and value.is_integer():
            value = int(value)
        if option in (int, float) and type(value) is int:
            if abs(value) >= 2**63:  # more than any machine counts
                raise UserError(f"{source}: {name} is too large a number; use one below 2**63")
            return option(value)
        if option is tuple and isinstance(value, list):
            return tuple(value)
        if option is not type(None) and type(value) is (typing.get_origin(option) or option):
            return value
    names = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o))
                        for o in options)
    raise UserError(f"{source}: {name}={value!r} is of type {type(value).__name__}; "
                     f"{name} must be {names}")


def describe(settings_class, doc=""):
    """The text of --help: every setting with its default and the comment that stands behind it."""
    lines = [doc.strip(), "", "Settings (--name=value, or name = value in a config file):", ""]
    comments = {}
    for declared in reversed(settings_class.__mro__):  # a subclass has the last word
        if dataclasses.is_dataclass(declared):
            for line in inspect.getsource(declared).splitlines():
                name = line.partition(":")[0].strip()
                comments[name] = line.partition("  # ")[2]
    for field in dataclasses.fields(settings_class):
        default = f"  --{field.name}={field.default}"
        if len(default) > 60:  # an address
            lines.append(default)
            default = ""
        lines.append(f"{default:<34} {comments[field.name]}".rstrip())
    return "\n".join(lines)


def check(cfg, **allowed):
    """Raise UserError for the first setting outside its range. allowed: by name (low, high), either
    of which may be None, or a tuple of the strings that are allowed. Settings that cfg does not
    have, or that are None, are skipped."""
    for name, values in allowed.items():
        value = getattr(cfg, name, None)
        if value is None:
            continue
        if isinstance(values[0], str):
            if value not in values:
                raise UserError(f"{name}={value}: must be {' or '.join(values)}")
            continue
        low, high = values
        if (low is not None and value < low) or (high is not None and value > high):
            limits = [f"at least {low}"] if low is not None else []
            limits += [f"at most {high}"] if high is not None else []
            raise UserError(f"{name}={value}: must be {' and '.join(limits)}")


def run(main):
    """Call main with the command line as a script's last line: a user's mistake (ValueError,
    OSError) ends as one line on standard error and exit code 1, Ctrl-C as 130. Zsh and cmd know no
    comment behind a command that is typed: we leave it out."""
    argv = sys.argv[1:]
    if "#" in argv:
        argv = argv[:argv.index("#")]
    # A shell may have closed them (<&-, >&-), and a file would get their numbers.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # a notebook's; no reader is left
            stream.reconfigure(errors="replace")  # of a file on Windows: it has no emoji
    try:
        main(argv)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
