"""How good the features of a pretrained model are: scores of simple classifiers on them, which stay frozen."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

from .diagnosis import NothingReadError
from .evaluation import Predictions

NEIGHBORS = 10


def probe_features(model: nn.Module, pixel_values: torch.Tensor, num_patches: int) -> torch.Tensor:
    r"""
    Features `(batch, 2 * hidden_size)`, float32, of clips nothing of which is hidden: the class token, and the mean of
    the patch tokens, of the residual stream that masked pretraining aligns.

    Args:
        model: A `VideoMambaForMaskedPreTraining`, also one that is wrapped.
        pixel_values (`torch.Tensor`): As in [`VideoMambaModel.forward`].
        num_patches (`int`): Patch tokens `T'P` of a clip.
    """
    nothing = torch.zeros(len(pixel_values), num_patches, dtype=torch.bool, device=pixel_values.device)
    stream = model(pixel_values, nothing, output_hidden_states=True).hidden_states[-2]
    normed = F.rms_norm(stream, stream.shape[-1:])
    return torch.cat([normed[:, 0], normed[:, 1:].mean(dim=1)], dim=-1)


def probe_accuracy(probe: str, train: Predictions, test: Predictions) -> float:
    r"""
    Accuracy on `test` of a classifier that is trained on `train`.

    Args:
        probe (`str`): `"knn"`, the majority of the nearest by cosine, or `"linear"`, a logistic regression.
        train, test ([`Predictions`]): Features as `scores`, and `labels`.

    Raises:
        [`NothingReadError`]: if one of them is empty.
    """
    for name, found in (("train", train), ("test", test)):
        if not found.scores:
            raise NothingReadError(f"probe's {name}", found.broken)
    features, labels = _arrays(train)
    test_features, test_labels = _arrays(test)
    if probe == "knn":
        classifier = KNeighborsClassifier(min(NEIGHBORS, len(labels)), weights="distance", metric="cosine")
    else:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features, labels)
    return float(np.mean(classifier.predict(test_features) == test_labels))


def _arrays(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    indices = sorted(predictions.scores)
    features = torch.stack([predictions.scores[index] for index in indices]).numpy()
    return normalize(features), np.array([predictions.labels[index] for index in indices])
