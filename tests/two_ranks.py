"""Start a program on two real ranks, which talk over gloo on this machine's CPU."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.forked import run_ranks

REPOSITORY = Path(__file__).resolve().parents[1]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_settings(config, *flags):
    """Return what `accelerate launch` with a file of examples/accelerate makes of it: arguments, and environment."""
    file = str(REPOSITORY / "examples" / "accelerate" / f"{config}.yaml")
    arguments = launch_command_parser().parse_args(
        ["--config_file", file, "--main_process_port", "0", *flags, "script.py"]
    )
    arguments, _, from_file = _validate_launch_command(arguments)
    # Set by launch_command itself, which would start the processes.
    arguments.deepspeed_fields_from_accelerate_config = "mixed_precision" if from_file else ""
    if arguments.use_deepspeed:
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)


def fork_two_ranks(program, *arguments, config=None, flags=()):
    """Do as [`start_two_ranks`] without a launcher: the ranks are forked, with the environment that it gives them."""
    environment = {} if config is None else launch_settings(config, *flags)[1]
    environment = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{**environment, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    run_ranks(ranks, program, *arguments)


def start_two_ranks(program, *arguments, config=None, flags=(), variables=None):
    """Run `program` (path) with arguments on two ranks, and fail with what it said if one of them fails.

    With `config`, a file of examples/accelerate (name without ending), by `accelerate launch` with these `flags`.
    Environment `variables` (`dict`) are added to those of this process.
    """
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    if config is not None:
        file = str(REPOSITORY / "examples" / "accelerate" / f"{config}.yaml")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", file]
        command += ["--num_processes", "2", "--main_process_port", str(port), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment |= variables or {}
    done = subprocess.run(
        [*command, str(program), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


def compile_nothing():
    """Let DeepSpeed's ranks, of which this is one, talk by gloo alone: it would compile an operator for a minute."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def zero_settings(stage):
    """Return a DeepSpeed configuration of a ZeRO stage (`int`) in which Trainer's own settings count."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",  # else 1.0, whatever max_grad_norm says
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
    }


def shard_on_cpus(monkeypatch):
    """Let accelerate share weights between CPUs (FSDP), which it otherwise does on accelerators only."""
    start = PartialState.__init__

    def pretend(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    monkeypatch.setattr(PartialState, "__init__", pretend)
