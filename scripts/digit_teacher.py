"""A small CLIP that tells the names of handwritten digits, the teacher of study_masked_pretraining.py."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from moving_digits import DIRECTIONS, draw_clip

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
TRANSFORMER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
# the text is one word between the tokens of beginning and end
BEGIN, END = len(NAMES), len(NAMES) + 1
TEXT = {"vocab_size": len(NAMES) + 2, "bos_token_id": BEGIN, "eos_token_id": END, "max_position_embeddings": 3}


def draw_frames(digits: np.ndarray, targets: np.ndarray, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames `(16 * clips, 3, 32, 32)`, uint8, of moving digits, and which digit each shows."""
    rng, steps = np.random.default_rng(seed), list(DIRECTIONS.values())
    chosen = rng.integers(len(digits), size=clips)
    frames = np.concatenate([draw_clip(digits[index], steps[rng.integers(len(steps))], rng) for index in chosen])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = F.interpolate(pixels.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    return small.round().byte(), torch.from_numpy(targets[chosen]).repeat_interleave(len(frames) // clips)


def train_teacher(folder: Path, steps: int, batch_size: int = 64) -> float:
    """Writes a CLIP that tells the names of digits; returns its zero-shot accuracy on frames of other digits."""
    torch.manual_seed(0)
    data = load_digits()
    digits, test, train_targets, test_targets = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0
    )
    images, targets = draw_frames(digits, train_targets, 800, seed=1)
    vision = {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": 8, "projection_dim": 64}
    model = CLIPModel(
        CLIPConfig(text_config={**TRANSFORMER, **TEXT, "projection_dim": 64}, vision_config=vision, projection_dim=64)
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    words = torch.tensor([[BEGIN, word, END] for word in range(len(NAMES))])

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=words, pixel_values=(pixels / 255 - mean) / std).logits_per_image

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in track(range(steps), "teacher"):
        batch = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(logits(images[batch]), targets[batch])  # which of all names belongs to a picture
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, targets = draw_frames(test, test_targets, 60, seed=2)
    with torch.no_grad():
        accuracy = (model.eval()(words, (images / 255 - mean) / std).logits_per_image.argmax(-1) == targets).float()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "accuracy.json").write_text(json.dumps(accuracy.mean().item()), "utf-8")
    return accuracy.mean().item()
