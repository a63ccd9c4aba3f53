"""A training step of continual pre-training: stock parts, as one would first put them together, and this project's.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --shape 3b --device cuda
    python benchmarks/training_step.py --shape 3b --num_layers 1 --vision_layers 1 --tokens 512 --dtype float32

A step is forward and backward pass of all micro-batches and one AdamW update of all weights. Both variants take the
same rows, masks and starting weights and compute the same losses, which are printed; each runs in a process of its own.

- `stock`: rows in random order, padded to the longest of their micro-batch; the stock Qwen2.5-VL model and its lm_head
  at every position, cross-entropy with -100; a stock decoder layer and a linear map for the masked patches.
- `by length`: `MoCaForPreTraining` on micro-batches of similar length.
- `packed`: `MoCaForPreTraining` on one packed sequence a micro-batch, without padding.

Prints a row a variant: seconds of the fastest step after the first, the peak of memory beyond what was held before the
first step, that is beyond weights and input but with gradients and AdamW's two moments (resident memory of the process;
on CUDA `max_memory_allocated`), both as a ratio to `stock`, and the model FLOPs utilisation where the GPU's peak is
known. A variant that does not run, for want of memory for instance, says why.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from modeling_moca import MoCaConfig, MoCaForPreTraining
from trainers.flops import peak_flops, step_flops

VARIANTS = ("stock", "by length", "packed")
VISION_START, IMAGE_TOKEN, VISION_END, MASK = 2, 3, 5, 6
MAE_WEIGHT = 0.5
SHAPES = {
    "small": {"dtype": "float32", "tokens": 2048, "batch_rows": 8, "shortest": 16, "longest": 256, "image_side": 8},
    "3b": {"dtype": "bfloat16", "tokens": 16384, "batch_rows": 4, "shortest": 128, "longest": 2048, "image_side": 32},
}
LAYERS = {"small": (2, 2), "3b": (36, 32)}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES, help="3b: Qwen2.5-VL-3B with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--tokens", type=int, help="of all rows, padding not counted")
    parser.add_argument("--batch_rows", type=int, help="rows of a micro-batch")
    parser.add_argument("--shortest", type=int)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--image_side", type=int, help="patches on a side of an image, even; every other row has one")
    parser.add_argument("--mask_ratio", type=float, default=0.4, help="of text tokens; half of all image tokens")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, default in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    num_layers, vision_layers = LAYERS[args.shape]
    args.num_layers, args.vision_layers = args.num_layers or num_layers, args.vision_layers or vision_layers
    return args


def make_config(args):
    sizes = {
        "small": (
            {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2},
            {"hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "fullatt_block_indexes": [1]},
            [8, 12, 12],
        ),
        "3b": (
            {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
            {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]},
            [16, 24, 24],
        ),
    }
    text, vision, sections = sizes[args.shape]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    text = {"vocab_size": 151936, "num_hidden_layers": args.num_layers, "rope_parameters": rope, **text, **tokens}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": args.vision_layers, "out_hidden_size": text["hidden_size"], **vision},
        vision_start_token_id=VISION_START,
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def make_rows(args):
    """Rows whose lengths are spread evenly on a logarithmic scale, in random order; longer ones get an image."""
    generator = torch.Generator().manual_seed(0)
    lengths = []
    while sum(lengths) < args.tokens:
        draw = torch.rand((), generator=generator).item()
        length = int(args.shortest * (args.longest / args.shortest) ** draw)
        lengths.append(min(length, args.tokens - sum(lengths)))
    num_image_tokens = args.image_side**2 // 4
    rows = []
    for number, length in enumerate(lengths):
        input_ids = torch.randint(7, 151_000, (length,), generator=generator)
        row = {"patch_mask": torch.zeros(length, dtype=torch.bool)}
        if length >= num_image_tokens + 4 and (args.shape == "3b" or number % 2 == 0):
            input_ids[0], input_ids[num_image_tokens + 1] = VISION_START, VISION_END
            input_ids[1 : num_image_tokens + 1] = IMAGE_TOKEN
            pixels = torch.randn(num_image_tokens, 4, 1176, generator=generator)
            chosen = torch.rand(num_image_tokens, generator=generator) < 0.5
            row["patch_mask"][1 : num_image_tokens + 1] = chosen
            row["patch_labels"] = pixels[chosen]
            pixels[chosen] = torch.randn(1176, generator=generator)
            row["pixel_values"] = pixels.flatten(0, 1)
        hidden = (torch.rand(length, generator=generator) < args.mask_ratio) & (input_ids > 6)
        hidden[0] = False
        row["labels"] = input_ids.masked_fill(~hidden, -100)
        row["input_ids"] = input_ids.masked_fill(hidden, MASK)
        rows.append(row)
    return rows


def make_batches(args, rows, variant):
    """Return the micro-batches of a variant."""
    order = list(range(len(rows)))
    if variant != "stock":
        order.sort(key=lambda row: len(rows[row]["input_ids"]))
    batches = []
    for start in range(0, len(order), args.batch_rows):
        chosen = [rows[row] for row in order[start : start + args.batch_rows]]
        lengths = [len(row["input_ids"]) for row in chosen]
        batch = {}
        for name, padding in (("input_ids", 0), ("labels", -100), ("patch_mask", False)):
            values = [row[name] for row in chosen]
            if variant == "packed":
                batch[name] = torch.cat(values)[None]
            else:
                batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        if variant == "packed":
            batch["cu_seq_lens"] = torch.tensor([0, *lengths]).cumsum(0).int()
        else:
            batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        pictures = [row for row in chosen if "pixel_values" in row]
        if pictures:
            batch["pixel_values"] = torch.cat([row["pixel_values"] for row in pictures])
            batch["patch_labels"] = torch.cat([row["patch_labels"] for row in pictures])
            batch["image_grid_thw"] = torch.tensor([[1, args.image_side, args.image_side]] * len(pictures))
        else:
            del batch["patch_mask"]
        batches.append(batch)
    return batches


class Stock(nn.Module):
    """Stock modules, put together without this project's heads."""

    def __init__(self, config):
        super().__init__()
        # Bidirectional, so that both variants compute the same.
        config.text_config.is_causal = False
        self.model = Qwen2_5_VLForConditionalGeneration(config)
        text = config.text_config
        self.decoder = Qwen2_5_VLDecoderLayer(text, text.num_hidden_layers // 2)
        self.proj = nn.Linear(text.hidden_size, 4 * 1176)

    def forward(self, input_ids, labels, attention_mask, counts, patch_mask=None, patch_labels=None, **images):
        backbone = self.model.model
        image_tokens = (input_ids == IMAGE_TOKEN).int()
        positions, _ = backbone.get_rope_index(
            input_ids,
            mm_token_type_ids=image_tokens,
            image_grid_thw=images.get("image_grid_thw"),
            attention_mask=attention_mask,
        )
        states = backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False, **images
        ).last_hidden_state
        logits = self.model.lm_head(states[:, :-1]).float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss = loss / counts[0]
        if patch_mask is not None:
            mask = create_bidirectional_mask(
                config=self.decoder.self_attn.config, inputs_embeds=states, attention_mask=attention_mask
            )
            rotary = backbone.language_model.rotary_emb(states, positions)
            decoded = self.decoder(states, attention_mask=mask, position_embeddings=rotary, is_causal=False)
            predicted = self.proj(decoded).unflatten(-1, (1176, 4))[patch_mask].transpose(1, 2)
            error = (predicted.float() - patch_labels.float()).square().mean(-1).sum() / counts[1]
            loss = loss + MAE_WEIGHT * error
        return loss


