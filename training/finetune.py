"""Fine-tune a pre-trained encoder for classification.

`accelerate launch -m training.finetune --config training/recipes/finetune_photos.yaml --model runs/photos/model`
"""

import sys

from accelerate import Accelerator

from training.alone import alone_in
from training.augment import Augmentation
from training.classifier_config import FinetuneConfig
from training.evaluation import stored_training
from training.log import Logger, end_trackers
from training.loop import train
from training.optim import layer_decay_optimizer
from training.parser import parse_settings
from training.processes import lost_processes, start_accelerator
from training.run import Run, summary
from training.source import ImageSource
from training.stop import STOPPED_STATUS, StopRequest
from training.supervised import Classify, build_classifier, open_classes, save_classifier, write_classifier
from training.uploads import Uploads


PROGRAM = "training.finetune"


class Finetune(Classify):
    """Training of the whole model, which goes to the Hub if asked for."""

    def __init__(
        self,
        run: Run,
        config: FinetuneConfig,
        augmentation: Augmentation,
        eval_source: ImageSource | None,
        uploads: Uploads,
    ) -> None:
        super().__init__(run, config, augmentation, eval_source)
        self.uploads = uploads

    def protocol(self) -> str:
        """How the model has been trained so far, in words."""
        epochs, start = self.run.progress.forwards / self.run.plan.forwards_per_epoch, "random weights"
        if not self.config.random_init:
            training = stored_training(str(self.config.model)) or {}
            start = training.get("method", "MiCL")  # which only `training.compare` names
        return f"fine-tuning for {epochs:.3g} epochs from {start}"

    def after_checkpoint(self) -> None:
        """Send the model to the Hub, if asked for."""
        self.uploads.send_checkpoint(lambda: write_classifier(self, self.judged(), PROGRAM, self.protocol()))


def main(config: FinetuneConfig) -> bool:
    """One run from its settings to its classifier; returns False if it was stopped before."""
    accelerator = start_accelerator(config)
    with alone_in(config, accelerator):
        return finetune(config, accelerator)


def finetune(config: FinetuneConfig, accelerator: Accelerator) -> bool:
    """As `main`, in processes that have started."""
    augmentation = Augmentation(
        crop_min_scale=config.crop_min_scale,
        horizontal_flip=config.horizontal_flip,
        rand_augment=config.rand_augment,
        erasing_probability=config.erasing_probability,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        label_smoothing=config.label_smoothing,
    )
    uploads = Uploads(config, accelerator)
    source, eval_source, names = open_classes(config, accelerator)
    model = build_classifier(
        config,
        names,
        config.new_head,
        classifier_pooling=config.classifier_pooling,
        drop_path_rate=config.drop_path_rate,
    )
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = layer_decay_optimizer(model, config.weight_decay, config.layer_decay, betas)
    run = Run.start(config, accelerator, source, model, optimizer, config.ema_decay)
    start = "random weights" if config.random_init else config.model
    accelerator.print(summary(run, {"model": f"{start}, {len(names)} classes, layer decay {config.layer_decay}"}))
    stop = StopRequest()
    task = Finetune(run, config, augmentation, eval_source, uploads)
    with lost_processes(run), Logger(run, "fine-tuning") as log:
        completed = train(run, task, log, stop)
    if completed:
        uploads.wait()
        save_classifier(task, task.judged(), log, PROGRAM, task.protocol())
        uploads.send_final(run.folder / "model")
        end_trackers(accelerator)
    else:
        log.say_stopped()
    return completed


if __name__ == "__main__":
    try:
        completed = main(parse_settings(FinetuneConfig, "training.finetune"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.finetune: {error}")
    if not completed:
        sys.exit(STOPPED_STATUS)
