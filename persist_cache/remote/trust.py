"""Who vouches for what lies on a remote: the holders of a shared secret, or one publisher.

The secret also makes the names, so that nobody else can tell from a name what it stands for. Where
there is no secret, the publisher's public key takes its place there.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from persist_cache import fs
from persist_cache.errors import MissingDependencyError, RemoteError
from persist_cache.remote.keys import Keys

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096
SECRET_VARIABLE = "PERSIST_CACHE_REMOTE_SECRET"
SECRET_FILE_VARIABLE = "PERSIST_CACHE_REMOTE_SECRET_FILE"


class Seal(Protocol):
    """Vouches for manifests.

    Thread safety: immutable.
    """

    nbytes: int
    """Length of what `sign` makes."""

    @property
    def can_sign(self) -> bool:
        """Whether this machine may publish."""

    def sign(self, said: bytes, /) -> bytes:
        """Vouch for some bytes."""

    def vouches_for(self, said: bytes, signature: bytes, /) -> bool:
        """Whether `sign` made `signature` of these bytes, on whichever machine."""


class SharedSeal:
    """The seal of all who have the secret: a keyed BLAKE2b-256."""

    nbytes = 32
    can_sign = True

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, said: bytes, /) -> bytes:
        return hashlib.blake2b(said, key=self._key, digest_size=self.nbytes).digest()

    def vouches_for(self, said: bytes, signature: bytes, /) -> bool:
        return hmac.compare_digest(self.sign(said), signature)


class PublisherSeal:
    """The seal of one publisher: an Ed25519 signature."""

    nbytes = 64

    def __init__(self, public_key: bytes, private_key: bytes | None) -> None:
        """Take the keys.

        Raises:
            RemoteError: They are no keys, or do not belong together.
        """
        ed25519 = _ed25519()
        try:
            self._public = ed25519.Ed25519PublicKey.from_public_bytes(public_key)
            self._private = (
                None
                if private_key is None
                else ed25519.Ed25519PrivateKey.from_private_bytes(private_key)
            )
        except ValueError:
            raise RemoteError("That is no Ed25519 key: one has 64 hex digits.") from None
        if self._private is not None:
            mine = self._private.public_key().public_bytes_raw()
            if mine != public_key:
                raise RemoteError("The publisher's private key does not fit the public key.")

    @property
    def can_sign(self) -> bool:
        return self._private is not None

    def sign(self, said: bytes, /) -> bytes:
        if self._private is None:
            raise RemoteError(
                "Only the publisher can publish here; its private key is not on this machine."
            )
        return bytes(self._private.sign(said))

    def vouches_for(self, said: bytes, signature: bytes, /) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(signature, said)
        except InvalidSignature:
            return False
        return True


def open_trust(trust: str, secret_file: str, public_key: str) -> tuple[Keys, Seal]:
    """The names and the seal of a remote.

    Args:
        trust: `secret` or `publisher`.
        secret_file: Where the secret or the private key is; "" for the environment.
        public_key: The publisher's, in hex.

    Raises:
        RemoteError: There is no secret, or it is too short.
        MissingDependencyError: The extra `remote` is not installed.
    """
    raw = _read_secret(secret_file)
    if trust == "publisher":
        public = bytes.fromhex(public_key)
        return Keys(b"publisher\0" + public), PublisherSeal(public, _private_key(raw))
    if raw is None:
        raise RemoteError(
            "A remote needs the secret that its machines share: give --remote-secret-file, or set "
            f"{SECRET_FILE_VARIABLE} or {SECRET_VARIABLE}."
        )
    if len(raw) < MIN_SECRET_BYTES:
        raise RemoteError(
            f"The remote's secret has {len(raw)} bytes and needs at least {MIN_SECRET_BYTES}; "
            "`persist-cache remote add` makes a good one."
        )
    keys = Keys(b"secret\0" + raw)
    return keys, SharedSeal(keys.seal_key)


def _private_key(raw: bytes | None) -> bytes | None:
    if raw is None:
        return None
    try:
        return bytes.fromhex(raw.decode("ascii"))
    except ValueError:
        raise RemoteError("That is no Ed25519 key: one has 64 hex digits.") from None


def _read_secret(secret_file: str) -> bytes | None:
    """The secret without white space around it; None where none was given."""
    text = os.environ.get(SECRET_VARIABLE)
    path = secret_file or os.environ.get(SECRET_FILE_VARIABLE, "")
    if not path:
        return text.strip().encode() if text else None
    try:
        with open(Path(path).expanduser(), "rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise RemoteError(f"The secret in {path} cannot be read ({error.strerror}).") from None
    if len(raw) > MAX_SECRET_BYTES:
        raise RemoteError(
            f"{path} has more than {MAX_SECRET_BYTES} bytes; that is no file with a secret."
        )
    return raw.strip()


def default_secret_path() -> Path:
    """Where `remote add` puts a new secret: the user's folder for settings."""
    import platformdirs

    return Path(platformdirs.user_config_dir("persist-cache")) / "remote.secret"


def make_secret(path: Path) -> str:
    """Write a new shared secret into the new file `path`, which only its owner can read.

    Returns:
        The secret, to be given to the other machines.

    Raises:
        RemoteError: There is a file already, or it cannot be written.
    """
    secret = secrets.token_urlsafe(32)
    _write_new(path, secret)
    return secret


def make_publisher_key(path: Path) -> str:
    """Write a new Ed25519 private key into the new file `path`, which only its owner can read.

    Returns:
        The public key, 64 hex digits, to be given to those who read a mirror.

    Raises:
        RemoteError: There is a file already, or it cannot be written.
        MissingDependencyError: The extra `remote` is not installed.
    """
    key = _ed25519().Ed25519PrivateKey.generate()
    _write_new(path, key.private_bytes_raw().hex())
    return str(key.public_key().public_bytes_raw().hex())


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise missing_extra() from None
    return ed25519


def missing_extra() -> MissingDependencyError:
    """What is said where the packages of the extra are not installed."""
    return MissingDependencyError(
        "A remote needs further packages; install them with: pip install 'persist-cache[remote]'"
    )


def _write_new(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=fs.FOLDER_MODE, parents=True, exist_ok=True)
        fd = fs.create(path)
        try:
            fs.write_all(fd, [memoryview(text.encode() + b"\n")])
            fs.sync(fd)
        finally:
            os.close(fd)
    except FileExistsError:
        raise RemoteError(
            f"{path} is there already and is not replaced; use it, or name another file."
        ) from None
    except OSError as error:
        raise RemoteError(f"{path} cannot be written ({error.strerror}).") from error
