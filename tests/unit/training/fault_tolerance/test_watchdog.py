import threading
import time

import pytest
import torch
from torch import nn

from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker, Hang, Watchdog


class Alarm:
    """Keeps what a watchdog told, and lets a test wait for it."""

    def __init__(self):
        self.hangs: list[Hang] = []
        self.rang = threading.Event()

    def __call__(self, hang: Hang):
        self.hangs.append(hang)
        self.rang.set()


@pytest.fixture
def alarm():
    return Alarm()


def test_tells_where_a_step_hangs(alarm):
    activity = ActivityTracker()
    watchdog = Watchdog(activity, 0.2, alarm)
    watchdog.begin(7)
    with activity.during("forward"), activity.during("a read that does not end"):
        assert alarm.rang.wait(30)  # the main thread hangs here
    (hang,) = alarm.hangs
    assert (hang.step, hang.what, hang.activity) == (7, "step 7", "a read that does not end")
    assert hang.seconds >= 0.2
    assert hang.line.startswith("wait (")
    assert "test_tells_where_a_step_hangs" in hang.stacks
    assert "thread watchdog" in hang.stacks
    watchdog.close()


@pytest.mark.slow
def test_steps_that_end_in_time_are_no_hang(alarm):
    watchdog = Watchdog(ActivityTracker(), 1.0, alarm)
    for step in range(6):
        watchdog.begin(step)
        time.sleep(0.2)
    assert not alarm.rang.is_set()
    watchdog.close()
    assert not alarm.rang.wait(0.5)


@pytest.mark.slow
def test_a_pause_is_not_timed_and_the_time_starts_anew_after_it(alarm):
    watchdog = Watchdog(ActivityTracker(), 1.0, alarm)
    watchdog.begin(1)
    watchdog.pause()
    assert not alarm.rang.wait(1.3)
    watchdog.begin(2, "a validation")
    assert alarm.rang.wait(30)
    assert (alarm.hangs[0].step, alarm.hangs[0].what) == (2, "a validation")


def test_tracker_follow_the_modules_into_forward_and_recomputation():
    activity, seen = ActivityTracker(), []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(activity.activity)
            return x * x

    inner = Spy()
    outer = nn.Sequential(nn.Linear(2, 2), inner)
    activity.track_modules({"adapter": outer, "adapter.spy": inner})
    with activity.during("forward"):
        loss = torch.utils.checkpoint.checkpoint(outer, torch.ones(1, 2), use_reentrant=False).sum()
        assert activity.activity == "forward"
    with activity.during("backward"):
        loss.backward()
    assert seen == ["forward in adapter.spy", "backward in adapter.spy"]
    assert activity.activity == "starting"


def test_tracker_wait_for_items_and_come_back():
    activity, seen, waited = ActivityTracker(), [], []

    def items():
        for item in range(2):
            time.sleep(0.01)
            seen.append(activity.activity)
            waited.append(activity.waited_s)
            yield item

    assert [(item, activity.activity) for item in activity.waiting_for_data(items())] == [
        (0, "starting"),
        (1, "starting"),
    ]
    assert seen == ["waiting for data"] * 2
    assert all(0.01 <= seconds < 5 for seconds in waited)
    assert activity.waited_s == 0.0


def test_an_error_inside_a_place_leaves_it():
    activity = ActivityTracker()
    with pytest.raises(KeyError), activity.during("forward"):
        raise KeyError
    assert activity.activity == "starting"
