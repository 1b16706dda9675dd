"""The table of released checkpoints, and the model cards that are made of it."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import chain

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers.pipelines import PIPELINE_REGISTRY

import evaluate_retrieval
import evaluate_video
import finetune
import make_cards
import pretrain_umt
import pretrain_video_text
import search_videos
from command_line import parse_dataclasses
from model_table import model_tables
from model_zoo import RECIPES, TABLE, find_by_filename, load_zoo, make_card, read_recipe, recipe_facts
from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.labels import KNOWN_LABELS, load_labels
from tests.conftest import ROOT, tiny_config
from tests.launching import SCRIPTS, run
from tests.models import save_video_text
from videomamba_arguments import DistillationArguments

ORGANIZATION = "some-org"
RAW = json.loads(TABLE.read_text("utf-8"))
ROWS = {row["name"]: row for row in RAW["models"]}
ZOO = {entry.name: entry for entry in load_zoo()}
NAMES = list(ROWS)
MISLABELLED = {
    "videomamba-ti-in1k-448": "videomamba_t16_in1k_res224to448.pth",
    "videomamba-m-k400-mask-f16-224": "videomamba_m16_k400_mask_ft_f16_res224.pth",
    "videomamba-m-ssv2-mask-f16-224": "videomamba_m16_ssv2_mask_ft_f16_res224.pth",
}
DISPUTED = {  # beside the views of Something-Something v2
    "videomamba-m-coin-mask-f64-224",
    "videomamba-m-ssv2-umt-f8-224",
    "videomamba-ti-in1k-448",
    "videomamba-ti-k400-f64-384",
    # whose file another row has as well
    "videomamba-m-in1k-224",
    "videomamba-m-k400-f16-224",
    "videomamba-m-ssv2-f16-224",
}


def card_of(entry):
    return make_card(entry, f"{ORGANIZATION}/{entry.name}")


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Files of all cards by name, as the script writes them."""
    folder = tmp_path_factory.mktemp("cards")
    result = run(sys.executable, SCRIPTS / "make_cards.py", folder, "--organization", ORGANIZATION)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"63 cards in {folder}\n"
    return {path.parent.name: path for path in folder.glob("*/README.md")}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


# The table


def test_file_names_agree_with_their_rows():
    for name, entry in ZOO.items():
        if name in MISLABELLED:
            assert entry.filename is None and entry.expected_filename == MISLABELLED[name]
            other = find_by_filename(entry.listed_as)
            assert other is not None and other is not entry and other.filename == other.expected_filename
        else:
            assert entry.filename == entry.expected_filename and entry.listed_as is None
            assert find_by_filename(entry.filename) == entry
    assert find_by_filename("videomamba_x16.pth") is None


def test_names_are_those_of_repositories():
    families = [entry.family for entry in ZOO.values()]
    assert len(ZOO) == len(RAW["models"]) == 63
    assert [families.count(family) for family in RAW["tables"]] == [10, 48, 2, 3]
    for name, entry in ZOO.items():
        validate_repo_id(f"{ORGANIZATION}/{name}")
        assert re.fullmatch(r"videomamba-(ti|s|m|b)(-[a-z0-9]+)+", name)
        parts = name.split("-")
        assert parts[1] == entry.size.name.lower() and parts[-1] == str(entry.resolution)
        assert parts[2] == entry.dataset.tag.lower() and ("mask" in parts) == ("MASK" in (entry.pretraining or ""))
        assert entry.frames is None or f"f{entry.frames}" in parts


def test_sizes_labels_and_parameters_are_those_of_the_package():
    assert [(entry["hidden_size"], entry["num_hidden_layers"]) for entry in RAW["sizes"].values()] == [
        (shape["hidden_size"], shape["num_hidden_layers"]) for shape in VIDEOMAMBA_SIZES.values()
    ]
    with_labels = {name for name, values in RAW["datasets"].items() if values["has_labels"]}
    assert with_labels == set(KNOWN_LABELS)
    for name in with_labels:
        assert len(load_labels(name)) == RAW["datasets"][name]["num_classes"]
    for entry in ZOO.values():
        if entry.params_millions is not None:
            shape = {"hidden_size": entry.hidden_size, "num_hidden_layers": entry.num_hidden_layers}
            with torch.device("meta"):
                config = VideoMambaConfig(num_frames=None, num_labels=1000, image_size=entry.resolution, **shape)
                parameters = VideoMambaForImageClassification(config).num_parameters()
            assert round(parameters / 1e6) == entry.params_millions


