"""Checkpoints as they lie on the Hub: old key layouts, flat configurations, shards, and the published MoCa models."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from tests.families import family_backbone, family_image_processor, family_processor, family_tokenizer
from tests.forked import run
from tests.modeling_moca.test_families import batch_of
from tests.tiny import tiny_backbone

HUB_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 2,
    "vision_end_token_id": 5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "sliding_window": 128,
    "max_window_layers": 4,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
}
TEXT_KEYS = (
    "attention_dropout",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)


def write_hub_layout(folder, stock, rope_type="mrope", num_shards=1, architecture=None, without=(), extra=None):
    """Write a Qwen2-VL or Qwen2.5-VL model the way the Hub has them: `model.*`, `visual.*`, one flat configuration."""
    text, vision = stock.config.text_config, stock.config.vision_config
    config = {
        **HUB_CONFIG,
        **{key: getattr(text, key) for key in TEXT_KEYS},
        "architectures": [architecture or type(stock).__name__],
        "model_type": stock.config.model_type,
        "rope_scaling": {"type": rope_type, "mrope_section": text.rope_parameters["mrope_section"]},
        "tie_word_embeddings": stock.config.tie_word_embeddings,
        "vision_config": {
            **{key: value for key, value in vision.to_dict().items() if key not in ("in_channels", "dtype")},
            "in_chans": vision.in_channels,
            "spatial_patch_size": vision.patch_size,
            "model_type": stock.config.model_type,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in stock.state_dict().items():
        if name == "lm_head.weight" and stock.config.tie_word_embeddings:
            continue
        renamed = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if not renamed.startswith(tuple(without)):
            tensors[renamed] = tensor.clone()
    write_shards(folder, {**tensors, **(extra or {})}, num_shards)


def write_shards(folder, tensors, num_shards=1):
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[shard::num_shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def states(model, family):
    with torch.no_grad():
        return model(**batch_of(family_processor(family))).last_hidden_state


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("rope_type", ["mrope", "default"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_old_layout_gives_the_same_model(family, rope_type, tied, num_shards, tmp_path):
    expected = MoCaForPreTraining.from_backbone(family_backbone(family, tied=tied))
    write_hub_layout(tmp_path, family_backbone(family, tied=tied), rope_type, num_shards)
    model = MoCaForPreTraining.from_backbone(tmp_path)
    ours = model.state_dict()
    for name, tensor in expected.state_dict().items():
        if not name.startswith("mae_head.proj"):  # new and random
            assert torch.equal(ours[name], tensor), name
    assert (model.mlm_head.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(states(model.moca, family), states(expected.moca, family), atol=1e-6, rtol=0)
    embedding_model = MoCaModel.from_backbone(tmp_path)
    torch.testing.assert_close(states(embedding_model, family), states(expected.moca, family), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_published_pretraining_checkpoint_brings_its_heads(num_shards, tmp_path):
    stock = family_backbone("qwen2_5_vl", tied=False)
    layer = stock.model.language_model.layers[0].state_dict()
    head = {f"mae_decoder.{name}": tensor + 1 for name, tensor in layer.items()}
    head |= {"mae_proj.weight": torch.randn(4704, 32), "mae_proj.bias": torch.randn(4704)}
    write_hub_layout(tmp_path, stock, "default", num_shards, architecture="Qwen2_5ForMLMMAE", extra=head)
    ours = MoCaForPreTraining.from_backbone(tmp_path).mae_head.state_dict()
    for name, tensor in head.items():
        own_name = name.replace("mae_decoder.", "decoder.").replace("mae_proj.", "proj.")
        assert torch.equal(ours.pop(own_name), tensor), name
    assert not ours
    assert not any("mae" in name for name in MoCaModel.from_backbone(tmp_path).state_dict())


def test_a_name_on_the_hub(tmp_path):
    """By name, out of a cache as huggingface-hub fills it: shards, a published MAE head, another one's processor."""

    def cached(name):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return repository / "snapshots" / ("0" * 40)

    stock = family_backbone("qwen2_5_vl", tied=False)
    layer = stock.model.language_model.layers[0].state_dict()
    head = {f"mae_decoder.{name}": tensor + 1 for name, tensor in layer.items()}
    head |= {"mae_proj.weight": torch.randn(4704, 32), "mae_proj.bias": torch.randn(4704)}
    write_hub_layout(cached("org/moca"), stock, num_shards=3, architecture="Qwen2_5ForMLMMAE", extra=head)
    qwen = cached("org/qwen")
    stock.config.save_pretrained(qwen)
    family_tokenizer("qwen2_5_vl").save_pretrained(qwen)
    family_image_processor("qwen2_5_vl").save_pretrained(qwen)
    model = MoCaForPreTraining.from_backbone("org/moca", cache_dir=tmp_path)
    assert torch.equal(model.mae_head.proj.weight, head["mae_proj.weight"])
    assert torch.equal(model.moca.language_model.layers[0].mlp.up_proj.weight, layer["mlp.up_proj.weight"])
    processor = MoCaProcessor.from_backbone("org/moca", processor_name="org/qwen", cache_dir=tmp_path)
    assert processor.image_token_id == model.config.image_token_id
    embedding_model = MoCaModel.from_backbone("org/moca", cache_dir=tmp_path, revision="main")
    torch.testing.assert_close(states(embedding_model, "qwen2_5_vl"), states(model.moca, "qwen2_5_vl"))


