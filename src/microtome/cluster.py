"""Work on many machines with Ray: items are handed to actors, and each comes back once.

An actor is one process, with a GPU of its own where the cluster has any. What an actor had in hand when it died is
handed to another one; an item that several actors died of is an error. Only the driver takes results in, so that an
item that two actors have finished counts once.

Cost:  an item and its result travel once; at most two items wait at an actor.
Check: with actors killed at work, every item comes back once; tests/laws/test_cluster.py.
"""

from __future__ import annotations

import importlib
import logging
import socket
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from microtome.errors import ArgumentError, BudgetError, OutputError, error

K = TypeVar("K")
AHEAD = 2
"""Items that wait at an actor, the one at work included."""
MOST_LOSSES = 4
"""Actors that may die of one item."""
PATIENCE = 900.0
"""Seconds without any answer after which the cluster is given up."""
REACH = 5.0
"""Seconds in which an address must answer."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and how much of it to use.

    Attributes:
        address: "auto" for the cluster that this machine is part of, or HOST:PORT of its head.
        workers: how many actors; one for each GPU of the cluster, or for each `threads` CPUs where it has none.
        threads: CPUs of an actor.

    Raises:
        ArgumentError: a number is too small.
    """

    address: str = "auto"
    workers: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise error(ArgumentError, f"{name} is too small for a cluster", got=value, allowed="1 or more")


