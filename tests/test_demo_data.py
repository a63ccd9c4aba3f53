"""The demo's data and its shipped backbone: no leakage between pools, the stated layout, and a model that reads."""

import io
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
BACKBONE = EXAMPLES / "demo_backbone"
sys.path.insert(0, str(EXAMPLES))

import demo_data  # noqa: E402
import pretrain_backbone  # noqa: E402

TASKS = {"page", "digits", "text"}


def test_pools_share_no_section_paragraph_or_scan():
    headings, paragraphs, scans = [], [], []
    for pool in demo_data.POOL_SHARES:
        headings += demo_data.sections(pool)
        paragraphs += [text for part in demo_data.sections(pool).values() for text in part]
        scans += [scan.tobytes() for scan in demo_data.digit_scans(pool)[0]]
    assert len(set(headings)) == len(headings)
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(scans) == 1797
    assert len(set(scans)) == len(scans)


@pytest.mark.parametrize("split", demo_data.SPLITS)
def test_unlabelled_rows_have_one_placeholder_an_image_and_whole_image_tokens(split):
    rows = demo_data.pretraining_rows(split, seed=3)
    numbers = {len(row["images"]) for row in rows}
    assert numbers == {0, 1, 2}
    for row in rows:
        assert row["text"].count(demo_data.PLACEHOLDER) == len(row["images"])
        for image in row["images"]:
            width, height = Image.open(io.BytesIO(image)).size
            assert width % 28 == 0
            assert height % 28 == 0


@pytest.mark.parametrize("split", demo_data.SPLITS)
def test_positives_are_distinct_within_a_task(split):
    tasks = demo_data.pair_rows(split, seed=0)
    assert set(tasks) == TASKS
    for rows in tasks.values():
        assert 40 <= len(rows) <= demo_data.PAIR_LIMITS[split]
        positives = {row["positive"]["text"] or row["positive"]["image"].tobytes() for row in rows}
        assert len(positives) == len(rows)
        assert len({row["query"]["text"] for row in rows}) == len(rows)


def test_test_split_is_large_enough_to_compare_models():
    assert all(len(rows) >= 100 for rows in demo_data.pair_rows("test", seed=0).values())


def test_rows_depend_on_the_seed_only():
    first, again = demo_data.pretraining_rows("dev", 0), demo_data.pretraining_rows("dev", 0)
    assert first == again
    assert first != demo_data.pretraining_rows("dev", 1)
    queries = [[row["query"]["text"] for row in demo_data.pair_rows("dev", 0)["page"]] for _ in range(2)]
    assert queries[0] == queries[1]


def test_a_question_names_words_of_its_page():
    for paragraphs in demo_data.sections("dev").values():
        for chunk in demo_data.pages(" ".join(paragraphs)):
            words = demo_data.key_words(chunk)
            assert len(words) <= 4
            assert all(word in chunk for word in words)


def test_page_shows_every_character_in_its_own_cell():
    page = np.asarray(demo_data.render_page("ab " * 60, lines=8))
    assert page.shape == (112, 168, 3)
    assert (page[:14, :7] == page[14:28, :7]).all()
    assert (page[:14, :7] != page[:14, 7:14]).any()


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match="backbone, cpt, cl, dev, test"):
        demo_data.pair_rows("train", 0)
    with pytest.raises(ValueError, match="8 lines"):
        demo_data.render_page("word " * 200)
    with pytest.raises(ValueError, match="multiple of 2"):
        demo_data.render_page("word", lines=3)


@pytest.fixture(scope="module")
def backbone():
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        BACKBONE, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return (
        model.eval(),
        PreTrainedTokenizerFast.from_pretrained(BACKBONE),
        Qwen2VLImageProcessorPil.from_pretrained(BACKBONE),
    )


def test_backbone_is_small_enough_to_ship_and_holds_no_pickle():
    files = [path for path in BACKBONE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".md", ".safetensors"}


def test_tokenizer_round_trips_and_leaves_room_for_a_mask_token(backbone):
    model, tokenizer, _ = backbone
    for text in ('The "for" statement\'s suite; x == y.', "three seven one nine"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "<|mask|>" not in tokenizer.get_vocab()
    assert len(tokenizer) + 16 <= model.get_input_embeddings().num_embeddings
    assert tokenizer.padding_side == "right"


def test_images_reach_the_model_unresized(backbone):
    _, tokenizer, image_processor = backbone
    rows = [
        (f"{demo_data.PLACEHOLDER}word", [demo_data.render_page("word")]),
        (f"{demo_data.PLACEHOLDER}one", [demo_data.digit_strip(demo_data.digit_scans("dev")[0][:4])]),
    ]
    inputs = pretrain_backbone.collate(rows, tokenizer, image_processor)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12], [1, 2, 8]]
    assert inputs["mm_token_type_ids"].sum(-1).tolist() == [24, 4]


def test_backbone_reads_held_out_digits_and_pages(backbone):
    metrics = pretrain_backbone.evaluate(*backbone)
    # Chance is ln 10 = 2.3: the words stand in the image alone.
    assert metrics["digit_words"] < 0.5
    assert metrics["digit_words_swapped"] > 2.3
    assert metrics["page"] < metrics["page_swapped"] - 1.0
    assert metrics["shuffled_page"] < metrics["shuffled_page_swapped"] - 1.0
