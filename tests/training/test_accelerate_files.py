"""The files for `accelerate launch` and SLURM lead to the processes that they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.run import get_args_parser

import modeling_micl.modeling_micl as models


ROOT = Path(__file__).parents[2]
FILES = ROOT / "training" / "recipes" / "accelerate"
PLUGIN = """
import json
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
plugin = FullyShardedDataParallelPlugin()
print(json.dumps([plugin.fsdp_version, plugin.transformer_cls_names_to_wrap, plugin.cpu_ram_efficient_loading]))
"""


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", DistributedType.NO, 1, 1),
        ("one_node", DistributedType.MULTI_GPU, 1, 8),
        ("several_nodes", DistributedType.MULTI_GPU, 2, 16),
        ("fsdp", DistributedType.FSDP, 1, 8),
    ],
)
def test_every_file_asks_for_its_processes(name: str, kind: DistributedType, machines: int, processes: int) -> None:
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.mixed_precision is None  # that is the recipe's to say
    assert {path.stem for path in FILES.glob("*.yaml")} == {"one_gpu", "one_node", "several_nodes", "fsdp"}


@pytest.mark.slow
def test_accelerate_launch_shards_the_layers_of_the_encoder(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    command = ["-m", "accelerate.commands.launch", "--config_file", str(FILES / "fsdp.yaml"), "--num_processes", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--gpu_ids", "0", str(tmp_path / "plugin.py")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, layers, on_meta = json.loads(done.stdout.strip().splitlines()[-1])
    assert (version, layers, on_meta) == (2, ["MiclLayer"], False)
    assert hasattr(models, layers[0])


@pytest.mark.parametrize("ends", ["finished", "stopped", "failed"])
def test_the_slurm_job_starts_one_launcher_on_each_machine_until_the_run_is_finished(
    ends: str, tmp_path: Path
) -> None:
    """With stand-ins for SLURM's and accelerate's commands: srun runs the command once for each of two machines."""
    run = tmp_path / "my run"
    run.mkdir()
    for name, lines in {
        "scontrol": 'if [ $1 = show ]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $@"; fi',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@" || status=$?; done; exit ${status:-0}',
        "accelerate": 'echo "$@"; '
        + {"finished": "", "stopped": f"touch '{run}/STOPPED'; exit 1", "failed": "exit 1"}[ends],
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash", str(FILES / "several_nodes.slurm"), "a.yaml", str(run), "--report_to", "my trackers"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if ends == "finished" else 1), done.stderr
    launched = [
        "launch --config_file training/recipes/accelerate/several_nodes.yaml --num_machines 2 --num_processes 8 "
        f"--machine_rank {node} --main_process_ip node-a -m training.pretrain --config a.yaml --output_dir {run} "
        "--report_to my trackers"
        for node in (0, 1)
    ]
    assert done.stdout.splitlines() == launched + (["scontrol requeue 17"] if ends == "stopped" else [])


def test_the_launcher_of_the_slurm_job_passes_on_its_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (FILES / "several_nodes.slurm").read_text()
    warning = re.search(r"--signal=(\w+)@", script)
    exported = re.search(r"PET_SIGNALS_TO_HANDLE=(\S+)", script)
    assert warning
    assert exported
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", exported[1])
    read = get_args_parser().parse_args(["program"]).signals_to_handle  # as accelerate does
    assert f"SIG{warning[1]}" in read.split(",")
