"""search_videos.py, mostly in this process, which is faster than to launch it."""

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, pairwise
from pathlib import Path
from unittest import mock

import aiohttp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import search_videos
from make_moving_digits import FPS, write_mp4
from modeling_videomamba import VideoMambaForVideoTextRetrieval, VideoMambaModel, VideoMambaProcessor
from modeling_videomamba.training import windows as windows_module
from modeling_videomamba.training.collection import Collection, embed
from modeling_videomamba.training.windows import Share, Source, Windows, cut_video, find_files, read_videos
from modeling_videomamba.training.workers import iterate
from modeling_videomamba.video_decoding import BrokenVideoError, read_frames
from modeling_videomamba.video_text_losses import similarities
from tests.conftest import forget_accelerator, tiny_config
from tests.launching import SCRIPTS, assert_finished, launch, start, wait_until
from tests.models import save_video_text

TEXT = "a seven moves"
OPTIONS = ("--clip-seconds", 2, "--num-workers", 0)


def draw(seed, num_frames=2 * FPS):
    """Frames of a colour and a brightness of their own, with a square that moves."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_frames, 48, 48, 3), rng.integers(0, 200, 3), np.uint8)
    top, left, color = rng.integers(0, 32), rng.integers(0, 16), rng.integers(0, 255, 3)
    for index, frame in enumerate(frames):
        frame[top : top + 16, left + index % 16 : left + index % 16 + 16] = color
    return frames


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model whose similarities and matching probabilities differ from video to video."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_video_text(folder)
    model = VideoMambaForVideoTextRetrieval.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("crossattention" in name and weight.ndim == 2) or name == "matching_head.weight":
                weight.copy_(torch.randn_like(weight) / 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven short videos, one that is three windows long, and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for index in range(7):
        write_mp4(folder / ("sub" if index % 2 else ".") / f"{index}.mp4", draw(index))
    write_mp4(folder / "long.mp4", draw(7, 6 * FPS))
    (folder / "bad.mp4").write_text("no video")
    (folder / "notes.txt").write_text("no video either")
    return folder


def call_script(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["search_videos.py", *map(str, options)])
        search_videos.main()
    forget_accelerator()


@pytest.fixture
def search(capsys, monkeypatch):
    """Calls the script in this process; returns what it prints, and keeps its errors and the windows it embedded."""

    def count(model, pixel_values):
        call.embedded += len(pixel_values)
        return embed(model, pixel_values)

    monkeypatch.setattr(search_videos, "embed", count)

    def call(*options):
        call.embedded = 0
        capsys.readouterr()
        call_script(*options)
        printed, call.errors = capsys.readouterr()
        return printed

    call.embedded = 0
    return call


@pytest.fixture(scope="module")
def index(model_folder, clips, tmp_path_factory):
    """The index of the clips, which no test changes."""
    out = tmp_path_factory.mktemp("index")
    call_script("index", clips, out, "--model", model_folder, *OPTIONS)
    return out


@pytest.fixture
def collection(search, model_folder, clips, tmp_path):
    """A copy of the clips, and the index of it, to be changed."""
    folder, out = tmp_path / "clips", tmp_path / "index"
    shutil.copytree(clips, folder)
    search("index", folder, out, "--model", model_folder, *OPTIONS)
    return folder, out


def rows(out):
    """Embeddings by path and start."""
    table = load_from_disk(str(Collection(out).table_folder()))
    return {(row["path"], row["start"]): row for row in table.with_format("numpy")}


def files_of(out):
    """Names in an index."""
    return {re.sub("^table-.*", "table-*", path.name) for path in out.iterdir()}


def counts(text):
    """Numbers of the last line: clips and videos embedded, videos kept, changed, removed, broken."""
    return [int(word) for word in text.splitlines()[-1].replace(",", "").split() if word.isdigit()]


def paths(hits):
    return [hit["path"] for hit in hits]


def ask(search, out, *options):
    return json.loads(search("query", out, *options, "--json"))


# What the model itself says


class Oracle:
    def __init__(self, folder):
        self.model = VideoMambaForVideoTextRetrieval.from_pretrained(folder).eval()
        self.processor = VideoMambaProcessor.from_pretrained(folder)
        self.tokens = self.processor(text=[TEXT], return_tensors="pt")

    def pixels(self, path, first=0, last=None):
        frames, _ = read_frames(path)
        return self.processor.video_processor(frames[first:last], return_tensors="pt")["pixel_values"]

    def frame_embeds(self, pixels):
        with torch.no_grad():
            return F.normalize(self.model.get_video_features(pixels).pooler_output, dim=-1)

    def similarity(self, pixels):
        with torch.no_grad():
            text = F.normalize(self.model.get_text_features(**self.tokens).pooler_output, dim=-1)
        return similarities(self.frame_embeds(pixels), text).item()

    def match(self, pixels):
        with torch.no_grad():
            return self.model.matching_logits(pixels, **self.tokens).softmax(-1)[0, 1].item()


@pytest.fixture(scope="module")
def oracle(model_folder):
    return Oracle(model_folder)


def window_of(hit):
    return round(hit["start"] * FPS), round(hit["end"] * FPS)


# Indexing


def test_two_processes_index_as_one_does_and_as_the_model_says(search, model_folder, oracle, clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    write_shard(folder / "a.tar", {path.name: path for path in (clips / "sub").iterdir()})
    common = ("--model", model_folder, "--clip-seconds", 2)
    text = assert_finished(launch("search_videos.py", 2, "index", folder, tmp_path / "2", *common, "--num-workers", 2))
    assert text.count("embedded 13 clips of 11 videos, kept 0, changed 0, removed 0, broken 1") == 1
    assert text.count(f"broken: {folder / 'bad.mp4'}: not a video") == 1 and "videos of this process" in text
    search("index", folder, tmp_path / "1", *common, "--num-workers", 0, "--batch-size", 3)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one.keys() == two.keys() and len(one) == 13
    assert [start for path, start in one if path == "long.mp4"] == [0.0, 2.0, 4.0]
    for key, row in one.items():
        np.testing.assert_allclose(row["embedding"], two[key]["embedding"], atol=1e-5)
        path = folder / row["path"].replace("a.tar::", "sub/")
        found = (folder / row["path"].split("::")[0]).stat()
        assert (row["size"], row["mtime"]) == (found.st_size, found.st_mtime_ns)
        expected = oracle.frame_embeds(oracle.pixels(path, *window_of(row))).mean(1)[0]
        np.testing.assert_allclose(row["embedding"], expected, atol=1e-5)
        np.testing.assert_allclose(row["direction"], F.normalize(expected, dim=0), atol=1e-5)
    assert files_of(tmp_path / "2") == {"current", "lock", "settings.json", "table-*"}


@pytest.mark.parametrize(
    ("duration", "clip_seconds"), [(6.0, 2), (6.1, 2), (0.5, 2), (7.3, 0.7), (3600.0, 10), (30.03, 10)]
)
def test_windows_cover_a_video(duration, clip_seconds):
    found = cut_video(Source("x.mp4", 1, 2), duration, clip_seconds)
    assert found[0].start == 0 and found[-1].end == duration
    assert all(one.end == other.start for one, other in pairwise(found))
    lengths = [window.end - window.start for window in found]
    assert max(lengths) <= 1.01 * clip_seconds and max(lengths) - min(lengths) < 1e-9
    assert {window.windows for window in found} == {len(found)}
    assert len(found) == 1 or duration / (len(found) - 1) > clip_seconds
    assert duration != 30.03 or len(found) == 3  # 900 frames at 29.97 a second


def test_only_what_is_new_or_changed_is_embedded(search, model_folder, collection):
    folder, out = collection
    before = rows(out)
    index = partial(search, "index", folder, out, "--model", model_folder, *OPTIONS)
    assert counts(index()) == [0, 0, 8, 0, 0, 1] and search.embedded == 0
    for seed in (10, 11, 12):
        write_mp4(folder / f"{seed}.MP4", draw(seed))
    write_mp4(folder / "0.mp4", draw(20))
    (folder / "sub" / "1.mp4").unlink()
    assert counts(index()) == [4, 4, 6, 1, 1, 1] and search.embedded == 4
    after = rows(out)
    assert after.keys() - before.keys() == {(f"{seed}.MP4", 0.0) for seed in (10, 11, 12)}
    assert before.keys() - after.keys() == {("sub/1.mp4", 0.0)}
    for key in before.keys() & after.keys():
        same = np.array_equal(before[key]["embedding"], after[key]["embedding"])
        assert same == (key[0] != "0.mp4")
    (folder / "2.mp4").write_text("no longer a video")
    os.utime(folder / "4.mp4", ns=(0, 0))
    assert counts(index()) == [1, 1, 8, 2, 0, 2] and search.embedded == 1
    assert ("2.mp4", 0.0) not in rows(out)


def test_a_killed_run_goes_on_with_what_is_missing(search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "many", tmp_path / "index"
    folder.mkdir()
    for number in range(40):
        shutil.copy(clips / "long.mp4", folder / f"{number:03}.mp4")
    command = ("index", folder, out, "--model", model_folder, *OPTIONS)
    process = start(sys.executable, SCRIPTS / "search_videos.py", *command, "--batch-size", 1)
    parts = out / "parts"
    wait_until(lambda: len(list(parts.glob("*.safetensors"))) > 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    places = Collection(out).parts.places()
    assert 10 < len(places) < 120 and not Collection(out).current.exists()
    kept = {tuple(json.loads(key)[i] for i in (0, 3)): place for key, place in places.items()}
    saved = {key: Collection(out).parts.read([place], "embedding")[0] for key, place in kept.items()}
    whole = sum((f"{number:03}.mp4", 4.0) in kept for number in range(40))
    assert counts(search(*command)) == [120 - len(places), 40 - whole, whole, 0, 0, 0]
    assert search.embedded == 120 - len(places)
    after = rows(out)
    assert len(after) == 120
    assert all(np.array_equal(after[key]["embedding"], embedding) for key, embedding in saved.items())


def test_a_kill_while_a_table_is_written_harms_nothing(search, model_folder, collection):
    folder, out = collection
    before = Collection(out).table_folder()
    (out / f"table-{'0' * 32}").mkdir()
    (out / "table-notes").mkdir()  # somebody's
    (out / "current.writing").write_text("table-unf")
    assert len(ask(search, out, TEXT, "--rerank", 0)["hits"]) == 10
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [0, 0, 8]
    assert Collection(out).table_folder() == before
    write_mp4(folder / "more.mp4", draw(30))
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [1, 1, 8]
    assert files_of(out) == {"current", "lock", "settings.json", "table-*"}
    assert {path.name for path in out.glob("table-*")} == {Collection(out).table_folder().name, "table-notes"}


def test_two_runs_do_not_write_one_index(exit_of, model_folder, clips, tmp_path):
    out = tmp_path / "index"
    with Collection(out).lock():
        message = exit_of(search_videos, "index", clips, out, "--model", model_folder, *OPTIONS)
    assert message == f"error: another run is writing {out}: wait for its end"
    assert files_of(out) == {"lock"}


def test_folders_are_walked_as_they_are_linked(search, exit_of, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(clips / "0.mp4", folder / "deep")
    (folder / "linked").symlink_to(clips / "sub")
    (folder / "deep" / "circle").symlink_to(folder)
    (folder / "deep" / "again").symlink_to(folder / "linked")
    (folder / "early").symlink_to(folder / "deep")  # the folder itself goes before
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [4, 4, 0]
    sub = "deep/again"  # which comes first
    assert {path for path, _ in rows(out)} == {"deep/0.mp4", f"{sub}/1.mp4", f"{sub}/3.mp4", f"{sub}/5.mp4"}


def test_a_folder_that_cannot_be_read_is_no_empty_one(exit_of, model_folder, clips, tmp_path, monkeypatch):
    def fails(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", fails)
    message = exit_of(search_videos, "index", clips, tmp_path / "index", "--model", model_folder, *OPTIONS)
    assert message == f"error: [Errno 13] Permission denied: '{clips / 'sub'}'"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_text_are_reported(search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    shutil.copy(clips / "0.mp4", folder)
    shutil.copy(clips / "2.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    write_shard(folder / "a.tar", {"na\udce9ve.mp4": clips / "4.mp4", "6.mp4": clips / "6.mp4"})
    shutil.copy(folder / "a.tar", os.fsencode(folder) + b"/\xe9.tar")
    text = search("index", folder, out, "--model", model_folder, *OPTIONS)
    assert counts(text) == [2, 2, 0, 0, 0, 4]
    for name in ("caf\\xe9.mp4", "a.tar::na\\xe9ve.mp4", "\\xe9.tar::6.mp4", "\\xe9.tar::na\\xe9ve.mp4"):
        assert f"broken: {name}: its name is not UTF-8, rename it" in text.splitlines()


def test_a_first_run_that_did_nothing_leaves_no_settings(exit_of, search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    shutil.copy(clips / "bad.mp4", folder)
    index = ("index", folder, out, "--model", model_folder, "--num-workers", 0, "--clip-seconds")
    assert exit_of(search_videos, *index, 3) == "error: no video could be read"
    shutil.copy(clips / "0.mp4", folder)
    assert counts(search(*index, 2)) == [1, 1, 0, 0, 0, 1]


def test_windows_beside_a_damaged_one_are_kept(search, model_folder, clips, tmp_path, monkeypatch):
    out, pixels = tmp_path / "index", windows_module.window_pixels
    index = partial(search, "index", clips, out, "--model", model_folder, *OPTIONS)

    def damaged(reader, begin, end, processor):
        if begin == 2.0:
            raise BrokenVideoError(reader.name, "damaged: frame 16 of 48 can't be decoded")
        return pixels(reader, begin, end, processor)

    with monkeypatch.context() as patch:
        patch.setattr(windows_module, "window_pixels", damaged)
        text = index()
    assert counts(text) == [9, 8, 0, 0, 0, 2] and f"broken: {clips / 'long.mp4'}: damaged: frame 16" in text
    assert [start for path, start in rows(out) if path == "long.mp4"] == [0.0, 4.0]
    assert counts(index()) == [1, 1, 7, 0, 0, 1] and search.embedded == 1
    assert [start for path, start in rows(out) if path == "long.mp4"] == [0.0, 2.0, 4.0]


def test_a_broken_video_may_stop_the_run(search, exit_of, model_folder, clips, tmp_path):
    out = tmp_path / "index"
    command = ("index", clips, out, "--model", model_folder, *OPTIONS, "--batch-size", 1)
    message = exit_of(search_videos, *command, "--on-broken-video", "raise")
    assert message.startswith(f"error: {clips / 'bad.mp4'}: not a video")
    done = len(Collection(out).parts.places())
    assert 0 < done < 10  # sorted by name, it comes in between
    assert counts(search(*command))[0] == 10 - done


# Shards


def write_shard(path, videos):
    with tarfile.open(path, "w") as archive:
        for name, video in videos.items():
            for member, data in ((name, video.read_bytes()), (f"{name}.txt", b"a text")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def truncate(path, member, more):
    """So many bytes after the beginning of the header of a member."""
    with tarfile.open(path) as archive:
        size = archive.getmembers()[member].offset + more
    path.write_bytes(path.read_bytes()[:size])


@pytest.fixture
def shards(clips, tmp_path):
    """Five videos in two shards, one of these broken, and a shard of which a part is missing."""
    folder = tmp_path / "shards"
    folder.mkdir()
    a = {"x/0.mp4": clips / "0.mp4", "x/2.MP4": clips / "2.mp4", "bad.mp4": clips / "bad.mp4"}
    c = {"4.mp4": clips / "4.mp4", "6.mp4": clips / "6.mp4"}
    for name, videos in (("a", a), ("b", {"long.mp4": clips / "long.mp4"}), ("c", c)):
        write_shard(folder / f"{name}.tar", videos)
    truncate(folder / "c.tar", 2, 600)
    return folder


def test_videos_in_shards(search, model_folder, oracle, clips, shards, tmp_path):
    out = tmp_path / "index"
    index = partial(search, "index", shards, out, "--model", model_folder, *OPTIONS)
    text = index()
    assert counts(text) == [6, 4, 0, 0, 0, 2]
    assert f"broken: {shards / 'a.tar'}::bad.mp4: not a video" in text and f"broken: {shards / 'c.tar'}: " in text
    found = rows(out)
    names = {
        "a.tar::x/0.mp4": "0.mp4",
        "a.tar::x/2.MP4": "2.mp4",
        "b.tar::long.mp4": "long.mp4",
        "c.tar::4.mp4": "4.mp4",
    }
    assert {path for path, _ in found} == names.keys()
    for row in found.values():
        pixels = oracle.pixels(clips / names[row["path"]], *window_of(row))
        np.testing.assert_allclose(row["embedding"], oracle.frame_embeds(pixels).mean(1)[0], atol=1e-5)
    for hit in ask(search, out, TEXT)["hits"]:
        pixels = oracle.pixels(clips / names[hit["path"]], *window_of(hit))
        assert hit["match"] == pytest.approx(oracle.match(pixels), abs=1e-4)

    assert counts(index()) == [0, 0, 4, 0, 0, 2] and search.embedded == 0
    write_shard(shards / "a.tar", {"x/0.mp4": clips / "0.mp4"})
    (shards / "c.tar").unlink()
    assert counts(index()) == [1, 1, 1, 1, 2, 0]


class Quiet(SimpleHTTPRequestHandler):
    """A server that knows no ranges."""

    def log_message(self, *_):
        pass


class Failing(Quiet):
    """It ends in the middle of c.tar."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[: -2000 if self.path == "/c.tar" else None])