class Worker:
    """What an actor is: `start` is called once, `work` for each item. Subclasses stand in modules that nodes import."""

    def start(self, *arguments: Any, **more: Any) -> None:
        """Make ready, such as open a model."""
        raise NotImplementedError

    def work(self, *item: Any, **more: Any) -> Any:
        """Do one item, and give what came of it."""
        raise NotImplementedError


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package ray, connected to a cluster; left as it was found.

    Args:
        address: "auto" for the cluster that this machine is part of, or HOST:PORT of its head.

    Raises:
        ArgumentError: the package is not there, or no cluster answers.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as problem:
        do = 'pip install "microtome[ray]"'
        raise error(ArgumentError, "work on many machines needs the package ray, which is not here", do=do) from problem
    if ray.is_initialized():
        yield ray
        return
    do = "start one: ray start --head, and on other machines ray start --address=HOST:6379"
    try:
        _reach(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as problem:
        got = next(iter(str(problem).strip().splitlines()), "") or type(problem).__name__
        raise error(ArgumentError, f'no Ray cluster answers at "{address}"', got=got, do=do) from problem
    try:
        with redirect_stdout(sys.stderr):  # there Ray tells of dead workers, whatever it is asked
            yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Refuse an address at which nothing listens, of which Ray itself is sure after minutes only.

    Raises:
        OSError: it does not answer.
        ValueError: it is no address.
    """
    if address == "auto":
        return
    host, mark, port = address.rpartition(":")
    if not mark or not host or not port.isdigit():
        raise ValueError(f"{address} is not HOST:PORT")
    socket.create_connection((host, int(port)), timeout=REACH).close()


@dataclass(eq=False)
class _Actor:
    """One process, and how many items it has."""

    handle: Any
    ready: bool = False
    load: int = 0


@dataclass
class _Pool:
    """The actors of one work."""

    ray: Any
    kind: type[Worker]
    arguments: Sequence[Any]
    count: int
    threads: int
    gpus: int
    actors: list[_Actor] = field(default_factory=list[_Actor])
    pending: dict[Any, tuple[_Actor, Any, tuple[Any, ...] | None]] = field(
        default_factory=dict[Any, tuple[_Actor, Any, "tuple[Any, ...] | None"]]
    )

    def hire(self) -> None:
        """Make actors until there are as many as wanted."""
        made = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)(self.kind)
        while len(self.actors) < self.count:
            actor = _Actor(made.remote())
            self.pending[actor.handle.start.remote(*self.arguments)] = (actor, None, None)
            self.actors.append(actor)

    def give(self, actor: _Actor, key: Any, item: tuple[Any, ...]) -> None:
        """Hand an item to an actor."""
        self.pending[actor.handle.work.remote(*item)] = (actor, key, item)
        actor.load += 1

    def lose(self, actor: _Actor) -> list[tuple[Any, tuple[Any, ...]]]:
        """Give up an actor; the items that it had, but the one that told of its death."""
        if actor in self.actors:
            self.actors.remove(actor)
            with suppress(Exception):
                self.ray.kill(actor.handle)
        mine = [ref for ref, (other, _, _) in self.pending.items() if other is actor]
        held = [self.pending.pop(ref) for ref in mine]
        return [(key, item) for _, key, item in held if item is not None]

    def end(self) -> None:
        """Let all actors go."""
        for actor in self.actors:
            with suppress(Exception):
                self.ray.kill(actor.handle)


def spread(
    cluster: Cluster, kind: type[Worker], arguments: Sequence[Any], items: Iterable[tuple[K, tuple[Any, ...]]]
) -> Iterator[tuple[K, Any]]:
    """Do items on the actors of a cluster; results come as they are ready, each item's once.

    Args:
        cluster: where.
        kind: what an actor is.
        arguments: of its `start`.
        items: by a key, the arguments of its `work`; read as they are handed out.

    Raises:
        ArgumentError: no cluster answers.
        BudgetError: several actors ran out of memory over one item.
        OutputError: several actors died over one item, or nothing answered for a long time.
        Exception: what an item, or the start of an actor, raised there.
    """
    with connected(cluster.address) as ray:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        count = cluster.workers or gpus or max(1, int(there.get("CPU", 1)) // cluster.threads)
        pool = _Pool(ray, kind, arguments, count, cluster.threads, 1 if gpus else 0)
        try:
            yield from _results(pool, iter(items))
        finally:
            pool.end()


def _results(pool: _Pool, source: Iterator[tuple[K, tuple[Any, ...]]]) -> Iterator[tuple[K, Any]]:
    """See `spread`."""
    again: deque[tuple[Any, tuple[Any, ...]]] = deque()
    losses: Counter[Any] = Counter()
    more = True
    pool.hire()
    while True:
        for actor in sorted((a for a in pool.actors if a.ready), key=lambda a: a.load):
            while actor.load < AHEAD and (again or more):
                following = again.popleft() if again else next(source, None)
                if following is None:
                    more = False
                else:
                    pool.give(actor, *following)
        if not (again or more or any(item is not None for _, _, item in pool.pending.values())):
            return
        done, _ = pool.ray.wait(list(pool.pending), num_returns=1, timeout=PATIENCE)
        if not done:
            what, do = f"the Ray cluster has not answered for {PATIENCE:.0f} s", "look at ray status, and run it again"
            raise error(OutputError, what, do=do)
        actor, key, item = pool.pending.pop(done[0])
        try:
            result = pool.ray.get(done[0])
        except pool.ray.exceptions.RayTaskError as problem:
            raise getattr(problem, "cause", None) or problem from None
        except pool.ray.exceptions.RayError as problem:
            # Only the item at work can have killed the actor; what waited behind it has not lost anything.
            losses[key] += 1
            _refuse_many(losses[key], key, item, problem)
            again.extend([(key, item)] if item is not None else [])
            again.extend(pool.lose(actor))
            pool.hire()
        else:
            actor.load -= item is not None
            actor.ready = True
            if item is not None:
                yield key, result


def _refuse_many(losses: int, key: Any, item: object, problem: Exception) -> None:
    """Refuse an item that too many actors died of.

    Raises:
        BudgetError: they ran out of memory.
        OutputError: they died of something else.
    """
    if losses < MOST_LOSSES:
        return
    where = "as they started" if item is None else f"at item {key}"
    reason = next(iter(str(problem).strip().splitlines()), "")
    if type(problem).__name__ == "OutOfMemoryError":
        do = "give each worker more memory: fewer workers a machine, smaller rows, or a smaller dtype"
        raise error(BudgetError, f"{losses} workers ran out of memory {where}", got=reason, do=do)
    do = "look at the logs of the Ray cluster, and run it again: what is done is kept"
    raise error(OutputError, f"{losses} workers died {where}", got=reason, do=do)
