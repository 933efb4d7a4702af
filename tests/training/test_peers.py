"""Who of a job's processes is found dead, failed or in the way, and who is left in peace."""

import pytest

from mmrlhf_jax.training import peers
from mmrlhf_jax.training.peers import ENDING, SILENT, STALL, Place, Sign, Watch, from_json, to_json


def sign(count, state="running", place=None, message=""):
    return Sign(count, "host-b", state, place or Place(7, "in the step", STALL), message)


def watch(*rounds):
    """A watch of process 0 that was told of process 1 what `rounds` say: (seconds, sign)."""
    seen = Watch(0)
    for now, told in rounds:
        seen.note({0: sign(int(now), place=Place(7, "in the step", STALL)), 1: told}, now)
    return seen


def test_a_process_that_lives_is_left_in_peace():
    seen = watch(*((float(t), sign(t, place=Place(t, "in the step", STALL))) for t in range(0, 600, 5)))
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
    assert seen.verdict(5 + ENDING) is None
    assert seen.verdict(6 + ENDING) == "process 1 on host-b ended with an error: the disk is full"


def test_a_step_that_nobody_comes_on_from_names_who_does_what():
    stuck = Place(7, "waiting for data", STALL)
    seen = watch(*((float(t), sign(t, place=stuck)) for t in range(0, 305, 5)))
    assert seen.verdict(STALL) is None
    assert "no process has come on for 301 s" in seen.verdict(STALL + 1)
    assert "process 1 on host-b: step 7, waiting for data" in seen.verdict(STALL + 1)


def test_compiling_evaluating_and_saving_may_take_any_time_and_the_others_wait():
    compiling = Place(7, "compiling", None)
    seen = watch(*((float(t), sign(t, place=compiling)) for t in range(0, 7200, 5)))
    assert seen.verdict(7196.0) is None


def test_a_step_is_given_many_times_what_steps_took(monkeypatch):
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.doing("in the step", 1, bounded=True)
    assert here.place == Place(1, "in the step", None)  # nothing is known yet
    peers.step_took(2.0)
    peers.doing("in the step", 2, bounded=True)
    assert here.place.limit == STALL
    peers.step_took(60.0)
    peers.doing("in the step", bounded=True)
    assert here.place == Place(2, "in the step", 1200.0)
    peers.doing("compiling")
    assert here.place.limit is None


@pytest.mark.parametrize("limit", [None, 300.0])
def test_a_sign_survives_its_way_through_the_coordinator(limit):
    told = sign(3, "failed", Place(2, "waiting for data", limit), 'a "message"\nof two lines')
    assert from_json(to_json(told)) == told
