"""Documents and tables made in code: Markdown, HTML and PDF with pictures, captioned images."""

import base64
import io

from PIL import Image

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(colour, size=(56, 42), format="PNG"):
    """Return the bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def data_uri(content, kind="image/png"):
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write(path, content):
    """Write a file (`str` or `bytes`) and the folders it is in, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pdf_bytes(pages):
    """Return a PDF file, written by hand: a page is a list of `(x, y, text)` and `(x, y, width, height, jpeg)`."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", None, "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        stream, names = "", ""
        for item in page:
            if isinstance(item[2], str):
                x, y, text = item
                stream += f"BT /F1 12 Tf {x} {y} Td ({text}) Tj ET\n"
                continue
            x, y, width, height, jpeg = item
            size = Image.open(io.BytesIO(jpeg)).size
            head = f"/Type /XObject /Subtype /Image /Width {size[0]} /Height {size[1]} /ColorSpace /DeviceRGB"
            objects.append((f"{head} /BitsPerComponent 8 /Filter /DCTDecode", jpeg))
            names += f"/I{len(objects)} {len(objects)} 0 R "
            stream += f"q {width} 0 0 {height} {x} {y} cm /I{len(objects)} Do Q\n"
        objects.append(("", stream.encode()))
        resources = f"<< /Font << /F1 3 0 R >> /XObject << {names}>> >>"
        head = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {len(objects)} 0 R"
        objects.append(f"{head} /Resources {resources} >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    written, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(written))
        if isinstance(item, tuple):
            head, content = item
            body = f"<< {head} /Length {len(content)} >>\nstream\n".encode() + content + b"\nendstream"
        else:
            body = item.encode()
        written += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF"
    return written + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def write_folder(folder, number):
    """Write `number` Markdown files of one to three paragraphs and a picture, and return the folder."""
    for index in range(number):
        colour = (index % 256, 7 * index % 256, 99)
        write(folder / f"images/{index}.png", picture(colour))
        text = "\n\n".join(f"Page {index}, paragraph {part}: the sea and the sky." for part in range(1 + index % 3))
        write(
            folder / f"chapter {index % 5}/{index:03d}.md", f"# Page {index}\n\n![](../images/{index}.png)\n\n{text}\n"
        )
    return folder