@contextmanager
def served(folder, handler=Quiet):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_shards_at_an_address(search, model_folder, clips, shards, tmp_path):
    out = tmp_path / "index"
    large = io.BytesIO(bytes(12 << 20))  # more than is read ahead
    with tarfile.open(shards / "a.tar", "a") as archive:
        info = tarfile.TarInfo("large.bin")
        info.size = len(large.getvalue())
        archive.addfile(info, large)
        archive.add(clips / "4.mp4", "last.mp4")
    with served(shards) as address:
        text = search("index", f"{address}/a.tar", f"{address}/b.tar", out, "--model", model_folder, *OPTIONS)
        assert counts(text) == [6, 4, 0, 0, 0, 1]
        table = load_from_disk(str(Collection(out).table_folder()))
        assert set(table["size"]) == {(shards / name).stat().st_size for name in ("a.tar", "b.tar")}
        found = ask(search, out, TEXT)
    assert len(found["hits"]) == 6 and all(hit["match"] is not None for hit in found["hits"])
    assert {hit["path"] for hit in found["hits"]} == {
        f"{address}/a.tar::x/0.mp4",
        f"{address}/a.tar::x/2.MP4",
        f"{address}/a.tar::last.mp4",
        f"{address}/b.tar::long.mp4",
    }
    gone = ask(search, out, TEXT)
    assert gone["hits"] == [] and len(gone["left_out"]) == 2  # of shards, each tried once
    assert all(any(f"{address}/{name}.tar: " in reason for reason in gone["left_out"]) for name in "ab")


