"""Search pages with a MoCa model: drop images or a PDF, type a query, see the pages ranked.

    python app.py --model org/moca-3b --pretraining-model org/moca-3b-cpt

Without arguments the models are those of MOCA_MODEL and MOCA_PRETRAINING_MODEL (Hub ids or folders), and without these
the first and second of `models` at the head of README.md. Without a pre-training model the masked view is left out.
"""

import argparse
import logging
import os
from pathlib import Path

# Before gradio is imported: it reads them then. Nothing is sent anywhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import torch
from huggingface_hub import metadata_load
from pages import MAX_FILE_MB, MAX_PAGES, open_pages
from reconstruction import can_reconstruct, reconstruct
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForPreTraining, AutoProcessor

logger = logging.getLogger("space")
# System fonts: the page loads nothing from elsewhere.
THEME = gr.themes.Default(font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#ranking .caption-label {max-width: 95%}
.masked-view img {width: 100%; object-fit: contain}
"""
# Uploads and pictures are looked through every so often and deleted when so old, both in seconds.
DELETE_CACHE = (1800, 3600)
BATCH_SIZE = int(os.environ.get("MOCA_BATCH_SIZE", 4))


class Search:
    """The models behind the page.

    Args:
        model (`str`): Hub id or folder of an embedding model.
        pretraining_model (`str`, *optional*): Hub id or folder of a pre-training model.
    """

    def __init__(self, model, pretraining_model=None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = Path(model).name if Path(model).is_dir() else model
        self.embedder = SentenceTransformer(model, trust_remote_code=True, device=device)
        self.restorer = None
        if pretraining_model:
            restorer = AutoModelForPreTraining.from_pretrained(pretraining_model, trust_remote_code=True)
            if can_reconstruct(restorer):
                self.restorer = restorer.to(device).eval()
                self.processor = AutoProcessor.from_pretrained(pretraining_model, trust_remote_code=True)
            else:
                logger.warning("%s cannot restore rows of patches: no masked view.", pretraining_model)

    def rank(self, files, query, picture, state):
        """Rank the pages of the dropped files; `state` keeps their embeddings for the next query.

        Args:
            files (`list[str]`), query (`str`), picture (`PIL.Image.Image`, *optional*): what the person gave.
            state (`dict`): what the last call returned.

        Returns:
            `tuple`: images with captions, best first, and the new state.
        """
        query = (query or "").strip()
        if not files:
            raise gr.Error("Drop images or a PDF first.")
        if not query and picture is None:
            raise gr.Error("Type a query, or give an image to search with.")
        try:
            if state.get("files") != files:
                state = {"files": files, "pages": open_pages(files)}
                images = [image for _, image in state["pages"]]
                state["embeddings"] = self.embedder.encode_document(images, batch_size=BATCH_SIZE)
            given = query if picture is None else {"text": query, "image": picture} if query else picture
            scores = self.embedder.similarity(self.embedder.encode_query([given]), state["embeddings"])[0]
        except ValueError as error:
            # Said to the person: what was refused, and why.
            raise gr.Error(str(error)) from error
        state["order"] = scores.argsort(descending=True, stable=True).tolist()
        labels = [f"{rank}. {state['pages'][page][0]} · {scores[page]:.3f}" for rank, page in _ranked(state)]
        return [(state["pages"][page][1], label) for (_, page), label in zip(_ranked(state), labels)], state

    def restore(self, state, place, ratio, seed):
        """Return the masked view of the page at a place of the ranking, and a sentence about it."""
        if not state.get("order"):
            raise gr.Error("Search first, then choose a page.")
        name, image = state["pages"][state["order"][place]]
        try:
            view = reconstruct(self.restorer, self.processor, image, ratio, int(seed))
        except ValueError as error:
            raise gr.Error(str(error)) from error
        words = (
            f"**{name}**: {view['num_hidden']} of {view['num_tokens']} image tokens hidden, restored with a mean "
            f"squared error of {view['mae_loss']:.3f} (pixels of unit variance)."
        )
        return view["masked"], view["reconstructed"], view["original"], words


def _ranked(state):
    return enumerate(state["order"], start=1)


def build(search):
    """Return the page of a [`Search`] as `gradio.Blocks`."""
    with gr.Blocks(title="Search pages with MoCa", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(
            f"# Search pages with MoCa\nDrop images or PDF files and type what you look for. Pages are embedded as "
            f"images by `{search.name}`: no text is extracted. At most {MAX_PAGES} pages, {MAX_FILE_MB} MB a file; "
            "files are deleted within two hours."
        )
        state, place = gr.State({}), gr.State(0)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                files = gr.File(
                    label="Images or PDF files",
                    file_count="multiple",
                    file_types=["image", ".pdf"],
                    elem_id="files",
                    height=180,
                )
                query = gr.Textbox(label="Query", placeholder="a page about tides", elem_id="query")
                with gr.Accordion("Search with an image", open=False):
                    picture = gr.Image(label="Query image", type="pil", height=180, elem_id="picture")
                button = gr.Button("Search", variant="primary", elem_id="search")
            with gr.Column(scale=5):
                gr.Markdown("**Pages, best first**")
                ranking = gr.Gallery(
                    label="Pages, best first",
                    show_label=False,
                    columns=3,
                    height=460,
                    object_fit="contain",
                    format="png",
                    elem_id="ranking",
                    buttons=["fullscreen"],
                    allow_preview=False,
                )
        given, found = [files, query, picture, state], [ranking, state]
        events = [event(search.rank, given, found) for event in (button.click, query.submit)]
        if search.restorer is not None:
            _add_masked_view(search, events, ranking, state, place)
    return page


def _add_masked_view(search, events, ranking, state, place):
    gr.Markdown("## Masked and reconstructed\nChoose a page above; the first is shown after a search.")
    with gr.Row(equal_height=True):
        ratio = gr.Slider(0.1, 0.9, value=0.5, step=0.1, label="Hidden share of the page", elem_id="ratio")
        seed = gr.Number(value=0, precision=0, label="Seed of the mask", elem_id="seed")
    with gr.Row():
        views = []
        for label in ("Masked", "Reconstructed", "Original"):
            with gr.Column(min_width=200):
                # Above the picture: gradio's own label would cover its corner.
                gr.Markdown(f"**{label}**")
                picture = gr.Image(
                    label=label,
                    show_label=False,
                    format="png",
                    height=240,
                    elem_id=label.lower(),
                    elem_classes="masked-view",
                    buttons=[],
                )
                views.append(picture)
    words = gr.Markdown(elem_id="words")
    given, found = [state, place, ratio, seed], [*views, words]

    def choose(event: gr.SelectData):
        return event.index

    for event in events:
        event.success(lambda: 0, None, place).success(search.restore, given, found)
    ranking.select(choose, None, place).success(search.restore, given, found)
    for setting in (ratio.release, seed.change):
        setting(search.restore, given, found)


def parse_arguments(arguments=None):
    """Return the models and the address to serve at."""
    readme = Path(__file__).with_name("README.md")
    defaults = (metadata_load(readme) or {}).get("models") or [] if readme.is_file() else []
    defaults += [None, None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MOCA_MODEL") or defaults[0])
    parser.add_argument("--pretraining-model", default=os.environ.get("MOCA_PRETRAINING_MODEL") or defaults[1])
    parser.add_argument("--host", help="address to serve at; gradio's own when not set")
    parser.add_argument("--port", type=int, help="port to serve at; gradio's own when not set")
    args = parser.parse_args(arguments)
    if not args.model:
        parser.error("no model: give --model, set MOCA_MODEL, or name it under `models` in README.md")
    return args


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    args = parse_arguments()
    page = build(Search(args.model, args.pretraining_model))
    page.launch(
        server_name=args.host,
        server_port=args.port,
        theme=THEME,
        css=CSS,
        max_file_size=MAX_FILE_MB * 2**20,
        ssr_mode=False,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
