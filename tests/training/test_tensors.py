"""What a checkpoint holds comes back bit for bit, strictly, and is no pickle."""

import ast
import copy
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from classifier_runs import EVERYTHING, run_finetuning, save_encoder, weights, write_colours
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modeling_micl import MiclConfig, MiclForImageClassification, MiclForPreTraining
from training.checkpoint import find_defect, newest_checkpoint
from training.config import PretrainConfig
from training.linear_probe import with_batch_norm
from training.optim import build_optimizer, lars_optimizer, layer_decay_optimizer, set_learning_rate
from training.tensors import gather_state, load_tensors, write_files


ROOT = Path(__file__).parents[2]
FILES = ("model", "averaged", "optimizer")

Build = Callable[..., SimpleNamespace]


def train(run: SimpleNamespace, steps: int = 1) -> None:
    """Steps with a learning rate that no decimal fraction is exactly."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pixels, noise = (torch.rand(size, generator=generator) for size in ((4, 3, 32, 32), (4, 16)))
        pretraining = isinstance(run.model, MiclForPreTraining)
        output = (
            run.model(pixels, noise=noise) if pretraining else run.model(pixels, labels=torch.tensor([0, 1, 1, 0]))
        )
        run.accelerator.backward(output.loss)
        set_learning_rate(run.optimizer, 0.01 / (step + 3))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.averaged is not None:
            run.averaged.update_parameters(run.model)


@pytest.fixture
def build(no_accelerator: None, tiny_config: Callable[..., MiclConfig]) -> Build:
    """Build what one of the programs trains, with weights of this seed, as `training.run.Run` does."""

    def build(program: str, seed: int = 0) -> SimpleNamespace:
        torch.manual_seed(seed)
        averaged = None
        if program == "pretrain":
            model: torch.nn.Module = MiclForPreTraining(tiny_config())
            optimizer: torch.optim.Optimizer = build_optimizer(model, 0.05, (0.9, 0.95))
        elif program == "finetune":
            model = MiclForImageClassification(tiny_config(classifier_pooling="mean"))
            optimizer = layer_decay_optimizer(model, 0.05, 0.65, (0.9, 0.999))
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        else:
            model = with_batch_norm(MiclForImageClassification(tiny_config(classifier_pooling="cls"))).train()
            optimizer = lars_optimizer(model.classifier, 0.0)
        accelerator = Accelerator(mixed_precision="no")
        model, optimizer = accelerator.prepare(model, optimizer)
        return SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer, averaged=averaged)

    return build


def state(run: SimpleNamespace) -> dict[str, Any]:
    """Everything, by names and numbers; sequences as JSON has them."""
    optimizer = run.optimizer.state_dict()
    groups = json.loads(json.dumps(optimizer["param_groups"]))
    average = run.averaged.state_dict() if run.averaged is not None else {}
    return copy.deepcopy({"model": run.model.state_dict(), "average": average, **optimizer, "param_groups": groups})


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("program", ["pretrain", "finetune", "probe"])
def test_all_comes_back_bit_for_bit_and_so_does_the_next_step(
    program: str, steps: int, build: Build, tmp_path: Path
) -> None:
    run, other = build(program), build(program, seed=1)
    train(run, steps)
    before = state(run)
    write_files(gather_state(run), tmp_path)
    assert_same(state(run), before)
    train(other, 5)
    load_tensors(other, tmp_path)
    assert_same(state(other), before)
    assert bool(before["state"]) == (steps > 0)
    train(run)
    train(other)
    assert_same(state(other), state(run))


def test_what_the_optimizers_hold_is_stored_by_name(build: Build, tmp_path: Path) -> None:
    run = build("finetune")
    train(run, 2)
    write_files(gather_state(run), tmp_path)
    groups = json.loads((tmp_path / "optimizer.json").read_text())["param_groups"]
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert {name for group in groups for name in group["params"]} == trained
    assert "vit.embeddings.position_embeddings" in load_file(tmp_path / "model.safetensors").keys() - trained
    assert {group["lr"] for group in groups} == {0.01 / 4 * 0.65**layers for layers in range(4)}
    optimizer = load_file(tmp_path / "optimizer.safetensors")
    assert optimizer.keys() == {f"{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    probe = build("probe")
    train(probe, 2)
    write_files(gather_state(probe), tmp_path)
    assert load_file(tmp_path / "optimizer.safetensors").keys() == {
        f"classifier.{name}.momentum_buffer" for name in ("weight", "bias")
    }
    assert load_file(tmp_path / "model.safetensors")["fc_norm.num_batches_tracked"] == 2


def test_weights_have_the_names_of_a_portable_folder(build: Build, tmp_path: Path) -> None:
    run = build("pretrain")
    write_files(gather_state(run), tmp_path)
    run.model.save_pretrained(tmp_path / "portable")
    assert_same(weights(tmp_path), weights(tmp_path / "portable"))


def test_the_loss_scale_comes_back(build: Build, tmp_path: Path) -> None:
    run, other = build("pretrain"), build("pretrain")
    run.accelerator.scaler, other.accelerator.scaler = (torch.amp.GradScaler("cpu") for _ in range(2))
    expected = run.accelerator.scaler.state_dict() | {"scale": 2**16 / 3, "_growth_tracker": 5}
    run.accelerator.scaler.load_state_dict(expected)
    write_files(gather_state(run), tmp_path)
    load_tensors(other, tmp_path)
    assert other.accelerator.scaler.state_dict() == expected


def test_what_is_loaded_does_not_need_the_files_any_more(build: Build, tmp_path: Path) -> None:
    """Files are mapped into memory rather than read."""
    run = build("finetune")
    train(run)
    write_files(gather_state(run), tmp_path)
    before = state(run)
    load_tensors(run, tmp_path)
    for name in FILES:
        size = os.path.getsize(tmp_path / f"{name}.safetensors")
        with (tmp_path / f"{name}.safetensors").open("r+b") as file:
            file.write(b"\x7f" * size)
    assert_same(state(run), before)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["missing", "unexpected", "renamed"])
def test_other_names_are_refused(file: str, change: str, build: Build, tmp_path: Path) -> None:
    run = build("finetune")
    train(run)
    write_files(gather_state(run), tmp_path)
    path = tmp_path / f"{file}.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if "classifier.bias" in name)
    other = name.replace("classifier", "outlet")
    if change != "missing":
        stored[other] = stored[name].clone()
    if change != "unexpected":
        del stored[name]
    save_file(stored, path)
    missing, unexpected = [name] if name not in stored else [], [other] if other in stored else []
    named = f"{path} is of another model or optimiser: missing {missing}, not expected {unexpected}."
    with pytest.raises(ValueError, match=re.escape(named)):
        load_tensors(run, tmp_path)


def test_other_groups_are_refused(build: Build, tmp_path: Path) -> None:
    run = build("finetune")
    train(run)
    write_files(gather_state(run), tmp_path)
    run.optimizer.optimizer = build_optimizer(run.model, 0.05, (0.9, 0.95))
    with pytest.raises(
        ValueError, match=r"missing \['classifier.bias \(group 1\)'.*not expected \['classifier.bias \(g"
    ):
        load_tensors(run, tmp_path)


# No pickles


def is_pickle(path: Path) -> bool:
    """Whether a pickle is in it, as torch (old and new), numpy and pickle write it."""
    content = path.read_bytes()
    suffix = path.suffix in {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".npy", ".npz"}
    return suffix or zipfile.is_zipfile(path) or re.match(rb"\x80[\x02-\x05]|\x93NUMPY|PK", content) is not None


def test_pickles_would_be_noticed(tmp_path: Path) -> None:
    for number, write in enumerate((torch.save, pickle.dump)):
        file = io.BytesIO()
        write({"a": torch.ones(2)}, file)
        (tmp_path / f"{number}.json").write_bytes(file.getvalue())
        assert is_pickle(tmp_path / f"{number}.json")
    torch.save({"a": torch.ones(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert is_pickle(tmp_path / "old")


def test_no_run_leaves_a_pickle_or_a_secret(
    write_shards: Callable[..., Path],
    settings: Callable[..., PretrainConfig],
    run_pretraining: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thesecretofatest")
    write_shards(20)
    options = {"max_steps": 2, "knn_images": 20, "report_to": "tensorboard"}
    runs = [run_pretraining(settings(**options, output_dir=str(tmp_path / "pretrained")), figures=True)]
    write_colours(tmp_path / "colours" / "data", "train", 16)
    save_encoder(tmp_path / "colours" / "encoder")
    runs.append(run_finetuning(tmp_path / "colours", **EVERYTHING, max_steps=2))
    for run, averaged in zip(runs, (False, True), strict=True):
        checkpoint, _ = newest_checkpoint(run / "checkpoints")
        assert checkpoint is not None
        assert (checkpoint / "averaged.safetensors").exists() == averaged
        files = [path for path in run.rglob("*") if path.is_file()]
        assert [path for path in files if is_pickle(path)] == []
        assert [path for path in files if b"hf_thesecretofatest" in path.read_bytes()] == []


PICKLING = {"torch.save", "torch.load", "np.save", "np.savez", "np.load", "save_state", "load_state"}


def test_no_code_writes_pickles_and_only_the_conversion_reads_them() -> None:
    found = set()
    for path in (path for package in ("modeling_micl", "training") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                found |= {(path.name, name) for name in PICKLING if called == name or called.endswith(f".{name}")}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                found |= {(path.name, name) for name in modules & {"pickle", "cloudpickle", "dill", "joblib"}}
    assert found == {("convert_checkpoint.py", "torch.load")}


def test_a_checkpoint_with_pickles_is_refused_unread(
    write_shards: Callable[..., Path],
    settings: Callable[..., PretrainConfig],
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As accelerate writes it, and older versions did."""
    write_shards(20)
    run = run_pretraining(settings(max_steps=1))
    older = run / "checkpoints" / "step-000001"
    files = json.loads((older / "manifest.json").read_text())
    for name, then in (("optimizer.safetensors", "optimizer.bin"), ("optimizer.json", "random_states_0.pkl")):
        (older / name).rename(older / then)
        files[then] = files.pop(name)
    (older / "manifest.json").write_text(json.dumps(files))
    assert "written by an older version as pickles" in str(find_defect(older))
    with pytest.raises(ValueError, match="step-000001: written by an older version as pickles"):
        run_pretraining(settings(max_steps=2, resume=str(older)))
