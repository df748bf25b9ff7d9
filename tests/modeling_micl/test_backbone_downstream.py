"""The backbone in the models it is made for: segmentation and detection, of transformers and of torchvision."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_micl import MiclBackbone, MiclConfig, MiclForPreTraining, MiclPreTrainedModel


Model = Callable[..., MiclPreTrainedModel]
ROOT = Path(__file__).parents[2]
FOUR_STAGES = ["stage1", "stage2", "stage3", "stage4"]

# Small models around a backbone, and the name that its module has in them.

DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": 6,
    "num_labels": 3,
}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 5,
    "num_labels": 3,
}


def upernet(backbone_config: MiclConfig) -> PreTrainedModel:
    config = UperNetConfig(
        backbone_config=backbone_config, num_labels=4, hidden_size=32, pool_scales=(1, 2), use_auxiliary_head=False
    )
    return UperNetForSemanticSegmentation(config)


def detr(backbone_config: MiclConfig) -> PreTrainedModel:
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone_config, **DETR))


def conditional_detr(backbone_config: MiclConfig) -> PreTrainedModel:
    return ConditionalDetrForObjectDetection(ConditionalDetrConfig(backbone_config=backbone_config, **DETR))


def deformable_detr(backbone_config: MiclConfig) -> PreTrainedModel:
    levels = len(backbone_config.out_features)
    config = DeformableDetrConfig(backbone_config=backbone_config, num_feature_levels=levels, **DETR)
    return DeformableDetrForObjectDetection(config)


def mask2former(backbone_config: MiclConfig) -> PreTrainedModel:
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone_config, **MASK2FORMER))


DETECTORS = [(detr, "model.backbone.model"), (conditional_detr, "model.backbone.model")]
DETECTORS += [(deformable_detr, "model.backbone.model")]
SEGMENTERS = [(upernet, "backbone"), (mask2former, "model.pixel_level_module.encoder")]
DOWNSTREAM = pytest.mark.parametrize(("build", "name"), SEGMENTERS + DETECTORS)


def untrained(module: nn.Module) -> list[str]:
    """Names of the trainable weights that no gradient reached."""
    return [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def frozen(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


# Pre-trained weights


@DOWNSTREAM
def test_pretrained_weights_are_carried_into_a_model_with_a_backbone_config(
    build: Callable[[MiclConfig], PreTrainedModel], name: str, tiny_model: Model, tmp_path: Path
) -> None:
    tiny_model(MiclForPreTraining, num_hidden_layers=4).save_pretrained(tmp_path)
    backbone = MiclBackbone.from_pretrained(tmp_path, out_features=FOUR_STAGES)
    model, images = build(backbone.config).eval(), torch.randn(2, 3, 40, 56)
    expected = backbone(images).feature_maps
    inner = model.get_submodule(name)
    assert type(inner) is MiclBackbone
    assert not torch.equal(inner(images).feature_maps[0], expected[0])  # transformers starts from random weights

    inner.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(inner(images).feature_maps, expected, rtol=0, atol=0)
    torch.testing.assert_close(inner.state_dict(), MiclBackbone.from_pretrained(tmp_path).state_dict(), rtol=0, atol=0)
    assert frozen(inner) == ["embeddings.position_embeddings"]


@DOWNSTREAM
def test_a_model_with_a_backbone_is_saved_and_loaded(
    build: Callable[[MiclConfig], PreTrainedModel], name: str, tiny_config: Callable[..., MiclConfig], tmp_path: Path
) -> None:
    model = build(
        tiny_config(num_hidden_layers=4, out_indices=[-4, -3, -2, -1], patch_size=(8, 4), num_views=3)
    ).eval()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded.config.backbone_config) is MiclConfig
    assert loaded.config.backbone_config.out_features == FOUR_STAGES
    assert (loaded.config.backbone_config.patch_size, loaded.config.backbone_config.num_views) == ([8, 4], 3)
    assert frozen(loaded.get_submodule(name)) == ["embeddings.position_embeddings"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    loaded = deepcopy(loaded)  # out of the mapped file, where another alignment makes convolutions round differently
    images = torch.randn(2, 3, 48, 32)
    assert torch.equal(loaded(images).to_tuple()[0], model(images).to_tuple()[0])


# Segmentation


def shapes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise images with a circle (1), a square (2) or a triangle (3) in a colour that does not tell which."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.3 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        radius = int(torch.randint(7, 12, (), generator=generator))
        y, x = torch.randint(radius, size - radius, (2,), generator=generator).tolist()
        down, across = rows - y, (columns - x).abs()
        inside = [
            down**2 + across**2 <= radius**2,
            torch.maximum(down.abs(), across) <= 0.8 * radius,
            (down <= 0.8 * radius) & (2 * across <= down + radius),
        ]
        kind = int(torch.randint(3, (), generator=generator))
        colour = nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
        image += 2 * colour[:, None, None] * inside[kind]
        label[inside[kind]] = 1 + kind
    return images, labels


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the four classes of intersection over union of all pixels."""
    pixels = torch.bincount((4 * labels + predicted).flatten(), minlength=16).view(4, 4)
    return (pixels.diag() / (pixels.sum(0) + pixels.sum(1) - pixels.diag())).mean().item()


@torch.no_grad()
def segment(model: PreTrainedModel, images: Tensor) -> Tensor:
    return model.eval()(images).logits.argmax(1)


