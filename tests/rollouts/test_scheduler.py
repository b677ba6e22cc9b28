from hypothesis import given
from hypothesis import strategies as st

from tinyr2.rollouts.scheduler import Entry, Scheduler


def test_equal_prompts_that_stand_side_by_side_enter_together():
    scheduler = Scheduler([("a", 3), ("a", 3), ("b", 2), ("a", 3)], max_rows=8)
    assert scheduler.admit() == [Entry((0, 1), 3), Entry((2,), 2), Entry((3,), 3)]
    assert scheduler.seated == [0, 1, 2, 3]
    assert scheduler.admit() == []


def test_a_group_that_does_not_fit_is_split():
    scheduler = Scheduler([("a", 3)] * 5, max_rows=3)
    assert scheduler.admit() == [Entry((0, 1, 2), 3)]
    scheduler.leave([2])
    assert scheduler.seated == [2]
    assert scheduler.admit() == [Entry((3, 4), 3)]


def test_the_door_stays_shut_until_a_quarter_of_the_seats_is_free():
    scheduler = Scheduler([(i, 1) for i in range(40)], max_rows=16)
    assert len(scheduler.admit()) == 16
    scheduler.leave(range(13))  # three have left
    assert scheduler.admit() == []
    scheduler.leave(range(12))
    assert [e.requests for e in scheduler.admit()] == [(16,), (17,), (18,), (19,)]


def test_the_last_ones_need_not_wait_for_more_seats_than_they_take():
    scheduler = Scheduler([(i, 1) for i in range(17)], max_rows=16)
    scheduler.admit()
    scheduler.leave(range(15))
    assert scheduler.admit() == [Entry((16,), 1)]


def test_no_more_prompt_tokens_enter_at_once_than_fit_but_for_a_longer_prompt():
    scheduler = Scheduler([("a", 6), ("a", 6), ("b", 5), ("c", 30), ("d", 1)], max_rows=8, max_prefill=11)
    assert scheduler.admit() == [Entry((0, 1), 6), Entry((2,), 5)]
    assert scheduler.admit() == [Entry((3,), 30)]
    assert scheduler.admit() == [Entry((4,), 1)]


def test_nobody_waits_where_there_is_nobody():
    assert not Scheduler([], max_rows=4).busy


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=30), st.integers(1, 6), st.integers(1, 20),
       st.randoms())
def test_everyone_is_served_once_within_the_seats(requests, max_rows, max_prefill, rng):
    prompts = [((key, size), size) for key, size in requests]
    scheduler, served = Scheduler(prompts, max_rows, max_prefill), []
    while scheduler.busy:
        entries = scheduler.admit()
        tokens = sum(e.tokens for e in entries)
        assert tokens <= max_prefill or len(entries) == 1
        assert all(prompts[r][0] == prompts[e.requests[0]][0] for e in entries for r in e.requests)
        assert len(scheduler.seated) <= max_rows
        if entries:
            continue
        assert scheduler.seated  # a step is only asked for where someone sits
        stay = [slot for slot in range(len(scheduler.seated)) if rng.random() < 0.5]
        rng.shuffle(stay)
        served += [r for slot, r in enumerate(scheduler.seated) if slot not in stay]
        scheduler.leave(stay)
    assert sorted(served) == list(range(len(prompts)))
