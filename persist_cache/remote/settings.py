"""Which remote a store uses, and by which rules; remembered in the store, credentials never."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct

from persist_cache.errors import RemoteError
from persist_cache.store.store import Store

SETTINGS = "remote.settings"
SCHEMES = ("s3", "gs", "az", "file", "https", "http")
MIRROR_SCHEMES = ("https", "http")
"""Of remotes that are only read."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_TIERS = ("system", "pinned")
DEFAULT_PUBLISH_AFTER = 2
_OPTIONS = ("endpoint", "region", "virtual_hosted_style_request")
"""What a store may remember of the access to a bucket; all else is of the environment."""


class RemoteSettings(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A remote, and what may be done with it.

    Attributes:
        url: `s3://bucket/prefix`, `gs://…`, `az://…`, a folder (as `file://…`), or an `https://`
            mirror, which is only read; as `checked_url` gives it.
        trust: Who vouches for what is there: every holder of a shared `secret`, or one
            `publisher` by its Ed25519 key.
        secret_file: Where the secret is, or a publisher's private key; "" for the environment
            (`PERSIST_CACHE_REMOTE_SECRET`, `PERSIST_CACHE_REMOTE_SECRET_FILE`).
        public_key: The publisher's, 64 hex digits; "" with a shared secret.
        publish_plain: What is published goes there unencrypted, which the user agreed to. Without
            it the remote is only read.
        tiers: Which entries are published by themselves: `system`, `user`, `assistant` and
            `pinned`.
        publish_after: At which hit.
        budget_bytes_per_day: Most bytes to be sent per UTC day; None for no limit.
        options: Further options of the access that are no credentials: `endpoint`, `region`.
    """

    url: str
    trust: Literal["secret", "publisher"] = "secret"
    secret_file: str = ""
    public_key: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""
    publish_plain: bool = False
    tiers: tuple[Literal["system", "user", "assistant", "pinned"], ...] = ("system", "pinned")
    publish_after: Annotated[int, Meta(ge=1)] = DEFAULT_PUBLISH_AFTER
    budget_bytes_per_day: Annotated[int, Meta(ge=0)] | None = None
    options: dict[str, str] = {}

    @property
    def may_write(self) -> bool:
        """Whether the kind of remote can be published to at all."""
        return urlsplit(self.url).scheme not in MIRROR_SCHEMES


def read_settings(store: Store) -> RemoteSettings | None:
    """The remote that the store uses; None for none.

    Raises:
        RemoteError: A later version wrote what it remembers.
    """
    raw = store.remembered(SETTINGS)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=RemoteSettings)
    except msgspec.MsgspecError as error:
        raise RemoteError(
            "The remote that this store remembers cannot be understood; run `persist-cache remote "
            f"add` again ({error})."
        ) from None


def write_settings(store: Store, settings: RemoteSettings | None) -> None:
    """Have the store remember its remote; None for none.

    Raises:
        RemoteError: They cannot be used; the sentence says why.
        StoreError: The store cannot be changed.
    """
    if settings is not None:
        check_settings(settings)
    raw = None if settings is None else msgspec.json.encode(settings)
    if store.remembered(SETTINGS) != raw:
        store.remember(SETTINGS, raw)


def check_settings(settings: RemoteSettings) -> None:
    """Refuse settings that cannot be used, or that hold a credential.

    Raises:
        RemoteError: The sentence says why.
    """
    if checked_url(settings.url) != settings.url:
        raise RemoteError(f"{settings.url} is not written as `checked_url` writes it.")
    try:
        msgspec.convert(msgspec.to_builtins(settings), RemoteSettings)
    except msgspec.ValidationError as error:
        raise RemoteError(f"The settings of the remote cannot be used ({error}).") from None
    if unknown := sorted(set(settings.options) - set(_OPTIONS)):
        raise RemoteError(
            f"{unknown[0]} is not remembered; give it in the environment. What is remembered: "
            f"{', '.join(_OPTIONS)}."
        )
    if settings.trust == "publisher" and not settings.public_key:
        raise RemoteError("Trust in a publisher needs its public key (--public-key).")
    if settings.publish_plain and not settings.may_write:
        raise RemoteError(
            f"{settings.url} is a mirror, which is only read; publish to the bucket or folder "
            "behind it."
        )


def folder_of(url: str) -> Path | None:
    """The folder that a URL names; None for a remote that is none."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def checked_url(text: str) -> str:
    """The URL of a remote in its one spelling; a path becomes `file://…`.

    Raises:
        RemoteError: It names nothing that can be used, or holds a credential.
    """
    if "://" not in text:
        if not text or "\0" in text:
            raise RemoteError("A remote is a URL such as s3://bucket/prefix, or a folder.")
        return checked_url(Path(text).expanduser().absolute().as_uri())
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        has_user = parts.username is not None or parts.password is not None
    except ValueError as error:
        raise RemoteError(f"{text!r} is not a URL ({error}).") from None
    shown = f"{parts.scheme}://{host}{parts.path}"
    if has_user:
        raise RemoteError(
            f"{shown} holds a user or a password; credentials belong to the environment (for S3 "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )
    if parts.query or parts.fragment:
        raise RemoteError(
            f"{shown} has a query or a fragment; give a bucket and a prefix alone. Credentials "
            "belong to the environment."
        )
    if parts.scheme not in SCHEMES:
        raise RemoteError(
            f"{parts.scheme}:// is no remote; use s3://, gs://, az://, https:// or a folder."
        )
    if parts.scheme == "file":
        if host not in ("", "localhost") or not parts.path.strip("/"):
            raise RemoteError(f"{text} is no folder for a remote; write file:///path.")
        return f"file://{parts.path.rstrip('/')}"
    if not host:
        raise RemoteError(f"{text} names no bucket; write {parts.scheme}://bucket/prefix.")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise RemoteError(
            f"{shown} is not encrypted on its way, so everybody on it could read the prompts; use "
            "https:// (http:// is for this machine only)."
        )
    if ".." in unquote(parts.path).split("/"):
        raise RemoteError(f"{shown} has .. in its prefix; write where it leads.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
