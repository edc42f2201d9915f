"""Where the gateway may listen. Imports nothing heavy: the command line asks here before anything is started."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from scheduler.errors import Rejected

DEFAULT_PORT = 11535


def is_loopback(host: str) -> bool:
    """Whether `host` (a name, or an address with or without brackets) stays on this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_keys: Mapping[str, str]) -> None:
    """Raises Rejected where listening on `host` would open the gateway to others without a key. `api_keys`: by name."""
    if not all(key.strip() for key in api_keys.values()):
        raise Rejected("the API key is empty: set ARRIERO_API_KEY to a long random text, or unset it")
    if not api_keys and not is_loopback(host):
        raise Rejected(
            f"listening on {host} needs an API key: without one, any client could use its models. "
            "Set --api-key or ARRIERO_API_KEY, or listen on 127.0.0.1 (the default)"
        )
