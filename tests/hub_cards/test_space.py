"""The Space: pages of what is dropped, masked views, and the whole page in a real browser."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

pytest.importorskip("pypdfium2")

from hub_cards import export
from modeling_moca import MoCaForPreTraining
from tests.chromium import COMMAND, Chromium
from tests.families import family_backbone, family_processor
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from trainers.masking import hide_patches

SPACE = Path(__file__).resolve().parents[2] / "hub_cards" / "space"


@pytest.fixture(scope="module")
def space():
    """The Space's modules, which import one another by their bare names."""
    sys.path.insert(0, str(SPACE))
    import pages
    import reconstruction

    yield {"pages": pages, "reconstruction": reconstruction}
    sys.path.remove(str(SPACE))
    for name in ("pages", "reconstruction", "app"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    # Untrained, the head would paint every hidden patch the same.
    torch.nn.init.normal_(model.mae_head.proj.weight, std=0.2)
    model.save_pretrained(folder / "pretraining")
    tiny_processor(max_length=128).save_pretrained(folder / "pretraining")
    export(folder / "pretraining", folder / "embedding", prompts={"query": "Find: ", "document": "Page: "})
    return folder


def picture(seed, width=84, height=56):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(256, (4, 6, 3), generator=generator).byte()
    return Image.fromarray(small.numpy()).resize((width, height))


def save_pdf(path, count, first_seed):
    first, *rest = [picture(first_seed + index) for index in range(count)]
    first.save(path, save_all=True, append_images=rest)
    return path


def test_masked_view_is_the_model_s_own_prediction(space, models):
    model, processor = MoCaForPreTraining.from_pretrained(models / "pretraining"), tiny_processor(max_length=128)
    image = picture(0, 112, 84)  # 4 x 3 image tokens
    seen = []
    handle = model.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    view = space["reconstruction"].reconstruct(model, processor, image, ratio=0.4, seed=3)
    handle.remove()
    assert (view["num_tokens"], view["num_hidden"]) == (12, 5)

    # The same tokens hidden by the trainer's own code, with the noise that the view drew.
    inputs = processor(text=[IMAGE], images=[[image]])
    hidden = seen[0]["patch_mask"][inputs["input_ids"] == model.config.image_token_id]  # [12]
    _, labels = hide_patches(
        inputs["pixel_values"],
        chosen=hidden,
        counts=[5],
        num_patches_per_token=4,
        generators=[torch.Generator().manual_seed(0)],
    )
    given = seen[0]["pixel_values"].view(12, 4, -1)
    assert torch.equal(given[~hidden], inputs["pixel_values"].view(12, 4, -1)[~hidden])
    assert not torch.isclose(given[hidden], labels).any(-1).all() and abs(given[hidden].std() - 1) < 0.1
    with torch.no_grad():
        outputs = model(
            **{**inputs, "pixel_values": seen[0]["pixel_values"]},
            patch_mask=seen[0]["patch_mask"],
            patch_labels=labels,
        )
    assert view["mae_loss"] == pytest.approx(outputs.mae_loss.item(), rel=1e-6)

    # Token (row, column) is the square of 28 pixels there; a row of a patch is channel, frame, line, column.
    pixels = {name: torch.tensor(list(view[name].getdata())).view(84, 112, 3) for name in ("original", "reconstructed")}
    masked = torch.tensor(list(view["masked"].getdata())).view(84, 112, 3)
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    predictions = iter(outputs.patch_predictions)
    for token, is_hidden in enumerate(hidden.tolist()):
        row, column = divmod(token, 4)
        square = slice(28 * row, 28 * row + 28), slice(28 * column, 28 * column + 28)
        if not is_hidden:
            for name in (pixels["reconstructed"], masked):
                assert torch.equal(name[square], pixels["original"][square])
            continue
        assert (masked[square] == 128).all()
        for patch, values in enumerate(next(predictions)):
            colours = values.view(3, 2, 14, 14).mean(1).permute(1, 2, 0) * std + mean  # [14, 14, C]
            inner = slice(14 * (patch // 2), 14 * (patch // 2) + 14), slice(14 * (patch % 2), 14 * (patch % 2) + 14)
            found = pixels["reconstructed"][square][inner]
            assert (found - colours.clamp(0, 1) * 255).abs().max() <= 0.51
    resized = processor.resize(image)
    assert torch.equal(pixels["original"], resized.long())


def test_a_perfect_head_restores_the_picture(space, models):
    model, processor = MoCaForPreTraining.from_pretrained(models / "pretraining"), tiny_processor(max_length=128)

    def know_it_all(module, args, kwargs, output):
        output.patch_predictions = kwargs["patch_labels"]
        return output

    model.register_forward_hook(know_it_all, with_kwargs=True)
    for ratio in (0.1, 0.9):
        view = space["reconstruction"].reconstruct(model, processor, picture(1), ratio=ratio)
        assert view["reconstructed"].tobytes() == view["original"].tobytes() != view["masked"].tobytes()


def test_only_backbones_of_patch_rows_with_a_head_are_shown(space, models):
    tell = space["reconstruction"].can_reconstruct
    model = MoCaForPreTraining.from_pretrained(models / "pretraining")
    assert tell(model) and not tell(model.moca)
    assert not tell(MoCaForPreTraining.from_backbone(family_backbone("smolvlm"), mask_token_id=6))
    assert family_processor("smolvlm").makes_bytes is False


def test_pages_of_images_and_pdf_files(space, tmp_path, monkeypatch):
    pages = space["pages"]
    picture(0).save(tmp_path / "a.png")
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    save_pdf(tmp_path / "two.pdf", 2, 1)
    opened = pages.open_pages([tmp_path / name for name in ("two.pdf", "a.png", "clear.png")])
    assert [label for label, _ in opened] == ["two.pdf, page 1", "two.pdf, page 2", "a.png", "clear.png"]
    assert opened[2][1].tobytes() == picture(0).tobytes() and opened[3][1].getpixel((5, 5)) == (255, 255, 255)
    for index in range(2):
        image = opened[index][1]
        assert max(image.size) == pages.MAX_SIDE and image.mode == "RGB"
        small = torch.tensor(list(image.resize((84, 56)).getdata())).float()
        assert (small - torch.tensor(list(picture(1 + index).getdata()))).abs().mean() < 6

    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    (tmp_path / "notes.txt").write_text("no picture")
    for name, message in (("broken.pdf", "broken.pdf does not open as a PDF"), ("notes.txt", "neither a PDF nor an")):
        with pytest.raises(ValueError, match=message):
            pages.open_pages([tmp_path / name])
    monkeypatch.setattr(pages, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a.png is neither .* it has 84 x 56 pixels"):
        pages.open_pages([tmp_path / "a.png"])
    monkeypatch.undo()
    monkeypatch.setattr(pages, "MAX_PAGES", 2)
    with pytest.raises(ValueError, match="two.pdf has 2 pages; at most 2 in all"):
        pages.open_pages([tmp_path / "a.png", tmp_path / "two.pdf"])
    with pytest.raises(ValueError, match="more than 2 pages"):
        pages.open_pages([tmp_path / "a.png"] * 3)
    monkeypatch.setattr(pages, "MAX_FILE_MB", 0)
    with pytest.raises(ValueError, match="a.png has 0.0 MB; at most 0 MB"):
        pages.open_pages([tmp_path / "a.png"])


def test_without_a_pretraining_model_there_is_no_masked_view(space, models, monkeypatch):
    pytest.importorskip("gradio")
    import app

    def ids(search):
        return {part["props"].get("elem_id") for part in app.build(search).config["components"]}

    assert "masked" in ids(app.Search(str(models / "embedding"), str(models / "pretraining")))
    assert "masked" not in ids(app.Search(str(models / "embedding")))
    monkeypatch.delenv("MOCA_MODEL", raising=False)
    monkeypatch.delenv("MOCA_PRETRAINING_MODEL", raising=False)
    args = app.parse_arguments([])
    assert (args.model, args.pretraining_model) == ("org/moca-3b", "org/moca-3b-cpt")
    monkeypatch.setenv("MOCA_MODEL", "org/other")
    assert app.parse_arguments([]).model == "org/other"
    assert app.parse_arguments(["--model", "here"]).model == "here"


def test_the_folder_says_what_a_space_needs():
    from huggingface_hub import metadata_load

    metadata = metadata_load(SPACE / "README.md")
    requirements = dict(line.split("==") for line in (SPACE / "requirements.txt").read_text().split() if "==" in line)
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == requirements["gradio"]
    assert (SPACE / metadata["app_file"]).is_file() and len(metadata["short_description"]) <= 60


def serve(models, folder):
    """Start the Space where this project cannot be imported by accident, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    environment |= {"MOCA_MODEL": str(models / "embedding"), "MOCA_PRETRAINING_MODEL": str(models / "pretraining")}
    command = [sys.executable, str(SPACE / "app.py"), "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + 240
    while server.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}/"
        time.sleep(0.5)
    server.kill()
    raise AssertionError((folder / "log").read_text()[-3000:])


@pytest.mark.skipif(COMMAND is None, reason="needs a browser: apt-get install chromium")
def test_search_in_a_browser(space, models, tmp_path):
    pytest.importorskip("gradio")
    for index in range(3):
        picture(index).save(tmp_path / f"photo-{index}.png")
    files = [tmp_path / "photo-0.png", tmp_path / "photo-1.png", save_pdf(tmp_path / "report.pdf", 2, 10)]
    pages = space["pages"].open_pages(files)
    model = SentenceTransformer(str(models / "embedding"), device="cpu")
    documents = model.encode_document([image for _, image in pages])
    scores = model.similarity(model.encode_query(["a page about tides"]), documents)[0]
    expected = [
        f"{rank}. {pages[page][0]} · {scores[page]:.3f}"
        for rank, page in enumerate(scores.argsort(descending=True).tolist(), start=1)
    ]
    assert [line.split(". ", 1)[1].split(" · ")[0] for line in expected] != [label for label, _ in pages]

    server, address = serve(models, tmp_path)
    try:
        with Chromium(tmp_path / "profile") as browser:
            captions = "[...document.querySelectorAll('#ranking .caption-label')].map(e => e.textContent.trim())"
            browser.call("Page.navigate", url=address)
            browser.wait_for("!!document.querySelector('#files input[type=file]')")
            browser.click("#search")
            browser.wait_for("document.body.innerText.includes('Drop images or a PDF first.')")
            browser.give_files("#files input[type=file]", files)
            browser.wait_for("document.querySelector('#files').textContent.includes('report')")
            browser.type("#query textarea, #query input", "a page about tides")
            browser.click("#search")
            browser.wait_for(f"{captions}.length == 4")
            assert browser.evaluate(captions) == expected
            words = "document.querySelector('#words').innerText"
            browser.wait_for(f"{words}.startsWith({expected[0].split('. ', 1)[1].split(' · ')[0]!r})")
            for name in ("masked", "reconstructed", "original"):
                browser.wait_for(f"(document.querySelector('#{name} img') || {{}}).naturalWidth > 0")
            first = browser.evaluate("document.querySelector('#reconstructed img').src")

            # Another page, chosen by a click.
            browser.click("#ranking .gallery-item:nth-child(3) button")
            browser.wait_for(f"{words}.startsWith({expected[2].split('. ', 1)[1].split(' · ')[0]!r})")
            assert browser.evaluate("document.querySelector('#reconstructed img').src") != first
            browser.screenshot(tmp_path / "page.png")

            # A search without a query is refused in words.
            browser.type("#query textarea, #query input", " ")
            browser.click("#search")
            browser.wait_for("document.body.innerText.includes('Type a query, or give an image')")
            assert "Traceback" not in browser.evaluate("document.body.innerText")
            assert {url.split("/")[2] for url in browser.requested() if url.startswith("http")} == {
                address.split("/")[2]
            }
    finally:
        server.terminate()
        server.wait(timeout=30)
