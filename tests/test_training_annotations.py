import json
import pickle
import re
from unicodedata import normalize

import pytest
from datasets import Video

from modeling_videomamba.training.annotations import load_annotated, read_annotations

JUNO = "1004_Juno_00.00.32.161-00.00.35.000"
SLUMDOG = "1006_Slumdog_Millionaire_01.25.49.077-01.25.54.718"
TIMES = "00.00.32.161\t00.00.35.000\t00.00.32.161\t00.00.35.000"
MSVD_HEADER = "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
MSR_VTT = {
    "info": {"year": "2016"},
    "videos": [
        {"category": 9, "url": "https://example.org/watch?v=a", "video_id": "video0", "split": "train", "id": 0},
        {"category": 3, "url": "https://example.org/watch?v=b", "video_id": "video7010", "split": "test", "id": 1},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "cooking food", "video_id": "video7010", "sen_id": 1},
        {"caption": "a car drives", "video_id": "video0", "sen_id": 2},
    ],
}
DIDEMO = [
    {
        "annotation_id": 1,
        "description": "the dog sits",
        "video": "8@N02_59_3c2.mov",
        "times": [[3, 3]],
        "num_segments": 6,
    },
    {"annotation_id": 2, "description": "it runs", "video": "8@N02_59_3c2.mov", "times": [[0, 0]], "num_segments": 6},
]
ACTIVITYNET = {
    "v_QOl": {"duration": 82.7, "timestamps": [[9, 19.9], [0, 9]], "sentences": ["A man sits. ", " He rises."]},
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="annotations"):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def videos(tmp_path):
    """Makes empty files: nothing is decoded."""

    def make(*names):
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "videos"

    return make


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ([{"video": "v/1.mp4", "caption": ["a", "b"]}, {"video": "2.mp4", "caption": "c"}], ["v/1.mp4:a,b", "2.mp4:c"]),
        ([{"video": "1.mp4", "caption": "a"}, {"video": "1.mp4", "caption": "b", "answer_type": 1}], ["1.mp4:a,b"]),
        ('\ufeff[{"image": "1.mp4", "caption": " a"}]', ["1.mp4:a"]),
        (DIDEMO, ["8@N02_59_3c2.mov:the dog sits,it runs"]),
        (ACTIVITYNET, ["v_QOl:A man sits.,He rises."]),
        ('\ufeffkey,vid_key,video_id,sentence\nret0,msr9,video9,"a, b"\n', ["video9:a, b"]),
        (f"{JUNO}\t{TIMES}\tSOMEONE,\"walks.\n{JUNO}\t{TIMES}\tHe's 1.\r\n", [f"{JUNO}:SOMEONE,\"walks.,He's 1."]),
        (f"{JUNO}\t{TIMES}\tcaf".encode() + b"\xe9\x92s\n", [f"{JUNO}:caf\u00e9\u2019s"]),
        (
            f"{JUNO}\t{TIMES}\tcaf\u00e9\n{SLUMDOG}\t{TIMES}\t".encode() + b"\x85\n",
            [f"{JUNO}:caf\u00e9", f"{SLUMDOG}:\u2026"],
        ),
        (
            f"{MSVD_HEADER}mv_9,3,6,5,clean,4,English,A bird. \nmv_9,3,6,5,clean,4,German,Ein Vogel.\n\n"
            'mv_9,3,6,6,unverified,4,English,"A parrot,\nalone."\n',
            ["mv_9_3_6:A bird.,A parrot,\nalone."],
        ),
        (
            "# English\n#\n\n-4w_5_15 a squirrel eats\nmv_9_3_6 a bird\n",
            ["-4w_5_15:a squirrel eats", "mv_9_3_6:a bird"],
        ),
    ],
)
def test_formats(write, content, captions):
    assert [f"{name}:{','.join(own)}" for name, own in read_annotations(write(content)).items()] == captions


def test_a_quote_in_lsmdc_opens_nothing(write):
    path = write(f'{JUNO}\t{TIMES}\tHe says,"no.\n{SLUMDOG}\t{TIMES}\t{140_000 * "a"}\n')
    assert list(read_annotations(path)) == [JUNO, SLUMDOG]


