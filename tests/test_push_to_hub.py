"""push_to_hub.py through the real client against a server of ours, and loading back what it published."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants
from PIL import Image
from transformers import BertTokenizer

import publishing
import push_to_hub
import staging
from model_zoo import find_by_filename, load_zoo
from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
)
from modeling_videomamba.conversion import convert_checkpoint, rename
from modeling_videomamba.training.cards import seal
from tests.conftest import NANO, load_golden, strip_prefix
from tests.hub_server import TOKEN, serve, sha256
from tests.launching import SCRIPTS, call

FAMILIES = {
    "image": "image_classification",
    "video": "video_classification",
    "pretraining": "masked_pretraining",
    "video-text": "video_text_retrieval",
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "seven", "moves"]


def original(name):
    """A state dict of the original."""
    tensors, _ = load_golden(name)
    return strip_prefix(tensors, "state_dict.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each family, a tokenizer, and a card."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family, name in FAMILIES.items():
        torch.save(original(name), folder / f"{family}.pth")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "tokenizer" / "vocab.txt")).save_pretrained(folder / "tokenizer")
    card = ModelCard.from_template(ModelCardData(license="apache-2.0"), template_str="---\n{{ card_data }}\n---\n# X\n")
    card.save(folder / "card.md")
    return folder


@contextmanager
def connected(address, home):
    """What the environment says when a process begins: a server, and who is logged in there."""
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": url}
    settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "cache")}
    with mock.patch.multiple(constants, **settings), mock.patch.dict(os.environ, {"HF_TOKEN": TOKEN}):
        yield


class Client:
    """Runs things, in `home`, as somebody who has logged in to a server; `output` is all that was printed."""

    def __init__(self, hub, address, home):
        self.hub, self.address, self.home, self.output = hub, address, home, ""
        home.mkdir(exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *command, **changes):
        environment = {name: value for name, value in {**self.environment, **changes}.items() if value is not None}
        command = [str(part) for part in command]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.home)
        self.output += result.stdout + result.stderr
        return result

    def push(self, *options, **changes):
        """In this process, or in one of its own where its environment is to have changes."""
        if changes:
            return self.run(sys.executable, SCRIPTS / "push_to_hub.py", *options, **changes)
        with connected(self.address, self.home):
            result = call("push_to_hub.py", *options)
        self.output += result.stdout + result.stderr
        return result

    def push_family(self, folder, family, *options, **changes):
        common = ("--card", folder / "card.md", "--tokenizer", folder / "tokenizer")
        result = self.push(folder / f"{family}.pth", f"org/{family}", *common, *options, **changes)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def files(self, name, ref="main"):
        return self.hub.repositories[name].refs[ref][-1].files

    def titles(self, name, ref="main"):
        return [commit.title for commit in self.hub.repositories[name].refs[ref]]


@pytest.fixture
def client(tmp_path):
    with serve() as (hub, address):
        client = Client(hub, address, tmp_path / "home")
        yield client
        assert TOKEN not in client.output
        assert "X-Signature" not in client.output


def staged(text):
    """SHA-256 by path of what was printed."""
    return {path: digest for digest, path in re.findall(r"^  ([0-9a-f]{64}) +[\d,]+  (\S+)$", text, re.MULTILINE)}


def test_a_dry_run_stages_what_is_published_then(client, folder, tmp_path):
    text = client.push_family(folder, "video", "--dry-run", "--folder", tmp_path / "staged")
    assert client.hub.requests == []
    there = tmp_path / "staged" / "video"
    hashes = {path.name: sha256(path.read_bytes()) for path in there.iterdir()}
    assert staged(text) == hashes and f"staged in {there}, nothing is published" in text
    assert {"README.md", "config.json", "model.safetensors", "modeling_videomamba.py"} <= hashes.keys()
    assert json.loads((there / "config.json").read_text())["auto_map"]["AutoModelForVideoClassification"]
    assert f"{sum(path.stat().st_size for path in there.iterdir()):,} bytes" in text

    published = client.push_family(folder, "video")
    assert staged(published) == hashes
    assert {name: sha256(content) for name, content in client.files("org/video").items() if name in hashes} == hashes
    assert client.titles("org/video") == ["initial commit", "Upload VideoMambaForVideoClassification from video.pth"]

    commits, uploads = len(client.titles("org/video")), client.hub.uploads
    assert "org/video: unchanged, no commit" in client.push_family(folder, "video", HF_HUB_VERBOSITY="debug")
    assert len(client.titles("org/video")) == commits and client.hub.uploads == uploads
    again = client.push(
        folder / "video.pth", "org/video", "--card", folder / "card.md", "--dry-run", "--folder", tmp_path / "staged"
    )
    assert again.returncode == 1 and f"{there} must be empty" in again.stderr


def test_a_dry_run_leaves_nothing_that_git_sees(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", str(NANO), "--dry-run", "org/name"])
    push_to_hub.main()
    assert (tmp_path / "staged" / "name" / "model.safetensors").is_file()
    seen = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert seen == ""


def test_an_upload_that_fails_in_the_middle_goes_on(client, folder):
    client.hub.failing_uploads = {1: 403}
    options = (folder / "image.pth", "org/image", "--card", folder / "card.md", "--max-shard-size", "20KB")
    failed = client.push(*options)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert re.search(
        r"^error: Error while uploading 'model-\d{5}-of-\d{5}.safetensors'.*403", failed.stderr, re.MULTILINE
    )
    assert client.titles("org/image") == ["initial commit"]
    uploaded = client.hub.uploads
    assert client.push(*options).returncode == 0
    shards = [name for name in client.files("org/image") if name.endswith(".safetensors")]
    assert len(shards) > 2 and 0 < uploaded < len(shards) and client.hub.uploads == len(shards)  # each once

    assert client.push(*options[:-2]).returncode == 0  # in one file now
    weights = [name for name in client.files("org/image") if "safetensors" in name]
    assert weights == ["model.safetensors"] and len(client.titles("org/image")) == 3


def test_only_what_was_part_of_the_model_is_removed(client, folder):
    client.push_family(folder, "image", "--max-shard-size", "20KB")
    files = client.files("org/image")
    others = ("handler.py", "examples/train.py", "adapter_model.safetensors", "onnx/model.safetensors")
    files |= dict.fromkeys((*others, "triton_kernels.py", "video_preprocessor_config.json"), b"x")
    del files["triton_kernels.py"]
    files["triton_kernels.py"] = b"older code"
    text = client.push_family(folder, "image")
    assert (
        set(others) < set(client.files("org/image")) and client.files("org/image")["triton_kernels.py"] != b"older code"
    )
    removed = re.search(r"org/image: removes (.*), which the model no longer has", text)[1].split(", ")
    assert "video_preprocessor_config.json" in removed and "model.safetensors.index.json" in removed
    assert all(
        re.fullmatch(r"model-.*|video_preprocessor_config.json|model.safetensors.index.json", n) for n in removed
    )


def test_what_is_tried_again_leaves_no_signature(client, folder):
    """The client logs its address, and here every upload has to be tried twice."""
    client.hub.failing_uploads = {0: 503}
    client.push_family(folder, "image", HF_HUB_VERBOSITY="warning")
    assert "Retrying" in client.output and client.hub.tried == 2 and client.hub.uploads == 1


def test_a_server_that_is_not_there_is_told(client, folder):
    result = client.push(
        folder / "image.pth", "org/image", "--card", folder / "card.md", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.slow
def test_where_it_is_published(client, folder, tmp_path):
    text = client.push_family(folder, "image", "--private")
    assert client.hub.repositories["org/image"].private and "org/image: http" in text
    client.push_family(folder, "image", "--revision", "v2", "--max-shard-size", "20KB")
    refs = client.hub.repositories["org/image"].refs
    assert len(refs["main"]) == 2 and len(refs["v2"]) == 3
    text = client.push_family(folder, "image", "--pull-request", "--max-shard-size", "20KB")
    assert "discussions/" in text and len(refs["main"]) == 2
    (opened,) = (name for name in refs if name.startswith("refs/pr/"))
    assert client.files("org/image", opened) == client.files("org/image", "v2")
    for option in (("--pull-request",), ("--revision", "v2"), ("--revision", opened)):
        text = client.push_family(folder, "image", *option, "--max-shard-size", "20KB")
        assert "unchanged" in text and len(refs) == 3 and len(refs["v2"]) == len(refs[opened]) == 3
    for ref in ("main", opened):  # has a file more than the model
        client.files("org/image", ref)["video_preprocessor_config.json"] = b"x"
    client.push_family(folder, "image", "--pull-request", "--max-shard-size", "20KB")
    (another,) = (name for name in refs if name.startswith("refs/pr/") and name != opened)
    assert "video_preprocessor_config.json" not in client.files("org/image", another)
    client.push_family(folder, "video")
    card = ("--card", folder / "card.md")
    refused = client.push(folder / "video.pth", "org/video", *card, "--private")
    assert refused.returncode == 1 and "error: --private: org/video is public" in refused.stderr
    unknown = client.push(folder / "video.pth", "org/video", *card, HF_TOKEN=None)
    assert unknown.returncode == 1 and "error: nobody is logged in: run `hf auth login`" in unknown.stderr


def test_a_trained_directory_keeps_its_card_and_its_pictures(client):
    result = client.push(NANO, "org/nano")
    assert result.returncode == 0, result.stderr
    files = client.files("org/nano")
    assert "99.50 % of the 800 test clips" in files["README.md"].decode() and {"curves.png", "example.mp4"} <= set(
        files
    )
    assert files["model.safetensors"] == (NANO / "model.safetensors").read_bytes()
    config = json.loads(files["config.json"])
    assert config["id2label"]["0"] == "down" and "AutoConfig" in config["auto_map"]
    assert 'pipeline("video-classification", model="org/nano")' in files["README.md"].decode()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as large as a released one, under its own name and under those of others."""
    folder, template = tmp_path_factory.mktemp("released"), original("image_classification")
    torch.manual_seed(0)
    model = VideoMambaForImageClassification(
        VideoMambaConfig(num_frames=None, num_labels=1000, **VIDEOMAMBA_SIZES["tiny"])
    )
    ours, names = model.state_dict(), set()
    for name in template:
        for layer in range(model.config.num_hidden_layers):
            names.add(re.sub(r"^layers\.\d+\.", f"layers.{layer}.", name))
    state_dict = {name: ours[rename(name)] for name in sorted(names)}
    state_dict["patch_embed.proj.weight"] = state_dict["patch_embed.proj.weight"].squeeze(2)
    for name in ("videomamba_t16_in1k_res224", "videomamba_s16_in1k_res224", "videomamba_t16_k400_f8_res224", "mine"):
        torch.save({"model": state_dict}, folder / f"{name}.pth")
    (folder / "videomamba_b16_in1k_res224.pth").write_bytes(b"no checkpoint")
    return folder


