"""What `benchmark.py` makes of its measurements: claims, tables, a picture."""

import math
import operator
import os
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark_measures import COMPARED, TRAINING_STEP, Result, busy_name, model_name, scan_name
from modeling_videomamba import selective_scan_backends
from modeling_videomamba.matrix_product_cpu import unavailable_reason as matrix_units_unavailable_reason
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from modeling_videomamba.training.plots import pyplot

COLORS = ("#0072b2", "#d55e00", "#cc79a7", "#009e73")


def claims(results: dict[str, Result]) -> list[Result]:
    """The targets of this project, what was measured (`None` if it was not), and whether it holds."""

    def value(name: str, key: str = "min_seconds") -> float:
        return results.get(name, {}).get(key, math.nan)

    def times_ours(peer: str, key: str = "min_seconds") -> float:
        return value(model_name(peer, 64), key) / value(ti, key)

    def mambapy(direction: str) -> float:
        return value(scan_name("mambapy", [1, 1569, 384], direction), "time_over_cpu")

    ti, ti_1024, m = model_name("VideoMamba-Ti", 64), model_name("VideoMamba-Ti", 1024), model_name("VideoMamba-M", 8)
    rows = [
        ("scan 1x1569x384 forward: mambapy's time / ours", mambapy("forward"), ">=", 80.0),
        ("scan 1x1569x384 forward+backward: the same", mambapy("forward+backward"), ">=", 50.0),
        ("Ti, 64 frames: time / limit", value(ti, "ratio_to_limit"), "<=", 2.0),
        ("Ti, 64 frames: VideoMAE's time / ours", times_ours("VideoMAE-Ti"), ">=", 6.0),
        ("Ti, 64 frames: divided TimeSformer's time / ours", times_ours("TimeSformer-Ti divided"), ">=", 1.0),
        ("M, 8 frames: time / limit", value(m, "ratio_to_limit"), "<=", 1.15),
        ("Ti, 64 frames: peak MB", value(ti, "peak_bytes") / 1e6, "<=", 90.0),
        (
            "Ti, 64 frames: joint TimeSformer's peak / ours",
            times_ours("TimeSformer-Ti joint", "peak_bytes"),
            ">=",
            40.0,
        ),
        ("Ti, 1024 frames: GB of the process", value(ti_1024, "process_peak_bytes") / 1e9, "<", 2.5),
        ("Ti: training step / inference", value("training VideoMamba-Ti", "ratio_of_min"), "<=", 4.0),
        ("Ti: masked pretraining step / unmasked", value("masked training VideoMamba-Ti", "ratio_of_min"), "<", 0.5),
        *(
            (f"{model}, beside {count} busy: time / quiet time", value(busy_name(model, 8), key), "<=", target)
            for model in ("VideoMamba-Ti", TRAINING_STEP)
            for count, key, target in ((1, "ratio_beside_1", 2.2), (4, "ratio_beside_4", 6.0))
        ),
    ]
    holds: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
    return [
        {"claim": claim, "target": f"{sign} {target:g}", "value": None, "holds": None}
        | ({} if math.isnan(measured) else {"value": measured, "holds": holds[sign](measured, target)})
        for claim, measured, sign, target in rows
    ]


def make_report(results: dict[str, Result], threads: int) -> Result:
    for result in results.values():
        if result["measure"] == "scan" and "failed" not in result:
            ours = results.get(scan_name("cpu", result["shape"], result["direction"]), {})
            if "min_seconds" in ours:
                result["time_over_cpu"] = result["min_seconds"] / ours["min_seconds"]
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "logical_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_units": matrix_units_unavailable_reason() or "used",
        "backend": os.environ.get(BACKEND_VARIABLE) or ("cpu" if selective_scan_backends()["cpu"].usable else "torch"),
        "dtype": "float32",
        "best_matrix_product_rate": max((r.get("matrix_product_rate", 0.0) for r in results.values()), default=0.0),
    }
    return {"environment": environment, "measurements": results, "claims": claims(results)}


