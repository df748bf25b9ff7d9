"""The classes of other datasets found among a model's."""

import pytest
from timm.data.imagenet_info import ImageNetInfo

from training.class_mapping import map_classes


PETS = ["cat", "dog, domestic dog, Canis familiaris", "owl", "newt"]


def imagenets(renamed: int = 0) -> list[str]:
    """WordNet's names of ImageNet's classes in the usual order; every second of the first so many renamed."""
    names = ImageNetInfo().label_descriptions()
    return [f"another name {i}" if i % 2 and i < renamed else name for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (PETS, [0, 1, 2, 3]),
        (["owl", "cat"], [2, 0]),
        (["newt", "dog"], [3, 1]),
        (["cat, Felis catus", "dog, hound"], [0, 1]),
    ],
)
def test_names_are_found_in_any_order_and_by_their_first_synonym(names: list[str], targets: list[int]) -> None:
    mapping = map_classes(names, PETS)
    assert (mapping.targets, mapping.rule) == (targets, "name")


def test_a_full_name_goes_before_a_synonym() -> None:
    own = ["maillot, tank suit", "maillot"]
    assert map_classes(["maillot", "maillot, tank suit"], own).targets == [1, 0]


def test_a_synonym_of_two_classes_finds_neither() -> None:
    with pytest.raises(ValueError, match="1 of the dataset's 2 classes are none of the model's 3, as 'crane'"):
        map_classes(["crane", "owl"], ["crane, bird", "crane, machine", "owl"])


def test_two_classes_are_never_the_same_one() -> None:
    with pytest.raises(ValueError, match="'cat, Felis catus', 'cat, kitty' are all the model's class 'cat'"):
        map_classes(["cat, Felis catus", "owl", "cat, kitty"], PETS)
    with pytest.raises(ValueError, match="'07', '7' are all the model's class 'c7'"):
        map_classes(["07", "7"], [f"c{i}" for i in range(10)])


@pytest.mark.parametrize("own", [imagenets(), imagenets(900), [f"LABEL_{label}" for label in range(1000)]])
def test_wordnet_ids_are_places_among_imagenets_classes(own: list[str]) -> None:
    mapping = map_classes(["n15075141", "n01440764", "n03126707", "n02012849"], own)
    assert (mapping.targets, mapping.rule) == ([999, 0, 517, 134], "WordNet id")  # both cranes


@pytest.mark.parametrize("own", [sorted(imagenets()), imagenets()[:999], [f"shape {i}" for i in range(1000)]])
def test_wordnet_ids_are_refused_where_the_classes_are_not_imagenets_in_that_order(own: list[str]) -> None:
    with pytest.raises(ValueError, match="'n01440764', 'n01443537'; .*WordNet ids"):
        map_classes(["n01440764", "n01443537"], own)


def test_a_model_that_was_trained_with_wordnet_ids_has_them_as_names() -> None:
    mapping = map_classes(["n3", "n1"], ["n1", "n2", "n3"])
    assert (mapping.targets, mapping.rule) == ([2, 0], "name")


def test_folders_with_numbers_are_class_numbers_though_they_sort_as_text() -> None:
    mapping = map_classes(sorted(map(str, range(12))), [f"class {label}" for label in range(12)])
    assert (mapping.targets, mapping.rule) == ([0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "number")


def test_numbers_are_names_for_a_model_whose_classes_are_called_so() -> None:
    own = sorted(map(str, range(12)))
    mapping = map_classes(["2", "10"], own)
    assert (mapping.targets, mapping.rule) == ([4, 2], "name")
    with pytest.raises(ValueError, match="1 of the dataset's 2 classes are none of the model's 12, as '05'"):
        map_classes(["2", "05"], own)


def test_labels_without_names_are_class_numbers() -> None:
    mapping = map_classes(None, PETS)
    assert (mapping.targets, mapping.rule) == ([0, 1, 2, 3], "number")


def test_strangers_are_named_by_the_rule_that_knows_most_of_the_classes() -> None:
    with pytest.raises(ValueError, match="1 of the dataset's 3 classes are none of the model's 4, as '4'; .* 'cat'"):
        map_classes(["0", "4", "2"], PETS)
    with pytest.raises(ValueError, match="1 of the dataset's 2 classes are none of the model's 1000, as 'n00000000'"):
        map_classes(["n01440764", "n00000000"], imagenets())
