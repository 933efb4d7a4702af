"""Who of a job's processes is found dead, failed or in the way, and who is left in peace."""

import pytest

from mmrlhf_jax.training import peers
from mmrlhf_jax.training.metrics import Clock
from mmrlhf_jax.training.peers import ENDING, SILENT, STEP, Place, Sign, StuckConfig, Watch, from_json, to_json

STALL, LONG = 40.0, 300.0


def sign(count, state="running", place=None, message=""):
    return Sign(count, "host-b", state, place or Place(7, STEP, LONG), message)


def watch(*rounds):
    """A watch of process 0 that was told of process 1 what `rounds` say: (seconds, sign)."""
    seen = Watch(0)
    for now, told in rounds:
        seen.note({0: sign(int(now), place=Place(7, STEP, LONG)), 1: told}, now)
    return seen


def test_a_process_that_lives_is_left_in_peace():
    seen = watch(*((float(t), sign(t, place=Place(t, STEP, LONG))) for t in range(0, 600, 5)))
    assert seen.verdict(596.0) is None


def test_a_process_without_a_sign_of_life_is_named_with_its_step():
    seen = watch((0.0, sign(1)), *((float(t), sign(2)) for t in range(5, 60, 5)))
    assert seen.verdict(5 + SILENT) is None
    assert seen.verdict(56.0) == (
        "process 1 on host-b has not been heard of for 51 s, last at step 7, in the step: it died or hangs, look at "
        "its output"
    )


def test_a_coordinator_that_does_not_answer_is_told_of():
    seen = watch((0.0, sign(1)))
    assert seen.verdict(SILENT) is None
    assert "process 0, through which all talk, has not answered for 40 s" in seen.verdict(40.0)


def test_a_process_that_is_done_may_be_silent():
    assert watch(*((float(t), sign(2, "done")) for t in range(0, 200, 5))).verdict(196.0) is None


def test_a_failed_process_takes_the_others_along_after_they_had_time_to_find_out_themselves():
    seen = watch((0.0, sign(1)), (5.0, sign(2, "failed", message="the disk is full")))
    assert seen.told(5 + ENDING) is None
    assert seen.told(6 + ENDING).message == (
        "process 1 on host-b ended with an error: the disk is full; run the same command to go on"
    )
    assert seen.verdict(6 + ENDING) is None


def together(here, there, seconds):
    """A watch of process 0 that has been at `here`, as process 1 was at `there`, for so long."""
    seen = Watch(0)
    for now in range(seconds + 1):
        seen.note({0: Sign(now, "host-a", "running", here), 1: Sign(now, "host-b", "running", there)}, float(now))
    return seen


def test_a_process_that_waits_for_data_while_the_others_are_in_the_step_is_named():
    seen = together(Place(7, STEP, STALL), Place(7, "waiting for data", STALL), 45)
    assert seen.verdict(STALL) is None
    assert seen.verdict(STALL + 1) == (
        "process 1 on host-b, step 7: waiting for data for 41 s while others wait (process 0 on host-a, step 7: in the "
        "step). It is stuck, and its output says in which line; if that may take more than 40 s, raise --stuck.step"
    )
    assert seen.suspects() == [1]


def test_a_process_that_is_behind_is_named():
    seen = together(Place(8, STEP, STALL), Place(7, STEP, STALL), 45)
    assert seen.verdict(45.0).startswith("process 1 on host-b, step 7: in the step for 45 s while others wait (")


def test_where_nobody_is_behind_all_are_named():
    said = together(Place(7, STEP, STALL), Place(7, STEP, STALL), 45).verdict(45.0)
    assert said.startswith(
        "process 0 on host-a, step 7: in the step; process 1 on host-b, step 7: in the step for 45 s."
    )


def test_a_process_on_its_own_is_told_where_it_is():
    seen = Watch(0)
    for now in range(45):
        seen.note({0: Sign(now, "host-a", "running", Place(7, "waiting for data", STALL))}, float(now))
    assert seen.verdict(45.0).startswith("process 0 on host-a, step 7: waiting for data for 45 s. It is stuck")


def test_what_one_process_finds_the_others_say_too():
    seen = watch(
        (0.0, sign(1)), (5.0, sign(2, "stuck", message="process 1 on host-b, step 7: waiting for data for 36 s"))
    )
    assert seen.told(5.0).message == "process 1 on host-b, step 7: waiting for data for 36 s"
    assert watch((0.0, sign(1)), (5.0, sign(2, "ending", message="its lease has gone"))).told(5.0).state == "ending"
    assert watch((0.0, sign(1)), (5.0, sign(2))).told(5.0) is None


