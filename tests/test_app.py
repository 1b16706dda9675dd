"""app.py: its page in a real browser. And make_space.py: the Space that shows it."""

import io
import json
import os
import re
import shutil
import socket
import sys
import threading
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import av
import gradio
import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app
import make_space
import page as page_module
import space as space_module
from modeling_videomamba import VideoMambaModel, VideoMambaVideoProcessor
from modeling_videomamba.training import windows
from modeling_videomamba.training.search import load_search
from modeling_videomamba.training.windows import VideoWindow
from tests.conftest import NANO, NANO_VIDEO_TEXT, ROOT, write_video
from tests.launching import ENVIRONMENT, SCRIPTS, assert_finished, run, start, wait_until, write_broken_videos
from tests.models import build

TURNED = Path(__file__).parent / "data" / "turned.mp4"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
# it runs as root in containers, makes no requests of its own, and takes a test picture for the camera
BROWSER_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MARKUP = "<img src=x onerror=alert(1)> ${1+1} {{2}} &amp; é.mp4"
NUM_CLIPS = 6

expect.set_options(timeout=30_000)


def is_listening(host, port):
    with socket.socket() as connection:
        return connection.connect_ex((host, port)) == 0


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def served(*command, host="127.0.0.1", port, environment, folder):
    """The address of a page while the command that serves it runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setitem(ENVIRONMENT, name, str(value))
        patch.chdir(folder)
        process = start(*command)
    try:
        wait_until(lambda: is_listening(host, port), process)
        yield f"http://{host}:{port}/"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of clips of moving digits, and their captions by path."""
    folder = tmp_path_factory.mktemp("clips")
    options = ("--captions", "--train-clips", 0, "--test-clips", NUM_CLIPS)
    assert_finished(run(sys.executable, SCRIPTS / "make_moving_digits.py", folder, *options))
    rows = map(json.loads, (folder / "test.jsonl").read_text("utf-8").splitlines())
    return folder, {row["path"]: row["caption"] for row in rows}


