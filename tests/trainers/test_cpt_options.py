"""Options that save memory or time leave the losses what they are."""

import pytest
import torch
from PIL import Image

from modeling_moca import MoCaForPreTraining
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import make_row, make_rows
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


def run(output, rows=None, **settings):
    """Take two steps, each over batches with images and without; return losses and gradient norms, and the trainer."""
    settings = {"gradient_accumulation_steps": 2, **settings}
    config = CPTConfig(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        max_length=256,
        warmup_steps=0,
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        **settings,
    )
    model = MoCaForPreTraining.from_pretrained(output.parent / "start")
    rows = make_rows(8, images=(1, 2, 0, 0)) if rows is None else rows
    trainer = CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    return [[entry[name] for name in ("mlm_loss", "mae_loss", "grad_norm")] for entry in entries], trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "start")
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return run(folder / "plain")[0]


def test_recomputed_layers(folder, plain, monkeypatch):
    calls = []
    # Not the layer's own forward, around which the recomputation is.
    attention = type(tiny_backbone().model.language_model.layers[0].self_attn)
    forward = attention.forward

    def count(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", count)
    run(folder / "plain_again")
    num_plain = len(calls)
    ours, _ = run(folder / "recomputed", gradient_checkpointing=True)
    assert len(calls) - num_plain == 2 * num_plain, "every layer, the MAE decoder too, must run twice"
    assert ours == [pytest.approx(step, rel=1e-6) for step in plain]


def test_bfloat16(folder, plain):
    ours, trainer = run(folder / "bf16", bf16=True)
    assert ours != plain
    assert ours == [pytest.approx(step, rel=2e-2) for step in plain]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_compiled(folder, monkeypatch):
    """Layer by layer, and on batches of one shape: each shape is compiled anew, which takes long."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    # The training arguments set this one, for all that comes after them.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    settings = {"rows": [make_row(0, 8, 1)] * 4, "gradient_accumulation_steps": 1}
    expected, _ = run(folder / "not_compiled", **settings)
    assert graphs["unique_graphs"] == 0
    ours, trainer = run(folder / "compiled", torch_compile=True, torch_compile_backend="aot_eager", **settings)
    assert graphs["unique_graphs"] > 0
    assert ours == [pytest.approx(step, rel=1e-5) for step in expected]
    trainer.save_model()
    saved = MoCaForPreTraining.from_pretrained(folder / "compiled")
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), trainer.model.parameters()))


@pytest.mark.parametrize("exact_resize", [True, False])
def test_images_are_resized_as_the_settings_say(tmp_path, exact_resize):
    config = CPTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", exact_resize=exact_resize)
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    trainer = CPTTrainer(model, config, train_dataset=make_rows(2), processing_class=tiny_processor())
    image = Image.effect_noise((61, 90), 90).convert("RGB")
    row = trainer.data_collator.prepare({"text": IMAGE, "images": [image]}, "a row")
    resized = trainer.data_collator.encode([row])[0]["pixel_values"]
    assert torch.equal(resized, trainer.processing_class.resize(image, exact=exact_resize).flatten())
    assert not torch.equal(resized, trainer.processing_class.resize(image, exact=not exact_resize).flatten())
