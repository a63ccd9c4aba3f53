"""Defects of the authors' released code, each confirmed there by running it: this project has none of them.

The table names the test that would catch each; tests that fit nowhere else stand below it.
"""

import ast
import random

import datasets
import pytest
import torch

from modeling_moca import MoCaForPreTraining
from tests.conftest import REPOSITORY
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import encoded_image, make_row, make_rows
from tests.trainers.test_cpt_trainer import make_config, make_model
from trainers.cpt_collator import CPTCollator
from trainers.cpt_trainer import CPTTrainer

CAUGHT_BY = {
    "D1 under ZeRO-3 the MAE decoder is not initialised": "modeling_moca/test_sharded_start.py::"
    "test_every_weight_and_the_mae_decoder_arrive",
    "D2 gradients are multiplied by accumulation": "trainers/test_cpt_trainer.py::"
    "test_accumulation_equals_one_large_batch",
    "D3 contrastive gradients are divided by the number of ranks": "trainers/test_contrastive_distributed.py::"
    "test_two_ranks_equal_one_process",
    "D4 task batches mix tasks": "trainers/test_contrastive_sampler.py::"
    "test_a_global_batch_is_one_task_and_no_row_comes_twice",
    "D5 text trains the vision tower": "test_defects.py::test_d05_text_does_not_train_the_vision_tower",
    "D6 nothing drawn gives NaN": "modeling_moca/test_losses.py::test_nothing_chosen_is_zero_with_zero_gradients",
    "D6 nothing drawn in a whole step gives NaN": "test_defects.py::test_d06_nothing_drawn_in_a_step_gives_no_nan",
    "D7 every epoch repeats the same batches (stage 1)": "test_defects.py::test_d07_epochs_differ_in_their_order",
    "D7 every epoch repeats the same batches (stage 2)": "trainers/test_contrastive_sampler.py::"
    "test_order_depends_on_seed_and_epoch_only",
    "D8 ranks of one step have unrelated costs": "trainers/test_cpt_batches.py::"
    "test_ranks_have_the_same_cost_in_every_step",
    "D9 ranks draw the same masks": "test_defects.py::test_d09_rows_draw_masks_and_noise_of_their_own",
    "D9 epochs draw the same masks": "trainers/test_cpt_trainer.py::"
    "test_masks_differ_between_epochs_and_return_on_a_second_run",
    "D10 a literal pad token in the text does harm": "test_defects.py::test_d10_a_literal_pad_token_does_no_harm",
    "D11 rows with fewer negatives": "trainers/test_contrastive_trainer.py::test_features_reach_the_loss_as_rows_say",
    "D12 a negative that is empty or the positive": "trainers/test_contrastive_trainer.py::test_masked_negatives",
    "D13 cost of the raw image size": "test_defects.py::test_d13_length_is_that_of_the_resized_image",
    "D14 rows are dropped": "test_defects.py::test_d14_every_row_is_used_once_an_epoch",
    "D14 incomplete groups of rows of like cost are dropped": "trainers/test_cpt_mixture_training.py::"
    "test_every_row_is_used_once_an_epoch",
    "D15 going on re-initialises the MAE head": "test_defects.py::test_d15_going_on_keeps_the_mae_head",
    "D15 a published MAE head is lost": "modeling_moca/test_checkpoints.py::"
    "test_published_pretraining_checkpoint_brings_its_heads",
    "D15 a published MAE head is lost under ZeRO-3": "modeling_moca/test_sharded_start.py::"
    "test_every_weight_and_the_mae_decoder_arrive",
    "D16 a key-value cache is built": "modeling_moca/test_attention.py::test_no_cache_is_built",
    "D17 cosine over temperature in half precision": "trainers/test_contrastive_loss.py::"
    "test_bfloat16_under_autocast_is_computed_in_float32",
    "D17 half precision miscounts long rows": "modeling_moca/test_losses.py::test_mean_pooling_counts_in_float32",
    "logits in half precision": "modeling_moca/test_losses.py::test_losses_are_float32_in_a_bfloat16_model",
    "eval() on data": "trainers/test_contrastive_data.py::test_lists_are_parsed_and_nothing_else",
    "eval() and pickle in code": "test_layout.py::test_packages_neither_print_nor_evaluate_nor_unpickle",
    "pickles are written (stage 1)": "test_defects.py::test_a_saved_model_holds_no_pickle",
    "pickles are written (stage 2)": "trainers/test_contrastive_trainer.py::"
    "test_saved_folder_loads_anywhere_and_holds_no_training_data",
    "a truncated image": "trainers/test_cpt_collator.py::test_bad_rows_raise_and_name_the_row",
    "ties count as correct": "trainers/test_evaluation.py::test_by_hand",
    "zero vectors and NaN count as correct": "trainers/test_evaluation.py::test_nan_and_zero_vectors_are_never_right",
    "resume does not restore weights": "trainers/test_cpt_trainer.py::test_resume_goes_on_with_the_same_masks",
    "losses never reach the log history": "trainers/test_cpt_trainer.py::test_logged_losses_are_sums_over_counts",
    "the tokenizer with the mask token is not saved": "trainers/test_cpt_script.py::"
    "test_script_trains_from_yaml_and_leaves_a_folder_that_loads",
}


