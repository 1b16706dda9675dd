"""Lists and folders as people have them: each is read right, or refused with the file and the line."""

import codecs
import gzip
import io
import json
import pickle
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.training.data import Examples, StreamedExamples, TrainingViews, errors_as_lines
from modeling_videomamba.training.lists import LIST_SUFFIXES, read_list
from modeling_videomamba.training.sources import find_evaluation_split, load_split, split_names
from modeling_videomamba.training.workers import iterate
from tests.conftest import moving_square, tiny_config, write_video

ODD_NAMES = ["None", "NA", "N/A", "null", "nan", "NaN", "n/a", "<NA>", "#N/A", "-", "True", "false", "é", "a b", "007x"]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(folder, split="train", **options):
    """Paths relative to the folder, labels by name, or values or captions."""
    loaded = load_split(str(folder), split, **options)
    target = options.get("target", "label")
    names = getattr(loaded.features[target], "names", None) if target else None
    rows = []
    for example in loaded:
        path = example["video"]["path"].removeprefix(f"{folder}/")
        value = example[target] if target else None
        rows.append((path, names[value] if names else value))
    return rows


def refuses(folder, message, split="train", **options):
    with pytest.raises(ValueError) as error:
        load_split(str(folder), split, **options)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


# One table in every format


def as_csv(rows, column, separator=",", end="\n"):
    quoted = [[f'"{cell}"' if separator in cell else cell for cell in row] for row in (("path", column), *rows)]
    return "".join(separator.join(row) + end for row in quoted)


def as_json(rows, column):
    return json.dumps([{"path": path, column: value} for path, value in rows], ensure_ascii=False)


def as_lines(rows, column):
    return "".join(json.dumps({"path": path, column: value}) + "\n" for path, value in rows)


