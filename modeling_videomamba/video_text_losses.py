"""Objectives of video-text pretraining (paper, section 4.4; UMT, arXiv 2303.16058), as functions of features."""

import torch
import torch.distributed as dist
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
    return _cosines(video_embeds.float().mean(dim=1), text_embeds)


def contrastive_loss(
    video_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Contrastive loss of pairs, from video to text and from text to video, among the pairs of all processes, as many of
    each. Gradients flow into the features of all of them, so that loss and gradients, averaged over the processes, are
    those of one process with all pairs. A video that is in several pairs has all of their texts to find, each with the
    same share.

    Args:
        video_embeds (`torch.Tensor` of shape `(pairs, frames, projection_dim)`): l2-normalised.
        text_embeds (`torch.Tensor` of shape `(pairs, projection_dim)`): l2-normalised.
        temperature (`torch.Tensor` of shape `()` or `float`): By which cosines are divided.
        video_ids (`torch.Tensor` of shape `(pairs,)`, int64, *optional*): Of the video of each pair, the same where it
            is the same; negative for a pair that doesn't count. By default every pair is of a video of its own.

    Returns:
        `torch.Tensor` of shape `()`: this process's share of the mean over the pairs that count; 0 if none does.

    Raises:
        `ValueError`: if the processes have different numbers of pairs.
    """
    world_size = _world_size()
    if video_ids is None:
        first = dist.get_rank() * len(text_embeds) if world_size > 1 else 0
        video_ids = torch.arange(first, first + len(text_embeds), device=text_embeds.device)
    means = video_embeds.float().mean(dim=1)  # of which the cosines are linear: there is less to send
    text_embeds = text_embeds.float()
    videos, texts, ids = means, text_embeds, video_ids
    if world_size > 1:
        _check_number_of_pairs(video_ids)
        videos, texts, ids = (_AllGather.apply(tensor) for tensor in (means, text_embeds, video_ids))
    same = (video_ids[:, None] == ids).float()
    targets = same / same.sum(dim=1, keepdim=True)
    excluded = ids < 0
    losses = torch.zeros(len(video_ids), device=video_ids.device)
    for own, others in ((means, texts), (text_embeds, videos)):
        scores = _cosines(own, others) / temperature
        log_probabilities = scores.masked_fill(excluded, torch.finfo().min).log_softmax(dim=1)
        losses = losses - (targets * log_probabilities.masked_fill(excluded, 0.0)).sum(dim=1) / 2
    return (losses * (video_ids >= 0)).sum() * world_size / (~excluded).sum().clamp(min=1)


def hard_negative_weights(scores: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    r"""
    Weights by which the negative of each row is drawn: the softmax of its scores, and nothing for true pairs.

    Args:
        scores (`torch.Tensor` of shape `(rows, candidates)`): Similarities divided by the temperature.
        same (`torch.Tensor` of shape `(rows, candidates)`, boolean): Which are true pairs, or don't count.

    Returns:
        `torch.Tensor` of the same shape, float32. A row of zeros has no negative.
    """
    weights = scores.float().softmax(dim=1).nan_to_num(MIN_NEGATIVE_WEIGHT)  # so that the loss says what is not finite
    return weights.clamp(min=MIN_NEGATIVE_WEIGHT).masked_fill(same, 0.0)


def draw_negatives(weights: torch.Tensor) -> torch.Tensor:
    """A candidate of each row `(rows,)`, int64, by the weights of [`hard_negative_weights`]; -1 where there is none."""
    none = weights.sum(dim=1) == 0
    drawn = weights.masked_fill(none[:, None], 1.0).multinomial(1).squeeze(1)
    return drawn.masked_fill(none, -1)


def masked_lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `logits` `(rows, length, vocab_size)` where `labels` `(rows, length)` aren't -100."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return mean_where(losses, labels.flatten() != -100)


def _cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    with torch.autocast(first.device.type, enabled=False):
        return first.float() @ second.float().T


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_number_of_pairs(video_ids: torch.Tensor) -> None:
    own = torch.tensor([len(video_ids)], device=video_ids.device)
    counts = _AllGather.apply(own).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"All processes must have the same number of pairs, got {counts}.")


class _AllGather(torch.autograd.Function):
    """Of all processes, rank by rank, along the first dimension; the gradient is the sum of what each has for it."""

    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


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