def test_a_shard_at_an_address_that_changed_or_went_is_noticed(search, exit_of, model_folder, clips, shards, tmp_path):
    with served(shards) as address:
        names = [f"{address}/{name}.tar" for name in "ab"]
        command = ("index", *names, tmp_path, "--model", model_folder, *OPTIONS)
        assert counts(search(*command)) == [5, 3, 0, 0, 0, 1]
        assert counts(search(*command)) == [0, 0, 3, 0, 0, 1] and search.embedded == 0
        before = (shards / "a.tar").stat()
        write_shard(shards / "a.tar", {"x/0.mp4": clips / "0.mp4"})
        os.utime(shards / "a.tar", ns=(0, before.st_mtime_ns + 10**10))
        (shards / "b.tar").rename(shards / "b.bak")
        found = ask(search, tmp_path, TEXT, "--rerank", 0)
        told = [f"{names[0]}: changed since it was indexed", f"{names[1]}: removed since it was indexed"]
        assert found["hits"] == [] and sorted(found["left_out"]) == told
        assert counts(search(*command)) == [1, 1, 0, 2, 1, 1]
    message = exit_of(search_videos, *command)
    assert message.startswith(f"error: {names[0]}: can't be reached: ")
    assert len(rows(tmp_path)) == 1  # nothing is dropped for that


