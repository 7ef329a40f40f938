"""Who may ask: the admin API its token, mlx_lm.server's API an origin and perhaps a key.

Where a request comes from proves nothing: behind a reverse proxy everything comes from loopback.
So the admin API asks for a token, always. A page of another site runs in the browser of somebody
who may reach this server, so its origin is looked at before anything is computed.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from urllib.parse import urlsplit

from msgspec import Struct

from persist_cache.server.validation import RefusedError

PAGE_PATH = "/cache"
METRICS_PATH = "/metrics"
API_PATH = "/v1/cache"
IMPORT_PATH = f"{API_PATH}/import"
HEALTH_PATH = "/health"
MODELS_PATH = "/v1/models"
OUTCOME_HEADER = "x-persist-cache"
IGNORED_HEADER = "x-persist-cache-ignored"
STABILIZE_HEADER = "x-persist-cache-stabilize"
"""Of a request: names of the repairs that may be done to it."""
LOOPBACK_ORIGINS = "loopback"
"""A word for `--allowed-origins`: pages of this machine, on any port."""
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WITHOUT_TOKEN = (
    "Everything under /v1/cache asks for the admin token, also on this machine: send "
    "Authorization: Bearer TOKEN, with the token of the link that `persist-cache serve` prints "
    "when it starts and `persist-cache page` prints at any time, or with that of --admin-token."
)


class Request(Struct, frozen=True):
    """A request as it arrived.

    Attributes:
        method: Such as `GET`.
        target: Path and query as in the request line.
        headers: Its headers.
        local: Address it came to.
        body: Its body, once that was read.
        receive: Reads a body that is too large for that, of at most so many bytes, in pieces.
    """

    method: str
    target: str
    headers: Message
    local: str = "127.0.0.1"
    body: bytes = b""
    receive: Callable[[int], Iterator[bytes]] | None = None

    def upload(self, limit: int) -> Iterator[bytes]:
        """The body piece by piece.

        Raises:
            RefusedError: It makes no sense, is longer than `limit`, or does not arrive.
        """
        if self.receive is None:
            return iter([self.body] if self.body else [])
        return self.receive(limit)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


def owns(target: str) -> bool:
    """Whether a request target belongs to the admin API, the metrics or the page."""
    path = target.partition("?")[0]
    return path in (PAGE_PATH, METRICS_PATH, API_PATH) or path.startswith(API_PATH + "/")


def takes_upload(request: Request) -> bool:
    """Whether a request's body may be too large to be read as a whole."""
    return request.method == "POST" and request.path == IMPORT_PATH


class Guard:
    """Lets requests to the admin API in, or refuses them, by what they know.

    The page at `/cache` holds no data and `/metrics` no text of a prompt: neither asks for the
    token. None of the three answers a page of another site.
    """

    def __init__(self, token: Callable[[], str], host: str) -> None:
        """Guard a server.

        Args:
            token: Tells the secret to ask for; asked at each request.
            host: Name or address that the server was bound to.
        """
        self._token = token
        self._hosts = _LOCAL_NAMES | ({host.lower().strip("[]")} if host else set())

    def check(self, request: Request) -> None:
        """Decide whether a request may be answered, before its body is read.

        Raises:
            RefusedError: It may not.
        """
        self._check_host(request)
        self._check_origin(request)
        if request.path in (PAGE_PATH, METRICS_PATH):
            return
        if not _is_same(_bearer(request.headers), self._token()):
            raise RefusedError(
                401, _WITHOUT_TOKEN, {"WWW-Authenticate": 'Bearer realm="persist-cache"'}
            )

    def _check_host(self, request: Request) -> None:
        """A page of another site must not reach this server through a name of its own."""
        hosts = request.headers.get_all("Host") or []
        if len(hosts) != 1:
            raise RefusedError(400, "The request must have one Host header.")
        name = _host_name(hosts[0])
        if name not in self._hosts and name != request.local.lower():
            raise RefusedError(403, "The admin API does not answer to this Host name.")

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "none")
        # A proxy may have rewritten Host, but a page cannot choose what its browser says here.
        is_own = site == "same-origin" and origin != "null"
        if origin is not None and not (is_own or _is_same_origin(origin, request.headers["Host"])):
            raise RefusedError(403, "The admin API does not answer pages of other sites.")
        if request.path != PAGE_PATH and site not in ("same-origin", "none"):
            raise RefusedError(403, "The admin API does not answer pages of other sites.")


