"""The encoder that pre-training goes on from, where it does not begin with random weights."""

from pathlib import Path

from modeling_micl import MiclConfig, MiclForPreTraining, MiclModel
from modeling_micl.configuration_micl import height_and_width
from modeling_micl.convert_checkpoint import read_model
from modeling_micl.hub_access import read_config_dict
from training.evaluation import load_encoder
from training.run import Run
from training.tensors import load_whole


# What it must share with the settings. Its dropout and its objective are not taken over.
SIZES = ("image_size", "patch_size")
GEOMETRY = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
DETAILS = ("layer_norm_eps", "qkv_bias", "hidden_act")


def read_start(source: str, wanted: MiclConfig) -> MiclModel:
    """The encoder of a MiCL model or a stock ViT.

    Args:
        source: portable folder or Hub id.
        wanted: the geometry that it must have.

    Raises:
        ValueError: if it cannot be read whole, or has another geometry.
    """
    if read_config_dict(source, "--init_from").get("model_type") == "vit":
        encoder = read_model(source, mask_ratio=0.0).vit  # masking is up to the settings
    else:
        encoder = load_encoder(source, option="--init_from")
    found = encoder.config
    differing = [
        name for name in SIZES if height_and_width(getattr(found, name)) != height_and_width(getattr(wanted, name))
    ]
    differing += [name for name in GEOMETRY + DETAILS if getattr(found, name) != getattr(wanted, name)]
    if differing:
        theirs, ours = (", ".join(f"{name}={getattr(c, name)}" for name in differing) for c in (found, wanted))
        raise ValueError(
            f"--init_from {source!r} has {theirs}, but the settings give {ours}: change them, or start from another."
        )
    return encoder


def start_from(run: Run, source: str) -> None:
    """Replace a new run's random weights by those of an encoder, and keep it for the comparison at the end.

    Args:
        run: a run that has not made a step.
        source: see `read_start`.

    Raises:
        ValueError: as in `read_start`.
    """
    model = run.unwrapped()
    with run.accelerator.main_process_first():  # the others find what the first has downloaded
        encoder = read_start(source, model.config)
    load_whole(model.vit, encoder.state_dict())
    if run.accelerator.is_main_process:
        encoder.save_pretrained(_kept(run.folder))
    run.accelerator.wait_for_everyone()


def load_start(model: MiclForPreTraining, source: str, folder: Path) -> None:
    """Give a model the weights that the run in a folder started with; `source` is read only if they are gone."""
    kept = _kept(folder)
    encoder = read_start(str(kept) if kept.is_dir() else source, model.config)
    model.vit.load_state_dict(encoder.state_dict())


def _kept(folder: Path) -> Path:
    """Beside the checkpoints of a run, so that both are set aside together."""
    return folder / "checkpoints" / "start"
