"""Forked programs have arguments, folder, environment, output and exit status of their own, and can be killed."""

import json
import os
import signal
import time

import pytest

from tests.forked import Forked, run, run_ranks

SAY = """
import atexit, json, os, sys
atexit.register(print, "the end")
print(json.dumps([__name__, sys.argv[1:], os.getcwd(), os.environ.get("SAID"), os.getpid(), os.getpgid(0)]))
print("an error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
RANKS = """
import os, time
if os.environ["RANK"] == "1":
    raise ValueError("this rank is wrong")
time.sleep(100)
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        (tmp_path / "program.py").write_text(text)
        return tmp_path / "program.py"

    return write


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_has_what_is_its_own(program, tmp_path, status):
    process = Forked(program(SAY), status, "b c", folder=tmp_path, environment={"SAID": "so"}, own_session=True)
    output, errors = process.communicate(60)
    said, end = output.splitlines()
    assert json.loads(said) == ["__main__", [str(status), "b c"], str(tmp_path), "so", process.pid, process.pid]
    assert (end, errors, process.returncode) == ("the end", "an error\n", status)
    assert "SAID" not in os.environ and process.pid != os.getpid()
    assert "'no'" in run(program("raise KeyError('no')")).stderr


def test_a_program_can_be_killed(program):
    process = Forked(program("import time\ntime.sleep(100)"))
    assert process.poll() is None
    process.kill()
    process.wait(60)
    assert process.returncode == -signal.SIGKILL


def test_ranks_end_with_the_first_that_fails(program):
    start = time.monotonic()
    with pytest.raises(AssertionError, match="this rank is wrong"):
        run_ranks([{"RANK": "0"}, {"RANK": "1"}], program(RANKS))
    assert time.monotonic() - start < 60


def test_what_only_a_start_reads_is_refused(program):
    with pytest.raises(AssertionError, match=r"\['HF_HOME'\] are read when Python or huggingface_hub starts"):
        run(program(""), environment={"HF_HOME": "elsewhere"})