def test_a_shard_at_an_address_that_breaks_off_is_broken(search, model_folder, clips, shards, tmp_path):
    with served(shards, Failing) as address:
        addresses = [f"{address}/{name}.tar" for name in ("b", "c", "none")]
        text = search("index", *addresses, tmp_path, "--model", model_folder, *OPTIONS)
    assert counts(text)[5] == 2 and all(f"broken: {address}: " in text for address in addresses[1:])


def test_a_shard_at_an_address_may_take_its_time(shards, monkeypatch):
    """The model works between reads, on what has come."""
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    with tarfile.open(shards / "large.tar", "w") as archive:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.mp4")
            info.size = 4 << 20
            archive.addfile(info, io.BytesIO(bytes(4 << 20)))
    with served(shards) as address:
        found = []
        for row in read_videos([Source(f"{address}/large.tar", None, None)], "", frozenset(), Share(0, 1)):
            found.append(row.error)
            time.sleep(0.3)
    assert found == [None] * 4


def paths_read(files, root, share):
    return [row.video.path for row in read_videos(files, str(root), frozenset(), share) if row.error is None]


@pytest.mark.parametrize("names", [["a.tar"], ["a.tar", "b.tar"], ["a.tar", "b.tar", "c.tar", "0.mp4"]])
@given(readers=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=9)
def test_each_video_goes_to_one_reader(shards, clips, names, readers):
    shutil.copy(clips / "0.mp4", shards)
    files = [file for file in find_files([str(shards)]) if file.path in names]
    whole = paths_read(files, shards, Share(0, 1))
    found = [paths_read(files, shards, Share(reader, readers)) for reader in range(readers)]
    assert sorted(chain.from_iterable(found)) == sorted(whole) and len(whole) >= 3


