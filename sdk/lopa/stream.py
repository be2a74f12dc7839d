"""A generation while it is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from lopa.errors import ProtocolError
from lopa.protocol.replies import GenerationReader
from lopa.transport import ReplyStream
from lopa.v1 import inference_pb2
from lopa.values import Delta, Generation


class GenerationStream(Iterator[Delta]):
    """Deltas as they come; at the end the whole `generation`. Its `with` block, or `close`, frees the server's work."""

    def __init__(
        self, stream: ReplyStream[inference_pb2.GenerateResponse], reader: GenerationReader, revision: Callable[[str | None], str]
    ) -> None:
        self._stream = stream
        self._reader = reader
        self._revision = revision
        self._generation: Generation | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop. Harmless after the end."""
        self._stream.close()

    def __next__(self) -> Delta:
        try:
            return self._reader.feed(next(self._stream))
        except StopIteration:
            if self._generation is None:
                self._generation = self._reader.finish(self._revision(self._reader.revision))
            raise

    @property
    def generation(self) -> Generation:
        """The whole text, verified.

        Raises:
            ProtocolError: the stream was not read to its end.
        """
        if self._generation is None:
            raise ProtocolError("the generation is not finished: iterate over the stream to its end first")
        return self._generation
