"""Convert and load checkpoints on two ranks that share the weights, and check every tensor against the files.

Started by test_sharded_start.py as `sharded_start.py MODE FOLDER`, where FOLDER holds the checkpoints `stock`,
`published` (`stock` with a trained MAE head beside it) and `moca` (`stock`, converted).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
if MODE == "fsdp":
    # What `accelerate launch` sets for FSDP with cpu_ram_efficient_loading.
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from modeling_moca import MoCaForPreTraining  # noqa: E402
from tests.tiny import tiny_processor  # noqa: E402
from tests.trainers.cpt_rows import make_rows  # noqa: E402
from tests.two_ranks import compile_nothing  # noqa: E402
from trainers.cpt_config import CPTConfig  # noqa: E402
from trainers.cpt_trainer import CPTTrainer  # noqa: E402

STARTS = {
    "stock": lambda: MoCaForPreTraining.from_backbone(FOLDER / "stock", mask_token_id=6),
    "published": lambda: MoCaForPreTraining.from_backbone(FOLDER / "published", mask_token_id=6),
    "moca": lambda: MoCaForPreTraining.from_pretrained(FOLDER / "moca"),
}


def expected_tensors(start):
    """Return what a model must hold, by parameter: the checkpoint's tensors, the middle layer in the MAE decoder."""
    checkpoint = load_file(FOLDER / start / "model.safetensors")
    if start == "moca":
        return checkpoint
    expected = {}
    for name, tensor in checkpoint.items():
        if name.startswith(("mae_decoder.", "mae_proj.")):
            expected["mae_head." + name.removeprefix("mae_")] = tensor
        elif not name.startswith("lm_head."):
            own = name if name.startswith("visual.") else "language_model." + name.removeprefix("model.")
            expected[f"moca.backbone.{own}"] = tensor
            if "layers.2." in name:
                expected.setdefault("mae_head.decoder." + name.split("layers.2.")[1], tensor)
    return expected


def wrong(parameters, start):
    """Return the names of parameters that are not what the checkpoint says, and of those it says nothing about."""
    expected = expected_tensors(start)
    # The projection of a fresh MAE head is random; it is compared between ranks.
    untold = parameters.keys() - expected.keys() - {"mae_head.proj.weight", "mae_head.proj.bias"}
    return [name for name, tensor in expected.items() if not torch.equal(parameters[name], tensor)] + sorted(untold)


def zero3():
    import deepspeed
    from transformers.integrations import is_deepspeed_zero3_enabled

    def whole(model):
        parameters = dict(model.named_parameters())
        assert any(parameter.numel() == 0 for parameter in parameters.values()), "nothing is shared between ranks"
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    class Prepared(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.parameters = whole(getattr(model, "module", model))

    compile_nothing()
    # Before any model is loaded, as in a script that parses its arguments first.
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    arguments = CPTConfig(
        output_dir=str(FOLDER / "trained"),
        deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        max_length=256,
        per_device_train_batch_size=2,
        logging_steps=1,
    )
    assert is_deepspeed_zero3_enabled()
    parameters = {start: whole(make()) for start, make in STARTS.items()}
    prepared, model = Prepared(), STARTS["stock"]()
    rows = make_rows(8, images=(1,))
    trainer = CPTTrainer(model, arguments, train_dataset=rows, processing_class=tiny_processor(), callbacks=[prepared])
    trainer.train()
    trainer.save_model()
    dist.barrier()
    saved, trained = load_file(FOLDER / "trained" / "model.safetensors"), whole(model)
    result = {
        "wrong_prepared": wrong(prepared.parameters, "stock"),
        "wrong_saved": [name for name, tensor in trained.items() if not torch.equal(saved[name], tensor)],
        "loss": trainer.state.log_history[0]["loss"],
    }
    return parameters, result


def fsdp():
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    dist.init_process_group("gloo")
    # accelerate shards on GPUs only, unless the state says so.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    parameters, wrong_buffers = {}, []
    for start, make in STARTS.items():
        model = make()
        if dist.get_rank() == 1:
            # What a rank that loads nothing holds: the first one's weights must reach it.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        assert accelerator.is_fsdp2
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        shared = dict(model.named_parameters())
        assert all(type(parameter).__name__ == "DTensor" for parameter in shared.values())
        parameters[start] = {name: parameter.detach().full_tensor() for name, parameter in shared.items()}
        # Rotary frequencies are in no file, and nobody sends them around.
        buffers, own = dict(model.named_buffers()), MoCaForPreTraining(model.config).named_buffers()
        wrong_buffers += [name for name, buffer in own if not torch.equal(buffers[name], buffer)]
    return parameters, {"wrong_buffers": wrong_buffers}


def main():
    parameters, result = {"zero3": zero3, "fsdp": fsdp}[MODE]()
    projection = parameters["stock"]["mae_head.proj.weight"]
    result |= {
        "world_size": dist.get_world_size(),
        "wrong": {start: wrong(tensors, start) for start, tensors in parameters.items()},
        "num_parameters": len(parameters["stock"]),
        "projection": [projection.std().item(), projection.sum().item()],
    }
    (FOLDER / f"{MODE}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
