"""Which of a classifier's classes each class of another dataset is: by names, WordNet ids or class numbers."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from timm.data.imagenet_info import ImageNetInfo


# A name of the dataset's -> the model's class, None where it has none of that name
Rule = Callable[[str], int | None]


@dataclass(frozen=True)
class ClassMapping:
    """How a dataset's classes are matched with a model's.

    Attributes:
        targets: the model's class of each class of the dataset, in the dataset's order; none is there twice.
        rule: what they were matched by, in words.
    """

    targets: list[int]
    rule: str


def map_classes(names: list[str] | None, own: list[str]) -> ClassMapping:
    """Match a dataset's classes with those of a model; the first rule that finds all of them counts.

    - Names are equal in full, or in their first synonym ("tench" for "tench, Tinca tinca") where that is unambiguous.
    - WordNet ids (n01440764, as the folders of ImageNet-A, -C, -R and -Sketch) are places among ImageNet's sorted ids,
      if the model's classes are ImageNet's in that order.
    - Names that are numbers ("0" to "999", the folders of ImageNet-V2, in whatever order) are the model's class
      numbers, unless the model's own names are numbers, too. So are labels without names.

    Args:
        names: of the dataset's classes; None if its labels are integers without names.
        own: names of the model's classes.

    Raises:
        ValueError: if no rule finds all classes, or two of them are the same one of the model's.
    """
    if names is None:
        return ClassMapping(list(range(len(own))), "number")
    unmatched = []
    for rule, find in _rules(own):
        found = [find(name) for name in names]
        targets = [target for target in found if target is not None]
        if len(targets) == len(names):
            _check_distinct(names, targets, own)
            return ClassMapping(targets, rule)
        unmatched.append([name for name, target in zip(names, found, strict=True) if target is None])
    strangers = min(unmatched, key=len)
    raise ValueError(
        f"{len(strangers)} of the dataset's {len(names)} classes are none of the model's {len(own)}, as "
        f"{', '.join(map(repr, strangers[:3]))}; the model's are {', '.join(map(repr, own[:3]))} and so on. Rename "
        "the classes (or their folders) to the model's, to its class numbers or, for a model of ImageNet's 1000 "
        "classes in their usual order, to WordNet ids."
    )


def _rules(own: list[str]) -> Iterator[tuple[str, Rule]]:
    full = {name: label for label, name in enumerate(own)}
    times = Counter(map(_first_synonym, own))
    short = {_first_synonym(name): label for name, label in full.items() if times[_first_synonym(name)] == 1}
    yield "name", lambda name: full.get(name, short.get(_first_synonym(name)))
    if _are_imagenets(own):
        yield "WordNet id", {synset: label for label, synset in enumerate(ImageNetInfo().label_names())}.get
    if not any(name.isdecimal() for name in own):
        yield "number", lambda name: int(name) if name.isdecimal() and int(name) < len(own) else None


def _first_synonym(name: str) -> str:
    return name.split(",")[0].strip()


def _are_imagenets(own: list[str]) -> bool:
    """Whether these are the 1000 classes in the order of their WordNet ids, or could be: 1000 without names.

    Lists of names disagree on many classes, but in another order hardly any would agree.
    """
    wordnet = ImageNetInfo()
    if len(own) != wordnet.num_classes():
        return False
    alike = [_first_synonym(name) == _first_synonym(wordnet.index_to_description(i)) for i, name in enumerate(own)]
    return sum(alike) > len(own) / 2 or own == [f"LABEL_{label}" for label in range(len(own))]


def _check_distinct(names: list[str], targets: list[int], own: list[str]) -> None:
    twice = next((target for target, times in Counter(targets).items() if times > 1), None)
    if twice is not None:
        same = [name for name, target in zip(names, targets, strict=True) if target == twice]
        raise ValueError(
            f"The dataset's classes {', '.join(map(repr, same))} are all the model's class {own[twice]!r}: merge "
            "them, or give them the model's full names."
        )