def test_all_that_is_there_of_the_zoo(client, released):
    result = client.push("--all", released, "org")
    assert result.returncode == 1 and "error: 1 models, 3 failed" in result.stderr
    assert "videomamba_s16_in1k_res224.pth is not what the zoo has under this name: hidden_size 192" in result.stderr
    assert "videomamba_b16_in1k_res224.pth: not a checkpoint of plain tensors" in result.stderr
    assert "left out: mine.pth, which is not in the zoo" in result.stdout
    assert "`labels` has 400 names, the checkpoint has 1000 classes" in result.stderr
    assert result.stdout.count("there is no ") == 56 and result.stdout.count("under the name of another file") == 3
    (name,) = client.hub.repositories
    assert name == "org/videomamba-ti-in1k-224"
    card = ModelCard(client.files(name)["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 76.9 and f'"{name}"' in card.text
    assert json.loads(client.files(name)["config.json"])["id2label"]["0"] == "tench"


def test_what_cannot_be_published_is_explained(exit_of, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copytree(NANO, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes((NANO / "model.safetensors").read_bytes()[:-100])
    card, video = ("--card", folder / "card.md"), folder / "video.pth"
    for message, *options in (
        ("not in the zoo: pass --card", video, "org/video"),
        (
            "ORG/NAME must be OWNER/NAME of letters, digits, '-', '_' and '.' on the Hub, got 'video'",
            video,
            "video",
            *card,
        ),
        ("no.pth: no such checkpoint", tmp_path / "no.pth", "org/x", *card),
        (
            "ORG/NAME must be OWNER/NAME of letters, digits, '-', '_' and '.' on the Hub, got 'org/vi deo'",
            video,
            "org/vi deo",
            *card,
        ),
        ("`labels` has 400 names, the checkpoint has", video, "org/x", "--labels", "kinetics400", *card),
        ("--labels x is for a .pth file", NANO, "org/x", "--labels", "x"),
        ("error: 0 models, 0 failed", "--all", tmp_path / "empty", "org"),
        (
            "ORG of --all must be a name of letters, digits, '-', '_' and '.' on the Hub, got 'org/team'",
            "--all",
            tmp_path / "empty",
            "org/team",
        ),
        ("damaged: ", tmp_path / "damaged", "org/x", *card),
        ("empty: no such folder", "--all", tmp_path / "no" / "empty", "org"),
        ("must be a VideoMamba", tmp_path / "bert", "org/x", *card),
    ):
        found = exit_of(push_to_hub, *options, "--dry-run", "--folder", tmp_path / "staged")
        assert message in found, (message, found)
    assert not (tmp_path / "staged").exists()


def test_a_card_whose_code_loads_several_models_is_not_guessed_at():
    card = ModelCard('---\nlicense: mit\n---\nAutoModel.from_pretrained("a")\npipeline("x", model="b")\n')
    with pytest.raises(ValueError, match="loads a, b: only one can become org/x"):
        publishing.rename_model(card, "org/x")


def test_names_of_classes_are_in_the_card(exit_of, monkeypatch):
    entry = next(entry for entry in load_zoo() if entry.dataset.name == "coin")
    for labels, is_unnamed in ((None, True), ("coin.txt", False)):
        args = argparse.Namespace(card=None, labels=labels)
        card = publishing.find_card(args, Path(entry.filename), "org/coin", entry)
        assert ("Classes are called `LABEL_0`" in card.text) == is_unnamed


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        (
            "videomamba_m16_k400_mask_pt_f8_res224.pth",
            "VideoMambaForVideoClassification instead of VideoMambaForMasked",
        ),
        ("videomamba_t16_coin_f32_res224.pth", "frames 4 instead of 32, classes 7 instead of 180"),
    ],
)
def test_a_file_under_the_name_of_another_is_refused(filename, message):
    """The class and the number of classes tell, where sizes don't."""
    entry = find_by_filename(filename)
    sizes = {"image_size": entry.resolution, "num_frames": 4, "num_labels": 7}
    config = VideoMambaConfig(**sizes, hidden_size=entry.hidden_size, num_hidden_layers=entry.num_hidden_layers)
    with torch.device("meta"):
        model = VideoMambaForVideoClassification(config)
    with pytest.raises(ValueError, match=message):
        publishing.check_entry(entry, staging.Publishable(model, None, []))


def test_a_model_that_became_another_is_not_published(folder, tmp_path):
    source = staging.load_source(folder / "video.pth", None, None)
    source.model.save_pretrained(tmp_path)
    source.processor.save_pretrained(tmp_path)
    staging.verify(source.model, tmp_path)
    with torch.no_grad():
        source.model.classifier.bias[0] += 1e-6
    with pytest.raises(ValueError, match=r"is not what was staged: classifier\.bias differ"):
        staging.verify(source.model, tmp_path)


# What others wrote, and what is not meant to be published


def test_files_that_lead_elsewhere_are_named_and_stay(tmp_path, capsys):
    source, secret = tmp_path / "model", tmp_path / "secret.png"
    shutil.copytree(NANO, source)
    secret.write_text("secret")
    (source / "link.png").symlink_to(secret)
    (source / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (source / "within.png").symlink_to(source / "curves.png")
    (source / ".hidden.png").write_text("hidden")
    (source / "folder.png").mkdir()
    found = [path.name for path in staging.load_source(source, None, None).pictures]
    assert found == sorted(path.name for path in NANO.iterdir() if path.suffix in staging.SHOWN_WITH_CARD)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"left out: {source}/.hidden.png, a hidden file",
        f"left out: {source}/folder.png, which is no file",
        f"left out: {source}/link.png, a symbolic link to {secret}",
        f"left out: {source}/nowhere.png, a symbolic link to {tmp_path}/nowhere",
        f"left out: {source}/within.png, a symbolic link to {source}/curves.png",
    ]
    (source / "README.md").unlink()
    (source / "README.md").symlink_to(secret)
    with pytest.raises(ValueError, match=r"README.md is a symbolic link to .*secret.png: pass --card"):
        staging.load_source(source, None, None)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Publishes a card with some weights in this process, on a server of ours; what was done, or the error."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve() as (hub, address):
        monkeypatch.setattr(publishing, "HfApi", lambda: HfApi(address, token=TOKEN))

        def call(text, *options):
            monkeypatch.setattr(sys, "argv", ["push_to_hub.py", "model", "org/model", *options])
            (tmp_path / "README.md").write_text(seal(text))
            (tmp_path / "model.safetensors").write_text(text)
            paths = [tmp_path / name for name in ("README.md", "model.safetensors")]
            files = [staging._describe(path, tmp_path) for path in paths]
            try:
                return publishing.upload(push_to_hub.parse_args(), tmp_path, files, "org/model", "a commit")
            except ValueError as error:
                return f"error: {error}"

        call.commits = lambda ref="main": hub.repositories["org/model"].refs[ref]
        call.hub = hub
        yield call


EDITED = "error: README.md of org/model was edited, or not written by push_to_hub.py, and would be overwritten: "


def test_a_card_that_was_edited_on_the_hub_is_not_overwritten(publish):
    card = "---\nlicense: mit\n---\n# {}\n"
    for name in ("one", "two"):  # what we wrote may be replaced
        assert (
            "/commit/" in publish(card.format(name))
            and f"# {name}" in publish.commits()[-1].files["README.md"].decode()
        )
    commits, uploads = len(publish.commits()), publish.hub.uploads
    publish.commits()[-1].files["README.md"] += b"\nMine.\n"
    message = publish(card.format("three"))
    assert message == f"{EDITED}take over what it says with --card, or pass --overwrite-card"
    assert len(publish.commits()) == commits and publish.hub.uploads == uploads
    assert "/discussions/" in publish(card.format("three"), "--pull-request")
    assert b"Mine." in publish.commits()[-1].files["README.md"]
    assert "/commit/" in publish(card.format("three"), "--overwrite-card")
    assert b"Mine." not in publish.commits()[-1].files["README.md"]


def test_a_card_that_others_wrote_is_not_overwritten_on_any_branch(publish):
    publish("---\n---\nours\n", "--revision", "v2")
    publish.commits("v2")[-1].files["README.md"] = b"---\n---\ntheirs"
    assert publish("---\n---\nnew\n", "--revision", "v2").startswith(EDITED)
    assert "/commit/" in publish("---\n---\nnew\n")  # on main there is none
    assert "/commit/" in publish("---\n---\ntheirs\n", "--revision", "v2")  # what they say already


# Loading back


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    """A server with a model of each family, and where it is."""
    with serve() as (hub, address):
        client = Client(hub, address, tmp_path_factory.mktemp("home"))
        for family in FAMILIES:
            client.push_family(folder, family)
        yield client


LOAD_BACK = """
import json, sys
from importlib.util import find_spec
kind, clip, picture, out = sys.argv[1:]
is_installed = kind == "installed"
remote = {} if is_installed else {"trust_remote_code": True}
if is_installed:
    import modeling_videomamba
elif kind == "hidden":
    sys.modules["modeling_videomamba"] = None
else:
    assert find_spec("modeling_videomamba") is None, find_spec("modeling_videomamba")
import torch
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForPreTraining, AutoModelForVideoClassification, AutoProcessor, AutoVideoProcessor, pipeline)

def load(auto_class, name):
    loaded = auto_class.from_pretrained(name, **remote)
    home = "modeling_videomamba" if is_installed else "transformers_modules"
    assert type(loaded).__module__.split(".")[0] == home, type(loaded)
    return loaded

for name in ("org/image", "org/video", "org/pretraining", "org/video-text"):
    load(AutoConfig, name), load(AutoModel, name)
image, video = load(AutoModelForImageClassification, "org/image"), load(AutoModelForVideoClassification, "org/video")
pretraining, video_text = load(AutoModelForPreTraining, "org/pretraining"), load(AutoModel, "org/video-text")
load(AutoImageProcessor, "org/image"), load(AutoVideoProcessor, "org/video")
generator = torch.Generator().manual_seed(0)

def noise(model):
    config = getattr(model.config, "vision_config", model.config)
    frames = [] if config.num_frames is None else [config.num_frames]
    return torch.randn(1, *frames, 3, *config.input_size, generator=generator)

with torch.no_grad():
    found = {"image": image(noise(image)).logits, "video": video(noise(video)).logits}
    pixels = noise(pretraining)
    length = pretraining.videomamba(pixels).last_hidden_state.shape[1] - 1
    hidden = torch.arange(length).remainder(2).bool().unsqueeze(0)
    found["pretraining"] = pretraining(pixels, bool_masked_pos=hidden).aligned_features
    processor = load(AutoProcessor, "org/video-text")
    inputs = processor(videos=clip, text=["a seven", "moves"], padding=True, return_tensors="pt")
    found["video-text"] = video_text(**inputs).logits_per_video
found["image pipeline"] = pipeline("image-classification", model="org/image", **remote)(picture)
found["video pipeline"] = pipeline("video-classification", model="org/video", **remote)(clip)
zero_shot = pipeline("zero-shot-video-classification", model="org/video-text", **remote)
home = "modeling_videomamba" if is_installed else "transformers_modules"
assert type(zero_shot).__module__.split(".")[0] == home, type(zero_shot)
found["zero-shot pipeline"] = zero_shot(clip, candidate_labels=["a seven", "moves"])
found = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in found.items()}
open(out, "w").write(json.dumps(found))
"""


def load_back(published, python, kind, clip, tmp_path):
    """What the published models say in another Python, where the package is `installed`, `hidden` or not there."""
    picture, out = tmp_path / "picture.png", tmp_path / "found.json"
    Image.new("RGB", (50, 40), "red").save(picture)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": None, "PYTHONPATH": None}
    result = published.run(python, "-c", LOAD_BACK, kind, clip, picture, out, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def test_it_loads_with_the_package(published, folder, video, tmp_path):
    """And says what the checkpoint says."""
    found = load_back(published, sys.executable, "installed", video, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for family in ("image", "video"):
        model = convert_checkpoint(folder / f"{family}.pth").model
        frames = [] if family == "image" else [model.config.num_frames]
        with torch.no_grad():
            logits = model(torch.randn(1, *frames, 3, *model.config.input_size, generator=generator)).logits
        torch.testing.assert_close(torch.tensor(found[family]), logits, atol=1e-5, rtol=1e-5)
    assert len(found["image pipeline"]) == len(found["video pipeline"]) == 5
    assert len(found["zero-shot pipeline"]) == 2
    assert_same(load_back(published, sys.executable, "hidden", video, tmp_path), found)


def assert_same(found, expected):
    """But for the order of sums in the compiled kernel, which isn't on the Hub."""
    for family in FAMILIES:
        torch.testing.assert_close(torch.tensor(found[family]), torch.tensor(expected[family]), atol=1e-4, rtol=1e-4)
    for name in ("image pipeline", "video pipeline", "zero-shot pipeline"):
        assert [item["label"] for item in found[name]] == [item["label"] for item in expected[name]]


@pytest.fixture
def clean_python(tmp_path):
    """That of a new environment, of gigabytes, with what the models need."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    versions = {name: version(name).split("+")[0] for name in ("torch", "torchvision", "transformers", "av")}
    needed = [f"{name}=={number}" for name, number in versions.items()]
    try:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *needed], check=True)
        yield python
    finally:
        shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow
@pytest.mark.skipif("VIDEOMAMBA_TEST_CLEAN_ENVIRONMENT" not in os.environ, reason="installs PyTorch: .ci/run does")
def test_it_loads_in_a_clean_environment_without_the_package(published, clean_python, video, tmp_path):
    expected = load_back(published, sys.executable, "installed", video, tmp_path)
    assert_same(load_back(published, clean_python, "clean", video, tmp_path), expected)
