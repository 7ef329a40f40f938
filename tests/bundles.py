"""Taking bundles apart in tests, and putting them together again, right or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from msgspec.structs import replace

from persist_cache.blobs.header import BlobHeader, header_bytes
from persist_cache.blobs.reader import BlobReader
from persist_cache.bundle.container import END, checksum_text, member_header, padding
from persist_cache.codec import Tensor

Member = tuple[str, bytes]


@dataclass
class Parts:
    """A bundle in memory.

    Attributes:
        manifest: Decoded.
        blobs: Content of each blob by name, in the order of the members.
    """

    manifest: dict[str, Any]
    blobs: dict[str, bytes]

    @classmethod
    def of(cls, path: Path) -> Parts:
        raw = path.read_bytes()
        found: list[Member] = []
        offset = 0
        while raw[offset] != 0:
            header = raw[offset : offset + 512]
            name = header[:100].rstrip(b"\0").decode()
            size = int(header[124:135], 8)
            offset += 512
            found.append((name, raw[offset : offset + size]))
            offset += size + len(padding(size))
        assert raw[offset:] == END
        manifest, checksum, *blobs = found
        assert (manifest[0], checksum[0]) == ("manifest.json", "manifest.xxh3")
        return cls(
            json.loads(manifest[1]), {name.removesuffix(".safetensors"): raw for name, raw in blobs}
        )

    def seal(self) -> None:
        """Make the manifest fit the blobs, sizes and digests."""
        for section in self.manifest["blobs"]:
            content = self.blobs[section["name"]]
            size = 8 + int.from_bytes(content[:8], "little")
            section["nbytes"] = len(content)
            section["digest"] = xxhash.xxh3_128_hexdigest(content[:size])

    def rewrite(
        self,
        name: str,
        tmp_path: Path,
        change: Callable[[BlobHeader, list[Tensor]], tuple[BlobHeader, list[Tensor]]],
    ) -> None:
        """Change what a blob says, with all of its checksums right."""
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(self.blobs[name])
        with BlobReader(path) as reader:
            tensors = [
                Tensor(key, info.dtype, info.shape, [memoryview(reader.read_bytes(key))])
                for key, info in reader.header.tensors.items()
            ]
            header, tensors = change(reader.header, tensors)
        pieces = [piece for tensor in tensors for piece in tensor.pieces]
        self.blobs[name] = header_bytes(header, tensors) + b"".join(map(bytes, pieces))
        path.unlink()

    def rewrite_header(self, name: str, tmp_path: Path, **changes: Any) -> None:
        """Change fields of a blob's header."""
        self.rewrite(name, tmp_path, lambda header, tensors: (replace(header, **changes), tensors))

    @property
    def members(self) -> list[Member]:
        raw = json.dumps(self.manifest).encode()
        return [
            ("manifest.json", raw),
            ("manifest.xxh3", checksum_text(raw)),
            *((f"{name}.safetensors", content) for name, content in self.blobs.items()),
        ]

    def write(self, path: Path) -> Path:
        path.write_bytes(pack(self.members))
        return path


def pack(members: list[Member]) -> bytes:
    """A tar file of these members."""
    parts = []
    for name, content in members:
        parts += [member_header(name, len(content)), content, padding(len(content))]
    return b"".join([*parts, END])
