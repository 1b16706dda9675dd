"""search_videos.py with videos in shards, in folders and at addresses."""

import io
import os
import shutil
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from unittest import mock

import aiohttp
import numpy as np
import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import search_videos
from modeling_videomamba import VideoMambaProcessor
from modeling_videomamba.training import windows as windows_module
from modeling_videomamba.training.collection import Collection
from modeling_videomamba.training.frame_indexes import FrameIndexes
from modeling_videomamba.training.windows import Share, Source, Windows, find_files, read_videos
from modeling_videomamba.training.workers import iterate
from tests.search.helpers import OPTIONS, TEXT, ask, counts, paths, rows, window_of, write_shard


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


def test_workers_share_what_a_process_has(model_folder, shards, clips, tmp_path):
    shutil.copytree(clips / "sub", shards / "sub")
    files = find_files([str(shards)])
    processor = VideoMambaProcessor.from_pretrained(model_folder).video_processor

    def names(share, num_workers):
        windows = Windows(files, str(shards), processor, 2.0, set(), FrameIndexes(tmp_path / "frames"), share)
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


@pytest.mark.parametrize("other", ["a.tar", "./a.tar", "link/a.tar"])
def test_a_shard_given_twice_is_refused(shards, other, monkeypatch):
    (shards / "link").symlink_to(shards)
    monkeypatch.chdir(shards)
    with pytest.raises(ValueError, match=r"^a shard is given twice: .*a\.tar$"):
        find_files([str(shards / "a.tar"), other])
