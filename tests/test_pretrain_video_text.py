"""pretrain_video_text.py and evaluate_retrieval.py, called in this process and launched as two."""

import csv
import json
import random
import re
import shutil
import tarfile
import time

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    pipeline,
)

import evaluate_retrieval
import pretrain_video_text
from modeling_videomamba import VideoMambaForVideoTextRetrieval
from modeling_videomamba.training.tensor_store import TensorStore
from modeling_videomamba.training.video_text_models import make_tokenizer
from moving_digits import NUMBERS
from tests.conftest import NANO_VIDEO_TEXT, tiny_config
from tests.launching import (
    assert_finished,
    call,
    launch,
    launched,
    run,
    start,
    summary,
    wait_until,
    write_broken_videos,
)
from tests.models import build
from videomamba_arguments import CaptionedDataArguments, VideoTextArguments, VideoTextModelArguments

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**tiny_config(patch_size=8, alignment_size=16).to_diff_dict(), "num_labels": 2}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """63 training and 24 test clips with captions, and a broken one among each."""
    folder = tmp_path_factory.mktemp("clips")
    assert_finished(call("make_moving_digits.py", folder, "--captions", "--train-clips", 63, "--test-clips", 24))
    truncated, _, text, _ = write_broken_videos(folder / "broken", folder / "test" / "00005.mp4")
    for name, split in ((truncated, "train"), (text, "test")):
        shutil.move(folder / "broken" / name, folder / split / name)
        with (folder / f"{split}.jsonl").open("a") as file:
            file.write(json.dumps({"path": f"{split}/{name}", "caption": "a broken clip"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """32 pictures of digits, two captions each, as the original release lists them."""
    folder = tmp_path_factory.mktemp("pictures")
    data, entries = load_digits(), []
    for index in range(32):
        picture = Image.fromarray((data.images[index] * 255 / 16).astype(np.uint8)).resize((40, 32))
        picture.save(folder / f"{index:03}.png")
        number = NUMBERS[data.target[index]]
        entries.append({"image": f"{index:03}.png", "caption": [f"a white {number}", f"the number {number}"]})
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def starts(tmp_path_factory, clips):
    """A VideoMamba, a BERT with its tokenizer, and a CLIP."""
    folder = tmp_path_factory.mktemp("starts")
    build(**{**VISION, "num_frames": 2}).save_pretrained(folder / "vision")
    captions = [json.loads(line)["caption"] for line in (clips / "train.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer(captions, 150)
    tokenizer.save_pretrained(folder / "text")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**WIDTHS, vocab_size=160)).save_pretrained(folder / "text")
    clip = CLIPVisionConfig(**WIDTHS, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of a model from scratch."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    vision = {"hidden_size": 48, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "num_frames": 8}
    vision["initializer_range"] = 0.15
    text = {**WIDTHS, "vocab_size": 160, "max_position_embeddings": 32, "initializer_range": 0.1}
    values = {"vision_config": vision, "text_config": text, "fusion_layer": 2, "projection_dim": 32}
    values["initializer_range"] = 0.1
    path.write_text(json.dumps(values))
    return path


def losses(folder):
    """The lines of the log that have losses."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_masked_and_an_unmasked_stage_on_images_and_videos(clips, pictures, starts, tmp_path):
    options = ("--data", clips, "--more-data", pictures, "--on-broken-video", "skip", "--report-to", "none")
    options += ("--log-steps", 1, "--max-text-length", 8, "--max-grad-norm", 1)
    masks = ("--teacher", starts / "clip", "--video-mask-type", "attention", "--image-mask-type", "random")
    begin = ("--vision", starts / "vision", "--text", starts / "text", "--fusion-layer", 1, "--num-frames", 4)
    common = (*options, "--output-dir", tmp_path / "masked", "--batch-size", 8, "--epochs", 2, "--drop-path-rate", 0.1)
    text = assert_finished(launch("pretrain_video_text.py", 2, *common, *masks, *begin, "--num-sample", 2))
    found = summary(tmp_path / "masked")
    assert found["steps"] == 2 * (64 // 16 + 32 // 16) and found["evaluated"] == 24
    assert {path.rsplit("/", 1)[-1] for path in found["broken"]} == {"truncated.mp4", "text.mp4"}
    assert "not a video" in text and 1 <= found["metrics"]["text_to_video_median_rank"] <= 24
    for line in losses(tmp_path / "masked"):
        parts = [line[f"loss_{name}"] for name in ("contrastive", "matching", "masked_lm", "alignment")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-3) and min(parts) > 0
    cut = [line["cut_texts"] for line in losses(tmp_path / "masked")]
    assert min(cut) < max(cut) == 1  # those of pictures are shorter

    recipe = tmp_path / "unmasked.yaml"
    recipe.write_text(
        "epochs: 1\nlearning_rate: 1.0e-4\nmin_crop_area: 0.5\nflip: true\ngradient_checkpointing: true\n"
    )
    last = ("--model", tmp_path / "masked" / "last", "--recipe", recipe, "--warmup-epochs", 0, "--ema-decay", 0.9)
    last += ("--mixed-precision", "bf16", "--mlm-probability", 0, "--num-frames", 6, "--batch-size", 16)
    assert_finished(call("pretrain_video_text.py", *options, *last, "--output-dir", tmp_path / "unmasked"))
    names = {name for line in losses(tmp_path / "unmasked") for name in line if name.startswith("loss_")}
    assert names == {"loss_contrastive", "loss_matching"} and summary(tmp_path / "unmasked")["steps"] == 6

    model = AutoModel.from_pretrained(tmp_path / "unmasked" / "best")
    assert type(model) is VideoMambaForVideoTextRetrieval and model.config.fusion_layer == 1
    vision = model.config.vision_config
    assert (vision.num_frames, vision.alignment_size, vision.drop_path_rate) == (6, 16, 0.1)
    processor = AutoProcessor.from_pretrained(tmp_path / "unmasked" / "best")
    assert processor.video_processor.num_frames == 6 and dict(processor.video_processor.size)["height"] == 32
    backend = processor.tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    assert processor.tokenizer.get_vocab() == BertTokenizer.from_pretrained(starts / "text").get_vocab()
    card = ModelCard.load(tmp_path / "masked" / "best" / "README.md")
    assert "Text to video, recall at 1" in card.text and "from `vision`" in card.text and str(tmp_path) not in card.text
    assert card.data.pipeline_tag == "feature-extraction"
    assert "text_to_video_r1" in {result.metric_type for result in card.data.eval_results}


@pytest.mark.slow
def test_kills_change_nothing(clips, pictures, config, tmp_path):
    """Two processes, steps of batches of two kinds, a tokenizer made of the captions, averaged weights."""
    options = ("--data", clips, "--more-data", pictures, "--config", config, "--on-broken-video", "skip", "--resume")
    options += ("--report-to", "none", "--save-steps", 2, "--epochs", 3, "--batch-size", 4, "--drop-path-rate", 0.2)
    options += ("--min-crop-area", 0.5, "--video-mask-type", "tube", "--ema-decay", 0.9)
    options += ("--gradient-accumulation-steps", 2)

    def command(name):
        return launched("pretrain_video_text.py", 2, *options, "--output-dir", tmp_path / name)

    assert_finished(run(*command("whole")))
    process, states = start(*command("killed")), tmp_path / "killed" / "states"
    wait_until(lambda: list(states.glob("step-*")), process)
    time.sleep(random.Random(0).uniform(0, 0.3))
    assert process.poll() is None, "the run has ended before it was killed"
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.communicate()
    assert "resumed after step" in assert_finished(run(*command("killed")))
    for name in ("last", "best"):
        whole, killed = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "killed"))
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert summary(tmp_path / "whole")["metrics"] == summary(tmp_path / "killed")["metrics"]


@pytest.fixture(scope="module")
def learned(clips, config, tmp_path_factory):
    """A model that has been trained on 32 clips alone, and a list of these."""
    folder = tmp_path_factory.mktemp("learned")
    lines = first_lines(clips)
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "caption"], *([line["path"], line["caption"]] for line in lines)])
    options = ("--data", folder, "--data-root", clips, "--config", config, "--epochs", 60, "--evaluation-epochs", 60)
    options += ("--learning-rate", 4e-3, "--batch-size", 16, "--max-grad-norm", 1, "--report-to", "none")
    options += ("--warmup-epochs", 5, "--output-dir", folder / "model", "--num-workers", 0)
    assert_finished(call("pretrain_video_text.py", *options))
    return folder


def first_lines(clips, number=32):
    return [json.loads(line) for line in (clips / "train.jsonl").read_text().splitlines()[:number]]


def test_it_learns_what_clips_show(learned, clips):
    metrics = summary(learned / "model")["metrics"]
    assert metrics["text_to_video_r1"] > 15 and metrics["video_to_text_r1"] > 15  # of 3 by chance
    first, last = losses(learned / "model")[0], losses(learned / "model")[-1]
    for name in ("loss_contrastive", "loss_matching", "loss_masked_lm"):
        assert last[name] < 0.97 * first[name], name
    assert last["loss_contrastive"] < 0.6 * first["loss_contrastive"]


def test_the_zero_shot_pipeline_of_a_trained_model(learned, clips):
    """With its own code, from the directory that the script has left."""
    assert AutoProcessor.from_pretrained(learned / "model" / "last").tokenizer.model_max_length == 32
    lines = first_lines(clips)
    scores, _ = brute_force(learned / "model" / "last", clips, lines)
    classifier = pipeline("zero-shot-video-classification", str(learned / "model" / "last"), trust_remote_code=True)
    labels = [line["caption"] for line in lines]
    videos = [str(clips / line["path"]) for line in lines[:4]]
    found = classifier(videos, candidate_labels=labels, hypothesis_template="{}", top_k=1)
    assert [best[0]["label"] for best in found] == [labels[index] for index in scores[:4].argmax(1).tolist()]
    probabilities = scores[:4].softmax(1).amax(1).tolist()
    assert [best[0]["score"] for best in found] == pytest.approx(probabilities, rel=1e-3)


def archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, source in files:
            tar.add(source, name)


def test_streams_of_images_and_videos(clips, pictures, config, starts, tmp_path):
    entries = json.loads((pictures / "train.json").read_text())
    for name in ("videos", "images"):
        (tmp_path / name).mkdir()
    for shard in range(2):
        files = []
        for index in range(shard, 16, 2):
            caption = tmp_path / f"{index}.txt"
            caption.write_text(json.loads((clips / "train.jsonl").read_text().splitlines()[index])["caption"])
            files += [(f"{index}.mp4", clips / "train" / f"{index:05}.mp4"), (f"{index}.txt", caption)]
        archive(tmp_path / "videos" / f"train-{shard}.tar", files)
        files = []
        for index in range(shard, 16, 2):
            captions = tmp_path / f"{index}.json"
            captions.write_text(json.dumps({"captions": entries[index]["caption"]}))
            files += [(f"{index}.png", pictures / entries[index]["image"]), (f"{index}.json", captions)]
        archive(tmp_path / "images" / f"train-{shard}.tar", files)
    options = ("--data", tmp_path / "videos", "--more-data", tmp_path / "images", "--evaluation-data", clips)
    options += ("--streaming", "--steps-per-epoch", 4, "--image-share", 0.25, "--epochs", 2, "--batch-size", 4)
    options += ("--config", config, "--tokenizer", starts / "text", "--num-workers", 1, "--log-steps", 1)
    options += ("--warmup-epochs", 0, "--on-broken-video", "skip", "--evaluation-examples", 12, "--report-to", "none")
    assert_finished(call("pretrain_video_text.py", *options, "--output-dir", tmp_path / "model"))
    assert summary(tmp_path / "model")["steps"] == 8 and summary(tmp_path / "model")["evaluated"] in (11, 12)


def test_what_is_wrong_is_explained(clips, pictures, config, starts, tmp_path, exit_of):
    def fails(message, *options):
        assert message in exit_of(pretrain_video_text, *options, "--output-dir", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    common = ("--data", clips, "--config", config)
    fails("pass one of --model, --config and --vision, got none", "--data", clips)
    fails("--vision and --text go together", "--data", clips, "--vision", "v")
    fails("--fusion-layer 2 is for --text", *common, "--fusion-layer", 2)
    fails("--tokenizer t is for --config", "--data", clips, "--model", "m", "--tokenizer", "t")
    fails("must be a model of videos and texts", "--data", clips, "--model", starts / "vision")
    fails("--max-text-length must be at most 32, got 40", *common, "--max-text-length", 40)
    fails("not one batch of images", *common, "--more-data", pictures, "--batch-size", 40)
    fails("must have a split validation or test", "--data", pictures, "--config", config)
    fails("--streaming needs", *common, "--streaming")
    fails("--image-share 0.2 is for --streaming of both", *common, "--image-share", 0.2)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "train.csv").write_text("path,title\nx.mp4,y\n")
    fails("must have one of the columns `captions`, `caption`", "--data", tmp_path / "none", "--config", config)
    small = json.loads(config.read_text())
    small["text_config"]["vocab_size"] = 9
    (tmp_path / "small.json").write_text(json.dumps(small))
    options = ("--data", clips, "--config", tmp_path / "small.json", "--tokenizer", starts / "text")
    fails("the tokenizer knows", *options)


def test_values_out_of_range_are_explained():
    with pytest.raises(ValueError, match="`image_mask_ratio` 0.3 is for a `image_mask_type`"):
        VideoTextArguments(image_mask_ratio=0.3)
    for name, value in (("video_mask_ratio", 1.0), ("mlm_probability", 1.0), ("max_text_length", 2)):
        with pytest.raises(ValueError, match=f"`{name}` must be at least .*, got {value}"):
            VideoTextArguments(**{name: value})
    with pytest.raises(ValueError, match="`image_mask_type` attention is that of a `teacher`"):
        VideoTextArguments(image_mask_type="attention")
    with pytest.raises(ValueError, match="--image-share must be between 0 and 1, got 0"):
        CaptionedDataArguments("x", image_share=0)
    with pytest.raises(ValueError, match="got model and vision"):
        VideoTextModelArguments(model="m", vision="v", text="t")


def test_a_tokenizer_of_captions_knows_their_words():
    tokenizer = make_tokenizer(["A red seven moves up", "a blue seven moves"], 100)
    assert tokenizer.tokenize("a seven moves") == ["a", "seven", "moves"]
    assert tokenizer.get_vocab() == make_tokenizer(["a red seven moves up", "a blue seven moves"], 100).get_vocab()
    assert tokenizer.mask_token_id == 4 and tokenizer("seven").input_ids[0] == tokenizer.cls_token_id


# evaluate_retrieval.py


def brute_force(folder, clips, lines):
    """Similarities and matching scores of all pairs, straight from the model."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[line["caption"] for line in lines], padding=True, return_tensors="pt")
    pixels = processor(videos=[str(clips / line["path"]) for line in lines], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model(pixels, **inputs).logits_per_video
        videos = model.get_video_features(pixels).last_hidden_state
        texts = model.get_text_features(**inputs).last_hidden_state
        matches = [
            model.matching_logits_of_encoded(video.expand(len(texts), -1, -1), texts, inputs["attention_mask"])[:, 1]
            for video in videos
        ]
    return scores, torch.stack(matches)


def ranks(scores):
    return [(row > row[index]).sum().item() for index, row in enumerate(scores)]


@pytest.mark.slow
def test_retrieval_is_that_of_all_pairs(learned, clips, tmp_path):
    lines = first_lines(clips)
    scores, matches = brute_force(learned / "model" / "last", clips, lines)
    options = (learned / "model" / "last", "--data", learned, "--data-root", clips, "--num-workers", 1)
    options += ("--batch-size", 5, "--top-k", 10)
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        command = ("evaluate_retrieval.py", *options, "--output-dir", output)
        text = assert_finished(call(*command) if processes == 1 else launch(command[0], processes, *command[1:]))
        assert "32 videos, 32 texts" in text
        found = json.loads((output / "metrics.json").read_text())
        for way, table in (("video_to_text", scores), ("text_to_video", scores.T)):
            expected = np.array(ranks(table))
            for k in (1, 5, 10):
                assert found["dual_encoder"][f"{way}_r{k}"] == pytest.approx(100 * (expected < k).mean())
            assert found["dual_encoder"][f"{way}_median_rank"] == np.median(expected) + 1
        for way, table, by in (("video_to_text", scores, matches), ("text_to_video", scores.T, matches.T)):
            first = table >= table.topk(10, dim=1).values[:, -1:]
            expected = np.array(ranks(torch.where(first, by + 1000, table)))
            for k in (1, 5, 10):
                assert found["top_10_by_fusion"][f"{way}_r{k}"] == pytest.approx(100 * (expected < k).mean(), abs=3.2)

    # what is encoded is not encoded again, also where some of it is missing, and by another number of processes
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "2" / "videos").iterdir()}
    lost = next(iter(before))
    lost.unlink()
    assert_finished(call("evaluate_retrieval.py", *options, "--output-dir", tmp_path / "2"))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "2" / "videos").iterdir()}
    assert {path for path in after if path in before} == set(before) - {lost}
    assert all(after[path] == before[path] for path in set(before) - {lost})
    assert set(TensorStore(tmp_path / "2" / "videos").places()) == {str(index) for index in range(32)}
    first, second = ((tmp_path / name / "metrics.json").read_text() for name in ("1", "2"))
    assert first == second


@pytest.mark.slow
def test_the_small_model_reaches_its_recall_on_captions_it_never_saw(tmp_path):
    """Each test clip has a caption of its own, and none that a training clip has."""
    assert_finished(call("make_moving_digits.py", tmp_path, "--captions", "--train-clips", 1500))
    captions = {
        split: [json.loads(line)["caption"] for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    assert len(set(captions["test"])) == len(captions["test"]) == 512
    assert len(set(captions["train"])) == 1408 and not set(captions["test"]) & set(captions["train"])
    options = ("--data", tmp_path, "--output-dir", tmp_path / "results", "--num-workers", 0)
    assert_finished(call("evaluate_retrieval.py", NANO_VIDEO_TEXT, *options))
    found = json.loads((tmp_path / "results" / "metrics.json").read_text())
    card = (NANO_VIDEO_TEXT / "README.md").read_text()
    for row in re.findall(r"\| (text to video|video to text), recall at (\d) \|.*?\| (.*?) % \| (.*?) % \|\n", card):
        name = f"{row[0].replace(' ', '_')}_r{row[1]}"
        assert found["dual_encoder"][name] == pytest.approx(float(row[2]), abs=1), name
        assert found["top_128_by_fusion"][name] == pytest.approx(float(row[3]), abs=1), name


def test_retrieval_with_annotations_of_a_benchmark(learned, clips, tmp_path, exit_of, monkeypatch, capsys):
    lines = first_lines(clips, 6)
    videos = {f"v_{index}": line for index, line in enumerate(lines)}
    (tmp_path / "videos").mkdir()
    annotations = {}
    for name, line in videos.items():
        shutil.copy(clips / line["path"], tmp_path / "videos" / f"{name}.mp4")
        words = line["caption"].split(", ")
        annotations[name] = {"duration": 2.0, "timestamps": [[0, 1]] * len(words), "sentences": words}
    (tmp_path / "videos" / "v_0.mp4").write_text("no video")
    annotations["v_gone"] = {"duration": 2.0, "timestamps": [[0, 1]], "sentences": ["gone"]}
    (tmp_path / "val_1.json").write_text(json.dumps(annotations))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    common = (learned / "model" / "last", "--annotations", tmp_path / "val_1.json", "--videos", tmp_path / "videos")
    common += ("--num-workers", 0, "--first-seconds", 1, "--max-text-length", 6)
    assert "1 of the 7 videos" in exit_of(evaluate_retrieval, *common, "--output-dir", tmp_path / "raise")
    for paragraphs, texts in (((), 15), (("--paragraphs",), 5)):
        output = tmp_path / f"{texts}"
        options = ("--on-broken-video", "skip", *paragraphs, "--output-dir", output, "--top-k", 0)
        text = assert_finished(call("evaluate_retrieval.py", *common, *options))
        found = json.loads((output / "metrics.json").read_text())
        assert (found["videos"], found["texts"]) == (5, texts) and set(found) >= {"dual_encoder", "cut_texts"}
        assert "left out: v_gone: no such file below" in text and "v_0.mp4: not a video" in text
        assert len(found["broken"]) == 2 and found["cut_texts"] == 5
    other = ("--output-dir", tmp_path / "5", "--on-broken-video", "skip", "--top-k", 0)
    message = exit_of(evaluate_retrieval, *common, *other)
    assert "other settings: texts 6 (" in message and "paragraphs True -> False" in message


def test_retrieval_explains_what_it_lacks(learned, clips, starts, tmp_path, exit_of):
    def fails(message, *options):
        assert message in exit_of(evaluate_retrieval, *options, "--output-dir", tmp_path / "out")

    model = learned / "model" / "last"
    fails("pass one of --data and --annotations", model)
    fails("--annotations and --videos go together", model, "--annotations", "x")
    fails("--names x is for --annotations", model, "--data", clips, "--names", "x")
    fails("--split x is for --data", model, "--annotations", "x", "--videos", "y", "--split", "x")
    fails("--top-k must be at least 0, got -1", model, "--data", clips, "--top-k", -1)
    fails("must be a model of videos and texts", starts / "vision", "--data", clips)
    fails("--max-text-length must be at most 32, got 64", model, "--data", clips, "--max-text-length", 64)
    fails("text.mp4: not a video", model, "--data", clips, "--num-workers", 0)
    message = exit_of(evaluate_retrieval, model, "--data", clips, "--num-workers", 1, "--output-dir", tmp_path / "w")
    assert message.startswith("error: ") and "text.mp4: not a video" in message
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "test.csv").write_text("path,caption\nx.mp4,\n")
    fails("x.mp4 must have captions, and none that is empty", model, "--data", tmp_path / "empty")
