"""The cost of a contrastive batch, as parts of `training.benchmark`: the settings of each, and how it is measured.

An entry of the results has everything about one kind of step; ratios are of the medians in it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from accelerate import Accelerator

from modeling_micl import MiclConfig, visible_patches_per_view
from training.config import setting
from training.cost_settings import MIB, CostSettings, Entry, ratio
from training.step_cost import Learner, Way, peak_memories, way_step
from training.timing import per_image, time_steps


@dataclass
class BatchSettings(CostSettings):
    """The model, by default ViT-S/16 on 224 pixels, and how it is measured."""

    image_size: int = setting(224, "pixels")
    patch_size: int = setting(16, "pixels")
    hidden_size: int = setting(384, "width of the encoder")
    num_hidden_layers: int = setting(12, "depth of the encoder")
    num_attention_heads: int = setting(6, "attention heads of each layer")
    mask_ratio: float = setting(0.9, "share of the patches that neither of two views sees, in [0, 1)")
    mixed_precision: Literal["no", "bf16"] = setting("bf16", "autocast of the forward pass; 'no' is fp32")
    contrastive_batch_sizes: list[int] = setting([64], "images contrasted together")

    def model_config(self, **overrides: Any) -> MiclConfig:
        """The model's configuration; raises ValueError on an impossible one."""
        geometry = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 4 * self.hidden_size,
            "mask_ratio": self.mask_ratio,
        }
        return MiclConfig(**geometry | overrides)

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self.model_config()
        self._validate_sizes("contrastive_batch_sizes", least=2)