FORMATS = {
    "comma": ("train.csv", as_csv),
    "tab": ("train.tsv", lambda rows, column: as_csv(rows, column, "\t")),
    "tab in csv": ("train.csv", lambda rows, column: as_csv(rows, column, "\t")),
    "semicolon": ("train.csv", lambda rows, column: as_csv(rows, column, ";")),
    "windows": ("train.csv", lambda rows, column: as_csv(rows, column, end="\r\n")),
    "old mac": ("train.csv", lambda rows, column: as_csv(rows, column, end="\r")),
    "blank lines": ("train.csv", lambda rows, column: "\n" + as_csv(rows, column, end="\n  \n") + "\n\n"),
    "spaces around": ("train.csv", lambda rows, column: as_csv(rows, column).replace(",", "  , ")),
    "pandas index": (
        "train.csv",
        lambda rows, column: "".join(
            f"{i},{line}\n" for i, line in enumerate(as_csv(rows, column).splitlines())
        ).replace("0,path", ",path"),
    ),
    "json": ("train.json", as_json),
    "json lines": ("train.jsonl", as_lines),
    "json lines in json": ("train.json", as_lines),
    "metadata with tabs": (
        "train/metadata.csv",
        lambda rows, column: as_csv(rows, column, "\t").replace("path", "file_name", 1),
    ),
    "metadata": ("train/metadata.csv", lambda rows, column: as_csv(rows, column).replace("path", "file_name", 1)),
    "metadata lines": (
        "train/metadata.jsonl",
        lambda rows, column: as_lines(rows, column).replace('"path"', '"file_name"'),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_odd_names_are_names_in_every_format(tmp_path, name):
    file, text = FORMATS[name]
    rows = [(f"clip {index}.mp4", label) for index, label in enumerate(ODD_NAMES)]
    write(tmp_path, file, text(rows, "label"))
    prefix = "train/" if "metadata" in file else ""
    for path, _ in rows if prefix else ():
        write(tmp_path, prefix + path, "")
    assert load(tmp_path) == [(prefix + path, label) for path, label in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_captions_of_odd_words_are_texts(tmp_path, name):
    file, text = FORMATS[name]
    rows = [(f"{index}.mp4", caption) for index, caption in enumerate([*ODD_NAMES, "12", "0.5", "1e5"])]
    write(tmp_path, file, text(rows, "caption"))
    prefix = "train/" if "metadata" in file else ""
    for path, _ in rows if prefix else ():
        write(tmp_path, prefix + path, "")
    assert load(tmp_path, target="captions") == [(prefix + path, [caption]) for path, caption in rows]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["comma", "tab", "json", "json lines", "metadata"])
def test_encodings_with_a_mark_are_read(tmp_path, encoding, name):
    file, text = FORMATS[name]
    content = MARKS.get(encoding, b"") + text([("é.mp4", "ä"), ("o.mp4", "日")], "label").encode(encoding)
    write(tmp_path, file, content)
    write(tmp_path, "train/é.mp4", "")
    assert [label for _, label in load(tmp_path)] == ["ä", "日"]


@pytest.mark.parametrize("name", ["comma", "tab", "json", "json lines", "metadata"])
def test_other_encodings_are_refused_with_line_and_byte(tmp_path, name):
    file, text = FORMATS[name]
    rows = [("x.mp4", "a"), ("y.mp4", "é")]
    content = text(rows, "label").replace("\\u00e9", "é").encode("latin-1")
    path = write(tmp_path, file, content)
    write(tmp_path, "train/x.mp4", "")
    line = content.count(b"\n", 0, content.index(b"\xe9")) + 1
    refuses(tmp_path, f"{path}: line {line} must be text in UTF-8, got the byte 0xe9 (byte {content.index(0xE9)} of")
    path.write_bytes(text(rows, "label").encode("utf-16-le"))
    refuses(tmp_path, f"{path}: line 1 must be text in UTF-8, got a null character")


# What a list may hold


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("path,label\n001,a\n002,b\n", [("001", "a"), ("002", "b")]),
        ("path,label\n1.0,a\n1e5,b\n", [("1.0", "a"), ("1e5", "b")]),
        ('"a, b.mp4",dance\nx.mp4,art\n', [("a, b.mp4", "dance"), ("x.mp4", "art")]),
        ("a,b.mp4 0\nc.mp4 1\n", [("a,b.mp4", "0"), ("c.mp4", "1")]),
        ("v1.0,z.mp4 0\nv1.0,y.mp4 1\n", [("v1.0,z.mp4", "0"), ("v1.0,y.mp4", "1")]),
        ("v1.0;z.mp4\t0\n", [("v1.0;z.mp4", "0")]),
        ("v1.0 z.mp4,0\n", [("v1.0 z.mp4", "0")]),
        ("x.mp4,riding y.bike\n", [("x.mp4", "riding y.bike")]),
        ("x.mp4,label\ny.JPEG.webm,path\n", [("x.mp4", "label"), ("y.JPEG.webm", "path")]),
        ("v/x.mp4 0\nv/y z.mp4  1 \n", [("v/x.mp4", "0"), ("v/y z.mp4", "1")]),  # as Kinetics' lists
        ("v_Apply g01.avi 1\nw.avi 2", [("v_Apply g01.avi", "1"), ("w.avi", "2")]),  # as UCF101's
        ("x.mp4 dance\ny.mp4 art\n", [("x.mp4", "dance"), ("y.mp4", "art")]),
        ("path label\nx.mp4 0\n002 1\n", [("x.mp4", "0"), ("002", "1")]),
        ('path label\n"my clip" 0\n', [("my clip", "0")]),
        ("x.mp4\t0\ny z.mp4\t1\n", [("x.mp4", "0"), ("y z.mp4", "1")]),
        ("x.mp4;a, b\ny.mp4;c\n", [("x.mp4", "a, b"), ("y.mp4", "c")]),
        ("x.mp4,0\nx.mp4,0\n", [("x.mp4", "0"), ("x.mp4", "0")]),
        ("x.mp4,True\ny.mp4,False\n", [("x.mp4", "True"), ("y.mp4", "False")]),
        ("x.mp4,1\ny.mp4,a\nz.mp4,1\n", [("x.mp4", "1"), ("y.mp4", "a"), ("z.mp4", "1")]),
        ("x.mp4,+1\ny.mp4,00\n", [("x.mp4", "1"), ("y.mp4", "0")]),
        (r"C:\clips\x.mp4,0", [(r"C:\clips\x.mp4", "0")]),
        ("https://example.org/x?id=3 0\n", [("https://example.org/x?id=3", "0")]),
        ("path,label\n" + "d" * 100_000 + ".mp4,0\n", [("d" * 100_000 + ".mp4", "0")]),
        (
            "path,label\nx.mp4,Putting a, b and c\n".replace("Putting a, b and c", '"Putting a, b and c"'),
            [("x.mp4", "Putting a, b and c")],
        ),
        ("label,more,path\na,,x.mp4\n", [("x.mp4", "a")]),
    ],
)
def test_lists_are_read(tmp_path, text, rows):
    write(tmp_path, "train.csv", text)
    assert load(tmp_path) == rows


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x.mp4,1.0\ny.mp4,2\n", [1.0, 2.0]),
        ("x.mp4,1e-3\ny.mp4,-.5\n", [pytest.approx(1e-3), -0.5]),
        ("x.mp4,1E2\ny.mp4,3.\n", [100.0, 3.0]),
    ],
)
def test_numbers_with_a_point_are_values(tmp_path, text, values):
    write(tmp_path, "train.csv", text)
    assert [value for _, value in load(tmp_path)] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv lists nothing"),
        ("\n \n", "train.csv lists nothing"),
        ("path,label\n", "train.csv lists nothing"),
        ("path,label\nx.mp4,1\ny.mp4,\nz.mp4,2\n", "train.csv: line 3: `label` must not be empty"),
        ("path,label\nx.mp4,1\n,2\n", "train.csv: line 3: the path must not be empty"),
        ("path,label\nx.mp4,1\n,\n", "train.csv: line 3 has empty cells alone"),
        ('path,label\nx.mp4,a\ny.mp4,b\nz.mp4,"a,b"\n', "train.csv: line 4: 'a,b' seems to be several labels"),
        ("path,label\nx.mp4,a|b\ny.mp4,b|c\nz.mp4,a|c\n", "train.csv: line 2: 'a|b' seems to be several labels"),
        ("path,label\nx.mp4,0\ny.mp4,2\nz.mp4,0;2\n", "train.csv: line 4: '0;2' seems to be several labels"),
        ("path;label\nx.mp4;1,5\ny.mp4;2,5\n", "train.csv: line 2: '1,5' seems to be several labels"),
        ("path,label\nx.mp4,0.5\ny.mp4,1e400\n", "train.csv: line 3: the label '1e400' is no number, and 0.5"),
        ("path,label\nx.mp4,a,b\n", "train.csv: line 2 must have 2 columns (path, label), got 3: 'x.mp4, a, b'"),
        ("path,label\nx, y.mp4,a\n", "train.csv: line 2 must have 2 columns (path, label), got 3"),
        ("path,label\n\nx.mp4\n", "train.csv: line 3 must have 2 columns (path, label), got 1"),
        ("x.mp4,1\n# a comment\ny.mp4,2\n", "train.csv: line 2 must have 2 columns"),
        ("# a comment\nx.mp4,1\n", "must have the columns `path` and `label`, got # a comment"),
        ("x.mp4,10,1\n", "must have the columns `path` and `label`, got more than two columns without a header"),
        ("x.mp4 10 1\n", "must have the columns `path` and `label`"),
        ("file.path,label\nx.mp4,1\n", "line 1 must have the columns `path` and `label`, got file.path, label"),
        ("video.name,class\nx.mp4,1\n", "line 1 must have the columns `path` and `label`, got video.name, class"),
        ("clip.id label\nx.mp4 1\n", "line 1 must have the columns `path` and `label`, got clip.id label"),
        ("a.mp4,b.mp4 0\n", "train.csv: line 1 can be separated in two ways, got 'a.mp4,b.mp4 0': put the path in"),
        ("a.mp4;b.mp4,0\n", "train.csv: line 1 can be separated in two ways"),
        ("path,path,label\nx.mp4,y.mp4,1\n", "train.csv: line 1 has the column `path` twice"),
        ("path,label,label\nx.mp4,0,1\n", "train.csv: line 1 has the column `label` twice"),
        ("Path,Label\nx.mp4,1\n", "must have the columns `path` and `label`, got Path, Label"),
        ('path,label\nx.mp4,"a\n', "train.csv: line 2 is not valid CSV"),
        ('path,label\ny.mp4,b\n"x\ny.mp4",a\nz.mp4,c\n', "train.csv: line 3: the path must be one line"),
        ('path,label\nx.mp4,"a\nb"\n', "train.csv: line 2: the name of a class must be one line"),
        ("path,label\nx.mp4,0.5\ny.mp4,1\nz.mp4,NA\n", "train.csv: line 4: the label 'NA' is no number, and 0.5"),
        ("path,label\nx.mp4,-1\n", "train.csv: line 2: a class must be a number from 0 to 99999, got -1"),
        ("path,label\nx.mp4,0\ny.mp4,1000000000\n", "train.csv: line 3: a class must be a number from 0 to 99999"),
        ("path,label\nx.mp4,0\ny.jpg,1\n", "train.csv: line 3: "),
        ("path label\nx.mp4 riding a bike\n", "train.csv: line 2 must have 2 words, got 'x.mp4 riding a bike'"),
        ("a" * 140_000 + ".mp4,0\n", "train.csv: line 1 is not valid CSV: field larger than"),
        ("path,label\nx.mp4," + "a" * 140_000, "train.csv: line 2 is not valid CSV: field larger than"),
    ],
)
def test_lists_are_refused_with_the_line(tmp_path, text, message):
    write(tmp_path, "train.csv", text)
    refuses(tmp_path, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[]", "train.json lists nothing"),
        ("", "train.json lists nothing"),
        ('[{"path": "x.mp4", "label": null}]', "train.json: line 1: `label` must be text or a number, got null"),
        ('[\n{"path": "x.mp4"}]', "train.json: line 2 must have the columns `path` and `label`, got path"),
        ('[{"path": "x.mp4", "label": true}]', "line 1: `label` must be text or a number, got true"),
        ('[{"path": "x.mp4", "label": ["a", "b"]}]', 'must be one text or number, got ["a", "b"]: a video has one'),
        ('[{"path": 1, "label": "a"}]', "line 1: `path` must be text, got 1"),
        ('[{"path": null, "label": "a"}]', "line 1: `path` must be text, got null"),
        (
            '{"path": "x.mp4", "label": 1}\n{"path": "y.mp4", "label": "a"}\n',
            "line 1: the label 1 is a number, and 'a'",
        ),
        ('[{"path": "x.mp4", "label": 0.5},\n{"path": "y.mp4", "label": "a"}]', "line 2: the label 'a' is no number"),
        ('[{"path": "x.mp4", "label": NaN}]', "line 1 is not valid JSON: NaN"),
        ('[{"path": "x.mp4", "label": 1e999}]', "line 1: `label` must be a number that fits 64 bits, got Infinity"),
        ('[{"path": "x.mp4", "label": 1}\n{"path": "y.mp4", "label": 1}]', "line 2 is not valid JSON"),
        ('[{"path": "x.mp4", "label": 1},\n', "line 2 is not valid JSON: the list has no end"),
        ('[{"path": "x.mp4", "label": 1}] 7', "line 1 is not valid JSON: the list has no end, or something after it"),
        ('{"path": "x.mp4", "label": 1}\n{"path": "y.mp4", "lab', "line 2 is not valid JSON"),
        ("[1]", "line 1 must be an object with names and values, got 1"),
        ("[" * 100_000, "line 1 is not valid JSON"),
        ('[{"path": "x.mp4", "label": ""}]', "line 1: `label` must not be empty"),
        (
            '[{"path": "x.mp4", "label": 1},\n{"path": "y.mp4", "label": 0, "label": 1}]',
            "line 2 is not valid JSON: the key",
        ),
        ('[{"path": "x.mp4", "path": "y.mp4", "label": 1}]', "not valid JSON: the key 'path' comes twice"),
        ('[{"path": "x.mp4", "label": 1, "more": {"a": 1, "a": 2}}]', "not valid JSON: the key 'a' comes twice"),
        (
            r'[{"path": "\ud800.mp4", "label": 1}]',
            r"line 1: the path must be one line without control characters, got '\ud",
        ),
        (r'[{"path": "x.mp4", "label": "\udfff"}]', r"line 1: the name of a class must be one line without"),
    ],
)
def test_json_is_refused_with_the_line(tmp_path, entries, message):
    write(tmp_path, "train.json", entries)
    refuses(tmp_path, message)


