"""Exports in mteb, on tasks made of code: the scores are those of the plain model and closed formulas."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mteb")

import mteb
from mteb.models.model_implementations import MODEL_REGISTRY

from hub_cards import export
from hub_cards.mteb_models import model_meta, register
from hub_cards.mteb_published import MOCA_3B, PUBLISHED, published_inputs, register_published
from modeling_moca import MoCaModel
from tests.hub_cards.mteb_tasks import (
    NUM_DOCUMENTS,
    NUM_QUERIES,
    RETRIEVAL,
    STS_SCORES,
    TinyBothToImage,
    TinyPages,
    TinySTS,
    TinyText,
    answers,
    images,
    side,
)
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from trainers.evaluation import retrieval_metrics

PROMPTS = {"query": "Find: ", "DocumentUnderstanding-query": "Find the page: ", "VisualSTS(eng)": "Compare: "}


@pytest.fixture(autouse=True)
def own_registry():
    """Leave mteb's own list of models as it was."""
    before = dict(MODEL_REGISTRY)
    yield
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb")
    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "model")
    tiny_processor(max_length=128).save_pretrained(folder / "model")
    facts = {"license": "apache-2.0", "base_model": "org/base", "language": ["en", "de"]}
    export(folder / "model", folder / "published", prompts=PROMPTS, **facts)
    export(folder / "model", folder / "multi_vector", layout="multi_vector", projection_dim=16)
    return folder


def embed(model, processor, columns, prompt=""):
    """Embed rows one by one with the plain model: no padding, no sentence-transformers."""
    embeddings = []
    for row in range(len(columns["id"])):
        pictures = [columns["image"][row]] if "image" in columns else []
        text = IMAGE * len(pictures) + prompt + (columns["text"][row] if "text" in columns else "")
        with torch.no_grad():
            embeddings.append(model(**processor(text=[text], images=[pictures])).pooler_output[0])
    return torch.nn.functional.normalize(torch.stack(embeddings), dim=-1)


def plain(folder):
    return MoCaModel.from_pretrained(folder), tiny_processor(max_length=128)


def scores(result):
    return {task.task_name: task.scores["test"][0] for task in result.task_results}


def test_scores_are_those_of_the_plain_model(folder):
    register(folder / "published", name="org/moca-tiny")
    model = mteb.get_model("org/moca-tiny", device="cpu")
    tasks = [task() for task in RETRIEVAL]
    found = scores(mteb.evaluate(model, tasks, cache=None, encode_kwargs={"batch_size": 5}, co2_tracker=False))
    assert len(found) == len(RETRIEVAL) == 6
    ours, distinct = plain(folder / "model"), set()
    for task in tasks:
        queries, documents = task.metadata.category.split("2")
        prompt = PROMPTS["DocumentUnderstanding-query" if isinstance(task, TinyPages) else "query"]
        expected = retrieval_metrics(
            embed(*ours, side(queries, NUM_QUERIES, 1), prompt),
            embed(*ours, side(documents, NUM_DOCUMENTS, 2)),
            [answers(query) for query in range(NUM_QUERIES)],
            k=10,
        )
        assert found[task.metadata.name]["ndcg_at_10"] == pytest.approx(expected["nDCG@10"], abs=1e-5), task
        assert 0 < expected["nDCG@10"] < 1
        distinct.add(round(expected["nDCG@10"], 5))
    assert len(distinct) == len(RETRIEVAL)


def test_similarity_of_pairs_of_images(folder):
    found = scores(mteb.evaluate(model_meta(folder / "published"), [TinySTS()], cache=None, co2_tracker=False))
    ours = plain(folder / "model")
    first, second = (
        embed(*ours, {"id": range(12), "image": images(12, seed)}, PROMPTS["VisualSTS(eng)"]) for seed in (3, 4)
    )
    ranks = [torch.as_tensor(values).argsort().argsort().double() for values in ((first * second).sum(-1), STS_SCORES)]
    # Spearman without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    expected = 1 - 6 * (ranks[0] - ranks[1]).square().sum().item() / (12 * 143)
    assert found["TinySTS"]["cosine_spearman"] == pytest.approx(expected, abs=1e-9)
    assert abs(expected) < 0.99


def test_late_interaction(folder):
    meta = register(folder / "multi_vector")
    assert meta.model_type == ["late-interaction"] and meta.embed_dim == 16 and meta.similarity_fn_name == "MaxSim"
    model = mteb.get_model(str(folder / "multi_vector"), device="cpu")
    found = scores(mteb.evaluate(model, [TinyText(), TinyBothToImage()], cache=None, co2_tracker=False))
    encoder = model.model
    for task in (TinyText, TinyBothToImage):
        sides = []
        for kinds, count, seed in zip(task.metadata.category.split("2"), (NUM_QUERIES, NUM_DOCUMENTS), (1, 2)):
            columns = side(kinds, count, seed)
            kept = [columns[kind] for kind in ("text", "image") if kind in columns]
            rows = [dict(zip([kind for kind in ("text", "image") if kind in columns], row)) for row in zip(*kept)]
            sides.append([encoder.encode([row["text"] if list(row) == ["text"] else row])[0] for row in rows])
        ranked = torch.tensor(
            [
                [(torch.as_tensor(query) @ torch.as_tensor(document).T).amax(1).sum() for document in sides[1]]
                for query in sides[0]
            ]
        )  # [Q, C]
        gains = 0
        for query, row in enumerate(ranked):
            places = [int((row > row[answer]).sum()) for answer in answers(query)]
            gains += sum(1 / torch.tensor(place + 2.0).log2().item() for place in places if place < 10)
        expected = gains / NUM_QUERIES / (1 + 1 / torch.tensor(3.0).log2().item())
        assert found[task.metadata.name]["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


def test_metadata_comes_from_the_folder(folder):
    meta = model_meta(folder / "published", name="org/moca-tiny", training_datasets={"TinyText"})
    parameters = sum(parameter.numel() for parameter in MoCaModel.from_pretrained(folder / "model").parameters())
    assert (meta.name, meta.n_parameters, meta.n_embedding_parameters) == ("org/moca-tiny", parameters, 320 * 32)
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.adapted_from) == (32, 128, "apache-2.0", "org/base")
    assert meta.languages == ["deu-Latn", "eng-Latn"] and meta.modalities == ["image", "text"]
    assert meta.use_instructions and meta.training_datasets == {"TinyText"} and meta.output_dtypes == "float32"
    assert not model_meta(folder / "multi_vector").use_instructions
    assert model_meta(folder / "published").name == "local/published"


