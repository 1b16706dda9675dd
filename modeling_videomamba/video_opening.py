"""Sources of videos: paths, URLs and bytes become a path or bytes that PyAV opens, or an error with their name."""

import io
import os
import string
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

VideoSource = str | os.PathLike | bytes | bytearray | memoryview | dict

# FFmpeg also opens playlists, with all that they name, and can be asked only then what it has opened.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,mxf,nut,wtv,dv,gxf,rm,swf,nsv,nuv,pva,dhav,kux,"
    "h261,h263,h264,hevc,vvc,av1,obu,ivf,m4v,mjpeg,vc1,vc1test,dirac,cavsvideo,yuv4mpegpipe"
)


class BrokenVideoError(ValueError):
    """
    A file that is not a video, or from which not every frame can be read.

    Args:
        name (`str`): Path or URL of the file, or what it is.
        reason (`str`): What is wrong with it.
        num_readable_frames (`int`, defaults to 0): How many of its frames could be read.
    """

    def __init__(self, name: str, reason: str, num_readable_frames: int = 0):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.num_readable_frames = name, reason, num_readable_frames

    def __reduce__(self):  # workers of a data loader send their exceptions to the main process
        return type(self), (self.name, self.reason, self.num_readable_frames)


def open_source(video: VideoSource) -> tuple[str, str | io.BytesIO]:
    """A name for errors, and a path of an existing file or its bytes."""
    if isinstance(video, dict):
        path, data = video.get("path"), video.get("bytes")
        if path is None and data is None:
            raise ValueError("A video given as a dictionary needs `path` or `bytes`, got neither.")
        if data is not None:
            return str(path or "video from bytes"), io.BytesIO(data)
        video = str(path)
    if isinstance(video, bytes | bytearray | memoryview):
        return "video from bytes", io.BytesIO(video)
    path = os.fspath(video)
    if path.startswith(("http://", "https://")):
        return path, io.BytesIO(_download(path))
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a video file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    return path, path


def _download(url: str) -> bytes:
    try:
        with urlopen(quote(url, safe=string.punctuation), timeout=60) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url}: can't be downloaded ({error})") from error
