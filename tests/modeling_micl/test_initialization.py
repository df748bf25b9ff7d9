"""The released program's initialisation, at construction and for whatever a checkpoint leaves open."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modeling_micl import MiclConfig, MiclForImageClassification, MiclForPreTraining, MiclModel
from modeling_micl.modeling_micl import sincos_position_embeddings


WIDTH, MLP, PATCH = 128, 256, 4
FAN_IN = 3 * PATCH * PATCH
XAVIER = {
    "q_proj": math.sqrt(6 / (4 * WIDTH)),
    "k_proj": math.sqrt(6 / (4 * WIDTH)),
    "v_proj": math.sqrt(6 / (4 * WIDTH)),
    "o_proj": math.sqrt(6 / (2 * WIDTH)),
    "fc1": math.sqrt(6 / (WIDTH + MLP)),
    "fc2": math.sqrt(6 / (WIDTH + MLP)),
    "projection": math.sqrt(6 / (WIDTH + FAN_IN)),
}


@pytest.fixture
def config(tiny_config: Callable[..., MiclConfig]) -> MiclConfig:
    return tiny_config(hidden_size=WIDTH, intermediate_size=MLP, patch_size=PATCH)


def assert_uniform(values: Tensor, bound: float) -> None:
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.9 * bound
    assert values.mean().abs() < 5 * bound / math.sqrt(3 * values.numel())
    # The standard deviation of n uniform numbers strays by sqrt(0.2 / n) of itself: five times that.
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(0.2 / values.numel()))


def assert_initialised(name: str, values: Tensor) -> None:
    *_, module, kind = name.split(".")
    if kind == "cls_token":
        assert values.std().item() == pytest.approx(0.02, rel=0.25)
    elif kind == "position_embeddings":
        assert torch.equal(values, sincos_position_embeddings(WIDTH, 8, 8))
    elif "norm" in module:
        assert torch.equal(values, torch.full_like(values, float(kind == "weight")))
    elif kind == "weight":
        assert_uniform(values, XAVIER[module])
    elif module == "projection":
        assert_uniform(values, 1 / math.sqrt(FAN_IN))
    else:
        assert not values.any()


def initialise_at_construction(config: MiclConfig, folder: Path) -> nn.Module:
    return MiclForPreTraining(config)


def initialise_on_the_meta_device(config: MiclConfig, folder: Path) -> nn.Module:
    with torch.device("meta"):
        model = MiclForPreTraining(config)
    model.to_empty(device="cpu").init_weights()
    return model


def initialise_all_that_a_folder_lacks(config: MiclConfig, folder: Path) -> nn.Module:
    """Load a checkpoint of one foreign weight."""
    model = MiclForPreTraining(config)
    model.save_pretrained(folder, state_dict={"foreign": torch.zeros(1)})
    return MiclForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize(
    "initialise", [initialise_at_construction, initialise_on_the_meta_device, initialise_all_that_a_folder_lacks]
)
def test_every_parameter_starts_as_in_the_released_program(
    initialise: Callable[[MiclConfig, Path], nn.Module], config: MiclConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    wrong = []
    for name, values in initialise(config, tmp_path).named_parameters():
        try:
            assert_initialised(name, values.detach())
        except AssertionError:
            wrong.append(name)
    assert wrong == []


def test_layers_that_a_checkpoint_lacks_start_as_in_the_released_program(config: MiclConfig, tmp_path: Path) -> None:
    saved = MiclForPreTraining(config)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    deeper = MiclForPreTraining.from_pretrained(tmp_path, num_hidden_layers=3)
    wrong = []
    for name, values in deeper.vit.layers[2].named_parameters():
        try:
            assert_initialised(name, values.detach())
        except AssertionError:
            wrong.append(name)
    assert wrong == []
    assert all(torch.equal(deeper.get_parameter(name), values) for name, values in saved.named_parameters())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fresh_classifier_starts_near_zero(pooling: str, config: MiclConfig, tmp_path: Path) -> None:
    MiclForPreTraining(config).save_pretrained(tmp_path)
    loaded = MiclForImageClassification.from_pretrained(tmp_path, num_labels=50, classifier_pooling=pooling)
    config.num_labels, config.classifier_pooling = 50, pooling
    for model in (loaded, MiclForImageClassification(config)):
        assert model.classifier.weight.std().item() == pytest.approx(2e-5, rel=0.05)
        assert not model.classifier.bias.any()


@pytest.mark.parametrize("image_size", [16, (24, 48)])
def test_another_image_size_gets_the_exact_table_of_its_grid(
    image_size: int | tuple[int, int], config: MiclConfig, tmp_path: Path
) -> None:
    MiclForPreTraining(config).save_pretrained(tmp_path)
    model = MiclModel.from_pretrained(tmp_path, image_size=image_size, ignore_mismatched_sizes=True)
    table = sincos_position_embeddings(WIDTH, *model.config.grid_size)
    assert torch.equal(model.embeddings.position_embeddings, table)
    assert not model.embeddings.position_embeddings.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loading_keeps_the_positions(dtype: torch.dtype, config: MiclConfig, tmp_path: Path) -> None:
    MiclForPreTraining(config).save_pretrained(tmp_path)
    positions = MiclForPreTraining.from_pretrained(tmp_path, dtype=dtype).vit.embeddings.position_embeddings
    assert torch.equal(positions, sincos_position_embeddings(WIDTH, 8, 8).to(dtype))


def test_the_position_table_has_the_width_half_first_and_no_position_for_cls() -> None:
    table = sincos_position_embeddings(8, 2, 3)[0]
    assert table.shape == (7, 8)
    assert not table[0].any()
    row, column = 1, 2
    expected = [
        *(math.sin(column), math.sin(column / 100)),
        *(math.cos(column), math.cos(column / 100)),
        *(math.sin(row), math.sin(row / 100)),
        *(math.cos(row), math.cos(row / 100)),
    ]
    assert table[1 + row * 3 + column].tolist() == pytest.approx(expected)


def test_the_seed_decides_the_initial_weights(config: MiclConfig) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(MiclForPreTraining(config).vit.layers[0].mlp.fc1.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