def fine_tune(model: PreTrainedModel, images: Tensor, labels: Tensor, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (16,))
        model(images[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


LOAD_AND_SEGMENT = """
import sys, torch, modeling_micl
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[1] + "/images.pt")).logits.detach(), sys.argv[1] + "/logits.pt")
"""


@pytest.mark.slow
def test_upernet_learns_to_segment_shapes_and_a_fresh_process_loads_it(
    tiny_config: Callable[..., MiclConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = upernet(tiny_config(patch_size=4, num_attention_heads=4, out_features=["stage1", "stage2"]))
    images, labels = shapes(200, seed=1)
    before = mean_iou(segment(model, images), labels)
    background = mean_iou(torch.zeros_like(labels), labels)
    fine_tune(model, *shapes(2000, seed=0), steps=300)
    assert max(before, background) < 0.25
    assert mean_iou(segment(model, images), labels) > 0.7  # with a frozen backbone it stays between 0.5 and 0.65

    model.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(segment(loaded, images), segment(model, images))
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", LOAD_AND_SEGMENT, str(tmp_path)], cwd=ROOT, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), loaded(images).logits)


def test_mask2former_trains_on_masks(tiny_config: Callable[..., MiclConfig]) -> None:
    model = mask2former(tiny_config(num_hidden_layers=4, out_features=FOUR_STAGES)).train()
    masks = torch.zeros(2, 64, 96)
    masks[0, :32], masks[1, 40:] = 1, 1
    outputs = model(
        torch.randn(2, 3, 64, 96),
        mask_labels=[masks, masks[:1]],
        class_labels=[torch.tensor([0, 2]), torch.tensor([1])],
    )
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert untrained(model.model.pixel_level_module.encoder) == []


def test_tokens_with_cls_go_into_dpt(tiny_model: Model, tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config(num_hidden_layers=4, out_features=FOUR_STAGES, reshape_hidden_states=False)
    model = DPTForDepthEstimation(
        DPTConfig(backbone_config=config, neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16)
    )
    images = torch.randn(2, 3, 32, 48)
    assert [tuple(tokens.shape) for tokens in model.backbone(images).feature_maps] == [(2, 1 + 4 * 6, 32)] * 4
    depth = model(images).predicted_depth
    depth.mean().backward()
    assert depth.shape == (2, 64, 96)
    assert depth.isfinite().all()


# Detection


@pytest.mark.parametrize(("build", "name"), DETECTORS)
def test_a_detector_of_the_detr_family_trains_on_boxes(
    build: Callable[[MiclConfig], PreTrainedModel], name: str, tiny_config: Callable[..., MiclConfig]
) -> None:
    model = build(tiny_config())
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.1, 0.3]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.2, 0.7, 0.4, 0.5]])},
    ]
    outputs = model(torch.randn(2, 3, 64, 96), labels=labels)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert outputs.pred_boxes.shape == (2, 6, 4)
    assert outputs.pred_boxes.min() >= 0
    assert outputs.pred_boxes.max() <= 1
    assert untrained(model.get_submodule(name)) == []


class FeaturePyramid(nn.Module):
    """The last feature map at four sizes, two larger and one smaller than it, as torchvision's detectors want them.

    A plain ViT has one resolution; this is the simple pyramid of ViTDet (arXiv 2203.16527).
    """

    def __init__(self, backbone: MiclBackbone, out_channels: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        width = backbone.channels[-1]
        self.scales = nn.ModuleList(
            [
                nn.ConvTranspose2d(width, out_channels, kernel_size=4, stride=4),
                nn.ConvTranspose2d(width, out_channels, kernel_size=2, stride=2),
                nn.Conv2d(width, out_channels, kernel_size=1),
                nn.Conv2d(width, out_channels, kernel_size=2, stride=2),
            ]
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        feature_map = self.backbone(images).feature_maps[-1]
        return {str(level): scale(feature_map) for level, scale in enumerate(self.scales)}


def test_mask_rcnn_of_torchvision_trains_on_boxes_and_masks(tiny_model: Model) -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid(tiny_model(MiclBackbone), out_channels=16)
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4)
    few = {"rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 64, "box_detections_per_img": 10}
    model = MaskRCNN(pyramid, num_classes=4, rpn_anchor_generator=anchors, min_size=64, max_size=96, **few)
    images, masks = [torch.rand(3, 60, 80), torch.rand(3, 48, 48)], torch.zeros(1, 60, 80, dtype=torch.uint8)
    masks[:, 5:30, 5:25] = 1
    targets: list[dict[str, Any]] = [
        {"boxes": torch.tensor([[5.0, 5, 25, 30]]), "labels": torch.tensor([1]), "masks": masks},
        {"boxes": torch.tensor([[8.0, 9, 40, 41]]), "labels": torch.tensor([3]), "masks": masks[:, :48, :48]},
    ]
    losses = model(images, targets)
    total = sum(losses.values())
    total.backward()
    assert losses.keys() >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert total.isfinite()
    assert untrained(pyramid.backbone) == []
    for image, found in zip(images, model.eval()(images), strict=True):
        assert found["boxes"].shape == (len(found["labels"]), 4)
        assert found["masks"].shape == (len(found["labels"]), 1, *image.shape[1:])
