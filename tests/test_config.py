"""Settings: defaults, then config files, then flags; casts, errors, --help, paths and run()."""
import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from config import UserError
from tests.conftest import POSIX

REPO = Path(__file__).parent.parent


@dataclass
class Base:
    data_dir: Path = Path("data/toy")  # where the data is
    name: str = "base"  # any text


@dataclass
class Toy(Base):
    name: str = "plain"  # any other text
    prompt: str | None = None  # text, or nothing
    rate: float = 0.1  # how fast
    steps: int = 10  # how many
    limit: int | None = None  # at most; None: no limit
    resume: bool = False  # continue
    prompt_loss_iters: int = 0  # read_iters in version 1.0


def load(*argv):
    return config.load(Toy, list(argv))


def write(tmp_path, text, name="toy.py"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_files_override_defaults_and_flags_override_files_in_order(tmp_path):
    first = write(tmp_path, "steps = 1\nrate = 1.5\nname = 'first'", "first.py")
    second = write(tmp_path, "rate = 2.5\nname = 'second'", "second.py")
    assert load() == Toy()
    toy = load(first, second, "--name=flag", "--limit=3", "--limit=4")
    assert (toy.steps, toy.rate, toy.name, toy.limit, toy.resume) == (1, 2.5, "flag", 4, False)


def test_loading_from_an_instance_changes_only_what_is_assigned():
    start = Toy(steps=7, data_dir=Path("here"))
    assert config.load(Toy, ["--rate=2"], start=start) == dataclasses.replace(start, rate=2.0)


@pytest.mark.parametrize("flag, wanted", [
    ("--rate=1", 1.0), ("--rate=-2.5e-3", -0.0025), ("--steps=1e3", 1000), ("--steps=-7", -7), ("--steps=1_000", 1000),
    ("--limit=5", 5), ("--limit=None", None), ("--limit=none", None), ("--resume=True", True), ("--resume=true", True),
    ("--resume=FALSE", False), ("--name=a=b=c", "a=b=c"), ("--name=", ""), ("--name=5", "5"), ("--name=None", "None"),
    ("--prompt=What is 2 + 2?", "What is 2 + 2?"), ("--prompt=None", None), ("--prompt=7", "7"), ("--prompt=[1, 2]", "[1, 2]"),
])
def test_a_flag_is_converted_to_the_type_of_its_setting(flag, wanted):
    value = getattr(load(flag), flag.lstrip("-").partition("=")[0])
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("line, name, wanted", [
    ("rate = 1", "rate", 1.0), ("steps = 1e3", "steps", 1000), ("steps = 8 * 1024 // 16", "steps", 512),
    ("limit = 3\nlimit = None", "limit", None), ("_half = 4\nsteps = _half * 2", "steps", 8),
    ("import math\nrate = math.sqrt(0.25)", "rate", 0.5), ("name = 'naïve 👋'", "name", "naïve 👋"),
    ("steps, limit = 3, 4", "limit", 4), ("resume = 1 > 0", "resume", True),
])
def test_a_config_file_is_python(tmp_path, line, name, wanted):
    value = getattr(load(write(tmp_path, line)), name)
    assert value == wanted and type(value) is type(wanted)


def test_settings_of_version_1_0_load_under_their_new_name(tmp_path):
    assert load("--read_iters=3").prompt_loss_iters == 3
    assert load(write(tmp_path, "read_iters = 4")).prompt_loss_iters == 4


@pytest.mark.parametrize("arg, message", [
    ("--stepps=3", "there is no setting 'stepps'; did you mean 'steps'?"), ("--steps=many", "steps='many' is of type str, not int"),
    ("--zzzqqq=1", "there is no setting 'zzzqqq'; --help lists all settings"), ("--steps=1.5", "steps=1.5 is of type float, not int"),
    ("--steps=True", "steps=True is of type bool, not int"), ("--rate=None", "rate=None is of type NoneType, not float"),
    ("--resume=1", "resume=1 is of type int, not bool"), ("--limit=x", "limit='x' is of type str, not int or None"),
    ("--data_dir=", "data_dir='' is of type str, not Path"), ("--resume", "has no value; write --resume=VALUE"),
    ("config/train_recitee.py", "not a config file (config/ has them); settings are --NAME=VALUE"),
    ("README.md", "not a config file (config/ has them); settings are --NAME=VALUE"),
])
def test_a_wrong_argument_gives_a_one_line_error_with_what_to_do(arg, message):
    source = "/set" if "=" in arg else arg
    with pytest.raises(UserError, match=f"^{re.escape(f'{source}: {message}')}$"):
        config.load(Toy, [arg], typed="/set")


@pytest.mark.parametrize("text, message", [("rates = 3", ": there is no setting 'rates'; did you mean 'rate'?"), ("steps = '5'", ": steps='5' is of type str, not int")])
def test_a_wrong_setting_in_a_config_file_names_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'toy.py') + message)}$"):
        load(write(tmp_path, text))


