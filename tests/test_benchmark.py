"""scripts/benchmark.py on sizes that say nothing about speed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import benchmark_measures as measures
import benchmark_runs
from modeling_videomamba import VIDEOMAMBA_SIZES, VideoMambaConfig, VideoMambaModel, selective_scan_backends
from tests.conftest import ROOT, tiny_config

CHOSEN = {
    "scan 1x65x32 forward cpu",
    "scan 1x65x32 forward mambapy",
    "model VideoMamba-Ti 2 frames",
    *(["model VideoMamba-Ti without AMX 2 frames"] if measures.matrix_units_unavailable_reason() is None else []),
    "model TimeSformer-Ti joint 2 frames",
    "profile VideoMamba-Ti 2 frames",
    "training VideoMamba-Ti",
    "masked training VideoMamba-Ti",
    "profile training VideoMamba-Ti",
}


def run(*arguments, **environment):
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *arguments]
    environment = {**os.environ, **environment}
    environment.pop(measures.BACKEND_VARIABLE, None)
    return subprocess.run([str(p) for p in command], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of one run where mambapy can't be imported."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "mambapy.py").write_text("raise ImportError('no mambapy today')")
    result = run(
        *("--only", "x32 forward cpu", "x32 forward mambapy", "VideoMamba-Ti 2", "Ti without", "joint", "training"),
        *("--scan-shapes", "1x65x32", "--frames", 2, "--image-size", 32, "--long-clip", 4),
        *("--threads", 1, "--repeats", 2, "--min-seconds", 0),
        *("--json", folder / "results.json", "--picture", folder / "picture.png"),
        PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
    )
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout, "utf-8")
    return folder


@pytest.fixture
def report(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def test_chosen_measurements_are_in_the_json(report):
    assert set(report["measurements"]) == CHOSEN
    for name, result in report["measurements"].items():
        if "mambapy" not in name:
            assert "failed" not in result, result
        if "profile" not in name and "failed" not in result:
            assert 0 < result["peak_bytes"] < result["process_peak_bytes"]
    scan = report["measurements"]["scan 1x65x32 forward cpu"]
    assert len(scan["seconds"]) == 2 and 0 < scan["min_seconds"] <= scan["median_seconds"]
    assert scan["time_over_cpu"] == 1
    assert report["environment"]["threads"] == 1 and report["environment"]["torch"] == torch.__version__


def test_limit_and_ratios_follow_from_the_rate(report):
    model = report["measurements"]["model VideoMamba-Ti 2 frames"]
    assert model["limit_seconds"] == pytest.approx(model["multiply_adds"] / model["matrix_product_rate"])
    assert model["ratio_to_limit"] == pytest.approx(model["min_seconds"] / model["limit_seconds"])
    products_seconds = model["multiply_adds_without_scan"] / model["matrix_product_rate"]
    assert model["ratio_to_matrix_products_only"] == pytest.approx(model["min_seconds"] / products_seconds)
    assert report["environment"]["best_matrix_product_rate"] >= model["matrix_product_rate"]
    assert "limit_seconds" not in report["measurements"]["model TimeSformer-Ti joint 2 frames"]
    training = report["measurements"]["training VideoMamba-Ti"]
    ratio = training["step_min_seconds"] / training["inference_min_seconds"]
    assert training["ratio_of_min"] == pytest.approx(ratio)


@pytest.mark.parametrize("name", ["profile VideoMamba-Ti 2 frames", "profile training VideoMamba-Ti"])
def test_the_parts_of_a_profile_are_the_whole(report, name):
    profile = report["measurements"][name]
    parts = {part: profile[f"{part}_seconds"] for part in {*measures.PARTS.values(), "optimizer", "rest"}}
    assert sum(parts.values()) == pytest.approx(profile["min_seconds"])
    training = {"scan_backward", "convolution_backward", "optimizer"}
    inference, both = ({"sum"}, {"norm"}) if selective_scan_backends()["cpu"].usable else (set(), set())
    only_here, elsewhere = (training, inference) if "training" in name else (inference, training)
    assert all(parts[part] > 0 for part in only_here | both | {"products", "rest"})
    assert all(parts[part] == 0 for part in elsewhere)


def test_a_missing_peer_is_reported_with_its_reason(folder, report):
    assert report["measurements"]["scan 1x65x32 forward mambapy"]["failed"] == "ImportError: no mambapy today"
    assert "1x65x32 forward mambapy: failed: ImportError: no mambapy today" in (folder / "stdout").read_text("utf-8")


def test_claims_that_were_not_measured_say_so(folder, report):
    measured = {claim["claim"]: claim["value"] for claim in report["claims"] if claim["value"] is not None}
    ratio, masked = (
        report["measurements"][f"{name} VideoMamba-Ti"]["ratio_of_min"] for name in ("training", "masked training")
    )
    assert measured == {"Ti: training step / inference": ratio, "Ti: masked pretraining step / unmasked": masked}
    others = len(report["claims"]) - 2
    assert f"Claims that were not measured: {others}." in (folder / "stdout").read_text("utf-8")


def test_beside_busy_processes(tmp_path):
    result = run(
        *("--busy", "--only", "busy VideoMamba", "--frames", 2, "--image-size", 32, "--threads", 1),
        *("--repeats", 2, "--min-seconds", 0, "--json", tmp_path / "busy.json"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "busy.json").read_text("utf-8"))["measurements"]
    assert set(found) == {"busy VideoMamba-Ti 2 frames", "busy VideoMamba-Ti training 2 frames"}
    for measured in found.values():
        assert [len(measured[f"beside_{count}_seconds"]) for count in (0, *measures.NEIGHBOURS)] == [2, 2, 2]
        for count in measures.NEIGHBOURS:
            ratio = measured[f"beside_{count}_median_seconds"] / measured["beside_0_median_seconds"]
            assert measured[f"ratio_beside_{count}"] == pytest.approx(ratio)
    assert "Beside processes that take all the time they get" in result.stdout


def test_busy_processes_end(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(measures.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with measures.busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode is not None for process in started) and len(started) == 2


def test_the_picture_is_a_picture(folder):
    with Image.open(folder / "picture.png") as picture:
        assert picture.format == "PNG" and picture.size[0] >= 1200 and len(picture.getcolors(10**6)) > 100


def scan_flops(x, dt, A, *args, **kwargs):
    (batch, length, channels), state = x, A[1]
    return 2 * 4 * batch * length * channels * state


@pytest.mark.parametrize(
    ("config", "frames"),
    [
        (VideoMambaConfig(**VIDEOMAMBA_SIZES["tiny"]), 8),
        (VideoMambaConfig(**VIDEOMAMBA_SIZES["middle"]), 16),
        (tiny_config(tubelet_size=2, conv_kernel=3, state_size=8, scan_order="spatiotemporal_v2"), 4),
    ],
    ids=["tiny", "middle", "all-else"],
)
def test_multiply_adds_are_those_of_pytorchs_counter(config, frames):
    with torch.device("meta"):
        model = VideoMambaModel(config).eval()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.videomamba.reference_scan: scan_flops})
    with counter, torch.no_grad():
        model(torch.empty(1, frames, 3, *config.input_size, device="meta"))
    assert sum(measures.multiply_adds(config, frames)) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["torch", "transformers", "mambapy"])
def test_all_scans_compute_the_same(name, monkeypatch):
    if name == "mambapy":
        pytest.importorskip("mambapy")
    monkeypatch.setenv(measures.BACKEND_VARIABLE, "torch")  # what `prepare_scan` sets is undone
    torch.manual_seed(0)
    scan, inputs = measures.prepare_scan(name, [2, 21, 6])
    y = scan(*inputs)
    torch.manual_seed(0)
    scan, inputs = measures.prepare_scan("torch", [2, 21, 6])
    y = y.mT if name == "transformers" else y
    torch.testing.assert_close(y, scan(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can be reset on Linux only")
def test_peak_memory_is_that_of_the_call_alone():
    results = [measures.first_call(lambda: torch.ones(20_000_000).sum()) for _ in range(2)]
    for result in results:
        assert 75e6 < result["peak_bytes"] < 120e6


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("program", "reason"),
    [("sh -c 'kill -9 $$'", "ended by signal 9, probably for lack of memory"), ("sleep 30", "not done after 1 s")],
)
def test_a_process_that_dies_or_is_late_is_reported(program, reason, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {program}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(benchmark_runs.sys, "executable", str(tmp_path / "python"))
    assert benchmark_runs.run_worker({"measure": "scan"}, threads=1, timeout=1) == {"measure": "scan", "failed": reason}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing"), "--only nothing: there is no such measurement"),
        (("--scan-shapes", "1x2"), "argument --scan-shapes: invalid scan_shape value: '1x2'"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
