"""Commands that share their processes: to start takes longer than what the tests have them do.

`python commands.py REQUESTS` is one of these processes.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState


ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """What became of commands that have shared their processes."""

    status: int
    printed: list[str]  # by each command, on all its processes
    complaints: str


def run_commands(folder: Path, commands: Sequence[tuple[str, dict[str, object]]], processes: int) -> Done:
    """Run each `python -m MODULE --SETTING=VALUE ...` after the other, on one process or on several."""
    folder.mkdir()
    requests = [(module, [f"--{name}={value}" for name, value in settings.items()]) for module, settings in commands]
    (folder / "requests").write_text(json.dumps(requests))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(folder / "requests")]
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | here | {"HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    printed = ["".join(path.read_text() for path in folder.glob(f"{number}-*")) for number in range(len(commands))]
    return Done(done.returncode, printed, done.stderr)


def main(requests: Path) -> None:
    """What each of the processes does, as if every command had one of its own; they stay connected in between."""
    PartialState.destroy_process_group = lambda self, group=None: None
    for number, (module, flags) in enumerate(json.loads(requests.read_text())):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.argv[1:] = flags
        printed = requests.with_name(f"{number}-{os.environ.get('RANK', 'alone')}")
        with printed.open("w") as file, contextlib.redirect_stdout(file):
            runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
