"""`training.pretrain` under FSDP on the CPU, where accelerate passes over its FSDP plugin without a word.

All that differs from `accelerate launch` with `training/recipes/accelerate/fsdp.yaml` is where the switch is set.
"""

import os
import runpy
import sys
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin


start = Accelerator.__init__


def start_sharded(self: Accelerator, *args: Any, **kwargs: Any) -> None:
    start(self, *args, **kwargs)
    self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )


Accelerator.__init__ = start_sharded
runpy.run_module("training.pretrain", run_name="__main__", alter_sys=True)
sys.stdout.flush()
os._exit(0)  # FSDP keeps gloo's groups, whose threads now and then abort the interpreter's own way out
