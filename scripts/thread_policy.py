"""
How PyTorch's threads wait, and how many there are. OpenMP reads both when PyTorch is loaded: scripts import this first.

By default a thread that waits for another spins for milliseconds. Beside a busy process that is a whole time slice, in
which the thread that it waits for could have run.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

# Of GNU's OpenMP: turns before a waiting thread sleeps, some 40 us. Of LLVM's and Intel's: milliseconds.
WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", *WAITING)


def environment(
    present: Mapping[str, str], num_cores: int, groups: str = "", root: Path = Path("/sys/fs/cgroup")
) -> dict[str, str]:
    """
    What to add to the environment that is `present`.

    Args:
        present (`Mapping`): The environment, whose own choices stay.
        num_cores (`int`): Cores that this process may run on.
        groups (`str`, *optional*): Text of `/proc/self/cgroup`.
        root (`Path`, *optional*): Where the system shows control groups.
    """
    added = {} if any(name in present for name in CHOSEN_BY_USER) else dict(WAITING)
    quota = cpu_quota(groups, root)
    if quota < num_cores and "OMP_NUM_THREADS" not in present:
        added["OMP_NUM_THREADS"] = str(max(1, math.ceil(quota)))
    return added


def cpu_quota(groups: str, root: Path) -> float:
    """Cores' worth of time that the control groups of a process allow, infinite without a limit."""
    quotas = [math.inf]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # a container may see its own group as the root, under the name that the group has outside
        folder = root / controllers
        inner = folder / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(folder):
                quotas.append(_quota_v1(group) if controllers else _quota_v2(group))
    return min(quotas)


def _quota_v2(group: Path) -> float:
    quota, period = _words(group / "cpu.max") or ("max", "1")
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float:
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else math.inf


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _this_environment() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    return environment(os.environ, cores, groups)


os.environ.update(_this_environment())
