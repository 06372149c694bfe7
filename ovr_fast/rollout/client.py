"""HTTP to one vLLM server or to all of them; every failure is one error that names the server."""

from __future__ import annotations

from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor

import httpx

from ovr_fast.rollout.server import ServerFailed


def check_health(url: str, *, timeout_s: float = 30.0) -> None:
    """Raises ServerFailed if a server that should be running does not answer."""
    try:
        httpx.get(f"{url}/health", timeout=timeout_s).raise_for_status()
    except httpx.HTTPError as error:
        raise ServerFailed(f"{url}/health: {error!r}; is the server running?") from error


def post_control(url: str, path: str, body: dict | None = None, *, timeout_s: float) -> None:
    """A control call (sleep, wake, weight transfer) to one server.

    Raises:
        ServerFailed: the server refused or did not answer in time.
    """
    try:
        httpx.post(f"{url}/{path}", json=body, timeout=timeout_s).raise_for_status()
    except httpx.HTTPStatusError as error:
        raise ServerFailed(f"{url}/{path}: {error.response.text[:300]}") from error
    except httpx.ConnectError as error:
        raise ServerFailed(f"{url}/{path}: {error!r}; is the server running?") from error
    except httpx.HTTPError as error:
        raise ServerFailed(f"{url}/{path}: {error!r}") from error


def post_control_all(
    urls: List[str], path: str, bodies: List[dict | None], *, timeout_s: float
) -> None:
    """A control call to all servers at once. Raises ServerFailed as ``post_control``."""

    def post(url: str, body: dict | None) -> None:
        post_control(url, path, body, timeout_s=timeout_s)

    with ThreadPoolExecutor(max_workers=len(urls)) as pool:
        list(pool.map(post, urls, bodies))


async def post_completion(client: httpx.AsyncClient, url: str, body: dict) -> dict:
    """A server's answer to one chat completion request.

    Raises:
        ServerFailed: the server refused, went away, or did not answer within the client's time.
    """
    path = f"{url}/v1/chat/completions"
    try:
        answer = await client.post(path, json=body)
    except httpx.TimeoutException as error:
        raise ServerFailed(
            f"{path} did not answer within rollout.request_timeout_s={client.timeout.read:.0f} s"
        ) from error
    except httpx.HTTPError as error:
        raise ServerFailed(f"{path}: {error!r}; is the server running?") from error
    if answer.status_code != 200:
        raise ServerFailed(f"{path} refused a request: {answer.text[:500]}")
    return answer.json()
