"""What ``accelerate launch --config_file examples/accelerate/...`` sets up, on ranks that are already there."""

import os

from accelerate import state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import distributed

from tests.conftest import ROOT


def apply_config(name: str) -> bool:
    """Has Accelerate do what the config says, in fp32; returns whether these ranks pass for GPUs.

    They do under FSDP, which Accelerate refuses to CPUs: for GPUs that talk by gloo.
    """
    config = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    processes = f"--num_processes={distributed.get_world_size()}"
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(config), "--mixed_precision=no", processes, "script.py"]
    )
    arguments, *_ = _validate_launch_command(arguments)
    variables = prepare_multi_gpu_env(arguments)
    os.environ |= {name: value for name, value in variables.items() if name not in os.environ}
    if arguments.use_fsdp:
        pass_for_gpus()
    return arguments.use_fsdp


def pass_for_gpus() -> None:
    """Has Accelerate take a process on the CPU for one on a GPU that talks by gloo."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", state.DistributedType.MULTI_GPU)
