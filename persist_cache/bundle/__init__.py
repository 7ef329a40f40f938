"""Bundles: one file that holds all that is needed to restore some entries elsewhere.

A bundle is an uncompressed tar file of a manifest and blobs. Blobs are cut when they are exported,
so that a bundle holds the rows of the entries that were asked for and nobody else's; they are
verified to the last byte before an import writes anything. `docs/bundle.md` describes the bytes.

The checksums find damage, not malice: KV that was computed for another text, or by another model,
cannot be told from the right one. Import only what you would run.
"""

from persist_cache.bundle.exporting import Exported, Outgoing, export, outgoing
from persist_cache.bundle.importing import Imported, Usability, load, preview, usability
from persist_cache.bundle.reading import Bundle
from persist_cache.portable.entries import PortableEntry

__all__ = [
    "Bundle",
    "Exported",
    "Imported",
    "Outgoing",
    "PortableEntry",
    "Usability",
    "export",
    "load",
    "outgoing",
    "preview",
    "usability",
]
