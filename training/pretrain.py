"""Pre-train a MiCL encoder: `accelerate launch -m training.pretrain --config training/recipes/photos.yaml`."""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from modeling_micl import MiclForPreTraining, MiclForPreTrainingOutput, visible_patches_per_view
from modeling_micl.configuration_micl import height_and_width
from training.alarms import CollapseAlarm
from training.alone import alone_in
from training.batch import Batch
from training.cached import cached_backward
from training.card import write_card
from training.config import PretrainConfig
from training.device_decoding import check_decoder
from training.features import encoder_features, normalize_pixels
from training.figures import save_curves, save_figures
from training.images import CropAndFlip, Transform
from training.log import Logger, end_trackers
from training.log_files import read_metrics
from training.loop import Task, train
from training.micro_batch import find_micro_batch
from training.monitor import batch_metrics, gigaflop_per_image
from training.optim import build_optimizer
from training.parser import parse_settings
from training.processes import lost_processes, start_accelerator
from training.results import TRAINED, add_results, save_model, training_facts
from training.run import Model, Run, summary
from training.scores import final_scores, frozen_scores, knn_results, knn_table
from training.source import ImageSource, open_evaluation, open_split
from training.start import load_start, start_from
from training.stop import STOPPED_STATUS, StopRequest
from training.uploads import Uploads


def view_noise(seed: int, forward: int, images: int, num_patches: int, device: torch.device) -> Tensor:
    """Masking noise (images, L) of a whole global batch, a function of the seed and the number of the forward pass.

    Every process draws all of it and takes the rows of its own places, so that the views of an image do not depend on
    how many processes there are; it is a few bytes for each image.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence((seed, forward)).generate_state(1, np.uint64)[0]))
    return torch.rand(images, num_patches, generator=generator, device=device)


class Contrast(Task):
    """Pre-training: let the views of each image find each other in the batch.

    Args:
        run: the run.
        config: its settings.
        eval_source: labelled images that kNN classifies now and then, None for none.
        uploads: where the model goes at checkpoints, None for nowhere.
    """

    def __init__(
        self, run: Run, config: PretrainConfig, eval_source: ImageSource | None, uploads: Uploads | None = None
    ) -> None:
        super().__init__(run, config.knn_epochs if eval_source else 0, config.views_per_decode, config.decode_on_gpu)
        self.config, self.eval_source, self.uploads = config, eval_source, uploads

    def transform(self, size: tuple[int, int]) -> Transform:
        """Crop and flip, nothing else."""
        return CropAndFlip(size, self.config.crop_min_scale, self.config.horizontal_flip)

    def forward(self, batch: Batch) -> MiclForPreTrainingOutput:
        """Draw the views and contrast them."""
        return self._embed(batch, self._noise(), slice(None), return_loss=True)

    def forward_backward(self, batch: Batch) -> ModelOutput:
        """By the cached loss where the process's share of the batch takes several passes."""
        run, plan = self.run, self.run.plan
        if plan.images_per_pass == plan.images_per_process:
            return super().forward_backward(batch)
        noise = self._noise()

        def embed(rows: slice) -> MiclForPreTrainingOutput:
            return self._embed(batch, noise, rows, return_loss=False)

        return cached_backward(run.accelerator, run.model, embed, plan.images_per_process, plan.images_per_pass)

    def _noise(self) -> Tensor:
        """This process's rows of the noise of the whole batch."""
        run, num_patches = self.run, self.run.unwrapped().config.num_patches
        images, device = run.plan.forward_images, run.accelerator.device
        noise = view_noise(self.config.seed, run.progress.forwards, images, num_patches, device)
        return noise[run.first_place : run.last_place]

    def _embed(self, batch: Batch, noise: Tensor, rows: slice, return_loss: bool) -> MiclForPreTrainingOutput:
        """Run the model on some of the images, which come to the device only now unless they were decoded there."""
        pixels = normalize_pixels(batch.pixels[rows].to(self.run.accelerator.device, non_blocking=True))
        output: MiclForPreTrainingOutput = self.run.model(pixels, noise=noise[rows], return_loss=return_loss)
        return output

    def metrics(self, output: ModelOutput) -> dict[str, Tensor]:
        """How well views find each other, and how far embeddings spread."""
        assert isinstance(output, MiclForPreTrainingOutput)
        return batch_metrics(output, self.run.first_place if self.config.negatives == "global" else 0)

    def evaluate(self) -> dict[str, float]:
        """Judge the frozen features as they are now, by kNN and, if asked for, a linear probe."""
        assert self.eval_source
        run, config = self.run, self.config
        extractor = {"encoder": encoder_features(run.whole_model().vit.eval(), run.accelerator)}
        size = height_and_width(run.unwrapped().config.image_size)
        splits = (run.source, self.eval_source)
        probes = config.online_probe
        scores = frozen_scores(run.accelerator, extractor, splits, size, config.knn_images, config.num_workers, probes)
        found = {"knn_accuracy": scores.knn, "probe_accuracy": scores.probe}
        return {name: values["encoder"] for name, values in found.items() if values}

    def after_checkpoint(self) -> None:
        """Send the model to the Hub, if asked for."""
        if self.uploads:
            self.uploads.send_checkpoint(lambda: write_model(self.run, self.run.unwrapped()))


