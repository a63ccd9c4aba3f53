"""The model card of a published folder."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

POOLING_WORDS = {"mean": "mean of the last hidden states over all tokens", "last": "last token's hidden state"}
TAGS = {
    "embedding": ["sentence-transformers", "feature-extraction"],
    "multi_vector": ["sentence-transformers", "multi-vector", "late-interaction"],
}


def write_card(
    out_dir, layout, model, processor, versions, *, model_id=None, projection_dim=None, prompts=None, **card_data
):
    """Write `README.md` from the template of a layout.

    Args:
        out_dir (`pathlib.Path`): the published folder.
        layout (`str`): `"embedding"` or `"multi_vector"`.
        model ([`modeling_moca.MoCaModel`]), processor ([`modeling_moca.MoCaProcessor`]): what the card describes.
        versions (`dict[str, str]`): required versions by package.
        model_id (`str`, *optional*): name that the snippets load; `out_dir` when None.
        projection_dim (`int`, *optional*): width of projected token vectors.
        prompts (`dict[str, str]`, *optional*): by name.
        card_data: `base_model`, `license`, `language`, `datasets` of the card's head.
    """
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=[*TAGS[layout], "multimodal", "visual-document-retrieval", "moca"],
        **card_data,
    )
    base_model = card_data.get("base_model")
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / f"{layout}_card.md"),
        model_name=Path(model_id or out_dir).name,
        model_id=model_id or str(out_dir),
        dim=projection_dim or model.config.hidden_size,
        projected=projection_dim is not None,
        attention="bidirectional" if model.config.bidirectional else "causal",
        base=f" (base: {base_model})" if base_model else "",
        pooling=POOLING_WORDS[model.config.pooling],
        max_length=processor.max_length,
        images=describe_images(processor),
        transformers=versions["transformers"],
        sentence_transformers=versions["sentence-transformers"],
        prompts=prompts,
    )
    card.save(out_dir / "README.md")


def describe_images(processor):
    """Return one sentence on how images become tokens.

    Args:
        processor ([`modeling_moca.MoCaProcessor`]): gives patch size, merge size and limits.
    """
    side, size = processor.patch_size * processor.merge_size, processor.image_processor.size
    token = f"One image token stands for {side} x {side} pixels"
    if "shortest_edge" in size:
        fewest, most = max(size["shortest_edge"] // side**2, 1), size["longest_edge"] // side**2
        return f"{token}, and images are resized to {fewest} to {most} tokens."
    tile = processor.image_processor.max_image_size["longest_edge"]
    return (
        f"{token}; the longer side of an image is resized to {size['longest_edge']} pixels, and the image is cut into "
        f"tiles of {tile} x {tile}."
    )