def test_what_one_reader_cannot_read_is_not_lost(shards, monkeypatch):
    """With its first read failing the others have what they have anyway, and a later run finds the rest."""
    files = [file for file in find_files([str(shards)]) if file.path == "a.tar"]
    whole = paths_read(files, shards, Share(0, 1))
    shares = [Share(reader, 2) for reader in range(2)]
    failing = next(share for share in shares if paths_read(files, shards, share))
    found = {}
    for share in shares:
        with monkeypatch.context() as patch:
            if share == failing:
                read = mock.Mock(side_effect=OSError("the network is gone"))
                patch.setattr(windows_module, "_read_member", read)
            found[share] = list(read_videos(files, str(shards), frozenset(), share))
    assert [row.error for row in found[failing]] == [f"{shards / 'a.tar'}: OSError: the network is gone"]
    done = frozenset(row.video for rows in found.values() for row in rows if row.error is None)
    later = [row.video for share in shares for row in read_videos(files, str(shards), done, share)]
    assert sorted(video.path for video in [*done, *later]) == sorted(whole) and not done & set(later)


def test_workers_share_what_a_process_has(model_folder, shards, clips):
    shutil.copytree(clips / "sub", shards / "sub")
    files = find_files([str(shards)])
    processor = VideoMambaProcessor.from_pretrained(model_folder).video_processor

    def names(share, num_workers):
        windows = Windows(files, str(shards), processor, 2.0, set(), share)
        return [name for batch in iterate(windows, num_workers, batch_size=2) for name in batch["names"] if name]

    whole = names(Share(0, 1), 0)
    assert sorted(names(Share(0, 2), 2) + names(Share(1, 2), 2)) == sorted(whole) and len(whole) == 9


