"""Same numbers as the authors' program, by vectors made with it (see `made_with` in the JSON file).

The model keeps its own position table instead of loading the stored one: a wrong table must fail here.
"""

import argparse
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling_micl import MiclConfig, MiclForPreTraining, convert_official_state_dict, losses
from modeling_micl import modeling_micl as modeling
from modeling_micl.convert_checkpoint import convert, official_parameter_names


FOLDER = Path(__file__).parent
META = json.loads((FOLDER / "micl_A.json").read_text())
GOLDEN = load_file(FOLDER / "micl_A.safetensors")
WEIGHTS = {name.removeprefix("state_dict/"): value for name, value in GOLDEN.items() if name.startswith("state_dict/")}
TOLERANCE = {
    "ids_visible": 0,
    "positions": 0,
    "latents": 1e-5,
    "logits": 1e-5,
    "loss": 1e-5,
    "loss in float64": 1e-12,  # alone sharp enough to see a wrong layer_norm_eps
    "gradient norms": 1e-4,
}


def golden_model(attention: str = "eager", **overrides: Any) -> MiclForPreTraining:
    config = MiclConfig(**{**META["hf"], **overrides}, attn_implementation=attention)
    model = MiclForPreTraining(config)
    weights = convert_official_state_dict(WEIGHTS, config)
    del weights["vit.embeddings.position_embeddings"]
    assert model.load_state_dict(weights, strict=False).missing_keys == ["vit.embeddings.position_embeddings"]
    return model


def gradient_norm(model: MiclForPreTraining, official_name: str) -> float:
    ours = official_parameter_names(model.config)[official_name]
    return sum(model.get_parameter(name).grad.double().square().sum() for name in ours).sqrt().item()


def loss_in_float64(model: MiclForPreTraining, golden: dict[str, Tensor]) -> float:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")  # transformers' eager attention takes its softmax in float32
    return model(golden["pixel_values"].double(), noise=golden["noise"]).loss.item()


def parity_errors(model: MiclForPreTraining, golden: dict[str, Tensor]) -> dict[str, float]:
    """How far the model is from the golden vectors: absolute, but relative for gradient norms."""
    outputs = model(golden["pixel_values"], noise=golden["noise"])
    outputs.loss.backward()
    latents = model.vit(golden["pixel_values"], outputs.ids_visible).last_hidden_state
    norms = {name: golden[f"grad_norm/{name}"].item() for name in META["grad_norm_keys"]}
    return {
        "ids_visible": (outputs.ids_visible.flatten(1) != golden["ids_keep"]).sum().item(),
        "positions": (model.vit.embeddings.position_embeddings - WEIGHTS["pos_embed"]).abs().max().item(),
        "latents": (latents - golden["latent"]).abs().max().item(),
        "logits": (outputs.logits - golden["logits"]).abs().max().item(),
        "loss": (outputs.loss - golden["loss"]).abs().item(),
        "loss in float64": abs(loss_in_float64(model, golden) - META["float64_loss"]),
        "gradient norms": max(abs(gradient_norm(model, name) / norm - 1) for name, norm in norms.items()),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_authors_numbers_are_reproduced(attention: str) -> None:
    errors = parity_errors(golden_model(attention), GOLDEN)
    assert {name: error for name, error in errors.items() if error > TOLERANCE[name]} == {}


def test_training_mode_changes_nothing() -> None:
    errors = parity_errors(golden_model().train(), GOLDEN)
    assert {name: error for name, error in errors.items() if error > TOLERANCE[name]} == {}


def test_the_authors_numbers_survive_the_way_through_files(tmp_path: Path) -> None:
    """Written as the authors' program writes its checkpoints, converted, and loaded by name."""
    settings = argparse.Namespace(mask_ratio=META["hf"]["mask_ratio"], batch_size=1800, resume="")
    checkpoint = {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 199, "scaler": {}, "args": settings}
    torch.save(checkpoint, tmp_path / "checkpoint-199.pth")
    convert(tmp_path / "checkpoint-199.pth", tmp_path / "out", num_attention_heads=META["hf"]["num_attention_heads"])
    model = MiclForPreTraining.from_pretrained(tmp_path / "out", attn_implementation="eager")
    errors = parity_errors(model, GOLDEN)
    assert {name: error for name, error in errors.items() if error > TOLERANCE[name]} == {}


def swap_height_and_width(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    original = modeling.sincos_position_embeddings
    monkeypatch.setattr(modeling, "sincos_position_embeddings", lambda *size: original(*size).roll(size[0] // 2, -1))
    return {}


def ignore_kappa(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(losses, "t_sp_similarity", lambda cosine, kappa: 0.5 * (1 + cosine))
    return {}


def deal_patches_alternately(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    original = modeling.sample_views

    def sample_views(*args: Any, **kwargs: Any) -> Tensor:
        ids = original(*args, **kwargs)
        return ids.flatten(1).unflatten(1, (-1, ids.shape[1])).transpose(1, 2)

    monkeypatch.setattr(modeling, "sample_views", sample_views)
    return {}


def exchange_the_views(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    original = modeling.sample_views
    monkeypatch.setattr(modeling, "sample_views", lambda *args, **kwargs: original(*args, **kwargs).flip(1))
    return {}


def loss_of_one_direction(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(losses, "permutations", lambda views, length: [(0, 1)])
    return {}


MUTANTS = {
    "height and width swapped": (swap_height_and_width, {"positions", "latents", "loss", "gradient norms"}),
    "kappa ignored": (ignore_kappa, {"logits", "loss", "gradient norms"}),
    "patches dealt alternately": (deal_patches_alternately, {"ids_visible", "latents", "loss"}),
    "views exchanged": (exchange_the_views, {"ids_visible", "latents", "logits"}),
    "loss of one direction": (loss_of_one_direction, {"loss", "gradient norms"}),
    "layer_norm_eps of ViT": (lambda _: {"layer_norm_eps": 1e-12}, {"loss in float64"}),
    "approximate GELU": (lambda _: {"hidden_act": "gelu_new"}, {"latents", "loss", "loss in float64"}),
    "another temperature": (lambda _: {"temperature": 0.0701}, {"logits", "loss", "gradient norms"}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, noticed_in = MUTANTS[name]
    errors = parity_errors(golden_model(**mutate(monkeypatch)), GOLDEN)
    assert noticed_in <= {name for name, error in errors.items() if error > 2 * TOLERANCE[name]}


def test_the_golden_weights_are_the_ones_their_hash_names() -> None:
    digest = hashlib.sha256()
    for name in sorted(WEIGHTS):
        digest.update(name.encode())
        digest.update(WEIGHTS[name].numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == META["state_dict_sha256"]
