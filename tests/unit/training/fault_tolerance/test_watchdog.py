import threading
import time

import pytest
import torch
from torch import nn

from mowe_ray.training.fault_tolerance.watchdog import Hang, Watchdog, Whereabouts


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
    whereabouts = Whereabouts()
    dog = Watchdog(whereabouts, 0.2, alarm)
    dog.begin(7)
    never = threading.Event()
    with whereabouts.at("forward"), whereabouts.at("a read that does not end"):
        threading.Timer(1.0, never.set).start()
        never.wait()  # the main thread hangs here
    (hang,) = alarm.hangs
    assert (hang.step, hang.place) == (7, "a read that does not end")
    assert 0.2 <= hang.seconds < 0.9
    assert hang.line.startswith("wait (")
    assert "test_tells_where_a_step_hangs" in hang.stacks
    assert "thread watchdog" in hang.stacks
    dog.close()


def test_steps_that_end_in_time_are_no_hang(alarm):
    dog = Watchdog(Whereabouts(), 0.3, alarm)
    for step in range(8):
        dog.begin(step)
        time.sleep(0.1)
    assert not alarm.rang.is_set()
    dog.close()
    assert not alarm.rang.wait(0.5)


def test_a_pause_is_not_timed_and_the_time_starts_anew_after_it(alarm):
    dog = Watchdog(Whereabouts(), 0.3, alarm)
    dog.begin(1)
    dog.pause()
    assert not alarm.rang.wait(0.6)
    dog.begin(2)
    assert alarm.rang.wait(2)
    assert alarm.hangs[0].step == 2


def test_whereabouts_follow_the_modules_into_forward_and_recomputation():
    whereabouts, seen = Whereabouts(), []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(whereabouts.place)
            return x * x

    inner = Spy()
    outer = nn.Sequential(nn.Linear(2, 2), inner)
    whereabouts.follow({"adapter": outer, "adapter.spy": inner})
    with whereabouts.at("forward"):
        loss = torch.utils.checkpoint.checkpoint(outer, torch.ones(1, 2), use_reentrant=False).sum()
        assert whereabouts.place == "forward"
    with whereabouts.at("backward"):
        loss.backward()
    assert seen == ["forward in adapter.spy", "backward in adapter.spy"]
    assert whereabouts.place == "starting"


def test_whereabouts_wait_for_items_and_come_back():
    whereabouts, seen = Whereabouts(), []

    def items():
        for item in range(2):
            seen.append(whereabouts.place)
            yield item

    assert [(item, whereabouts.place) for item in whereabouts.watch(items(), "waiting for data")] == [
        (0, "starting"),
        (1, "starting"),
    ]
    assert seen == ["waiting for data"] * 2


def test_an_error_inside_a_place_leaves_it():
    whereabouts = Whereabouts()
    with pytest.raises(KeyError), whereabouts.at("forward"):
        raise KeyError
    assert whereabouts.place == "starting"
