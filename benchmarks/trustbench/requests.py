"""Valid requests to start from, and what a failed call says."""

from __future__ import annotations

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa.v1 import common_pb2 as pb
from lopa.wire.errors import DOMAIN
from lopa.wire.tensors import soft_prompt_message

TEXTS = ("def add(a, b):", "import os\n", "class Node:\n    def __init__(self", "for name in sorted(", "# a comment\n")


def soft_prompt(hidden: int, seed: int, rows: int = 2) -> pb.SoftPrompt:
    """Small random rows, (rows, hidden)."""
    return soft_prompt_message((np.random.default_rng(seed).standard_normal((rows, hidden)) * 0.02).astype(np.float32))


def generate(hidden: int, seed: int, tokens: int = 8, text: str | None = None) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=pb.Prompt(text=TEXTS[seed % len(TEXTS)] if text is None else text),
        soft_prompt=soft_prompt(hidden, seed),
        sampling=inference_pb2.Sampling(max_tokens=tokens, ignore_end=True),
    )


def pair(hidden: int, seed: int) -> pb.Pair:
    return pb.Pair(
        prompt=pb.Prompt(text=TEXTS[seed % len(TEXTS)]), target=pb.Target(text=" return a + b"), soft_prompt=soft_prompt(hidden, seed)
    )


def seeds(hidden: int, bundle_id: str) -> dict[str, list[object]]:
    """Valid requests by full method name, with every kind of field in them."""
    full = generate(hidden, 1)
    full.prefix.text, full.sampling.temperature, full.sampling.seed = "# module\n", 0.8, 7
    full.sampling.stop.extend(["\n\n", "def"])
    full.sampling.logprobs, full.sampling.top_p, full.sampling.top_k = 3, 0.9, 20
    tokens = inference_pb2.GenerateRequest(
        prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5, 6, 7])), sampling=inference_pb2.Sampling(max_tokens=2)
    )
    return {
        "/lopa.v1.Inference/Generate": [generate(hidden, 0), full, tokens],
        "/lopa.v1.Inference/Score": [inference_pb2.ScoreRequest(pairs=[pair(hidden, 0), pair(hidden, 1)])],
        "/lopa.v1.Tuning/PromptGradients": [tuning_pb2.PromptGradientsRequest(pairs=[pair(hidden, 2)])],
        "/lopa.v1.Catalog/GetModel": [catalog_pb2.GetModelRequest()],
        "/lopa.v1.Catalog/FetchBundle": [catalog_pb2.FetchBundleRequest(bundle_id=bundle_id, offset=1 << 20)],
    }


def reason_of(error: grpc.RpcError) -> tuple[str, float | None]:
    """The catalogue's reason ("" for an untyped error), and the seconds of RetryInfo."""
    info, retry, reason, seconds = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), "", None
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        return "", None
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif detail.Unpack(retry):
            seconds = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, seconds
