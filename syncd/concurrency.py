"""Small tools for waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def run_together(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Run all until one of them ends or fails, then cancel the others and wait for them.

    Unlike a bare TaskGroup it raises the first failure itself, not an ExceptionGroup around it.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
