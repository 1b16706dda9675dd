"""The processes that decode, of this process or of one that is started for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

from modeling_videomamba.training import workers
from modeling_videomamba.training.workers import iterate
from tests.conftest import ROOT

LINUX = sys.platform == "linux"

# prints its workers, then waits for the examples that its argument names
SCRIPT = """
import multiprocessing, os, signal, sys, time
import torch
from modeling_videomamba.training.data import Examples
from modeling_videomamba.training import workers
from modeling_videomamba.training.workers import iterate

class Slow:
    shape = (1, 1)
    def __call__(self, example, seed):
        time.sleep(example["label"])
        return torch.full((1, 1), float(os.getpid()))

if __name__ == "__main__":
    split = [{"video": {"path": "x", "bytes": None}, "label": int(label)} for label in sys.argv[1]]
    batches = iterate(
        Examples(split, Slow(), skip_broken=False), 2, batch_sampler=[[(0, index)] for index in range(len(split))]
    )
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: print("heard", flush=True))
    print("ready", flush=True)
    for batch in batches:
        print(int(batch["pixel_values"].item()), flush=True)
    raise SystemExit(7)
"""


@pytest.fixture
def start(tmp_path):
    """A run on examples that take so many seconds each; its process and its two workers."""
    script, started = tmp_path / "script.py", []
    script.write_text(SCRIPT)

    def start_with(seconds):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, script, seconds],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and process.stdout.readline() == "ready\n"
        return process, workers

    yield start_with
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a failed test leaves
        process.communicate()


def alive_after_30_seconds(processes):
    return psutil.wait_procs(processes, timeout=30)[1]


def test_workers_are_no_forks_of_a_process_with_threads(start):
    process, workers = start("0000")
    if LINUX:
        (server,) = {worker.ppid() for worker in workers}
        assert server != process.pid
    output = process.communicate(timeout=60)[0].split()
    assert {int(pid) for pid in output} == {worker.pid for worker in workers} and len(output) == 4
    assert process.returncode == 7
    assert not alive_after_30_seconds(workers)


def test_a_signal_to_all_processes_leaves_the_workers(start):
    """As clusters and terminals send it."""
    process, _ = start("110")
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.killpg(process.pid, signum)
    output = process.communicate(timeout=60)[0].split()
    assert output[:2] == ["heard", "heard"] and len(output) == 5 and process.returncode == 7


def test_workers_end_with_their_run_however_that_ends(start):
    process, workers = start("99")
    servers = {psutil.Process(worker.ppid()) for worker in workers}
    time.sleep(0.5)
    process.kill()
    assert not alive_after_30_seconds([*workers, *(servers if LINUX else ())])


class Numbers(torch.utils.data.Dataset):
    """Examples that take so many seconds to reach a worker, or to be read. `on_start` is called for each worker."""

    def __init__(self, on_start, seconds_to_start, seconds_to_read):
        self.on_start, self.seconds = on_start, (seconds_to_start, seconds_to_read)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(self.seconds[1])

    def __getstate__(self):
        self.on_start()
        return {"seconds": self.seconds}

    def __setstate__(self, state):
        self.seconds = state["seconds"]
        time.sleep(self.seconds[0])


@pytest.fixture
def started(monkeypatch):
    """The workers that a test starts."""
    found, start = [], workers.Worker.start
    monkeypatch.setattr(workers.Worker, "start", lambda self: (found.append(self), start(self)))
    return found


@pytest.fixture
def interrupt():
    """Sends SIGINT to a thread. The system takes the main one, but where only another one doesn't block the signal."""
    end = threading.Event()
    threads = {"main thread": threading.main_thread(), "another thread": threading.Thread(target=end.wait)}
    threads["another thread"].start()

    def send(name):
        signal.pthread_kill(threads[name].ident, signal.SIGINT)
        time.sleep(0.1)

    yield send
    end.set()


def assert_ended(workers, since):
    """Within 4 seconds: PyTorch would wait 5 for each, and Python for ever."""
    while any(worker.is_alive() for worker in workers) and time.monotonic() < since + 4:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)
    assert time.monotonic() < since + 4


@pytest.mark.parametrize("thread", ["main thread", "another thread"])
def test_workers_end_at_ctrl_c_while_they_start(started, interrupt, thread):
    sent = []
    on_start = iter([lambda: None, lambda: (sent.append(time.monotonic()), interrupt(thread))])  # with the second one
    with pytest.raises(KeyboardInterrupt):
        iterate(Numbers(lambda: next(on_start)(), 60, 0), 2, batch_size=1)
    assert_ended(started, sent[0])


def test_workers_end_at_ctrl_c_while_they_read(started, interrupt):
    batches = iterate(Numbers(lambda: None, 0, 60), 2, batch_size=1)
    threading.Timer(0.5, interrupt, ["main thread"]).start()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    began = time.monotonic()
    del batches
    assert_ended(started, began)


def test_busy_workers_end_with_a_process_that_holds_them(started):
    """As the traceback of an error does to the end of Python."""
    batches = iterate(Numbers(lambda: None, 0, 60), 2, batch_size=1)
    handler = signal.getsignal(signal.SIGCHLD)
    workers._kill_workers()
    signal.signal(signal.SIGCHLD, handler)
    assert_ended(started, time.monotonic())
    del batches
