"""What a library changes in the process that it is loaded into, put back as it was.

For libraries that take a process for their own: vLLM seeds all random numbers, sets environment
variables that children would inherit, replaces functions of torch, and keeps all objects there
are from the garbage collector. Who trains in the same process must not notice.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed

_ABSENT = object()


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Afterwards the next numbers of torch's own generators are those that were next before."""
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for device, state in enumerate(devices):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Afterwards all that a library may change of a process while it starts is as it was.

    Environment, import path, random state, torch's default format and precision, logging, hooks
    for errors, warnings, the way of starting processes, and the garbage collector. Handlers of
    signals are safe where this runs in another thread than the main one: they cannot be set there.
    """
    environment, path = dict(os.environ), list(sys.path)
    python, numpy = random.getstate(), np.random.get_state()
    dtype, precision = torch.get_default_dtype(), _precision()
    hooks = sys.excepthook, threading.excepthook
    start_method = multiprocessing.get_start_method(allow_none=True)
    recursion, thawed = sys.getrecursionlimit(), gc.get_freeze_count() == 0
    said = _loggers()
    try:
        with kept_randomness(), warnings.catch_warnings():
            yield
    finally:
        _set_environment(environment)
        sys.path[:] = path
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)
        if precision is not None and _precision() != precision:
            torch.set_float32_matmul_precision(precision)
        sys.excepthook, threading.excepthook = hooks
        if multiprocessing.get_start_method(allow_none=True) != start_method:
            multiprocessing.set_start_method(start_method, force=True)
        sys.setrecursionlimit(recursion)
        if thawed:
            gc.unfreeze()
        _set_loggers(said)


class OtherSide:
    """Attributes that a library sets otherwise, as `torch.Tensor.pin_memory`: they are so while
    it is at work, and ours outside. With torch's default process group, which it makes for itself.

    places: objects and the names of their attributes.
    """

    def __init__(self, places: Sequence[tuple[object, str]]) -> None:
        self._places = tuple(places)
        self._theirs: list[Any] | None = None
        self._group: Any = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Theirs while it lasts; what they set meanwhile is theirs the next time."""
        ours = self._found()
        if self._theirs is not None:
            self._put(self._theirs)
        try:
            yield
        finally:
            self._theirs = self._found()
            self._put(ours)

    @contextmanager
    def their_group(self) -> Iterator[None]:
        """torch's default process group is theirs, or none yet; outside it is ours, mostly none."""
        ours, distributed.GroupMember.WORLD = distributed.GroupMember.WORLD, self._group
        try:
            yield
        finally:
            self._group, distributed.GroupMember.WORLD = distributed.GroupMember.WORLD, ours

    def _found(self) -> list[Any]:
        return [vars(owner).get(name, _ABSENT) for owner, name in self._places]

    def _put(self, values: Sequence[Any]) -> None:
        for (owner, name), value in zip(self._places, values, strict=True):
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def _precision() -> str | None:
    """Of products in float32; None where it was set in torch's newer way, for each backend."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_environment(values: dict[str, str]) -> None:
    for name in set(os.environ) - set(values):
        del os.environ[name]
    for name, value in values.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


#: A logger's level, whether it is off, its handlers, and whether its parents hear it too.
_Logger = tuple[int, bool, list[logging.Handler], bool]


def _loggers() -> dict[str, _Logger]:
    """How every logger there is, the root's "" among them, is set."""
    names = [n for n, one in logging.root.manager.loggerDict.items() if _is_logger(one)]
    return {name: _settings(logging.getLogger(name)) for name in ("", *names)}


def _set_loggers(values: dict[str, _Logger]) -> None:
    for name, settings in values.items():
        logger = logging.getLogger(name)
        if _settings(logger) != settings:
            level, logger.disabled, logger.handlers, logger.propagate = settings
            logger.setLevel(level)


def _settings(logger: logging.Logger) -> _Logger:
    return logger.level, logger.disabled, list(logger.handlers), logger.propagate


def _is_logger(one: object) -> bool:
    return isinstance(one, logging.Logger)  # and no placeholder for one
