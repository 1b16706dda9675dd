"""Objectives of video-text pretraining (paper, section 4.4; UMT, arXiv 2303.16058), as functions of features."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F

# So that there is a hard negative to draw where the true pair leaves others a probability that float32 doesn't hold.
MIN_NEGATIVE_WEIGHT = 1e-30


def similarities(video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    r"""
    Mean over the frames of the cosine of a frame and a text.

    Args:
        video_embeds (`torch.Tensor` of shape `(videos, frames, projection_dim)`): l2-normalised.
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`): l2-normalised.

    Returns:
        `torch.Tensor` of shape `(videos, texts)`, float32, from -1 to 1.
    """
    with torch.autocast(video_embeds.device.type, enabled=False):
        return video_embeds.float().mean(dim=1) @ text_embeds.float().T


def contrastive_loss(
    video_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Contrastive loss of pairs, from video to text and from text to video, among the pairs of all processes. Gradients
    flow into the features of all of them, so that, averaged over the processes, they are those of one process with all
    pairs. A video that is in several pairs has all of their texts to find, each with the same share.

    Args:
        video_embeds (`torch.Tensor` of shape `(pairs, frames, projection_dim)`): l2-normalised.
        text_embeds (`torch.Tensor` of shape `(pairs, projection_dim)`): l2-normalised.
        temperature (`torch.Tensor` of shape `()` or `float`): By which cosines are divided.
        video_ids (`torch.Tensor` of shape `(pairs,)`, int64, *optional*): Of the video of each pair, the same where it
            is the same; negative for a pair that doesn't count. By default every pair is of a video of its own.

    Returns:
        `torch.Tensor` of shape `()`: mean over the pairs of this process that count; 0 if none does.
    """
    video_ids = _ids(video_ids, len(text_embeds), text_embeds.device)
    videos, texts, ids = _gather(video_embeds), _gather(text_embeds), _gather_ids(video_ids)
    same = (video_ids[:, None] == ids).float()
    targets = same / same.sum(dim=1, keepdim=True)
    excluded = ids < 0
    losses = torch.zeros(len(video_ids), device=video_ids.device)
    for scores in (similarities(video_embeds, texts), similarities(videos, text_embeds).T):
        log_probabilities = (scores / temperature).masked_fill(excluded, torch.finfo().min).log_softmax(dim=1)
        losses = losses - (targets * log_probabilities.masked_fill(excluded, 0.0)).sum(dim=1) / 2
    return mean_where(losses, video_ids >= 0)


def hard_negative_weights(scores: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    r"""
    Weights by which the negative of each row is drawn: the softmax of its scores, and nothing for true pairs.

    Args:
        scores (`torch.Tensor` of shape `(rows, candidates)`): Similarities divided by the temperature.
        same (`torch.Tensor` of shape `(rows, candidates)`, boolean): Which are true pairs, or don't count.

    Returns:
        `torch.Tensor` of the same shape, float32. A row of zeros has no negative.
    """
    return scores.float().softmax(dim=1).clamp(min=MIN_NEGATIVE_WEIGHT).masked_fill(same, 0.0)


def draw_negatives(weights: torch.Tensor) -> torch.Tensor:
    """A candidate of each row `(rows,)`, int64, by the weights of [`hard_negative_weights`]; -1 where there is none."""
    none = weights.sum(dim=1) == 0
    drawn = weights.masked_fill(none[:, None], 1.0).multinomial(1).squeeze(1)
    return drawn.masked_fill(none, -1)


def masked_lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `logits` `(rows, length, vocab_size)` where `labels` `(rows, length)` aren't -100."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return mean_where(losses, labels.flatten() != -100)


def _ids(video_ids: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    if video_ids is not None:
        return video_ids
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return torch.arange(count, device=device) + rank * count


def _gather(features: torch.Tensor) -> torch.Tensor:
    """The features of all processes, rank by rank, with gradients."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return features
    return torch.cat(differentiable.all_gather(features))


def _gather_ids(ids: torch.Tensor) -> torch.Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ids
    gathered = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, ids.contiguous())
    return torch.cat(gathered)


def mean_where(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of the `losses` that count, `(n,)` both; 0 if none does."""
    return (losses * counts).sum() / counts.sum().clamp(min=1)


__all__ = [
    "contrastive_loss",
    "draw_negatives",
    "hard_negative_weights",
    "masked_lm_loss",
    "mean_where",
    "similarities",
]
