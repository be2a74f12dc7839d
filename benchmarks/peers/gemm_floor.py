"""The hardware's floor for one decode step: only the matrix products of the model's shapes, nothing else.

No attention, no norms, no activation, no sampling: what is left cannot be avoided by any engine that multiplies in bfloat16 with the
libraries that torch brings. Query, key and value as one product, gate and up as one; every layer with weights of its own.
"""

from __future__ import annotations

import json

import torch
from torch.nn.functional import linear

from peers.worker import Job, Round, serve

STEPS = 40


def build(job: Job) -> Round:
    torch.set_num_threads(job.threads)
    config = json.loads((job.folder / "config.json").read_text())
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden * config["num_key_value_heads"] // heads
    shapes = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)]
    layers = [[torch.randn(shape).bfloat16() for shape in shapes] for _ in range(config["num_hidden_layers"])]
    head = torch.randn(config["vocab_size"], hidden).bfloat16()
    narrow, broad = torch.randn(job.requests, hidden).bfloat16(), torch.randn(job.requests, wide).bfloat16()

    @torch.inference_mode()
    def run(number: int, new: int) -> int:
        del number, new
        for _ in range(STEPS):
            for qkv, out, gate_up, down in layers:
                linear(narrow, qkv), linear(narrow, out), linear(narrow, gate_up), linear(broad, down)
            linear(narrow, head)
        return STEPS * job.requests

    return run


if __name__ == "__main__":
    serve(build)
