from base64 import b64encode

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from modeling_videomamba import VideoMambaForVideoClassification, VideoMambaImageProcessor, VideoMambaVideoProcessor
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


# Pictures in every dtype and from every source


NUMBERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*NUMBERS, *REALS], ids=str)
@pytest.mark.parametrize("do_normalize", [True, False])
def test_every_dtype_of_numbers_gives_the_same(dtype, do_normalize):
    image = torch.from_numpy(picture() // 2)
    expected, actual = (pixels(values, do_normalize=do_normalize) for values in (image, image.to(dtype)))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if dtype in NUMBERS else 0.02)
    if dtype != torch.bfloat16:  # which NumPy lacks
        array = image.to(dtype).numpy()
        for same in (array, array.astype(array.dtype.newbyteorder(">")), array[::-1][::-1]):
            assert torch.equal(pixels(same, do_normalize=do_normalize), actual)
    if dtype in REALS:
        rescaled = pixels(image.float().div(255).to(dtype), do_normalize=do_normalize, do_rescale=False)
        assert rescaled.dtype == torch.float32
        torch.testing.assert_close(rescaled, expected, rtol=0, atol=0.05)
    else:
        ones = pixels(torch.ones(300, 300, 3).to(dtype), do_rescale=False, do_normalize=False)
        torch.testing.assert_close(ones, torch.ones(1, 3, 224, 224))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, "U3", object])
def test_what_is_no_number_is_refused(dtype):
    image = picture() // 2
    with pytest.raises(ValueError, match="must be integers or floating point, got"):
        pixels(torch.from_numpy(image).to(dtype) if isinstance(dtype, torch.dtype) else image.astype(dtype))


@pytest.fixture
def file(tmp_path):
    """A JPEG that lies on its side, as cameras write it."""
    path = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(path, quality=95, exif=exif)
    return path


def test_every_source_of_a_picture_gives_the_same(file):
    with Image.open(file) as opened:
        upright = pixels(ImageOps.exif_transpose(opened))
    content = file.read_bytes()
    base64 = b64encode(content).decode()
    values = [{"path": str(file)}, {"path": None, "bytes": content}, {"path": "gone.jpg", "bytes": content}]
    sources = [file, str(file), content, base64, f"data:image/jpeg;base64,{base64}", *values]
    for source in sources:
        assert torch.equal(pixels(source), upright)
    assert torch.equal(pixels(sources), upright.expand(len(sources), -1, -1, -1))
    video = upright.expand(1, len(sources), -1, -1, -1)
    for values in (pixels(videos=sources), pixels(videos=[sources]), pixels([sources])):
        assert torch.equal(values, video)
    assert torch.equal(pixels([file, picture()]), torch.cat([upright, pixels(picture())]))


def test_files_that_are_no_pictures_are_refused(file, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "half.jpg").write_bytes(file.read_bytes()[:900])
    for name in ("text.jpg", "half.jpg"):
        path = tmp_path / name
        for source in (path, str(path), {"path": str(path)}, {"path": str(path), "bytes": path.read_bytes()}):
            with pytest.raises(ValueError, match=rf"{name}: not a picture, or truncated"):
                pixels([file, source])
    with pytest.raises(ValueError, match="a picture in `images`: not a picture"):
        pixels(b"text")
    for source in (tmp_path / "gone.jpg", str(tmp_path / "gone.jpg"), {"path": str(tmp_path / "gone.jpg")}):
        with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
            pixels(source)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/x\.jpg"):
        pixels("http://127.0.0.1:9/x.jpg")
    with pytest.raises(ValueError, match=r"must have `path` or `bytes`, got \['image'\]"):
        pixels({"image": picture()})
    with pytest.raises(ValueError, match="VideoMambaVideoProcessor reads files"):
        pixels(videos=str(file))
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        pixels(tmp_path / "deep.png")


# Models of other channels than RGB


@pytest.mark.parametrize("processor_class", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
def test_a_model_of_one_channel_gets_grey(processor_class, tmp_path):
    config = tiny_config(num_channels=1)
    processor_class.for_model(config).save_pretrained(tmp_path)
    processor = processor_class.from_pretrained(tmp_path)
    grey = picture()[..., 0]
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    green = np.stack([0 * grey, grey, 0 * grey], axis=-1)
    is_video = processor_class is VideoMambaVideoProcessor

    def values(image, **kwargs):
        return processor(np.stack([image] * 4) if is_video else image, return_tensors="pt", **kwargs)["pixel_values"]

    assert values(rgb).shape == ((1, 4, 1, 32, 32) if is_video else (1, 1, 32, 32))
    for same in (grey[..., None], rgb):
        assert torch.equal(values(same), values(rgb))
    exact = {"do_resize": False, "do_normalize": False, "do_rescale": False}
    shown = values((rgb / 255).astype(np.float32), **exact)
    weighted = values((green / 255).astype(np.float32), **exact)
    torch.testing.assert_close(weighted, shown * 0.587)
    bytes_ = values(rgb, do_resize=False, do_normalize=False) * 255
    torch.testing.assert_close(bytes_, shown * 255, rtol=0, atol=1e-3)  # nothing is rounded down
    model = VideoMambaForVideoClassification(config).eval()
    assert model(values(rgb)).logits.isfinite().all()
    with pytest.raises(ValueError, match="`image_mean` must have 1 or as many values as channels .1."):
        values(rgb, image_mean=[0.5, 0.5, 0.5])


@pytest.mark.parametrize("processor_class", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
def test_other_channels_have_no_processor(processor_class):
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"1 channel .* or 3 .* has `num_channels` {channels}"):
            processor_class.for_model(tiny_config(num_channels=channels))
    with pytest.raises(ValueError, match="`image_std` must have 1 or as many values as channels .3."):
        processor_class()(
            picture()[None] if processor_class is VideoMambaVideoProcessor else picture(), image_std=[1.0, 1.0]
        )
