"""A few seconds of the fuzzer; python -m tests.fuzz --minutes=10 tries longer. Kills are tests/test_safety.py's."""
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it needs alarms, and a limit of memory")
def test_cases_drawn_at_random_hold(capsys):
    from tests import fuzz
    names = [name for name in fuzz.FAMILIES if name != "kills"]
    table = fuzz.fuzz(fuzz.Settings(cases=20), names)
    assert all(tried == held == 20 for tried, held, _ in table.values()), capsys.readouterr().out
