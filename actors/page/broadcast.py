"""Send the page's items to all browsers that have it open.

One task asks the controller, at most ten times a second, and only while a browser is connected. It
encodes what has changed once for all. Nothing is queued for a browser: when it has taken an event,
it gets what has changed since then, as one. So a slow one costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from ...cluster.page_feed.encoding import BEAT, END, event_of
from ...cluster.page_feed.items import FeedRevision, ItemChanges, ItemStore
from ...proto.errors import MoesaicError, Overloaded, describe_error

log = logging.getLogger(__name__)

# Between two questions while they bring news, and while they bring none.
UPDATE_S = 0.1
QUIET_S = 0.3
FAILED_S = 1.0
# What only the ingress knows is read so often.
OWN_S = 1.0
# Without news for so long, an event tells the browser that the connection lives.
BEAT_S = 3.0
MOST_BROWSERS = 32

ControllerItems = Callable[[FeedRevision | None], Awaitable[ItemChanges]]
OwnItems = Callable[[], Awaitable[Mapping[str, Any]]]


class Broadcast:
    """The items, and everybody who watches them; used in one event loop."""

    def __init__(
        self,
        controller: ControllerItems,
        own: OwnItems,
        *,
        clock: Callable[[], float] = time.monotonic,
        update_s: float = UPDATE_S,
    ) -> None:
        """Take the controller's items, and ``own``, the values of `own:` items of this process."""
        self._ask = controller
        self._own = own
        self._clock = clock
        self._update_s = update_s
        # Items of one ingress have a term of their own, so that no browser takes them for others.
        self._store = ItemStore(term=time.time_ns() // 1_000_000)
        self._known: FeedRevision | None = None
        # Revision of browsers -> the event that brings them to the present one.
        self._events: dict[FeedRevision | None, bytes] = {}
        self._news = asyncio.Event()
        self._watching = 0
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def watching(self) -> int:
        """How many browsers are connected."""
        return self._watching

    @property
    def asks(self) -> bool:
        """Whether the task that asks the controller runs."""
        return self._task is not None

    def close(self) -> None:
        """End all streams, with a last event; later ones end at once."""
        self._ended = True
        self._stop()
        self._tell()

    def enter(self) -> None:
        """Take one more browser in. Raises Overloaded when there are too many."""
        if self._watching >= MOST_BROWSERS:
            raise Overloaded(
                f"the page is open in {MOST_BROWSERS} browsers, which is the most; close one"
            )
        self._watching += 1
        if self._task is None and not self._ended:
            self._task = asyncio.create_task(self._run(), name="page")

    def leave(self) -> None:
        """Take note that a browser that had entered is gone."""
        self._watching -= 1
        if not self._watching:
            self._stop()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield events for one browser, which has entered, until `close`."""
        seen: FeedRevision | None = None
        while self._task is not None:
            now = self._store.revision
            if seen != now and now.number:
                event = self._event(seen)
                seen = now
                yield event
                continue
            try:
                await asyncio.wait_for(self._news.wait(), BEAT_S)
            except TimeoutError:
                yield BEAT
        if self._ended:
            yield END

    # ---- the task -------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._follow_controller())
                both.create_task(self._follow_own())
        except Exception:
            # The streams end, and browsers connect anew, which starts a new task.
            log.exception("the page's updates have failed")
            self._task = None
            self._tell()

    async def _follow_controller(self) -> None:
        while True:
            began = self._clock()
            ok = await self._take_news()
            before, told = self._store.revision, self._store.commit()
            if told:
                self._events = {before: event_of(self._store.since(before))}
                self._tell()
            pause_s = (self._update_s if told else max(QUIET_S, self._update_s)) if ok else FAILED_S
            await asyncio.sleep(max(0.0, began + pause_s - self._clock()))

    async def _follow_own(self) -> None:
        """Read what this process knows; the next update carries it."""
        while True:
            self._store.put_group("own:", await self._own())
            await asyncio.sleep(OWN_S)

    async def _take_news(self) -> bool:
        """Ask the controller; return whether it answered."""
        try:
            self._take(await self._ask(self._known))
        except MoesaicError as error:
            self._store.put("link", {"error": str(error)})
        except Exception as error:
            # Whatever it is, the page shows it, and the next round tries again.
            log.exception("the page's items could not be read")
            self._store.put("link", {"error": describe_error(error)})
        else:
            return True
        return False

    def _take(self, changes: ItemChanges) -> None:
        store = self._store
        if changes.since is None:
            gone = [name for name in store.values if not _is_own(name)]
            for name in gone:
                if name not in changes.values:
                    store.remove(name)
        for name in changes.removed:
            store.remove(name)
        for name, value in changes.values.items():
            store.put(name, value)
        self._known = changes.revision
        store.put("link", {"error": None})

    # ---- parts ----------------------------------------------------------------------------------

    def _event(self, seen: FeedRevision | None) -> bytes:
        if seen not in self._events:
            self._events[seen] = event_of(self._store.since(seen))
        return self._events[seen]

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        # They are as large as the model, and nobody reads them.
        self._events = {}


def _is_own(name: str) -> bool:
    return name == "link" or name.startswith("own:")
