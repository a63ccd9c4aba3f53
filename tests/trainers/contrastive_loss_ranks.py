"""Loss and gradients of one global batch, on one process or on ranks that share gradients or weights.

Started by test_contrastive_loss_ranks.py: `python -m torch.distributed.run ... contrastive_loss_ranks.py FOLDER`, where
FOLDER holds a model; `compute("whole", "plain", FOLDER)` is one process, for comparison.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.trainers.contrastive_cases import build, picture
from trainers.contrastive_data import ContrastiveDataCollator
from trainers.contrastive_loss import InfoNCELoss
from trainers.contrastive_minibatches import Column

SETTINGS = {
    "plain": {},
    # A few rows a mini-batch: the rank with images has more of them.
    "cached": {"mini_batch_tokens": 60},
}
WRAPPERS = ("ddp", "fsdp")
COLUMNS = ("query", "positive", "negative_1", "negative_2")


def global_batch():
    """Return eight rows, of which only the first four have images, and duplicates within and across the halves."""
    rows = []
    for index in range(8):
        positive = {"image": picture(index), "text": "page"} if index < 4 else {"text": f"the page {index} " * index}
        negative = {"image": [picture(index), picture(index + 1)]} if index in (1, 2) else f"no page {index}"
        # Differing numbers of hard negatives.
        rows.append({"query": f"find page {index}", "positive": positive, "negative_1": negative})
        rows[-1]["negative_2"] = None if index % 3 == 0 else f"another page {index}"
    rows[6]["positive"] = rows[5]["positive"]
    rows[7]["positive"] = rows[1]["positive"] = {"text": "the same page"}
    rows[2]["negative_2"] = "the same page"
    return rows


def content_hash(value):
    """Return a number that is equal for equal content."""
    value = {"text": value} if isinstance(value, str) else value or {}
    images = value.get("image", [])
    images = images if isinstance(images, list) else [images]
    # hash() of a text differs between processes.
    content = value.get("text", "").encode() + b"".join(image.tobytes() for image in images)
    return int.from_bytes(content, "little") % (2**61 - 1)


def compute(wrapper, setting, folder, model=None):
    """Return the loss of the global batch and the gradient of every weight, in float64."""
    model = model or build(folder, model_kwargs={"dtype": torch.float64})
    world_size, rank = 1, 0
    if wrapper != "whole":
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        assert world_size == 2
    rows = global_batch()[rank * 8 // world_size : (rank + 1) * 8 // world_size]
    batch = ContrastiveDataCollator(model.preprocess)(rows)
    features = [
        {key[len(name) + 1 :]: value for key, value in batch.items() if key.startswith(f"{name}_")} for name in COLUMNS
    ]
    has_images = [any("pixel_values" in column for column in features)]
    assert has_images == [rank == 0]
    labels = {
        **batch["label"],
        "positive_hash": torch.tensor([content_hash(row["positive"]) for row in rows]),
        "negative_hash": torch.tensor([[content_hash(row[name]) for name in COLUMNS[2:]] for row in rows]),
    }
    # As the trainer sets it.
    model[0].model.always_use_vision = world_size > 1
    wrapped = wrap(model, wrapper)
    loss = InfoNCELoss(wrapped, symmetric=True, matryoshka_dims=[32, 8], **SETTINGS[setting])
    forwards = []
    handle = model[0].register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    value = loss(features, labels)
    value.backward()
    handle.remove()
    value = value.detach().clone()
    if world_size > 1:
        torch.distributed.all_reduce(value)
        planned, ran = [None, None], [None, None]
        own = [Column(column, "").plan(None, SETTINGS["cached"]["mini_batch_tokens"]) for column in features]
        torch.distributed.all_gather_object(planned, sum(map(len, own)))
        torch.distributed.all_gather_object(ran, len(forwards))
        assert planned[0] != planned[1]
        assert ran[0] == ran[1] == (4 if setting == "plain" else 2 * max(planned)), (planned, ran)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return value / world_size, gradients


def wrap(model, wrapper):
    """Return the model as ranks share it."""
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model[0].model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def main():
    torch.distributed.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for wrapper in WRAPPERS:
        for setting in SETTINGS:
            result = compute(wrapper, setting, folder)
            torch.save(result, folder / f"{wrapper}-{setting}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
