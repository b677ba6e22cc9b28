import subprocess
import sys

import pytest

from tinyr2.core.memory import keep_freed_memory

SCRIPT = """
import resource, sys
import torch
from tinyr2.core.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    torch.empty(2**23).fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(2**23).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault():
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True,
                                  check=True).stdout)

    assert faults("default") > 5 * 2**25 / 2**21  # at least one for each huge page
    assert faults("keep") < 5
