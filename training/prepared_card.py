"""What a prepared dataset says of itself, all from facts in its shards: record, skipped images and dataset card."""

import json
import math
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from training.disk import replace_file
from training.markdown import markdown_table
from training.monitor import provenance
from training.parts import About
from training.recoding import COMPARED_PIXELS
from training.shards import Tally, read_facts


RECORD, SKIPPED, CARD = "prepare.json", "skipped.jsonl", "README.md"
CHANGED = (
    "Images were resized and re-encoded as JPEG, so that evaluation numbers may differ a little from the source's."
)
UNCHANGED = "No image was changed: all files are those of the source, byte for byte."
Record = dict[str, Any]


def describe(folder: Path) -> Record:
    """Write `prepare.json`, `skipped.jsonl` and `README.md` of a prepared dataset; returns the first."""
    splits: dict[str, list[Path]] = {}
    for file in sorted((folder / "data").glob("*.parquet")):
        splits.setdefault(file.name.split("-")[0], []).append(file)
    record: Record = {"note": UNCHANGED, "splits": {}, "versions": provenance()["versions"]}
    skipped = []
    for split, files in splits.items():
        about, tally = _facts_of(files)
        record["splits"][split] = about | numbers(tally, sum(file.stat().st_size for file in files))
        record["note"] = CHANGED if tally.kept < tally.images_out else record["note"]
        skipped += [{"split": split} | asdict(image) for image in tally.skipped]
    _write(folder / RECORD, json.dumps(record, indent=2) + "\n")
    _write(folder / SKIPPED, "".join(json.dumps(entry) + "\n" for entry in skipped))
    _write(folder / CARD, card(record))
    return record


def read_record(folder: Path) -> Record:
    """`prepare.json` of a prepared dataset, without splits if there is none yet."""
    file = folder / RECORD
    record: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"splits": {}}
    return record


def _facts_of(files: list[Path]) -> tuple[About, Tally]:
    facts = [read_facts(file) for file in files]
    return facts[0][0], reduce(add, (tally for _, tally in facts))


def _write(file: Path, text: str) -> None:
    with replace_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def numbers(tally: Tally, file_bytes: int) -> dict[str, Any]:
    """Counts, bytes and pixel differences of a split, for the record.

    Args:
        tally: of all shards.
        file_bytes: of their files.
    """
    counts = {name: value for name, value in asdict(tally).items() if name not in ("absolute", "squared", "compared")}
    entry = counts | {"skipped": len(tally.skipped), "bytes_of_shards": file_bytes, "pixel_difference": None}
    if tally.compared:
        squared = tally.squared / tally.compared
        entry["pixel_difference"] = {
            "images": tally.compared,
            "pixels": COMPARED_PIXELS,
            "mean_absolute": round(tally.absolute / tally.compared, 3),
            "psnr_db": round(10 * math.log10(255**2 / squared), 2) if squared else None,
        }
    return entry


def difference_in_words(entry: Record) -> str:
    """The pixel differences of a split for people."""
    found = entry["pixel_difference"]
    if found is None:
        return "no image was changed" if entry["kept"] == entry["images_out"] else "not measured"
    psnr = "no difference" if found["psnr_db"] is None else f"PSNR {found['psnr_db']} dB"
    return f"{psnr}, mean absolute difference {found['mean_absolute']} of 255 ({found['images']} changed images)"


def card(record: Record) -> str:
    """The dataset card, with the splits for the Hub's viewer and `datasets`."""
    splits: dict[str, Record] = record["splits"]
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    any_split = next(iter(splits.values()))
    columns = ("images", "skipped", "kept byte for byte", "resized", "bytes before", "after", "shards")
    rows = []
    for split, entry in splits.items():
        names = ("images_out", "skipped", "kept", "resized", "bytes_before", "bytes_after", "num_shards")
        rows.append([split, *(f"{entry[name]:,}" for name in names)])
    table = markdown_table(["split", *columns], rows)
    differences = "\n".join(f"- {split}: {difference_in_words(entry)}." for split, entry in splits.items())
    return f"""---
configs:
- config_name: default
  data_files:
{files}---

# {any_split["dataset"]}, made small for training

{record["note"]} Evaluate on the source where numbers are to be compared with others.

- An image whose shorter side has more than {any_split["short_side"]} pixels was resized (bicubic) to that.
- Upright RGB files of JPEG and PNG that are not larger are kept byte for byte. All others are JPEGs of quality
  {any_split["quality"]} with colours at full resolution ({any_split["chroma"]}): upright, 8 bits, RGB, without
  transparency, EXIF and colour profile.
- Order, labels and all other columns are those of the source; images that cannot be decoded have no row and are named
  in `{SKIPPED}`.

{table}

The central {COMPARED_PIXELS}-pixel crop of evaluation, taken from the source and from here:

{differences}

`{RECORD}` has settings, fingerprint of the source and versions. Licence and terms are those of the source.
"""