def ancestors(entry):
    """The models of the zoo that it started from, the nearest first."""
    while own := [ZOO[name] for name in entry.base_models if "/" not in name]:
        (entry,) = own
        yield entry


@pytest.mark.parametrize("name", NAMES)
def test_what_training_started_from_fits(name):
    entry, before = ZOO[name], list(ancestors(ZOO[name]))
    assert all(other.size == entry.size for other in before)
    if entry.resolution > 224:
        nearest = before[0]
        assert (nearest.family, nearest.dataset, nearest.frames) == (entry.family, entry.dataset, entry.frames)
        assert nearest.resolution < entry.resolution and nearest.pretraining == entry.pretraining
    if entry.family == "video-classification":
        oldest = before[-1]
        expected = "masked-pretraining" if "MASK" in entry.pretraining else "image-classification"
        assert (oldest.family, oldest.resolution) == (expected, 224)
        between = {other.dataset.name for other in before[:-1]} - {entry.dataset.name}
        assert between == ({"kinetics400"} if "K400" in entry.pretraining else set())
        assert expected == "image-classification" or oldest.dataset.name in {entry.dataset.name, "kinetics400"}
    if entry.family == "video-text-retrieval":
        assert [other.name for other in before] == ["videomamba-m-k400-umt-f8-224"]
    from_scratch = entry.family == "masked-pretraining" or (entry.dataset.tag, entry.resolution) == ("in1k", 224)
    assert from_scratch == (before == [])


def test_recipes_agree_with_their_rows():
    for entry in ZOO.values():
        for recipe in map(read_recipe, entry.recipes):
            assert recipe.values["image_size"] == entry.resolution
            assert recipe.values.get("num_frames") == entry.frames
            run_name = recipe.name.replace("/", "-").split("-")
            sizes = {"tiny": "Ti", "small": "S", "middle": "M", "base": "B"}
            assert entry.family == "video-text-retrieval" or [sizes[word] for word in run_name if word in sizes] == [
                entry.size.name
            ]
            if "size" in recipe.values and entry.family != "video-text-retrieval":
                assert sizes[recipe.values["size"]] == entry.size.name
            assert ("mask" in run_name) == ("MASK" in (entry.pretraining or ""))
        is_student = entry.teacher is not None and "/" not in entry.teacher
        assert is_student == any("distilled" in name and name.endswith("-224") for name in entry.recipes)
    used = list(chain.from_iterable(entry.recipes for entry in ZOO.values()))
    there = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert len(used) == len(set(used)) and {name for name in there if not name.startswith("lvu")} == set(used)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["models"][0].update(colour="blue"), "videomamba-ti-in1k-224 has unknown keys: colour"),
        (lambda table: table["models"][0].update(frames=8), "videomamba-ti-in1k-224 has unknown keys: frames"),
        (lambda table: table["models"][1].pop("top1"), "videomamba-s-in1k-224 lacks top1"),
        (lambda table: table["models"][1].pop("name"), "an entry without `name` lacks name"),
        (
            lambda table: table["models"].append(table["models"][2]),
            "name videomamba-m-in1k-224 is there more than once",
        ),
        (
            lambda table: table["models"][1].update(filename="videomamba_t16_in1k_res224.pth"),
            "filename videomamba_t16_in1k_res224.pth is there more than once",
        ),
        (lambda table: table["models"][0].update(family="audio"), "family must be one of image-classification, masked"),
        (lambda table: table["models"][0].update(size="XL"), "size must be one of B, M, S, Ti, got XL"),
        (lambda table: table["models"][0].update(dataset="in22k"), "dataset must be one of 17m, 25m, 5m, breakfast"),
        (lambda table: table["models"][0].update(top1="76.9"), "top1 must be a positive number, got '76.9'"),
        (lambda table: table["models"][0].update(resolution=22.4), "resolution must be a positive number, got 22.4"),
        (
            lambda table: table["models"][5].update(base_models=["vim"]),
            "base model or teacher must be one of videomamba",
        ),
        (lambda table: table["models"][2].update(teacher="vim"), "base model or teacher must be one of videomamba"),
        (lambda table: table["models"][2].update(recipes=["in22k"]), "videomamba-m-in1k-224: no recipe in22k in"),
        (
            lambda table: table["models"][0].update(filename=None),
            "`listed_as` is for an entry whose `filename` is null",
        ),
        (lambda table: table["datasets"]["coin"].pop("tag"), "data set coin lacks tag"),
        (lambda table: table["sizes"]["S"].update(heads=6), "size S has unknown keys: heads"),
        (lambda table: table["tables"].pop("masked-pretraining"), "tables lacks masked-pretraining"),
        (lambda table: table["source"].pop("url"), "source lacks url"),
        (lambda table: table.pop("models"), "the table lacks models"),
    ],
)
def test_a_broken_table_is_explained(tmp_path, change, message):
    table = copy.deepcopy(RAW)
    change(table)
    path = tmp_path / "models.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError) as error:
        load_zoo(path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}: ")


