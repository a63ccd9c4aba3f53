"""Convert a checkpoint on two ranks that share its weights, and check every tensor against the file.

Started by test_sharded_start.py: `python -m torch.distributed.run ... sharded_start.py MODE STOCK_FOLDER FOLDER`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
MODE, STOCK, OUTPUT = sys.argv[1:]
if MODE == "fsdp":
    # What `accelerate launch` sets for FSDP with cpu_ram_efficient_loading.
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from modeling_moca import MoCaForPreTraining  # noqa: E402
from tests.tiny import tiny_processor  # noqa: E402
from tests.trainers.cpt_rows import make_rows  # noqa: E402
from trainers.cpt_config import CPTConfig  # noqa: E402
from trainers.cpt_trainer import CPTTrainer  # noqa: E402


def check(parameters, stock):
    """Return the names of parameters that are not what the checkpoint holds; the MAE decoder is its middle layer."""
    wrong = []
    for name, tensor in stock.items():
        if name.startswith("lm_head."):
            continue
        own = name if name.startswith("visual.") else "language_model." + name.removeprefix("model.")
        expected = {f"moca.backbone.{own}": tensor}
        if "layers.2." in name:
            expected["mae_head.decoder." + name.split("layers.2.")[1]] = tensor
        wrong += [own_name for own_name, tensor in expected.items() if not torch.equal(parameters[own_name], tensor)]
    return wrong


def arguments(**kwargs):
    return CPTConfig(
        output_dir=OUTPUT,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        max_length=256,
        per_device_train_batch_size=2,
        logging_steps=1,
        **kwargs,
    )


def zero3(stock):
    import deepspeed
    from transformers.integrations import is_deepspeed_zero3_enabled

    def whole(model):
        parameters = dict(model.named_parameters())
        assert any(parameter.numel() == 0 for parameter in parameters.values()), "nothing is shared between ranks"
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    # Before any model is loaded, as in a script that parses its arguments first.
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
    args = arguments(deepspeed=config)
    assert is_deepspeed_zero3_enabled()
    model = MoCaForPreTraining.from_backbone(STOCK, mask_token_id=6)
    start = whole(model)
    trainer = CPTTrainer(model, args, train_dataset=make_rows(8, images=(1,)), processing_class=tiny_processor())
    trainer.train()
    loaded = MoCaForPreTraining.from_pretrained(OUTPUT + "/moca")
    return start, whole(loaded), trainer.state.log_history[0]["loss"]


def fsdp(stock):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    dist.init_process_group("gloo")
    model = MoCaForPreTraining.from_backbone(STOCK, mask_token_id=6)
    if dist.get_rank() == 1:
        # What a rank that loads nothing holds: the first one's weights must reach it.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    # accelerate shards on GPUs only, unless the state says so.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    parameters = dict(model.named_parameters())
    assert all(type(parameter).__name__ == "DTensor" for parameter in parameters.values())
    start = {name: parameter.detach().full_tensor() for name, parameter in parameters.items()}
    return start, start, None


def main():
    stock = load_file(STOCK + "/model.safetensors")
    start, loaded, loss = {"zero3": zero3, "fsdp": fsdp}[MODE](stock)
    result = {
        "world_size": dist.get_world_size(),
        "wrong": [check(start, stock), check(loaded, stock)],
        "num_parameters": len(start),
        "projection": [start["mae_head.proj.weight"].std().item(), start["mae_head.proj.weight"].sum().item()],
        "loss": loss,
    }
    Path(OUTPUT, f"{MODE}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
