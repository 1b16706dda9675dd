"""thread_policy.py: what it adds to the environment before PyTorch is loaded."""

import thread_policy

import ast
import json
import math
import os
import subprocess
import sys

import pytest

from tests.launching import SCRIPTS

WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


def groups(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "0::/kubepods/pod1/app\n"
V1 = "12:memory:/docker/1a\n4:cpu,cpuacct:/docker/1a\n2:cpuset:/\n1:name=systemd:/init.scope\n0::/\n"


@pytest.mark.parametrize(
    ("text", "files", "cores"),
    [
        ("", {}, math.inf),
        (V2, {}, math.inf),
        (V2, {"kubepods/pod1/app/cpu.max": "max 100000\n"}, math.inf),
        (V2, {"kubepods/pod1/app/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"kubepods/pod1/app/cpu.max": "400000 100000\n", "kubepods/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"cpu.max": "200000 100000\n"}, 2.0),  # a container's own view
        (V1, {"cpu,cpuacct/cpu.shares": "1024\n"}, math.inf),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, math.inf),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "75000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"}, 1.5),
        (
            V1,
            {
                "cpu,cpuacct/docker/1a/cpu.cfs_quota_us": "100000\n",
                "cpu,cpuacct/docker/1a/cpu.cfs_period_us": "100000\n",
                "memory/docker/1a/cpu.cfs_quota_us": "1000\n",
                "memory/docker/1a/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
    ],
)
def test_the_smallest_quota_of_all_groups_counts(tmp_path, text, files, cores):
    assert thread_policy.cpu_quota(text, groups(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("present", "quota", "added"),
    [
        ({}, "max 100000", WAITING),
        ({}, "400000 100000", WAITING),
        ({}, "150000 100000", {**WAITING, "OMP_NUM_THREADS": "2"}),
        ({}, "20000 100000", {**WAITING, "OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "3"}, "100000 100000", WAITING),
        ({"OMP_WAIT_POLICY": "active"}, "100000 100000", {"OMP_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, "max 100000", {}),
        ({"KMP_BLOCKTIME": "0"}, "max 100000", {}),
    ],
)
def test_what_the_user_chose_stays(tmp_path, present, quota, added):
    root = groups(tmp_path, {"cpu.max": quota})
    assert thread_policy.environment(present, 4, "0::/\n", root) == added


def test_the_environment_is_set_before_pytorch_reads_it():
    code = "import os, thread_policy, json; print(json.dumps(dict(os.environ)))"
    clean = {name: value for name, value in os.environ.items() if name not in thread_policy.CHOSEN_BY_USER}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, check=True
    )
    assert WAITING.items() <= json.loads(result.stdout).items()


LAUNCHED = [path for path in sorted(SCRIPTS.glob("*.py")) if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("script", LAUNCHED, ids=lambda path: path.name)
def test_each_script_imports_it_first(script):
    tree = ast.parse(script.read_text("utf-8"))
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert ast.unparse(first) == "import thread_policy"
