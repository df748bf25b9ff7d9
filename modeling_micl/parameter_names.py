"""What the authors' program calls the parameters of MiCL's models; its names are timm's and MAE's."""

from collections.abc import Mapping

from torch import Tensor

from .configuration_micl import MiclConfig


_NAMES_OUTSIDE_LAYERS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
}
_MODULES_IN_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ENCODERS_END = {"norm": "vit.layernorm"}
# By what the classifier pools; with the mean, a norm of the head's own takes the place of the encoder's last one.
_CLASSIFIERS_END = {
    "cls": {"norm": "vit.layernorm", "head": "classifier"},
    "mean": {"fc_norm": "fc_norm", "head": "classifier"},
}


def official_parameter_names(config: MiclConfig, classifier: bool = False) -> dict[str, list[str]]:
    """Official name → our names, for every parameter; the fused qkv becomes [query, key, value] in row order.

    Args:
        config: of the model.
        classifier: of `MiclForImageClassification` instead of `MiclForPreTraining`.
    """
    names = {official: [ours] for official, ours in _NAMES_OUTSIDE_LAYERS.items()}
    end = _CLASSIFIERS_END[config.classifier_pooling] if classifier else _ENCODERS_END
    kinds = ("weight", "bias")
    for kind in kinds:
        names |= {f"{official}.{kind}": [f"{ours}.{kind}"] for official, ours in end.items()}
    for layer in range(config.num_hidden_layers):
        official, ours = f"blocks.{layer}", f"vit.layers.{layer}"
        for kind in kinds:
            for theirs, module in _MODULES_IN_LAYERS.items():
                names[f"{official}.{theirs}.{kind}"] = [f"{ours}.{module}.{kind}"]
            if kind == "weight" or config.qkv_bias:
                names[f"{official}.attn.qkv.{kind}"] = [f"{ours}.attention.{p}_proj.{kind}" for p in "qkv"]
    return names


def convert_official_state_dict(
    state_dict: Mapping[str, Tensor], config: MiclConfig, classifier: bool = False
) -> dict[str, Tensor]:
    """Rename the authors' weights and split their fused qkv.

    Args:
        state_dict: weights under the names of the authors' program, which are timm's.
        config: the geometry they have.
        classifier: they are those of a classifier: for `MiclForImageClassification` instead of `MiclForPreTraining`.

    Returns:
        A state dict that the model of this configuration takes strictly.

    Raises:
        ValueError: if weights are missing or unexpected, naming them.
    """
    names = official_parameter_names(config, classifier)
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"These are not the weights of a MiCL {'classifier' if classifier else 'encoder'} with "
            f"{config.num_hidden_layers} layers: missing {missing}, unexpected {unexpected}. "
            "Check num_hidden_layers and qkv_bias."
        )
    converted = {}
    for official, ours in names.items():
        parts = state_dict[official].chunk(len(ours))
        converted.update({name: part.clone() for name, part in zip(ours, parts, strict=True)})
    return converted