def test_words_in_json_stay_words(tmp_path):
    write(tmp_path, "train.json", as_json([("x.mp4", "10"), ("y.mp4", "2")], "label"))
    assert load_split(str(tmp_path), "train").features["label"].names == ["10", "2"]
    write(tmp_path, "val.csv", "x.mp4,2\ny.mp4,10\n")
    assert load(tmp_path, "validation", label_names=["10", "2"]) == [("x.mp4", "2"), ("y.mp4", "10")]


BEYOND = ["1e39", "-3.5e38", "1e-60", "16777217", "-33554433", "1" + "0" * 399]
FITTING = ["3.4e38", "16777216", "33554436", "16777218", "-16777217.0", "0.1", "1e-40", "0", "0.0"]


@pytest.mark.parametrize("name", ["train.csv", "train.json"])
@pytest.mark.parametrize("other", ["0.5", "2"])
@pytest.mark.parametrize("value", BEYOND + FITTING)
def test_values_that_float32_does_not_hold(tmp_path, name, other, value):
    rows = [("x.mp4", other), ("y.mp4", value)]
    entries = [f'{{"path": "{path}", "label": {number}}}\n' for path, number in rows]
    path = write(tmp_path, name, as_csv(rows, "label") if name == "train.csv" else "".join(entries))
    if value in FITTING:
        assert [label for _, label in load(tmp_path, regression=True)] == [np.float32(other), np.float32(value)]
    elif name == "train.csv" and len(value) > 308:  # is text, because no float holds it
        refuses(tmp_path, f"{path}: line 3: ", regression=True)
    else:
        refuses(
            tmp_path, f"{path}: line {2 + (name == 'train.csv')}: a value to predict must fit float32", regression=True
        )


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", BEYOND + FITTING)
def test_values_in_shards_that_float32_does_not_hold(tmp_path, clip, suffix, value, streaming):
    if suffix == "cls" and not set(value) <= set("-0123456789"):
        return
    text = value if suffix == "cls" else f'{{"label": {value}}}'
    path = write_shard(tmp_path / "train-0.tar", samples(clip, suffix, [text.encode()] * 2))
    if value in FITTING:
        split = load_split(str(tmp_path), "train", regression=True, streaming=streaming)
        assert [example["label"] for example in split] == [np.float32(value)] * 2
    else:
        message = f"0.{suffix}: must fit 64 bits" if len(value) > 308 else "0: a value to predict must fit float32"
        refuses_shards(tmp_path, f"shard {path}, {message}", streaming=streaming, regression=True)


