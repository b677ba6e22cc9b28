"""Lists of known faults and of the tests that guard each, as they stand in the docstring of a test module.

In: a text in which a fault is a line with two spaces before it and a colon at its end, and each of its guards a line
below with four, as `folder/test_file.py::test_name`; other lines are headings. Out: the guards; whether they exist.
"""

import importlib
import re

_GUARD = re.compile(r"^    (\S+)\.py::(\w+)$", re.MULTILINE)


def guards_of(text: str) -> list[tuple[str, str]]:
    """(file, name of the test) of every guard, in order, each once; files without their ending, from tests/."""
    return list(dict.fromkeys(_GUARD.findall(text)))


def assert_exists(file: str, name: str) -> None:
    """That tests/`file`.py has a test of this name."""
    module = importlib.import_module("tests." + file.replace("/", "."))
    assert callable(getattr(module, name))


def assert_listed(text: str, faults: int) -> None:
    """That there are so many faults, that each is followed by a guard, and that no guard is misspelled."""
    lines = [line for line in text.splitlines() if line]
    told = [i for i, line in enumerate(lines) if re.match(r"  \S", line)]
    assert len(told) == faults
    for i in told:
        assert lines[i].endswith(":") and "::" in lines[i + 1]
    assert len(_GUARD.findall(text)) == sum("::" in line for line in lines)
