"""search_videos.py query."""

import os
import re
import shutil
import sys
from itertools import pairwise

import pytest
from PIL import Image

import search_videos
from tests.launching import assert_finished, call
from tests.search.helpers import OPTIONS, TEXT, ask, call_script, paths, window_of
from tests.test_video_order import CASES


@pytest.fixture(scope="module")
def index(model_folder, clips, tmp_path_factory):
    """The index of the clips, which no test changes."""
    out = tmp_path_factory.mktemp("index")
    call_script("index", clips, out, "--model", model_folder, *OPTIONS)
    return out


def test_a_text_finds_what_brute_force_finds(search, oracle, clips, index):
    found = ask(search, index, TEXT, "--rerank", 0, "--top-k", 100)
    assert found["clips"] == len(found["hits"]) == 10 and found["search_ms"] > 0 and "rerank_ms" not in found
    scores = [hit["similarity"] for hit in found["hits"]]
    expected = [oracle.similarity(oracle.pixels(clips / hit["path"], *window_of(hit))) for hit in found["hits"]]
    assert scores == pytest.approx(expected, abs=1e-5) and scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.1  # they tell something
    assert paths(ask(search, index, TEXT, "--rerank", 0, "--top-k", 3)["hits"]) == paths(found["hits"])[:3]


def test_the_best_are_ordered_by_the_fusion_layers(search, oracle, clips, index):
    first = ask(search, index, TEXT, "--rerank", 0, "--top-k", 10)["hits"]
    before = [(hit["path"], hit["start"]) for hit in first]
    matches = [oracle.match(oracle.pixels(clips / hit["path"], *window_of(hit))) for hit in first]
    expected = dict(zip(before, matches, strict=True))
    for reranked in (4, 32):
        hits = ask(search, index, TEXT, "--rerank", reranked, "--top-k", 10)["hits"]
        keys = [(hit["path"], hit["start"]) for hit in hits]
        assert set(keys[:reranked]) == set(before[:reranked]) and keys[reranked:] == before[reranked:]
        assert keys[:reranked] != before[:reranked]
        found = [hit["match"] for hit in hits[:reranked]]
        assert found == pytest.approx([expected[key] for key in keys[:reranked]], abs=1e-4)
        assert found == sorted(found, reverse=True) and found[0] - found[-1] > 0.01
        assert all(hit["match"] is None for hit in hits[reranked:])
    assert paths(ask(search, index, TEXT, "--top-k", 2)["hits"]) == paths(hits)[:2]  # the best of all, not of two


def test_an_example_finds_itself_first(search, clips, index):
    for name in ("0.mp4", "sub/3.mp4"):
        found = ask(search, index, "--video", clips / name, "--top-k", 20)
        assert paths(found["hits"])[0] == name and len(found["hits"]) == 10
        scores = [hit["similarity"] for hit in found["hits"]]
        assert scores[0] == pytest.approx(1, abs=1e-5) and scores == sorted(scores, reverse=True)
        assert scores[1] < 0.9999 and {hit["match"] for hit in found["hits"]} == {None}


def test_what_is_not_as_it_was_is_left_out_and_named(search, collection):
    folder, out = collection
    before = [path for path in paths(ask(search, out, TEXT, "--rerank", 0)["hits"]) if path != "long.mp4"]
    removed, changed, damaged = before[:3]
    (folder / removed).unlink()
    os.utime(folder / changed, ns=(0, 0))
    found, size = (folder / damaged).stat(), (folder / damaged).stat().st_size
    (folder / damaged).write_bytes(b"x" * size)
    os.utime(folder / damaged, ns=(found.st_atime_ns, found.st_mtime_ns))
    told = [f"{removed}: removed since it was indexed", f"{changed}: changed since it was indexed"]

    unread = ask(search, out, TEXT, "--rerank", 0, "--top-k", 2)
    assert sorted(unread["left_out"]) == sorted(told) and len(unread["hits"]) == 2
    assert damaged in paths(ask(search, out, TEXT, "--rerank", 0)["hits"])  # of which nothing was read
    read = ask(search, out, TEXT, "--top-k", 7)
    assert len(read["hits"]) == 7 and not {removed, changed, damaged} & set(paths(read["hits"]))
    assert len(read["left_out"]) == 3 and f"{folder / damaged}: not a video" in " ".join(read["left_out"])
    example = ask(search, out, "--video", folder / changed, "--top-k", 20)
    assert len(example["hits"]) == 8 and sorted(example["left_out"]) == sorted(told)
    assert f"left out: {told[0]}" in search.errors


# What it shows


