"""What other programs' files and folders compute, the converted MiCL folders compute too."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTModel,
)

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from modeling_micl.convert_checkpoint import convert, main
from modeling_micl.remote_code import AUTO_MAP


Module = TypeVar("Module", bound=nn.Module)
Micl = TypeVar("Micl", bound=MiclPreTrainedModel)

SIZE = 48  # 36 patches of 8 × 8 pixels
PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
STOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def unlike_initial(model: Module) -> Module:
    """Move every parameter, so that none can be missed or take another's place unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def timm_vit(**overrides: Any) -> VisionTransformer:
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0}
    return unlike_initial(VisionTransformer(**{**options, **overrides}))


def stock_vit(kind: type[PreTrainedModel] = ViTModel, **overrides: Any) -> PreTrainedModel:
    return unlike_initial(kind(ViTConfig(image_size=SIZE, patch_size=8, **{**STOCK, **overrides})))


def save_as(suffix: str, weights: dict[str, Tensor], folder: Path) -> Path:
    file = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file


def load(kind: type[Micl], folder: Path) -> Micl:
    """A converted folder, which must hold every weight of the model and no others."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# timm's files, and those of programs that use its names


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@torch.no_grad()
def test_a_timm_encoder_keeps_its_features_and_learned_positions(suffix: str, tmp_path: Path) -> None:
    timm_model = timm_vit()
    convert(save_as(suffix, timm_model.state_dict(), tmp_path), tmp_path / "out")
    model = load(MiclForPreTraining, tmp_path / "out")
    assert_close(model.vit(PIXELS).last_hidden_state, timm_model.forward_features(PIXELS))
    positions = model.vit.embeddings.position_embeddings
    assert torch.equal(positions, timm_model.pos_embed)
    assert not positions.requires_grad
    assert model.config.auto_map == AUTO_MAP


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@torch.no_grad()
def test_a_classifier_gives_timms_logits(global_pool: str, tmp_path: Path) -> None:
    """With "avg" it has the weights of MAE's and the authors' fine-tuning: fc_norm and head, no norm."""
    timm_model = timm_vit(num_classes=5, global_pool=global_pool)
    assert ("fc_norm.weight" in timm_model.state_dict()) == (global_pool == "avg")
    checkpoint = {"model": timm_model.state_dict(), "epoch": 7, "args": argparse.Namespace(drop_path=0.1)}
    torch.save(checkpoint, tmp_path / "finetuned.pth")
    convert(tmp_path / "finetuned.pth", tmp_path / "out")
    model = load(MiclForImageClassification, tmp_path / "out")
    assert model.config.num_labels == 5
    assert_close(model(PIXELS).logits, timm_model(PIXELS))


@torch.no_grad()
def test_maes_decoder_is_left_out(tmp_path: Path) -> None:
    timm_model = timm_vit()
    decoder = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.bias")
    weights = {**timm_model.state_dict(), **{name: torch.ones(3) for name in decoder}}
    torch.save({"model": weights, "args": argparse.Namespace(mask_ratio=0.75)}, tmp_path / "mae.pth")
    convert(tmp_path / "mae.pth", tmp_path / "out")
    model = load(MiclForPreTraining, tmp_path / "out")
    assert_close(model.vit(PIXELS).last_hidden_state, timm_model.forward_features(PIXELS))
    assert model.config.mask_ratio == 0.75


@torch.no_grad()
def test_an_unusual_geometry_is_found_or_asked_for(tmp_path: Path) -> None:
    options = {"img_size": (32, 48), "patch_size": 8, "in_chans": 4, "embed_dim": 40, "depth": 1, "num_heads": 5}
    timm_model = timm_vit(**options, mlp_ratio=3, qkv_bias=False)
    file = save_as(".pth", timm_model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="hidden_size=40.*--num_attention_heads"):
        convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match="24 patches.*--image_size"):
        convert(file, tmp_path / "out", num_attention_heads=5)
    convert(file, tmp_path / "out", num_attention_heads=5, image_size=[32, 48], mask_ratio=0.5)
    pixels = torch.randn(2, 4, 32, 48)
    features = load(MiclForPreTraining, tmp_path / "out").vit(pixels).last_hidden_state
    assert_close(features, timm_model.forward_features(pixels))


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)]
)  # as in timm's vit_{tiny,small,base,large}_patch16_224 and vit_huge_patch14_224
def test_the_heads_of_published_widths_are_known(width: int, heads: int, tmp_path: Path) -> None:
    weights = timm_vit(embed_dim=width, num_heads=heads, depth=1, mlp_ratio=0.25).state_dict()
    convert(save_as(".pth", weights, tmp_path), tmp_path / "out")
    assert load(MiclForPreTraining, tmp_path / "out").config.num_attention_heads == heads


# Stock ViT folders


@pytest.mark.parametrize("names", ["of transformers 4", "of transformers 5"])
@torch.no_grad()
def test_a_stock_encoder_keeps_its_features_and_learned_positions(names: str, tmp_path: Path) -> None:
    stock = stock_vit()
    stock.save_pretrained(tmp_path / "stock")
    weights = tmp_path / "stock" / "model.safetensors"
    if names == "of transformers 5":
        save_file(stock.state_dict(), weights, {"format": "pt"})
    found = b"encoder.layer.0.attention.attention.query" if names == "of transformers 4" else b"attention.q_proj"
    assert found in weights.read_bytes()
    convert(tmp_path / "stock", tmp_path / "out")
    model = load(MiclForPreTraining, tmp_path / "out")
    assert model.config.layer_norm_eps == 1e-12
    torch.testing.assert_close(model.vit(PIXELS)[0], stock(PIXELS)[0], atol=1e-6, rtol=0)
    positions = model.vit.embeddings.position_embeddings
    assert torch.equal(positions, stock.embeddings.position_embeddings)
    assert not positions.requires_grad


@torch.no_grad()
def test_a_stock_classifier_keeps_its_logits_classes_and_image_processor(tmp_path: Path) -> None:
    stock = stock_vit(ViTForImageClassification, id2label={0: "owl", 1: "cat", 2: "dog"}, hidden_act="relu")
    stock.save_pretrained(tmp_path / "stock")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "out")
    model = load(MiclForImageClassification, tmp_path / "out")
    assert_close(model(PIXELS).logits, stock(PIXELS).logits)
    assert model.config.id2label == {0: "owl", 1: "cat", 2: "dog"}
    assert tuple(ViTImageProcessor.from_pretrained(tmp_path / "out").image_mean) == (0.1, 0.2, 0.3)


@torch.no_grad()
def test_a_stock_masked_image_models_encoder_is_taken_alone(tmp_path: Path) -> None:
    stock = stock_vit(ViTForMaskedImageModeling, encoder_stride=8)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "out")
    features = load(MiclModel, tmp_path / "out")(PIXELS).last_hidden_state
    assert_close(features, stock.vit(PIXELS).last_hidden_state)


def test_an_incomplete_stock_vit_is_refused(tmp_path: Path) -> None:
    stock = stock_vit()
    stock.save_pretrained(tmp_path / "stock")
    weights = stock.state_dict()
    weights["embeddings.distillation_token"] = weights.pop("layernorm.bias").clone()
    save_file(weights, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['layernorm.bias'\], unexpected \['embeddings.distillation_tok"):
        convert(tmp_path / "stock", tmp_path / "out")


# What is refused


class WritesAFile:
    """Unpickled the ordinary way, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("in_zip_file", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(in_zip_file: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    checkpoint = {"model": timm_vit().state_dict(), "args": argparse.Namespace(output=WritesAFile(victim))}
    torch.save(checkpoint, tmp_path / "evil.pth", _use_new_zipfile_serialization=in_zip_file)
    reason = "posix.mkdir.*" if in_zip_file else ""
    with pytest.raises(ValueError, match=rf"evil.pth.*{reason}no code in it was run.*torch.save\(model.state_dict"):
        convert(tmp_path / "evil.pth", tmp_path / "out")
    assert not victim.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert victim.exists()  # it would have


def without(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {other: value for other, value in weights.items() if other != name}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a missing weight": (lambda w: without("blocks.1.norm1.bias", w), r"missing \['blocks.1.norm1.bias'\]"),
    "no patches": (lambda w: without("patch_embed.proj.weight", w), "'patch_embed.proj.weight' is missing"),
    "a further token": (lambda w: {**w, "dist_token": w["cls_token"]}, r"unexpected \['dist_token'\]"),
    "a wrong shape": (lambda w: {**w, "norm.bias": torch.ones(3)}, "size mismatch for vit.layernorm.bias"),
    "undefined numbers": (lambda w: {**w, "norm.bias": torch.full((192,), torch.nan)}, "weights are damaged"),
    "no weights by name": (lambda w: [w], "holds a list"),
    "other things": (lambda w: {"epoch": 7, "network": w}, "holds other things than weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_weights_are_refused_with_the_reason_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    torch.save(change(timm_vit().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "weights.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    file = save_as(suffix, timm_vit().state_dict(), tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        convert(file, tmp_path / "out")


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert', not 'vit'"):
        convert(tmp_path, tmp_path / "out")


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(save_as(".pth", timm_vit().state_dict(), tmp_path), tmp_path)


@pytest.mark.slow
def test_the_command_line_converts_and_says_how_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_as(".pth", timm_vit(embed_dim=40, num_heads=5).state_dict(), tmp_path)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "modeling_micl.convert_checkpoint"]
    command += [str(file), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command[4:])
    with pytest.raises(SystemExit, match="^modeling_micl.convert_checkpoint: .*--num_attention_heads"):
        main()
    options = ["--num_attention_heads", "5", "--mask_ratio", "0.5", "--image_size", str(SIZE)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert f"MiclForPreTraining.from_pretrained('{tmp_path / 'out'}')" in done.stdout
    assert load(MiclForPreTraining, tmp_path / "out").config.mask_ratio == 0.5
