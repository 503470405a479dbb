"""Settings -> plain values: the door at which settings end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from syncd.errors import ConfigError
from syncd.modes import parse_modes
from syncd.outlet import PublishOptions
from syncd.paths import printable
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.settings import parse_owner
from syncd.signatures import Signer
from syncd.store.address import ConnectionOptions
from syncd.store.base import BucketSpec
from syncd.subscriber import SubscribeOptions
from syncd.trust import Trust

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.settings import PublishSettings, Settings, SubscribeSettings

MAX_SEED_BYTES: Final = 256


def connection_options(settings: Settings) -> ConnectionOptions:
    """Return how to reach the server."""
    nats = settings.nats
    return ConnectionOptions(
        servers=nats.servers,
        name=f"syncd {settings.daemon.host}",
        creds_file=_text(nats.creds_file),
        nkey_seed_file=_text(nats.nkey_seed_file),
        user=nats.user,
        password=nats.password.get_secret_value(),
        password_file=_text(nats.password_file),
        token_file=_text(nats.token_file),
        tls_ca_file=_text(nats.tls.ca_file),
        tls_cert_file=_text(nats.tls.cert_file),
        tls_key_file=_text(nats.tls.key_file),
        tls_server_name=nats.tls.server_name,
        tls_handshake_first=nats.tls.handshake_first,
        domain=nats.domain,
        api_prefix=nats.prefix,
        inbox_prefix=nats.inbox_prefix,
    )


def publish_options(settings: Settings, item: PublishSettings) -> PublishOptions:
    """Return one folder to publish."""
    bucket = item.bucket
    return PublishOptions(
        folder=item.folder,
        path=item.path,
        rules=Rules(item.include, item.exclude),
        publisher=f"{settings.daemon.host}:{item.path}",
        bucket=BucketSpec(
            description=bucket.description,
            storage=bucket.storage,
            replicas=bucket.replicas,
            max_bytes=bucket.max_bytes,
            ttl_seconds=bucket.ttl_seconds,
            placement_cluster=bucket.placement.cluster,
            placement_tags=bucket.placement.tags,
            compression=bucket.compression,
            metadata=dict(bucket.metadata),
            layout=item.layout,
        ),
        layout=item.layout,
        compress=item.compression == "auto",
        keep_generations=item.keep_generations,
        keep_days=item.keep_days,
        symlinks=item.symlinks,
        settle_seconds=item.settle_ms / 1000,
        rescan_seconds=item.rescan_seconds,
        max_delete_percent=item.max_delete_percent,
        grace_seconds=item.grace_seconds,
        metadata=dict(item.metadata),
        signer=read_signer(item.sign_seed_file) if item.sign_seed_file is not None else None,
        expire_seconds=item.expire_hours * 3600,
    )


def read_signer(file: Path) -> Signer:
    """Read a signing key. Blocking, briefly.

    :raises ConfigError: the file cannot be read, or holds no seed; the message does not show what it holds.
    """
    shown = printable(str(file))
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_SEED_BYTES)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}", hint="check its owner and mode") from error
    try:
        return Signer(text.decode("ascii").strip())
    except ValueError:
        raise ConfigError(f"{shown}: holds no seed of a user nkey (SU…)", hint="make one: syncd keygen FILE") from None


def subscribe_options(item: SubscribeSettings) -> SubscribeOptions:
    """Return one mirror to keep."""
    return SubscribeOptions(
        folder=item.folder,
        path=item.path,
        rules=Rules(item.include, item.exclude),
        drift=item.drift,
        owner=parse_owner(item.owner) if item.owner else None,
        settle_seconds=item.settle_ms / 1000,
        rescan_seconds=item.rescan_seconds,
        channel=item.channel,
        pin=item.pin,
        trust=Trust(frozenset(item.trusted_keys), item.trusted_threshold) if item.trusted_keys else None,
        extraneous=item.extraneous,
        verify_rate=item.verify_rate,
        rollout=rollout_options(item),
    )


def rollout_options(item: SubscribeSettings) -> RolloutOptions:
    """Return how one mirror brings generations into place."""
    release = item.mode == "release"
    hooks = item.hooks
    return RolloutOptions(
        mode=item.mode,
        modes=replace(parse_modes(item.modes), read_only=release and item.read_only),
        keep_releases=item.keep_releases,
        share=item.share,
        check=hooks.check,
        apply=hooks.apply,
        health=hooks.health,
        timeout=hooks.timeout_seconds,
        health_seconds=hooks.health_seconds,
        max_failures=hooks.max_failures,
    )


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)