@dataclass
class MemorySettings(BatchSettings):
    """Ways to make the same step."""

    contrastive_batch_sizes: list[int] = setting([32, 128, 512], "images contrasted together")
    micro_batch_sizes: list[int] = setting([16, 32, 64], "images at once in the cached loss, where the batch has more")
    output: str = setting("runs/benchmark/memory.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_sizes("micro_batch_sizes", least=1)
        for images in self.contrastive_batch_sizes:
            for micro_batch in self.micro_batch_sizes:
                if micro_batch < images and images % micro_batch:
                    raise ValueError(
                        f"micro_batch_sizes={self.micro_batch_sizes}: {micro_batch} does not divide the {images} of "
                        f"contrastive_batch_sizes={self.contrastive_batch_sizes}; use sizes that do."
                    )


@dataclass
class GrowthSettings(MemorySettings):
    """Small images, so that large batches are affordable and the loss is a large part of the step."""

    image_size: int = setting(32, "pixels")
    patch_size: int = setting(4, "pixels")
    contrastive_batch_sizes: list[int] = setting([64, 256, 1024, 4096], "images contrasted together")
    micro_batch_sizes: list[int] = setting([256], "images at once in the cached loss, which larger batches take")
    output: str = setting("runs/benchmark/growth.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        if len(self.micro_batch_sizes) != 1:
            raise ValueError(f"micro_batch_sizes takes one number in this part, got {self.micro_batch_sizes}.")


@dataclass
class ViewsSettings(BatchSettings):
    """Numbers of views; each view has the patches that it has when there are two."""

    num_views: list[int] = setting([2, 3, 4], "disjoint views of each image; times are relative to the first")
    repetitions: int = setting(9, "timed repetitions of each kind, after one to warm up")
    output: str = setting("runs/benchmark/views.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_sizes("num_views", least=2)
        config = self.model_config()
        patches = visible_patches_per_view(config.num_patches, self.mask_ratio)
        if max(self.num_views) * patches > config.num_patches:
            raise ValueError(
                f"num_views={max(self.num_views)} of {patches} patches are more than the {config.num_patches} patches "
                "of an image: use fewer, or raise mask_ratio."
            )

    def with_views(self, num_views: int) -> MiclConfig:
        """The model with so many views, of the same number of patches each."""
        config = self.model_config()
        patches, all_patches = visible_patches_per_view(config.num_patches, self.mask_ratio), config.num_patches
        # Half a patch more than needed: rounding cannot take one away.
        visible = num_views * patches + 0.5
        return self.model_config(num_views=num_views, mask_ratio=max(0.0, 1 - visible / all_patches))


def measure_memory(accelerator: Accelerator, config: MemorySettings) -> list[Entry]:
    """Every way for every batch; ratios are to the plain loss of the same batch."""
    ways = []
    for images in config.contrastive_batch_sizes:
        ways += [Way(images, images), Way(images, images, gradient_checkpointing=True)]
        ways += [Way(images, size) for size in config.micro_batch_sizes if size < images]
    model = config.model_config()
    builds = [partial(way_step, accelerator.mixed_precision, model, way) for way in ways]
    peaks = dict(zip(ways, peak_memories(accelerator.device, builds), strict=True))
    learner = Learner(accelerator, model, max(config.contrastive_batch_sizes))
    fitting = {way: partial(learner.step, way) for way in ways if peaks[way] is not None}
    seconds = time_steps(fitting, config.repetitions, accelerator.device)
    times = {way: per_image(seconds[way], way.images) if way in seconds else {"ms_per_image": None} for way in ways}
    entries = []
    for way in ways:
        plain, peak = Way(way.images, way.images), peaks[way]
        entries.append(
            {"name": way.name}
            | asdict(way)
            | {
                "time_ratio": ratio(times[way]["ms_per_image"], times[plain]["ms_per_image"]),
                "memory_ratio": ratio(peak, peaks[plain]),
                "peak_memory_mib": None if peak is None else peak / MIB,
            }
            | times[way]
        )
    return entries


def measure_growth(accelerator: Accelerator, config: GrowthSettings) -> list[Entry]:
    """The step and the loss alone for every batch; ratios are to the smallest one."""
    (most_at_once,) = config.micro_batch_sizes
    ways = [Way(images, min(images, most_at_once)) for images in sorted(config.contrastive_batch_sizes)]
    learner = Learner(accelerator, config.model_config(), ways[-1].images)
    steps: dict[tuple[str, Way], Callable[[], None]] = {}
    for way in ways:
        steps["step", way] = partial(learner.step, way)
        steps["loss", way] = partial(learner.contrast, way.images)
    seconds = time_steps(steps, config.repetitions, accelerator.device)
    times = {name: per_image(seconds[name], name[1].images) for name in steps}
    entries = []
    for way in ways:
        step, loss = times["step", way], times["loss", way]
        time_ratio = step["ms_per_image"] / times["step", ways[0]]["ms_per_image"]
        shares = {"time_ratio": time_ratio, "loss_share": loss["ms_per_image"] / step["ms_per_image"]}
        entries.append({"name": way.name} | asdict(way) | shares | step | {"loss_alone": loss})
    return entries


def measure_views(accelerator: Accelerator, config: ViewsSettings) -> list[Entry]:
    """Every number of views for every batch; ratios are to the first number of views."""
    models = {views: config.with_views(views) for views in config.num_views}
    most = max(config.contrastive_batch_sizes)
    learners = {views: Learner(accelerator, model, most) for views, model in models.items()}
    steps = {
        (views, images): partial(learner.step, Way(images, images))
        for images in config.contrastive_batch_sizes
        for views, learner in learners.items()
    }
    seconds = time_steps(steps, config.repetitions, accelerator.device)
    times = {name: per_image(seconds[name], name[1]) for name in steps}
    entries = []
    for (views, images), time in times.items():
        model, fewest = models[views], config.num_views[0]
        facts = {
            "images": images,
            "num_views": views,
            "patches_per_view": visible_patches_per_view(model.num_patches, model.mask_ratio, views),
            "mask_ratio": model.mask_ratio,
            "time_ratio": time["ms_per_image"] / times[fewest, images]["ms_per_image"],
            "views_ratio": views / fewest,
        }
        entries.append(facts | time)
    return entries
