#!/usr/bin/env python3
"""Writes a safetensors file with the tensors of GPT-2 and random contents.

usage: make-gpt2.py FILE [LAYERS]

Names and shapes are those of the 124 million parameter model (LAYERS is 12),
dtype F16. The bytes come from a fixed seed. Needs Python alone: this is for
machines that can reach no package registry. Sources: the format's page,
https://huggingface.co/docs/safetensors, and the model's own header.
"""

import json
import random
import struct
import sys

VOCABULARY, CONTEXT, WIDTH = 50257, 1024, 768


def shapes(layers):
    yield "wte.weight", (VOCABULARY, WIDTH)
    yield "wpe.weight", (CONTEXT, WIDTH)
    for layer in range(layers):
        prefix = f"h.{layer}."
        for name, rows, columns in [
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ]:
            yield f"{prefix}{name}.weight", (rows, columns)
            yield f"{prefix}{name}.bias", (columns,)
        for name in ("ln_1", "ln_2"):
            yield f"{prefix}{name}.weight", (WIDTH,)
            yield f"{prefix}{name}.bias", (WIDTH,)
        yield f"{prefix}attn.bias", (1, 1, CONTEXT, CONTEXT)
    yield "ln_f.weight", (WIDTH,)
    yield "ln_f.bias", (WIDTH,)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    layers = int(sys.argv[2]) if len(sys.argv) == 3 else 12
    header, sizes = {"__metadata__": {"format": "pt"}}, []
    offset = 0
    for name, shape in shapes(layers):
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        sizes.append(size)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = random.Random(124)
    with open(sys.argv[1], "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for size in sizes:
            file.write(generator.randbytes(size))


if __name__ == "__main__":
    main()
