"""Whether a video file has been cut off, by the sizes that its container states: FFmpeg reads many without an error."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # of files that were written as streams
TAIL = 2**17  # bytes, more than an Ogg page has
MAX_TIME = 2**48  # in units of an IVF file: more is no time
MXF_KEY = b"\x06\x0e\x2b\x34"
BOXES = (
    *(b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"pnot", b"uuid"),
    *(b"sidx", b"ssix", b"mfra", b"meta", b"emsg", b"prft", b"pdin"),
)


def open_binary(file: str | io.BytesIO) -> BinaryIO:
    """A path, or bytes, to be read from their start."""
    return io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else Path(file).open("rb")


def is_truncated(file: str | io.BytesIO) -> bool:
    """Whether a file ends before its container does. False where the container doesn't tell, or isn't known."""
    with open_binary(file) as opened:
        return _is_cut(opened)


def _is_cut(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(64)
    file.seek(0)
    if start[4:8] in BOXES:
        return _is_cut_mp4(file, size)
    check = next((check for magic, check in CHECKS.items() if start.startswith(magic)), None)
    try:
        return check is not None and check(file, size)
    except struct.error:  # the file ends within a header
        return True


def _read(file: BinaryIO, position: int, layout: str) -> tuple:
    file.seek(position)
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _is_cut_mp4(file: BinaryIO, size: int) -> bool:
    """Boxes: size and type. What no box begins with, and would reach behind the end, is no box."""
    position, kind = 0, b""
    while position + 8 <= size:
        length, kind = _read(file, position, ">I4s")
        if length == 0 or not kind.isalnum():  # up to the end of the file, or no box
            return False
        position += _read(file, position + 8, ">Q")[0] if length == 1 else max(length, 8)
    return position > size and kind in BOXES


def _is_cut_avi(file: BinaryIO, size: int) -> bool:
    """RIFF chunks, of which there are several in a large file."""
    position = 0
    while position + 8 <= size:
        kind, length = _read(file, position, "<4sI")
        if kind != b"RIFF" or length in UNKNOWN_SIZES:
            return False
        position += 8 + length + length % 2
    return position > size + 8  # some writers count the eight bytes of the header, and no padding


def _is_cut_matroska(file: BinaryIO, size: int) -> bool:
    """EBML: a header and a segment."""
    _, length, begin = _read_ebml(file, 0)
    kind, length, begin = _read_ebml(file, begin + length)
    return kind == b"\x18\x53\x80\x67" and length >= 0 and begin + length > size


def _read_ebml(file: BinaryIO, position: int) -> tuple[bytes, int, int]:
    """Kind of the element at `position`, its length (-1: unknown), and where its content begins."""
    kind, first = _read(file, position, ">4sB")
    width = 9 - first.bit_length()
    (length,) = struct.unpack(">Q", _read(file, position + 4, f">{width}s")[0].rjust(8, b"\0"))
    ones = (1 << 7 * width) - 1
    return kind, -1 if length & ones == ones else length & ones, position + 4 + width


def _is_cut_flv(file: BinaryIO, size: int) -> bool:
    _, found, value = file.read(2**16).partition(b"\0\x08filesize\0")
    return bool(found) and struct.unpack(">d", value[:8])[0] > size


def _is_cut_asf(file: BinaryIO, size: int) -> bool:
    """The object of file properties; not of a broadcast, which doesn't know them."""
    _, found, value = file.read(2**16).partition(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if not found:
        return False
    (stated,), (flags,) = struct.unpack_from("<Q", value, 24), struct.unpack_from("<I", value, 72)
    return not flags & 1 and stated > size


def _is_cut_ogg(file: BinaryIO, size: int) -> bool:
    """The last page."""
    file.seek(max(0, size - TAIL))
    _, found, page = file.read().rpartition(b"OggS")
    if not found or len(page) < 23:
        return True
    segments = page[23 : 23 + page[22]]
    return len(segments) < page[22] or len(page) < 23 + len(segments) + sum(segments)


def _is_cut_gif(file: BinaryIO, size: int) -> bool:
    """Blocks up to the trailer."""
    (flags,) = _read(file, 10, "B")
    position = 13 + _palette(flags)
    while True:
        (kind,) = _read(file, position, "B")
        if kind not in b"\x21\x2c":  # neither an extension nor a picture
            return False
        position += 2
        if kind == 0x2C:
            (flags,) = _read(file, position + 7, "B")
            position += 9 + _palette(flags)
        while length := _read(file, position, "B")[0]:
            position += 1 + length
        position += 1


def _palette(flags: int) -> int:
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _is_cut_png(file: BinaryIO, size: int) -> bool:
    """Chunks up to the last one."""
    position, kind = 8, b""
    while kind != b"IEND":
        length, kind = _read(file, position, ">I4s")
        position += 12 + length
    return position > size


def _is_cut_ivf(file: BinaryIO, size: int) -> bool:
    """Frames with a header each: length and time. What follows them has no header."""
    (position,) = _read(file, 6, "<H")
    while position < size:
        file.seek(position)
        if not any(header := file.read(12)):
            return False
        length, time = struct.unpack("<IQ", header)
        if time >= MAX_TIME:
            return False
        position += 12 + length
    return position > size


def _is_cut_swf(file: BinaryIO, size: int) -> bool:
    return _read(file, 4, "<I")[0] > size


def _is_cut_mxf(file: BinaryIO, size: int) -> bool:
    """Keys of 16 bytes, lengths and values; the first one tells where the footer is."""
    position = 0
    while position < size:
        file.seek(position)
        key = file.read(4)
        if not MXF_KEY.startswith(key):
            return False
        (first,) = _read(file, position + 16, "B")
        width = first - 0x80 if first > 0x7F else 0
        length = int.from_bytes(_read(file, position + 17, f"{width}s")[0], "big") if width else first
        if position == 0 and _read(file, 17 + width + 24, ">Q")[0] >= size:
            return True
        position += 17 + width + length
    return position > size


def _is_cut_mpeg(file: BinaryIO, size: int) -> bool:
    """Packets after the last header of a pack."""
    file.seek(max(0, size - TAIL))
    _, found, pack = file.read().rpartition(b"\0\0\1\xba")
    pack = found + pack
    position, end = 0, b"\0\0\1\xb9"
    while (code := pack[position : position + 4]).startswith(b"\0\0\1") and code != end and len(pack) >= position + 14:
        if code == b"\0\0\1\xba":
            position += 14 + pack[position + 13] % 8 if pack[position + 4] & 0xC0 == 0x40 else 12
        else:
            position += 6 + int.from_bytes(pack[position + 4 : position + 6], "big")
    return position > len(pack) or (code.startswith(b"\0\0\1") and code != end)


def _is_cut_rm(file: BinaryIO, size: int) -> bool:
    """Objects: kind and size."""
    position = 0
    while position + 8 <= size:
        kind, length = _read(file, position, ">4sI")
        if not kind.strip(b".").isalnum() or length in UNKNOWN_SIZES:
            return False
        position += length
    return position > size + 18  # FFmpeg counts a part of the header twice


CHECKS: dict[bytes, Callable[[BinaryIO, int], bool]] = {
    b"RIFF": _is_cut_avi,
    b"\x1a\x45\xdf\xa3": _is_cut_matroska,
    b"FLV": _is_cut_flv,
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"): _is_cut_asf,
    b"OggS": _is_cut_ogg,
    b"GIF8": _is_cut_gif,
    b"\x89PNG": _is_cut_png,
    b"DKIF": _is_cut_ivf,
    b"FWS": _is_cut_swf,
    MXF_KEY: _is_cut_mxf,
    b".RMF": _is_cut_rm,
    b"\0\0\1\xba": _is_cut_mpeg,
}
