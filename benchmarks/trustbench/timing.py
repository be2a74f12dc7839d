"""Can a tenant tell from the time to its first token whether another tenant has sent a prefix before?

A trial sends a fresh long prompt twice, or sends two different ones, and times the second. With tenants apart, hit and miss
must look alike; within one tenant they must not, or the measurement would be too blunt to mean anything.
"""

from __future__ import annotations

import math
import random
import time

import numpy as np
from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2, inference_pb2_grpc

from trustbench.server import Server

PROMPT_TOKENS = 160


def timings(server: Server, first: str, second: str, trials: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Seconds to the first token of `second`'s requests whose prompt `first` had sent before, and of those it had not."""
    rng, seen, fresh = random.Random(seed), [], []
    vocab = server.model().vocab_size
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for trial in range(trials + 10):
            known = rng.random() < 0.5
            sent, other = ([rng.randrange(3, vocab) for _ in range(PROMPT_TOKENS)] for _ in range(2))
            _first_token(stub, server, first, sent)
            taken = _first_token(stub, server, second, sent if known else other)
            if trial >= 10:
                (seen if known else fresh).append(taken)
    return seen, fresh


def _first_token(stub: inference_pb2_grpc.InferenceStub, server: Server, tenant: str, ids: list[int]) -> float:
    request = inference_pb2.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids)), sampling=inference_pb2.Sampling(max_tokens=1))
    started = time.perf_counter()
    call = stub.Generate(request, metadata=server.as_tenant(tenant), timeout=300)
    next(call)
    taken = time.perf_counter() - started
    for _ in call:
        continue
    return taken


def p_value(left: list[float], right: list[float]) -> float:
    """Two-sided Mann-Whitney U test by its normal approximation, without ties: these are times of a fine clock."""
    ranks = np.argsort(np.argsort(np.array(left + right))) + 1
    n, m = len(left), len(right)
    u = ranks[:n].sum() - n * (n + 1) / 2
    z = (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return math.erfc(abs(z) / math.sqrt(2))
