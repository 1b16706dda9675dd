"""Videos and texts as a dual encoder sees them."""

from typing import Any

import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .sources import media_kind

TEXTS_AT_ONCE = 64


def texts_of(split: Dataset) -> tuple[list[int], list[str], list[int]]:
    r"""
    What is to be found among captioned videos or images, of which a file may be in several rows.

    Returns:
        `tuple`: the first row of each file; all texts; and the number of the file that each text belongs to.

    Raises:
        `ValueError`: for a file without a text, or with an empty one; the message names it.
    """
    table = split.with_format("arrow")[:]
    media = table[media_kind(split)]
    paths, captions = pc.struct_field(media, "path").to_pylist(), table["captions"].to_pylist()
    embedded = pc.is_valid(pc.struct_field(media, "bytes")).to_pylist()
    rows: list[int] = []
    texts: list[str] = []
    owners: list[int] = []
    numbers: dict[Any, int] = {}
    for row, (path, own) in enumerate(zip(paths, captions, strict=True)):
        if not own or not all(text and text.strip() for text in own):
            raise ValueError(f"{path or f'example {row}'} must have captions, and none that is empty, got {own}")
        number = numbers.setdefault(row if embedded[row] else path, len(rows))  # names in shards may recur
        if number == len(rows):
            rows.append(row)
        texts += own
        owners += [number] * len(own)
    return rows, texts, owners


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    r"""
    Texts of at most `max_length` tokens, and which of them have been cut.

    Returns:
        `tuple`: `input_ids` and `attention_mask`, int64 of shape `(texts, length)`; booleans of shape `(texts,)`.
    """
    options = {"return_token_type_ids": False, "truncation": True, "max_length": max_length}
    tokens = tokenizer(texts, padding=True, return_tensors="pt", **options)
    is_cut = tokens["attention_mask"].sum(dim=1) == max_length
    for row in is_cut.nonzero().flatten().tolist():  # or of just that length
        is_cut[row] = len(tokenizer(texts[row], verbose=False)["input_ids"]) > max_length
    return dict(tokens), is_cut


def mean_directions(video_features: torch.Tensor) -> torch.Tensor:
    r"""
    Mean over the frames of their l2-normalised features, of which cosines are linear.

    Args:
        video_features (`torch.Tensor` of shape `(videos, frames, projection_dim)`): `pooler_output` of
            `get_video_features`.

    Returns:
        `torch.Tensor` of shape `(videos, projection_dim)`, float32.
    """
    return F.normalize(video_features.float(), dim=-1).mean(dim=1)


@torch.no_grad()
def encode_texts(
    accelerator: Accelerator, model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[torch.Tensor, int]:
    """
    l2-normalised features `(texts, projection_dim)`, float32, of which every process computes a share, and how many
    texts have been cut.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    found: list[tuple[int, torch.Tensor, int]] = []
    for start in range(rank * TEXTS_AT_ONCE, len(texts), count * TEXTS_AT_ONCE):
        tokens, is_cut = tokenize(tokenizer, texts[start : start + TEXTS_AT_ONCE], max_length)
        with accelerator.autocast():
            features = model.get_text_features(**{name: value.to(model.device) for name, value in tokens.items()})
        found.append((start, F.normalize(features.pooler_output.float(), dim=-1).cpu(), int(is_cut.sum())))
    found = sorted(gather_object(found), key=lambda part: part[0])
    return torch.cat([features for _, features, _ in found]), sum(cut for *_, cut in found)