def test_msvd_rows_without_description_are_counted(write):
    ends = ("English,A bird.", "English, ", "English", "French,")
    path = write(MSVD_HEADER + "".join(f"a,3,6,5,clean,4,{end}\n" for end in ends))
    with pytest.warns(UserWarning, match="left out 2 English rows"):
        assert read_annotations(path) == {"a_3_6": ["A bird."]}


def test_splits_of_msr_vtt(write):
    path = write(MSR_VTT)
    assert read_annotations(path, split="train") == {"video0": ["a car is shown", "a car drives"]}
    assert read_annotations(path, split="test") == {"video7010": ["cooking food"]}
    assert list(read_annotations(path, split="all")) == ["video0", "video7010"]
    for split in (None, "val"):
        with pytest.raises(ValueError, match=f"all or a split in .*, test, train, got {split!r}"):
            read_annotations(path, split=split)
    one = {"videos": MSR_VTT["videos"][1:], "sentences": MSR_VTT["sentences"][1:2]}
    assert read_annotations(write(one)) == {"video7010": ["cooking food"]}
    with pytest.raises(ValueError, match=r"no sentence for 1 videos: video7010\."):
        read_annotations(write({**MSR_VTT, "sentences": MSR_VTT["sentences"][:1]}), split="test")
    with pytest.raises(ValueError, match=r"1 videos that are not in `videos`: video0\."):
        read_annotations(write({**MSR_VTT, "videos": MSR_VTT["videos"][1:]}))
    with pytest.raises(ValueError, match="`split` is for JSON of MSR-VTT"):
        read_annotations(write(DIDEMO), split="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"video": "1.mp4"', "annotations is not valid JSON"),
        ("[" * 100_000, "annotations is not valid JSON: maximum recursion depth"),
        ('{"a":' * 100_000, "annotations is not valid JSON: maximum recursion depth"),
        ('[{"video": "1.mp4", "caption": ' + "[" * 100_000, "annotations is not valid JSON: maximum recursion depth"),
        (
            r'[{"video": "1.mp4", "caption": "\ud800"}]',
            r"caption 1: the caption of 1.mp4 must be Unicode, got '\\ud800'",
        ),
        (r'[{"video": "\ud800", "caption": "a"}]', r"caption 1: the name of a video must be Unicode, got '\\ud800'"),
        *(
            (
                {"videos": [{"video_id": "a"}, {"video_id": video}], "sentences": [{"video_id": sentence}]},
                rf"annotations: `{name}`, entry {number}: `video_id` must be text, got {re.escape(str(found))}",
            )
            for video, sentence, name, number, found in (
                (["a"], "a", "videos", 2, ["a"]),
                ({"a": 1}, "a", "videos", 2, {"a": 1}),
                (7, "a", "videos", 2, 7),
                (None, "a", "videos", 2, None),
                ("b", ["a"], "sentences", 1, ["a"]),
                ("b", {}, "sentences", 1, {}),
            )
        ),
        ([{"path": "1.mp4", "text": "a"}], "JSON of no known format(.|\n)*DiDeMo(.|\n)*LSMDC"),
        ([], "no known format"),
        ("path,label\n1.mp4,a\n", "no known format(.|\n)*ActivityNet"),
        ("", "no known format"),
        ([{"video": "1.mp4", "caption": ["a", " "]}], "caption of 1.mp4 must be text, got ' '"),
        ([{"video": "1.mp4", "caption": []}], "caption of 1.mp4 must be text"),
        (
            [{"video": "1.mp4", "caption": "a"}, {"video": "2.mp4"}],
            "caption 2: the caption of 2.mp4 must be text, got None",
        ),
        ([{"video": ["1.mp4", "2.mp4"], "caption": "a"}], r"name of a video must be text, got \['1.mp4'"),
        ([{"video": "1.mp4", "caption": ["a", "b"], "answer": 1}], "multiple choice"),
        ({"v_a": {"sentences": []}}, "caption of v_a must be text"),
        ({"videos": ["a"], "sentences": []}, r"`videos` must be a list of dictionaries, got \['a'\]"),
        ({"videos": [{"video_id": "a"}], "sentences": {"a": "b"}}, "`sentences` must be a list of dictionaries"),
        (f"{JUNO}\t{TIMES}\ta\n{JUNO}\t{TIMES}\t\n", "line 2 must have 6 columns .* got 5"),
        (f"{JUNO}\t{TIMES}\ta".encode() + b"\x81\n", "line 1 must be text"),
        ("# x\na_3_6 a bird\nnothing\n", "line 3 must be VIDEO_START_END"),
        ("video_id,sentence\nvideo9\n", "caption of video9 must be text"),
        ('video_id,sentence\nvideo9,"a man\nvideo8,b\n', "not a valid CSV"),
        ("video_id,sentence\nvideo9,a man walks, then sits\n", "not a valid CSV: line 2 has more columns"),
        (f"{MSVD_HEADER}a,3,6,5,clean,4,French,Un oiseau.\n", "has no captions"),
        (pickle.dumps({"a_3_6": [["a", "bird"]]}), "is a pickle.*AllVideoDescriptions.txt"),
    ],
)
def test_files_that_are_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_annotations(write(content))


