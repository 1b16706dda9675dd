"""The processes that decode: from what they are started, what ends them, and what doesn't."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch

from .data import collate

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_TO_END = 0.2  # for a worker that waits for work; one that decodes or still starts is killed
PACKAGE = __name__.split(".")[0]
CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
WORKERS: weakref.WeakSet = weakref.WeakSet()


def iterate(dataset: torch.utils.data.Dataset, num_workers: int, **options: Any) -> Iterator[dict[str, Any]]:
    r"""
    The batches of a `DataLoader`, whose workers are deaf to SIGTERM and SIGINT, which launchers, clusters and terminals
    send to all processes at once: the main one needs its workers until it has ended its step and saved its state.

    Workers are forks of a server that does nothing else, not of this process: a fork copies the locks that the threads
    of a process in training hold (autograd's, the collectives', those of another loader), which then nobody releases.
    Up to Python 3.11 such a worker may hang before its first line (python/cpython#112275), with pinned memory in others
    too (pytorch/pytorch#130610). So `dataset` has to be picklable, and a script to have its `__main__` guard.

    Args:
        dataset: [`Examples`] or [`StreamedExamples`].
        num_workers (`int`): Processes that decode; more than there are cores leave less of them to the model.
        options: Other arguments of `DataLoader`.

    Returns:
        `Iterator`: of what [`collate`] returns.
    """
    if num_workers:
        options |= {"multiprocessing_context": _worker_context(), "worker_init_fn": _start_worker}
    with warnings.catch_warnings(), _deaf_to_stop_signals():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = torch.utils.data.DataLoader(dataset, num_workers=num_workers, collate_fn=collate, **options)
        return iter(loader)


class Worker(CONTEXT.Process):  # type: ignore[name-defined, misc]
    """A process that ends soon when it is left: PyTorch waits 5 seconds, and sends a signal to which it is deaf."""

    def start(self) -> None:
        WORKERS.add(self)
        super().start()

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout if timeout is None else min(timeout, SECONDS_TO_END))

    def terminate(self) -> None:
        self.kill()


class WorkerContext(type(CONTEXT)):  # type: ignore[misc]
    """Starts [`Worker`]s."""

    Process = Worker


def _worker_context() -> multiprocessing.context.BaseContext:
    if sys.platform == "linux":
        _start_server()
    return WorkerContext()


@cache
def _start_server() -> None:
    """The server imports what this process has of the package, and workers needn't. Ctrl-C doesn't wait for it."""
    forkserver.set_forkserver_preload([name for name in sys.modules if name.startswith(f"{PACKAGE}.")])
    resource_tracker.ensure_running()  # if started with the server it would make both hear the signals again
    with _deaf_to_stop_signals():
        forkserver.ensure_running()
    first = CONTEXT.Process(target=int, daemon=True)  # which it starts when it has imported all
    first.start()
    first.join()


def _start_worker(worker_id: int) -> None:
    """PyTorch's workers look for the end of the server, which itself waits for theirs."""
    if hasattr(signal, "pthread_sigmask"):  # also where the server is somebody else's, who started it before
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def _deaf_to_stop_signals() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, never get the signals; this one gets them later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with _received_later():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _received_later() -> Iterator[None]:
    """Signals that another thread of this process gets, which doesn't block them, wait until this one hears again."""
    if threading.current_thread() is not threading.main_thread():  # has no handlers
        yield
        return
    received: list[int] = []
    before = {signum: signal.signal(signum, lambda found, _: received.append(found)) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for found in received:
            signal.raise_signal(found)


@atexit.register
def _kill_workers() -> None:
    """After an error Python would send SIGTERM to the workers that are left, and wait for them to end."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for a failure
    for worker in WORKERS:
        if worker.is_alive():
            worker.kill()
