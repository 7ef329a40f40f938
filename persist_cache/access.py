"""Who may ask the admin API, the metrics and the page.

Whoever is on loopback, or knows the token, and never another site's page in a browser: prompts can
be told from what they answer.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from persist_cache.incoming import RefusedError

PAGE_PATH = "/cache"
METRICS_PATH = "/metrics"
API_PATH = "/v1/cache"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_FORWARDING_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it arrived.

    Attributes:
        method: Such as `GET`.
        target: Path and query as in the request line.
        headers: Its headers.
        peer: Address it came from.
        local: Address it came to.
        body: Its body, once that was read.
    """

    method: str
    target: str
    headers: Message
    peer: str
    local: str = "127.0.0.1"
    body: bytes = b""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


def owns(target: str) -> bool:
    """Whether a request target belongs to the admin API, the metrics or the page."""
    path = target.partition("?")[0]
    return path in (PAGE_PATH, METRICS_PATH, API_PATH) or path.startswith(API_PATH + "/")


class Guard:
    """Lets requests in or refuses them, by where they come from and what they know."""

    def __init__(self, token: str | None, host: str) -> None:
        """Guard a server.

        Args:
            token: Secret to ask for; None lets loopback in without one, and nobody else.
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
        if request.path == PAGE_PATH and self._token is not None:
            return  # the page holds no data; it asks for the token itself
        if self._token is None:
            if not _is_loopback(request.peer) or any(
                request.headers.get(name) for name in _FORWARDING_HEADERS
            ):
                raise RefusedError(
                    403,
                    "Without --admin-token the admin API answers requests from this machine only.",
                )
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        secret = given.strip().encode("latin-1", "replace")
        # Both are compared even if the scheme is wrong, so that time tells nothing.
        right = hmac.compare_digest(secret, self._token.encode())
        if not right or scheme.lower() != "bearer":
            raise RefusedError(
                401,
                "The admin API asks for its token: send Authorization: Bearer TOKEN.",
                {"WWW-Authenticate": 'Bearer realm="persist-cache"'},
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
        if origin is not None and not _is_same_origin(origin, request.headers["Host"]):
            raise RefusedError(403, "The admin API does not answer pages of other sites.")
        site = request.headers.get("Sec-Fetch-Site", "none")
        if request.path != PAGE_PATH and site not in ("same-origin", "none"):
            raise RefusedError(403, "The admin API does not answer pages of other sites.")


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


def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
