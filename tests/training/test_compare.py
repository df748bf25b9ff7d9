"""Other methods train the same encoder on the same images, and what they cost is counted alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_runs import results, run_finetuning, write_colours
from PIL import Image

from modeling_micl import MiclModel
from training import compare
from training.batch import Batch
from training.comparison import ComparisonConfig, build_method, gigaflop_per_trained_image, transform_of
from training.config import PretrainConfig
from training.features import normalize_pixels
from training.log_files import read_metrics
from training.monitor import gigaflop_per_image
from training.run import make_plan
from training.source import open_source


Settings = Callable[..., PretrainConfig]
METHODS = ("mae", "simclr", "supervised")


@pytest.fixture
def compared(settings: Settings) -> Callable[..., ComparisonConfig]:
    """Settings of a small run of another method."""

    def build(**changes: Any) -> ComparisonConfig:
        return ComparisonConfig(**(vars(settings()) | {"decoder_width": 32, "projector_width": 16} | changes))

    return build


Compared = Callable[..., ComparisonConfig]


def test_the_cost_counts_every_sequence_and_the_decoder(compared: Compared) -> None:
    """Of 16 patches; by hand: tokens · (8 D² + 4 D · 4 D) + 4 tokens² D, times 3, for each layer and sequence."""

    def layers(tokens: int, width: int) -> float:
        return 3 * (tokens * 24 * width**2 + 4 * tokens**2 * width) / 1e9

    cost = {method: gigaflop_per_trained_image(compared(method=method, mask_ratio=0.75)) for method in METHODS}
    assert cost["supervised"] == pytest.approx(layers(17, 32))
    keys_and_values, of_cls = 17 * 4 * 32**2, 4 * 32**2 + 4 * 17 * 32 + 16 * 32**2  # its only layer is for [CLS] alone
    assert cost["simclr"] == pytest.approx(2 * 3 * (keys_and_values + of_cls) / 1e9)
    assert cost["mae"] == pytest.approx(layers(5, 32) + layers(17, 32))
    deep = compared(method="mae", mask_ratio=0.75, decoder_layers=3, decoder_width=64)
    assert gigaflop_per_trained_image(deep) == pytest.approx(layers(5, 32) + 3 * layers(17, 64))
    micl = compared()
    assert gigaflop_per_trained_image(micl) == gigaflop_per_image(micl.model_config())


def test_simclr_gets_two_crops_of_each_image_side_by_side(compared: Compared) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    both = transform_of(compared(method="simclr"), (16, 16))(image, np.random.default_rng(1))
    assert both.size == (32, 16)
    first, second = np.split(np.asarray(both), 2, axis=1)
    assert (first != second).any()
    once = transform_of(compared(method="mae"), (16, 16))(image, np.random.default_rng(1))
    assert (np.asarray(once) == first).all()
    whole = compared(method="simclr", crop_min_scale=1.0, horizontal_flip=False)
    first, second = np.split(np.asarray(transform_of(whole, (16, 16))(image, np.random.default_rng(1))), 2, axis=1)
    assert (first == second).all()


def test_simclrs_positives_are_the_crops_of_one_image(compared: Compared) -> None:
    torch.manual_seed(0)
    model = build_method(compared(method="simclr"), 0).eval()
    crops = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    same = Batch(torch.cat([crops, crops], dim=2), torch.arange(6), torch.arange(6), [])
    other = Batch(torch.cat([crops, crops.roll(1, 0)], dim=2), torch.arange(6), torch.arange(6), [])
    assert model(same) < model(other)


def test_maes_encoder_gives_the_same_features_in_micls_class(compared: Compared) -> None:
    model = build_method(compared(method="mae"), 0).eval()
    pixels = normalize_pixels(torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8))
    vit = model.model.vit
    vit.config.mask_ratio = 0.0
    in_order = torch.arange(16).expand(2, -1) / 16  # otherwise its patches are shuffled
    with torch.no_grad():
        expected = vit(pixels, noise=in_order).last_hidden_state
        found = model.encoder().eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_mae_begins_as_published(compared: Compared) -> None:
    """With the positions in both halves, which transformers leaves at zero, and the encoder as MiCL's begins."""
    config = compared(method="mae", decoder_width=64)
    torch.manual_seed(3)
    model = build_method(config, 0)
    expected = MiclModel(config.model_config()).embeddings.position_embeddings
    torch.testing.assert_close(model.model.vit.embeddings.position_embeddings, expected)
    positions = model.model.decoder.decoder_pos_embed[0]
    assert len(positions.unique(dim=0)) == 17
    assert not model.model.decoder.decoder_pos_embed.requires_grad
    assert model.model.decoder.mask_token.std() > 0.01
    assert model.encoder().embeddings.cls_token.std() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_leaves_an_encoder(
    method: str,
    compared: Compared,
    write_shards: Callable[..., Path],
    no_accelerator: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(32, labels=2)
    monkeypatch.setattr("sys.argv", ["compare", "--method", method])
    config = compared(method=method, epochs=15, base_lr=0.05, crop_min_scale=0.9, mask_ratio=0.75)
    compare.main(config)
    folder = Path(config.output_dir)
    losses = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < (0.99 if method == "mae" else 0.95) * np.mean(losses[:5])
    training = json.loads((folder / "model" / "eval.json").read_text())["training"]
    assert training["settings"] == config.to_dict()
    assert (training["progress"]["step"], training["progress"]["seen"]) == (60, 480)
    assert training["command"] == f"python -m training.compare --method {method}"
    encoder = MiclModel.from_pretrained(folder / "model").state_dict()

    no_accelerator()
    compare.main(compared(**{**vars(config), "output_dir": str(folder.with_name("again"))}))
    again = MiclModel.from_pretrained(folder.with_name("again") / "model").state_dict()
    assert all(torch.equal(encoder[name], again[name]) for name in encoder)


def test_what_only_pretraining_does_is_refused(compared: Compared, no_accelerator: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="method='micl' is trained by training.pretrain"):
        compare.main(compared())
    with pytest.raises(ValueError, match="one process, and a batch in one pass"):
        compare.main(compared(method="mae", gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="decode_on_gpu=True is for training.pretrain alone"):
        compare.main(compared(method="mae", decode_on_gpu=True))


def test_evaluations_are_logged_and_leave_training_as_it_is(
    compared: Compared, write_shards: Callable[..., Path], no_accelerator: Callable[[], None], tmp_path: Path
) -> None:
    write_shards(32, labels=2)
    write_shards(12, split="test", labels=2)
    logs = []
    for name, changes in {"without": {}, "with": {"knn_epochs": 2, "knn_images": 20, "online_probe": True}}.items():
        no_accelerator()
        compare.main(compared(method="mae", mask_ratio=0.75, epochs=4, output_dir=str(tmp_path / name), **changes))
        logs.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    without, found = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs)
    assert found == without
    judged = [entry for entry in logs[1] if "loss" not in entry]
    assert [entry["step"] for entry in judged] == [8, 16]
    kinds = {"knn_accuracy", "knn_accuracy_mean", "probe_accuracy", "probe_accuracy_mean"}
    assert all(entry.keys() == {"step", *kinds} for entry in judged)


def test_a_decoded_batch_is_used_as_often_as_asked(compared: Compared, write_shards: Callable[..., Path]) -> None:
    write_shards(32)
    config = compared(method="mae", views_per_decode=3, epochs=2)
    source = open_source(config.dataset)
    seen = [
        batch.index.tolist()
        for batch in compare.training_batches(config, source, make_plan(config, source.num_images, processes=1))
    ]
    assert len(seen) == 8
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[5] != seen[6]


@pytest.mark.parametrize("method", METHODS)
def test_what_has_attention_is_compiled_if_asked_for(
    method: str,
    compared: Compared,
    write_shards: Callable[..., Path],
    no_accelerator: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(16, labels=2)
    compiled: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode)))
    compare.main(compared(method=method, mask_ratio=0.75, epochs=2, torch_compile="reduce-overhead"))
    names = {"mae": "ViTMAEForPreTraining", "simclr": "MiclModel", "supervised": "MiclForImageClassification"}
    assert compiled == [(names[method], "reduce-overhead")]


def test_a_classifier_of_another_methods_encoder_says_so(
    compared: Compared, no_accelerator: Callable[[], None], tmp_path: Path
) -> None:
    write_colours(tmp_path / "data", "train", 32)
    write_colours(tmp_path / "data", "test", 21)
    compare.main(compared(method="mae", mask_ratio=0.75, epochs=2))
    run = run_finetuning(
        tmp_path, model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "fine"), epochs=1, warmup_epochs=0
    )
    assert results(run / "model")[0]["protocol"] == "fine-tuning for 1 epochs from MAE"
    assert "| how | pre-training by MAE |" in (run / "model" / "README.md").read_text()
