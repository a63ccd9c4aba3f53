"""Stage 2 on ranks that share gradients or weights equals one process, and saves whole weights."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.trainers import contrastive_sharded
from tests.trainers.contrastive_cases import save_checkpoint
from tests.two_ranks import fork_two_ranks, needs_deepspeed, start_two_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What to start from, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("contrastive_sharded")
    save_checkpoint(folder / "start")
    contrastive_sharded.train_all("whole", folder)
    return folder


def read(folder, mode, scenario):
    output = folder / mode / scenario
    return json.loads((output / "result.json").read_text()), load_file(output / "model.safetensors")


def check(folder, mode, scenario, rel=1e-5, atol=1e-5):
    """Compare losses, gradient norms and weights with those of one process; return what was noted."""
    (result, weights), (expected, whole) = (read(folder, name, scenario) for name in (mode, "whole"))
    start = load_file(folder / "start" / "model.safetensors")
    assert len(expected["losses"]) >= 1 and result["tasks"] == expected["tasks"], scenario
    assert result["losses"] == pytest.approx(expected["losses"], rel=rel), scenario
    assert result["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=10 * rel), scenario
    assert weights.keys() == whole.keys() and all(tensor.dtype == torch.float32 for tensor in weights.values())
    # In the middle and at the end.
    assert len(result["evaluations"]) == len(expected["evaluations"]) == (2 if scenario == "plain" else 0)
    for evaluation, ours in zip(result["evaluations"], expected["evaluations"]):
        assert evaluation == pytest.approx(ours, abs=1e-6) and 0 < ours["eval_ndcg_at_10"] < 1
    for name, tensor in whole.items():
        frozen = scenario == "cached" and ".visual." in name and ".merger." not in name
        assert torch.equal(tensor, start[f"moca.{name}"]) == frozen, f"{scenario}: {name}"
        torch.testing.assert_close(weights[name], tensor, atol=atol, rtol=1e-4, msg=f"{scenario}: {name}")
    return result, expected


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_zero_equals_one_process(mode, folder):
    start = start_two_ranks if mode == "zero3" else fork_two_ranks
    start(contrastive_sharded.__file__, mode, folder)
    check(folder, mode, "plain")


def test_fsdp2_equals_one_process(folder):
    start_two_ranks(contrastive_sharded.__file__, "fsdp2", folder, config="fsdp2")
    for scenario in ("plain", "cached"):
        result, expected = check(folder, "fsdp2", scenario)
        assert result["parameters"] == ["DTensor"] and expected["parameters"] == ["Parameter"]
        # Layer by layer, not everything at once.
        assert len(result["layers"]) == 2 and all(name.startswith("FSDP") for name in result["layers"])
    assert "loss_one_image" in result["tasks"]
    check(folder, "fsdp2", "bf16", rel=2e-2, atol=2e-2)

    # Nothing in the final folder is torch's own.
    output = folder / "fsdp2" / "plain"
    named = {path.name for path in output.rglob("*.json") if "FSDP" in path.read_text()}
    # What the test wrote, and the record, which tells how the run was distributed.
    assert named == {"result.json", "training_record.json"}
    code = {path.name for path in output.glob("*.py")}
    assert "modeling_moca.py" in code and all(name.endswith("_moca.py") for name in code)
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MoCaModel"] and config["auto_map"]["AutoModel"] == "modeling_moca.MoCaModel"
    texts = ["a boat on the sea", "page 3"]
    embeddings = [
        SentenceTransformer(str(folder / mode / "plain"), device="cpu").encode(texts, convert_to_tensor=True)
        for mode in ("fsdp2", "whole")
    ]
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=1e-4)

    result, _ = check(folder, "fsdp2", "resumed", rel=1e-4, atol=1e-3)
    again, weights = read(folder, "fsdp2", "resumed_again")
    checkpoint = folder / "fsdp2" / "resumed" / "checkpoint-2"
    assert (checkpoint / "COMPLETE").is_file() and not list(checkpoint.glob("*.safetensors"))
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert again["losses"] == result["losses"] and again["gradient_norms"] == result["gradient_norms"]
    assert len(again["losses"]) == 4
    for name, tensor in read(folder, "fsdp2", "resumed")[1].items():
        assert torch.equal(weights[name], tensor), name