@pytest.mark.parametrize("defect", CAUGHT_BY)
def test_the_table_names_tests_that_exist(defect):
    path, name = CAUGHT_BY[defect].split("::")
    tree = ast.parse((REPOSITORY / "tests" / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_d05_text_does_not_train_the_vision_tower():
    model = make_model()
    collator = CPTCollator(tiny_processor(), seed=0)
    alone = collator([make_row(1, 20, 0), make_row(2, 12, 0)])
    model(**alone).loss.backward()
    vision = {name: weight for name, weight in model.named_parameters() if ".visual." in name}
    assert vision and all(weight.grad is None or not weight.grad.any() for weight in vision.values())
    # And the states of a text are the same whether its batch holds an image or not.
    beside = collator([make_row(1, 20, 0), make_row(3, 12, 1)])
    length = int(alone["attention_mask"][0].sum())
    with torch.no_grad():
        states = [model(**batch).last_hidden_state[0, :length] for batch in (alone, beside)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", ["mlm_ratio", "mae_ratio"])
def test_d06_nothing_drawn_in_a_step_gives_no_nan(ratio, tmp_path):
    config = make_config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **{ratio: 0.0})
    trainer = CPTTrainer(make_model(), config, train_dataset=make_rows(4), processing_class=tiny_processor())
    trainer.train()
    entry = trainer.state.log_history[0]
    empty, other = ("mlm_loss", "mae_loss") if ratio == "mlm_ratio" else ("mae_loss", "mlm_loss")
    assert entry[empty] == 0 and 0 < entry[other] < 100
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def recorded_batches(tmp_path, rows, **settings):
    """Train and return the token ids of every batch, by epoch."""
    seen = []

    class Recorder(CPTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            restored = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
            for ids, mask in zip(restored, inputs["attention_mask"]):
                seen.append(tuple(ids[mask.bool()].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 2, **settings}
    config = make_config(tmp_path, train_sampling_strategy="random", **settings)
    Recorder(make_model(), config, train_dataset=rows, processing_class=tiny_processor()).train()
    return seen[: len(rows)], seen[len(rows) :]


def test_d07_epochs_differ_in_their_order(tmp_path):
    first, second = recorded_batches(tmp_path, make_rows(12, images=(0,)))
    assert sorted(first) == sorted(second) and first != second
    batches = [{frozenset(epoch[start : start + 4]) for start in range(0, 12, 4)} for epoch in (first, second)]
    assert batches[0] != batches[1]


def test_d09_rows_draw_masks_and_noise_of_their_own():
    """Rows that differ in one word only: ranks meet different rows, and a mask depends on its row alone."""
    words = "the page shows a picture of the sea and the sky over quiet hills".split()
    rows = [make_row(0, 4, 1) for _ in range(8)]
    rows = [
        {"text": f"{IMAGE} {' '.join(words * 3)} {index}", "images": row["images"]} for index, row in enumerate(rows)
    ]
    collator = CPTCollator(tiny_processor(max_pixels=16 * 784, min_pixels=16 * 784), seed=0, mae_ratio=0.5)
    batches = [collator([row]) for row in rows]
    text = [tuple((batch["labels"][0] != -100).nonzero().flatten().tolist()) for batch in batches]
    patches = [tuple(batch["patch_mask"][0].tolist()) for batch in batches]
    noise = [
        batch["pixel_values"][batch["patch_mask"][0][batch["input_ids"][0] == 3].repeat_interleave(4)]
        for batch in batches
    ]
    assert len(set(text)) == len(set(patches)) == 8
    assert len({tuple(rows[0, :8].tolist()) for rows in noise}) == 8


@pytest.mark.parametrize("text", ["a <|pad|> b", "<|pad|>", "the sea<|pad|><|pad|>", "<|endoftext|> the <|pad|> sky"])
def test_d10_a_literal_pad_token_does_no_harm(text):
    processor = tiny_processor()
    collator = CPTCollator(processor, seed=0, mlm_ratio=0.0)
    row, other = {"text": text, "images": []}, make_row(3, 40, 2)
    alone, together = collator([row]), collator([row, other])
    length = int(alone["attention_mask"].sum())
    assert processor.tokenizer.decode(alone["input_ids"][0]) == text
    assert not torch.isin(alone["input_ids"], torch.tensor(processor.tokenizer.all_special_ids)).any()
    assert torch.equal(together["input_ids"][0, :length], alone["input_ids"][0])
    assert together["attention_mask"][0].tolist() == [1] * length + [0] * (together["attention_mask"].shape[1] - length)
    model = make_model().moca
    with torch.no_grad():
        apart = model(input_ids=alone["input_ids"]).pooler_output[0]
        beside = model(
            **{key: together[key] for key in together if key not in ("labels", "patch_mask", "patch_labels")}
        )
    torch.testing.assert_close(beside.pooler_output[0], apart, atol=1e-5, rtol=0)


def test_d13_length_is_that_of_the_resized_image():
    processor = tiny_processor(min_pixels=256 * 28 * 28, max_pixels=1024 * 28 * 28)
    row = make_row(0, 1, 1)
    row["images"] = [encoded_image(28, 28)]
    measured = CPTCollator(processor).prepare(row, "here").num_tokens
    ids = processor(text=[row["text"]], images=[row["images"]])["input_ids"]
    assert int((ids == 3).sum()) == 256 and measured == ids.shape[1]


def test_d14_every_row_is_used_once_an_epoch(tmp_path):
    chance = random.Random(0)
    rows = [make_row(seed, chance.randrange(2, 60), 0) for seed in range(23)]
    first, second = recorded_batches(tmp_path, datasets.Dataset.from_list(rows))
    expected = sorted(tuple(tiny_processor()(text=[row["text"]])["input_ids"][0].tolist()) for row in rows)
    assert sorted(first) == sorted(second) == expected


def test_d15_going_on_keeps_the_mae_head(tmp_path):
    trained = make_model()
    torch.nn.init.ones_(trained.mae_head.proj.weight)
    torch.nn.init.ones_(trained.mae_head.decoder.self_attn.q_proj.weight)
    trained.save_pretrained(tmp_path)
    again = MoCaForPreTraining.from_pretrained(tmp_path)
    assert again.mae_head.proj.weight.eq(1).all() and again.mae_head.decoder.self_attn.q_proj.weight.eq(1).all()
    fresh = MoCaForPreTraining.from_backbone(tiny_backbone())
    assert not fresh.mae_head.proj.weight.eq(1).any()


def test_a_saved_model_holds_no_pickle(tmp_path):
    config = make_config(tmp_path)
    trainer = CPTTrainer(make_model(), config, train_dataset=make_rows(4), processing_class=tiny_processor())
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "training_args.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
