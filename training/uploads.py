"""A run that keeps its model folder on the Hub: at its end and, if asked for, with every checkpoint."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import HfApi

from training.card import write_card
from training.config import TrainingSettings
from training.hub import (
    Place,
    check,
    check_no_token,
    explained,
    files_to_publish,
    open_repository,
    upload,
    usable_token,
)


class Uploads:
    """Opened before training, so that a wrong token or name ends the run before any work is done.

    A checkpoint's model is sent while training goes on; if one is still on its way when the next is due, that one is
    left out, and if sending fails, the run says so and goes on.

    Args:
        config: names the repository, or None for no uploads.
        accelerator: only its main process sends.

    Raises:
        ValueError: if there is no token, the repository is public but must be private, or
            push_checkpoints is set with FSDP, where no process has the whole model.
        RuntimeError: if the Hub refuses or cannot be reached.
    """

    def __init__(self, config: TrainingSettings, accelerator: Accelerator) -> None:
        if config.push_checkpoints and accelerator.is_fsdp2:
            raise ValueError("push_checkpoints does not work with FSDP: leave it out, and push_to_hub sends the end.")
        self.place = (
            Place(config.push_to_hub, config.push_private)
            if config.push_to_hub and accelerator.is_main_process
            else None
        )
        self.with_checkpoints, self.say = config.push_checkpoints, accelerator.print
        self.sender = ThreadPoolExecutor(max_workers=1)
        self.on_the_way: Future[None] | None = None
        if self.place:
            self.token = usable_token()
            with explained(self.place, self.token):
                open_repository(HfApi(token=self.token), self.place)

    def send_checkpoint(self, write: Callable[[], Path]) -> None:
        """Send the model in the background.

        Args:
            write: writes the model folder as it is now and returns it.
        """
        if self.place and self.with_checkpoints and (self.on_the_way is None or self.on_the_way.done()):
            self.on_the_way = self.sender.submit(self._send_or_say, self.place, write())

    def _send_or_say(self, place: Place, folder: Path) -> None:
        try:
            write_card(folder, place.name, place.repo)
            files = files_to_publish(folder)
            check_no_token(files)
            upload(place, files, self.token)
        except (ValueError, RuntimeError) as error:
            self.say(f"this checkpoint's model is not on the Hub, and training goes on: {error}")

    def wait(self) -> None:
        """Let what is on its way arrive, before the model folder is written anew."""
        if self.on_the_way:
            self.on_the_way.result()

    def send_final(self, folder: Path) -> None:
        """Send the finished model.

        Raises:
            ValueError, RuntimeError: as in `training.hub.upload`; the model itself is safe in its folder.
        """
        if self.place is None:
            return
        try:
            files = files_to_publish(folder)
            check(folder, files)
            done = upload(self.place, files, self.token)
        except (ValueError, RuntimeError) as error:
            command = f"python -m training.publish --model {folder} --repo {self.place.repo}"
            raise RuntimeError(f"{error}\nThe model is safe in {folder}; to send it: {command}") from None
        self.say(f"on the Hub: {self.place.repo}, commit {done['commit']}")