@pytest.mark.parametrize("value", [r'"\ud800"', r'["a", "b \udc00"]'])
def test_captions_that_are_no_unicode(tmp_path, value):
    write(tmp_path, "train.json", f'[{{"path": "x.mp4", "caption": "a"}},\n{{"path": "y.mp4", "caption": {value}}}]')
    refuses(tmp_path, r"train.json: line 2: a caption must be Unicode, got", target="captions")
    assert len(load(tmp_path, target=None)) == 2


@pytest.mark.parametrize("value", ["null", '["a", null]', '["a", 1]', "true", '{"a": 1}'])
def test_captions_in_json_are_texts(tmp_path, value):
    write(tmp_path, "train.jsonl", f'{{"path": "x.mp4", "caption": "a"}}\n{{"path": "y.mp4", "caption": {value}}}\n')
    if value == "null":
        assert load(tmp_path, target="captions")[1] == ("y.mp4", [])
    else:
        refuses(tmp_path, "train.jsonl: line 2: a caption must be text, got", target="captions")


# Train and test


def test_numbers_of_the_test_split_are_names_where_training_had_names(tmp_path):
    write(tmp_path, "train.csv", "a.mp4,1\nb.mp4,2\nc.mp4,10\nd.mp4,x\n")
    names = load_split(str(tmp_path), "train").features["label"].names
    assert names == ["1", "10", "2", "x"]
    write(tmp_path, "test.csv", "a.mp4,2\nb.mp4,10\n")
    assert load(tmp_path, "test", label_names=names) == [("a.mp4", "2"), ("b.mp4", "10")]
    write(tmp_path, "test.csv", "a.mp4,2\nb.mp4,3\n")
    refuses(tmp_path, "test.csv: line 2: the label '3' is not one of the 4 classes", "test", label_names=names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,0\n", "test.csv: line 1: the label '0' is not one of the 2 classes (art, dance)"),
        ("a.mp4,art\nb.mp4,other\n", "test.csv: line 2: the label 'other' is not one"),
        ("a.mp4,0.5\n", "test.csv: line 1: the label '0.5' is not one"),
    ],
)
def test_classes_found_in_training_have_no_numbers(tmp_path, text, message):
    write(tmp_path, "test.csv", text)
    refuses(tmp_path, message, "test", label_names=["art", "dance"], indices=False)


def test_numbers_are_indices_into_given_names(tmp_path):
    write(tmp_path, "test.csv", "a.mp4,1\nb.mp4,0\nc.mp4,art\n")
    assert [label for _, label in load(tmp_path, "test", label_names=["art", "dance"])] == ["dance", "art", "art"]


def test_classes_by_number_and_by_name_do_not_mix(tmp_path):
    write(tmp_path, "test.csv", "a.mp4,dance\n")
    refuses(tmp_path, "the label 'dance' is not one of the 2 classes (0, 1)", "test", label_names=["0", "1"])
    write(tmp_path, "test.csv", "a.mp4,1.0\n")
    refuses(tmp_path, "the label '1.0' is not one of the 2 classes", "test", label_names=["0", "1"])
    write(tmp_path, "test.csv", "a.mp4,1\nb.mp4,high\n")
    refuses(tmp_path, "test.csv: line 2: the labels of the split 'test'", "test", regression=True)


# Folders


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_square(2)).read_bytes()


ODD_FOLDERS = ["clips [v2]", "clips *", "what?", "{a,b}", "train", "test of me", "ümlaut", "a::b", "a#b", "100%"]


