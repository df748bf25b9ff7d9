"""An exported model computes the same in timm, in ONNX and as a program of torch.export."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from stored_models import HEADS, LABELS, PHOTOS, answer
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from transformers import ViTImageProcessor

from modeling_micl import (
    MiclConfig,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclModel,
    MiclPreTrainedModel,
    export_vit,
)
from modeling_micl.export_vit import TIMM_ARCHITECTURES, OneOutput, export, timm_model_args, timm_state_dict


Model = Callable[..., MiclPreTrainedModel]
Store = Callable[..., Path]


@pytest.mark.parametrize("kind", HEADS)
def test_timm_opens_the_folder_and_computes_the_same(kind: str, store: Store, tmp_path: Path, photos: Tensor) -> None:
    folder = store(kind)
    advice = export(folder, tmp_path / "timm", "timm")
    assert f"timm.create_model('local-dir:{tmp_path / 'timm'}', pretrained=True)" in advice
    assert "No architecture of timm has this geometry" in advice
    assert "'embed_dim': 32" in advice
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(photos), answer(folder, photos), rtol=0, atol=1e-6)
    assert model.num_classes == (0 if kind == "encoder" else 4)
    if kind != "encoder":
        assert list(model.pretrained_cfg["label_names"]) == list(LABELS.values())


def test_timm_and_onnx_keep_an_unusual_geometry(store: Store, tmp_path: Path) -> None:
    folder = store("mean", image_size=[32, 48], patch_size=[8, 16], num_channels=1, qkv_bias=False)
    pixels = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(2))
    for to in ("timm", "onnx"):
        export(folder, tmp_path / to, to)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), answer(folder, pixels), rtol=0, atol=1e-6)
    torch.testing.assert_close(run_onnx(tmp_path / "onnx", pixels), answer(folder, pixels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TIMM_ARCHITECTURES)
def test_the_published_sizes_load_strictly_into_timms_architectures(name: str) -> None:
    width, depth, heads, patch_size = TIMM_ARCHITECTURES[name]
    with torch.device("meta"):
        config = MiclConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            patch_size=patch_size,
            intermediate_size=4 * width,
        )
        for pooling, global_pool in (("cls", "token"), ("mean", "avg")):
            config.classifier_pooling = pooling
            theirs = timm.create_model(name, num_classes=2, global_pool=global_pool)
            ours = timm_state_dict(MiclForImageClassification(config))
            theirs.load_state_dict(ours, strict=True, assign=True)
        encoder = timm.create_model(name, num_classes=0)
        encoder.load_state_dict(timm_state_dict(MiclForPreTraining(config)), strict=True, assign=True)
    assert encoder.blocks[0].attn.num_heads == heads


def test_a_timm_architecture_with_plain_keywords_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MiclForImageClassification(
        MiclConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=7)
    ).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "micl")
    advice = export(tmp_path / "micl", tmp_path / "timm", "timm")
    assert "timm's vit_tiny_patch16_224" in advice
    assert "No architecture" not in advice
    assert "has no preprocessor_config.json" in advice
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool="avg", num_classes=7).eval()
    theirs.load_state_dict(load_file(tmp_path / "timm/model.safetensors"), strict=True)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), model(pixels).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_timm_gives_the_folder_a_fresh_head(kind: str, store: Store, tmp_path: Path) -> None:
    export(store(kind), tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=9)
    weights = load_file(tmp_path / "timm/model.safetensors")
    assert model.head.weight.shape == (9, 32)
    assert torch.equal(model.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    "steps",
    [{}, {"do_center_crop": False, "size": {"height": 32, "width": 32}, "resample": 2}],
    ids=["resized and cropped", "squashed"],
)
def test_timm_prepares_images_as_the_image_processor_does(steps: dict[str, Any], store: Store, tmp_path: Path) -> None:
    folder = store("encoder")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | steps))
    export(folder, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    for number in (0, 2):  # the rocket's resized width is no whole number, which the two libraries round differently
        photo = Image.open(PHOTOS[number])
        expected = ViTImageProcessor.from_pretrained(folder)(photo, return_tensors="pt").pixel_values[0]
        one_grey_level = 1.01 / 255 / 0.2
        torch.testing.assert_close(transform(photo.convert("RGB")), expected, rtol=0, atol=one_grey_level)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-5)])
def test_what_timms_vit_does_not_compute_is_refused(field: str, value: Any, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"timm's ViTs have {field}=.*{value!r}: export it --to vit or onnx"):
        export(store("encoder", **{field: value}), tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_every_mlp_width_survives_timms_rounding(tiny_config: Callable[..., MiclConfig]) -> None:
    widths = [(28, 61), (44, 15), (32, 64), (768, 3072)]  # 28 · (61 / 28) is a little less than 61
    assert math.floor(28 * (61 / 28)) == 60
    for hidden_size, intermediate_size in widths:
        args = timm_model_args(tiny_config(hidden_size=hidden_size, intermediate_size=intermediate_size))
        assert int(hidden_size * args["mlp_ratio"]) == intermediate_size


def run_onnx(folder: Path, pixels: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (output,) = session.run(None, {"pixel_values": pixels.numpy()})
    return torch.from_numpy(np.asarray(output))


@pytest.mark.parametrize(("kind", "output"), [("encoder", "pooler_output"), ("cls", "logits"), ("mean", "logits")])
def test_onnx_computes_the_same_at_every_batch_size(
    kind: str, output: str, store: Store, tmp_path: Path, photos: Tensor
) -> None:
    folder = store(kind)
    export(folder, tmp_path / "onnx", "onnx")
    for pixels in (photos[:1], photos, photos.repeat(2, 1, 1, 1)):
        torch.testing.assert_close(run_onnx(tmp_path / "onnx", pixels), answer(folder, pixels), rtol=0, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert [node.name for node in session.get_outputs()] == [output]
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert files == {"model.onnx", "config.json", "preprocessor_config.json"}  # the weights are in the graph
    assert (tmp_path / "onnx/preprocessor_config.json").read_text() == (
        folder / "preprocessor_config.json"
    ).read_text()
    if kind != "encoder":
        labels = json.loads((tmp_path / "onnx/config.json").read_text())["id2label"]
        assert labels == {str(label): name for label, name in LABELS.items()}


def test_a_graph_too_large_for_one_file_keeps_its_half_precision_weights_as_float32_beside_it(
    store: Store, tmp_path: Path, photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store("encoder", torch.bfloat16)
    monkeypatch.setattr(export_vit, "ONE_FILE_BYTES", 1)
    export(folder, tmp_path / "onnx", "onnx")
    assert (tmp_path / "onnx/model.onnx.data").is_file()
    with torch.no_grad():
        expected = MiclModel.from_pretrained(folder, dtype=torch.float32)(photos).pooler_output
    torch.testing.assert_close(run_onnx(tmp_path / "onnx", photos), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_onnx_packages_are_named_with_the_command_that_installs_them(
    package: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install onnx onnxscript"):
        export(store("encoder"), tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("kind", HEADS)
def test_torch_export_leaves_the_batch_size_free(kind: str, tiny_model: Model, pixel_values: Tensor) -> None:
    model_class, options = HEADS[kind]
    module = OneOutput(tiny_model(model_class, **options)).eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (pixel_values,), dynamic_shapes=dynamic)
    for pixels in (pixel_values[:1], pixel_values, pixel_values.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(program.module()(pixels), module(pixels), rtol=0, atol=1e-6)
