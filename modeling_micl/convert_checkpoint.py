"""Make a MiCL folder of another program's ViT: `python -m modeling_micl.convert_checkpoint SOURCE OUT`.

SOURCE is a checkpoint file (.pth, .bin or .safetensors) of the authors' program, MAE or timm, pre-trained or with a
classification head, or a stock transformers ViT as a folder or Hub id. No code in SOURCE is ever run.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import cached_file

from .configuration_micl import MiclConfig, height_and_width
from .hub_access import read_config_dict, reason
from .modeling_micl import MiclForImageClassification, MiclForPreTraining
from .parameter_names import convert_official_state_dict, official_parameter_names
from .remote_code import add_remote_code


# hidden_size → num_attention_heads of the published ViTs; the weights themselves do not show it.
KNOWN_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
CONTAINERS = ("model", "state_dict")  # where training programs put the weights in their checkpoints
NOT_THE_ENCODERS = ("mask_token", "decoder_")  # MAE's decoder
NOT_THE_STOCK_ENCODERS = ("embeddings.mask_token", "decoder.", "pooler.")
PROCESSOR = "preprocessor_config.json"
# What a stock ViT's configuration and ours both say of a model, but what belongs to the folder they are in.
STOCK_FIELDS = sorted(
    ({field.name for field in fields(ViTConfig)} & {field.name for field in fields(MiclConfig)})
    - {"architectures", "dtype", "transformers_version"}
)

MiclConverted = MiclForPreTraining | MiclForImageClassification


def convert(source: str | PathLike[str], output: str | PathLike[str], **overrides: Any) -> str:
    """Write another program's ViT as a MiCL folder.

    Args:
        source: see `read_model`.
        output: folder to write, new or empty. A stock ViT's image processor is copied into it.
        **overrides: see `read_model`.

    Returns:
        How to load what was written.

    Raises:
        ValueError: if `output` is not empty, and as in `read_model`.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"OUT {str(folder)!r} exists and is not an empty folder: choose a new one.")
    model = read_model(source, **overrides)
    model.save_pretrained(folder)
    add_remote_code(folder)
    advice = f"Load it with modeling_micl.{type(model).__name__}.from_pretrained({str(folder)!r})."
    processor = (
        None
        if Path(source).is_file()
        else cached_file(str(source), PROCESSOR, _raise_exceptions_for_missing_entries=False)
    )
    if processor is None:
        return f"{advice}\nSOURCE has no {PROCESSOR}: find out how its images were normalised."
    shutil.copyfile(processor, folder / PROCESSOR)
    return advice


