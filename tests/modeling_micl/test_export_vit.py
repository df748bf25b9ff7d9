"""An exported model computes the same in transformers where this package is not installed; impossible requests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_models import LABELS, NAMES, PHOTOS, answer
from torch import Tensor
from transformers import AutoModel, ViTForImageClassification, ViTModel

from modeling_micl import MiclBackbone, MiclConfig, MiclModel, MiclPreTrainedModel, export_vit
from modeling_micl.export_vit import export


Model = Callable[..., MiclPreTrainedModel]
Store = Callable[..., Path]

ELSEWHERE = """
import sys
sys.modules["modeling_micl"] = None  # as on a machine that does not have it
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
try:
    import modeling_micl
    sys.exit("modeling_micl can be imported")
except ImportError:
    pass
encoder, classifier, result, *photos = sys.argv[1:]
pixels = AutoImageProcessor.from_pretrained(encoder)([Image.open(p) for p in photos], return_tensors="pt").pixel_values
model, info = AutoModel.from_pretrained(encoder, add_pooling_layer=False, output_loading_info=True)
head, head_info = AutoModelForImageClassification.from_pretrained(classifier, output_loading_info=True)
assert not any(info.values()) and not any(head_info.values()), (info, head_info)
with torch.no_grad():
    answers = {
        "pixels": pixels,
        "types": [type(model).__name__, type(head).__name__],
        "tokens": model(pixels).last_hidden_state,
        "logits": head(pixels).logits,
        "features": pipeline("image-feature-extraction", model=encoder)(photos[0]),
        "labels": pipeline("image-classification", model=classifier)(photos),
    }
torch.save(answers, result)
"""


def test_a_process_without_this_package_gets_the_same_from_the_auto_classes_and_pipelines(
    store: Store, tmp_path: Path, photos: Tensor
) -> None:
    stored = {kind: store(kind) for kind in ("encoder", "cls")}
    folders = [str(tmp_path / f"stock-{kind}") for kind in stored]
    for folder, output in zip(stored.values(), folders, strict=True):
        export(folder, output, "vit")
    command = [sys.executable, "-I", "-c", ELSEWHERE, *folders, str(tmp_path / "answers.pt"), *map(str, PHOTOS)]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})

    theirs = torch.load(tmp_path / "answers.pt")
    logits = answer(stored["cls"], photos)
    assert theirs["types"] == ["ViTModel", "ViTForImageClassification"]
    assert torch.equal(theirs["pixels"], photos)
    with torch.no_grad():
        tokens = MiclModel.from_pretrained(stored["encoder"])(photos).last_hidden_state
    assert torch.equal(theirs["tokens"], tokens)
    assert torch.equal(theirs["logits"], logits)
    torch.testing.assert_close(torch.tensor(theirs["features"]), tokens[:1])
    for row, scores in zip(theirs["labels"], logits.softmax(-1), strict=True):
        assert {entry["label"]: entry["score"] for entry in row} == pytest.approx(
            {LABELS[label]: score.item() for label, score in enumerate(scores)}, abs=1e-6
        )


@pytest.mark.parametrize("model_class", [MiclModel, MiclBackbone])
def test_encoders_of_every_class_are_exported(model_class: type, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model(model_class)
    model.save_pretrained(tmp_path / "micl")
    export(tmp_path / "micl", tmp_path / "vit", "vit")
    stock = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert stock.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in stock.state_dict().items())


def test_stock_vit_keeps_the_dtype_and_everything_that_training_it_further_needs(store: Store, tmp_path: Path) -> None:
    values = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.5, "qkv_bias": False, "patch_size": 4}
    folder = store("cls", torch.bfloat16, problem_type="multi_label_classification", **values)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_micl.MiclConfig"}  # remote code must not be asked for
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "vit", "vit")
    stock = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    assert stock.dtype == torch.bfloat16
    assert {name: getattr(stock.config, name) for name in values} == values
    assert stock.config.layer_norm_eps == 1e-6
    assert {name: getattr(stock.config, name) for name in NAMES} == NAMES
    assert stock.config.problem_type == "multi_label_classification"
    assert "micl" not in (tmp_path / "vit/config.json").read_text().lower()


def test_stock_vit_cannot_hold_a_head_on_the_mean_and_the_error_says_what_can(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classifier_pooling='mean'.*--to timm or --to onnx.*classifier_pooling cls"):
        export(store("mean"), tmp_path / "vit", "vit")
    assert not (tmp_path / "vit").exists()


def test_what_is_no_micl_model_is_refused(tmp_path: Path, tiny_config: Callable[..., MiclConfig]) -> None:
    (tmp_path / "empty").mkdir()
    AutoModel.from_config(export_vit.vit_config(tiny_config())).save_pretrained(tmp_path / "stock")
    for name, reason in (
        ("nowhere/at/all", "is no local path, and not a model on the Hub, .*check the path"),
        ("empty", "is no model: it has no config.json. Give what save_pretrained wrote"),
        ("stock", "is no MiCL model: the model_type in its config.json is 'vit'"),
    ):
        with pytest.raises(ValueError, match=f"{name}' {reason}"):
            export(tmp_path / name, tmp_path / "out", "vit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("encoder", {"architectures": ["MiclForImageClassification"]}, "missing_keys .*classifier.bias"),
        ("cls", {"architectures": ["MiclForPreTraining"]}, "unexpected_keys .*classifier.bias"),
        ("encoder", {"intermediate_size": 80}, "weights cannot be read.*mismatch"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    kind: str, changes: dict[str, Any], reason: str, store: Store, tmp_path: Path
) -> None:
    folder = store(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"(?s)MODEL '{folder}'.*{reason}"):
        export(folder, tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_refused(store: Store, tmp_path: Path) -> None:
    weights = store("encoder") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        export(weights.parent, tmp_path / "out", "timm")


def test_a_folder_with_files_in_it_is_never_written_to(store: Store) -> None:
    folder = store("encoder")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for output in (folder, folder / "config.json"):
        with pytest.raises(ValueError, match="exists and is not an empty folder: choose a new one"):
            export(folder, output, "timm")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_line_says_how_to_load_the_result_or_what_is_wrong(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "modeling_micl.export_vit", str(store("encoder"))]
    command += [str(tmp_path / "out"), "--to", "vit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    load = f"AutoModel.from_pretrained('{tmp_path / 'out'}', add_pooling_layer=False)"
    assert load in done.stdout
    assert "RuntimeWarning" not in done.stderr  # as when the package has imported the module before
    assert isinstance(eval(load, {"AutoModel": AutoModel}), ViTModel)
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit, match="^modeling_micl.export_vit: OUT .* choose a new one.$"):
        export_vit.main()
