"""The processes that decode, of a process that is started for it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.conftest import ROOT

LINUX = sys.platform == "linux"

# prints its workers, then waits for the example that its argument names
SCRIPT = """
import multiprocessing, os, signal, sys, time
import torch
from modeling_videomamba.training.data import Examples
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