@pytest.mark.parametrize("name", ODD_FOLDERS)
@pytest.mark.parametrize("layout", ["classes", "flat", "list", "metadata", "shards"])
def test_folders_of_any_name(tmp_path, clip, name, layout):
    folder = tmp_path / name
    if layout == "classes":
        for label in ("[x]", "train set", "{y}"):
            write(folder, f"train/{label}/*.mp4", clip)
            write(folder, f"val/{label}/?.mp4", clip)
        assert [label for _, label in load(folder)] == ["[x]", "train set", "{y}"]
        assert load(folder, "validation")[0] == ("val/[x]/?.mp4", "[x]")
        assert split_names(str(folder)) == ["train", "validation"]
    elif layout == "flat":
        write(folder, "x [1].mp4", clip)
        assert load(folder, target=None) == [("x [1].mp4", None)]
    elif layout == "list":
        write(folder, "train.csv", "x [1].mp4,a\n")
        assert load(folder) == [("x [1].mp4", "a")]
    elif layout == "metadata":
        write(folder, "train/x [1].mp4", clip)
        write(folder, "train/metadata.csv", "file_name,label\nx [1].mp4,NA\n")
        assert load(folder) == [("train/x [1].mp4", "NA")]
    elif "::" not in name:  # which `datasets` reads as a chain of addresses
        for split in ("train", "test"):
            write(folder, "x", "")
            with tarfile.open(folder / f"{split}-0.tar", "w") as archive:
                for suffix, content in (("mp4", clip), ("cls", b"1")):
                    archive.add(write(tmp_path, f"x.{suffix}", content), f"x.{suffix}")
        split = load_split(str(folder), "train", label_names=["a", "b"])
        assert [example["label"] for example in split] == [1] and len(split[0]["video"]["bytes"]) == len(clip)
        assert find_evaluation_split(str(folder)) == "test"


def test_folders_of_classes(tmp_path, clip):
    for name in (
        "train/a/1.mp4",
        "train/None/1.MP4",
        "train/test drive/1.mkv",
        "train/.hidden/1.mp4",
        "train/a/._1.mp4",
    ):
        write(tmp_path, name, clip)
    write(tmp_path, "train/a/1.jpg", "a thumbnail")
    assert load(tmp_path) == [
        ("train/None/1.MP4", "None"),
        ("train/a/1.mp4", "a"),
        ("train/test drive/1.mkv", "test drive"),
    ]
    assert split_names(str(tmp_path)) == ["train"]
    with pytest.raises(ValueError, match="must have a split validation or test, got train"):
        find_evaluation_split(str(tmp_path))
    write(tmp_path, "train/b/deeper/1.mp4", clip)
    refuses(tmp_path, "each file must be in the folder of its class")
    assert len(load(tmp_path, target=None)) == 4
    refuses(tmp_path, "must have captions", target="captions")
    refuses(tmp_path, f"{tmp_path} has no split test, it has train", "test")


def test_files_without_the_folder_of_a_class(tmp_path, clip):
    write(tmp_path, "train/1.mp4", clip)
    refuses(tmp_path, f"each file must be in the folder of its class, {tmp_path / 'train/1.mp4'} is in none")


@pytest.mark.parametrize("label", ["a\nb", "a\tb", "a\rb"])
def test_a_class_with_a_line_break_is_refused(tmp_path, clip, label):
    write(tmp_path, "train/x/1.mp4", clip)
    write(tmp_path, f"train/{label}/1.mp4", clip)
    refuses(tmp_path, "must be one line without control characters")


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/x.mp4", "http://example.org/x.mp4", "a/../../x.mp4"])
def test_metadata_stays_in_its_folder(tmp_path, clip, name):
    write(tmp_path, "train/x.mp4", clip)
    path = write(tmp_path, "train/metadata.csv", f"file_name,label\nx.mp4,a\n{name},b\n")
    refuses(tmp_path, f"{path}: line 3: `file_name` must be a file below {path.parent}, got {name!r}")


# Splits: none is trained on, and no file is left out, because of how a folder or a list is called


@pytest.mark.parametrize("test", ["Test", "TEST", "test", "Testing", "EVAL", "Val", "VALIDATION", "Dev"])
@pytest.mark.parametrize("train", ["Train", "TRAIN", "train", "Training"])
def test_folders_of_splits_in_any_case(tmp_path, clip, train, test):
    for split in (train, test):
        write(tmp_path, f"{split}/a/1.mp4", clip)
    assert load(tmp_path) == [(f"{train}/a/1.mp4", "a")]
    assert len(split_names(str(tmp_path))) == 2 and find_evaluation_split(str(tmp_path)) in ("validation", "test")


@pytest.mark.parametrize("name", ["train.CSV", "Train.csv", "TRAIN.Csv", "Train.JSONL", "train.Json", "train.TSV"])
def test_lists_in_any_case(tmp_path, clip, name):
    write(tmp_path, "x/1.mp4", clip)
    is_json = "json" in name.lower()
    write(tmp_path, name, as_lines([("x/1.mp4", "a")], "label") if is_json else "x/1.mp4,a\n")
    write(tmp_path, "Val.CSV", "y/2.mp4,a\n")
    assert load(tmp_path) == [("x/1.mp4", "a")] and load(tmp_path, "validation") == [("y/2.mp4", "a")]
    assert split_names(str(tmp_path)) == ["train", "validation"]


@pytest.mark.parametrize(
    ("one", "other"), [("train", "Train"), ("train", "training"), ("x/train", "y/TRAIN"), ("train", "train/Train")]
)
def test_two_names_of_a_folder_for_one_split(tmp_path, clip, one, other):
    write(tmp_path, f"{one}/a/1.mp4", clip)
    write(tmp_path, f"{other}/a/2.mp4", clip)
    if other == "train/Train":  # the first folder on a path counts
        assert len(load(tmp_path, target=None)) == 2
    else:
        names = " and ".join(Path(name).name for name in sorted((one, other)))
        refuses(tmp_path, f"{tmp_path}: the folders {names} both mean the split train")