@pytest.mark.parametrize("text, error", [("rate = = 2", SyntaxError), ("rate = 1 / 0", ZeroDivisionError)])
def test_python_errors_in_a_config_file_keep_their_traceback(tmp_path, text, error):
    pytest.raises(error, load, write(tmp_path, text))


@settings(max_examples=100, deadline=None, database=None)
@given(st.sampled_from([field.name for field in dataclasses.fields(Toy)]), st.text(st.characters(exclude_characters="\0"), max_size=20))
def test_any_text_after_a_flag_is_a_value_or_a_user_error(name, text):
    try:
        assert isinstance(load(f"--{name}={text}"), Toy)
    except UserError as error:
        assert name in str(error)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--steps=3", "--help"]])
def test_help_prints_every_setting_with_its_default_and_comment(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        config.load(Toy, argv, "A toy.")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert caught.value.code == 0 and lines[0] == "A toy."
    assert lines[-8:] == [
        f"--data_dir={Path('data/toy')} where the data is", "--name=plain any other text",
        "--prompt=None text, or nothing", "--rate=0.1 how fast", "--steps=10 how many", "--limit=None at most; None: no limit",
        "--resume=False continue", "--prompt_loss_iters=0 read_iters in version 1.0"]


def test_a_path_may_start_with_the_home_folder():
    assert load("--data_dir=~/x").data_dir == Path.home() / "x" == config.local_path("~/x")
    assert load().data_dir == Path("data/toy") and load("--data_dir=mine").data_dir == Path("mine")


@pytest.mark.parametrize("allowed, message", [
    ({"steps": (1, None), "rate": (0, 1), "limit": (1, 2), "unknown": (1, 2), "name": ("plain", "other")}, None),
    ({"steps": (11, None)}, "steps=10: must be at least 11"), ({"steps": (None, 9)}, "steps=10: must be at most 9"),
    ({"name": ("a", "b")}, "name=plain: must be a or b"),
])
def test_settings_outside_their_range_are_refused(allowed, message):
    with pytest.raises(UserError, match=f"^{message}$") if message else contextlib.nullcontext():
        config.check(Toy(), **allowed)


@pytest.mark.parametrize("error, code", [
    (UserError("steps=3: bad"), "error: steps=3: bad"), (OSError("no such file: x"), "error: no such file: x"),
    (FileNotFoundError(2, "No such file or directory", "x"), "error: x: No such file or directory"), (KeyboardInterrupt(), 130)])
def test_a_user_error_exits_with_one_line_and_ctrl_c_with_130(error, code):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as caught:
        config.run(main)
    assert caught.value.code == code


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="ours"):
        config.run(lambda argv: int("ours"))


@POSIX
def test_a_printed_command_can_be_pasted_into_a_shell():
    words = ["printf", "%s|", "--out_dir=my data/Zoe's $HOME", "*", "a\\b"]
    assert subprocess.check_output(config.shell_command(*words), shell=True, text=True) == "|".join([*words[2:], ""])
    assert config.shell_command("python", "chat.py", "--checkpoint=out/a_b-1/best.pt") == "python chat.py --checkpoint=out/a_b-1/best.pt"


def test_help_works_without_docstrings():
    code = """import contextlib, data.tokenizer, tests.bench, tests.exercises, train
for main, *argv in (data.tokenizer.main,), (tests.exercises.main,), (tests.bench.main, "--help"), (train.main, "--help"):
    with contextlib.suppress(SystemExit):
        main(argv)"""
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "--n_layer=4 " in done.stdout


def test_a_comment_after_a_command_is_ignored(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["a.py", "--prompt=What is # for?", "#", "a", "minute"])
    config.run(seen.append)
    assert seen == [["--prompt=What is # for?"]]


def test_a_character_that_the_output_cannot_encode_becomes_a_question_mark(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    config.run(lambda argv: print("na\xefve \U0001f44b"))
    assert sys.stdout.buffer.getvalue().split() == [b"na\xefve", b"?"]


@POSIX
@pytest.mark.parametrize("more", [[], ["now"]])
def test_a_script_ends_quietly_after_a_broken_pipe(more):
    code = "import config\nconfig.run(lambda argv: print('x' * 10, flush=len(argv) > 1))"
    with subprocess.Popen([sys.executable, "-c", code, "a", *more], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": ""}) as script:
        script.stdout.close()
        assert script.stderr.read() == b"" and script.wait() == 1
