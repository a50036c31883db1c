"""A few seconds of the fuzzer; python -m tests.fuzz --minutes=10 tries longer. Kills are tests/test_safety.py's."""
import sys

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="it needs alarms")
def test_cases_drawn_at_random_hold(capsys):
    from tests import fuzz
    names = [name for name in fuzz.FAMILIES if name != "kills"]
    table = fuzz.fuzz(fuzz.Settings(cases=40), names)
    assert all(tried == held == 40 for tried, held, _ in table.values()), capsys.readouterr().out
