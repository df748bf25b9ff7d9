"""Upload a finished model to the Hub: `python -m training.publish --model runs/NAME/model --repo USER/NAME`.

The card is written anew from config.json and eval.json, the folder is checked, and all of it goes up in one commit, as
`training.hub` tells.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from modeling_micl.remote_code import add_remote_code
from training.card import write_card
from training.config import REPOSITORY, setting
from training.hub import Place, check, files_to_publish, upload, usable_token
from training.parser import parse_settings
from training.results import add_results, table


@dataclass
class PublishConfig:
    """What goes where."""

    model: str | None = setting(None, "portable folder of a run; its figures go along")
    repo: str | None = setting(None, "where to on the Hub: USER/NAME or ORGANISATION/NAME, made if it is not there")
    private: bool = setting(False, "make a new repository private; an existing one must be")
    revision: str = setting("main", "branch to commit to; it must exist")
    tag: str | None = setting(None, "name for the published state, as v1")
    license: str = setting("apache-2.0", "of the weights, as the Hub names licences")
    dry_run: bool = setting(False, "write the card and check the folder, but send nothing")

    def place(self) -> Place:
        """Where the model goes."""
        return Place(str(self.repo or ""), self.private, self.revision, self.tag)

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.model is None or not Path(self.model).is_dir():
            raise ValueError(f"model={self.model!r} is no folder: name a run's with --model runs/NAME/model.")
        if not REPOSITORY.fullmatch(self.repo or ""):
            raise ValueError(f"repo={self.repo!r} is no place on the Hub: write --repo USER/NAME.")


def main(config: PublishConfig) -> None:
    """Write the card, check, upload and print.

    Raises:
        ValueError: if something in the folder or the settings must be changed; nothing was sent, or nothing is lost.
        RuntimeError: if the Hub or the connection failed. No message holds the token.
    """
    folder, place = Path(str(config.model)), config.place()
    write_card(folder, place.name, place.repo, config.license)
    add_results(folder, [])  # a converted model has no eval.json yet
    add_remote_code(folder)  # of this version, whatever was there
    files = files_to_publish(folder)
    check(folder, files)
    rows = {"commit": "none, this was a dry run"} if config.dry_run else upload(place, files, usable_token())
    skipped = sorted({path.name for path in folder.iterdir()} - set(files) - {"figures"})
    rows["card"] = str(folder / "README.md")
    rows |= {"left out": ", ".join(skipped)} if skipped else {}
    print(table(f"{place.repo} at {place.revision}: {len(files)} files", rows))  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(PublishConfig, "training.publish"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.publish: {error}")
