"""What stored models say through the Auto classes, here or in a process without this package.

`python -I auto_answers.py REQUEST ANSWERS` is that process; the request is `Request.__dict__`, stored by torch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedModel,
    ViTModel,
    pipeline,
)


AUTO_CLASSES = (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification)


@dataclass
class Request:
    """What the process is asked for."""

    folders: dict[str, str]
    hub_id: str
    photo: str
    noise: Tensor
    planted: str  # a folder whose code writes MARKER beside itself
    resaved: str  # where to save again whatever was loaded


def answer(model: PreTrainedModel, pixel_values: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """All tensors of a model's output."""
    pretraining = type(model).__name__ == "MiclForPreTraining"
    with torch.no_grad():
        output = model(pixel_values, **({"noise": noise} if pretraining else {}))
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def answers(folder: str, photo: str, noise: Tensor, resaved: str | None = None, **options: Any) -> dict[str, Any]:
    """What every Auto class but AutoBackbone makes of a folder; weights that are not stored are drawn from seed 0."""
    found: dict[str, Any] = {"module": {}, "missing": {}}
    config = AutoConfig.from_pretrained(folder, **options)
    torch.manual_seed(0)
    scratch = AutoModelForPreTraining.from_config(config, **options)
    found["from scratch"] = scratch.state_dict()
    found["module"] |= {"config": type(config).__module__, "from scratch": type(scratch).__module__}
    pixel_values = AutoImageProcessor.from_pretrained(folder)(_open(photo), return_tensors="pt").pixel_values
    pixel_values = torch.cat([pixel_values, pixel_values.flip(3)])
    for auto in AUTO_CLASSES:
        torch.manual_seed(0)
        model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
        found["module"][auto.__name__] = type(model).__module__
        found["missing"][auto.__name__] = sorted(info["missing_keys"])
        found[auto.__name__] = answer(model, pixel_values, noise)
        if resaved:
            model.save_pretrained(f"{resaved}/{auto.__name__}")
    if "MiclForImageClassification" in config.architectures:
        found["pipeline"] = pipeline("image-classification", model=folder, **options)(photo)
    return found


def refusals(folder: str) -> list[str]:
    """What transformers says to everyone who did not trust the folder's code; nobody answers its questions."""
    said = []
    for auto in (AutoConfig, *AUTO_CLASSES):
        for options in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **options)
            except ValueError as error:
                said.append(str(error))
    try:
        pipeline("image-classification", model=folder)
    except ValueError as error:
        said.append(str(error))
    ViTModel.from_pretrained(folder, add_pooling_layer=False)
    return said


def _open(photo: str) -> Any:
    from PIL import Image

    return Image.open(photo)


def main(request: Request) -> dict[str, Any]:
    """First without trust, then with it."""
    marker = Path(request.planted) / "MARKER"
    found: dict[str, Any] = {"refusals": refusals(request.planted), "ran without trust": marker.exists()}
    AutoConfig.from_pretrained(request.planted, trust_remote_code=True)
    found["ran with trust"] = marker.exists()
    trusting = {"trust_remote_code": True}
    for kind, source in (request.folders | {"hub": request.hub_id}).items():
        found[kind] = answers(source, request.photo, request.noise, f"{request.resaved}/{kind}", **trusting)
    stages = ["stem", "stage1", "stage2"]
    backbone = AutoBackbone.from_pretrained(request.hub_id, out_features=stages, **trusting)
    backbone.save_pretrained(f"{request.resaved}/hub/AutoBackbone")
    found["hub"]["module"]["AutoBackbone"] = type(backbone).__module__
    pixel_values = AutoImageProcessor.from_pretrained(request.hub_id)(_open(request.photo), return_tensors="pt")
    with torch.no_grad():
        found["hub"]["feature maps"] = backbone(**pixel_values).feature_maps
    return found


if __name__ == "__main__":
    sys.modules["modeling_micl"] = None  # type: ignore[assignment]  # as where it is not installed
    torch.save(main(Request(**torch.load(sys.argv[1]))), sys.argv[2])
