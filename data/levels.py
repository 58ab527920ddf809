"""Documents that are found soon after they are appended: a log-structured merge of suffix arrays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from thornback.data.segments import Segment, View
from thornback.data.suffix_array import join

_LARGE = 1 << 18  # tokens of a segment whose merges take long enough that what is new must not wait for them


class Levels:
    """A built part, and behind it the segments of what was appended, each at least twice as large as the next.

    Threads run only while there is work: one sorts what is new and merges it with segments that are small, another one
    merges large ones. Look-ups go on with the view that there is. With `max_tokens`, documents are forgotten, the
    oldest of those that were appended, until at most half as many tokens are left, whenever there are more.
    """

    def __init__(self, built: Segment | None, max_tokens: int | None = None) -> None:
        self._built = () if built is None else (built,)
        self._start = 0 if built is None else len(built)  # where what is appended begins
        self._max_tokens = max_tokens
        self._changed = threading.Condition()
        self._forgets = 0  # how often documents were forgotten: what was begun before is void
        self._documents: list[np.ndarray] = []  # all that were appended, where some will be forgotten
        self._new: list[np.ndarray] = []  # those that are not found yet
        self._segments: list[Segment] = []
        self._threads: dict[str, threading.Thread] = {}
        self._error: BaseException | None = None
        self._closed = False
        self.num_tokens = self.num_documents = 0  # appended and not forgotten
        self.view = View(self._built)

    @property
    def documents(self) -> tuple[np.ndarray, ...]:
        with self._changed:
            return tuple(self._documents)

    def append(self, document: np.ndarray) -> None:
        """`document`: uint32, one token or more."""
        with self._changed:
            self._check()
            if self._max_tokens is not None:
                self._documents.append(document)
            self._new.append(document)
            self.num_tokens += len(document)
            self.num_documents += 1
            if self._max_tokens is not None and self.num_tokens > self._max_tokens:
                self._forget(self._max_tokens // 2)
            self._run("sort", self._sort)

    def wait(self, seconds: float) -> None:
        """Until all that was appended is found."""
        with self._changed:
            done = self._changed.wait_for(lambda: "sort" not in self._threads or self._error, seconds)
            self._check()
        if not done:
            raise TimeoutError(f"The datastore has not sorted what was appended within {seconds:.0f} s.")

    def close(self, seconds: float) -> None:
        """End the threads: what is appended and not found yet is lost."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"The datastore's thread {thread.name} has not ended within {seconds:.0f} s.")

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError("A thread of the datastore failed: what was appended is not found.") from self._error
        if self._closed:
            raise ValueError("The datastore is closed.")

    def _forget(self, max_tokens: int) -> None:
        newest = np.cumsum([len(document) for document in reversed(self._documents)])
        kept = int(np.searchsorted(newest, max_tokens, side="right"))
        self._documents = self._documents[len(self._documents) - kept :]
        self.num_tokens, self.num_documents = sum(map(len, self._documents)), kept
        self._new, self._segments = list(self._documents), []
        self._forgets += 1
        if not kept:
            self._publish([])

    # What the threads do; `_changed` is held where it says so, and not while they sort and merge

    def _run(self, name: str, work: Callable[[], bool]) -> None:
        """See that a thread does this, until it says that nothing is left; `_changed` is held."""

        def run() -> None:
            try:
                while work():
                    pass
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

        if name not in self._threads:
            self._threads[name] = threading.Thread(target=run, name=f"datastore-{name}", daemon=True)
            self._threads[name].start()

    def _end(self, name: str) -> bool:
        """Nothing is left to do; `_changed` is held."""
        del self._threads[name]
        self._changed.notify_all()
        return False

    def _sort(self) -> bool:
        with self._changed:
            if not self._new or self._closed:
                return self._end("sort")
            documents, self._new, forgets = self._new, [], self._forgets
            segments = list(self._segments)
        start = self._start + sum(map(len, segments))
        segment = Segment.of(join(documents), start)
        while segments and len(segments[-1]) < min(_LARGE, 2 * len(segment)):
            segment = segments.pop().merge(segment)
        with self._changed:
            if forgets == self._forgets:
                # The other thread replaces none but large segments, all of which are before these.
                after = segment.start
                self._publish([*(s for s in self._segments if s.start < after), segment])
        return True

    def _merge(self) -> bool:
        with self._changed:
            pair = self._unbalanced()
            if pair is None or self._closed:
                return self._end("merge")
        merged = pair[0].merge(pair[1])
        with self._changed:
            at = next((i for i, s in enumerate(self._segments) if s is pair[0]), None)
            if at is not None:  # they are not forgotten
                self._publish([*self._segments[:at], merged, *self._segments[at + 2 :]])
        return True

    def _unbalanced(self) -> tuple[Segment, Segment] | None:
        """The last two large segments that are to be merged; `_changed` is held."""
        for one, other in reversed(list(pairwise(self._segments))):
            if _LARGE <= len(one) < 2 * len(other) and len(other) >= _LARGE:
                return one, other
        return None

    def _publish(self, segments: list[Segment]) -> None:
        """`_changed` is held."""
        self._segments = segments
        self.view = View((*self._built, *segments))
        if self._unbalanced():
            self._run("merge", self._merge)