def test_two_lists_of_one_split(tmp_path):
    for name in ("train.csv", "Train.csv"):
        write(tmp_path, name, "x.mp4,a\n")
    refuses(tmp_path, "Split 'train' must be one list of files, got ")


@pytest.mark.parametrize("target", ["label", None])
@pytest.mark.parametrize(
    "folder", ["train station", "Train-station", "my_train", "test drive", "train.2", "valid7", "Test Set", "TEST_1"]
)
@pytest.mark.parametrize("other", ["beach", "test drive", "Train"])
def test_folders_that_may_be_a_split_or_not(tmp_path, clip, folder, other, target):
    for name in (folder, other):
        write(tmp_path, f"{name}/x/a.mp4", clip)
    files = [f"{tmp_path}/{name}/x/a.mp4: the folder {name!r} may be a split or a class" for name in (folder, other)]
    with pytest.raises(ValueError) as error:
        load_split(str(tmp_path), "train", target=target)
    assert any(file in str(error.value) for file in files), str(error.value)


@pytest.mark.parametrize("target", ["label", None])
def test_below_the_folder_of_a_split_names_are_free(tmp_path, clip, target):
    names = ("train station", "test", "beach", "my-val")
    for name in names:
        write(tmp_path, f"train/{name}/a.mp4", clip)
    assert [path for path, _ in load(tmp_path, target=target)] == [f"train/{name}/a.mp4" for name in sorted(names)]
    write(tmp_path, "preview/a.mp4", clip)
    refuses(tmp_path, f"{tmp_path}/preview/a.mp4 must be in the folder of a split, as {tmp_path}/train/", target=target)


def test_a_split_without_its_list_is_not_all_that_there_is(tmp_path, clip):
    write(tmp_path, "a/1.mp4", clip)
    write(tmp_path, "val.csv", "a/1.mp4,a\n")
    refuses(tmp_path, f"{tmp_path} has no split train, it has validation")


@pytest.mark.parametrize("name", ["train.txt", "Train.TXT", "val.xlsx", "test.lst", "train.csv.gz", "dev.csv"])
def test_lists_that_are_not_read(tmp_path, clip, name):
    for label in ("a", "b"):
        write(tmp_path, f"{label}/1.mp4", clip)
    write(tmp_path, name, "a/1.mp4,walk\nb/1.mp4,run\n")
    for target in ("label", None):
        refuses(tmp_path, f"{tmp_path / name} seems to be a list, and is not read", target=target)
    (tmp_path / name).rename(tmp_path / "a" / name)  # where it may go with a file
    assert len(load(tmp_path)) == 2


# Metadata


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "metadata.jsonl", "metadata.tsv", "metadata.json"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_metadata_is_not_passed_over(tmp_path, clip, name, folder):
    rows = [("q/1.mp4", "walk"), ("p/1.mp4", "run")]
    for path, _ in rows:
        write(tmp_path, f"{folder}{path}", clip)
    text = as_lines(rows, "label") if "json" in name else as_csv(rows, "label", "\t" if "tsv" in name else ",")
    write(tmp_path, folder + name, text.replace("path", "file_name"))
    assert load(tmp_path) == [(f"{folder}{path}", label) for path, label in rows]


@pytest.mark.parametrize("name", ["metadata.csv", "METADATA.JSONL"])
@pytest.mark.parametrize("target", ["label", "captions", None])
def test_metadata_above_the_folders_of_splits(tmp_path, clip, name, target):
    for label in ("p", "q"):
        write(tmp_path, f"train/{label}/1.mp4", clip)
    write(tmp_path, name, "file_name,label\ntrain/q/1.mp4,walk\ntrain/p/1.mp4,run\n")
    refuses(tmp_path, f"{tmp_path / name} must be in the folder of a split, as ", target=target)


@pytest.mark.parametrize("folders", [(".", "."), ("train", "train"), (".", "a"), ("train", "train/a/b")])
def test_two_files_of_metadata_for_one_file(tmp_path, clip, folders):
    write(tmp_path, f"{folders[1]}/1.mp4", clip)
    first = write(tmp_path, f"{folders[0]}/metadata.csv", "file_name,label\n1.mp4,a\n")
    second = write(tmp_path, f"{folders[1]}/metadata.jsonl", '{"file_name": "1.mp4", "label": "b"}\n')
    refuses(tmp_path, f"{second} must be the only list of the files below {second.parent}, and {first} lists them too")


def test_files_without_metadata_beside_files_with(tmp_path, clip):
    for label in ("p", "q"):
        write(tmp_path, f"train/{label}/1.mp4", clip)
    metadata = write(tmp_path, "train/q/metadata.csv", "file_name,label\n1.mp4,walk\n")
    refuses(tmp_path, f"{tmp_path}/train/p/1.mp4 must be below a file of metadata, as all below {metadata.parent} are")


@pytest.mark.parametrize("name", ["metadata.txt", "train/a/Metadata.xlsx"])
def test_metadata_that_is_not_read(tmp_path, clip, name):
    write(tmp_path, "train/a/1.mp4", clip)
    write(tmp_path, name, "file_name,label\n1.mp4,walk\n")
    refuses(tmp_path, f"{tmp_path / name} seems to be a list, and is not read")