def test_the_wider_bound_of_any_process_counts(monkeypatch):
    monkeypatch.setattr(peers, "_here", peers._Here(step_limit=STALL, other_limit=3600.0))
    seen = together(Place(7, STEP, STALL), Place(7, "compiling", 3600.0), 3605)
    assert seen.verdict(3600.0) is None
    said = seen.verdict(3601.0)
    assert said.startswith("process 1 on host-b, step 7: compiling for 3601 s while others wait")
    assert said.endswith("if that may take more than 3600 s, raise --stuck.other")


def test_who_was_stopped_itself_does_not_blame_the_others():
    seen = watch((0.0, sign(1)))
    seen.resumed = 590.0
    assert seen.verdict(600.0) is None


def test_getting_to_the_first_step_may_take_any_time_and_the_others_wait():
    starting = Place(0, "starting", None)
    seen = watch(*((float(t), sign(t, place=starting)) for t in range(0, 7200, 5)))
    assert seen.verdict(7196.0) is None


@pytest.mark.parametrize("limits", [{"step": 1.0}, {"other": 0.0}, {"step": float("nan")}, {"other": float("nan")}])
def test_a_bound_shorter_than_signs_of_life_are_apart_is_refused(limits):
    with pytest.raises(ValueError, match=r"stuck\.step .* and stuck\.other .* at least 12"):
        StuckConfig(**limits)


def test_a_step_is_given_many_times_what_steps_took(monkeypatch):
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.doing(STEP, 1, bounded=True)
    assert here.place == Place(1, STEP, None)  # no limits
    peers.set_limits(StuckConfig(40.0, 3600.0))
    peers.doing(STEP, 1, bounded=True)
    assert here.place.limit == 3600.0  # nothing is known yet
    peers.step_took(2.0, work=1e9)
    peers.doing(STEP, 2, bounded=True)
    assert here.place.limit == 40.0
    peers.step_took(60.0, work=1e9)
    peers.doing(STEP, bounded=True)
    assert here.place == Place(2, STEP, 600.0)
    with peers.meanwhile("compiling"):
        assert here.place == Place(2, "compiling", 3600.0)
    assert here.place == Place(2, STEP, 600.0)
    peers.set_limits(StuckConfig(float("inf"), float("inf")))
    peers.doing(STEP, bounded=True)
    assert here.place.limit is None


@pytest.mark.parametrize("limit", [None, 300.0])
def test_a_sign_survives_its_way_through_the_coordinator(limit):
    told = sign(3, "failed", Place(2, "waiting for data", limit), 'a "message"\nof two lines')
    assert from_json(to_json(told)) == told


def test_what_comes_before_the_first_step_says_nothing_of_how_long_steps_take(monkeypatch):
    """A first step of many micro-batches may take minutes on a CPU: it has the wide bound."""
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.set_limits(StuckConfig(40.0, 3600.0))
    clock = Clock()
    clock.restart()  # the held-out groups were scored
    for _ in clock.waiting(["micro-batch"]):
        with clock.compiling("bucket 0"):
            assert here.place.limit == 3600.0
        assert here.place == Place(0, STEP, 3600.0)
    clock.lap(1e9)  # it compiled, too
    peers.doing(STEP, 2, bounded=True)
    assert here.place.limit == 3600.0
    clock.lap(1e9)
    peers.doing(STEP, 3, bounded=True)
    assert here.place.limit == 40.0


def test_a_step_that_computes_more_may_take_longer_and_so_may_the_next_which_waits_for_it(monkeypatch):
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.set_limits(StuckConfig(40.0, 3600.0))
    peers.step_begins(1, work=1e9)
    peers.step_took(5.0, work=1e9)
    limits = []
    for step, work in ((2, 1e9), (3, 8e9), (4, 1e9), (5, 1e9), (6, 1e8)):
        for _ in range(2):  # micro-batches
            peers.step_begins(step, work)
        limits.append(here.place.limit)
    assert limits == [50.0, 400.0, 400.0, 50.0, 50.0]
    peers.doing("waiting for data", bounded=True)
    assert here.place == Place(6, "waiting for data", 50.0)
