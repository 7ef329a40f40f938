"""The admin API's store as a whole: gc, check, export and import, the latter piece by piece."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from persist_cache import fs
from persist_cache.entry import NO_GROUP
from persist_cache.errors import CorruptBlobError, StoreFormatError, StoreFullError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.queries.totals import quarantined
from persist_cache.queries.upkeep import check, checked_json, collected_json, count_blobs
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.model import Models
from persist_cache.server.parameters import flag, query_of
from persist_cache.server.protocols.caching import checked_group
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import Views
from persist_cache.store.store import Store

BUNDLE_TYPE = "application/x-tar"
_NAME = Path("The bundle")
_LOOK_EVERY_BYTES = 16 << 20
"""How often it is looked whether there is still room for what arrives."""


class Upkeep:
    """Answers about a store as a whole. Thread safety: may be asked by many threads at once."""

    def __init__(self, views: Views, models: Models) -> None:
        self._views = views
        self._models = models

    def gc(self, request: Request) -> Response:
        """Do at once what a store does when room is needed, compacting included."""
        erase = flag(query_of(request, {"erase"}), "erase")
        return json_response(collected_json(self._views.store(), erase=erase))

    def check(self, request: Request) -> Response:
        """Compare index and blobs, and mend that if it is asked for."""
        query = query_of(request, {"read_data", "repair"})
        read_data, store = flag(query, "read_data"), self._views.store()
        problems, left = check(store, read_data=read_data, repair=flag(query, "repair"))
        return json_response(
            checked_json(
                problems,
                left,
                blobs=count_blobs(store),
                aside=quarantined(store),
                read_data=read_data,
            )
        )

    def export(self, ids: Sequence[str]) -> Response:
        """A bundle of these entries."""
        try:
            from persist_cache.bundle import outgoing  # no start waits for it

            bundle = outgoing(self._views.store(), ids)
        except KeyError as error:
            raise RefusedError(404, f"Entry {error.args[0]} was evicted just now.") from None
        named = {"Content-Disposition": 'attachment; filename="persist-cache.tar"'}
        return Response(200, b"", BUNDLE_TYPE, named, pieces=bundle.pieces, num_bytes=bundle.nbytes)

    def import_(self, request: Request) -> Response:
        """Put a bundle into the store: all of it, or nothing."""
        query = query_of(request, {"dry_run", "loaded", "group"})
        dry_run, store = flag(query, "dry_run"), self._views.store()
        group = checked_group(query.get("group", NO_GROUP), "group")
        here = self._loaded() if flag(query, "loaded") else None
        with _received(store, request.upload(store.limits.max_bytes)) as fd:
            try:
                from persist_cache.bundle import Bundle
                from persist_cache.bundle.as_json import imported, imported_json

                with Bundle(_NAME, fd=fd) as bundle:
                    models, done = imported(store, bundle, here, group=group, dry_run=dry_run)
                    return json_response(imported_json(bundle, models, done, dry_run=dry_run))
            except CorruptBlobError as error:
                raise RefusedError(400, f"The bundle cannot be used: {error.reason}.") from None
            except StoreFormatError as error:
                raise RefusedError(400, str(error)) from None
            except StoreFullError as error:
                raise RefusedError(507, str(error)) from None

    def _loaded(self) -> Fingerprint:
        model = self._models.loaded({}, any_name=True)
        if model.fingerprint is None:
            raise RefusedError(409, f"The model cannot be identified: {model.why}")
        return model.fingerprint


@contextlib.contextmanager
def _received(store: Store, pieces: Iterator[bytes]) -> Iterator[int]:
    """A file with what arrives. It has no name, beside the blobs, and goes with the block.

    Raises:
        RefusedError: There is no room for it above the space that is to stay free.
    """
    fd = _nameless(store.root)
    try:
        left = 0
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                _refuse_without_room(store, len(piece))
                left = _LOOK_EVERY_BYTES
            try:
                fs.write_all(fd, [memoryview(piece)])
            except OSError as error:
                said = fs.translated(error, "while the bundle was received")
                raise RefusedError(507, str(said)) from None
        yield fd
    finally:
        os.close(fd)


def _nameless(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return fs.create_nameless(folder)
    # As `doctor` names its own: a store removes the empty one that is left by a process that died.
    path = folder / f"doctor.{secrets.token_hex(8)}"
    fd = fs.create(path)
    fs.unlink(path)
    return fd


def _refuse_without_room(store: Store, nbytes: int) -> None:
    found = os.statvfs(store.root)
    free = found.f_bavail * found.f_frsize
    if free - nbytes - _LOOK_EVERY_BYTES < store.limits.min_free_bytes:
        raise RefusedError(
            507,
            "The disk has no room for the bundle: it is received beside the store before any of "
            "it is added, and the store leaves "
            f"{store.limits.min_free_bytes:,} bytes free. Import it with the command, from a file.",
        )