def test_revision_tells_models_apart_and_not_cards(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "published", tmp_path / "copy"))
    same = model_meta(folder / "published").revision
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert model_meta(copy).revision == same and len(same) == 40
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_meta(copy).revision != same


def test_command_line_with_a_hub_id(folder, tmp_path):
    """The cache of the Hub as a download leaves it: nothing is downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--moca-tiny"
    shutil.copytree(folder / "published", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = Path(__file__).with_name("mteb_tasks.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = ["run", "-m", "org/moca-tiny", "-t", "TinyText", "TinyPages", "--output-folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *command], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    local = model_meta(folder / "published")
    expected = scores(mteb.evaluate(local, [TinyText(), TinyPages()], cache=None, co2_tracker=False))
    (results,) = tmp_path.rglob(f"org__moca-tiny/{commit}")
    for task in ("TinyText", "TinyPages"):
        written = json.loads((results / f"{task}.json").read_text())
        assert written["scores"]["test"][0]["ndcg_at_10"] == pytest.approx(expected[task]["ndcg_at_10"])
    assert json.loads((results / "model_meta.json").read_text())["n_parameters"] == local.n_parameters


def test_published_model_is_converted_once_and_reads_what_its_authors_wrote(folder, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tiny_backbone().save_pretrained(checkpoint)
    for part in (tiny_processor().tokenizer, tiny_processor().image_processor):
        part.save_pretrained(tmp_path / "processor")
    register_published()
    options = {
        "source": str(checkpoint),
        "processor_name": str(tmp_path / "processor"),
        "folder": str(tmp_path / "converted"),
        "device": "cpu",
    }
    name = MOCA_3B.name
    model = mteb.get_model(name, **options)
    assert model.model[0].model.config.bidirectional
    # The second time nothing is left to convert.
    shutil.rmtree(checkpoint)
    model = mteb.get_model(name, **options)
    found = scores(mteb.evaluate(model, TinyBothToImage(), cache=None, co2_tracker=False))
    # Images are larger than in the other tests: the released model takes at least 256 tokens.
    processor = model.model[0].processor
    assert processor.image_processor.size["shortest_edge"] == 256 * 28 * 28
    ours = MoCaModel.from_pretrained(folder / "model")
    documents = embed(ours, processor, side("i", NUM_DOCUMENTS, 2), "Represent the given document image.\n")
    queries = side("it", NUM_QUERIES, 1)
    queries["text"] = [f"Represent the given image with the following question: {text}\n" for text in queries["text"]]
    right = [answers(query) for query in range(NUM_QUERIES)]
    expected = retrieval_metrics(embed(ours, processor, queries), documents, right, k=10)
    assert found["TinyBothToImage"]["ndcg_at_10"] == pytest.approx(expected["nDCG@10"], abs=1e-5)
    assert published_inputs(["tides"], None) == ["tides"]


def test_published_models_ask_for_no_pin(folder):
    for meta in PUBLISHED:
        assert meta.extra_requirements_groups is None and "image" in meta.modalities
        meta._check_requirements()
    assert [meta.embed_dim for meta in PUBLISHED] == [2048, 3584]
    # mteb's own entry does: should it stop, this one is not needed any more.
    with pytest.raises(ImportError, match="transformers<4.53"):
        MODEL_REGISTRY[MOCA_3B.name]._check_requirements()


def test_what_is_no_export_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"lacks \['config_sentence_transformers.json', 'modules.json'\]"):
        model_meta(folder / "model")
    with pytest.raises(ValueError, match="revision='main' belongs to a Hub id"):
        model_meta(folder / "published", revision="main")
    copy = Path(shutil.copytree(folder / "published", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a model of type 'bert', allowed is 'moca'"):
        model_meta(copy)
    (copy / "config.json").write_text(json.dumps(config))
    settings = json.loads((copy / "config_sentence_transformers.json").read_text())
    (copy / "config_sentence_transformers.json").write_text(json.dumps({**settings, "model_type": "SparseEncoder"}))
    with pytest.raises(ValueError, match="is a 'SparseEncoder' of sentence-transformers, allowed are"):
        model_meta(copy)
    with pytest.raises(ValueError, match="the batch has neither"):
        published_inputs(None, None)
