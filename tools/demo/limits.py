"""How often one address may call."""

import collections
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Callable[[Scope], Awaitable[None]]], Awaitable]

# What costs work: uploads and calls of the model.
_COUNTED = ("/upload", "/queue/join", "/call/", "/run/")
_MOST_ADDRESSES = 10_000


class RateLimit:
  """ASGI middleware: answers 429 to who asks too often.

  Args:
    app: what is limited.
    per_minute: most calls of one address in any sixty seconds.
    clock: seconds, for tests.
  """

  def __init__(
    self,
    app: App,
    *,
    per_minute: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._app, self._per_minute, self._clock = app, per_minute, clock
    self._times: collections.OrderedDict[str, collections.deque] = (
      collections.OrderedDict()
    )

  async def __call__(self, scope: Scope, receive, send) -> None:
    counted = (
      scope["type"] == "http"
      and scope["method"] == "POST"
      and any(part in scope["path"] for part in _COUNTED)
    )
    if counted and not self._admit(scope["client"][0]):
      message = (
        f'{{"detail": "more than {self._per_minute} calls a minute; wait a '
        'moment."}'
      )
      await send(
        {
          "type": "http.response.start",
          "status": 429,
          "headers": [(b"content-type", b"application/json")],
        }
      )
      await send({"type": "http.response.body", "body": message.encode()})
      return
    await self._app(scope, receive, send)

  def _admit(self, address: str) -> bool:
    now = self._clock()
    times = self._times.setdefault(address, collections.deque())
    self._times.move_to_end(address)
    while len(self._times) > _MOST_ADDRESSES:
      self._times.popitem(last=False)
    while times and now - times[0] >= 60:
      times.popleft()
    if len(times) >= self._per_minute:
      return False
    times.append(now)
    return True
