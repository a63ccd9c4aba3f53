"""Embeddings in files that a killed run goes on from: nothing that is finished is encoded again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model

from .contrastive_model import build_sentence_transformer
from .row_images import BadRowError

logger = logging.getLogger(__name__)

_SIDES = ("query", "document")


def load_encoder(config: Any) -> SentenceTransformer:
    """Load the model to mine with: a sentence-transformers folder as it is, a MoCa checkpoint with its own pooling.

    Args:
        config: a [`trainers.mining_config.MiningConfig`].

    Raises:
        ValueError: the folder holds neither.
    """
    options = {"revision": config.model_revision} if config.model_revision else {}
    model_kwargs = {"dtype": config.dtype}
    if config.attn_implementation:
        model_kwargs["attn_implementation"] = config.attn_implementation
    path = config.model_name_or_path
    if not is_sentence_transformer_model(path, revision=config.model_revision):
        return build_sentence_transformer(
            path, max_length=config.max_length, model_kwargs=model_kwargs, device=config.device, **options
        ).eval()
    model = SentenceTransformer(
        path,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        model_kwargs=model_kwargs,
        **options,
    )
    if config.max_length is not None:
        model.max_seq_length = config.max_length
        if hasattr(processor_of(model), "max_length"):
            processor_of(model).max_length = config.max_length
    return model.eval()


def processor_of(model: Any) -> Any:
    """Return the `MoCaProcessor` of a model, which tells whether images fit; None of another model.

    Args:
        model: a `SentenceTransformer`.
    """
    processor = getattr(model[0], "processor", None)
    return processor if hasattr(processor, "row_ids") else None


def model_fingerprint(model: SentenceTransformer) -> str:
    """Return a hash of what decides a model's embeddings: all its weights, modules, prompts and its processor.

    Args:
        model: the model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    # Names of files and objects differ between two loads of one folder.
    digest.update(f"{model} {model.prompts} {model.default_prompt_name}".encode())
    for module in model:
        processor = getattr(module, "processor", None)
        if hasattr(processor, "to_json_string"):
            digest.update(processor.to_json_string().encode())
    return digest.hexdigest()


class EmbeddingStore:
    """Unit vectors of inputs, in files of `shard_size` below a folder that is named by all that decides them.

    A file appears when it is whole (it is renamed into its place), so that a run which was killed goes on behind the
    last one, with the same batches. Of an input that cannot be opened the vector is zero, and its reason is kept.

    Args:
        folder: where stores are.
        model: a `SentenceTransformer`.
        fingerprint: of the model, see `model_fingerprint`.
        side: `"query"` or `"document"`: which of the model's prompts serves where there is no instruction.
        instruction: stands before the texts; the model's own prompt for the side when None.
        keys: hashes of the inputs' contents, int64 of shape [N].
        read: returns input i as the model takes it.
        batch_size: inputs that are encoded at a time.
        shard_size: inputs a file.

    Example:
        >>> texts = ["a harbour at night", "a gull"]
        >>> store = EmbeddingStore(
        ...     "embeddings", model, model_fingerprint(model), "document", None, np.arange(2), texts.__getitem__
        ... )
        >>> store.encode()
        >>> store.read(0, 2).shape
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: Any,
        fingerprint: str,
        side: str,
        instruction: str | None,
        keys: np.ndarray,
        read: Callable[[int], Any],
        batch_size: int = 32,
        shard_size: int = 256,
    ) -> None:
        assert side in _SIDES
        settings = json.dumps([fingerprint, side, instruction, len(keys), batch_size, shard_size])
        digest = hashlib.blake2b(settings.encode() + np.ascontiguousarray(keys).tobytes(), digest_size=12)
        self.folder = Path(folder) / f"{side}-{digest.hexdigest()}"
        self.length, self.num_shards = len(keys), -(-len(keys) // shard_size)
        self._model, self._read = model, read
        self._encode = model.encode_query if side == "query" else model.encode_document
        self._instruction, self._batch_size, self._shard_size = instruction, batch_size, shard_size
        self.rejected: dict[int, tuple[str, str]] = {}

    def encode(self) -> int:
        """Encode what is not there yet, and return the number of inputs that were encoded.

        Raises:
            ValueError: a file is not what this run would have written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        num_encoded = 0
        for shard in range(self.num_shards):
            path, num_rows = self._path(shard), self._num_rows(shard)
            if not path.is_file():
                self._write(shard)
                num_encoded += num_rows
                if shard % max(self.num_shards // 20, 1) == 0:
                    logger.info("%s: %d of %d files of embeddings", self.folder.name, shard + 1, self.num_shards)
            with safe_open(path, "pt") as file:
                given = file.get_slice("embeddings").get_shape()[0]
                if given != num_rows:
                    raise ValueError(f"{path} holds {given} embeddings instead of {num_rows}: remove the folder.")
                for index, reason, message in json.loads(file.metadata()["rejected"]):
                    self.rejected[index] = (reason, message)
        return num_encoded

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return unit vectors of inputs, float32 of shape [stop - start, d].

        Args:
            start, stop: which inputs, at least one.
        """
        return self.take(np.arange(start, stop))

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return unit vectors of inputs in any order, float32 of shape [len(indices), d].

        Args:
            indices: which inputs, at least one.
        """
        shards = indices // self._shard_size
        result = None
        for shard in np.unique(shards):
            (places,) = np.nonzero(shards == shard)
            with safe_open(self._path(shard), "pt") as file:
                rows = file.get_tensor("embeddings")[torch.from_numpy(indices[places] % self._shard_size)].float()
            if result is None:
                result = rows.new_empty(len(indices), rows.shape[1])
            # Normalised once more: stored bfloat16 vectors are up to a hundredth longer or shorter than 1.
            result[torch.from_numpy(places)] = torch.nn.functional.normalize(rows, dim=-1)
        return result

    def _path(self, shard):
        return self.folder / f"{shard:06d}.safetensors"

    def _num_rows(self, shard):
        return min(self._shard_size, self.length - shard * self._shard_size)

    def _write(self, shard):
        first = shard * self._shard_size
        inputs, rejected = [], []
        for index in range(first, first + self._num_rows(shard)):
            try:
                inputs.append(self._read(index))
            except BadRowError as error:
                rejected.append((index, error.reason, str(error)))
        dimension = self._model.get_embedding_dimension()
        embeddings = torch.zeros(self._num_rows(shard), dimension)
        if inputs:
            encoded = self._encode(
                inputs,
                prompt=self._instruction,
                batch_size=self._batch_size,
                show_progress_bar=False,
                convert_to_numpy=False,
                convert_to_tensor=True,
            ).cpu()  # [n, d]
            bad = {index - first for index, *_ in rejected}
            good = [row for row in range(self._num_rows(shard)) if row not in bad]
            embeddings = embeddings.to(encoded.dtype)
            embeddings[good] = encoded
        unfinished = self._path(shard).with_suffix(".unfinished")
        save_file({"embeddings": embeddings}, unfinished, metadata={"rejected": json.dumps(rejected)})
        # On the disk before it has its name: a file that is there is whole, also after a crash of the machine.
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, self._path(shard))


__all__ = ["EmbeddingStore", "load_encoder", "model_fingerprint", "processor_of"]
