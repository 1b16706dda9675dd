"""Retrieval in two steps: by the dual encoder among all, then by the fusion layers among the first."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .retrieval import TEXTS_AT_ONCE, mean_directions, tokenize
from .tensor_store import Place, TensorStore


@torch.no_grad()
def encode_video_parts(
    accelerator: Accelerator, model: Any, batches: Iterable[dict[str, Any]], store: TensorStore, with_tokens: bool
) -> Iterable[dict[str, Any]]:
    r"""
    Writes what the dual encoder takes of videos, `direction` `(projection_dim,)`, and what the fusion layers do,
    `tokens` `(T'P, vision_hidden_size)` in float16. Keys are the indices of the examples.

    Returns:
        An iterator over the batches, each after it has been written.
    """
    for batch in batches:
        valid = batch["valid"]
        with accelerator.autocast():
            features = model.get_video_features(send_to_device(batch["pixel_values"], accelerator.device))
        tensors = {"direction": mean_directions(features.pooler_output)}
        if with_tokens:
            tensors["tokens"] = features.last_hidden_state.half()
        keys = [str(index) for index in batch["indices"][valid].tolist()]
        store.write(keys, {name: tensor[valid.to(tensor.device)] for name, tensor in tensors.items()})
        yield batch


@torch.no_grad()
def encode_text_parts(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    indices: list[int],
    max_length: int,
    store: TensorStore,
) -> None:
    """Writes `direction` `(projection_dim,)`, `states` `(max_length, D)` in float16, their `mask`, and `is_cut`."""
    for start in range(0, len(indices), TEXTS_AT_ONCE):
        chosen = indices[start : start + TEXTS_AT_ONCE]
        tokens, is_cut = tokenize(tokenizer, [texts[index] for index in chosen], max_length)
        with accelerator.autocast():
            features = model.get_text_features(**send_to_device(tokens, accelerator.device))
        padding = max_length - tokens["input_ids"].shape[1]
        tensors = {
            "direction": F.normalize(features.pooler_output.float(), dim=-1),
            "states": F.pad(features.last_hidden_state.half(), (0, 0, 0, padding)),
            "mask": F.pad(tokens["attention_mask"], (0, padding)),
            "is_cut": is_cut,
        }
        store.write([str(index) for index in chosen], tensors)


def pairs_to_rank(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Which pairs are among the `top_k` of their video or of their text: booleans of the shape of `scores`."""
    return _top(scores, top_k) | _top(scores.T, top_k).T


@torch.no_grad()
def match_parts(
    accelerator: Accelerator,
    model: Any,
    wanted: dict[int, list[int]],
    videos: dict[int, Place],
    texts: dict[int, Place],
    store: TensorStore,
    advance: Callable[[], None],
) -> None:
    r"""
    Writes how well texts match videos, `match` `(texts,)` by the index of a video: the score of "yes", as in the
    released code; NaN for pairs that are not wanted.

    Args:
        wanted (`dict`): Indices of texts by that of a video.
        videos, texts (`dict`): Places of what [`encode_video_parts`] and [`encode_text_parts`] have written.
        advance (`Callable`): Called after each video.
    """
    states = TensorStore.read(texts.values(), "states").to(accelerator.device, model.dtype)
    masks = TensorStore.read(texts.values(), "mask").to(accelerator.device)
    for video, chosen in wanted.items():
        tokens = TensorStore.read([videos[video]], "tokens").to(accelerator.device, model.dtype)
        match = torch.full((1, len(texts)), float("nan"))
        for start in range(0, len(chosen), TEXTS_AT_ONCE):
            rows = torch.tensor(chosen[start : start + TEXTS_AT_ONCE], device=accelerator.device)
            length = int(masks[rows].sum(dim=1).max())
            with accelerator.autocast():
                logits = model.matching_logits_of_encoded(tokens, states[rows, :length], masks[rows, :length])
            match[0, rows.cpu()] = logits[:, 1].float().cpu()
        store.write([str(video)], {"match": match})
        advance()


def rerank(scores: torch.Tensor, matches: torch.Tensor, top_k: int) -> torch.Tensor:
    """Scores `(queries, candidates)` by which the `top_k` of each query come first, in the order of `matches`."""
    first = _top(scores, top_k)
    known = matches[first]
    least = scores.max() - known.min() + 1  # above all that are not among the first
    return torch.where(first, matches + least, scores)


def _top(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Which are the `top_k` largest of their row."""
    best = scores.topk(min(top_k, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