def test_a_pickle_of_the_first_protocol(write):
    with pytest.raises(ValueError, match="raw-captions.pkl is a pickle"):
        read_annotations(write(pickle.dumps({"a_3_6": [["a", "bird"]]}, protocol=0), "raw-captions.pkl"))


def captions_of(names):
    return [{"video": name, "caption": f"of {name}"} for name in names]


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("a/1.mp4", ["1.mp4", "a/1.mp4", "b/1.mp4", "x/a/1.mp4"], "a/1.mp4"),  # the path is exact
        ("1.mp4", ["a/1.avi", "b/1.mp4"], "b/1.mp4"),
        ("a/1.mp4", ["x/a/1.mp4", "x/b/1.mp4"], "x/a/1.mp4"),
        ("a/1.mp4", ["1.mp4"], "1.mp4"),
        ("video9", ["all/video9.MP4", "video9", "all/video99.mp4"], "all/video9.MP4"),
        ("8_3c2.mov", ["8_3c2.mp4"], "8_3c2.mp4"),
        ("8_3c2.mov", ["8_3c2.mov.mp4"], "8_3c2.mov.mp4"),
        (JUNO, [f"1004_Juno/{JUNO}.avi", f"1004_Juno/{JUNO[:-4]}.avi"], f"1004_Juno/{JUNO}.avi"),
    ],
)
def test_which_file_is_meant(write, videos, name, files, expected):
    folder = videos(*files)
    dataset, missing = load_annotated(write(captions_of([name])), folder)
    assert isinstance(dataset.features["video"], Video) and missing == {}
    assert list(dataset) == [{"video": {"path": str(folder / expected), "bytes": None}, "captions": [f"of {name}"]}]


def test_files_and_names_that_are_ambiguous(write, videos):
    folder = videos("a/1.mp4", "b/1.mp4")
    with pytest.raises(ValueError, match=r"1\.mp4 must match one file, and matches a/1\.mp4, b/1\.mp4\."):
        load_annotated(write(captions_of(["1.mp4"])), folder, skip_missing=True)
    with pytest.raises(ValueError, match=r"a/1 and a/1\.avi must be two videos, and both match a/1\.mp4"):
        load_annotated(write(captions_of(["a/1", "a/1.avi"])), folder, skip_missing=True)


def test_missing_files(write, videos, tmp_path):
    path, folder = write(captions_of(["a/1.mp4", *(f"{i}.mp4" for i in range(2, 9))])), videos("b/1.mp4", "8.mp4")
    with pytest.raises(FileNotFoundError, match=r"7 of the 8 videos in .*: a/1\.mp4, 2\.mp4, .*5\.mp4, \.\.\.$"):
        load_annotated(path, folder)
    dataset, missing = load_annotated(path, folder, skip_missing=True)
    assert dataset["captions"][:] == [["of 8.mp4"]]
    assert list(missing) == ["a/1.mp4", *(f"{i}.mp4" for i in range(2, 8))] and str(folder) in missing["a/1.mp4"]
    with pytest.raises(FileNotFoundError, match="1 of the 1 videos"):
        load_annotated(write(captions_of(["9.mp4"])), folder, skip_missing=True)
    with pytest.raises(FileNotFoundError, match="`videos` must be a folder"):
        load_annotated(path, tmp_path / "elsewhere", skip_missing=True)


