import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor

from modeling_videomamba import VideoMambaImageProcessor
from tests.conftest import tiny_config

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def picture(height=60, width=90, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def pixels(images=None, **kwargs):
    return VideoMambaImageProcessor()(images, return_tensors="pt", **kwargs)["pixel_values"]


def test_resize_crop_rescale_normalise():
    image = picture(512, 640)
    values = pixels(image)
    assert values.shape == (1, 3, 224, 224) and values.dtype == torch.float32
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(tensor, size=(256, 320), mode="bicubic", antialias=True, align_corners=False)
    cropped = resized[:, :, 16:240, 48:272].clamp(0, 255)
    assert (values - (cropped / 255 - MEAN) / STD).abs().max() <= 1.5 / 255 / STD.min()  # uint8 in fixed point


@pytest.mark.parametrize("kind", ["PIL", "tensor", "channels first", "grey", "transparent"])
def test_every_kind_of_image_gives_the_same(kind):
    image = picture()
    if kind == "grey":
        grey = image[..., 0]
        for same in (Image.fromarray(grey), grey, grey[..., None], grey[None]):
            assert torch.equal(pixels(same), pixels(np.repeat(grey[..., None], 3, axis=-1)))
        return
    if kind == "transparent":
        clear = np.concatenate([image, np.full_like(image[..., :1], 100)], axis=-1)
        assert torch.equal(pixels(clear), pixels(image))
        assert torch.equal(pixels(Image.fromarray(clear)), pixels(image))
        return
    source = {
        "PIL": Image.fromarray(image),
        "tensor": torch.from_numpy(image.copy()),
        "channels first": image.transpose(2, 0, 1),
    }[kind]
    assert torch.equal(pixels(source), pixels(image))


def test_a_batch_of_images_equals_one_by_one():
    images = [picture(seed=0), picture(70, 50, seed=1)]
    assert torch.equal(pixels(images), torch.cat([pixels(image) for image in images]))
    stacked = np.stack([images[0], images[0][::-1]])
    assert torch.equal(pixels(stacked), torch.cat([pixels(image) for image in stacked]))


def test_lists_of_frames_are_videos():
    frames = [picture(seed=seed) for seed in range(3)]
    video = pixels(videos=frames)
    assert video.shape == (1, 3, 3, 224, 224)
    assert torch.equal(video[0], pixels(frames))
    assert torch.equal(pixels(videos=np.stack(frames)), video)
    assert torch.equal(pixels(videos=np.stack([frames, frames])), torch.cat([video, video]))
    for batch in ([frames, frames[::-1]], np.stack([frames, frames[::-1]]), [np.stack(frames), np.stack(frames[::-1])]):
        values = pixels(batch)
        assert values.shape == (2, 3, 3, 224, 224)
        assert torch.equal(values[0], video[0]) and torch.equal(values[1], video[0].flip(0))


def test_either_images_or_videos():
    with pytest.raises(ValueError, match="either `images` or `videos`"):
        pixels()
    with pytest.raises(ValueError, match="either `images` or `videos`"):
        pixels(picture(), videos=[picture()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.astype(np.float32) / 255, "do_rescale=False"),
        (lambda image: image.astype(np.int64) - 500, "between 0 and 255"),
        (lambda image: image > 100, "bool"),
        (lambda image: np.full(image.shape, np.nan, np.float32), "nan"),
    ],
)
def test_wrong_pixels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pixels(change(picture()))


def test_wrong_structures_are_refused():
    for images, message in (([], "empty"), ([picture(), [picture()]], "lists of them"), (5, "not iterable|pictures")):
        with pytest.raises((ValueError, TypeError), match=message):
            pixels(images)
    with pytest.raises(ValueError, match="PIL mode 'I'"):
        pixels(Image.fromarray(picture()[..., 0].astype(np.int32)))


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        pixels(picture()[..., :2])
    with pytest.raises(ValueError, match="must have 3 channels"):
        pixels(picture()[..., :1], do_convert_rgb=False)


def test_the_size_follows_the_model(tmp_path):
    processor = VideoMambaImageProcessor.for_model(tiny_config(image_size=448, num_frames=None))
    assert dict(processor.size)["shortest_edge"] == 512
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VideoMambaImageProcessor)
    assert loaded(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 448, 448)
