"""Between live KV caches and the bytes of the store: the contract that both sides keep.

A cache is mlx-lm's list of layers, opaque to everyone but its codec. A `Codec` keeps live caches
(`LiveCaches`), takes their bytes as a `Source`, and makes caches of a `Blob`'s bytes again.
`persist_cache.tensors` is the codec for mlx-lm's classes; tests have others.

Shapes and dtypes: the keys and values of a layer are arrays `(B, n_kv_heads, T, head_dim)`, where
row `i` of the third axis belongs to token `i`. Quantized layers have three such arrays for each,
and others any shape that their codec knows. Each is stored under the name of its dtype in
safetensors (`BF16`, `U32`), and comes back with the same dtype and the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct


class Tensor(Struct, frozen=True):
    """A tensor to be written: its bytes, in pieces, in file order.

    Attributes:
        name: Unique in its blob.
        dtype: safetensors name, such as `BF16`.
        shape: Row-major shape of the pieces joined.
        pieces: Flat byte views. The writer only reads them; their owner keeps the memory
            unchanged until the write has ended.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


class Payload(Struct, frozen=True):
    """What a codec puts into one blob: tensors, and a note to itself.

    Attributes:
        tensors: The KV rows of a run, or the state at a position.
        detail: JSON by which the codec reads them back; opaque to the store.
    """

    tensors: Sequence[Tensor]
    detail: str = "{}"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class TensorInfo(Struct, frozen=True, gc=False):
    """Where a stored tensor lies, and the digest of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3: str

    @property
    def end(self) -> int:
        """Position in the file after its last byte."""
        return self.offset + self.nbytes


class BlobInfo(Protocol):
    """What a blob says of itself, as far as a codec needs it."""

    @property
    def layout(self) -> str:
        """`Source.layout` of the cache that it was written from."""

    @property
    def detail(self) -> str:
        """`Payload.detail` as it was written."""

    @property
    def start(self) -> int:
        """Position of its first token in the prompt."""

    @property
    def end(self) -> int:
        """Position after its last token; for a state both are the position that it resumes."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by name, in file order."""


class Blob(Protocol):
    """An open blob from which a codec restores; the store closes it after the call.

    Thread safety: `read_adjacent` may be called from several threads at once.
    """

    @property
    def path(self) -> Path:
        """Its file, for `CorruptBlobError`."""

    @property
    def header(self) -> BlobInfo:
        """What it says of itself, verified."""

    def read(self, name: str, buffers: Sequence[memoryview], /) -> None:
        """Fill `buffers` with one tensor's bytes; as `read_adjacent`."""

    def read_adjacent(self, parts: Sequence[tuple[str, Sequence[memoryview]]], /) -> None:
        """Fill buffers with the bytes of tensors that lie end to end, and verify each.

        Args:
            parts: Per tensor, in file order: its name, and writable flat byte views whose lengths
                sum up to its size.

        Raises:
            CorruptBlobError: The bytes are not those written; the buffers then hold garbage.
            OSError: The disk failed.
        """


class Source(Protocol):
    """The bytes of one cache at one moment, seen as rows and state: what a put saves.

    Lifetime: its byte views stay valid and unchanged as long as it lives, whatever happens to the
    cache. A write to the cache may copy whole buffers meanwhile, so it is held shortly.

    Thread safety: made on the thread that computed the cache; used on any, one at a time. Using
    it runs no MLX operation, and raises nothing.
    """

    @property
    def layout(self) -> str:
        """JSON of classes and geometry; only equal layouts share runs."""

    @property
    def complete(self) -> bool:
        """Rows of every layer exist, so that any position can be resumed."""

    def rows(self, start: int, end: int) -> Payload:
        """The rows of tokens `[start, end)`: tensors `(B, n_kv_heads, end - start, head_dim)`."""

    def checkpoint(self) -> Payload | None:
        """State at the end of those layers whose rows may drop, or None if there are none."""


class Witness(Protocol):
    """Tells whether a cache is still as it was when the witness was made.

    It may make the next write to the cache expensive, so it is dropped before a cache is lent.
    """

    def fits(self, cache: Sequence[Any], /) -> bool:
        """Whether the cache holds the same tokens in the same memory; changes nothing."""


