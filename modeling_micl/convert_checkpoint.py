"""Weights of the authors' program in MiCL's parameter names."""

from collections.abc import Mapping

from torch import Tensor

from .configuration_micl import MiclConfig


_NAMES_OUTSIDE_LAYERS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}
_MODULES_IN_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def official_parameter_names(config: MiclConfig) -> dict[str, list[str]]:
    """Official name → our names, for every parameter; the fused qkv becomes [query, key, value] in row order."""
    names = {official: [ours] for official, ours in _NAMES_OUTSIDE_LAYERS.items()}
    kinds = ("weight", "bias")
    for layer in range(config.num_hidden_layers):
        official, ours = f"blocks.{layer}", f"vit.layers.{layer}"
        for kind in kinds:
            for theirs, module in _MODULES_IN_LAYERS.items():
                names[f"{official}.{theirs}.{kind}"] = [f"{ours}.{module}.{kind}"]
            if kind == "weight" or config.qkv_bias:
                names[f"{official}.attn.qkv.{kind}"] = [f"{ours}.attention.{p}_proj.{kind}" for p in "qkv"]
    return names


def convert_official_state_dict(state_dict: Mapping[str, Tensor], config: MiclConfig) -> dict[str, Tensor]:
    """Rename the authors' pre-training weights and split their fused qkv.

    Args:
        state_dict: weights under the names of the authors' program, which are timm's.
        config: the geometry they have.

    Returns:
        A state dict that `MiclForPreTraining(config).load_state_dict` takes strictly.

    Raises:
        ValueError: if weights are missing or unexpected, naming them.
    """
    names = official_parameter_names(config)
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"These are not the weights of a MiCL encoder with {config.num_hidden_layers} layers: "
            f"missing {missing}, unexpected {unexpected}. Check num_hidden_layers and qkv_bias."
        )
    converted = {}
    for official, ours in names.items():
        parts = state_dict[official].chunk(len(ours))
        converted.update({name: part.clone() for name, part in zip(ours, parts, strict=True)})
    return converted
