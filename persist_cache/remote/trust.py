"""Who vouches for what lies on a remote: the holders of a shared secret, or one publisher.

The secret also makes the names, so that nobody else can tell from a name what it stands for. Where
there is no secret, the publisher's public key takes its place there.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from persist_cache import fs
from persist_cache.errors import MissingDependencyError, RemoteError

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096
SECRET_VARIABLE = "PERSIST_CACHE_REMOTE_SECRET"
SECRET_FILE_VARIABLE = "PERSIST_CACHE_REMOTE_SECRET_FILE"


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
        path.parent.mkdir(parents=True, exist_ok=True)
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
