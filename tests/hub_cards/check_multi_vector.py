"""Run by a test in a process that knows nothing of this project: a late-interaction export through both doors.

python check_multi_vector.py EXPORT_FOLDER
"""

import sys

# A script beside this one; importing it makes this project's packages impossible to import.
from check_export import PLACEHOLDER, picture

import torch  # isort: skip
from sentence_transformers import MultiVectorEncoder  # isort: skip
from transformers import AutoModel, AutoProcessor  # isort: skip


def main(folder):
    first, second = picture(56, 84, 0), picture(84, 56, 1)
    content = [{"type": "image", "image": first}, {"type": "text", "text": "then"}, {"type": "image", "image": second}]
    # (what sentence-transformers is given, the same as plain text, its images)
    cases = [
        ("a page about tides", "a page about tides", []),
        (first, PLACEHOLDER, [first]),
        ({"text": "what is it?", "image": second}, f"{PLACEHOLDER}what is it?", [second]),
        ([{"role": "user", "content": content}], f"{PLACEHOLDER}then{PLACEHOLDER}", [first, second]),
        ("short", "short", []),
    ]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    encoder = MultiVectorEncoder(folder, trust_remote_code=True, device="cpu")
    for loaded in (model, processor, encoder[0].model):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    projection = (
        encoder[1].linear.weight if type(encoder[1]).__name__ == "Dense" else torch.eye(model.config.hidden_size)
    )

    expected = []
    for _, text, images in cases:
        with torch.no_grad():
            states = model(**processor(text=[text], images=[images])).last_hidden_state[0]  # [T, d]
        expected.append(torch.nn.functional.normalize(states @ projection.T, dim=-1))
    inputs = [case[0] for case in cases]
    for name, embeddings in {
        "mixed batch": encoder.encode_document(inputs),
        "one at a time": [encoder.encode_document([given])[0] for given in inputs],
        "queries": encoder.encode_query(inputs),
    }.items():
        for case, ours, theirs in zip(cases, embeddings, expected):
            assert ours.shape == theirs.shape, (name, case[1], ours.shape, theirs.shape)
            error = (ours - theirs).abs().max().item()
            assert error < 1e-5, f"{name}, {case[1]}: {error}"

    # MaxSim, written out.
    scores = encoder.similarity(expected, expected)
    for row, query in enumerate(expected):
        for column, document in enumerate(expected):
            plain = sum(max(float(token @ other) for other in document) for token in query)
            assert abs(scores[row, column].item() - plain) < 1e-3, (row, column)
    assert encoder.encode_document([""])[0].isfinite().all()


if __name__ == "__main__":
    main(sys.argv[1])
