"""Stages side by side on a cluster: who waits for whom, and how long all of it takes.

A list schedule: whenever devices are free, of the stages whose parents are done the one with the
longest way behind it begins, if it fits. An estimate of what a cluster's scheduler would do.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Ready stages that are passed over, at most, because they take more devices than are free.
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Duty:
    """A stage to place: its seconds, the devices it takes, and the stages it waits for."""

    seconds: float
    devices: int
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """seconds: from first to last. longest_path: the chain of stages that takes longest, which no
    number of devices shortens, and its seconds. busy_share: of the devices' time."""

    seconds: float
    longest_path: tuple[str, ...]
    longest_path_seconds: float
    busy_share: float
    starts: Mapping[str, float]


def schedule(duties: Mapping[str, Duty], devices: int) -> Schedule:
    """The schedule of `duties` (parents before children) on so many devices.

    Parents that are not in `duties` are done already. A duty that takes more devices than there
    are gets them all.
    """
    ways, children = _ways(duties), _children(duties)
    missing = {name: len(set(duty.parents) & duties.keys()) for name, duty in duties.items()}
    ready = [(-ways[name], name) for name, parents in missing.items() if not parents]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    starts: dict[str, float] = {}
    free, now = devices, 0.0
    while ready or running:
        too_large: list[tuple[float, str]] = []
        while ready and free and len(too_large) < _LOOKED_AT:
            way, name = heapq.heappop(ready)
            wanted = min(duties[name].devices, devices)
            if wanted > free:
                too_large.append((way, name))
                continue
            free -= wanted
            starts[name] = now
            heapq.heappush(running, (now + duties[name].seconds, name))
        for item in too_large:
            heapq.heappush(ready, item)
        now, name = heapq.heappop(running)
        free += min(duties[name].devices, devices)
        for child in children[name]:
            missing[child] -= 1
            if not missing[child]:
                heapq.heappush(ready, (-ways[child], child))
    path, longest = _longest(duties, ways, children), max(ways.values(), default=0.0)
    seconds = max(now, longest)  # sums of the same seconds, in another order
    busy = sum(duty.seconds * min(duty.devices, devices) for duty in duties.values())
    return Schedule(
        seconds=seconds,
        longest_path=path,
        longest_path_seconds=longest,
        busy_share=busy / (seconds * devices) if seconds else 0.0,
        starts=starts,
    )


def _ways(duties: Mapping[str, Duty]) -> dict[str, float]:
    """Seconds of the longest chain that begins with each stage."""
    found = dict.fromkeys(duties, 0.0)
    for name in reversed(list(duties)):
        found[name] += duties[name].seconds
        for parent in duties[name].parents:
            if parent in found:
                found[parent] = max(found[parent], found[name])
    return found


def _children(duties: Mapping[str, Duty]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in duties}
    for name, duty in duties.items():
        for parent in set(duty.parents) & duties.keys():
            found[parent].append(name)
    return found


def _longest(
    duties: Mapping[str, Duty], ways: Mapping[str, float], children: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    path: list[str] = []
    left: Sequence[str] = [name for name in duties if not set(duties[name].parents) & duties.keys()]
    while left:
        path.append(max(left, key=lambda name: ways[name]))
        left = children[path[-1]]
    return tuple(path)
