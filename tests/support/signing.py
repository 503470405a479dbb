"""Signing at once what is there, as a person does who has looked at it: for tests that are about something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.records import generation_to_sign, sign_record

if TYPE_CHECKING:
    from syncd.channels import Channels
    from syncd.signatures import Signer
    from syncd.store.base import Bucket


async def sign_generation(bucket: Bucket, number: int, signer: Signer) -> bool:
    """Add a signature to a generation; tell whether it is new."""
    return await sign_record(bucket, await generation_to_sign(bucket, number), signer)


async def sign_move(channels: Channels, channel: str, signer: Signer) -> bool:
    """Add a signature to a channel's present move; tell whether it is new."""
    _, move = await channels.to_sign(channel)
    return await channels.sign(move, signer)
