"""The files of examples/accelerate select what they say, by accelerate's own reading of them."""

import os

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import StateDictType

from modeling_moca import MoCaForPreTraining
from tests.conftest import REPOSITORY
from tests.families import FAMILIES, family_backbone
from tests.two_ranks import launch_settings, needs_deepspeed

FILES = sorted((REPOSITORY / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_is_one_that_accelerate_knows(file):
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    # Refuses unknown keys, but not those inside the sections, which accelerate would silently leave aside.
    settings = load_config_from_file(str(file))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(settings, section)) <= known, section
    # The precision is a training argument, so that one file serves both kinds of runs.
    assert settings.mixed_precision is None


def test_there_is_a_file_for_each_plan():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "zero3"]
    for file in FILES:
        settings = yaml.safe_load(file.read_text())
        assert settings["num_processes"] == 8 and f"--config_file examples/accelerate/{file.name}" in file.read_text()


def test_ddp():
    arguments, environment = launch_settings("ddp")
    assert load_config_from_file(str(FILES[0])).distributed_type == DistributedType.MULTI_GPU
    assert arguments.multi_gpu and not arguments.use_fsdp and not arguments.use_deepspeed
    assert arguments.num_processes == 8 and "ACCELERATE_USE_FSDP" not in environment
    assert launch_settings("ddp", "--num_processes", "2")[0].num_processes == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2(family, monkeypatch):
    arguments, environment = launch_settings("fsdp2")
    assert arguments.use_fsdp and environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"
    # The layers that become units are those of the model, whichever family it is of.
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6)
    plugin.set_auto_wrap_policy(model)
    classes = tuple(plugin.auto_wrap_policy.keywords["transformer_layer_cls"])
    units = [name for name, module in model.named_modules() if isinstance(module, classes)]
    assert "mae_head.decoder" in units
    assert sum(".language_model.layers." in name or ".text_model.layers." in name for name in units) == 4
    weights = {name for name, _ in model.named_parameters()}
    layers = {name for name in weights if ".layers." in name or ".blocks." in name or name.startswith("mae_head.dec")}
    assert layers == {name for name in weights if name.startswith(tuple(f"{unit}." for unit in units))}


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig

    flags = ["--zero_stage", "2", "--zero3_init_flag", "false"] if stage == 2 else []
    arguments, environment = launch_settings("zero3", *flags)
    assert arguments.use_deepspeed and environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.zero3_init_flag == (stage == 3)
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    # DeepSpeed itself, once Trainer has filled in what is "auto".
    settings = {name: value for name, value in plugin.deepspeed_config.items() if value != "auto"}
    settings |= {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 5.0, "steps_per_print": 10}
    parsed = DeepSpeedConfig(settings)
    assert parsed.zero_optimization_stage == stage and parsed.gradient_clipping == 5.0
    assert parsed.zero_config.offload_optimizer.device == "none"