def test_what_is_no_table_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_zoo(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"source": ')
    with pytest.raises(ValueError, match="half.json: Expecting value"):
        load_zoo(tmp_path / "half.json")


# The cards


def test_all_cards_are_written(cards):
    assert set(cards) == set(NAMES)
    for name, path in cards.items():
        assert path.read_text("utf-8") == str(card_of(ZOO[name]))
        for line in path.read_text("utf-8").splitlines():
            assert "{{" not in line and "{%" not in line and "None" not in line and line == line.rstrip()


@pytest.mark.parametrize("name", NAMES)
def test_metadata_are_valid_and_those_of_the_table(cards, name):
    row, card = ROWS[name], ModelCard.load(cards[name])
    data = card.data.to_dict()
    assert data == metadata_load(cards[name]) == ModelCard(str(card)).data.to_dict()
    assert (data["library_name"], data["license"]) == ("transformers", "apache-2.0")
    assert data["pipeline_tag"] == (row["family"] if "classification" in row["family"] else "feature-extraction")
    assert data["pipeline_tag"] in PIPELINE_REGISTRY.get_supported_tasks()
    assert data["datasets"] == RAW["datasets"][row["dataset"]]["ids"] != []
    there = [
        base for base in row["base_models"] if "/" in base or ROWS[base]["filename"]
    ]  # the others aren't published
    bases = [base if "/" in base else f"{ORGANIZATION}/{base}" for base in there]
    assert data.get("base_model", []) == bases
    assert data.get("base_model_relation") == ("finetune" if bases else None)
    for repo_id in (*bases, *data["datasets"]):
        validate_repo_id(repo_id)
    assert data.get("language") == ("en" if row["family"] == "video-text-retrieval" else None)
    assert "videomamba" in data["tags"]


def published(row):
    """Pairs of data set and figure."""
    if "top1" in row:
        return [(RAW["datasets"][row["dataset"]]["title"], row["top1"])]
    return [
        (benchmark, score)
        for benchmark, directions in row.get("zero_shot", {}).items()
        for scores in directions.values()
        for score in scores.values()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_table_with_their_source(cards, name):
    row, card = ROWS[name], ModelCard.load(cards[name])
    results = card.data.eval_results or []
    assert [(result.dataset_name, result.metric_value) for result in results] == published(row)
    for result in results:
        assert result.source_url == RAW["tables"][row["family"]] and result.source_name and not result.verified
        assert str(result.metric_value) in card.text
    assert len({(result.dataset_name, result.metric_type) for result in results}) == len(results)
    if results:
        index = eval_results_to_model_index(name, results)
        assert index == metadata_load(cards[name])["model-index"]
        assert model_index_to_eval_results(index) == (name, results) == (card.data.model_name, card.data.eval_results)
    if row["family"] == "video-classification":
        views = {"num_clips": row["temporal_clips"], "num_crops": row["spatial_crops"]}
        seen = {"num_frames": row["frames"], "image_size": row["resolution"]}
        assert results[0].dataset_args == {**seen, **views}


def test_figures_of_retrieval_are_told_apart():
    names = [result.metric_name for result in card_of(ZOO["videomamba-m-5m-f8-224"]).data.eval_results[:6]]
    directions = ("Text to video", "Video to text")
    assert names == [f"{way}, recall at {k} (%)" for way in directions for k in (1, 5, 10)]


def test_widgets_show_what_the_model_has_a_class_for_or_tell_where_it_is_from(cards):
    for name, entry in ZOO.items():
        examples = ModelCard.load(cards[name]).data.widget
        assert examples and all(example["src"].startswith("https://huggingface.co/datasets/") for example in examples)
        suffix = ".jpg" if entry.family == "image-classification" else ".mp4"
        assert all(example["src"].endswith(suffix) for example in examples)
        assert all(("candidate_labels" in example) == (entry.zero_shot is not None) for example in examples)
        titles = [example["example_title"] for example in examples]
        if entry.dataset.name not in ("imagenet-1k", "kinetics400"):
            assert all(title.endswith(", from Kinetics-400") for title in titles)
        elif entry.labels is not None:
            classes = " ".join(load_labels(entry.labels))
            assert all(title.lower() in classes for title in titles)


@pytest.mark.parametrize("name", NAMES)
def test_mislabelled_rows_are_marked_and_no_others(cards, name):
    text, entry = ModelCard.load(cards[name]).text, ZOO[name]
    assert ("[!WARNING]" in text) == (name in MISLABELLED) == ("must be checked" in text)
    if name in MISLABELLED:
        assert f"`{entry.listed_as}`" in text and f"`{MISLABELLED[name]}`" in text
        assert "The weights are those of" not in text
    else:
        assert f"The weights are those of `{entry.filename}`" in text


@pytest.mark.parametrize("name", NAMES)
def test_contradictions_of_the_source_are_told(cards, name):
    text, entry = ModelCard.load(cards[name]).text, ZOO[name]
    two_clips = entry.family == "video-classification" and entry.dataset.tag == "ssv2"
    assert ("contradicts itself" in text) == (two_clips or name in DISPUTED)
    assert ("4 clips of 3 crops each, the published run file tests with 2 of 3" in text) == two_clips
    assert ("10 clips of 3 crops each, the published run file tests with 4" in text) == (
        name == "videomamba-m-coin-mask-f64-224"
    )
    assert ("200 epochs, the recipe 800, as the published run file does but for one" in text) == ("ssv2-umt" in name)
    also = [other for other in MISLABELLED if ZOO[other].listed_as == entry.filename]
    assert [f"lists this file for `{other}`" in text for other in MISLABELLED] == [n in also for n in MISLABELLED]
    for remark in entry.remarks:
        assert remark in text


def test_recipes_in_words():
    facts = {name: recipe_facts(read_recipe(name)) for name in ("in1k-small-224", "k400-tiny-f8x224", "video-text/5m")}
    assert facts["in1k-small-224"]["epochs"] == "100 with 3 views of each example, the first 1.67 as warm-up"
    assert facts["in1k-small-224"]["batch"] == "4,104 views on 8 GPUs"
    assert facts["k400-tiny-f8x224"]["learning rate"] == "0.0008, by a cosine to 4e-06"
    rising = recipe_facts(read_recipe("in1k-distilled-middle-576"))
    assert rising["learning rate"] == "2.58e-06, by a cosine to 5.16e-06"
    assert rising["epochs"] == "3.33 with 3 views of each example, the first 0.667 as warm-up"
    assert facts["k400-tiny-f8x224"]["batch"] == "1,024 views on 8 GPUs"
    assert "mixup 0.8, cutmix 1, label smoothing 0.1" in facts["k400-tiny-f8x224"]["augmentation"]
    assert facts["video-text/5m"]["hidden tokens"] == "80 % of videos (attention), 50 % of images (attention)"
    assert facts["video-text/5m"]["batch"] == "2,048 views on 16 GPUs"
    assert recipe_facts(read_recipe("in1k-distilled-middle-224"))["batch"].endswith("on 8 GPUs (assumed)")


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_a_card(cards, name):
    text, entry = ModelCard.load(cards[name]).text, ZOO[name]
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading.removesuffix("s") for heading in headings if heading != "Limits and biases"] == [
        "Use",
        "Result",
        "Training",
        "Source and licence",
        "Citation",
    ]
    assert headings.index("Limits and biases") == headings.index("Training") + 1
    limits = text.split("## Limits and biases\n")[1].split("## Source")[0]
    data = {"in1k": "ImageNet", "k400": "Kinetics", "ssv2": "Something-Something", "coin": "COIN"}.get(
        entry.dataset.tag
    )
    assert (data or {"breakfast": "Breakfast"}.get(entry.dataset.tag, "stock footage")) in limits
    assert ("CLIP" in limits) == (entry.teacher == "openai/clip-vit-base-patch16" or "mask" in name)
    assert entry.frames is None or f"It sees {entry.frames} frames" in limits
    assert "arxiv.org/abs/2403.06977" in text and "eprint={2403.06977}" in text
    assert ("LABEL_0" in text) == (entry.dataset.tag in ("breakfast", "coin"))
    shape = f"{entry.resolution} x {entry.resolution}"
    assert shape in text.splitlines()[1] and f"f{entry.frames}" not in text.splitlines()[1]


def numbers(value, path=()):
    """Paths of all numbers in an entry."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in numbers(inner, (*path, key))]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def load_changed(folder, name, path):
    """The zoo with one number changed."""
    table = copy.deepcopy(RAW)
    place = next(row for row in table["models"] if row["name"] == name)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    (folder / "models.json").write_text(json.dumps(table))
    return load_zoo(folder / "models.json")


def test_any_number_of_the_table_changes_its_own_entry_and_card(tmp_path):
    changes = [(name, path) for name, row in ROWS.items() for path in numbers(row)]
    assert len(changes) == 10 * 4 + 48 * 5 + 2 * 3 + 3 * (2 + 30)
    before = {name: str(card_of(entry)) for name, entry in ZOO.items()}
    for name, path in changes:
        zoo = load_changed(tmp_path, name, path)
        (changed,) = (entry for entry in zoo if entry != ZOO[entry.name])
        assert changed.name == name and str(card_of(changed)) != before[name], path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("videomamba-s-in1k-224", ("top1",)),  # a start and a teacher
        ("videomamba-m-k400-umt-f8-224", ("frames",)),  # a start
        ("videomamba-m-k400-f64-224", ("temporal_clips",)),
        ("videomamba-ti-in1k-448", ("resolution",)),
        ("videomamba-m-25m-f8-224", ("zero_shot", "MSVD", "video_to_text", "recall_at_1")),
    ],
)
def test_a_number_changes_no_other_card(cards, tmp_path, name, path):
    different = [
        entry.name
        for entry in load_changed(tmp_path, name, path)
        if str(card_of(entry)) != cards[entry.name].read_text("utf-8")
    ]
    assert different == [name]


def test_cards_name_where_they_are_published():
    entry = ZOO["videomamba-ti-k400-f8-224"]
    card = make_card(entry, "other/my-model")
    assert '"other/my-model"' in card.text and card.data.base_model == ["other/videomamba-ti-in1k-224"]
    assert card.data.model_name == "my-model"
    with pytest.raises(ValueError, match="`repo_id` must be ORG/NAME, got my-model"):
        make_card(entry, "my-model")


def test_the_page_of_models_is_the_table():
    text = model_tables(load_zoo())
    assert (ROOT / "docs" / "models.md").read_text("utf-8") == text
    assert all(text.count(f"`{entry.filename}` |") == 1 for entry in ZOO.values() if entry.filename)
    assert text.count("| `*` |") == 3
    assert "| Kinetics-400 | M | MASK | 64 | 384 | 4 x 3 | 85.0 % | `videomamba_m16_k400_mask_ft_f64" in text


def test_a_wrong_organization_is_explained(exit_of, tmp_path):
    for organization in ("an org", "org/team"):
        assert exit_of(make_cards, tmp_path / "out", "--organization", organization).startswith(
            "error: --organization must be a name of"
        )
    assert not (tmp_path / "out").exists()


# What the cards tell to run


def parsers():
    """How the scripts that cards call read their command lines."""

    def dataclasses(*classes, recipes=None):
        return lambda: parse_dataclasses("", *classes, recipes=recipes)

    return {
        "finetune.py": dataclasses(*finetune.CLASSES, recipes=RECIPES),
        "distill.py": dataclasses(*finetune.CLASSES, DistillationArguments, recipes=RECIPES),
        "pretrain_umt.py": dataclasses(*pretrain_umt.CLASSES, recipes=pretrain_umt.RECIPES),
        "pretrain_video_text.py": dataclasses(*pretrain_video_text.CLASSES, recipes=pretrain_video_text.RECIPES),
        "evaluate_video.py": dataclasses(*evaluate_video.CLASSES),
        "evaluate_retrieval.py": dataclasses(evaluate_retrieval.Arguments),
        "search_videos.py": search_videos.parse_args,
    }


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood_by_their_scripts(cards, monkeypatch, name):
    text = "".join(blocks(cards[name], "bash")).replace("\\\n", " ")
    called = []
    for line in text.splitlines():
        before, script, options = re.fullmatch(r"(.*)\bscripts/(\w+\.py) (.*)", line).groups()
        assert before in ("python ", "accelerate launch --config_file scripts/launch/ddp.yaml ")
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(options)])
        parsers()[script]()
        called.append(script)
    evaluation, *training = {
        "image-classification": ["evaluate_video.py", "distill.py" if ZOO[name].teacher else "finetune.py"],
        "video-classification": ["evaluate_video.py", "finetune.py"],
        "masked-pretraining": ["finetune.py", "pretrain_umt.py"],
        "video-text-retrieval": ["evaluate_retrieval.py", "pretrain_video_text.py", "pretrain_video_text.py"],
    }[ZOO[name].family]
    assert [script for script in called if script != "search_videos.py"] == [evaluation, *training]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Small models by family."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for family, model_class, processor_class, num_frames in (
        ("image-classification", VideoMambaForImageClassification, VideoMambaImageProcessor, None),
        ("video-classification", VideoMambaForVideoClassification, VideoMambaVideoProcessor, 4),
        ("masked-pretraining", VideoMambaForMaskedPreTraining, VideoMambaVideoProcessor, 4),
    ):
        torch.manual_seed(0)
        model = model_class(tiny_config(num_frames=num_frames)).eval()
        model.save_pretrained(folder / family)
        processor_class.for_model(model.config).save_pretrained(folder / family)
    save_video_text(folder / "video-text-retrieval")
    return folder


RUN_ALL = """
import contextlib, io, json, sys, traceback
sys.modules["modeling_videomamba"] = None  # as if it were not installed
results = []
for snippet in json.load(open("snippets.json")):
    output, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, "snippet", "exec"), {})
    except Exception:
        error = traceback.format_exc()
    results.append((output.getvalue(), error))
