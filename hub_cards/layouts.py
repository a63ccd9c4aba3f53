"""The two module lists that sentence-transformers loads: one vector an input, or one vector a token."""

import json
from pathlib import Path

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.models import Normalize, Pooling, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

POOLING_MODES = {"mean": "mean", "last": "lasttoken"}


def embedding_model(folder, config, prompts=None):
    """Return a saved MoCa model as a `SentenceTransformer`: Transformer, Pooling, Normalize.

    Args:
        folder (`pathlib.Path`): model and processor.
        config ([`modeling_moca.MoCaConfig`]): gives the pooling.
        prompts (`dict[str, str]`, *optional*): by name.
    """
    pooling = Pooling(config.hidden_size, pooling_mode=POOLING_MODES[config.pooling])
    modules = [_transformer(folder), pooling, Normalize()]
    return SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name="cosine", device="cpu")


def multi_vector_model(folder, config, projection=None, prompts=None):
    """Return a saved MoCa model as a `MultiVectorEncoder`: Transformer, projection if any, mask, Normalize.

    Every token that is not padding keeps its vector, image tokens included, and a query is scored against a document
    by MaxSim: each query token takes its best document token, and these cosines are summed (ColBERT, arXiv 2004.12832).

    Args:
        folder (`pathlib.Path`): model and processor.
        config ([`modeling_moca.MoCaConfig`]): gives the width of the token states.
        projection (`Dense`, *optional*): linear map of the token states.
        prompts (`dict[str, str]`, *optional*): by name; `query` and `document` are what `encode_query` and
            `encode_document` put before an input's text.

    Raises:
        ValueError: the projection does not take the model's token states.
    """
    if projection is not None and projection.in_features != config.hidden_size:
        raise ValueError(
            f"The projection takes {projection.in_features} values a token, the model gives {config.hidden_size}."
        )
    projections = [] if projection is None else [projection]
    modules = [_transformer(folder), *projections, MultiVectorMask(), Normalize("token_embeddings")]
    return MultiVectorEncoder(modules=modules, prompts=prompts, similarity_fn_name="maxsim", device="cpu")


def new_projection(hidden_size, dim, seed=0):
    """Return an untrained projection with orthonormal rows, the same for the same seed.

    Until it is trained it is a random projection: cosines survive it roughly, the better the larger `dim` is.

    Args:
        hidden_size (`int`): width of the token states.
        dim (`int`): width of the token vectors, at most `hidden_size`.
        seed (`int`, defaults to 0): seed of the weights.

    Raises:
        ValueError: `dim` is not between 1 and `hidden_size`.
    """
    if not 1 <= dim <= hidden_size:
        raise ValueError(f"The projection's width must lie between 1 and hidden_size={hidden_size}, got {dim}.")
    weight = torch.empty(dim, hidden_size)  # [dim, d]
    torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
    return Dense(
        hidden_size,
        dim,
        bias=False,
        activation_function=torch.nn.Identity(),
        init_weight=weight,
        module_input_name="token_embeddings",
    )


def trained_projection(model_dir):
    """Return the projection that training a `MultiVectorEncoder` left in a folder, or None.

    Args:
        model_dir (`pathlib.Path`): folder that may hold a `modules.json`.

    Raises:
        ValueError: the folder holds several projections.
    """
    modules_file = Path(model_dir) / "modules.json"
    if not modules_file.is_file():
        return None
    modules = json.loads(modules_file.read_text(encoding="utf-8"))
    folders = [module["path"] for module in modules if module["type"].rsplit(".", 1)[-1] == "Dense"]
    if len(folders) > 1:
        raise ValueError(f"{model_dir} holds {len(folders)} projections ({folders}); at most one is supported.")
    return Dense.load(str(model_dir), subfolder=folders[0]) if folders else None


def _transformer(folder):
    # The backbone's image positions need padded rows.
    return Transformer(str(folder), unpad_inputs=False)