def read_model(source: str | PathLike[str], **overrides: Any) -> MiclConverted:
    """Read another program's ViT as a MiCL model, in evaluation mode and with float32 weights.

    The geometry comes from the weights, position embeddings stay as stored, learned ones too, and MAE's decoder and a
    stock ViT's pooler are left out. Weights with a head become a classifier, all others an encoder.

    Args:
        source: checkpoint file under timm's names (as the authors' and MAE's), or a stock transformers ViT's folder or
            Hub id.
        **overrides: fields of `MiclConfig` that the source does not tell.

    Raises:
        ValueError: if it cannot be read without running code, is no plain ViT, some weights are missing or unexpected,
            or it does not give finite numbers.
    """
    path = Path(source)
    model = _read_file(path, overrides) if path.is_file() else _read_stock(str(source), overrides)
    config = model.config
    size = config.num_channels, *height_and_width(config.image_size)
    with torch.no_grad():
        pixels = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        tokens = model.vit(pixels).last_hidden_state
        output = model(pixels).logits if isinstance(model, MiclForImageClassification) else tokens
    if not output.isfinite().all():
        raise ValueError(f"{str(source)!r}: the model gives infinite or undefined numbers: its weights are damaged.")
    return model


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a checkpoint file holds, read without running any code in it.

    Raises:
        ValueError: if it is damaged, or holds more than tensors, plain values and an `argparse.Namespace`.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if path.suffix == ".safetensors":
                return load_state_dict_from_file(path, map_location="cpu")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise anything
            raise ValueError(
                f"{str(path)!r} cannot be read as weights and plain settings{_foreign_objects(path)}; no code in it "
                "was run. If it is not damaged, have whoever made it save only the weights: "
                "torch.save(model.state_dict(), FILE), or as .safetensors."
            ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not weights by name.")
    return checkpoint


def _foreign_objects(path: Path) -> str:
    """Names of the objects that a pickle would need, which can be told without making them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no pickle in a zip file
        return ""
    return f", as it needs {sorted(names)}" if names else ""


def _read_file(path: Path, overrides: Mapping[str, Any]) -> MiclConverted:
    checkpoint = load_checkpoint(path)
    weights = next((checkpoint[name] for name in CONTAINERS if name in checkpoint), checkpoint)
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{str(path)!r} holds other things than weights, and no weights under {CONTAINERS}.")
    weights = {name: value for name, value in weights.items() if not name.startswith(NOT_THE_ENCODERS)}
    mask_ratio = getattr(checkpoint.get("args"), "mask_ratio", None)
    settings = {"mask_ratio": mask_ratio} if isinstance(mask_ratio, float) else {}
    try:
        config = MiclConfig(**{**_geometry(weights, overrides), **settings, **overrides})
        classifier = "head.weight" in weights
        model: MiclConverted = (MiclForImageClassification if classifier else MiclForPreTraining)(config)
        model.load_state_dict(convert_official_state_dict(weights, config, classifier), strict=True)
    except (ValueError, RuntimeError) as error:  # RuntimeError: shapes that do not go together
        raise ValueError(f"{str(path)!r}: {error}") from error
    model.eval()
    return model


def _geometry(weights: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `MiclConfig` that show in the shapes of weights under timm's names, but those in `overrides`."""
    for name, dimensions in {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}.items():
        if name not in weights or weights[name].ndim != dimensions:
            raise ValueError(
                f"{name!r} is missing or not of {dimensions} dimensions: these are no plain ViT's weights under "
                f"timm's names, but {sorted(weights)[:3]}."
            )
    hidden_size, channels, *patch_size = weights["patch_embed.proj.weight"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    found: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": _one_if_equal(patch_size),
        "num_hidden_layers": len(layers),
        "intermediate_size": weights["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "layer_norm_eps": 1e-6,  # as in all these programs
    }
    if "head.weight" in weights:
        found["classifier_pooling"] = "mean" if "fc_norm.weight" in weights else "cls"
        found["num_labels"] = weights["head.weight"].shape[0]
    if "num_attention_heads" not in overrides:
        if hidden_size not in KNOWN_HEADS:
            raise ValueError(f"Unknown heads for hidden_size={hidden_size}: give their number, --num_attention_heads.")
        found["num_attention_heads"] = KNOWN_HEADS[hidden_size]
    if "image_size" not in overrides:
        patches = weights["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ValueError(f"The {patches} patches beside [CLS] are no square: give --image_size HEIGHT WIDTH.")
        found["image_size"] = _one_if_equal([side * size for size in patch_size])
    return found


def _one_if_equal(size: list[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else size


def _read_stock(source: str, overrides: Mapping[str, Any]) -> MiclConverted:
    """A stock ViT, through the stock classes, which know all the names that its weights have had."""
    values = read_config_dict(source, "SOURCE")
    if values.get("model_type") != "vit":
        raise ValueError(
            f"{source!r} has model_type={values.get('model_type')!r}, not 'vit'. Give a stock transformers ViT, or of "
            "other programs the file with the weights."
        )
    stock_config = ViTConfig.from_pretrained(source)
    classifier = "ViTForImageClassification" in (stock_config.architectures or [])
    stock_class = ViTForImageClassification if classifier else ViTModel
    options = {} if classifier else {"add_pooling_layer": False}
    try:
        stock, info = stock_class.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # a damaged file raises an error of safetensors, which is of no built-in kind
        raise ValueError(f"SOURCE {source!r}: its weights cannot be read: {reason(error)}") from error
    missing = sorted(info["missing_keys"])
    unexpected = sorted(
        name for name in info["unexpected_keys"] if not name.removeprefix("vit.").startswith(NOT_THE_STOCK_ENCODERS)
    )
    if missing or unexpected:
        raise ValueError(f"{source!r} is no whole {stock_class.__name__}: missing {missing}, unexpected {unexpected}.")
    pooling = {"classifier_pooling": "cls"} if classifier else {}
    config = MiclConfig(**{**{name: getattr(stock_config, name) for name in STOCK_FIELDS}, **pooling, **overrides})
    model: MiclConverted = (MiclForImageClassification if classifier else MiclForPreTraining)(config)
    (model if classifier else model.vit).load_state_dict(stock.state_dict(), strict=True)
    model.eval()
    return model


def main() -> None:
    """Convert one model as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_micl.convert_checkpoint", description=(__doc__ or "").strip()
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint file, or a stock ViT's folder or Hub id")
    parser.add_argument("output", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--num_attention_heads", type=int, help="needed for widths other than the published ones")
    parser.add_argument("--image_size", type=int, nargs="+", help="pixels, or height and width: needed if not square")
    parser.add_argument("--mask_ratio", type=float, help="for further pre-training; unset, the file's, or MiCL's own")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    if "image_size" in options:
        options["image_size"] = options["image_size"] if len(options["image_size"]) > 1 else options["image_size"][0]
    try:
        print(convert(options.pop("source"), options.pop("output"), **options))  # noqa: T201
    except ValueError as error:
        sys.exit(f"modeling_micl.convert_checkpoint: {error}")


__all__ = ["convert", "convert_official_state_dict", "load_checkpoint", "official_parameter_names", "read_model"]

if __name__ == "__main__":
    main()
