"""What training writes on its way is loadable by name, and exported with its adapters merged."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from hub_cards import export
from hub_cards.checkpoint import load_checkpoint
from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.hub_cards.test_export import run
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.contrastive_cases import build, save_checkpoint
from tests.trainers.test_contrastive_adapters import adapted
from tests.trainers.test_contrastive_adapters import make_trainer as contrastive_trainer
from tests.trainers.test_cpt_adapters import make_trainer as cpt_trainer
from trainers.adapters import add_adapters

CHECK = Path(__file__).with_name("check_checkpoints.py")
RUNS = ("cpt", "cpt_lora", "cpt_dora", "contrastive", "contrastive_lora", "contrastive_dora")
SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each kind: `checkpoint-1`, the final folder, and `embedding.json`, that of the model in memory.

    The pooling of stage 1 is not the usual one.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    start = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6, pooling="last")
    start.save_pretrained(folder / "start1")
    tiny_processor().save_pretrained(folder / "start1")
    again, once_more = (MoCaForPreTraining.from_pretrained(folder / "start1") for _ in range(2))
    dora = add_adapters(once_more, LoraConfig(r=4, lora_alpha=64, use_dora=True))
    start2 = save_checkpoint(folder / "start2")
    trainers = (
        cpt_trainer(folder / "cpt", start, **SETTINGS),
        cpt_trainer(folder / "cpt_lora", add_adapters(again, LoraConfig(r=4, lora_alpha=64)), **SETTINGS),
        cpt_trainer(folder / "cpt_dora", dora, **SETTINGS),
        contrastive_trainer(folder / "contrastive", build(start2), **SETTINGS),
        contrastive_trainer(folder / "contrastive_lora", adapted(start2), **SETTINGS),
        contrastive_trainer(folder / "contrastive_dora", adapted(start2, use_dora=True), **SETTINGS),
    )
    for trainer in trainers:
        trainer.train()
        trainer.save_model()
        # Adapters lie in the layers, with peft's wrapper or without.
        trained = next(module for module in trainer.model.eval().modules() if isinstance(module, MoCaModel))
        (Path(trainer.args.output_dir) / "embedding.json").write_text(json.dumps(embed(trained)[0].tolist()))
    return folder


def embed(model):
    inputs = tiny_processor()(text=["a page about tides"])
    with torch.no_grad():
        return torch.nn.functional.normalize(model(**inputs).pooler_output, dim=-1)


def test_every_checkpoint_opens_at_every_door(runs, tmp_path):
    cases = [
        {
            "folder": str(runs / name / "checkpoint-1"),
            "is_pretraining": name.startswith("cpt"),
            "expected": json.loads((runs / name / "embedding.json").read_text()),
        }
        for name in RUNS
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run([str(CHECK), str(tmp_path / "cases.json")], tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_are_exported_as_the_final_folder_is(name, runs, tmp_path):
    layout = "pretraining" if name.startswith("cpt") else "embedding"
    model_class = MoCaForPreTraining if name.startswith("cpt") else MoCaModel
    published = export(runs / name / "checkpoint-1", tmp_path / "published", layout=layout)
    ours, theirs = (model_class.from_pretrained(folder).state_dict() for folder in (published, runs / name))
    assert ours.keys() == theirs.keys() and not any("lora" in key for key in ours)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-5, msg=key)
    config = json.loads((published / "config.json").read_text())
    assert config["pooling"] == ("last" if name.startswith("cpt") else "mean")


def test_adapters_of_a_backbone_converted_in_the_run_are_refused(tmp_path):
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    cpt_trainer(tmp_path / "run", add_adapters(model, LoraConfig(r=4)), **SETTINGS).train()
    with pytest.raises(ValueError, match="do not say what they were trained on"):
        load_checkpoint(tmp_path / "run" / "checkpoint-1")


def test_what_cannot_be_merged_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="holds adapters of an embedding model, which has no pre-training heads"):
        export(runs / "contrastive_dora" / "checkpoint-1", tmp_path / "out", layout="pretraining")
    with pytest.raises(ValueError, match=r"missing: \['mae_head"):
        export(runs / "contrastive" / "checkpoint-1", tmp_path / "out", layout="pretraining")