# Title, what names a row, the numbers of a row, and a note. Numbers have the names that they have in the JSON.
TABLES = {
    "scan": (
        "The scan alone, state 16",
        ("shape", "direction", "implementation"),
        ("min_seconds", "median_seconds", "peak_bytes", "time_over_cpu"),
        "`cpu` and `torch` are ours. They do more: the softplus of dt, whose result the others are given.",
    ),
    "model": (
        "Models, inference on one clip",
        ("model", "frames"),
        ("min_seconds", "median_seconds", "peak_bytes", "process_peak_bytes"),
        "peak: above the weights and the input; process peak: all memory of the process.",
    ),
    "limit": (
        "Models beside the limit of this machine",
        ("model", "frames"),
        (
            *("multiply_adds", "multiply_adds_without_scan", "matrix_product_rate"),
            *("limit_seconds", "ratio_to_limit", "ratio_to_matrix_products_only"),
        ),
        "Multiply-adds in 10^9; the best rate of matrix products around the timed calls in 10^9 of them per second.",
    ),
    "profile": (
        "Where the time goes, inference on one clip",
        ("model", "frames"),
        ("min_seconds", *(f"{part}_seconds" for part in ("products", "scan", "convolution", "norm", "sum", "rest"))),
        "Of the fastest call, kernel by kernel; products of the embeddings and of dt_proj are in the rest.",
    ),
    "busy": (
        "Beside processes that take all the time they get",
        ("model", "frames", "batch"),
        (
            *("beside_0_median_seconds", "beside_1_median_seconds", "beside_4_median_seconds"),
            *("ratio_beside_1", "ratio_beside_4"),
        ),
        "Beside none, one and four of them; the ratio is to beside none.",
    ),
    "training": (
        "Training of VideoMamba-Ti",
        ("frames", "batch"),
        ("inference_min_seconds", "step_min_seconds", "ratio_of_min", "ratio_of_median", "peak_bytes"),
        "A step: forward, backward and AdamW, in turn with inference on the same clips.",
    ),
    "masked training": (
        "Masked pretraining of VideoMamba-Ti, without the teacher",
        ("frames", "batch", "mask_ratio"),
        ("unmasked_min_seconds", "masked_min_seconds", "ratio_of_min", "ratio_of_median", "peak_bytes"),
        "A step: mask, forward, backward and AdamW, in turn with one that hides nothing, whose peak isn't shown.",
    ),
    "training profile": (
        "Where the time goes, a step of training",
        ("frames", "batch"),
        (
            *("min_seconds", "products_seconds", "scan_seconds", "scan_backward_seconds", "convolution_seconds"),
            *("convolution_backward_seconds", "norm_seconds", "optimizer_seconds", "rest_seconds"),
        ),
        "Of the fastest step, the norm with its gradient; the embeddings and what PyTorch adds up are in the rest.",
    ),
}
BILLIONS = {word: (word, 1e-9) for word in ("adds", "scan", "rate")}
UNITS = {"seconds": ("ms", 1e3), "bytes": ("MB", 1e-6), **BILLIONS}  # by the last word of a name


def number(value: float, key: str = "") -> str:
    """At least three digits, in the unit of the key."""
    value *= UNITS.get(key.split("_")[-1], ("", 1.0))[1]
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f}"


def make_table(kind: str, results: list[Result]) -> Table:
    title, names, keys, note = TABLES[kind]
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for key in keys:
        start, _, unit = key.rpartition("_")
        table.add_column(f"{start.replace('_', ' ')} {UNITS.get(unit, (unit,))[0]}", justify="right")
    notes = [note]
    for result in results:
        row = ["x".join(map(str, result[name])) if name == "shape" else str(result[name]) for name in names]
        if "failed" in result:
            table.add_row(*row, "failed")
            notes.append(f"{' '.join(row)}: failed: {result['failed']}")
        else:
            table.add_row(*row, *(number(result[key], key) if key in result else "" for key in keys))
    table.caption = Text("\n".join(notes))
    return table


def print_report(console: Console, report: Result) -> None:
    facts, results = report["environment"], report["measurements"].values()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    machine = f"threads: {facts['threads']}, logical cores: {facts['logical_cores']}, {facts['cpu_capability']}"
    units = f"matrix units: {facts['matrix_units']}"
    lines = [versions, f"{machine}, {facts['dtype']}, backend {facts['backend']}", units]
    if rate := facts["best_matrix_product_rate"]:
        lines.append(f"best rate of matrix products: {number(rate, 'rate')} G multiply-adds / s")
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
    for kind in TABLES:
        rows = [r for r in results if ("ratio_to_limit" in r if kind == "limit" else r["measure"] == kind)]
        if rows:
            console.print(make_table(kind, rows))
    table = Table("claim", "target", "measured", "holds", title="Claims, by the shortest times", title_justify="left")
    measured = [claim for claim in report["claims"] if claim["value"] is not None]
    for claim in measured:
        table.add_row(claim["claim"], claim["target"], number(claim["value"]), "yes" if claim["holds"] else "no")
    if others := len(report["claims"]) - len(measured):
        table.caption, table.caption_justify = f"Claims that were not measured: {others}.", "left"
    console.print(table)


def draw_picture(path: Path, report: Result) -> None:
    """Time and peak memory against the number of frames, a line for each model."""
    plots = pyplot()
    from matplotlib import ticker

    results = [result for result in report["measurements"].values() if result["measure"] == "model"]
    facts, ticks = report["environment"], sorted({r["frames"] for r in results if r["model"] in COMPARED[1:]})
    figure, axes = plots.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    panels = (
        ("min_seconds", 1, "time of a forward pass, s"),
        ("peak_bytes", 1e6, "peak memory above weights and input, MB"),
    )
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        for model, color, marker in zip(COMPARED, COLORS, "osD^", strict=True):
            points = [r for r in results if r["model"] == model and r["frames"] in ticks]
            done = [(r["frames"], r[key] / unit) for r in points if "failed" not in r]
            failed = [str(r["frames"]) for r in points if "failed" in r]
            label = f"{model} (failed: {', '.join(failed)})" if failed else model
            frames, values = zip(*done, strict=True) if done else ((), ())
            width = 3 if model == COMPARED[0] else 1.5
            axis.plot(frames, values, color=color, marker=marker, linewidth=width, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, map(str, ticks))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel("frames")
        axis.set_title(title, fontsize=11)
        axis.grid(which="major", alpha=0.3)
    size = results[0]["image_size"]
    figure.suptitle(f"One clip of {size} x {size} on a CPU, {facts['dtype']}, threads: {facts['threads']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plots.close(figure)