def write_model(run: Run, model: Model) -> Path:
    """Write the portable folder, with how the model was trained."""
    save_model(model, run.folder / "model", training_facts(run, "training.pretrain"))
    return run.folder / "model"


def open_sources(config: PretrainConfig) -> tuple[ImageSource, ImageSource | None]:
    """The training images and, if there is a labelled split for it, those that kNN classifies."""
    source = open_split(config, config.split, config.max_images)
    return source, open_evaluation(config, source) if config.knn_images else None


def untrained_model(config: PretrainConfig) -> MiclForPreTraining:
    """The model of the settings with random weights; the same every time."""
    set_seed(config.seed)
    return MiclForPreTraining(config.model_config())


def use_largest_micro_batch(run: Run) -> None:
    """Plan with as many images per pass as fit into memory, and say how many they are."""
    accelerator, model = run.accelerator, run.unwrapped().config

    def embed(images: int) -> Tensor:
        size = (images, *height_and_width(model.image_size), model.num_channels)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=accelerator.device)
        view_embeds: Tensor = run.model(normalize_pixels(pixels), return_loss=False).view_embeds
        return view_embeds

    share = run.plan.images_per_process
    run.plan.images_per_pass = find_micro_batch(accelerator, run.model, run.optimizer, embed, share)
    accelerator.print(f"per_device_micro_batch_size={run.plan.images_per_pass} is the largest that fits")


def start_run(config: PretrainConfig, accelerator: Accelerator, source: ImageSource) -> Run:
    """Build the model and the optimiser, or restore them from the newest checkpoint."""
    model = untrained_model(config)
    optimizer = build_optimizer(model, config.weight_decay, (config.adam_beta1, config.adam_beta2))
    run = Run.start(config, accelerator, source, model, optimizer)
    if config.init_from is not None and run.progress.step == 0:  # a resumed run has its checkpoint's weights
        start_from(run, config.init_from)
    if config.find_micro_batch:
        use_largest_micro_batch(run)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seen = visible_patches_per_view(model.config.num_patches, config.mask_ratio, config.num_views)
    about = {
        "model": f"{parameters / 1e6:.1f} M parameters, {gigaflop_per_image(model.config):.3g} GFLOP per image",
        "views": f"{config.num_views} of {seen} patches each, out of {model.config.num_patches}; drawn "
        f"{config.views_per_decode} × from each decoded batch",
        "global_batch_size": f"{run.plan.contrasted_images} images contrasted together ({config.negatives} negatives)",
    }
    accelerator.print(summary(run, about))
    return run


def finish(run: Run, config: PretrainConfig, log: Logger, eval_source: ImageSource | None, uploads: Uploads) -> None:
    """Write the portable model, evaluate it, write its eval.json, card and figures, and print the table."""
    uploads.wait()
    accelerator, folder = run.accelerator, run.folder / "model"
    trained = run.whole_model()
    assert isinstance(trained, MiclForPreTraining)
    if accelerator.is_main_process:
        write_model(run, trained)
    before = untrained_model(config).to(accelerator.device)
    if config.init_from is not None:
        load_start(before, config.init_from, run.folder)
    if accelerator.is_main_process:
        save_figures(run.folder, before, trained, eval_source or run.source)
    if eval_source:
        splits = (run.source, eval_source)
        scores = final_scores(accelerator, before, trained, splits, config.knn_images, config.num_workers)
        log.write_evaluation(lambda: {"knn_accuracy": scores.knn[TRAINED]} if scores.knn else {})
        if accelerator.is_main_process:
            add_results(folder, knn_results(scores, config, splits))
        accelerator.print(knn_table(scores))
    if accelerator.is_main_process:
        write_card(folder, run.folder.name, config.push_to_hub)
        save_curves(run.folder / "figures" / "curves.png", read_metrics(run.folder / "metrics.jsonl"))
    accelerator.print(f"model: {folder}, figures: {run.folder / 'figures'}")
    uploads.send_final(folder)
    end_trackers(accelerator)


def main(config: PretrainConfig) -> bool:
    """One run from its settings to its model; returns False if it was stopped before."""
    accelerator = start_accelerator(config)
    if config.decode_on_gpu:
        check_decoder(accelerator.device)
    with alone_in(config, accelerator):
        return pretrain(config, accelerator)


def pretrain(config: PretrainConfig, accelerator: Accelerator) -> bool:
    """As `main`, in processes that have started."""
    uploads = Uploads(config, accelerator)
    with accelerator.main_process_first():  # the others find what the first has prepared
        source, eval_source = open_sources(config)
    run = start_run(config, accelerator, source)
    stop = StopRequest()
    alarm = CollapseAlarm(run.plan.contrasted_images)
    arithmetic = gigaflop_per_image(run.unwrapped().config)
    with lost_processes(run), Logger(run, "pre-training", alarm.check, arithmetic) as log:
        log.write_facts({"negatives": config.negatives})
        completed = train(run, Contrast(run, config, eval_source, uploads), log, stop)
    if completed:
        finish(run, config, log, eval_source, uploads)
    else:
        log.say_stopped()
    return completed


if __name__ == "__main__":
    try:
        completed = main(parse_settings(PretrainConfig, "training.pretrain"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.pretrain: {error}")
    if not completed:
        sys.exit(STOPPED_STATUS)
