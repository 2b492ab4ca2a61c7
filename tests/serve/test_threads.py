"""Set-up outside of the engine's thread leaves no threads of torch's behind, which would slow the engine's."""

import subprocess
import sys

import pytest

from softprompt.serve.engine.threads import call_in_own_thread

SCRIPT = """
import os, time, torch
from softprompt.serve.engine.threads import call_in_own_thread
torch.set_num_threads(4)
values = torch.empty(2**22)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
inside = call_in_own_thread(lambda: (values.sin(), count())[1])
deadline = time.monotonic() + 20
while count() > before and time.monotonic() < deadline:  # the system ends them a moment later
    time.sleep(0.01)
between = count()
values.sin()
print(inside - before, between - before, count() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchs_threads_end_with_the_call() -> None:
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    inside, between, own = map(int, output.split())
    assert inside == 4  # the thread itself, and three of torch's
    assert between == 0
    assert own == 3  # what a call in this thread leaves behind


def test_result_and_exception_are_those_of_the_function() -> None:
    assert call_in_own_thread(lambda: 7) == 7
    with pytest.raises(KeyError, match="missing"):
        call_in_own_thread(lambda: {}["missing"])
