"""Write a MiCL model for people without this package: `python -m modeling_micl.export_vit MODEL OUT --to vit`.

`vit` is a stock transformers ViT, `timm` a folder that `timm.create_model` opens, `onnx` a graph for any runtime. What
is written computes what the model computes on whole images; masking and the contrastive objective stay behind.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import cached_file

from .configuration_micl import MiclConfig, height_and_width
from .convert_checkpoint import PROCESSOR, STOCK_FIELDS
from .hub_access import read_config_dict, reason
from .modeling_micl import MiclForImageClassification, MiclForPreTraining
from .parameter_names import official_parameter_names


# timm's plain ViTs: (hidden_size, num_hidden_layers, num_attention_heads, patch_size).
TIMM_ARCHITECTURES = {
    "vit_tiny_patch16_224": (192, 12, 3, 16),
    "vit_small_patch16_224": (384, 12, 6, 16),
    "vit_base_patch16_224": (768, 12, 12, 16),
    "vit_large_patch16_224": (1024, 24, 16, 16),
    "vit_huge_patch14_224": (1280, 32, 16, 14),
}
ONE_FILE_BYTES = 1_900_000_000  # protobuf allows 2 GiB, graph included

MiclExportable = MiclForPreTraining | MiclForImageClassification


def export(model: str | PathLike[str], output: str | PathLike[str], to: Literal["vit", "timm", "onnx"]) -> str:
    """Write a stored model in another library's format.

    Args:
        model: folder or Hub id of any MiCL model. A classifier is exported with its head, all others as encoders.
        output: folder to write, new or empty. The image processor's file is copied into it.
        to: `"vit"`, a folder for transformers' `AutoModel` or `AutoModelForImageClassification`; `"timm"`,
            `model.safetensors` and `config.json` as timm's own on the Hub; `"onnx"`, `model.onnx` with
            `pixel_values` (batch, C, H, W) → `logits`, or `pooler_output` ([CLS], batch × D) of an encoder.

    Returns:
        How to load what was written, in a line or two.

    Raises:
        ValueError: if `model` is no complete MiCL model, `output` is not empty, or the format cannot hold this model.
        ImportError: if the packages that ONNX needs are missing.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"OUT {str(folder)!r} exists and is not an empty folder: choose a new one.")
    if to not in WRITERS:
        raise ValueError(f"to must be one of {', '.join(WRITERS)}, got {to!r}.")
    config = read_config(str(model))
    check, write = WRITERS[to]
    check(config)
    loaded = load(str(model), config)
    processor = cached_file(str(model), PROCESSOR, _raise_exceptions_for_missing_entries=False)
    folder.mkdir(parents=True, exist_ok=True)
    if processor is None:
        return write(loaded, folder, {}) + f"\n{str(model)!r} has no {PROCESSOR}: say how images are to be normalised."
    shutil.copyfile(processor, folder / PROCESSOR)
    return write(loaded, folder, json.loads(Path(processor).read_text()))


def is_classifier(config: MiclConfig) -> bool:
    """Whether the stored model has a classification head."""
    return "MiclForImageClassification" in (config.architectures or [])


def read_config(model: str) -> MiclConfig:
    """The configuration of a stored MiCL model; a ValueError on anything else."""
    values = read_config_dict(model, "MODEL")
    if values.get("model_type") != MiclConfig.model_type:
        raise ValueError(
            f"MODEL {model!r} is no MiCL model: the model_type in its config.json is {values.get('model_type')!r}. "
            "Give the folder that save_pretrained wrote."
        )
    config: MiclConfig = MiclConfig.from_pretrained(model)
    return config


def load(model: str, config: MiclConfig) -> MiclExportable:
    """The stored model in evaluation mode; a ValueError unless its weights are exactly those of the configuration."""
    kind = MiclForImageClassification if is_classifier(config) else MiclForPreTraining
    try:
        loaded, info = kind.from_pretrained(model, output_loading_info=True)
    except Exception as error:  # a damaged file raises an error of safetensors, which is of no built-in kind
        raise ValueError(f"MODEL {model!r}: its weights cannot be read: {reason(error)}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ValueError(f"MODEL {model!r} is not a whole {kind.__name__}: {problem} {sorted(info[problem])[:3]}.")
    exportable: MiclExportable = loaded  # from_pretrained leaves it in evaluation mode
    return exportable


def check_vit(config: MiclConfig) -> None:
    """Raise a ValueError if stock ViT cannot compute what the model computes."""
    if is_classifier(config) and config.classifier_pooling == "mean":
        raise ValueError(
            "The model classifies by the patches' mean (classifier_pooling='mean'), but ViTForImageClassification "
            "only by [CLS]: export it --to timm or --to onnx, which hold both; or train the head with "
            "--classifier_pooling cls; or export the pre-trained encoder instead."
        )


def vit_config(config: MiclConfig) -> ViTConfig:
    """The stock configuration with the same geometry, dropout and labels."""
    return ViTConfig(**{name: getattr(config, name) for name in STOCK_FIELDS})


def write_vit(model: MiclExportable, folder: Path, processor: dict[str, Any]) -> str:
    """Save the model through the stock class; its names and positions are stock already."""
    if isinstance(model, MiclForImageClassification):
        stock, source = ViTForImageClassification(vit_config(model.config)), model
        advice = f"AutoModelForImageClassification.from_pretrained({str(folder)!r})"
    else:
        stock, source = ViTModel(vit_config(model.config), add_pooling_layer=False), model.vit
        # AutoModel's default adds a pooling layer with random weights, which transformers mentions but allows.
        advice = f"AutoModel.from_pretrained({str(folder)!r}, add_pooling_layer=False)"
    stock.to(model.dtype).load_state_dict(source.state_dict(), strict=True)
    stock.save_pretrained(folder)
    return f"Stock ViT. Load it with transformers.{advice}."


def check_timm(config: MiclConfig) -> None:
    """Raise a ValueError if timm's VisionTransformer cannot compute what the model computes."""
    for name, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if getattr(config, name) != value:
            raise ValueError(
                f"timm's ViTs have {name}={value!r}, this model {getattr(config, name)!r}: export it --to vit or onnx."
            )


def timm_state_dict(model: MiclExportable) -> dict[str, Tensor]:
    """The weights under timm's names, with query, key and value fused."""
    rest = model.state_dict()
    weights = {
        theirs: torch.cat([rest.pop(name) for name in ours])
        for theirs, ours in official_parameter_names(model.config).items()
        if ours[0] in rest  # mean pooling has no final norm, but fc_norm, as in timm
    }
    return weights | {name.replace("classifier.", "head."): value for name, value in rest.items()}


def timm_model_args(config: MiclConfig) -> dict[str, Any]:
    """Keywords with which any entry point of timm's plain ViTs builds this model."""
    mean_pooling = is_classifier(config) and config.classifier_pooling == "mean"
    mlp_ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * mlp_ratio) < config.intermediate_size:  # timm rounds down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "global_pool": "avg" if mean_pooling else "token",
    }