json.dump(results, open("results.json", "w"))
"""


def test_snippets_run_on_stand_ins_without_the_package(cards, stand_ins, video, tmp_path):
    """Each of each card, in a process of their own; only the id of the repository is replaced."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "picture.jpg")
    (tmp_path / "clip.mp4").write_bytes(video.read_bytes())
    snippets = [(name, snippet) for name in NAMES for snippet in blocks(cards[name], "python")]
    codes = []
    for name, snippet in snippets:
        repo_id, stand_in = f'"{ORGANIZATION}/{name}"', json.dumps(str(stand_ins / ZOO[name].family))
        assert snippet.count(repo_id) == 1
        codes.append(snippet.replace(repo_id, stand_in))
    (tmp_path / "snippets.json").write_text(json.dumps(codes))
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}  # more threads would wait for each other
    command = [sys.executable, "-c", RUN_ALL]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    for (name, snippet), (output, error) in zip(
        snippets, json.loads((tmp_path / "results.json").read_text()), strict=True
    ):
        assert error is None, f"{name}:\n{snippet}\n{error}"
        shapes = re.findall(r"# .*\((\d.*)\)$", snippet, re.MULTILINE)
        assert len(re.findall(r"torch.Size", output)) == len(shapes)
        if "pipeline(" in snippet:
            assert len(re.findall(r"'label': ", output)) == (2 if "candidate_labels" in snippet else 5)
    assert {name for name, _ in snippets} == set(NAMES)