class ModelGuard:
    """Lets requests to mlx_lm.server's own API in, or refuses them before anything is computed.

    By the origin of the page they come from, if they come from one, and by the API key, if the
    server has one. `/health` and preflights need no key.
    """

    def __init__(
        self, allowed_origins: Sequence[str] = (LOOPBACK_ORIGINS,), api_key: str | None = None
    ) -> None:
        """Guard a server.

        Args:
            allowed_origins: Such as `https://chat.example`, `*` for all, or `LOOPBACK_ORIGINS`.
            api_key: Secret to ask for; None for none.
        """
        origins = {one.strip().lower().rstrip("/") for one in allowed_origins}
        self._loopback = LOOPBACK_ORIGINS in origins
        self._origins = origins - {LOOPBACK_ORIGINS}
        self._api_key = api_key

    def check(self, request: Request) -> None:
        """Decide whether a request may be answered, before its body is read.

        Raises:
            RefusedError: It may not.
        """
        origins = request.headers.get_all("Origin") or []
        if not all(map(self.allows, origins)) or len(origins) > 1:
            raise RefusedError(
                403,
                "This server does not answer pages of this origin; --allowed-origins names those "
                "that it does.",
                code="origin_not_allowed",
            )
        site = request.headers.get("Sec-Fetch-Site")
        if not origins and site == "cross-site" and not self._origins:
            raise RefusedError(
                403, "This server does not answer pages of other sites.", code="origin_not_allowed"
            )
        if self._api_key is None or request.method == "OPTIONS" or request.path == HEALTH_PATH:
            return
        bearer = _is_same(_bearer(request.headers), self._api_key)
        header = _is_same(request.headers.get("x-api-key", "").strip(), self._api_key)
        if not (bearer or header):
            raise RefusedError(
                401,
                "This server asks for its API key: send Authorization: Bearer KEY or "
                "x-api-key: KEY.",
                {"WWW-Authenticate": 'Bearer realm="persist-cache"'},
                code="invalid_api_key",
            )

    def allows(self, origin: str) -> bool:
        """Whether pages of `origin` may ask."""
        origin = origin.strip().lower()
        if "*" in self._origins or origin in self._origins:
            return True
        return self._loopback and _is_loopback_origin(origin)

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """What an answer must say for a page of `origin` to read it; nothing where it must not."""
        if "*" in self._origins:
            said = {"Access-Control-Allow-Origin": "*"}
        elif origin is not None and self.allows(origin):
            said = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        else:
            return {"Vary": "Origin"}
        return said | {
            "Access-Control-Allow-Methods": "*",
            # The asterisk does not stand for the first of them.
            "Access-Control-Allow-Headers": "Authorization, x-api-key, *",
            "Access-Control-Expose-Headers": f"{OUTCOME_HEADER}, {IGNORED_HEADER}",
        }


def is_loopback(host: str) -> bool:
    """Whether a server that is bound to `host` can be reached from this machine only."""
    name = host.strip("[]").partition("%")[0].lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _bearer(headers: Message) -> str:
    """The secret in the header `Authorization`; "" when there is none."""
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def _is_same(given: str, secret: str) -> bool:
    """Whether a secret is the right one; the time it takes does not tell where it differs."""
    # Headers arrive as Latin-1; a terminal's secret may be any text.
    return hmac.compare_digest(given.encode("latin-1", "replace"), secret.encode())


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; "" when it is none."""
    try:
        parsed = urlsplit(f"//{host.strip()}")
        _ = parsed.port
    except ValueError:
        return ""
    if parsed.path or parsed.query or parsed.fragment or "@" in parsed.netloc:
        return ""
    return (parsed.hostname or "").rstrip(".")


def _is_same_origin(origin: str, host: str) -> bool:
    scheme, found, rest = origin.strip().partition("://")
    # A proxy in front may speak TLS, so either scheme is ours.
    return bool(found) and scheme in ("http", "https") and rest.lower() == host.strip().lower()


def _is_loopback_origin(origin: str) -> bool:
    scheme, found, rest = origin.partition("://")
    return bool(found) and scheme in ("http", "https") and _host_name(rest) in _LOCAL_NAMES