def test_paragraphs_keep_the_order_of_the_file(write, videos):
    for content, expected in ((DIDEMO, "the dog sits it runs"), (ACTIVITYNET, "A man sits. He rises.")):
        dataset, _ = load_annotated(write(content), videos("8@N02_59_3c2.mov", "v_QOl.mp4"), paragraphs=True)
        assert dataset["captions"][:] == [[expected]]


def test_a_list_of_names(write, videos):
    path, folder = write("a_1_2 x\nb_1_2 y\nc_1_2 z\na_1_2 w\n"), videos("a_1_2.avi", "c_1_2.avi")
    dataset, missing = load_annotated(path, folder, names=write("\ufeffc_1_2\r\na_1_2\n\n", "test_list.txt"))
    assert dataset["captions"][:] == [["z"], ["x", "w"]] and missing == {}
    with pytest.raises(ValueError, match=r"1 of the 2 videos in .*test_list.txt are not in .*: d_1_2\."):
        load_annotated(path, folder, names=write("a_1_2\nd_1_2\n", "test_list.txt"), skip_missing=True)
    with pytest.raises(ValueError, match=r"`names` must list videos, and .*test_list.txt is empty"):
        load_annotated(path, folder, names=write("\n", "test_list.txt"))
    names, folder = write("video_id\nvideo7010\n", "MSRVTT_train.9k.csv"), videos("video7010.mp4")
    dataset, _ = load_annotated(write(MSR_VTT), folder, split="all", names=names)
    assert dataset["captions"][:] == [["cooking food"]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("content", [json.dumps(captions_of(["é.mp4"]), ensure_ascii=False), "é_1_2 of é.mp4\r\n"])
def test_encodings_with_a_mark_are_read(write, content, encoding):
    assert list(read_annotations(write(content.encode(encoding))).values()) == [["of é.mp4"]]


def test_what_only_begins_with_a_mark_is_refused(write):
    with pytest.raises(ValueError, match="begins as utf-16 and is not: byte 4 can't be read"):
        read_annotations(write(b"\xff\xfe[\x00\x00"))


@pytest.mark.parametrize("word", ["None", "NA", "N/A", "null", "nan"])
def test_captions_may_be_words_for_nothing(write, word):
    for content in (
        f"video_id,sentence\nvideo9,{word}\n",
        [{"video": "video9", "caption": word}],
        f"video9_1_2 {word}\n",
    ):
        assert list(read_annotations(write(content)).values()) == [[word]]


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
@pytest.mark.parametrize("name", ["é/ä.mp4", "ä.mov", "ä"])
def test_names_match_files_whatever_the_form_of_their_accents(write, videos, listed, stored, name):
    folder = videos(normalize(stored, "x/é/ä.mp4"))
    names = write(normalize(stored, name), "names.txt")
    dataset, _ = load_annotated(write(captions_of([normalize(listed, name)])), folder, names=names)
    assert dataset[0]["video"]["path"] == str(folder / normalize(stored, "x/é/ä.mp4"))


def test_a_name_with_two_files_that_differ_in_their_accents(write, videos):
    folder = videos(normalize("NFC", "é.mp4"), normalize("NFD", "é.mp4"))
    dataset, _ = load_annotated(write(captions_of([normalize("NFD", "é.mp4")])), folder)
    assert dataset[0]["video"]["path"] == str(folder / normalize("NFD", "é.mp4"))
    folder = videos(
        normalize("NFC", "é") + normalize("NFD", "ä.mp4"), normalize("NFD", "é") + normalize("NFC", "ä.mp4")
    )
    with pytest.raises(ValueError, match="must match one file, and matches"):
        load_annotated(write(captions_of([normalize("NFC", "éä.mp4")])), folder)
