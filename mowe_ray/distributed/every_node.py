"""Ask every node of the cluster, and wait no longer than agreed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")

DRIVER = "the driver"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        name: For people: the one it was started with, else its address; unique.
        resources: All it has, free or not.
    """

    id: str
    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What machines said, and why others said nothing, by name."""

    said: dict[str, T]
    silent: dict[str, str]


def alive_nodes() -> list[Node]:
    """Return the nodes that Ray can use now, by name."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = Counter(node["NodeName"] for node in alive)
    return sorted(
        (
            Node(
                node["NodeID"],
                node["NodeName"] if names[node["NodeName"]] == 1 else f"{node['NodeName']} ({node['NodeID'][:6]})",
                node["Resources"],
            )
            for node in alive
        ),
        key=lambda node: node.name,
    )


class Machines:
    """Asks nodes, and the driver; one that gives no answer in time is not asked again."""

    def __init__(self, nodes: Sequence[Node], timeout_s: float):
        """Wait `timeout_s` for an answer."""
        self._nodes, self._timeout_s = nodes, timeout_s
        self._late: set[str] = set()

    @property
    def nodes(self) -> list[Node]:
        """Those that have answered so far."""
        return [node for node in self._nodes if node.name not in self._late]

    def ask(
        self, question: Callable[[str], T], nodes: Sequence[Node] | None = None, *, driver: bool = False
    ) -> Answers[T]:
        """Call `question` with the machine's name on all nodes at once, in tasks that take no resources.

        Args:
            nodes: Only these.
            driver: Ask this process too: it may be elsewhere, and in another folder.
        """
        asked = [node for node in (self.nodes if nodes is None else nodes) if node.name not in self._late]
        tasks = {node.name: _on(node).remote(question, node.name) for node in asked}
        deadline = time.monotonic() + self._timeout_s
        answers: Answers[T] = Answers({}, {})
        if driver and DRIVER not in self._late:
            self._note(answers, DRIVER, lambda: within(self._timeout_s, partial(question, DRIVER)))
        for name, task in tasks.items():
            self._note(answers, name, partial(ray.get, task, timeout=max(deadline - time.monotonic(), 0)))
            if name in self._late:
                ray.cancel(task, force=True)
        return answers

    def _note(self, answers: Answers[T], machine: str, get: Callable[[], T]) -> None:
        try:
            answers.said[machine] = get()
        except TimeoutError:  # Ray's own is one, too
            answers.silent[machine] = f"no answer within {self._timeout_s:g} s"
            self._late.add(machine)
        except Exception as error:  # noqa: BLE001 - whatever a machine, its disk or its network says is the finding
            answers.silent[machine] = last_line(error)


def _on(node: Node) -> ray.remote_function.RemoteFunction:
    return _call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))


@ray.remote(num_cpus=0, max_retries=0)
def _call(question: Callable[[str], T], machine: str) -> T:
    return question(machine)


def last_line(error: BaseException) -> str:
    """Return what an error says, without the traceback that Ray puts before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise TimeoutError after so many seconds; it may go on in a thread.

    Raises:
        TimeoutError: It takes longer.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="limited")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]
