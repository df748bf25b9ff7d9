"""Pre-training that goes on from a stored encoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folder import course, same_weights
from torch import Tensor
from transformers import ViTConfig, ViTModel

from modeling_micl import MiclConfig, MiclForImageClassification, MiclForPreTraining, MiclModel
from training import pretrain
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.run import Run
from training.start import read_start


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]


@pytest.fixture
def stored(settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """Save a model with the geometry of the settings and weights that no run would start with by itself."""

    def save(kind: str = "encoder", **overrides: object) -> str:
        torch.manual_seed(123)
        values = {**settings().model_config().to_dict(), **overrides}
        if kind == "stock ViT":
            names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
            names += ("intermediate_size", "layer_norm_eps", "num_channels")
            model = ViTModel(ViTConfig(**{name: values[name] for name in names}), add_pooling_layer=False)
        else:
            models = {
                "encoder": MiclForPreTraining,
                "bare encoder": MiclModel,
                "classifier": MiclForImageClassification,
            }
            model = models[kind](MiclConfig(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def start_of(run_pretraining: Train, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights before the first step."""
    found: dict[str, Tensor] = {}

    def look(run: Run, *_: object) -> bool:
        found.update({name: value.clone() for name, value in run.unwrapped().vit.state_dict().items()})
        return False

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", look)
        run_pretraining(config)
    return found


@pytest.mark.parametrize("kind", ["encoder", "bare encoder", "classifier", "stock ViT"])
def test_a_run_starts_with_the_weights_it_is_given(
    kind: str,
    stored: Callable[..., str],
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(16)
    folder = stored(kind)
    start = start_of(run_pretraining, settings(init_from=folder), monkeypatch)
    weights = (ViTModel if kind == "stock ViT" else MiclModel).from_pretrained(folder).state_dict()
    own = {"pooler.dense.weight", "pooler.dense.bias"}  # what loading adds
    own |= {"layernorm.weight", "layernorm.bias"} if kind == "classifier" else set()  # its norm is the head's
    assert start.keys() >= weights.keys() - own
    assert all(torch.equal(start[name], weights[name]) for name in weights.keys() - own)
    assert "embeddings.position_embeddings" in start
    if kind == "classifier":
        assert torch.equal(start["layernorm.weight"], torch.ones(32))


def test_positions_that_were_learned_stay_as_they_are(
    stored: Callable[..., str], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(16)
    folder = stored("stock ViT")
    run = run_pretraining(settings(init_from=folder, epochs=2))
    before = ViTModel.from_pretrained(folder).embeddings
    after = MiclForPreTraining.from_pretrained(run / "model").vit.embeddings
    assert torch.equal(after.position_embeddings, before.position_embeddings)
    assert not torch.equal(after.cls_token, before.cls_token)


def test_another_geometry_is_refused_naming_both(stored: Callable[..., str], settings: Settings) -> None:
    folder = stored("stock ViT", layer_norm_eps=1e-12, patch_size=8)
    wanted = settings().model_config()
    with pytest.raises(
        ValueError, match="'.*stock ViT' has patch_size=8, layer_norm_eps=1e-12, but the settings give"
    ):
        read_start(folder, wanted)
    found = read_start(folder, settings(patch_size=[8], layer_norm_eps=1e-12).model_config())
    assert found.config.layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", [16, 20]),
        ("hidden_size", 64),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("intermediate_size", 64),
        ("qkv_bias", False),
        ("hidden_act", "relu"),
    ],
)
def test_every_difference_is_seen(name: str, value: object, stored: Callable[..., str], settings: Settings) -> None:
    folder, wanted = stored(**{name: value}), settings().model_config()
    with pytest.raises(ValueError, match=rf"--init_from .* has .*{name}=") as refused:
        read_start(folder, wanted)
    theirs, ours = str(refused.value).split("but the settings give")
    assert f"{name}={value}" in theirs
    assert f"{name}={getattr(wanted, name)}" in ours


def test_one_number_and_two_equal_ones_are_the_same_size(stored: Callable[..., str], settings: Settings) -> None:
    read_start(stored(image_size=16, patch_size=4), settings(image_size=[16, 16], patch_size=[4, 4]).model_config())


def test_the_objective_is_that_of_the_settings(
    stored: Callable[..., str], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(16)
    run = run_pretraining(settings(init_from=stored(temperature=0.5, num_views=3), max_steps=1))
    config = MiclForPreTraining.from_pretrained(run / "model").config
    assert (config.temperature, config.num_views) == (0.07, 2)


def test_a_place_without_a_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--init_from '.*' is no local path, and not a model on the Hub"):
        read_start(str(tmp_path / "nothing"), settings().model_config())


def test_resuming_goes_on_from_the_checkpoint_though_the_start_is_gone(
    stored: Callable[..., str], write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(24)
    write_shards(16, split="test")
    options = {"init_from": stored(), "knn_images": 16, "knn_epochs": 1}
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), max_steps=8, **options))
    run_pretraining(settings(output_dir=str(tmp_path / "parts"), max_steps=4, **options))
    shutil.rmtree(options["init_from"])
    parts = run_pretraining(settings(output_dir=str(tmp_path / "parts"), max_steps=8, **options))
    assert course(parts) == course(whole)
    assert same_weights(parts, whole)


def test_the_comparison_at_the_end_is_with_the_start_and_the_card_names_it(
    stored: Callable[..., str], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(40)
    write_shards(40, split="test")
    folder = stored()
    run = run_pretraining(settings(init_from=folder, knn_images=40, knn_epochs=1, epochs=2))
    results = json.loads((run / "model" / "eval.json").read_text())["results"]
    before = next(entry["value"] for entry in results if entry["features"] == "encoder before training")
    first = next(entry for entry in read_metrics(run / "metrics.jsonl") if "knn_accuracy" in entry)
    assert (first["step"], first["knn_accuracy"]) == (0, before)
    card = (run / "model" / "README.md").read_text()
    assert (
        f"| start | the encoder of `…/{Path(folder).name}`" in card
    )  # where it lies on the disk is nobody's business
    assert "|\n\n|" not in card  # still one table


def test_a_run_is_not_resumed_with_another_start(
    stored: Callable[..., str], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(16)
    run_pretraining(settings(max_steps=1))
    with pytest.raises(ValueError, match="other settings .init_from: None → "):
        run_pretraining(settings(init_from=stored(), max_steps=2))
