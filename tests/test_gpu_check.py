"""tests/gpu_check.py runs on a CPU at toy size, and an error in one row does not stop the others."""
import functools

import pytest
import torch

from tests import gpu_check
from tests.processes import exit_codes, start_ranks
from tests.toy_runs import make_quick, quick

__all__ = ["quick"]  # a fixture


def table(capsys, monkeypatch):
    """Run the check at toy size; return {what: result} of the table that it prints."""
    monkeypatch.setattr(gpu_check, "SIDE", 64)
    try:
        gpu_check.main(["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--merges=300",
                        "--rows=30", "--batch_size=2", "--steps=1", "--new_tokens=4"])
    finally:
        lines = capsys.readouterr().out.splitlines()
        table.rows = dict(line.strip("| ").split(" | ") for line in lines if line.startswith("| "))
    return table.rows


def test_every_row_has_a_result(monkeypatch, capsys, tmp_path):
    def python(*argv):
        """Start torchrun's two processes faster."""
        assert exit_codes(*start_ranks("train", argv[argv.index("train.py") + 1:], tmp_path, make_quick)) == [0, 0]

    monkeypatch.setattr(gpu_check, "python", python)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # needs no C compiler
    results = table(capsys, monkeypatch)
    assert list(results) == ["what", *gpu_check.ROWS]
    for what, result in list(results.items())[1:]:
        wanted = {"resumed": "same losses: yes, exactly", "two": "same losses: yes, "}
        assert next((text for start, text in wanted.items() if what.startswith(start)), " tokens/s") in result
        assert ("times as fast" in result) == what.startswith("nanoGPT")


def test_an_error_is_in_its_row_and_in_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "ROWS", {
        "one": lambda check: int("a | b"), "two": lambda check: "done",
        "three": lambda check: gpu_check.compare([{"loss": 2.1}], [{"loss": 2.0}])})
    with pytest.raises(SystemExit) as ended:
        table(capsys, monkeypatch)
    assert ended.value.code == 1
    assert table.rows == {"what": "result", "one": "failed: ValueError: invalid literal for int() with base 10: 'a / b'", "two": "done",
                          "three": "failed: RuntimeError: the losses differ by 5.0%"}
