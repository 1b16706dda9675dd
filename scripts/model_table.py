"""The released checkpoints as tables for people: docs/models.md, which make_cards.py writes."""

from collections.abc import Callable, Sequence

from model_zoo import ZooModel

BEGIN = """# Released models

The {count} checkpoints of the original release ([OpenGVLab/VideoMamba]({url})).
`scripts/make_cards.py` writes this page from [`hub_cards/models.json`](../hub_cards/models.json). The figures are the
published ones and were not measured again; the card of each model says where they are from. Download a file and convert
it:

```bash
python scripts/convert_checkpoint.py videomamba_t16_k400_f8_res224.pth videomamba-ti-k400 --labels kinetics400
```

`*`: the source lists the model under the file of another model; there is no file of its own.
"""
URL = "https://huggingface.co/OpenGVLab/VideoMamba"
Row = Sequence[str]


def model_tables(zoo: list[ZooModel]) -> str:
    """All models in Markdown, a table for each family."""
    parts = [BEGIN.format(count=len(zoo), url=URL)]
    for family, (title, columns, row) in TABLES.items():
        models = [entry for entry in zoo if entry.family == family]
        parts.append(f"## {title}\n\n{_table(columns, [row(entry) for entry in models])}")
    return "\n".join(parts)


def _table(columns: Row, rows: list[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _file(entry: ZooModel) -> str:
    return "`*`" if entry.filename is None else f"`{entry.filename}`"


def _image_row(entry: ZooModel) -> Row:
    figures = f"{entry.params_millions:g} M", f"{entry.gflops:g} G", f"{entry.top1:.1f} %"
    return [entry.size.name, str(entry.resolution), *figures, _file(entry)]


def _video_row(entry: ZooModel) -> Row:
    views = f"{entry.temporal_clips} x {entry.spatial_crops}"
    where = entry.dataset.title, entry.size.name, str(entry.pretraining), str(entry.frames), str(entry.resolution)
    return [*where, views, f"{entry.top1:.1f} %", _file(entry)]


def _pretraining_row(entry: ZooModel) -> Row:
    return [entry.dataset.title, entry.size.name, str(entry.frames), str(entry.epochs), _file(entry)]


def _retrieval_row(entry: ZooModel) -> Row:
    benchmarks = [(entry.zero_shot or {})[name] for name in BENCHMARKS]
    found = [f"{figures['text_to_video']['recall_at_1']:.1f} %" for figures in benchmarks]
    return [entry.dataset.title, entry.size.name, *found, _file(entry)]


BENCHMARKS = ("MSR-VTT", "DiDeMo", "ActivityNet Captions", "LSMDC", "MSVD")
TABLES: dict[str, tuple[str, Row, Callable[[ZooModel], Row]]] = {
    "image-classification": (
        "Images (ImageNet-1K)",
        ("size", "resolution", "parameters", "FLOPs", "top-1", "file"),
        _image_row,
    ),
    "video-classification": (
        "Videos",
        ("data", "size", "pretraining", "frames", "resolution", "clips x crops", "top-1", "file"),
        _video_row,
    ),
    "masked-pretraining": ("Masked pretraining", ("data", "size", "frames", "epochs", "file"), _pretraining_row),
    "video-text-retrieval": (
        "Videos and texts (zero-shot text to video, recall at 1)",
        ("data", "size", *BENCHMARKS, "file"),
        _retrieval_row,
    ),
}