# Shards: `datasets` knows their splits by words in lower case


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Train-0", "Test-0"), "Test-0.tar must be in lower case, if it is the name of a split"),
        (("train-0", "Test-0"), "Test-0.tar must be in lower case"),
        (("Train/0", "TEST/0"), "TEST must be in lower case"),
        (("train-0", "extra-0"), "extra-0.tar is in no split"),
        (("train/0", "more/0"), "more/0.tar is in no split"),
        (("train-0", "train/a/1.mp4"), "has both shards and videos: "),
    ],
)
def test_shards_that_would_be_left_out_or_trained_on(tmp_path, clip, names, message):
    for name in names:
        write_shard(tmp_path / f"{name}.tar", {"1.mp4": clip, "1.cls": b"1"}) if "." not in name else write(
            tmp_path, name, clip
        )
    refuses(tmp_path, message)
    with pytest.raises(ValueError, match=message):
        split_names(str(tmp_path))


@pytest.mark.parametrize("link", ["data", "data/train-1.tar"])
def test_links_to_shards(tmp_path, clip, link, monkeypatch):
    write_shard(tmp_path / "real/train/0.tar", {"1.mp4": clip, "1.cls": b"1"})
    (tmp_path / "data").mkdir() if link != "data" else None
    target = "real" if link == "data" else "real/train/0.tar"
    (tmp_path / link).symlink_to(tmp_path / target)
    monkeypatch.chdir(tmp_path / "real")
    for data in (tmp_path / "data", "../data"):
        assert len(load_split(str(data), "train", target=None)) == 1


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# Accents: composed (NFC) as editors write them, decomposed (NFD) as some file systems have them


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_match_files_whatever_the_form_of_their_accents(tmp_path, clip, listed, stored):
    path = write(tmp_path, unicodedata.normalize(stored, "dossier é/ä ö.mp4"), clip)
    write(tmp_path, "train.csv", unicodedata.normalize(listed, "path,label\ndossier é/ä ö.mp4,é\nnöne.mp4,é\n"))
    assert load_split(str(tmp_path), "train")[0]["video"]["path"] == str(path)
    assert load(tmp_path)[0][1] == unicodedata.normalize("NFC", "é")


def test_a_name_that_matches_two_files_is_refused(tmp_path, clip):
    """Neither of which is the name itself: the accents of one letter are composed, of the other not."""
    for first, second in (("NFC", "NFD"), ("NFD", "NFC")):
        name = unicodedata.normalize(first, "é") + unicodedata.normalize(second, "ä") + ".mp4"
        write(tmp_path, name, clip)
    write(tmp_path, "train.csv", unicodedata.normalize("NFC", "éä.mp4,a\n"))
    refuses(tmp_path, "train.csv: line 1: 'éä.mp4' must be one file, and 2 have this name")


def test_classes_match_whatever_the_form_of_their_accents(tmp_path, clip):
    write(tmp_path, unicodedata.normalize("NFD", "train/é/1.mp4"), clip)
    write(tmp_path, "train/a/1.mp4", clip)
    names = load_split(str(tmp_path), "train").features["label"].names
    assert names == ["a", unicodedata.normalize("NFC", "é")]
    write(tmp_path, unicodedata.normalize("NFC", "test/é/1.mp4"), clip)
    split = load_split(str(tmp_path), "test", label_names=[unicodedata.normalize("NFD", name) for name in names])
    assert split["label"] == [1]


# Shards


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"label": "a"}, {"label": None}], "the label None is not one of the 1 classes"),
        ([{"label": "a"}, {"label": None}], "a label is missing"),
        ([{"label": 1}, {"label": None}], "a label is missing"),
        ([{"label": 2}, {"label": 3}], None),
        ([{"label": 0.5}, {"label": None}], "the label must be a number, got None"),
        ([{"label": "a"}, {"label": 1}], "can't be read"),
        ([{"label": True}, {"label": False}], "must be text or numbers, got Value('bool')"),
        ([{"label": ["a"]}, {"label": ["b"]}], "must be text or numbers, got List"),
    ],
)
def test_labels_in_shards(tmp_path, clip, labels, message):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for index, label in enumerate(labels):
            for suffix, content in (("mp4", clip), ("json", json.dumps(label))):
                archive.add(write(tmp_path, f"x.{suffix}", content), f"{index}.{suffix}")
    (tmp_path / "x.mp4").unlink()
    (tmp_path / "x.json").unlink()
    if message is None:
        assert [example["label"] for example in load_split(str(tmp_path), "train")] == [2, 3]
    else:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            load_split(str(tmp_path), "train", label_names=["a"] if "1 classes" in message else None)


GOOD = {"cls": b"1", "txt": b"a", "json": b'{"label": 1, "caption": "a"}'}


def samples(clip, suffix, values):
    """Members of a shard with a sample for each value."""
    pairs = (
        (index, kind, data) for index, value in enumerate(values) for kind, data in (("mp4", clip), (suffix, value))
    )
    return {f"{index}.{kind}": data for index, kind, data in pairs}


def refuses_shards(folder, message, **options):
    assert split_names(str(folder)) == ["train"]
    with pytest.raises(ValueError) as error:
        list(load_split(str(folder), "train", label_names=["a", "b"], **options))
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("cls", b"cat", "invalid literal for int() with base 10: b'cat'"),
        ("cls", b"", "invalid literal for int() with base 10: b''"),
        ("json", b"{", "Expecting property name"),
        ("json", b'{"label": 1, "label": 0}', "the key 'label' comes twice"),
        ("json", rb'{"label": 1, "caption": "\ud800"}', r"'utf-8' codec can't encode character '\ud800'"),
        ("json", b"[" * 100_000, "maximum recursion depth exceeded"),
        ("json", b'{"caption": "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
        ("txt", b"\xe9", "'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_files_in_shards_that_can_not_be_read(tmp_path, clip, suffix, content, message, number, streaming):
    """In the last of the samples from which `datasets` infers types, and in a shard whose types are known."""
    if number:
        write_shard(tmp_path / "train-0.tar", samples(clip, suffix, [GOOD[suffix]] * 3))
    path = write_shard(tmp_path / f"train-{number}.tar", samples(clip, suffix, [GOOD[suffix], content]))
    target = "captions" if suffix == "txt" else "label"
    refuses_shards(tmp_path, f"shard {path}, 1.{suffix}: {message}", streaming=streaming, target=target)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b'{"class": 1}', b"[1]", b'"a"'])
