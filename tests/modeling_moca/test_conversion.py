"""Do weights arrive whole, and is anything missing, extra or mis-shaped refused?"""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining, BertConfig, BertModel, Qwen2_5_VLForConditionalGeneration

from modeling_moca import MoCaConfig, MoCaForPreTraining, MoCaModel
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.tiny import VOCAB_SIZE, tiny_backbone, tiny_config


def spoil(folder, change):
    """Rewrite a checkpoint's tensors with `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("from_folder", [True, False])
def test_every_weight_arrives(tied, from_folder, tmp_path):
    stock = tiny_backbone(tie_word_embeddings=tied)
    expected = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    stock.save_pretrained(tmp_path)
    model = MoCaForPreTraining.from_backbone(tmp_path if from_folder else stock, mask_token_id=6)
    ours = model.state_dict()
    for name, tensor in expected.items():
        own_name = f"mlm_head.{name}" if name.startswith("lm_head.") else f"moca.backbone.{name.removeprefix('model.')}"
        assert torch.equal(ours.pop(own_name), tensor), name
    assert set(ours) == {name for name in ours if name.startswith("mae_head.")}
    embeddings = model.get_input_embeddings().weight
    assert (model.mlm_head.lm_head.weight is embeddings) == tied
    assert model.config.tie_word_embeddings == tied

    model.save_pretrained(tmp_path / "saved")
    again = MoCaForPreTraining.from_pretrained(tmp_path / "saved")
    assert (again.mlm_head.lm_head.weight is again.get_input_embeddings().weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_mae_decoder_starts_as_the_middle_layer():
    model = MoCaForPreTraining.from_backbone(tiny_backbone())
    middle, first = model.moca.language_model.layers[2].state_dict(), model.moca.language_model.layers[0].state_dict()
    for name, tensor in model.mae_head.decoder.state_dict().items():
        assert torch.equal(tensor, middle[name])
    assert not torch.equal(model.mae_head.decoder.self_attn.q_proj.weight, first["self_attn.q_proj.weight"])
    parameters = {id(parameter) for parameter in model.mae_head.decoder.parameters()}
    assert not parameters & {id(parameter) for parameter in model.moca.parameters()}, "a copy, not the layer itself"
    weight = model.mae_head.proj.weight
    assert weight.shape == (4 * 1176, 32)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.mae_head.proj.bias.any()


def test_model_loads_from_a_pretraining_checkpoint_without_a_warning(tmp_path, caplog):
    pretraining = MoCaForPreTraining.from_backbone(tiny_backbone())
    pretraining.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model, info = MoCaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert caplog.records == []
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = interleaved_batch()
    torch.testing.assert_close(model(**batch).pooler_output, pretraining.moca(**batch).pooler_output)


@pytest.mark.parametrize("saved_class", [MoCaModel, MoCaForPreTraining])
def test_auto_classes_and_auto_map(saved_class, tmp_path):
    saved_class.from_backbone(tiny_backbone()).save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MoCaModel)
    auto_map = MoCaConfig.from_pretrained(tmp_path).auto_map
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoProcessor"}
    for target in auto_map.values():
        assert (tmp_path / f"{target.split('.')[0]}.py").is_file() or target.startswith("processing_moca")
    if saved_class is MoCaForPreTraining:
        assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path), MoCaForPreTraining)


def test_missing_unexpected_and_misshaped_tensors_are_listed(tmp_path):
    def drop(tensors):
        key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
        del tensors[key]
        tensors["surprise.weight"] = torch.zeros(2)

    tiny_backbone().save_pretrained(tmp_path)
    spoil(tmp_path, drop)
    with pytest.raises(ValueError, match=r"1 missing: \['.*up_proj.weight'\]; 1 unexpected: \['surprise.weight'\]"):
        MoCaModel.from_backbone(tmp_path)

    def misshape(tensors):
        tensors.update({key: torch.zeros(3, 3) for key in tensors if key.endswith("layers.1.mlp.up_proj.weight")})

    tiny_backbone().save_pretrained(tmp_path)
    spoil(tmp_path, misshape)
    with pytest.raises(ValueError, match=r"1 of another shape: \['.*up_proj.weight \(3, 3\), expected \(48, 32\)'\]"):
        MoCaModel.from_backbone(tmp_path)


def test_missing_lm_head_matters_only_to_the_pretraining_model(tmp_path):
    tiny_backbone(tie_word_embeddings=False).save_pretrained(tmp_path)
    spoil(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing: \['lm_head.weight'\]"):
        MoCaForPreTraining.from_backbone(tmp_path)
    assert MoCaModel.from_backbone(tmp_path)(**interleaved_batch()).pooler_output.isfinite().all()


def test_a_moca_checkpoint_with_missing_weights_is_refused(tmp_path):
    MoCaModel.from_backbone(tiny_backbone()).save_pretrained(tmp_path)
    spoil(tmp_path, lambda tensors: tensors.pop("backbone.language_model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 missing: \['backbone.language_model.norm.weight'\]"):
        MoCaModel.from_pretrained(tmp_path)
    MoCaModel.from_backbone(tiny_backbone()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit MoCaForPreTraining: 14 missing: \['mae_head"):
        MoCaForPreTraining.from_pretrained(tmp_path)


def test_bare_backbone_has_no_lm_head():
    with pytest.raises(ValueError, match="Qwen2_5_VLModel has no lm_head"):
        MoCaForPreTraining.from_backbone(tiny_backbone().model)
    assert isinstance(MoCaModel.from_backbone(tiny_backbone().model), MoCaModel)


def test_only_vision_language_models_are_taken():
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match=r"The backbone is of type 'bert'; supported are \['idefics3', 'qwen2_5_vl'"):
        MoCaModel.from_backbone(bert)
    with pytest.raises(ValueError, match=r"\['dtype'\] only apply when a checkpoint is loaded"):
        MoCaModel.from_backbone(tiny_backbone(), dtype=torch.float32)


def test_mask_token_outside_the_vocabulary_grows_the_matrix(tmp_path):
    kept = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=VOCAB_SIZE - 1)
    assert kept.config.vocab_size == VOCAB_SIZE
    grown = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=VOCAB_SIZE)
    assert grown.config.vocab_size == grown.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 1
    assert grown.mlm_head.lm_head.weight is grown.get_input_embeddings().weight
    grown.save_pretrained(tmp_path)
    assert MoCaForPreTraining.from_pretrained(tmp_path)(**masked_batch()).loss.isfinite()


def test_trained_mae_head_survives_saving():
    model = MoCaForPreTraining.from_backbone(tiny_backbone())
    torch.nn.init.ones_(model.mae_head.decoder.self_attn.q_proj.weight)
    torch.nn.init.ones_(model.mae_head.proj.weight)
    again = MoCaForPreTraining(model.config)
    again.load_state_dict(model.state_dict())
    assert again.mae_head.proj.weight.eq(1).all() and again.mae_head.decoder.self_attn.q_proj.weight.eq(1).all()


def test_moca_built_from_a_config_alone_trains():
    model = MoCaForPreTraining(MoCaConfig(backbone_config=tiny_config(), mask_token_id=6))
    model(**masked_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pooling": "max"}, r"pooling must be one of \['mean', 'last'\], got 'max'"),
        ({"mae_loss_weight": -1}, "mae_loss_weight must be at least 0, got -1"),
    ],
)
def test_config_refuses_what_it_does_not_know(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoCaConfig(**kwargs)


def test_images_that_do_not_belong_to_the_text_are_refused():
    model, batch = MoCaModel.from_backbone(tiny_backbone()), interleaved_batch()
    with pytest.raises(ValueError, match="12 image tokens, but pixel_values is None"):
        model(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="need image_grid_thw"):
        model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    with pytest.raises(ValueError, match="12 image tokens, which own 48 rows of pixel_values; got 44 rows"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:44]})


def test_stock_model_is_registered_as_before():
    assert isinstance(tiny_backbone(), Qwen2_5_VLForConditionalGeneration)
    assert MoCaConfig().backbone_config.model_type == "qwen2_5_vl"


@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_loaded_model_keeps_its_attention_path(path):
    stock = tiny_backbone()
    stock.set_attn_implementation(path)
    model = MoCaForPreTraining.from_backbone(stock)
    for module in (model.moca.language_model, model.moca.backbone.visual, model.mae_head.decoder.self_attn):
        assert module.config._attn_implementation == path
