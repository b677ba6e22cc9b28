import pytest

from tinyr2.core.errors import ConfigError
from tinyr2.data.countdown import Countdown, countdown
from tinyr2.data.generate import check_task, generate
from tinyr2.data.tasks import SignedSums, signed_sums


def test_a_task_is_found_by_its_name_and_takes_its_options():
    assert generate("signed_sums", {"terms": 2}, "train", 9, 4) == signed_sums(SignedSums(terms=2), "train", 9, 4)
    assert generate("countdown", {"numbers": 4}, "held_out", 9, 4) == \
        countdown(Countdown(numbers=4), "held_out", 9, 4)


@pytest.mark.parametrize(("task", "options", "said"), [
    ("countdwn", {}, "'countdwn' is no task; did you mean 'countdown'[?] there are signed_sums, countdown and "),
    ("gsm", {}, "'gsm' is no task; there are"),
    ("countdown", {"number": 4}, "options of countdown: number: unknown key; did you mean 'numbers'"),
    ("signed_sums", {"terms": 9}, "options of signed_sums: terms: .*less than or equal to 3 "),
    ("reasoning_gym/puzzle24", {}, "reasoning_gym/puzzle24: not among the tasks"),
])
def test_what_is_no_task_or_no_option_is_named(task, options, said):
    with pytest.raises(ConfigError, match=said):
        check_task(task, options)
