"""The released checkpoints, as hub_cards/models.json has them, and their model cards."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "hub_cards" / "models.json"
TEMPLATES = ROOT / "hub_cards" / "templates"
RECIPES = ROOT / "scripts" / "recipes"

# What an entry of the table has: all of COMMON, those of its family, and what it needs of OPTIONAL.
COMMON = ("name", "family", "size", "dataset", "resolution", "filename", "base_models", "teacher", "recipes")
FAMILIES = {
    "image-classification": ("top1", "params_millions", "gflops"),
    "video-classification": ("pretraining", "frames", "temporal_clips", "spatial_crops", "top1"),
    "masked-pretraining": ("frames", "epochs"),
    "video-text-retrieval": ("frames", "zero_shot"),
}
OPTIONAL = ("listed_as", "remarks")
COUNTS = ("resolution", "frames", "temporal_clips", "spatial_crops", "epochs")
SCORES = ("top1", "params_millions", "gflops")

# Tasks of the Hub, which has none for the last two: theirs is the one that it takes any AutoModel for.
PIPELINE_TAGS = {
    "image-classification": "image-classification",
    "video-classification": "video-classification",
    "masked-pretraining": "feature-extraction",
    "video-text-retrieval": "feature-extraction",
}
TAGS = {
    "image-classification": ["vision"],
    "video-classification": ["video"],
    "masked-pretraining": ["video", "masked-pretraining"],
    "video-text-retrieval": ["video", "video-text-retrieval", "zero-shot-video-classification"],
}
RETRIEVAL_TASK = "zero-shot-video-retrieval"
PICTURES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
EXAMPLE_PICTURES = {name: f"{PICTURES}/{name.lower()}.jpg" for name in ("Tiger", "Teapot", "Palace")}
# Those of Transformers' own documentation, of Kinetics. No public ones are known of the other data sets.
CLIPS = "https://huggingface.co/datasets/nateraw/kinetics-mini/resolve/main/val"
EXAMPLE_CLIPS = {
    "Archery": f"{CLIPS}/archery/-Qz25rXdMjE_000014_000024.mp4",
    "Bowling": f"{CLIPS}/bowling/-WH-lxmGJVY_000005_000015.mp4",
}
CANDIDATE_LABELS = "a person shoots an arrow, a person throws a bowling ball, a dog runs over a meadow"
# The resolutions that training went through, as file names have them; those that are not here are from 224.
RESOLUTIONS = {224: "224", 576: "224to448to576"}


@dataclass(frozen=True)
class Size:
    """Width and depth."""

    name: str
    hidden_size: int
    num_hidden_layers: int


@dataclass(frozen=True)
class DataSet:
    """
    What a model was trained on: its name in file names and in texts. `ids` are those on the Hub, or where no whole copy
    is known there common names, which the Hub shows without a link.
    """

    name: str
    tag: str
    title: str
    ids: list[str]
    split: str | None
    num_classes: int | None
    has_labels: bool


@dataclass(frozen=True)
class Source:
    """Where the weights are, and the table with their figures."""

    name: str
    url: str
    table: str


@dataclass(frozen=True)
class ZooModel:
    """A released checkpoint. Names of other models are those of the table, or ids on the Hub, which have a slash."""

    name: str
    family: str
    size: Size
    dataset: DataSet
    source: Source
    resolution: int
    filename: str | None
    base_models: list[str]
    teacher: str | None
    recipes: list[str]
    frames: int | None = None
    pretraining: str | None = None
    temporal_clips: int | None = None
    spatial_crops: int | None = None
    epochs: int | None = None
    top1: float | None = None
    params_millions: float | None = None
    gflops: float | None = None
    zero_shot: dict[str, dict[str, dict[str, float]]] | None = None
    listed_as: str | None = None
    remarks: list[str] = field(default_factory=list)
    published_base_models: list[str] = field(default_factory=list)  # but for those whose file isn't known
    also_listed_for: list[str] = field(default_factory=list)  # names of those that are `listed_as` the file of this one

    @property
    def hidden_size(self) -> int:
        return self.size.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.size.num_hidden_layers

    @property
    def labels(self) -> str | None:
        """What `load_labels` takes."""
        return self.dataset.name if self.dataset.has_labels and self.top1 is not None else None

    @property
    def num_tokens(self) -> int:
        return 1 + (self.frames or 1) * (self.resolution // 16) ** 2

    @property
    def expected_filename(self) -> str:
        """The name of the file by the rule that the names of the release follow."""
        stage = "mask_ft" if "MASK" in (self.pretraining or "") else None
        if self.family == "masked-pretraining":
            stage = "mask_pt"
        frames = None if self.frames is None else f"f{self.frames}"
        resolutions = RESOLUTIONS.get(self.resolution, f"224to{self.resolution}")
        parts = (f"{self.size.name[0].lower()}16", self.dataset.tag, stage, frames, f"res{resolutions}")
        return f"videomamba_{'_'.join(part for part in parts if part)}.pth"


# The table


def load_zoo(path: Path = TABLE) -> list[ZooModel]:
    r"""
    All released checkpoints, in the order of the table.

    Args:
        path (`Path`): The table.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: with what is wrong with the table, and where.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
        return _parse(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_by_filename(filename: str, zoo: Iterable[ZooModel] | None = None) -> ZooModel | None:
    """The checkpoint in a file of this name, if there is one in the zoo."""
    return next((entry for entry in zoo or load_zoo() if entry.filename == filename), None)


def _parse(table: dict[str, Any]) -> list[ZooModel]:
    _check_keys("the table", table, ("source", "tables", "sizes", "datasets", "models"))
    sizes = {name: _build(Size, f"size {name}", {"name": name, **values}) for name, values in table["sizes"].items()}
    datasets = {
        name: _build(DataSet, f"data set {name}", {"name": name, **values})
        for name, values in table["datasets"].items()
    }
    _check_keys("tables", table["tables"], FAMILIES)
    sources = {
        family: _build(Source, "source", {**table["source"], "table": url}) for family, url in table["tables"].items()
    }
    models = [_entry(values, sizes, datasets, sources) for values in table["models"]]
    for key in ("name", "filename"):
        values = [getattr(entry, key) for entry in models if getattr(entry, key) is not None]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{key} {', '.join(twice)} is there more than once")
    known = {entry.name for entry in models}
    for entry in models:
        for name in (*entry.base_models, *filter(None, [entry.teacher])):
            if "/" not in name:
                _check_one_of(f"{entry.name}: base model or teacher", name, known)
    without_file = {entry.name for entry in models if entry.filename is None}
    return [
        replace(
            entry,
            published_base_models=[name for name in entry.base_models if name not in without_file],
            also_listed_for=[other.name for other in models if other.listed_as and other.listed_as == entry.filename],
        )
        for entry in models
    ]


def _entry(
    values: dict[str, Any], sizes: dict[str, Size], datasets: dict[str, DataSet], sources: dict[str, Source]
) -> ZooModel:
    name = values.get("name", "an entry without `name`")
    _check_one_of(f"{name}: family", values.get("family"), FAMILIES)
    _check_keys(name, values, (*COMMON, *FAMILIES[values["family"]]), OPTIONAL)
    _check_one_of(f"{name}: size", values["size"], sizes)
    _check_one_of(f"{name}: dataset", values["dataset"], datasets)
    for key in (*COUNTS, *SCORES):
        kind = int if key in COUNTS else (int, float)
        if key in values and not (isinstance(values[key], kind) and values[key] > 0):
            raise ValueError(f"{name}: {key} must be a positive number, got {values[key]!r}")
    if (values["filename"] is None) != ("listed_as" in values):
        raise ValueError(f"{name}: `listed_as` is for an entry whose `filename` is null, and needed there")
    if absent := [recipe for recipe in values["recipes"] if not _recipe_path(recipe).is_file()]:
        raise ValueError(f"{name}: no recipe {', '.join(absent)} in {RECIPES}")
    of_tables = {"size": sizes[values["size"]], "dataset": datasets[values["dataset"]]}
    return ZooModel(**{**values, **of_tables, "source": sources[values["family"]]})


def _build(kind: Any, where: str, values: dict[str, Any]) -> Any:
    _check_keys(where, values, [item.name for item in fields(kind)])
    return kind(**values)


def _check_keys(where: str, found: Iterable[str], required: Iterable[str], optional: Iterable[str] = ()) -> None:
    found = set(found)
    if missing := sorted(set(required) - found):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(found - set(required) - set(optional)):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}")