def test_table_and_pictures(search, index, tmp_path):
    for name in ("hits.png", "hits.svg", "hits.pdf"):
        text = search("query", index, TEXT, "--top-k", 3, "--rerank", 2, "--picture", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with Image.open(tmp_path / "hits.png") as picture:
        assert picture.size[1] > 600 and len(picture.convert("RGB").getcolors(10**6)) > 20
    svg = (tmp_path / "hits.svg").read_text("utf-8")
    assert svg.count("<image") == 3
    assert "10 clips; searching" in text and "re-ranking" in text
    hits = ask(search, index, TEXT, "--top-k", 3, "--rerank", 2)["hits"]
    lines = [line for line in text.splitlines() if ".mp4" in line]
    for rank, (line, hit) in enumerate(zip(lines, hits, strict=True), 1):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        begin, end = (f"0:{round(hit[name]):02}" for name in ("start", "end"))
        match = "" if hit["match"] is None else f"{hit['match']:.3f}"
        assert cells == [str(rank), hit["path"], f"{begin}–{end}", f"{hit['similarity']:.3f}", match]  # noqa: RUF001


# What is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "pass one of a text and --video"),
        ((TEXT, "--video", "x.mp4"), "pass one of a text and --video"),
        ((" ",), "the text is empty"),
        ((TEXT, "--top-k", 0), "--top-k must be at least 1, got 0"),
        ((TEXT, "--rerank", -1), "--rerank must not be negative, got -1"),
        (("--video", "x.mp4", "--rerank", 3), "--rerank 3: candidates are judged by a text, not by --video"),
        ((TEXT, "--picture", "a.gif"), "--picture a.gif: must end in .png, .jpg, .pdf, .svg"),
        ((TEXT, "--picture", "no/a.png"), "--picture no/a.png: there is no such folder"),
        ((TEXT, "--picture", "a.png", "--top-k", 51), "--picture shows at most 50 hits, got --top-k 51"),
        (("seven " * 600,), "the text has 602 tokens, of which the model takes at most 512"),
        (("--video", "nowhere.mp4"), "nowhere.mp4: no such video file"),
    ],
)
def test_wrong_queries_are_explained(exit_of, index, options, message):
    assert exit_of(search_videos, "query", index, *options) == f"error: {message}"


def test_another_version_of_transformers_is_no_other_model(search, model_folder, clips, tmp_path, monkeypatch):
    search("index", clips, tmp_path, "--model", model_folder, *OPTIONS)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9.9")
    assert len(ask(search, tmp_path, TEXT)["hits"]) == 10


def test_what_is_missing_is_named_with_how_to_install_it(exit_of, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = exit_of(search_videos, "query", tmp_path, TEXT)
    assert message == 'error: searching needs FAISS: `pip install "modeling-videomamba[search]"`'


# Damaged indexes


def cut(share):
    return lambda content: content[: int(share * len(content))]


def other(text):
    return lambda content: text.encode()


DAMAGE = {
    **{
        name: [cut(0), cut(0.5), other("no JSON"), other("[]"), other("{}"), lambda content: b"\xff", None]
        for name in ("settings.json", "table-*/state.json")
    },
    "table-*/dataset_info.json": [cut(0), cut(0.5), other("no JSON"), other("[]"), lambda content: b"\xff", None],
    "table-*/data-*.arrow": [cut(0), cut(0.5), other("no table"), None],
    "table-*/embedding.faiss": [cut(0), cut(0.5), cut(0.99), other("no index"), None],
    "current": [cut(0), cut(0.5), other("table-0"), other("../elsewhere"), other("."), lambda content: b"\xff"],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, all_of in DAMAGE.items() for damage in all_of])
def test_a_damaged_index_is_one_line_with_the_file_and_what_to_do(name, damage, index, tmp_path, exit_of):
    out = tmp_path / "index"
    shutil.copytree(index, out)
    (path,) = out.glob(name)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    message = exit_of(search_videos, "query", out, TEXT)
    assert re.fullmatch(f"error: {path}: damaged \\([^\n]+\\): delete {out} and index again", message), message


def test_a_faiss_index_of_another_table_is_damaged(index, clips, model_folder, tmp_path, exit_of):
    for out, data in ((tmp_path / "one", clips), (tmp_path / "two", clips / "sub")):
        call_script("index", data, out, "--model", model_folder, *OPTIONS)
    one, two = (next((tmp_path / name).glob("table-*")) / "embedding.faiss" for name in ("one", "two"))
    shutil.copy(two, one)
    assert f"error: {one}: damaged (Index size should match Dataset size" in exit_of(
        search_videos, "query", tmp_path / "one", TEXT
    )


@pytest.mark.parametrize(
    ("name", "removed"),
    [("settings.json", True), ("settings.json", False), ("table-*/state.json", True), ("current", False)],
)
def test_a_damaged_index_is_not_added_to(name, removed, index, clips, model_folder, tmp_path, exit_of):
    out = tmp_path / "index"
    shutil.copytree(index, out)
    (path,) = out.glob(name)
    path.unlink() if removed else path.write_bytes(b"")
    message = exit_of(search_videos, "index", clips, out, "--model", model_folder, *OPTIONS)
    assert re.fullmatch(f"error: {path}: damaged \\([^\n]+\\): delete {out} and index again", message), message


def test_times_are_those_of_a_video_with_a_variable_frame_rate(model_folder, tmp_path):
    """Through both commands: 150 frames in 59.1 seconds, which its mean rate would put elsewhere."""
    (tmp_path / "videos").mkdir()
    shutil.copy(CASES / "vfr.mp4", tmp_path / "videos")
    options = ("--model", model_folder, "--clip-seconds", 10, "--num-workers", 0)
    assert_finished(call("search_videos.py", "index", tmp_path / "videos", tmp_path / "out", *options))
    text = assert_finished(call("search_videos.py", "query", tmp_path / "out", TEXT, "--top-k", 8))
    times = sorted(re.findall(r"\d:\d\d\N{EN DASH}\d:\d\d", text))
    ends = ["0:00", "0:10", "0:20", "0:30", "0:39", "0:49", "0:59"]
    assert times == [f"{start}\N{EN DASH}{end}" for start, end in pairwise(ends)]