class LiveCaches(Protocol):
    """What must be known of live caches to keep them in memory.

    Thread safety: called on any thread, for one cache by one thread at a time. The arrays of a
    cache are evaluated (`Codec.prepare`), because MLX streams are thread-local.
    """

    def can_trim(self, cache: Sequence[Any], /) -> bool:
        """Whether tokens can be taken back from every layer."""

    def trim(self, cache: Sequence[Any], num_tokens: int, /) -> int:
        """Take back the last `num_tokens` tokens.

        Returns:
            How many were taken back; less than asked means that the cache is not to be used.
        """

    def nbytes(self, cache: Sequence[Any], /) -> int:
        """Bytes of memory that it keeps, room for further tokens included."""

    def copy_cache(self, cache: Any, /) -> Any:
        """A cache that may be decoded on without changing this one."""

    def num_tokens(self, cache: Sequence[Any], /) -> int | None:
        """Tokens that it holds; None if it does not count them."""


class Codec(LiveCaches, Protocol):
    """Turns live caches into bytes and back.

    It may also have `witness(cache)`, which gives a `Witness`: then a cache is let go that its
    former owner changed without changing its length. And it may be a `SharingCodec`.
    """

    def group_size(self) -> int:
        """Processes that share one model, each with a shard of every layer; 1 for a whole one."""

    def prepare(self, cache: Sequence[Any], num_tokens: int, /) -> int:
        """Make a cache that was handed over fit to be kept. On the thread that computed it.

        Evaluates its arrays, and lets it own its memory.

        Args:
            cache: The layers; changed in place.
            num_tokens: Tokens that it is said to hold.

        Returns:
            The number of leading tokens that it really stands for.

        Raises:
            UnsupportedCacheError: It cannot be kept; its arrays are evaluated nevertheless.
        """

    def source(self, cache: Sequence[Any], num_tokens: int, /) -> Source:
        """Take the bytes of a prepared cache, without copying them.

        Args:
            cache: The layers.
            num_tokens: Tokens that it holds.

        Raises:
            UnsupportedCacheError: A layer cannot be saved; the cache stays as it is.
        """

    def restore(
        self,
        runs: Sequence[tuple[Blob, int]],
        checkpoint: Blob | None,
        num_tokens: int,
        /,
    ) -> Any:
        """Make a cache of stored bytes, ready to decode. On the thread that will decode.

        Args:
            runs: Blobs of rows in the order of their tokens, each with the number of leading
                tokens to use of it.
            checkpoint: The state at `num_tokens`, or None when rows suffice.
            num_tokens: Tokens that the cache is to hold.

        Returns:
            The cache, which belongs to the caller. It refers to no blob.

        Raises:
            CorruptBlobError: A blob is not what this codec wrote. Nothing of it is served.
            OSError: The disk failed.
        """


class SharingCodec(Codec, Protocol):
    """A codec whose kept caches may share the buffers of the tokens that they have in common.

    A cache that comes out of a server's batch must be copied, because the batch goes on writing
    to its buffers. What is kept of the same tokens already is not copied again.
    """

    def prepare(
        self,
        cache: Sequence[Any],
        num_tokens: int,
        find_known: Callable[[], Any] | None = None,
        /,
    ) -> int:
        """As `Codec.prepare`.

        Args:
            cache: The layers; changed in place.
            num_tokens: Tokens that it is said to hold.
            find_known: Gives what `known_rows` says of a kept cache that begins with the same
                tokens, or None. Called only for a cache out of a batch. The codec makes sure that
                the rows are those of this cache.
        """

    def known_rows(self, cache: Sequence[Any], num_tokens: int, /) -> Any:
        """Refer to the rows of a kept cache's first `num_tokens` tokens."""

    def is_pieced(self, cache: Sequence[Any], /) -> bool:
        """Whether it came out of a batch: it is kept in pieces, and what comes next shares them."""

    def join(self, cache: Sequence[Any], /) -> Any:
        """Make one to decode on, on the calling thread, of a kept cache; that one stays."""

    def condense(self, cache: Sequence[Any], /) -> bool:
        """Put a kept cache together if it is in too many pieces; says whether it was."""

    def buffers(self, cache: Sequence[Any], /) -> Mapping[int, int]:
        """Bytes of each buffer of a kept cache, by what tells buffers apart as long as it lives."""


def sharing(codec: LiveCaches) -> SharingCodec | None:
    """The codec, if its caches may share buffers."""
    shares: Any = codec
    return shares if hasattr(codec, "known_rows") else None
