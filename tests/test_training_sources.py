import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from datasets import ClassLabel, IterableDataset
from PIL import Image

from modeling_videomamba.training.sources import find_evaluation_split, load_split, media_kind
from tests.conftest import moving_square, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_square(4))


def rows(split, kind="video"):
    return [(example[kind]["path"], example["label"]) for example in split]


@pytest.fixture
def videofolder(tmp_path, clip):
    for name in ("train/a/1", "train/b/2", "test/b/3"):
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip.read_bytes())
    return tmp_path


def test_a_folder_of_videos(videofolder):
    split = load_split(str(videofolder), "train")
    assert media_kind(split) == "video" and split.features["label"].names == ["a", "b"]
    assert rows(split) == [(str(videofolder / "train/a/1.mp4"), 0), (str(videofolder / "train/b/2.mp4"), 1)]
    assert find_evaluation_split(str(videofolder)) == "test"
    # the classes are those of the training split, also where the test split lacks one
    split = load_split(str(videofolder), "test", label_names=["a", "b"])
    assert [label for _, label in rows(split)] == [1]


def test_a_folder_of_images(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "train" / label / "x.png")
    split = load_split(str(tmp_path), "train")
    assert media_kind(split) == "image" and [label for _, label in rows(split, "image")] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "names", "labels"),
    [
        ("train.csv", "path,label\nx.mp4,dance\ny.mp4,art\n", ["art", "dance"], [1, 0]),
        ("train.csv", "x.mp4,2\ny.mp4,0\n", ["0", "1", "2"], [2, 0]),  # as in the original release, without a header
        ("train.jsonl", '{"path": "x.mp4", "label": "b"}\n{"path": "y.mp4", "label": "a"}\n', ["a", "b"], [1, 0]),
    ],
)
@pytest.mark.parametrize("root", [None, "clips"])
def test_lists(tmp_path, name, text, names, labels, root):
    (tmp_path / name).write_text(text)
    (tmp_path / "val.csv").write_text("path,label\nz.mp4,0\n")
    split = load_split(str(tmp_path), "train", data_root=root and tmp_path / root)
    assert split.features["label"].names == names
    folder = tmp_path / root if root else tmp_path
    assert rows(split) == [(str(folder / "x.mp4"), labels[0]), (str(folder / "y.mp4"), labels[1])]
    assert find_evaluation_split(str(tmp_path)) == "validation"