@pytest.fixture(scope="module")
def index(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("index")
    options = ("--model", NANO_VIDEO_TEXT, "--num-workers", 0)
    assert_finished(run(sys.executable, SCRIPTS / "search_videos.py", "index", clips[0], out, *options))
    return out


@pytest.fixture(scope="module")
def address(index, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    command = (sys.executable, SCRIPTS / "app.py", "--index", index, "--port", port)
    with served(*command, port=port, environment={"GRADIO_TEMP_DIR": folder / "files"}, folder=folder) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, which makes no request to another host and has no error in the console."""
    context = browser.new_context(viewport=DESKTOP, permissions=["camera", "microphone"])
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(button(page, "Classify")).to_be_visible()
    yield page
    context.close()
    hosts = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc} and not errors


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def upload(page, path):
    page.locator("#video input[type=file]").set_input_files(path)


def classify(page, path):
    upload(page, path)
    expect(page.locator("#video video")).to_be_attached()
    button(page, "Classify").click()


def search(page, text):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What the videos show").fill(text)
    page.get_by_label("What the videos show").press("Enter")


def sizes_of_images(page, place):
    return page.locator(f"{place} img").evaluate_all("images => images.map(image => image.naturalWidth)")


def assert_example_is_classified(page, name):
    expect(page.locator("#labels h2")).to_have_text("up-right")
    expect(page.locator("#labels")).to_contain_text("100%")
    details = page.locator("#details")
    expect(details).to_contain_text(f"{name}: 16 frames, 8 a second, 2.0 s, 64 x 64 pixels")
    expect(details).to_contain_text(re.compile(r"Reading and preparing [1-9]\d* ms, model \d+ ms"))
    assert sizes_of_images(page, "#details") == [32] * 16
    expect(page.get_by_role("alert")).to_have_count(0)


def width_of_content(page):
    return page.evaluate("document.scrollingElement.scrollWidth")


# The page: labels


@needs_browser
def test_the_example_is_classified(page):
    page.locator(".gallery-item").click()
    expect(page.locator("#video video")).to_be_attached()
    button(page, "Classify").click()
    assert_example_is_classified(page, "example.mp4")


@needs_browser
def test_an_uploaded_video_is_classified_and_its_name_is_shown_as_it_is(page, tmp_path):
    shutil.copyfile(NANO / "example.mp4", tmp_path / MARKUP)
    classify(page, tmp_path / MARKUP)
    assert_example_is_classified(page, MARKUP)


@needs_browser
def test_a_recording_is_classified(page):
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#video video')?.readyState > 2")  # the camera gives frames
    record = page.locator("#video .capture-button")
    record.click()
    page.wait_for_timeout(5000)  # on a busy machine a browser has nothing to record for some seconds
    record.click()
    expect(page.get_by_label("Clear")).to_have_count(1)  # the page has two while the recording is uploaded
    button(page, "Classify").click()
    expect(page.locator("#details")).to_contain_text(re.compile(r"\.webm: \d+ frames, [\d.]+ a second, [3-9]\.\d s, "))
    assert len(sizes_of_images(page, "#details")) == 16


@needs_browser
def test_what_is_no_video_is_told(page, tmp_path):
    names = write_broken_videos(tmp_path, NANO / "example.mp4")
    shutil.copyfile(tmp_path / "text.mp4", tmp_path / MARKUP)
    for name in (*names, MARKUP):
        if (tmp_path / name).stat().st_size == 0:
            continue  # which a browser doesn't send
        classify(page, tmp_path / name)
        expect(page.get_by_role("alert")).to_contain_text(f"{name}: ")
        said = page.get_by_role("alert").inner_text()
        assert re.search(": (not a video, or truncated|truncated|it has no video stream)", said)
        assert str(tmp_path) not in page.content() and "Traceback" not in page.content()
        page.reload()
    classify(page, NANO / "example.mp4")
    assert_example_is_classified(page, "example.mp4")


@needs_browser
def test_what_is_beyond_the_limits_is_told(page, tmp_path):
    write_video(tmp_path / "long.mp4", np.zeros((7200, 16, 16, 3), np.uint8), "mpeg4")
    write_video(tmp_path / "wide.mp4", np.zeros((2, 16, 5000, 3), np.uint8), "mpeg4")
    expect(page.locator("body")).to_contain_text(page_module.LIMITS)
    for name, reason in (("long", "too long, 12:00"), ("wide", "too large, 5000 x 16 pixels")):
        classify(page, tmp_path / f"{name}.mp4")
        expect(page.get_by_role("alert")).to_have_text(f"{name}.mp4: {reason}. {page_module.LIMITS}")
        assert page.locator("#labels h2").count() == 0 and sizes_of_images(page, "#details") == []
        page.reload()


@needs_browser
def test_what_need_not_be_uploaded_is_refused_before(page, tmp_path):
    os.truncate(sparse_file(tmp_path / "large.mp4"), 201 * 2**20)
    (tmp_path / "notes.txt").write_text("no video")
    upload(page, tmp_path / "large.mp4")
    expect(page.locator("body")).to_contain_text('exceed the maximum allowed size of 200.0 Mb: "large.mp4"')
    page.reload()
    upload(page, tmp_path / "notes.txt")
    expect(page.locator("body")).to_contain_text("Invalid file type: notes.txt. Only")
    button(page, "Classify").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no video: upload or record one")
    assert page.locator("#video video").count() == 0 and page.locator("#labels h2").count() == 0


def sparse_file(path):
    path.touch()
    return path


# The page: search


@needs_browser
def test_a_text_finds_its_clip(page, clips):
    for path, caption in list(clips[1].items())[:2]:
        search(page, caption)
        hits = page.locator("#hits figure")
        expect(hits.first).to_contain_text(re.compile(rf"{path} 0:00.0:02, similarity 0\.\d+, match 0\.[5-9]\d*"))
        assert hits.count() == NUM_CLIPS and sizes_of_images(page, "#hits") == [32] * 8 * NUM_CLIPS
        expect(page.locator("#hits")).to_contain_text(re.compile(rf"{NUM_CLIPS} clips searched in \d+ ms"))
    page.locator("#choice input").first.check()
    player = page.locator("#player video")
    expect(player).to_be_visible()
    page.wait_for_function("document.querySelector('#player video').readyState >= 2")
    assert player.evaluate("video => [video.videoWidth, video.videoHeight, video.duration]") == [64, 64, 2]
    search(page, "a horse jumps over a fence in the rain")
    expect(page.get_by_role("alert")).to_contain_text("Nothing fits well: the best match has a probability of 0.")
    expect(player).to_have_count(0)
    search(page, " ")
    expect(page.get_by_role("alert")).to_have_text("the text is empty")
    expect(page.locator("#choice")).to_have_count(0)


@needs_browser
def test_on_a_phone_nothing_is_wider_than_the_screen(page, clips, tmp_path):
    page.set_viewport_size(PHONE)
    shutil.copyfile(NANO / "example.mp4", tmp_path / f"{'long' * 40}.mp4")
    classify(page, tmp_path / f"{'long' * 40}.mp4")
    expect(page.locator("#details img")).to_have_count(16)
    video, labels = (page.locator(place).bounding_box() for place in ("#video", "#labels"))
    assert labels["y"] > video["y"] + video["height"] and labels["x"] == video["x"]
    assert width_of_content(page) <= PHONE["width"]
    search(page, next(iter(clips[1].values())))
    expect(page.locator("#hits img")).to_have_count(8 * NUM_CLIPS)
    assert width_of_content(page) <= PHONE["width"]


# Without a browser


def post(url, content, kind):
    with urlopen(Request(url, content, {"Content-Type": kind})) as response:
        return json.load(response)


def upload_by_api(address, path):
    """Its path on the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'.encode()
    return post(
        f"{address}gradio_api/upload", head + path.read_bytes() + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
    )[0]


def classify_by_api(address, path, name="x.mp4"):
    """The events that the server answers with."""
    file = {"path": str(path), "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    call = f"{address}gradio_api/call/classify"
    event = post(call, json.dumps({"data": [file]}).encode(), "application/json")["event_id"]
    with urlopen(f"{call}/{event}", timeout=60) as response:
        return response.read().decode()


def test_only_what_was_uploaded_is_opened(address, tmp_path):
    """Whoever calls the page by its API can't look at other files of the server, or have it download any."""
    answer = classify_by_api(address, upload_by_api(address, NANO / "example.mp4"))
    assert answer.startswith("event: complete") and "up-right" in answer
    shutil.copyfile(NANO / "example.mp4", tmp_path / "private.mp4")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Recording, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.requests = []
        web = f"http://127.0.0.1:{server.server_port}/private.mp4"
        for path in (tmp_path / "private.mp4", "/etc/passwd", web):
            answer = classify_by_api(address, path)
            assert answer.startswith("event: error") and "up-right" not in answer and "not a video" not in answer
        server.shutdown()
    assert server.requests == []


class Recording(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.requests.append(self.path)


PLAYLISTS = {
    "x.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nx.m3u8\n",  # itself, without an end
    "live.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n",  # one that may go on
    "list.mp4": "ffconcat version 1.0\nfile list.mp4\n",
    "d.mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>d.mpd</BaseURL></Period></MPD>',
}


def test_playlists_do_not_occupy_the_page(address, tmp_path):
    for name, text in PLAYLISTS.items():
        (tmp_path / name).write_text(text)
        answer = classify_by_api(address, upload_by_api(address, tmp_path / name), name)
        assert answer.startswith("event: complete") and f"{name}: not a video" in answer


def test_what_a_run_leaves_is_named_by_the_run(tmp_path):
    (tmp_path / "digits" / "best").mkdir(parents=True)
    assert page_module.shown_name(str(tmp_path / "digits" / "best")) == "digits/best"
    assert [page_module.shown_name(name) for name in (str(NANO), "org/my-model")] == ["videomamba-nano", "my-model"]


def test_a_hit_whose_file_is_gone_is_told(clips, index, tmp_path):
    search, _, _ = load_search(index, "embedding")
    search.root = str(tmp_path)
    name = search.rows[0]["path"]
    window = VideoWindow(**search.rows[0])
    with pytest.raises(gradio.Error, match=f"{name}: no such video file"):
        next(page_module.play(search, [window], 0))


def test_a_text_without_end_is_not_read(index):
    model_and_more = load_search(index, "embedding")
    answer, hits = page_module.search_videos(*model_and_more, "word " * 10**6)
    assert not hits and answer == page_module.show_message("The text has 5,000,000 characters, at most 1,000 are read.")


def test_files_that_are_too_large_are_not_opened(tmp_path):
    os.truncate(sparse_file(tmp_path / "a.mp4"), 201 * 2**20)
    processor = VideoMambaVideoProcessor.from_pretrained(NANO)
    with pytest.raises(ValueError, match=re.escape(f"mine.mp4: too large, 201 MB. {page_module.LIMITS}")):
        page_module.read_video("mine.mp4", tmp_path / "a.mp4", processor)


def write_pictures(path, sizes):
    """A video that states the first of these sizes, and has a frame of each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "rgb24"
        container.start_encoding()
        for number, size in enumerate(sizes):
            data = io.BytesIO()
            Image.new("RGB", size).save(data, "PNG")
            packet = av.Packet(data.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 8), stream, True
            container.mux(packet)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(5000, 64)] * 16, "mine.mov: too large, 5000 x 64 pixels."),
        ([(64, 64)] * 8 + [(64, 80)] * 8, "mine.mov: its frames have several sizes: [(64, 64), (80, 64)]"),
        ([(64, 64)] * 8 + [(4200, 4200)] * 8, "mine.mov: damaged: frame 8 of 16 can't be decoded"),
        ([(4000, 15)] * 16, "mine.mov: too small, 4000 x 15 pixels."),
    ],
)
def test_frames_are_measured_themselves(tmp_path, sizes, message):
    write_pictures(tmp_path / "a.mov", sizes)
    processor = VideoMambaVideoProcessor.from_pretrained(NANO)
    with pytest.raises(ValueError, match=re.escape(message)):
        page_module.read_video("mine.mov", tmp_path / "a.mov", processor)


@pytest.mark.parametrize("suffix", ["mp4", "h264"])
def test_what_takes_too_long_is_told(tmp_path, monkeypatch, suffix):
    """With and without times in the file."""
    write_video(tmp_path / f"a.{suffix}", np.zeros((40, 64, 64, 3), np.uint8))
    monkeypatch.setattr(page_module, "MAX_SECONDS", 1e-6)
    message, *_ = page_module.classify(
        page_module.load_classifier(str(NANO)), {"path": str(tmp_path / f"a.{suffix}"), "orig_name": "b"}
    )
    assert "b: reading it takes longer than 1e-06 s" in message


@pytest.mark.parametrize("path", [NANO / "example.mp4", TURNED], ids=["as it is", "turned, with frames repeated"])
def test_what_is_read_is_what_the_processor_gives(without_torchcodec, monkeypatch, path):
    monkeypatch.setattr(windows, "PREPARED_BYTES", 3 * 64 * 64 * 3)  # three frames of the example
    processor = VideoMambaVideoProcessor.from_pretrained(NANO)
    pixels, contents = page_module.read_video("mine.mp4", path, processor)
    assert contents.endswith(", 32 x 64 pixels" if path == TURNED else ", 64 x 64 pixels")
    assert torch.equal(pixels, processor(path, return_tensors="pt")["pixel_values"])


READ = """
import resource, sys, torch
from pathlib import Path
from page import VideoMambaVideoProcessor, read_video
torch.set_num_threads(2)  # each decodes a frame of its own
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_video("mine.mp4", Path(sys.argv[1]), VideoMambaVideoProcessor(num_frames=64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_the_frames_of_a_large_video_are_not_held_at_once(tmp_path):
    frames = np.zeros((64, 2160, 2160, 3), np.uint8)
    write_video(tmp_path / "large.mp4", frames, "mpeg4")
    result = run(sys.executable, "-c", READ, tmp_path / "large.mp4", folder=SCRIPTS)
    assert_finished(result)
    assert int(result.stdout) * 1024 < frames.nbytes / 4


def test_what_has_been_deleted_is_told_without_its_path(tmp_path):
    classifier = page_module.load_classifier(str(NANO))
    message, labels, details = page_module.classify(
        classifier, {"path": str(tmp_path / "a.mp4"), "orig_name": "mine.mp4"}
    )
    assert (
        "mine.mp4: can&#x27;t be read" in message and str(tmp_path) not in message and (labels, details) == (None, "")
    )


def sources(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix in (".py", ".cpp", ".h", ".json")}


def test_a_space_starts_by_itself(monkeypatch, tmp_path):
    """What its Dockerfile does, but for the compiler and what is installed here anyway."""
    space, site, port = tmp_path / "space", tmp_path / "site", free_port()
    monkeypatch.setattr(sys, "argv", ["make_space.py", "org/nano", str(space)])
    make_space.main()
    files = {"Dockerfile", "README.md", *space_module.PAGE}
    assert {path.name for path in space.iterdir()} == {*files, "package"}
    dockerfile = (space / "Dockerfile").read_text("utf-8")
    (requirement,) = re.findall(r'^RUN pip install --no-cache-dir "(.+)"$', dockerfile, re.MULTILINE)
    assert "ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860\n" in dockerfile
    command = json.loads(re.search(r"^CMD (.+)$", dockerfile, re.MULTILINE)[1])
    data = SpaceCard.load(space / "README.md").data
    assert (data.sdk, data.app_port, data.models) == ("docker", 7860, ["org/nano"])

    package = space / "package" / "modeling_videomamba"
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} < {path.name for path in package.parent.iterdir()}
    assert sources(package) == sources(ROOT / "modeling_videomamba") and not list(package.rglob("*.so"))
    pip = ("env", "CC=/bin/false", "CXX=/bin/false", sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
    assert_finished(run(*pip, "--target", site, requirement, folder=space))
    where = "import modeling_videomamba; print(modeling_videomamba.__path__[0])"
    found = run("env", f"PYTHONPATH={site}", sys.executable, "-c", where, folder=space)
    assert found.stdout.strip() == str(site / "modeling_videomamba")

    cache = tmp_path / "hub" / "models--org--nano"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(NANO, cache / "snapshots" / ("0" * 40))
    shutil.copyfile(NANO / "example.mp4", space / "mine.mp4")
    environment = {
        "GRADIO_SERVER_NAME": "127.0.0.2",
        "GRADIO_SERVER_PORT": port,
        "GRADIO_TEMP_DIR": tmp_path / "files",
        "HF_HUB_CACHE": cache.parent,
        "PYTHONPATH": site,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with served(*command, host="127.0.0.2", port=port, environment=environment, folder=space) as url:
        assert not is_listening("127.0.0.1", port)
        with urlopen(f"{url}config") as response:
            config = response.read().decode()
    assert "Labels by nano" in config and "mine.mp4" in config and "What the videos show" not in config


def test_what_can_be_no_space_is_explained(exit_of, tmp_path):
    (tmp_path / "file").touch()
    for model, folder, message in (
        (NANO, tmp_path / "space", "a Space needs a model on the Hub"),
        ("a b", tmp_path / "space", "a b"),
        (
            "nano",
            tmp_path / "space",
            "ORG/MODEL must be OWNER/NAME of letters, digits, '-', '_' and '.' on the Hub, got 'nano'",
        ),
        ("org/nano", tmp_path, f"{tmp_path} must be an empty folder"),
        ("org/nano", tmp_path / "file", "file is a file, not a folder"),
    ):
        assert message in exit_of(make_space, model, folder)
    assert not (tmp_path / "space").exists()


def test_what_is_wrong_is_explained(exit_of, tmp_path):
    values, plain = tmp_path / "values", tmp_path / "plain"
    build(problem_type="regression", num_labels=1).save_pretrained(values)
    build(VideoMambaModel).save_pretrained(plain)
    for folder in (values, plain):
        VideoMambaVideoProcessor().save_pretrained(folder)
    for options, message in (
        (("--model", "nowhere"), "nowhere: there is no such folder"),
        (("--model", values), "gives values, not labels"),
        (("--model", plain), f"{plain} has no weights for classifier.bias, classifier.weight"),
        (("--model", NANO_VIDEO_TEXT), "VideoMambaVideoTextConfig"),
        (("--index", tmp_path / "none"), "none has no finished index"),
    ):
        assert message in exit_of(app, *options)
    assert exit_of(app, "--port", 70000) == "error: --port must be from 1 to 65535, got 70000"
