"""From a stock checkpoint over both stages to a published folder, for families with other pixels than Qwen2.5-VL."""

import pytest
import torch

from hub_cards import export
from modeling_moca import MoCaForPreTraining, MoCaProcessor
from tests.conftest import REPOSITORY
from tests.families import TILED, family_backbone, family_image_processor, family_tokenizer
from tests.hub_cards.test_export import run
from tests.trainers import contrastive_cases
from tests.trainers.cpt_rows import encoded_image, make_rows
from tests.trainers.test_cpt_trainer import make_config
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.cpt_trainer import CPTTrainer


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "smolvlm"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pretrained(family, tmp_path_factory):
    """Stage 1, started from files on disk as a user starts it."""
    folder = tmp_path_factory.mktemp(family)
    family_backbone(family).save_pretrained(folder / "stock")
    family_tokenizer(family, mask_token=None).save_pretrained(folder / "stock")
    family_image_processor(family).save_pretrained(folder / "stock")
    limits = {"size": {"longest_edge": 32}} if family in TILED else {"min_pixels": 1024, "max_pixels": 8192}
    processor = MoCaProcessor.from_backbone(folder / "stock", max_length=512, **limits)
    model = MoCaForPreTraining.from_backbone(folder / "stock", mask_token_id=processor.mask_token_id)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # One and the same picture everywhere: hidden patches can be learned within seconds.
    picture = encoded_image(64, 32)
    rows = [{**row, "images": [picture] * len(row["images"])} for row in make_rows(8)]
    settings = {"learning_rate": 1e-2, "max_steps": 30, "per_device_train_batch_size": 4, "max_length": 512}
    trainer = CPTTrainer(
        model, make_config(folder / "stage1", **settings), train_dataset=rows, processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    return folder, before, trainer


def test_stage_1_learns_and_moves_every_parameter(pretrained):
    _, before, trainer = pretrained
    history = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    for name in ("mlm_loss", "mae_loss"):
        losses = [entry[name] for entry in history]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), (name, losses)
    still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    # Every tile is full, so SigLIP's table of positions is used whole, and so is every other weight.
    assert still == []


@pytest.fixture(scope="module")
def finetuned(family, pretrained):
    folder = pretrained[0]
    torch.manual_seed(0)
    model = contrastive_cases.build(folder / "stage1")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = {"texts": contrastive_cases.texts_task(), "mixed": contrastive_cases.mixed_task()}
    settings = contrastive_cases.arguments(folder / "stage2", num_train_epochs=8, learning_rate=5e-3, mini_batch_size=3)
    trainer = ContrastiveTrainer(model, settings, data)
    trainer.train()
    trainer.save_model(str(folder / "stage2"))
    return folder, before, trainer


def test_stage_2_learns_and_moves_every_parameter(finetuned):
    _, before, trainer = finetuned
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for task in ("texts", "mixed"):
        losses = [entry[f"loss_{task}"] for entry in history if f"loss_{task}" in entry]
        assert len(losses) == 8 and sum(losses[-2:]) < 0.6 * sum(losses[:2]), losses
    assert [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_cached_gradients_equal_plain_ones(pretrained, tmp_path):
    gradients = []
    for mini_batch_size in (None, 3):
        model = contrastive_cases.build(pretrained[0] / "stage1", model_kwargs={"dtype": torch.float64})
        recorder = contrastive_cases.GradientRecorder()
        settings = contrastive_cases.arguments(
            tmp_path, max_steps=1, mini_batch_size=mini_batch_size, max_grad_norm=0.0
        )
        ContrastiveTrainer(model, settings, {"mixed": contrastive_cases.mixed_task()}, callbacks=[recorder]).train()
        gradients.append(recorder.steps[0])
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-9, rtol=1e-6, msg=name)


def test_published_folder_works_where_the_package_is_unknown(finetuned, tmp_path):
    published = export(finetuned[0] / "stage2", tmp_path / "published")
    run([str(REPOSITORY / "tests" / "hub_cards" / "check_export.py"), str(published)], tmp_path)