def test_json_in_shards_without_a_label(tmp_path, clip, content, streaming):
    path = write_shard(tmp_path / "train-0.tar", samples(clip, "json", [content] * 2))
    refuses_shards(tmp_path, f"shard {path}, 0.json: must have `label`, got", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda data, end: b"", ""),
        (lambda data, end: data[:100], ""),
        (lambda data, end: b"path,label\n" * 100, ""),
        (lambda data, end: gzip.compress(data)[:-100], None),
        (lambda data, end: data[: end - 600], ", 0.mp4"),
        (lambda data, end: data[:end], ", after 0.mp4"),  # which `tarfile` takes for the end
        (lambda data, end: data[: end + 100], ", after 0.mp4"),
        (lambda data, end: data[:end] + b"x" * 512 + data[end + 512 :], ", after 0.mp4"),
    ],
)
def test_damaged_shards(tmp_path, clip, damage, place, number, streaming):
    for index in range(number + 1):
        path = write_shard(tmp_path / f"train-{index}.tar", samples(clip, "cls", [b"1"] * 3))
    end = 512 + -(-len(clip) // 512) * 512  # of the first member
    path.write_bytes(damage(path.read_bytes(), end))
    message = f"shard {path}" + ("" if place is None else f"{place}: damaged or truncated")
    for target in ("label", None):
        refuses_shards(tmp_path, message, streaming=streaming, target=target)


@pytest.mark.parametrize("number", [0, 1])
def test_shards_without_samples(tmp_path, clip, number):
    write_shard(tmp_path / "train-0.tar", samples(clip, "cls", [b"1"] * 3))
    path = write_shard(tmp_path / f"train-{number}.tar", {})
    refuses_shards(tmp_path, f"shard {path}: has no sample")


def test_labels_of_shards_are_named_with_their_sample(tmp_path, clip):
    path = write_shard(tmp_path / "train-0.tar", samples(clip, "json", [b'{"label": "a"}', b'{"label": null}']))
    with pytest.raises(ValueError, match=f"shard {path}, 1: a label is missing"):
        load_split(str(tmp_path), "train")
    refuses_shards(tmp_path, f"shard {path}, 1: the label None is not one of the 2 classes")
    refuses_shards(tmp_path, f"shard {path}, 1: the label None is not one of the 2 classes", streaming=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_ends_with_a_line_at_a_broken_sample(tmp_path, clip, num_workers):
    path = write_shard(tmp_path / "train-0.tar", samples(clip, "cls", [b"1"] * 8 + [b"7"]))
    split = load_split(str(tmp_path), "train", streaming=True, label_names=["a", "b"])
    views = TrainingViews(VideoMambaVideoProcessor.for_model(tiny_config()))
    examples = StreamedExamples(Examples(split, views, skip_broken=True), 1, buffer_size=1)
    with pytest.raises(SystemExit) as error, errors_as_lines():
        list(iterate(examples, num_workers, batch_size=1))
    assert str(error.value) == f"error: shard {path}, 8: the label 7 is not one of the 2 classes (a, b)."


# Any table


texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12).map(str.strip)
cells = texts.filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=6), suffix=st.sampled_from(LIST_SUFFIXES))
def test_any_table_comes_back(tmp_path, rows, suffix):
    if suffix in (".json", ".jsonl"):
        content = as_lines(rows, "label")
    else:
        separator = "\t" if suffix == ".tsv" else ","
        quote = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
        content = "".join(separator.join(map(quote, row)) + "\n" for row in [("path", "label"), *rows])
    found = read_list(write(tmp_path, f"x{suffix}", content), "label")
    assert [(row.path, row.value, row.where) for row in found] == [
        (path, label, f"{tmp_path / 'x'}{suffix}: line {number}")
        for number, (path, label) in enumerate(rows, start=1 + (suffix in (".csv", ".tsv")))
    ]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=40) | st.text('path,label.mp40 1\t\n"é{}[]:;', max_size=40).map(str.encode),
    suffix=st.sampled_from(LIST_SUFFIXES),
)
def test_any_file_is_read_or_refused(tmp_path, content, suffix):
    path = write(tmp_path, f"x{suffix}", content)
    for target in ("label", "captions", None):
        try:
            assert read_list(path, target)
        except ValueError as error:
            assert str(path) in str(error)


def test_data_workers_get_no_copy_of_a_long_list(tmp_path):
    rows = "".join(f"folder of a class/video {index}.mp4,{index % 3}\n" for index in range(20_000))
    write(tmp_path, "train.csv", rows)
    split = load_split(str(tmp_path), "train")
    assert len(pickle.dumps(split)) < 10_000
    assert split[19_999] == {
        "video": {"path": f"{tmp_path}/folder of a class/video 19999.mp4", "bytes": None},
        "label": 1,
    }
    assert load_split(str(tmp_path), "train").cache_files == split.cache_files  # one file for one content
    write(tmp_path, "train.csv", rows.replace("19999.mp4,1", "19999.mp4,2"))
    assert load_split(str(tmp_path), "train")[19_999]["label"] == 2 and split[19_999]["label"] == 1
