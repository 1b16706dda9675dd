"""Videos and texts in one model: parity with the original, objectives on one and on two processes, processor."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoProcessor, BertConfig, BertForMaskedLM, BertTokenizer

from modeling_videomamba import (
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoTextRetrieval,
    VideoMambaProcessor,
    VideoMambaVideoProcessor,
    VideoMambaVideoTextConfig,
)
from modeling_videomamba.conversion import convert_checkpoint
from modeling_videomamba.video_text_losses import (
    contrastive_loss,
    draw_negatives,
    hard_negative_weights,
    masked_lm_loss,
    similarities,
)
from tests.conftest import ROOT, TINY, load_golden, strip_prefix, tiny_config
from tests.models import video as clips

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "seven", "moves", "up", "left", "fast", "slowly"]
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 16,
}


def video_text_config(vision=None, **changes):
    vision = {**TINY, "alignment_size": 24, **(vision or {})}
    return VideoMambaVideoTextConfig(
        **{"vision_config": vision, "text_config": TEXT, "fusion_layer": 2, "projection_dim": 8, **changes}
    )


def build(**changes):
    torch.manual_seed(0)
    return VideoMambaForVideoTextRetrieval(video_text_config(**changes)).eval()


def texts(batch=2, length=6, seed=0):
    """Token ids, the last of them padding in every text but the first."""
    input_ids = torch.randint(5, len(WORDS), (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(input_ids)
    mask[1:, -1] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# Parity with the original


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The converted model, what goes in, and what the original made of it."""
    tensors, _ = load_golden("video_text_retrieval")
    folder = tmp_path_factory.mktemp("original")
    torch.save({"model": strip_prefix(tensors, "state_dict.")}, folder / "checkpoint.pth")
    convert_checkpoint(folder / "checkpoint.pth", text_num_attention_heads=4).save_pretrained(folder / "model")
    model = AutoModel.from_pretrained(folder / "model").eval()
    assert type(model) is VideoMambaForVideoTextRetrieval
    return model, strip_prefix(tensors, "input."), strip_prefix(tensors, "output.")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_features_are_those_of_the_original(golden, grad):
    model, given_, expected = golden
    with torch.set_grad_enabled(grad):
        videos = model.get_video_features(given_["pixel_values"])
        texts = model.get_text_features(given_["input_ids"], given_["attention_mask"])
        images = model.get_video_features(given_["pixel_values"][:, 0])
    assert_close(videos.last_hidden_state, expected["vision_embeds"])
    assert_close(videos.pooler_output, expected["vision_proj"])
    assert_close(texts.last_hidden_state, expected["text_embeds"])
    assert_close(texts.pooler_output, expected["text_proj"])
    assert_close(images.last_hidden_state, expected["image_vision_embeds"])
    pooled = expected["image_pooled_vision_embeds"]
    assert_close(images.pooler_output, model.video_projection(pooled))


@torch.no_grad()
def test_losses_and_logits_are_those_of_the_original(golden):
    model, given_, expected = golden
    pairs = [given_[name] for name in ("pixel_values", "input_ids", "attention_mask")]
    mlm = {name: given_[name] for name in ("mlm_input_ids", "mlm_labels")}
    outputs = model(*pairs, video_ids=given_["video_index"], **mlm, return_loss=True)
    assert_close(outputs.logits_per_video, expected["sim_v2t"])
    assert_close(outputs.logits_per_text, expected["sim_t2v"])
    assert_close(outputs.loss_contrastive, expected["loss_vtc"])
    assert_close(outputs.loss_masked_lm, expected["loss_mlm"])
    same = given_["video_index"][:, None] == given_["video_index"]
    assert_close(hard_negative_weights(outputs.logits_per_video, same), expected["hard_negative_weights_v2t"])
    assert_close(hard_negative_weights(outputs.logits_per_text, same), expected["hard_negative_weights_t2v"])
    videos, texts = expected["vision_embeds"], expected["text_embeds"]
    assert_close(model.fuse(videos, texts, pairs[2]), expected["fusion_last_hidden_state"])
    assert_close(model.matching_logits(*pairs), expected["match_logits"])
    negatives = given_["negative_index"], given_["negative_index"]
    assert_close(model.matching_loss(videos, texts, pairs[2], *negatives), expected["loss_vtm_fixed_negatives"])
    assert_close(model.masked_lm_logits(videos, mlm["mlm_input_ids"], pairs[2]), expected["mlm_logits"])


# The model