def test_a_second_video_of_one_name_is_reported(search, model_folder, shards, clips, tmp_path):
    for path in shards.glob("[bc].tar"):
        path.unlink()
    with tarfile.open(shards / "a.tar", "a") as archive:
        archive.add(clips / "4.mp4", "x/0.mp4")
    text = search("index", shards, tmp_path, "--model", model_folder, *OPTIONS)
    assert counts(text) == [2, 2, 0, 0, 0, 2]
    assert f"broken: {shards / 'a.tar'}::x/0.mp4: another video of the shard has this name" in text


def test_videos_of_a_shard_that_changed_and_broke_are_changed(search, model_folder, shards, tmp_path):
    index = partial(search, "index", shards, tmp_path, "--model", model_folder, *OPTIONS)
    index()
    truncate(shards / "b.tar", 0, 100)
    assert counts(index()) == [0, 0, 3, 1, 0, 3]


def test_a_damaged_header_is_no_end(shards, clips):
    write_shard(shards / "c.tar", {"4.mp4": clips / "4.mp4", "6.mp4": clips / "6.mp4"})
    with tarfile.open(shards / "c.tar") as archive:
        offset = archive.getmembers()[2].offset
    content = bytearray((shards / "c.tar").read_bytes())
    content[offset + 3] ^= 1
    (shards / "c.tar").write_bytes(content)
    first, error = read_videos(find_files([str(shards / "c.tar")]), "", frozenset(), Share(0, 1))
    assert first.video.path.endswith("4.mp4") and "c.tar: damaged or truncated: bad checksum" in error.error


