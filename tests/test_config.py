"""Settings: defaults, then config files, then flags; casts, errors, --help and paths."""
import dataclasses
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import config
import train

REPO = Path(__file__).parent.parent


@dataclass
class Toy:
    data_dir: Path = Path("data/toy")  # where the data is
    name: str = "plain"  # any text
    prompt: str | None = None  # text, or nothing
    rate: float = 0.1  # how fast
    steps: int = 10  # how many
    limit: int | None = None  # at most; None: no limit
    resume: bool = False  # go on
    betas: tuple = (0.9, 0.95)  # two numbers


def load(*argv):
    return config.load(Toy, list(argv))


def write(tmp_path, text, name="toy.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(*argv):
    with pytest.raises(ValueError) as caught:
        load(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_arguments_all_is_default():
    toy = load()
    assert (toy.name, toy.prompt, toy.rate, toy.steps, toy.resume) == ("plain", None, 0.1, 10, False)


def test_files_beat_defaults_later_files_beat_earlier_and_flags_beat_files(tmp_path):
    first = write(tmp_path, "steps = 1\nrate = 1.5\nname = 'first'", "first.py")
    second = write(tmp_path, "rate = 2.5\nname = 'second'", "second.py")
    toy = load(first, second, "--name=flag")
    assert (toy.steps, toy.rate, toy.name, toy.resume) == (1, 2.5, "flag", False)


def test_the_last_of_two_equal_flags_counts():
    assert load("--steps=3", "--steps=4").steps == 4


@pytest.mark.parametrize("flag, wanted", [
    ("--rate=1", 1.0), ("--rate=-2.5e-3", -0.0025), ("--rate=1e-3", 0.001), ("--steps=1e3", 1000),
    ("--steps=-7", -7), ("--steps=1_000", 1000), ("--limit=5", 5), ("--limit=None", None),
    ("--limit=none", None), ("--resume=True", True), ("--resume=true", True),
    ("--resume=False", False), ("--resume=FALSE", False),
    ("--name=a=b=c", "a=b=c"), ("--name=", ""), ("--name=5", "5"), ("--name=None", "None"),
    ("--name=True", "True"), ("--prompt=What is 2 + 2?", "What is 2 + 2?"), ("--prompt=None", None),
    ("--betas=(0.8, 0.9)", (0.8, 0.9)), ("--betas=[1, 2]", (1, 2)),
])
def test_a_flag_becomes_the_value_of_its_type(flag, wanted):
    value = getattr(load(flag), flag.lstrip("-").partition("=")[0])
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("text", ["7", "3, 4", "[1, 2]", "'quoted'", "True"])
def test_a_flag_for_text_or_none_stays_the_text_that_was_typed(text):
    assert load(f"--prompt={text}").prompt == text


@pytest.mark.parametrize("line, name, wanted", [
    ("rate = 1", "rate", 1.0), ("steps = 1e3", "steps", 1000), ("steps = 8 * 1024 // 16", "steps", 512),
    ("betas = [0.8, 0.9]", "betas", (0.8, 0.9)), ("limit = 3\nlimit = None", "limit", None),
    ("_half = 4\nsteps = _half * 2", "steps", 8), ("import math\nrate = math.sqrt(0.25)", "rate", 0.5),
    ("name = 'naïve 👋'", "name", "naïve 👋"), ("resume = 1 > 0", "resume", True),
])
def test_a_config_file_computes(tmp_path, line, name, wanted):
    value = getattr(load(write(tmp_path, line)), name)
    assert value == wanted and type(value) is type(wanted)


def test_a_wrong_name_in_a_flag_is_refused_with_a_guess():
    message = refused("--stepps=3")
    assert "'stepps'" in message and "did you mean 'steps'?" in message


def test_a_wrong_name_in_a_file_is_refused_with_a_guess_and_the_file(tmp_path):
    path = write(tmp_path, "rates = 3")
    message = refused(path)
    assert path in message and "'rates'" in message and "did you mean 'rate'?" in message


def test_a_name_like_no_other_points_to_help():
    message = refused("--zzzzqqqq=1")
    assert "zzzzqqqq" in message and "--help" in message


@pytest.mark.parametrize("flag, parts", [
    ("--steps=many", ("steps", "'many'", "str", "int")), ("--steps=1.5", ("steps", "1.5", "float", "int")),
    ("--steps=True", ("steps", "True", "bool", "int")), ("--rate=fast", ("rate", "'fast'", "str", "float")),
    ("--rate=None", ("rate", "None", "NoneType", "float")), ("--resume=1", ("resume", "1", "int", "bool")),
    ("--limit=x", ("limit", "'x'", "str", "int or None")), ("--betas=3", ("betas", "3", "int", "tuple")),
    ("--data_dir=", ("data_dir", "''", "str", "Path")),
])
def test_a_wrong_type_in_a_flag_names_setting_value_and_type(flag, parts):
    message = refused(flag)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("line, parts", [
    ("steps = '5'", ("steps", "'5'", "str", "int")), ("name = 5", ("name", "5", "int", "str")),
    ("rate = True", ("rate", "True", "bool", "float")),
])
def test_a_wrong_type_in_a_file_names_the_file_too(tmp_path, line, parts):
    path = write(tmp_path, line)
    message = refused(path)
    assert all(part in message for part in (path, *parts)), message


@pytest.mark.parametrize("text, number, kind", [
    ("steps = 3\nrate = = 2\n", 2, "SyntaxError"), ("steps = 3\n\nrate = 1 / 0\n", 3, "ZeroDivisionError"),
    ("_f = lambda: missing\n_x = 1\nsteps = _f()\n", 1, "NameError"),
    ("rate = 1\nimport no_such_module_here\n", 2, "ModuleNotFoundError"),
    ("rate = 1\nexit()\n", 2, "SystemExit"), ("import sys\nsys.exit(0)\n", 2, "SystemExit"),
])
def test_an_error_in_a_config_file_is_one_line_with_file_and_line_number(tmp_path, text, number, kind):
    path = write(tmp_path, text)
    message = refused(path)
    assert f"{path}, line {number}:" in message and kind in message


def test_a_missing_config_file_is_named_with_a_guess():
    message = refused("config/train_recitee.py")
    assert "config/train_recitee.py" in message and "did you mean config/train_recite.py?" in message


def test_a_config_file_for_another_script_says_for_which(tmp_path):
    path = write(tmp_path, "# python prepare.py\n# python other.py config/mine.py\n# It is mine.\nstps = 3")
    assert refused(path).endswith("did you mean 'steps'? (the file is for python other.py config/mine.py)")


def test_a_file_that_is_no_config_file_is_named_with_the_flag(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"PK")
    assert f"--checkpoint={tmp_path / 'best.pt'}" in refused(str(tmp_path / "best.pt"))
    assert "no config file" in refused(str(tmp_path))


def test_a_flag_without_a_value_says_how_to_write_it():
    assert "--resume=" in refused("--resume")


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([field.name for field in dataclasses.fields(Toy)]), st.text(max_size=20))
@example("steps", "{[1]}")
@example("data_dir", "~no-such-user/x")
def test_whatever_stands_behind_a_flag_gives_a_setting_or_a_value_error(name, text):
    try:
        assert isinstance(load(f"--{name}={text}"), Toy)
    except ValueError as error:
        assert name in str(error)


def test_help_shows_every_setting_with_default_and_comment_and_leaves(capsys):
    for argv in (["--help"], ["-h"], ["--steps=3", "--help"]):
        with pytest.raises(SystemExit) as caught:
            config.load(Toy, argv, "A toy.")
        assert caught.value.code == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == "A toy."
        assert lines[-8:] == [
            f"--data_dir={Path('data/toy')} where the data is", "--name=plain any text",
            "--prompt=None text, or nothing", "--rate=0.1 how fast", "--steps=10 how many",
            "--limit=None at most; None: no limit", "--resume=False go on", "--betas=(0.9, 0.95) two numbers"]


def test_help_of_train_has_every_setting_and_its_comment_from_the_source():
    shown = {line.split("=")[0].strip(): line for line in config.describe(train.Settings).splitlines()}
    source = (REPO / "train.py").read_text(encoding="utf-8")
    source = source[source.index("class LoopSettings"):].splitlines()  # the base class has most of them
    for field in dataclasses.fields(train.Settings):
        comment = next(s for s in source if s.startswith(f"    {field.name}: ")).partition("  # ")[2]
        line = shown[f"--{field.name}"]
        assert comment and line.endswith(comment) and f"--{field.name}={field.default} " in line + " "


def test_paths_count_from_the_repository_in_defaults_and_files_and_from_here_in_flags(tmp_path, monkeypatch):
    path = write(tmp_path, "data_dir = 'data/other'")
    monkeypatch.chdir(tmp_path)
    assert load().data_dir.resolve() == (REPO / "data/toy").resolve()
    assert load(path).data_dir.resolve() == (REPO / "data/other").resolve()
    assert load("--data_dir=mine").data_dir.resolve() == (tmp_path / "mine").resolve()
    assert load(path, "--data_dir=mine").data_dir.resolve() == (tmp_path / "mine").resolve()


def test_paths_are_short_when_the_current_folder_is_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)
    assert load().data_dir == Path("data/toy")


