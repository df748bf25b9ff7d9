"""A classifier on other datasets, of which `ranked_images` tells the accuracies: see there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import forks
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import forget_accelerators, renormalize
from ranked_images import image, logits_of, ranked, write_folders, write_parquet
from timm.data.imagenet_info import ImageNetInfo

from modeling_micl import MiclConfig, MiclForImageClassification, MiclModel, MiclPreTrainedModel
from training import evaluate_robustness
from training import labels as labels_module
from training.evaluate_robustness import RobustnessConfig, corruption_folders
from training.evaluation import accuracies, predict
from training.parser import parse_settings
from training.results import image_processor
from training.source import open_source


NAMES = [f"thing {label}, also called {label}" for label in range(12)]
SOME = [7, 2, 11, 4, 9, 0, 5]
MIXED = [0, 0, 3, 1, 6]  # ranks of which 2/5 are top-1 hits and 4/5 top-5 hits
WNIDS = {label: ImageNetInfo().index_to_label_name(label) for label in (3, 134, 400, 517, 733, 901, 998)}


@pytest.fixture
def classifier(tmp_path: Path, tiny_model: Callable[..., MiclPreTrainedModel]) -> Callable[..., str]:
    """Write a classifier whose classes have these names."""

    def build(names: Sequence[str] = NAMES) -> str:
        labels = dict(enumerate(names))
        label2id = {name: label for label, name in labels.items()}
        model = tiny_model(MiclForImageClassification, id2label=labels, label2id=label2id)
        with torch.no_grad():
            model.classifier.weight.normal_(generator=torch.Generator().manual_seed(2))  # so that images differ
        model.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


@pytest.fixture
def run(no_accelerator: None, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the entry point in this process, as if it were a new one, and read eval.json."""

    def evaluate(model: str, *paths: Path | str, **settings: Any) -> list[dict[str, Any]]:
        forget_accelerators()
        config = RobustnessConfig(model=model, datasets=[str(path) for path in paths], num_workers=0, **settings)
        config.validate()
        evaluate_robustness.main(config)
        entries: list[dict[str, Any]] = json.loads((Path(model) / "eval.json").read_text())["results"]
        return entries

    return evaluate


def values(entries: list[dict[str, Any]], **what: Any) -> dict[str, float]:
    """Values by metric of the entries about this."""
    return {e["metric"]: e["value"] for e in entries if all(e[key] == value for key, value in what.items())}


def facts(entry: dict[str, Any], *names: str) -> list[Any]:
    return [entry[name] for name in names]


def about(top1: float, top5: float) -> Any:
    return pytest.approx({"top-1 accuracy": top1, "top-5 accuracy": top5})