def _check_one_of(where: str, value: Any, known: Iterable[str]) -> None:
    if value not in set(known):
        raise ValueError(f"{where} must be one of {', '.join(sorted(known))}, got {value}")


# How a checkpoint was trained


@dataclass(frozen=True)
class Recipe:
    """Values of a released run, and what the first lines of its file say: GPUs, and views of each video in the test."""

    name: str
    values: dict[str, Any]
    gpus: int
    gpus_are_published: bool
    views: tuple[int, int] | None

    @property
    def option(self) -> str:
        """What `--recipe` takes."""
        return self.name.split("/")[-1]


def _recipe_path(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def read_recipe(name: str) -> Recipe:
    """The recipe of this name in scripts/recipes, of which make_recipes.py wrote the first lines."""
    text = _recipe_path(name).read_text("utf-8")
    gpus = re.search(r"(\d+) GPUs(, which is not published)?", text)
    views = re.search(r"^# Test: --num-clips (\d+) --num-crops (\d+)\.$", text, re.MULTILINE)
    if gpus is None:
        raise ValueError(f"{_recipe_path(name)} doesn't say on how many GPUs it was run")
    tested = (int(views[1]), int(views[2])) if views else None
    return Recipe(name, yaml.safe_load(text), int(gpus[1]), gpus[2] is None, tested)


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """The values of a recipe in words. Learning rates are those of the run, scaled to its batch."""
    values, repeats = recipe.values, recipe.values.get("num_sample", 1)
    views = values["batch_size"] * values.get("gradient_accumulation_steps", 1) * repeats * recipe.gpus
    scale = views / values["base_batch_size"]
    highest, lowest = (values[name] * scale for name in ("learning_rate", "min_learning_rate"))
    of_views = f" with {repeats} views of each example" if repeats > 1 else ""
    facts = {
        "epochs": f"{values['epochs']:.3g}{of_views}, the first {values['warmup_epochs']:.3g} as warm-up",
        "batch": f"{views:,} views on {recipe.gpus} GPUs" + ("" if recipe.gpus_are_published else " (assumed)"),
        "learning rate": f"{highest:.3g}" + (f", by a cosine to {lowest:.3g}" if lowest != highest else ""),
        "weight decay": f"{values['weight_decay']:g}",
        "drop path": f"{values['drop_path_rate']:g}",
        "augmentation": ", ".join(_augmentation(values)),
    }
    if "adam_beta2" in values:
        facts["second beta of AdamW"] = f"{values['adam_beta2']:g}"
    if "max_grad_norm" in values:
        facts["largest norm of gradients"] = f"{values['max_grad_norm']:g}"
    if masks := _masks(values):
        facts["hidden tokens"] = masks
    return {**facts, "precision": values["mixed_precision"]}


def _augmentation(values: dict[str, Any]) -> list[str]:
    words = [f"crops of {100 * values['min_crop_area']:.0f} to 100 % of the area"]
    words.append("flips" if values["flip"] else "no flips")
    if values.get("auto_augment"):
        words.append("AutoAugment")
    if "rand_augment_ops" in values:
        operations, magnitude = values["rand_augment_ops"], values["rand_augment_magnitude"]
        words.append(f"RandAugment ({operations} operations, magnitude {magnitude:g})")
    for name in ("random_erasing", "mixup", "cutmix", "label_smoothing"):
        if values.get(name):
            words.append(f"{name.replace('_', ' ')} {values[name]:g}")
    return words


def _masks(values: dict[str, Any]) -> str:
    kinds = (("", ""), ("video_", " of videos"), ("image_", " of images"))
    masks = [
        f"{100 * values[f'{prefix}mask_ratio']:g} %{what} ({values[f'{prefix}mask_type']})"
        for prefix, what in kinds
        if f"{prefix}mask_type" in values
    ]
    return ", ".join(masks)


def contradictions(entry: ZooModel, recipes: Sequence[Recipe]) -> list[str]:
    """Where the table of the source and its run files disagree, in sentences."""
    sentences = []
    for recipe in recipes:
        views = entry.temporal_clips, entry.spatial_crops
        if recipe.views is not None and recipe.views != views:
            clips, crops = recipe.views
            sentences.append(
                f"The table says {views[0]} clips of {views[1]} crops each, the published run file tests with {clips} "
                f"of {crops}. Which of them the published figure belongs to is not known."
            )
        if entry.epochs is not None and entry.epochs != recipe.values["epochs"]:
            sentences.append(
                f"The table says {entry.epochs} epochs, the recipe {recipe.values['epochs']:g}, as the published run "
                "file does but for one more, for the sake of a last checkpoint."
            )
    for name in entry.also_listed_for:
        sentences.append(
            f"The table lists this file for `{name}` as well, and at least one of the two rows is wrong. By the rule "
            "that all other names follow, it is the model of this card."
        )
    return [*sentences, *entry.remarks]


# Cards

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def make_card(entry: ZooModel, repo_id: str) -> ModelCard:
    r"""
    The card of a checkpoint.

    Args:
        entry ([`ZooModel`]): The checkpoint.
        repo_id (`str`): Where it is published, as `ORG/NAME`; the models that it builds on are taken to be in `ORG`.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: if `repo_id` has no organisation.
    """
    organization, _, name = repo_id.rpartition("/")
    if not organization:
        raise ValueError(f"`repo_id` must be ORG/NAME, got {repo_id}")

    def hub_id(model: str) -> str:
        return model if "/" in model else f"{organization}/{model}"

    recipes = [read_recipe(recipe) for recipe in entry.recipes]
    facts = [recipe_facts(recipe) for recipe in recipes]
    rows = dict.fromkeys(key for column in facts for key in column)
    body = ENVIRONMENT.get_template(f"{entry.family}.md").render(
        entry=entry,
        repo_id=repo_id,
        base_models=[hub_id(model) for model in entry.base_models],
        teacher=entry.teacher and hub_id(entry.teacher),
        recipes=recipes,
        training={row: [column.get(row, "none") for column in facts] for row in rows},
        contradictions=contradictions(entry, recipes),
    )
    data = _metadata(entry, name, [hub_id(model) for model in entry.published_base_models])
    return ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\n{{ body }}", body=body)


def _metadata(entry: ZooModel, model_name: str, base_models: list[str]) -> ModelCardData:
    others: dict[str, Any] = {}
    if base_models:  # of several the Hub would think that they were merged
        others["base_model_relation"] = "finetune"
    results = eval_results(entry)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[entry.family],
        license="apache-2.0",
        language="en" if entry.family == "video-text-retrieval" else None,
        base_model=base_models or None,
        datasets=entry.dataset.ids,
        metrics=["recall" if entry.top1 is None else "accuracy"] if results else None,
        tags=["videomamba", "mamba", *TAGS[entry.family]],
        model_name=model_name if results else None,
        eval_results=results or None,
        widget=widget(entry),
        **others,
    )