def test_absolute_paths_and_the_home_folder_stay_where_they_are(tmp_path, monkeypatch):
    for home in ("HOME", "USERPROFILE"):  # of Windows
        monkeypatch.setenv(home, str(tmp_path))
    path = write(tmp_path, f"data_dir = {str(tmp_path / 'far')!r}")
    assert load(path).data_dir == tmp_path / "far"
    assert load("--data_dir=~/near").data_dir == tmp_path / "near"
    assert config.local_path("~") == tmp_path
    assert config.local_path("~no_such_user/x") == Path("~no_such_user/x")  # which is then no such file


def test_config_files_are_found_in_the_current_folder_and_else_in_the_repository(tmp_path, monkeypatch):
    write(tmp_path, "steps = 77", "here.py")
    monkeypatch.chdir(tmp_path)
    assert load("here.py").steps == 77
    chat = config.load(train.Settings, ["config/train_recite.py"])
    assert chat.data_dir.resolve() == (REPO / "data/instruction").resolve()


def test_a_script_runs_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, str(REPO / "prepare_alpaca.py"), "--help"], cwd=tmp_path,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    assert "--val_fraction=" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(ValueError("bad steps=3"), "error: bad steps=3"),
                                         (FileNotFoundError("no such file: x"), "error: no such file: x"),
                                         (KeyboardInterrupt(), 130)])