def make_model(args, variant, config):
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        stock = Stock(config)
    torch.set_default_dtype(torch.float32)
    stock.model.set_attn_implementation(args.attn_implementation)
    if variant == "stock":
        model, inner = stock, stock.model
    else:
        model = inner = MoCaForPreTraining.from_backbone(stock.model, mask_token_id=MASK, mae_loss_weight=MAE_WEIGHT)
        model.mae_head.decoder.load_state_dict(stock.decoder.state_dict())
        model.mae_head.proj.load_state_dict(stock.proj.state_dict())
    if args.gradient_checkpointing:
        inner.gradient_checkpointing_enable()
    return model.train()


def resident():
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(args, variant):
    """Take the steps of one variant; return what was measured."""
    cuda = args.device.startswith("cuda")
    rows = make_rows(args)
    batches = make_batches(args, rows, variant)
    counts = torch.tensor(
        [sum(int((batch["labels"] != -100).sum()) for batch in batches)]
        + [4 * sum(int(batch["patch_mask"].sum()) for batch in batches if "patch_mask" in batch)],
        device=args.device,
    )
    config = make_config(args)
    model = make_model(args, variant, config)
    # With many tensors at a time AdamW holds copies of as many.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    dtype = getattr(torch, args.dtype)
    for batch in batches:
        for name, tensor in batch.items():
            batch[name] = tensor.to(args.device, dtype if tensor.is_floating_point() else None)
    seconds, losses = [], []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        total = torch.zeros((), device=args.device)
        for batch in batches:
            if variant == "stock":
                loss = model(**batch, counts=counts)
            else:
                loss = model(**batch, num_items_in_batch=counts).loss
            loss.backward()
            total += loss.detach()
            del loss
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = 0
    moca_config = MoCaConfig(backbone_config=config)
    for start in range(0, len(rows), args.batch_rows):
        some = rows[start : start + args.batch_rows]
        flops += step_flops(
            moca_config,
            [len(row["input_ids"]) for row in some],
            [(1, args.image_side, args.image_side) for row in some if "pixel_values" in row],
            sum(int((row["labels"] != -100).sum()) for row in some),
            sum(int(row["patch_mask"].sum()) for row in some),
        )
    return {
        "seconds": min(seconds[1:]),
        "memory": peak - before,
        "losses": losses,
        "flops": flops,
        "peak_flops": peak_flops(args.device),
        "positions": sum(batch["input_ids"].numel() for batch in batches),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "rows": len(rows),
        "images": sum("pixel_values" in row for row in rows),
        "chosen": counts.tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name(args.device) if cuda else "CPU",
    }


