import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_videomamba import VIDEOMAMBA_SIZES, VideoMambaConfig
from tests.conftest import tiny_config


def test_defaults_are_videomamba_tiny():
    config = VideoMambaConfig()
    assert {name: getattr(config, name) for name in VIDEOMAMBA_SIZES["tiny"]} == VIDEOMAMBA_SIZES["tiny"]
    assert (config.intermediate_size, config.time_step_rank, config.grid_size) == (384, 12, (14, 14))


def test_saving_and_loading_keeps_every_value(tmp_path):
    config = tiny_config(image_size=[32, 64], scan_order="spatiotemporal_v2", drop_path_rate=0.3, num_frames=None)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, VideoMambaConfig)
    ignored = {"transformers_version", "auto_map", "_name_or_path"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert loaded.grid_size == (2, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "192"),
        ("num_hidden_layers", -1),
        ("image_size", 100),
        ("image_size", 0),
        ("image_size", [224, 224, 224]),
        ("image_size", [224]),
        ("patch_size", 0),
        ("num_frames", 0),
        ("num_frames", 2.5),
        ("tubelet_size", 0),
        ("state_size", 0),
        ("time_step_rank", 0),
        ("time_step_rank", "automatic"),
        ("time_step_min", 0.0),
        ("time_step_min", 0.2),
        ("scan_order", "zigzag"),
        ("drop_path_rate", 1.0),
        ("drop_path_rate", -0.1),
        ("teacher_hidden_size", 0),
        ("problem_type", "ranking"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        VideoMambaConfig(**{field: value})


def test_frames_must_fill_tubelets():
    with pytest.raises(StrictDataclassError, match="num_frames.*tubelet_size.*3"):
        VideoMambaConfig(num_frames=8, tubelet_size=3)


def test_assignment_is_validated():
    config = VideoMambaConfig()
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        config.hidden_size = -5
