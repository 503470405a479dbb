"""What a subscriber needs of a bucket, whichever layout that has: what is announced, and content for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from syncd.index import LocalRow, RemoteRow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from syncd.errors import SyncdError
    from syncd.model import Problem
    from syncd.problems import ProblemBook
    from syncd.progress import Meter
    from syncd.store.base import BucketState

Row = tuple[str, LocalRow | None, RemoteRow | None]
"""One line of a diff: path, what syncd keeps in the mirror, what the bucket announces."""


@dataclass(slots=True)
class PullResult:
    """What one or more rounds did.

    :ivar generation: the number of the generation that the mirror has now, 0 where there is none (objects layout).
    :ivar root: that generation's tree digest.
    """

    placed: int = 0
    removed: int = 0
    downloaded_bytes: int = 0
    reused_bytes: int = 0
    drifted: int = 0
    problems: list[Problem] = field(default_factory=list)
    generation: int = 0
    root: str = ""


@dataclass(slots=True)
class Fetch:
    """One file whose content is to be staged.

    :ivar staged: the name of the staged content, "" while there is none.
    :ivar in_place: what is at the path already, with the content that is wanted.
    :ivar error: why the content could not be had.
    """

    row: RemoteRow
    staged: str = ""
    in_place: LocalRow | None = None
    error: SyncdError | None = None


class Pages(Protocol):
    """The differences between mirror and bucket, a page at a time."""

    async def __call__(self, after: str) -> tuple[list[Row], str | None]:
        """Return the rows of a page and the path to go on after, ``None`` at the end."""
        ...


class Upstream(Protocol):
    """One layout of a bucket, as a mirror sees it."""

    @property
    def problems(self) -> ProblemBook:
        """What is refused."""
        ...

    @property
    def in_doubt(self) -> bool:
        """Whether what the bucket lacks may still come."""
        ...

    @property
    def listing_wanted(self) -> bool:
        """Whether the next full round should read the whole bucket."""
        ...

    async def catch_up(self, state: BucketState, *, full: bool, hinted: int) -> set[str] | None:
        """Bring the ``remote`` half of the index up to the bucket; return what may have changed, ``None`` for all."""
        ...

    def refuses(self, path: str) -> bool:
        """Tell whether the bucket has something for a path that cannot be used: what is in the mirror stays."""
        ...

    def explains(self, path: str) -> bool:
        """Tell whether the bucket says that a path was removed."""
        ...

    def allows(self, path: str) -> bool:
        """Tell whether a person allowed a path's removal at the publisher."""
        ...

    def forget_removals(self) -> None:
        """A round went through: what was explained and allowed is done."""
        ...

    async def gather(
        self, pages: Pages, result: PullResult, meter: Meter, overtaken: Callable[[], Awaitable[bool]]
    ) -> None:
        """Stage what must be there before the first difference is applied.

        :param overtaken: asked now and then whether something newer is announced.
        :raises Overtaken: it is; catch up again.
        """
        ...

    async def fetch(self, rows: list[Row], result: PullResult, meter: Meter) -> dict[str, Fetch]:
        """Return the staged content of one batch; nothing of it is in place yet."""
        ...

    def batch_ended(self) -> None:
        """A batch was applied, or was given up. Blocking."""
        ...


class Overtaken(Exception):
    """What is being gathered is not the newest any more."""