def main():
    args = parse_arguments()
    if args.alone:
        print(json.dumps(run(args, args.alone)))
        return
    results, reasons = {}, {}
    for variant in args.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", variant]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            results[variant] = json.loads(done.stdout.splitlines()[-1])
        else:
            reasons[variant] = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
    if not results:
        sys.exit("\n".join(f"{variant} does not run here: {reason}" for variant, reason in reasons.items()))
    first = next(iter(results.values()))
    print(f"{first['device']}, {args.dtype}, torch {torch.__version__}, shape {args.shape}, ", end="")
    print(f"{args.num_layers} layers, {args.vision_layers} vision blocks, {first['parameters'] / 1e6:.0f} M parameters")
    print(
        f"{first['rows']} rows, {first['tokens']} tokens, {first['images']} images, {first['chosen'][0]} tokens and ",
        end="",
    )
    print(f"{first['chosen'][1]} patches chosen, micro-batches of {args.batch_rows} rows\n")
    print("| variant | positions | s a step | times faster | peak GB | of stock's | MFU | loss of steps 1 and 2 |")
    print("|---|---|---|---|---|---|---|---|")
    base = results.get("stock")
    for variant, result in results.items():
        faster, share = "-", "-"
        if base:
            faster = f"{base['seconds'] / result['seconds']:.2f}"
            share = f"{result['memory'] / base['memory']:.2f}"
        utilisation = "-"
        if result["peak_flops"]:
            utilisation = f"{result['flops'] / result['seconds'] / result['peak_flops']:.1%}"
        losses = ", ".join(f"{loss:.5f}" for loss in result["losses"][:2])
        cells = [
            variant,
            result["positions"],
            f"{result['seconds']:.2f}",
            faster,
            f"{result['memory'] / 1e9:.2f}",
            share,
        ]
        print("| " + " | ".join(map(str, [*cells, utilisation, losses])) + " |")
    for variant, reason in reasons.items():
        print(f"\n{variant} does not run here: {reason}")


if __name__ == "__main__":
    main()
