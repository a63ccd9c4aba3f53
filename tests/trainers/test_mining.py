"""Hard-negative mining: the negatives that sentence-transformers finds, images, shared queries, bad rows, reports."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from tests.trainers.contrastive_cases import WORDS, build, save_checkpoint
from tests.trainers.pair_sources import encoded
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_mixture import PairMixture
from trainers.contrastive_rows import open_side
from trainers.contrastive_sources import PairMixtureConfig, PairSource
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.mining import NegativeMiner
from trainers.mining_config import MiningConfig
from trainers.mining_embeddings import EmbeddingStore, load_encoder, model_fingerprint
from trainers.row_images import BadRowError

IMAGE = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
SIDE = {"text": datasets.Value("string"), "image": dict(IMAGE)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("mining") / "start")


@pytest.fixture(scope="module")
def model(model_folder):
    return build(model_folder).eval()


def texts(number, offset=0):
    return [f"{WORDS[index % 12]} {WORDS[index * 5 % 7]} {index + offset}" for index in range(number)]


def write(folder, name, rows, features=None, **settings):
    """Write rows to a Parquet file, and return their source."""
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")
    settings = {"query": "query", "positive": "positive", **settings}
    return PairSource("parquet", data_files=str(folder / f"{name}.parquet"), task=name, **settings)


def mine(folder, model, sources, **settings):
    settings = {"shard_size": 4, "batch_size": 4, "query_block_size": 5, "corpus_block_size": 7, **settings}
    config = MiningConfig(sources, output_dir=str(folder / "mined"), model_name_or_path="unused", **settings)
    report = NegativeMiner(config, model).mine()
    assert report == json.loads((folder / "mined" / "mining_report.json").read_text())
    return report, [read(folder, entry["file"]) for entry in report["datasets"].values()]


def read(folder, file):
    return datasets.Dataset.from_parquet(str(folder / "mined" / file), cache_dir=str(folder / "cache")).to_list()


def text_of(rows, column):
    return [row[column] and row[column]["text"] for row in rows]


def shared_rows():
    """Return 30 text pairs: queries with several positives, positives of several queries, a row that comes twice."""
    queries, documents = texts(30), texts(30, 100)
    rows = [{"query": query, "positive": document} for query, document in zip(queries, documents)]
    rows[3]["query"] = rows[17]["query"] = rows[0]["query"]
    rows[5]["positive"] = rows[9]["positive"]
    rows[20] = dict(rows[19])
    return rows


@pytest.mark.parametrize(
    "margins",
    [
        {"relative_margin": None},
        {"absolute_margin": 0.02, "relative_margin": None},
        {"relative_margin": 0.02},
        {"absolute_margin": 0.01, "relative_margin": 0.02, "range_min": 2},
    ],
)
def test_texts_get_the_negatives_that_sentence_transformers_finds(tmp_path, model, margins):
    rows, extra = shared_rows(), texts(10, 500)
    corpus = write(tmp_path, "extra", [{"positive": text} for text in extra], query="positive")
    prompts = {"query_instruction": "Find: ", "document_instruction": "A text: "}
    source = write(tmp_path, "texts", rows, **prompts)
    report, (mined,) = mine(tmp_path, model, [source], corpus=[corpus], num_negatives=3, **margins)
    stock = mine_hard_negatives(
        datasets.Dataset.from_list(rows),
        model,
        corpus=extra,
        num_negatives=3,
        # Its candidates are cut before they are judged, unless they are all.
        range_max=40,
        output_format="labeled-list",
        query_prompt="Find: ",
        corpus_prompt="A text: ",
        verbose=False,
        output_scores=True,
        **margins,
    )
    expected = {(row["query"], row["positive"][0]): row["positive"][1:] for row in stock}
    found = {
        (row["query"]["text"], row["positive"]["text"]): [
            row[f"negative_{k}"]["text"] for k in (1, 2, 3) if row[f"negative_{k}"]
        ]
        for row in mined
    }
    # It leaves out rows without negatives.
    assert {pair: negatives for pair, negatives in found.items() if negatives} == expected and len(expected) > 8
    assert len(mined) == 30 and text_of(mined, "query") == [row["query"] for row in rows]
    entry = report["datasets"]["texts"]
    assert entry["different_queries"] == 27 and entry["documents"] == 28 + 10
    assert entry["negatives"] == sum(len(found[row["query"], row["positive"]]) for row in rows)
    assert entry["rows_with_fewer"] == sum(len(found[row["query"], row["positive"]]) < 3 for row in rows)
    assert entry["rows_with_none"] == sum(not found[row["query"], row["positive"]] for row in rows)
    scores = [score for row in stock for score in row["scores"][1:]]
    assert min(scores) - 1e-3 <= entry["mean_negative_score"] <= max(scores) + 1e-3
    # 27 queries, of which one has three positives.
    assert entry["refused"]["own_positive"] == 29
    assert (entry["refused"]["relative_margin"] > 0) == (margins["relative_margin"] is not None)


def mixed_rows(number=12):
    """Return rows whose sides are text, image, and both in turn, and their features."""
    rows = []
    for index, text in enumerate(texts(number)):
        image = {"bytes": encoded(index), "path": None}
        sides = [{"text": text, "image": None}, {"text": None, "image": image}, {"text": text, "image": image}]
        rows.append({"query": sides[index % 3], "positive": sides[(index // 3) % 3]})
    return rows, datasets.Features({"query": SIDE, "positive": SIDE})


def test_text_and_images_of_both_sides_and_the_result_trains(tmp_path, model_folder, model):
    rows, features = mixed_rows()
    rows[7]["positive"] = rows[1]["query"]
    source = write(tmp_path, "mixed", rows, features, document_instruction="A page: ", kind="multimodal")
    report, (mined,) = mine(tmp_path, model, [source], num_negatives=2, relative_margin=None)
    mixture = PairMixture([source])

    def embed(side, prompt):
        opened = open_side(side, source, "here")
        return torch.as_tensor(model.encode(opened if "image" in opened else opened["text"], prompt=prompt))

    sides = [mixture.read(0, index).sides for index in range(12)]
    queries = torch.stack([embed(query, None) for query, _ in sides])
    documents = torch.stack([embed(positive, "A page: ") for _, positive in sides])
    scores = (queries @ documents.T).fill_diagonal_(-2)
    for index in range(12):
        # A query that is a document (row 0's text, ...) is not its own negative.
        for other in range(12):
            if rows[other]["positive"] == rows[index]["query"]:
                scores[index, other] = -2
        best = scores[index].argsort(descending=True)[:2].tolist()
        for number, position in enumerate(best):
            given, kept = rows[position]["positive"], mined[index][f"negative_{number + 1}"]
            assert kept["text"] == given["text"]
            # Encoded bytes, as they were.
            assert kept["image"] == ([given["image"]] if given["image"] else [])
    entry = report["datasets"]["mixed"]
    assert entry["rows_with_fewer"] == 0 and entry["negatives"] == 24 and entry["refused"]["equal_to_query"] == 1
    np.testing.assert_allclose(entry["mean_positive_score"], (queries * documents).sum(1).mean(), atol=1e-5)
    declared = yaml.safe_load((tmp_path / "mined" / "datasets.yaml").read_text())
    train = PairMixture(PairMixtureConfig(**declared).datasets)
    assert train.sources[0].document_instruction == "A page: " and train.sources[0].kind == "multimodal"
    for streaming in (False, True):
        config = ContrastiveConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            report_to="none",
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        train = PairMixture(PairMixtureConfig(**declared).datasets, streaming=streaming)
        trainer = ContrastiveTrainer(build(model_folder), config, train)
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert logged["masked_negatives"] == 0 and np.isfinite(logged["loss"])
        assert any((value != before[name]).any() for name, value in trainer.model.named_parameters())


def test_rows_with_fewer_negatives_keep_none_and_train_masked(tmp_path, model):
    """Three documents, of which two are positives of one query: it gets one negative, the other one two."""
    rows = [{"query": "a", "positive": "x"}, {"query": "a", "positive": "y"}, {"query": "b", "positive": "z"}]
    source = write(tmp_path, "few", rows)
    report, (mined,) = mine(tmp_path, model, [source], num_negatives=4, relative_margin=None)
    assert text_of(mined, "negative_1")[:2] == ["z", "z"] and {mined[2][f"negative_{k}"]["text"] for k in (1, 2)} == {
        *"xy"
    }
    assert [row["negative_2"] for row in mined[:2]] == [None, None] and mined[2]["negative_3"] is None
    entry = report["datasets"]["few"]
    assert (entry["negatives"], entry["rows_with_fewer"], entry["rows_with_none"]) == (4, 3, 0)
    declared = yaml.safe_load((tmp_path / "mined" / "datasets.yaml").read_text())
    pairs = PairMixture(PairMixtureConfig(**declared).datasets)
    assert [pairs.read(0, row).negatives_mask for row in range(3)] == [[True] + [False] * 3] * 2 + [
        [True, True, False, False]
    ]


def test_positives_of_a_query_in_another_data_set_are_not_its_negatives(tmp_path, model):
    first = write(tmp_path, "first", [{"query": "a", "positive": "x"}, {"query": "b", "positive": "y"}])
    second = write(tmp_path, "second", [{"query": "a", "positive": "y"}, {"query": "c", "positive": "z"}])
    report, (mined, _) = mine(tmp_path, model, [first, second], num_negatives=1, relative_margin=None)
    assert text_of(mined, "negative_1") == [None, "x"]
    assert report["datasets"]["first"]["refused"]["own_positive"] == 3


def test_equal_pictures_under_two_paths_are_one_document(tmp_path, model):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, index in (("0.png", 0), ("again.png", 0), ("1.png", 1), ("2.png", 2)):
        (folder / name).write_bytes(encoded(index))
    rows = [{"query": f"q {name}", "positive": name} for name in ("0.png", "again.png", "1.png", "2.png")]
    columns = {"positive": {"image": "positive"}, "image_folder": str(folder)}
    source = write(tmp_path, "paths", rows, **columns)
    report, (mined,) = mine(tmp_path, model, [source], num_negatives=3, relative_margin=None)
    assert report["datasets"]["paths"]["documents"] == 3
    for row in mined:
        contents = [row[name]["image"][0]["bytes"] for name in row if name != "query" and row[name]]
        assert len(contents) == 3 and set(contents) == {encoded(index) for index in range(3)}
    # Another picture under the same name is another document, which is encoded anew.
    (folder / "1.png").write_bytes(encoded(5))
    _, (mined,) = mine(tmp_path, model, [source], num_negatives=3, relative_margin=None)
    assert mined[2]["positive"]["image"][0]["bytes"] == encoded(5)


def test_bad_rows_are_left_out_counted_and_listed(tmp_path, model):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.png").write_bytes(encoded(index)[: 60 if index == 1 else None])
    rows = [{"query": f"q {index}", "positive": f"{index}.png"} for index in range(6)]
    rows[2]["query"] = " "
    columns = {"positive": {"image": "positive"}, "image_folder": str(folder)}
    source = write(tmp_path, "pages", rows, **columns)
    corpus = write(
        tmp_path,
        "extra",
        [{"positive": "1.png"}, {"positive": "2.png"}, {"positive": "../0.png"}],
        query="positive",
        **{**columns, "positive": {"image": "positive"}},
    )
    report, (mined,) = mine(tmp_path, model, [source], corpus=[corpus], num_negatives=4, relative_margin=None)
    entry = report["datasets"]["pages"]
    # 1.png is truncated, 5.png is missing.
    assert entry["rejected_rows"] == {"empty_query": 1, "undecodable_image": 2} and entry["written_rows"] == 3
    assert text_of(mined, "query") == ["q 0", "q 3", "q 4"]
    # 0, 1, 3, 4 of the rows, 2 of the corpus; the truncated one is nobody's negative.
    assert (entry["documents"], entry["documents_unreadable"], entry["refused"]["unreadable"]) == (5, 1, 3)
    assert [sum(row[f"negative_{k}"] is not None for k in range(1, 5)) for row in mined] == [3, 3, 3]
    lines = [json.loads(line) for line in (tmp_path / "mined" / "rejected.jsonl").read_text().splitlines()]
    assert {(line["dataset"], line["row"], line["reason"]) for line in lines} == {
        ("pages", "row 1", "undecodable_image"),
        ("pages", "row 2", "empty_query"),
        ("pages", "row 5", "undecodable_image"),
        ("extra", "row 2", "unsafe_path"),
    }
    with pytest.raises(ValueError, match="Data set 'pages', row 2: its query holds neither text nor image"):
        mine(tmp_path, model, [source], on_bad_row="raise")
    truncated = write(tmp_path, "one", rows[:2], **columns)
    with pytest.raises(ValueError, match="Data set 'one', row 1, positive: image 0 cannot be decoded"):
        mine(tmp_path, model, [truncated], on_bad_row="raise")
    empty = write(tmp_path, "none", rows[2:3], **columns)
    with pytest.raises(ValueError, match="Data set 'none' has no row that can be used"):
        mine(tmp_path, model, [empty])


def test_given_negatives_are_left_out_and_counted(tmp_path, model):
    rows = [{"query": "a", "positive": "x", "wrong": ["1", "2", "3"]}, {"query": "b", "positive": "y", "wrong": []}]
    source = write(tmp_path, "given", rows, negatives="wrong")
    report, (mined,) = mine(tmp_path, model, [source], num_negatives=1, relative_margin=None)
    assert report["datasets"]["given"]["given_negatives_left_out"] == 3 and text_of(mined, "negative_1") == ["y", "x"]


def test_embeddings_are_the_models_and_are_encoded_once(tmp_path, model):
    inputs, asked = texts(10), []

    def read(index):
        asked.append(index)
        if index == 6:
            raise BadRowError("undecodable_image", "number 6")
        return inputs[index]

    def store(instruction="Find: ", side="query", keys=10, fingerprint="m"):
        return EmbeddingStore(tmp_path, model, fingerprint, side, instruction, np.arange(keys), read, 2, 4)

    first = store()
    assert first.encode() == 10 and asked == list(range(10))
    expected = torch.as_tensor(model.encode(inputs, prompt="Find: "))
    expected[6] = 0
    torch.testing.assert_close(first.read(0, 10), expected, atol=1e-5, rtol=1e-5)
    order = np.array([9, 0, 5, 5, 3])
    torch.testing.assert_close(first.take(order), expected[order], atol=1e-5, rtol=1e-5)
    again = store()
    assert again.encode() == 0 and again.rejected == {6: ("undecodable_image", "number 6")}
    # Whatever decides the embeddings makes other ones.
    for other in (store(None), store(side="document"), store(keys=9), store(fingerprint="n")):
        assert other.folder != first.folder and other.encode() > 0
    (first.folder / "000002.safetensors").write_bytes((first.folder / "000000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="000002.safetensors holds 4 embeddings instead of 2: remove the folder"):
        store().encode()


def test_the_fingerprint_tells_models_apart(tmp_path, model_folder):
    fingerprints = {model_fingerprint(build(model_folder)) for _ in range(2)}
    assert len(fingerprints) == 1
    other = build(model_folder)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    fingerprints.add(model_fingerprint(other))
    fingerprints.add(model_fingerprint(build(model_folder, max_length=7)))
    other = build(model_folder)
    other.prompts["query"] = "Find: "
    fingerprints.add(model_fingerprint(other))
    fingerprints.add(model_fingerprint(build(model_folder, model_kwargs={"dtype": torch.bfloat16})))
    assert len(fingerprints) == 5


def test_checkpoints_of_both_stages_load_and_bfloat16_is_kept(tmp_path, model_folder, model):
    model.save_pretrained(str(tmp_path / "stage2"), create_model_card=False)
    for path in (model_folder, str(tmp_path / "stage2")):
        config = MiningConfig(
            [], output_dir="out", model_name_or_path=path, dtype="bfloat16", max_length=5, device="cpu"
        )
        loaded = load_encoder(config)
        assert isinstance(loaded, SentenceTransformer) and not loaded.training
        a, b = loaded.encode(["sea sky page", "sea sky page " * 9]), loaded.encode(["sea sky page " * 5])
        assert np.abs(a[1] - b[0]).max() < 0.02 and next(loaded.parameters()).dtype == torch.bfloat16
        store = EmbeddingStore(tmp_path / "e", loaded, path, "query", None, np.arange(3), WORDS.__getitem__)
        store.encode()
        vectors = store.read(0, 3)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
        reference = torch.as_tensor(model.encode(WORDS[:3]))
        assert torch.cosine_similarity(vectors, reference).min() > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": ""}, "output_dir must be given"),
        ({"model_name_or_path": ""}, "model_name_or_path must be given"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"range_min": -1}, "range_min must be at least 0, got -1"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"relative_margin": -0.1}, "relative_margin must be between 0 and 2, or null, got -0.1"),
        ({"absolute_margin": 3.0}, "absolute_margin must be between 0 and 2, or null, got 3.0"),
        ({"on_bad_row": "keep"}, "on_bad_row must be 'skip' or 'raise', got 'keep'"),
        (
            {"corpus": [{"path": "p", "positive": "x", "document_instruction": "i"}]},
            r"remove \['document_instruction'\]",
        ),
        ({"corpus": [{"path": "p"}]}, "name the column of its query"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MiningConfig(**{"datasets": [], "output_dir": "out", "model_name_or_path": "m", **settings})


def test_unusable_data_sets_are_refused(tmp_path, model):
    def miner(sources):
        return NegativeMiner(MiningConfig(sources, output_dir=str(tmp_path), model_name_or_path="m"), model)

    with pytest.raises(ValueError, match="No data set is given"):
        miner([])
    rows = [{"query": "a", "positive": "x"}]
    with pytest.raises(ValueError, match="Two data sets would be written to 'a_b.parquet'"):
        sources = [write(tmp_path, "rows", rows), write(tmp_path, "rows", rows)]
        sources[0].task, sources[1].task = "a/b", "a b"
        miner(sources)
