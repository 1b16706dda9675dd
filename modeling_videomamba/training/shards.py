"""Tar shards of samples, as `webdataset` and `datasets` have them."""

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..labels import unique_keys
from .files import TarMember
from .lists import MAX_SHOWN


class BrokenSampleError(ValueError):
    """A sample of a shard that can't be read, or a shard."""


def read_whole(text: str | bytes) -> int:
    """Raises `ValueError` for what is no whole number, or doesn't fit a column of a table."""
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"must fit 64 bits, got {str(number)[:MAX_SHOWN]}")
    return number


def read_json(data: bytes) -> Any:
    """Raises `ValueError` for what is no JSON, has a key twice or holds text that is no Unicode."""
    value = json.loads(data, object_pairs_hook=unique_keys, parse_int=read_whole)
    json.dumps(value, ensure_ascii=False).encode()
    return value


class Shards(WebDataset):
    """`datasets`' own builder for local shards, with errors that name the shard and the file in it."""

    DECODERS = {**WebDataset.DECODERS, "cls": read_whole, "json": read_json, "jsn": read_json}

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        place, is_empty = "", True

        def members() -> Iterator[tuple[str, Any]]:
            nonlocal place
            for name, file in _members(tar_path):
                place = f", {name}"
                yield name, file
                place = f", after {name}"

        try:
            for sample in super()._get_pipeline_from_tar(tar_path, members()):
                is_empty = False
                yield sample
        except Exception as error:  # each format has errors of its own
            is_cut = isinstance(error, tarfile.TarError | EOFError | zlib.error)
            reason = "damaged or truncated" if is_cut else " ".join(str(error).split())
            raise BrokenSampleError(f"shard {tar_path}{place}: {reason}") from error
        if is_empty:
            raise BrokenSampleError(f"shard {tar_path}: has no sample")


def _members(path: str) -> Iterator[tuple[str, Any]]:
    """The files in an archive that aren't hidden."""
    with tarfile.open(path, "r|*", tarinfo=TarMember) as archive:
        for member in archive:
            if member.isreg() and not member.name.rpartition("/")[2].startswith((".", "__")):
                yield member.name, archive.extractfile(member)
            archive.members = []  # type: ignore[attr-defined]  # which would grow