def test_all_losses_have_a_sum_and_reach_all_parameters():
    model = build(vision={"num_aligned_layers": 2}).train()
    batch = texts(4)
    labels = batch["input_ids"].masked_fill(torch.arange(6) % 2 == 0, -100)
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, ::2] = True
    outputs = model(
        clips(4),
        **batch,
        video_ids=torch.tensor([0, 1, 1, 2]),
        mlm_input_ids=batch["input_ids"].masked_fill(labels != -100, 4),
        mlm_labels=labels,
        teacher_features=F.normalize(torch.randn(2, 4, 9, 24), dim=-1),
        bool_masked_pos=hidden,
        return_loss=True,
    )
    outputs.loss.backward()
    losses = [outputs.loss_contrastive, outputs.loss_matching, outputs.loss_masked_lm, outputs.loss_alignment]
    torch.testing.assert_close(outputs.loss, torch.stack(losses).sum())
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_hidden_tokens_play_no_part_and_frames_keep_their_means():
    model = build()
    pixel_values, hidden = clips(2), torch.zeros(2, 16, dtype=torch.bool)
    everything = model.get_video_features(pixel_values)
    same = model.get_video_features(pixel_values, hidden)
    torch.testing.assert_close(same.pooler_output, everything.pooler_output)
    hidden[0, [0, 1, 2, 5]], hidden[1, [4, 5, 6, 7]] = True, True  # of the second sample a whole frame
    visible = model.get_video_features(pixel_values, hidden)
    assert visible.last_hidden_state.shape == (2, 12, 32) and visible.pooler_output.shape == (2, 4, 8)
    tokens = model.videomamba(pixel_values, hidden).last_hidden_state
    first = model.video_norm(tokens[0, 0] + torch.stack([tokens[0, 1], tokens[0, 2:5].mean(0)]))
    torch.testing.assert_close(visible.pooler_output[0, :2], model.video_projection(first), rtol=1e-4, atol=1e-5)
    empty = model.video_projection(model.video_norm(tokens[1, 0]))
    torch.testing.assert_close(visible.pooler_output[1, 1], empty, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooling", "vectors"), [("cls+avg", 4), ("avg", 4), ("cls", 1)])
@torch.no_grad()
def test_pooling(pooling, vectors):
    model = build(pooling=pooling)
    tokens = model.videomamba(clips()).last_hidden_state
    class_token, means = tokens[:, :1], tokens[:, 1:].unflatten(1, (4, 4)).mean(2)
    expected = {"cls+avg": class_token + means, "avg": means, "cls": class_token}[pooling]
    features = model.get_video_features(clips()).pooler_output
    assert features.shape == (2, vectors, 8)
    torch.testing.assert_close(features, model.video_projection(model.video_norm(expected)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_and_other_pairs_change_nothing():
    model, pixel_values, batch = build(), clips(3), texts(3, 8)
    whole = model(pixel_values, **batch)
    matching = model.matching_logits(pixel_values, **batch)
    longer = {name: F.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    torch.testing.assert_close(model(pixel_values, **longer).text_embeds, whole.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.matching_logits(pixel_values, **longer), matching, rtol=1e-4, atol=1e-5)
    alone = model.matching_logits(pixel_values[1:2], **{name: tensor[1:2] for name, tensor in batch.items()})
    torch.testing.assert_close(alone, matching[1:2], rtol=1e-4, atol=1e-5)
    several = model(pixel_values[:1], **batch)  # one video and the names of three classes
    torch.testing.assert_close(several.logits_per_video, whole.logits_per_video[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(several.logits_per_text, several.logits_per_video.T)
    cosines = torch.einsum("vfd,td->vtf", whole.video_embeds, whole.text_embeds).mean(-1)
    torch.testing.assert_close(whole.logits_per_video, cosines / 0.07, rtol=1e-4, atol=1e-4)


def test_a_pair_that_does_not_count_changes_nothing():
    pixel_values, batch = clips(4), texts(4)
    labels = batch["input_ids"]
    mlm = {"mlm_input_ids": labels, "mlm_labels": labels}
    model, names = build(), ("loss_contrastive", "loss_masked_lm")
    ids = torch.tensor([3, -1, 3, 5])
    outputs = model(pixel_values, **batch, video_ids=ids, **mlm, return_loss=True)
    kept = [0, 2, 3]
    rest = {name: tensor[kept] for name, tensor in {**batch, **mlm}.items()}
    expected = model(pixel_values[kept], **rest, video_ids=ids[kept], return_loss=True)
    for name in names:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
    nothing = model(pixel_values, **batch, video_ids=torch.full((4,), -1), **mlm, return_loss=True)
    nothing.loss.backward()
    assert nothing.loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_the_temperature_acts_within_its_bounds(training):
    model = build().train(training)
    for value, bound in ((-1.0, 0.001), (0.1, 0.1), (3.0, 0.5)):
        with torch.no_grad():
            model.temperature.fill_(value)
        first, second = (model(clips(), **texts(), return_loss=True) for _ in range(2))
        cosines = similarities(first.video_embeds, first.text_embeds)
        torch.testing.assert_close(first.logits_per_video, cosines / bound, rtol=1e-4, atol=1e-4)
        (first.loss + second.loss).backward()  # several forward passes before a backward pass
        assert model.temperature.grad.isfinite() and model.temperature.grad != 0


def test_losses_come_first_in_a_tuple():
    batch = texts(3)
    mlm = {"mlm_input_ids": batch["input_ids"], "mlm_labels": batch["input_ids"]}
    outputs = build()(clips(3), **batch, **mlm, return_loss=True)
    assert list(outputs)[:4] == ["loss", "loss_contrastive", "loss_matching", "loss_masked_lm"]
    assert outputs[0] is outputs.loss


@torch.no_grad()
def test_attention_is_computed_as_one_chooses(tmp_path):
    model, pixel_values, batch = build(), clips(3), texts(3)
    expected = model.matching_logits(pixel_values, **batch)
    model.save_pretrained(tmp_path)
    for loaded in (
        VideoMambaForVideoTextRetrieval.from_pretrained(tmp_path, attn_implementation="eager"),
        VideoMambaForVideoTextRetrieval.from_pretrained(tmp_path, attn_implementation="sdpa"),
    ):
        for name in ("eager", "sdpa"):
            loaded.set_attn_implementation(name)
            assert loaded.fusion_layers[0].crossattention.self.config._attn_implementation == name
            torch.testing.assert_close(loaded.matching_logits(pixel_values, **batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    batch = texts(3)
    mlm = {"mlm_input_ids": batch["input_ids"], "mlm_labels": batch["input_ids"]}
    expected = build()(clips(3), **batch, **mlm, return_loss=True)
    half = build().to(dtype)(clips(3).to(dtype), **batch, **mlm, return_loss=True)
    with torch.autocast("cpu", dtype=dtype):
        autocast = build()(clips(3), **batch, **mlm, return_loss=True)
    for outputs in (half, autocast):
        assert (outputs.video_embeds - expected.video_embeds).abs().max() < 3e-2
        assert abs(outputs.loss_contrastive - expected.loss_contrastive) < 5e-2 * expected.loss_contrastive
        outputs.loss.backward()


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model.masked_lm_logits(model.get_video_features(clips()).last_hidden_state, **texts()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_words_can_be_added():
    model = build()
    model.resize_token_embeddings(20)
    assert model.config.text_config.vocab_size == model.text_model.config.vocab_size == 20
    logits = model.masked_lm_logits(model.get_video_features(clips()).last_hidden_state, **texts())
    assert logits.shape == (2, 6, 20)


def test_one_video_goes_with_all_texts():
    model, inputs = build(initializer_range=0.5), texts(3)
    with torch.no_grad():
        tokens = model.get_video_features(clips(batch=1)).last_hidden_state
        states = model.get_text_features(**inputs).last_hidden_state
        one = model.matching_logits_of_encoded(tokens, states, inputs["attention_mask"])
        several = model.matching_logits_of_encoded(tokens.expand(3, -1, -1), states, inputs["attention_mask"])
    assert len(one.unique(dim=0)) == 3
    torch.testing.assert_close(one, several)


def test_wrong_arguments_are_refused():
    model, batch = build(), texts()
    for wrong, message in (
        ({"video_ids": torch.arange(2)}, "`video_ids` is for the losses: pass `return_loss=True`"),
        ({"mlm_input_ids": batch["input_ids"], "return_loss": True}, "`mlm_input_ids` and `mlm_labels` go together"),
        ({"video_ids": torch.arange(3), "return_loss": True}, r"`video_ids` must be int64 of shape \(2,\), got"),
        ({"video_ids": torch.ones(2), "return_loss": True}, "got torch.float32"),
        (
            {"mlm_input_ids": torch.ones(2, 8), "mlm_labels": batch["input_ids"], "return_loss": True},
            r"`mlm_input_ids` must have the shape of `input_ids`, \(2, 6\), got \(2, 8\)",
        ),
        ({"bool_masked_pos": torch.zeros(2, 5, dtype=torch.bool)}, "`bool_masked_pos` must be boolean"),
    ):
        with pytest.raises(ValueError, match=message):
            model(clips(), **batch, **wrong)
    with pytest.raises(ValueError, match="must be as many as `pixel_values`, 3, got 2"):
        model(clips(3), **batch, return_loss=True)
    with pytest.raises(ValueError, match="`teacher_features` must be of shape"):
        model(clips(), **batch, teacher_features=torch.rand(1, 2, 3, 24), return_loss=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fusion_layer": 4}, r"`fusion_layer` must be below the layers of `text_config` \(4\), got 4"),
        ({"temperature": 0.6}, "`temperature` must be from 0.001 to 0.5, got 0.6"),
        ({"pooling": "max"}, "pooling"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"text_config": {**TEXT, "is_decoder": True}}, "`text_config` must be of an encoder, got `is_decoder`"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(StrictDataclassError, match=message):
        video_text_config(**wrong)


def test_towers_of_other_models_are_refused():
    with pytest.raises(ValueError, match="`text_config` must be a BertConfig or its values, got those of 'videomamba'"):
        video_text_config(text_config=tiny_config())
    with pytest.raises(ValueError, match="`text_config` must be a BertConfig or its values, got those of 'roberta'"):
        video_text_config(text_config={**TEXT, "model_type": "roberta"})


def test_a_model_of_two_towers_has_their_weights(tmp_path):
    torch.manual_seed(0)
    vision = VideoMambaForMaskedPreTraining(tiny_config(alignment_size=24))
    vision.save_pretrained(tmp_path / "vision")
    bert = BertForMaskedLM(BertConfig(**TEXT))
    bert.save_pretrained(tmp_path / "bert")
    model = VideoMambaForVideoTextRetrieval.from_video_text_pretrained(
        tmp_path / "vision", tmp_path / "bert", fusion_layer=3, projection_dim=8
    )
    assert (model.config.fusion_layer, model.config.projection_dim, len(model.fusion_layers)) == (3, 8, 1)
    weights = model.state_dict()
    for name, tensor in vision.state_dict().items():
        assert torch.equal(weights[name], tensor)
    for name, tensor in bert.state_dict().items():
        name = name.replace("bert.encoder.layer.3.", "fusion_layers.0.").replace("cls.", "masked_lm_head.")
        assert torch.equal(weights[name.replace("bert.", "text_model.")], tensor), name
    assert model.config.tie_word_embeddings
    head = model.masked_lm_head.predictions
    assert head.decoder.weight is model.text_model.embeddings.word_embeddings.weight
    vision.videomamba.save_pretrained(tmp_path / "encoder")
    model = VideoMambaForVideoTextRetrieval.from_video_text_pretrained(
        tmp_path / "encoder", tmp_path / "bert", fusion_layer=3
    )
    assert torch.equal(model.videomamba.norm.weight, vision.videomamba.norm.weight)
    model = VideoMambaForVideoTextRetrieval.from_video_text_pretrained(
        tmp_path / "vision", tmp_path / "bert", fusion_layer=3, vision_drop_path_rate=0.3, text_hidden_dropout_prob=0.2
    )
    assert (model.videomamba.config.drop_path_rate, model.text_model.config.hidden_dropout_prob) == (0.3, 0.2)
    with pytest.raises(ValueError, match="`text_config` must be a BertConfig"):
        VideoMambaForVideoTextRetrieval.from_video_text_pretrained(tmp_path / "vision", tmp_path / "vision")


# Objectives


def features(pairs, frames=2, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    videos = F.normalize(torch.randn(pairs, frames, size, generator=generator), dim=-1)
    return videos, F.normalize(torch.randn(pairs, size, generator=generator), dim=-1)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.integers(0, 1000))
def test_the_contrastive_loss_is_its_definition(ids, seed):
    videos, texts = features(len(ids), seed=seed)
    loss = contrastive_loss(videos, texts, 0.1, torch.tensor(ids))
    scores = (similarities(videos, texts) / 0.1).double()
    rows = [row for row, identity in enumerate(ids) if identity >= 0]
    expected = 0.0
    for table in (scores, scores.T):
        for row in rows:
            right = [other for other in rows if ids[other] == ids[row]]
            log_probabilities = table[row, rows].log_softmax(0)
            expected -= sum(log_probabilities[rows.index(other)] for other in right) / len(right) / len(rows) / 2
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected).double(), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.07, 0.001]),
    st.integers(0, 1000),
)
def test_a_hard_negative_is_never_a_true_pair(ids, temperature, seed):
    ids = torch.tensor(ids)
    same = ids[:, None] == ids
    scores = similarities(*features(len(ids), seed=seed)) / temperature
    weights = hard_negative_weights(scores.fill_diagonal_(1 / temperature), same)
    assert not weights[same].any() and (weights[~same] > 0).all()
    torch.manual_seed(seed)
    for _ in range(5):
        for row, drawn in enumerate(draw_negatives(weights).tolist()):
            assert drawn == -1 if same[row].all() else drawn >= 0 and not same[row, drawn]


def test_hard_negatives_are_drawn_by_their_weights():
    weights = torch.tensor([[0.0, 0.75, 0.25]]).expand(4000, 3)
    torch.manual_seed(0)
    shares = draw_negatives(weights).bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, weights[0], rtol=0, atol=0.03)


def test_negatives_are_the_video_and_the_text_that_look_alike():
    draw = VideoMambaForVideoTextRetrieval._draw_negatives
    logits = torch.zeros(4, 4)  # videos by texts
    logits[0, 1] = logits[2, 0] = 60.0
    words = torch.arange(8).view(4, 2)
    videos, texts = draw(logits, words, None)
    assert (videos[0], texts[0]) == (2, 1)  # text 0 looks like video 2, video 0 like text 1
    for ids, others in (([5, -1, 6, 5], {2}), ([5, 6, -1, 5], {1}), ([5, -1, -1, 5], {-1})):
        videos, texts = draw(logits, words, torch.tensor(ids))  # neither the same video nor what doesn't count
        assert {int(videos[0]), int(texts[0])} == others
    words[1] = words[2] = words[0]  # nor the same text
    videos, texts = draw(logits, words, None)
    assert (videos[0], texts[0]) == (3, 3)


def test_masked_words_alone_are_judged():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[-100, 2, -100], [4, -100, 0]])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(masked_lm_loss(logits, labels), expected)
    assert masked_lm_loss(logits, torch.full((2, 3), -100)) == 0


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from modeling_videomamba.video_text_losses import contrastive_loss
from tests.test_modeling_videomamba_video_text import build, clips, texts

dist.init_process_group("gloo")
rank, ids = dist.get_rank(), torch.tensor([0, -1, 0, 2])
model, own = build(), slice(2 * rank, 2 * rank + 2)
parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
batch = {name: tensor[own] for name, tensor in texts(4).items()}
loss = parallel(clips(4)[own], **batch, video_ids=ids[own], return_loss=True).loss_contrastive
loss.backward()
losses = loss.detach().clone()
dist.all_reduce(losses)
without_ids = contrastive_loss(*[torch.eye(4)[own].unsqueeze(1), torch.eye(4)[own]], 0.5)
try:
    contrastive_loss(torch.ones(2 + rank, 1, 4), torch.ones(2 + rank, 4), 0.5)
    refused = ""
except ValueError as error:
    refused = str(error)
if rank == 0:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.save((losses / 2, gradients, without_ids, refused), sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_contrast_what_one_does(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path / "result.pt"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    loss, gradients, without_ids, refused = torch.load(tmp_path / "result.pt", weights_only=True)
    model = build()
    assert refused == "All processes must have the same number of pairs, got [2, 3]."
    expected = model(clips(4), **texts(4), video_ids=torch.tensor([0, -1, 0, 2]), return_loss=True).loss_contrastive
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)  # that of the biases of keys is rounding alone
            assert (gradients[name] - parameter.grad).abs().max() <= 1e-4 * scale, name
    torch.testing.assert_close(without_ids, contrastive_loss(torch.eye(4).unsqueeze(1), torch.eye(4), 0.5))


# Processor


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return VideoMambaProcessor(
        VideoMambaVideoProcessor.for_model(tiny_config()), BertTokenizer(str(tmp_path / "vocab.txt"))
    )


def test_a_directory_holds_a_model_and_its_processor(tmp_path, processor, video):
    model = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(loaded) is VideoMambaProcessor
    inputs = loaded(videos=str(video), text=["a seven", "moves up left"], padding=True, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"} == set(loaded.model_input_names)
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3, 0], [2, 7, 8, 9, 3]]
    with torch.no_grad():
        first, again = (which(**inputs) for which in (model, AutoModel.from_pretrained(tmp_path / "model")))
    assert first.logits_per_video.shape == (1, 2)
    torch.testing.assert_close(again.logits_per_video, first.logits_per_video, rtol=1e-5, atol=1e-6)