def widget(entry: ZooModel) -> list[dict[str, str]]:
    """Examples to try the model with."""
    if entry.family == "image-classification":
        return [{"src": url, "example_title": title} for title, url in EXAMPLE_PICTURES.items()]
    foreign = "" if entry.dataset.name == "kinetics400" else ", from Kinetics-400"
    more = {"candidate_labels": CANDIDATE_LABELS} if entry.family == "video-text-retrieval" else {}
    return [{"src": url, "example_title": title + foreign, **more} for title, url in EXAMPLE_CLIPS.items()]


def eval_results(entry: ZooModel) -> list[EvalResult]:
    """The published figures with their source."""
    source = {"source_name": entry.source.name, "source_url": entry.source.table}
    how = {"num_frames": entry.frames, "image_size": entry.resolution}
    if entry.zero_shot is not None:
        return [
            EvalResult(
                task_type=RETRIEVAL_TASK,
                task_name="Zero-shot retrieval of videos and texts",
                dataset_type=benchmark.lower().replace(" ", "-"),
                dataset_name=benchmark,
                dataset_args=how,
                metric_type=f"{metric}_{direction}",
                metric_name=f"{direction.replace('_', ' ').capitalize()}, {metric.replace('_', ' ')} (%)",
                metric_value=score,
                **source,
            )
            for benchmark, directions in entry.zero_shot.items()
            for direction, scores in directions.items()
            for metric, score in scores.items()
        ]
    if entry.top1 is None:
        return []
    views = {"num_clips": entry.temporal_clips, "num_crops": entry.spatial_crops}
    return [
        EvalResult(
            task_type=entry.family,
            dataset_type=entry.dataset.ids[0],
            dataset_name=entry.dataset.title,
            dataset_split=entry.dataset.split,
            dataset_args={key: value for key, value in (how | views).items() if value is not None},
            metric_type="accuracy",
            metric_name="Top-1 accuracy (%)",
            metric_value=entry.top1,
            **source,
        )
    ]
