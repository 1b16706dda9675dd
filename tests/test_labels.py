"""Files with the names of classes."""

import json
import unicodedata

import pytest

from modeling_videomamba.labels import distinct_names, load_labels
from videomamba_arguments import LabelledDataArguments

ODD_NAMES = ["None", "NA", "null", "nan", "a, b", "日本", "é", "1"]


def write(tmp_path, content, name="labels.txt"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["labels.txt", "labels.json"])
def test_names_come_back(tmp_path, encoding, end, name):
    text = "".join(f" {label}{end}" for label in ODD_NAMES) + end + end
    content = json.dumps(ODD_NAMES, ensure_ascii=False) if name.endswith("json") else text
    path = write(tmp_path, content.encode(encoding), name)
    assert load_labels(path) == ODD_NAMES
    assert LabelledDataArguments(data="x", label_file=path).label_names() == ODD_NAMES


def test_accents_are_composed(tmp_path):
    path = write(tmp_path, unicodedata.normalize("NFD", "é\nä\n"))
    assert load_labels(path) == [unicodedata.normalize("NFC", name) for name in ("é", "ä")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n\na\n", "line 4 has the name 'a', as line 1 has"),
        ("a\n a \n", "line 2 has the name 'a', as line 1 has"),
        (
            unicodedata.normalize("NFC", "é\n") + unicodedata.normalize("NFD", "é\n"),
            "line 2 has the name 'é', as line 1",
        ),
        ("", "there is no name of a class"),
        ("\ufeff\n \n", "there is no name of a class"),
        ("a\nb\tc\n", r"line 2: the name of a class must be one line without control characters, got 'b\\tc'"),
        ("a\né\n".encode("latin-1"), r"line 2 must be text in UTF-8, got the byte 0xe9 \(byte 2 of the file\)"),
        ("ab\n".encode("utf-16-le"), "line 1 must be text in UTF-8, got a null character"),
    ],
)
def test_files_are_refused_with_the_line(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load_labels(path)


@pytest.mark.parametrize(
    "content",
    [
        '["a", "a"]',
        '["a", ""]',
        '["a", null]',
        '["a"',
        "[]",
        "1",
        '{"0": "a", "2": "b"}',
        '{"0": "a", "0": "b"}',
        "[" * 100000,
    ],
)
def test_json_is_refused_with_its_name(tmp_path, content):
    path = write(tmp_path, content, "labels.json")
    with pytest.raises(ValueError, match=f"^{path}"):
        load_labels(path)


def test_names_that_occur_twice_have_their_index():
    assert distinct_names(["crane", "ox", "crane"]) == ["crane (0)", "ox", "crane (2)"]
    assert len(set(distinct_names(load_labels("imagenet-1k")))) == 1000
