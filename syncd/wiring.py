"""Settings -> plain values: the door at which settings end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.outlet import PublishOptions
from syncd.rules import Rules
from syncd.settings import parse_owner
from syncd.store.base import BucketSpec
from syncd.store.connection import ConnectionOptions
from syncd.subscriber import SubscribeOptions

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.settings import PublishSettings, Settings, SubscribeSettings


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
    )


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
    )


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)