def test_only_the_classes_of_the_dataset_compete(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    labels = [SOME.index(label) for label in ranked(model, SOME, MIXED)]
    declared = datasets.ClassLabel(names=[f"thing {label}" for label in SOME])
    file = write_parquet(tmp_path / "some.parquet", labels, declared)
    entries = run(model, file)
    assert values(entries) == about(2 / 5, 4 / 5)
    names = ("num_classes", "num_model_classes", "classes_matched_by", "num_test_images", "split", "dataset")
    assert facts(entries[0], *names) == [7, 12, "name", 20, "train", str(file)]
    assert "only the dataset's classes compete" in entries[0]["protocol"]


def test_images_are_normalised_as_the_classifiers_processor_says(
    classifier: Callable[..., str], run: Any, tmp_path: Path
) -> None:
    model = classifier()
    labels = logits_of(model, 20).argmax(dim=1).tolist()
    file = write_parquet(tmp_path / "all.parquet", labels, datasets.ClassLabel(names=NAMES))
    image_processor(MiclConfig.from_pretrained(model)).save_pretrained(model)
    assert values(run(model, file))["top-1 accuracy"] == 1
    renormalize(Path(model))
    assert values(run(model, file))["top-1 accuracy"] < 1


def test_all_classes_compete_when_asked_to(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    labels = ranked(model, SOME, MIXED)
    order = logits_of(model, 20).argsort(dim=1, descending=True).tolist()
    ranks = np.array([each.index(label) for each, label in zip(order, labels, strict=True)])
    assert (ranks == 0).mean() < 2 / 5  # the other classes win some images
    file = write_parquet(
        tmp_path / "some.parquet",
        [SOME.index(label) for label in labels],
        datasets.ClassLabel(names=[NAMES[label] for label in SOME]),
    )
    entries = run(model, file, all_classes=True)
    assert values(entries) == about((ranks == 0).mean(), (ranks < 5).mean())
    assert facts(entries[0], "num_classes", "num_model_classes") == [12, 12]
    assert "all classes compete" in entries[0]["protocol"]
    both = run(model, file)
    assert len(both) == 4
    assert values(both, num_classes=7) == about(2 / 5, 4 / 5)


def test_declared_classes_without_images_compete_too(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    best = sorted(set(logits_of(model, 6).argmax(dim=1).tolist()))
    seen = next(label for label in range(12) if label not in best)
    alone = datasets.ClassLabel(names=[NAMES[seen]])
    with_best = datasets.ClassLabel(names=[NAMES[label] for label in [seen, *best]])
    assert values(run(model, write_parquet(tmp_path / "one.parquet", [0] * 6, alone))) == {"top-1 accuracy": 1.0}
    file = write_parquet(tmp_path / "some.parquet", [0] * 6, with_best)
    assert values(run(model, file), dataset=str(file))["top-1 accuracy"] == 0.0


def test_the_models_own_dataset_gives_the_plain_accuracy(
    classifier: Callable[..., str], run: Any, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    model = classifier([f"class {label}" for label in range(4)])
    write_shards(30)
    folder = write_shards(17, 26, split="test")
    accelerator = Accelerator()
    source = open_source(str(folder), "test")
    scores, labels = predict(accelerator, MiclForImageClassification.from_pretrained(model), source, None, 0)
    plain = accuracies(scores, labels)["top1_accuracy"]
    assert 0 < plain < 1
    entries = run(model, folder)
    assert values(entries) == {"top-1 accuracy": plain}
    assert facts(entries[0], "split", "num_test_images", "fingerprint") == ["test", 43, source.fingerprint]
    few = run(model, folder, max_images=10)[-1]
    assert facts(few, "max_images", "num_test_images") == [10, 10]
    asked = run(model, folder, eval_split="train")[-1]
    assert facts(asked, "split", "num_test_images") == ["train", 30]


def test_wordnet_folders_are_imagenets_classes(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier(ImageNetInfo().label_descriptions()[:517] + [f"class {label}" for label in range(517, 1000)])
    classes = [WNIDS[label] for label in ranked(model, list(WNIDS), MIXED)]
    folder = write_folders(tmp_path / "imagenet-r", classes, list(WNIDS.values()))
    (folder / "README.txt").write_text("what this is")
    entries = run(model, folder)
    assert values(entries) == about(2 / 5, 4 / 5)
    assert facts(entries[0], "num_classes", "classes_matched_by", "num_test_images") == [7, "WordNet id", 20]


def test_numbered_folders_are_class_numbers(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    labels = ranked(model, range(12), MIXED, images=60)
    folder = write_folders(tmp_path / "v2", [str(label) for label in labels], [str(label) for label in range(12)])
    entries = run(model, folder)
    assert values(entries) == about(2 / 5, 4 / 5)
    assert facts(entries[0], "num_classes", "classes_matched_by") == [12, "number"]


def test_labels_without_names_are_class_numbers(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    labels = ranked(model, range(12), MIXED)
    file = write_parquet(tmp_path / "bare.parquet", labels, datasets.Value("int64"))
    assert values(run(model, file, label_column="label")) == about(2 / 5, 4 / 5)
    wrong = write_parquet(tmp_path / "wrong.parquet", [*labels, 12], datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"wrong.parquet': .* labels outside 0 ≤ label < 12, as 12"):
        run(model, wrong, label_column="label")


def test_late_labels_of_a_stream_are_checked_when_they_come(
    classifier: Callable[..., str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "CHECKED_ROWS", 3)
    parquet = write_parquet(tmp_path / "late.parquet", [0, 1, 2, 12], datasets.Value("int64"))
    datasets.load_dataset(str(parquet.parent), data_files=parquet.name, split="train").save_to_disk(tmp_path / "saved")
    (stream,) = (tmp_path / "saved").glob("*.arrow")
    with pytest.raises(ValueError, match=r"labels outside 0 ≤ label < 12, as 12"):
        run(classifier(), stream, label_column="label")


def write_corruptions(root: Path, model: str) -> Path:
    """Two corruptions, of which the second is harder, at two severities."""
    ranks = {("blur", "1"): [0], ("blur", "3"): [0, 0, 3, 6], ("snow", "1"): [0, 1], ("snow", "3"): [5]}
    for (corruption, severity), those in ranks.items():
        labels = ranked(model, SOME, those, images=8)
        classes = [f"thing {label}" for label in SOME]
        folder = root / corruption / severity
        write_folders(folder, [f"thing {label}" for label in labels], classes, "ILSVRC2012_val_0000{}.png")
    (root / "README.txt").write_text("what this is")
    (root / ".cache").mkdir()
    return root


def test_corruptions_have_an_accuracy_for_each_severity_and_their_means(
    classifier: Callable[..., str], run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier()
    root = write_corruptions(tmp_path / "imagenet-c", model)
    entries = run(model, root)
    assert len(entries) == 2 * (4 + 2 + 1)
    assert values(entries, dataset=str(root / "blur" / "1")) == about(1, 1)
    assert values(entries, dataset=str(root / "blur" / "3")) == about(2 / 4, 3 / 4)
    assert values(entries, dataset=str(root / "snow" / "1")) == about(1 / 2, 1)
    assert values(entries, dataset=str(root / "snow" / "3")) == about(0, 0)
    assert values(entries, dataset=str(root / "blur"), mean_of=["1", "3"], num_test_images=16) == about(3 / 4, 7 / 8)
    assert values(entries, dataset=str(root / "snow"), mean_of=["1", "3"], num_test_images=16) == about(1 / 4, 1 / 2)
    assert values(entries, dataset=str(root), mean_of=["blur", "snow"], num_test_images=32) == about(1 / 2, 11 / 16)
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table[1:]] == [str(root / "blur"), str(root / "snow"), str(root)]
    assert table[1].endswith("top-1  75.0%  top-5  87.5%  16 images, 7 of 12 classes, by name, mean of 2")


def test_severities_with_different_classes_have_no_mean(
    classifier: Callable[..., str], run: Any, tmp_path: Path
) -> None:
    model = classifier()
    root = write_corruptions(tmp_path / "imagenet-c", model)
    write_folders(root / "snow" / "3", ["thing 1"], name="ILSVRC2012_val_0000{}.png")
    with pytest.raises(ValueError, match=r"'.*snow/3' and '.*blur/1' differ.* are all files unpacked\?"):
        run(model, root)


def test_other_layouts_are_no_corruptions(tmp_path: Path) -> None:
    write_folders(tmp_path / "numbers", ["1", "2"])
    write_folders(tmp_path / "splits" / "test", ["1", "2"])
    write_folders(tmp_path / "many" / "test" / "10", ["cat", "dog"])
    write_folders(tmp_path / "names" / "train", ["cat", "dog"])
    for name in ("numbers", "splits", "many", "names", "nothing"):
        assert corruption_folders(str(tmp_path / name)) == {}
    write_folders(tmp_path / "one" / "snow" / "5", ["cat", "dog"])
    assert corruption_folders(str(tmp_path / "one")) == {
        str(tmp_path / "one" / "snow"): [str(tmp_path / "one" / "snow" / "5")]
    }


def test_images_that_are_left_out_because_of_their_names_are_an_error(
    classifier: Callable[..., str], run: Any, tmp_path: Path
) -> None:
    model = classifier()
    folder = write_folders(tmp_path / "imagenet-a", ["thing 1", "thing 2"] * 3, name="0.0{}_jay _ kite_0.3.png")
    assert len(run(model, folder)) == 1
    for number, label in enumerate((1, 2)):
        image(number).save(folder / f"thing {label}" / f"0.1{number}_tank _ bullet train_0.4.png")
    with pytest.raises(ValueError, match=r"6 of the 8 images .* would be left out.* move everything into .*train"):
        run(model, folder)
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "test")
    assert facts(run(model, tmp_path / "moved")[-1], "split", "num_test_images") == ["test", 8]


def test_all_datasets_are_opened_before_the_first_is_evaluated(
    classifier: Callable[..., str], run: Any, tmp_path: Path
) -> None:
    model = classifier()
    good = write_parquet(tmp_path / "good.parquet", [0, 1], datasets.ClassLabel(names=NAMES[:2]))
    bad = write_parquet(tmp_path / "bad.parquet", [0, 1], datasets.ClassLabel(names=["thing 3", "unheard of"]))
    with pytest.raises(ValueError, match=r"bad.parquet': 1 of the dataset's 2 classes .* 'unheard of'"):
        run(model, good, bad)
    unlabelled = write_parquet(tmp_path / "bare.parquet", [0, 1], datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"bare.parquet': .* no label column .* --label_column"):
        run(model, good, unlabelled)
    assert not (Path(model) / "eval.json").exists()


def test_an_encoder_without_a_head_is_refused(
    tiny_model: Callable[..., MiclPreTrainedModel], run: Any, tmp_path: Path
) -> None:
    tiny_model(MiclModel).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no classification head"):
        run(str(tmp_path / "encoder"), tmp_path / "nothing")


def test_several_datasets_follow_one_flag(tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path), "--datasets", "some/first", "some/second", "--all_classes"]
    config = parse_settings(RobustnessConfig, "training.evaluate_robustness", flags)
    assert config.datasets == ["some/first", "some/second"]
    assert config.all_classes


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "datasets is not set"),
        (["--datasets", "a", "b", "a"], "datasets names 'a' twice"),
        (["--datasets", "a", "--dataset", "b"], "dataset='b' is not for this program: name it with --datasets"),
    ],
)
def test_impossible_settings_are_named(
    flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_settings(RobustnessConfig, "training.evaluate_robustness", ["--model", str(tmp_path), *flags])
    assert complaint in capsys.readouterr().err


def test_two_processes_find_what_one_finds(classifier: Callable[..., str], run: Any, tmp_path: Path) -> None:
    model = classifier()
    root = write_corruptions(tmp_path / "imagenet-c", model)
    labels = [SOME.index(label) for label in ranked(model, SOME, [0, 0, 1], images=9)]
    names = datasets.ClassLabel(names=[NAMES[label] for label in SOME])
    one = run(model, root, file := write_parquet(tmp_path / "some.parquet", labels, names))
    where = {"model": model, "output_dir": tmp_path / "out", "datasets": [root, file]}
    done = forks.run(forks.command("training.evaluate_robustness", **where, num_workers=0), tmp_path, processes=2)
    assert done.status == 0, done.complaints[-3000:]
    about = ("dataset", "metric", "value", "num_test_images", "num_classes")
    two = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    assert [facts(entry, *about) for entry in two] == [facts(entry, *about) for entry in one]
    assert done.printed.count("accuracy of") == 1