def timm_data_config(config: MiclConfig, processor: dict[str, Any]) -> dict[str, Any]:
    """The image processor's steps in the fields of timm's pretrained_cfg."""
    data: dict[str, Any] = {"input_size": [config.num_channels, *height_and_width(config.image_size)]}
    if "image_mean" in processor:
        data |= {"mean": processor["image_mean"], "std": processor["image_std"]}
    if processor.get("resample") in (2, 3):
        data["interpolation"] = {2: "bilinear", 3: "bicubic"}[processor["resample"]]
    edge = processor.get("size", {}).get("shortest_edge")
    if processor.get("do_center_crop") and edge:
        return data | {"crop_mode": "center", "crop_pct": processor["crop_size"]["height"] / edge}
    return data | {"crop_mode": "squash", "crop_pct": 1.0}


def write_timm(model: MiclExportable, folder: Path, processor: dict[str, Any]) -> str:
    """Write weights and configuration as timm's models on the Hub have them."""
    config = model.config
    geometry = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    known = next((name for name, theirs in TIMM_ARCHITECTURES.items() if theirs == geometry), None)
    architecture, args = known or "vit_base_patch16_224", timm_model_args(config)
    fixed = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    values = {
        "architecture": architecture,
        "num_classes": config.num_labels if is_classifier(config) else 0,
        "model_args": args,
        "pretrained_cfg": timm_data_config(config, processor) | fixed,
    }
    if is_classifier(config):
        values["label_names"] = [config.id2label[label] for label in range(config.num_labels)]
    # timm opens one file only, so never in parts.
    save_torch_state_dict(timm_state_dict(model), folder, max_shard_size="1TB")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    advice = f"timm's {architecture}. Load it with timm.create_model('local-dir:{folder}', pretrained=True)."
    return (
        advice if known else f"{advice}\nNo architecture of timm has this geometry: it is {architecture} with {args}."
    )


class OneOutput(nn.Module):
    """Images to the one tensor that users of an exported graph want: logits, or an encoder's [CLS]."""

    def __init__(self, model: MiclExportable) -> None:
        super().__init__()
        self.name = "logits" if isinstance(model, MiclForImageClassification) else "pooler_output"
        self.model = model if isinstance(model, MiclForImageClassification) else model.vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) → (B, num_labels) or (B, D)."""
        output: Tensor = getattr(self.model(pixel_values), self.name)
        return output


def check_onnx(config: MiclConfig) -> None:
    """Raise an ImportError that names the command, unless torch's exporter has what it needs."""
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"Exporting --to onnx needs {package}: pip install onnx onnxscript.") from error


def write_onnx(model: MiclExportable, folder: Path, processor: dict[str, Any]) -> str:
    """Trace the model with a free batch size; the weights stay float32, which every runtime has."""
    graph = OneOutput(model.float()).eval()
    size = sum(parameter.nbytes for parameter in graph.parameters())
    example = torch.zeros(2, model.config.num_channels, *height_and_width(model.config.image_size))
    torch.onnx.export(
        graph,
        (example,),
        folder / "model.onnx",
        input_names=["pixel_values"],
        output_names=[graph.name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=size > ONE_FILE_BYTES,
        verbose=False,
    )
    vit_config(model.config).save_pretrained(folder)  # names the labels
    return f"ONNX: pixel_values → {graph.name}. Load it with onnxruntime.InferenceSession('{folder}/model.onnx')."


Check = Callable[[MiclConfig], None]
Write = Callable[[MiclExportable, Path, dict[str, Any]], str]
WRITERS: dict[str, tuple[Check, Write]] = {
    "vit": (check_vit, write_vit),
    "timm": (check_timm, write_timm),
    "onnx": (check_onnx, write_onnx),
}


def main() -> None:
    """Export one model as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m modeling_micl.export_vit", description=(__doc__ or "").strip())
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a MiCL model")
    parser.add_argument("output", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--to", required=True, choices=list(WRITERS), help="whose format")
    options = parser.parse_args()
    try:
        print(export(options.model, options.output, options.to))  # noqa: T201
    except (ValueError, ImportError) as error:
        sys.exit(f"modeling_micl.export_vit: {error}")


if __name__ == "__main__":
    main()
