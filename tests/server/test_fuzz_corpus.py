"""Every request that ever made the fuzzer's server answer in a new way is answered, by its rules, and disturbs nobody."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest
from lopa_server.app import start_server

from tests.server.client import Client, generate_request
from tests.server.corpus import CONFIG, answer, kept


@pytest.mark.slow
def test_what_the_fuzzer_found_is_answered_and_disturbs_nobody() -> None:
    with start_server(CONFIG) as server, grpc.insecure_channel(server.address) as channel:
        client, request = Client(channel), generate_request("class Point:", max_tokens=12)
        alone, answers = client.tokens(request), Counter[str]()
        for number, (method, data) in enumerate(kept()):
            status, reason, _ = answer(channel, method, data)
            answers[reason or status] += 1
            assert status not in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"), (method, data.hex())
            if number % 10 == 0:
                assert client.tokens(request) == alone
        assert client.tokens(request) == alone
    assert len(answers) > 10, "the corpus reaches most of the catalogue"
