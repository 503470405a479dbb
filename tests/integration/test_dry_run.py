"""``syncd gc --dry-run``, the one command with a dry run, writes nothing: not to the bucket, not beside the index."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import click
import pytest

from syncd import cli, cli_channels
from syncd.errors import EXIT_CONFIG, EXIT_OK
from syncd.store.bucket import NatsStore
from tests.support.pair import publisher_of
from tests.support.store import connected, raw_client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import NatsServer

FOLDER = '[[publish]]\nfolder = "app"\npath = "{source}"\nkeep_generations = 1\ngrace_seconds = 1\n'


async def streams(url: str) -> dict[str, Any]:
    """What a server has: name -> configuration and state of each stream."""
    async with raw_client(url) as client:
        answer = json.loads((await client.request("$JS.API.STREAM.LIST", b"", timeout=5)).data)
        return {
            one["config"]["name"]: (one["config"], one["state"]["last_seq"], one["state"]["messages"])
            for one in answer["streams"] or ()
        }


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def configured(directory: Path, url: str) -> Path:
    source = directory / "source"
    source.mkdir(exist_ok=True)
    file = directory / "syncd.toml"
    head = f'[nats]\nservers = ["{url}"]\n[daemon]\nstate_dir = "{directory / "state"}"\n'
    file.write_text(head + FOLDER.format(source=source))
    return file


async def run(config: Path, *arguments: str) -> int:
    """One command, which runs a loop of its own."""
    return await asyncio.to_thread(cli.run, [*arguments, "--config", str(config)])


def test_gc_is_the_only_command_with_a_dry_run() -> None:
    """A new one belongs into this file."""

    def walk(command: click.Command, name: str) -> list[str]:
        if isinstance(command, click.Group):
            return [found for key, one in command.commands.items() for found in walk(one, f"{name} {key}")]
        dry = [option for option in command.params if re.search("dry|no-act|pretend", " ".join(option.opts))]
        return [name.strip()] if dry else []

    assert cli_channels.__name__  # with its commands
    assert walk(cli.cli, "") == ["gc"]


@pytest.mark.fault("U4")
async def test_a_dry_collection_changes_nothing(
    tmp_path: Path, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """`syncd gc --dry-run` is run twice on a folder with two generations, and blobs, to be freed.

    Every stream, and every byte of source and state, is as before; a real one then frees.
    """
    config = configured(tmp_path, nats_server.url)
    for number in range(3):
        (tmp_path / "source/f").write_text(f"version {number}")
        assert await run(config, "push", "app") == EXIT_OK
    await asyncio.sleep(1.2)  # the grace time
    before = await streams(nats_server.url), files(tmp_path)
    capsys.readouterr()
    for _ in range(2):
        assert await run(config, "gc", "app", "--dry-run", "--json") == EXIT_OK
        told = json.loads(capsys.readouterr().out)
        assert (told["generations_removed"], told["generations_kept"]) == (2, 1)
        assert told["freed_blobs"] > 0
        assert (await streams(nats_server.url), files(tmp_path)) == before
    assert await run(config, "gc", "app") == EXIT_OK
    assert await streams(nats_server.url) != before[0]


@pytest.mark.fault("U4")
async def test_a_dry_collection_makes_marks_and_claims_nothing(
    tmp_path: Path, nats_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """`syncd gc --dry-run` meets no bucket, one of another client, and one of another publisher.

    Each is only looked at: nothing is made, marked or claimed, and no stream changes.
    """
    config = configured(tmp_path, nats_server.url)
    assert await run(config, "gc", "app", "--dry-run") != EXIT_OK
    assert "'app' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
    assert await streams(nats_server.url) == {}
    async with raw_client(nats_server.url) as client:
        await (await client.jetstream().create_object_store("app")).put("theirs", b"x")
    before = await streams(nats_server.url)
    assert await run(config, "gc", "app", "--dry-run") == EXIT_CONFIG
    assert "has no generations" in capsys.readouterr().err
    assert await streams(nats_server.url) == before
    async with raw_client(nats_server.url) as client:
        await client.jetstream().delete_object_store("app")
    (tmp_path / "other").mkdir()
    async with connected(nats_server.url) as connection:
        await publisher_of(NatsStore(connection), tmp_path / "other").push()
    before = await streams(nats_server.url)
    assert await run(config, "gc", "app", "--dry-run") == EXIT_OK
    assert await streams(nats_server.url) == before
