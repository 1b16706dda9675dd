"""Messages in the packets of H.264 and HEVC (supplemental enhancement information) that turn or mirror the picture."""

import re
from collections.abc import Iterator

ORIENTATION = 47  # the type of a display orientation message
ESCAPE = re.compile(b"\0\0\3")
START = re.compile(b"\0\0\1")


def orientation_message(data: bytes, codec: str, is_prefixed: bool) -> bytes | None:
    """
    The display orientation message of a packet, `None` where it has none.

    Args:
        data (`bytes`): The packet.
        codec (`str`): `"h264"` or `"hevc"`; packets of other codecs have no such message.
        is_prefixed (`bool`): Whether each unit begins with its length in four bytes (mp4), not with a start code.
    """
    if codec not in ("h264", "hevc"):
        return None
    for unit in _prefixed_units(data) if is_prefixed else _started_units(data):
        kind = unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63
        if kind in (range(1, 6) if codec == "h264" else range(32)):  # the picture, before which messages come
            return None
        if kind in ((6,) if codec == "h264" else (39,)):
            message = _find(ESCAPE.sub(b"\0\0", unit[1 if codec == "h264" else 2 :]))
            if message is not None:
                return message
    return None


def _prefixed_units(data: bytes) -> Iterator[bytes]:
    position = 0
    while position + 4 < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 0:
            return
        yield data[position + 4 : position + 4 + length]
        position += 4 + length


def _started_units(data: bytes) -> Iterator[bytes]:
    starts = START.finditer(data)
    start = next(starts, None)
    while start is not None:
        following = next(starts, None)
        unit = data[start.end() : following.start() if following else len(data)]
        if unit:
            yield unit
        start = following


def _find(payloads: bytes) -> bytes | None:
    """Payloads: type and size, each in bytes of which the last is below 255, and content."""
    position = 0
    while position + 2 <= len(payloads) - 1:
        fields = []
        for _ in range(2):
            value = 0
            while position < len(payloads) and payloads[position] == 0xFF:
                value, position = value + 0xFF, position + 1
            value += payloads[position] if position < len(payloads) else 0
            position += 1
            fields.append(value)
        kind, size = fields
        if kind == ORIENTATION:
            return payloads[position : position + size]
        position += size
    return None