def test_what_an_index_cannot_name_or_read_is_told(search, model_folder, shards, clips, tmp_path):
    for path in shards.glob("*.tar"):
        path.unlink()
    shutil.copy(clips / "0.mp4", shards / "odd.tar::0.mp4")
    (shards / "x::y").mkdir()
    with tarfile.open(shards / "x::y" / "a.tar", "w") as archive:
        archive.add(clips / "0.mp4", "0.mp4")
        info = tarfile.TarInfo("again.mp4")
        info.type, info.linkname = tarfile.LNKTYPE, "0.mp4"
        archive.addfile(info)
    text = search("index", shards, tmp_path, "--model", model_folder, *OPTIONS)
    assert counts(text) == [1, 1, 0, 0, 0, 2] and "again.mp4: is a link or no file" in text
    assert "odd.tar::0.mp4: is named as a video in a shard is" in text
    assert paths(ask(search, tmp_path, TEXT)["hits"]) == ["x::y/a.tar::0.mp4"]


@pytest.mark.parametrize(("member", "more", "whole"), [(2, 600, 1), (2, 100, 1), (3, 1024, 2)])
def test_a_truncated_shard_is_noticed_wherever_it_is_cut(shards, clips, member, more, whole):
    """Within a member, within its header, and after the last one."""
    write_shard(shards / "c.tar", {"4.mp4": clips / "4.mp4", "6.mp4": clips / "6.mp4"})
    truncate(shards / "c.tar", member, more)
    (file,) = find_files([str(shards / "c.tar")])
    found = list(read_videos([file], "", frozenset(), Share(0, 1)))
    assert found[-1].error.startswith(f"{shards / 'c.tar'}: ")
    assert [row.video.path.split("::")[1] for row in found[:-1]] == ["4.mp4", "6.mp4"][:whole]


# Searching


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


def test_wrong_runs_are_explained(exit_of, model_folder, clips, tmp_path):
    empty, out, other = tmp_path / "empty", tmp_path / "index", tmp_path / "other"
    empty.mkdir()
    VideoMambaModel(tiny_config()).save_pretrained(other)
    fails = partial(exit_of, search_videos)
    assert fails("query", out, TEXT) == f"error: {out} has no finished index"
    index = ("--model", model_folder, *OPTIONS)
    assert f"{empty}: there is no video" in fails("index", empty, out, *index)
    assert "nowhere: must be one folder, or shards" in fails("index", "nowhere", out, *index)
    assert "no.tar: no such shard" in fails("index", "no.tar", out, *index)
    assert "must be a model of videos and texts" in fails("index", clips, out, "--model", other)
    assert "error: the model nowhere can't be loaded" in fails("index", clips, out, "--model", "nowhere")
    for option, value in (("--clip-seconds", 0), ("--clip-seconds", "nan"), ("--batch-size", 0), ("--num-workers", -1)):
        assert f"{option} must" in fails("index", clips, out, *index, option, value)
    assert not out.exists()
    (empty / "bad.mp4").write_text("no video")
    assert fails("index", empty, out, *index) == "error: no video could be read"


def test_another_model_or_other_settings_are_not_mixed(exit_of, search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "index"
    shutil.copytree(model_folder, folder)
    search("index", clips, out, "--model", folder, *OPTIONS)
    fails = partial(exit_of, search_videos)
    message = fails("index", clips, out, "--model", folder, "--clip-seconds", 3)
    assert message == f"error: {out} is an index of another run, with other settings: clip_seconds 2.0 -> 3.0"
    model = VideoMambaForVideoTextRetrieval.from_pretrained(folder)
    with torch.no_grad():
        model.matching_head.bias.add_(1e-3)
    model.save_pretrained(folder)
    assert "other settings: weights" in fails("index", clips, out, "--model", folder, *OPTIONS)
    assert f"{folder} has other weights" in fails("query", out, TEXT)
    shutil.rmtree(folder)
    assert f"error: the model {folder} can't be loaded" in fails("query", out, TEXT)


def test_another_version_of_transformers_is_no_other_model(search, model_folder, clips, tmp_path, monkeypatch):
    search("index", clips, tmp_path, "--model", model_folder, *OPTIONS)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9.9")
    assert len(ask(search, tmp_path, TEXT)["hits"]) == 10


def test_what_is_missing_is_named_with_how_to_install_it(exit_of, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = exit_of(search_videos, "query", tmp_path, TEXT)
    assert message == 'error: searching needs FAISS: `pip install "modeling-videomamba[search]"`'