def test_numbers_to_predict(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\nx.mp4,2.5\ny.mp4,-1\n")
    (tmp_path / "test.csv").write_text("path,label\nx.mp4,3\ny.mp4,7\n")
    assert rows(load_split(str(tmp_path), "train"))[1][1] == -1.0
    split = load_split(str(tmp_path), "test", regression=True)
    assert [label for _, label in rows(split)] == [3.0, 7.0]
    assert load_split(str(tmp_path), "test").features["label"].names == [str(i) for i in range(8)]


def test_a_list_of_addresses(tmp_path):
    (tmp_path / "train.csv").write_text("https://example.org/x.mp4,0\n/data/y.mp4,0\n")
    paths = [path for path, _ in rows(load_split(str(tmp_path), "train"))]
    assert paths == ["https://example.org/x.mp4", "/data/y.mp4"]


def test_a_list_of_images(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\nx.PNG,a\n")
    assert media_kind(load_split(str(tmp_path), "train")) == "image"


def write_shards(folder, clip, shards=2, samples=3, label="cls"):
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as archive:
            for sample in range(samples):
                value = (shard * samples + sample) % 2
                text = str(value) if label == "cls" else json.dumps({"label": "ab"[value]})
                for suffix, data in (("mp4", clip.read_bytes()), (label, text.encode())):
                    path = folder / f"s{shard}{sample}.{suffix}"
                    path.write_bytes(data)
                    archive.add(path, path.name)
                    path.unlink()


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_shards(tmp_path, clip, label, streaming):
    write_shards(tmp_path, clip, label=label)
    split = load_split(str(tmp_path), "train", streaming=streaming, label_names=["a", "b"])
    split = pickle.loads(pickle.dumps(split))  # as workers get it
    assert isinstance(split, IterableDataset) == streaming
    assert isinstance(split.features["label"], ClassLabel) and media_kind(split) == "video"
    examples = list(split)
    assert [example["label"] for example in examples] == [0, 1, 0, 1, 0, 1]
    assert all(len(example["video"]["bytes"]) == clip.stat().st_size for example in examples)
    assert examples[4]["video"]["path"].endswith("s11.mp4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", "path,caption\nx.mp4,a dance\ny.mp4,a song\n"),
        ("train.csv", "path,label\nx.mp4,3\ny.mp4,0\n"),
        ("train.csv", "x.mp4\ny.mp4\n"),
        ("train.csv", "x.mp4,0\ny.mp4,0\n"),  # as in the original release
        ("train.jsonl", '{"path": "x.mp4"}\n{"path": "y.mp4"}\n'),
    ],
)
def test_lists_without_labels(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    split = load_split(str(tmp_path), "train", target=None)
    assert list(split.features) == ["video"]
    assert [example["video"]["path"] for example in split] == [str(tmp_path / "x.mp4"), str(tmp_path / "y.mp4")]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_and_shards_without_labels(tmp_path, clip, streaming):
    for name in ("1", "2"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{name}.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", clip)
    for folder, count in (("flat", 2), ("shards", 6)):
        split = load_split(str(tmp_path / folder), "train", target=None, streaming=streaming)
        assert list(split.features) == ["video"] and len(list(split)) == count
        with pytest.raises(ValueError, match="must have a split validation or test, got train"):
            find_evaluation_split(str(tmp_path / folder))


CAPTIONS = [["a dance", "a song"], ["a dog, running"]]
ORIGINAL = json.dumps([{"video": "x.mp4", "caption": CAPTIONS[0]}, {"video": "y.mp4", "caption": CAPTIONS[1]}])
LINES = (
    f'{{"path": "x.mp4", "captions": {json.dumps(CAPTIONS[0])}}}\n{{"path": "y.mp4", "captions": ["a dog, running"]}}'
)


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("train.csv", 'path,caption\nx.mp4,a dance\ny.mp4,"a dog, running"\n', [["a dance"], ["a dog, running"]]),
        ("train.csv", "video,text,label\nx.mp4,a dance,1\ny.mp4,,0\n", [["a dance"], []]),
        ("train.json", ORIGINAL, CAPTIONS),
        ("train.jsonl", LINES, CAPTIONS),
    ],
)
def test_lists_with_captions(tmp_path, name, text, captions):
    (tmp_path / name).write_text(text)
    split = load_split(str(tmp_path), "train", target="captions")
    assert list(split.features) == ["video", "captions"] and split["captions"][:] == captions
    assert [example["video"]["path"] for example in split] == [str(tmp_path / "x.mp4"), str(tmp_path / "y.mp4")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_shards_with_captions(tmp_path, clip, streaming, kind):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for index in range(3):
            content = (
                f"clip {index}" if kind == "txt" else json.dumps({"caption": [f"clip {index}", "any"], "label": 1})
            )
            (tmp_path / "caption").write_text(content)
            archive.add(clip, f"{index}.mp4")
            archive.add(tmp_path / "caption", f"{index}.{kind}")
    split = load_split(str(tmp_path), "train", target="captions", streaming=streaming)
    split = pickle.loads(pickle.dumps(split))
    assert list(split.features) == ["video", "captions"] and split.features["captions"].feature.dtype == "string"
    others = [] if kind == "txt" else ["any"]
    assert [example["captions"] for example in split] == [[f"clip {index}", *others] for index in range(3)]


def test_a_folder_with_captions(tmp_path, clip):
    (tmp_path / "train").mkdir()
    shutil.copy(clip, tmp_path / "train" / "a.mp4")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\na.mp4,a clip\n")
    split = load_split(str(tmp_path), "train", target="captions")
    assert list(split.features) == ["video", "captions"] and split[0]["captions"] == ["a clip"]
    with pytest.raises(
        ValueError, match="one of the columns `captions`, `caption`, `text`, `txt`, got file_name, label"
    ):
        (tmp_path / "train" / "metadata.csv").write_text("file_name,label\na.mp4,1\n")
        load_split(str(tmp_path), "train", target="captions")


def test_what_is_wrong_is_said(tmp_path, videofolder, clip):
    with pytest.raises(ValueError, match="test/b/3.mp4: the label 'b' is not one of the 1 classes"):
        load_split(str(videofolder), "test", label_names=["a"])
    with pytest.raises(ValueError, match="data_root"):
        load_split(str(videofolder), "train", data_root=tmp_path)
    with pytest.raises(ValueError, match="numbers for regression"):
        load_split(str(videofolder), "train", regression=True)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.csv").write_text("file,label\nx.mp4,1\n")
    with pytest.raises(ValueError, match="columns `path` and `label`, got file, label"):
        load_split(str(lists), "train")
    for header in ("file", "file,label", "file,label,more"):
        (lists / "train.csv").write_text(f"{header}\n" + "x.mp4,1,2\n"[: 6 + 2 * header.count(",")])
        with pytest.raises(ValueError, match="must have the columns `path`, got file"):
            load_split(str(lists), "train", target=None)
    (lists / "train.csv").write_text("path,label\nx.mp4,5\n")
    with pytest.raises(ValueError, match="train.csv: line 2: the label '5' is not one of the 2 classes \\(a, b\\)"):
        load_split(str(lists), "train", label_names=["a", "b"])
    with pytest.raises(ValueError, match="validation or test, got train"):
        find_evaluation_split(str(lists))
    (lists / "train.jsonl").write_text('{"path": "x.mp4", "label": 0}\n')
    with pytest.raises(ValueError, match="must be one list"):
        load_split(str(lists), "train")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, clip)
    with pytest.raises(ValueError, match="streamed and its labels have no names"):
        load_split(str(shards), "train", streaming=True)
    with pytest.raises(FileNotFoundError):
        load_split(str(tmp_path / "nowhere"), "train")