def test_run_ends_a_users_mistake_as_one_line_and_an_interrupt_as_130(error, code):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as caught:
        config.run(main)
    assert caught.value.code == code


def test_a_comment_behind_a_command_is_left_out(monkeypatch):
    """As zsh and cmd hand it over: README.md's "python -m data.rules      # a second"."""
    seen = []
    for argv in (["a.py", "--steps=3", "#", "a", "minute"], ["a.py", "--prompt=What is # for?"], ["a.py", "#"]):
        monkeypatch.setattr(sys, "argv", argv)
        config.run(seen.append)
    assert seen == [["--steps=3"], ["--prompt=What is # for?"], []]


def test_output_that_cannot_have_a_character_gets_a_question_mark(monkeypatch):
    """As a file's encoding on Windows cannot: python train.py ... > log.txt."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["a.py"])
    config.run(lambda argv: print("na\xefve \U0001f44b"))
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().split() == [b"na\xefve", b"?"]


def test_run_lets_an_error_of_our_own_through():
    def main(argv):
        raise TypeError("ours")
    with pytest.raises(TypeError, match="ours"):
        config.run(main)


@pytest.mark.parametrize("flag, told", [("--steps=1000000000000000000000", "steps is too large"),
                                        ("--steps=-1e30", "steps is too large"), ("--rate=1" + "0" * 400, "rate is too large"),
                                        ("--data_dir=a\0b", "data_dir='a\\x00b': no path")])
def test_values_that_no_machine_can_use_are_refused_by_name(flag, told):
    assert told in refused(flag)


def test_memory_that_runs_out_is_one_line(monkeypatch):
    def main(argv):
        raise MemoryError
    with pytest.raises(SystemExit, match="^error: out of memory; use"):
        config.run(main)


@pytest.mark.parametrize("script", ["train", "finetune", "chat", "prepare_alpaca", "data/text", "data/fineweb", "data/hellaswag",
                                    "data/rules"])
def test_config_is_the_first_that_a_script_imports(script):
    text = (REPO / f"{script}.py").read_text(encoding="utf-8")
    first = next(line for line in text.split('"""')[2].splitlines() if line)
    assert first.startswith("import config ")


@pytest.mark.parametrize("problem, silent", [("_thread.interrupt_main(); time.sleep(9)", True), ("1 / 0", False)])
def test_ctrl_c_while_importing_leaves_no_traceback(problem, silent):
    program = [sys.executable, "-c", f"import config, _thread, time\n{problem}"]
    done = subprocess.run(program, cwd=REPO, capture_output=True, restore_signals=True)
    assert (done.stderr == b"") == silent and done.returncode, done


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's")
def test_streams_that_the_shell_closed_are_empty_ones(tmp_path):
    program = [sys.executable, "-c", "import sys, config\ndef main(argv):\n    print(sys.stdin.read(), sys.stdout.isatty())\n"
               f"    open({str(tmp_path / 'a')!r}, 'w').close()\nconfig.run(main)"]
    assert subprocess.run(program, cwd=REPO, preexec_fn=lambda: os.closerange(0, 3)).returncode == 0
    assert (tmp_path / "a").read_text() == ""
