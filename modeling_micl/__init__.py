"""MiCL for transformers: importing this package registers `model_type="micl"` with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTImageProcessor,
)

from .configuration_micl import MiclConfig
from .losses import micl_loss, t_sp_similarity
from .masking import sample_views, visible_patches_per_view
from .modeling_micl import (
    MiclBackbone,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclForPreTrainingOutput,
    MiclModel,
    MiclPreTrainedModel,
)
from .parameter_names import convert_official_state_dict


__version__ = "0.1.0"

AutoConfig.register("micl", MiclConfig)
AutoModel.register(MiclConfig, MiclModel)
AutoModelForPreTraining.register(MiclConfig, MiclForPreTraining)
AutoModelForImageClassification.register(MiclConfig, MiclForImageClassification)
AutoBackbone.register(MiclConfig, MiclBackbone)
AutoImageProcessor.register(MiclConfig, slow_image_processor_class=None, fast_image_processor_class=ViTImageProcessor)

__all__ = [
    "MiclBackbone",
    "MiclConfig",
    "MiclForImageClassification",
    "MiclForPreTraining",
    "MiclForPreTrainingOutput",
    "MiclModel",
    "MiclPreTrainedModel",
    "convert_official_state_dict",
    "micl_loss",
    "sample_views",
    "t_sp_similarity",
    "visible_patches_per_view",
]