@pytest.mark.parametrize("without", [(), ("lm_head.",)])
def test_published_embedding_checkpoint(without, tmp_path):
    stock = family_backbone("qwen2_5_vl", tied=False)
    write_hub_layout(tmp_path, stock, "default", architecture="Qwen2_5ForEmbedding", without=without)
    expected = states(MoCaModel.from_backbone(stock), "qwen2_5_vl")
    torch.testing.assert_close(states(MoCaModel.from_backbone(tmp_path), "qwen2_5_vl"), expected, atol=1e-6, rtol=0)
    if without:
        with pytest.raises(ValueError, match=r"1 missing: \['lm_head.weight'\]"):
            MoCaForPreTraining.from_backbone(tmp_path)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def test_every_misfit_of_a_sharded_checkpoint_is_listed_at_once(family, tmp_path):
    stock = family_backbone(family)
    stock.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    dropped = [name for name in tensors if "layers.1" in name and name.endswith("up_proj.weight")]
    cut = next(name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight"))
    for name in dropped:
        del tensors[name]
    tensors["surprise.weight"] = torch.zeros(2)
    tensors[cut] = torch.zeros(3, 3)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, tensors, 2)
    with pytest.raises(ValueError) as caught:
        MoCaModel.from_backbone(tmp_path)
    message = str(caught.value)
    for listed in (f"{len(dropped)} missing", "1 unexpected: ['surprise.weight']", "1 of another shape", cut, *dropped):
        assert listed in message, listed


MEASURE = """
import sys, threading, time
import torch
from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor

warm, folder, kind, dtype = sys.argv[1:]
model_class = {"MoCaModel": MoCaModel, "MoCaForPreTraining": MoCaForPreTraining}[kind]
model_class.from_backbone(warm).save_pretrained(warm + "/warm")  # imports, buffers and caches of first use

def memory():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}

def watch():
    while not done:
        for name, value in memory().items():
            peak[name] = max(peak[name], value)
        time.sleep(0.001)

before = memory()
peak, done = dict(before), False
thread = threading.Thread(target=watch)
thread.start()
model = model_class.from_backbone(folder, mask_token_id=6, dtype=dtype)
model.save_pretrained(folder + "/saved")
done = True
thread.join()
size = sum(parameter.nbytes for parameter in set(model.parameters()))
print(size, *((peak[name] - before[name]) / size for name in ("VmRSS", "RssAnon")))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The program that measures, a checkpoint to get ready with, and one of several files."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "measure.py").write_text(MEASURE)
    tiny_backbone().save_pretrained(folder / "tiny")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 8000}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [32, 32, 32]}
    stock = tiny_backbone(rope_parameters=rope, vision_overrides={"out_hidden_size": 768}, **sizes).bfloat16()
    stock.save_pretrained(folder / "stock", max_shard_size="40MB")
    assert len(list((folder / "stock").glob("*.safetensors"))) > 4
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which Linux alone has")
@pytest.mark.parametrize("kind", ["MoCaModel", "MoCaForPreTraining"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_peak_memory_stays_within_1_2_times_the_model(kind, dtype, measured):
    done = run(measured / "measure.py", measured / "tiny", measured / "stock", kind, dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    # The last line: packages that are imported on the way may print lines of their own.
    size, resident, anonymous = map(float, done.stdout.splitlines()[-1].split())
    assert size > 1.5e8
    # Tensors that keep their type stay in the mapped file until they are used. Converted ones are copies, beside pages
    # of the file that the system takes back when it needs them: those are counted in `resident` only.
    assert (resident if dtype == "auto" else anonymous) < 1.2, done.stdout
