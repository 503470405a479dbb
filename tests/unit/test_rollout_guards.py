"""Generations on their way into place: what one condition of :mod:`syncd.rollout` guards against, each by itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from syncd.channels import Channels
from syncd.checkout import Held
from syncd.keysets import KeyChange
from syncd.modes import ModePolicy
from syncd.rollout import Rollout, RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryBucket
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.unit.test_guard_attacks import Host, failing
from tests.unit.test_rollout import MODES, Site

if TYPE_CHECKING:
    from pathlib import Path


class RuledSite(Site):
    """The mirror's rules may change."""

    rules = Rules()

    def subscriber(self, report: Any = lambda _: None) -> Subscriber:
        options = SubscribeOptions("app", self.root, self.rules, rollout=self.options, **self.extra)
        status = StatusKeeper(FolderStatus("subscribe", "app", str(self.root)), clock=time.time, report=report)
        index = self.tmp / "state" / "index.db"
        index.parent.mkdir(exist_ok=True)
        return Subscriber(options, self.store, index, status=status)

    async def rollback(self, number: int) -> None:
        await Channels(self.store.bucket("app"), time.time).rollback("head", to=number, who="me", why="")

    @property
    def current(self) -> str:
        return (self.root / "current").resolve().name


@pytest.fixture
def site(tmp_path: Path) -> RuledSite:
    return RuledSite(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# -- releases that are kept --------------------------------------------------------------------------------------------


@pytest.mark.fault("R1", "R7")
async def test_the_release_to_go_back_to_is_kept_while_a_failed_one_is_in_place(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is removed, so its release is not gone back to, but kept beyond ``keep_releases``; then the key is back."""
    host.rollout = replace(failing("release"), keep_releases=1)
    await host.push("good")
    await host.pull()
    await host.drop(host.signer, by=host.other)
    host.publish["signer"] = host.other
    await host.push("clean, and fails")
    for _ in range(3):
        with pytest.raises(Held, match="not gone back to"):
            await host.pull()
        assert sorted(path.name[:2] for path in (host.mirror / "releases").iterdir()) == ["1-", "2-"]
    assert host.has() == "clean, and fails"
    await host.change(KeyChange(add=(host.signer.public,)), host.other)
    monkeypatch.setattr(MemoryBucket, "get_blobs", None)
    with pytest.raises(Held):
        await host.pull()
    assert host.has() == "good"


@pytest.mark.fault("R7")
async def test_a_release_that_was_built_under_other_rules_is_not_gone_back_to(site: RuledSite) -> None:
    """The mirror's rules change between two generations, then the channel goes back: what they leave out stays out."""
    site.options = replace(site.options, mode="release", keep_releases=3)
    await site.push(a="one", b="not wanted any more")
    await site.pull()
    await site.push(a="two")
    await site.pull()
    site.rules = Rules([], ["b"])
    await site.rollback(1)
    assert (await site.pull()).generation == 1
    assert site.files() == {"a": "one"}
    built = site.current
    assert built == site.releases()[1]
    assert [name[:2] for name in site.releases()] == ["1-", "1-", "2-"]
    await site.rollback(2)
    await site.pull()
    assert site.files() == {"a": "two"}
    await site.rollback(1)
    await site.pull()
    assert (site.files(), site.current) == ({"a": "one"}, built)  # one of these rules is


async def test_of_several_releases_of_one_generation_the_newest_is_kept(site: RuledSite) -> None:
    """The same generation was built twice, under other rules; ``keep_releases`` is lowered, and one of them is left."""
    site.options = replace(site.options, mode="release", keep_releases=3)
    await site.push(a="one", b="not wanted any more")
    await site.pull()
    await site.push(a="two")
    await site.pull()
    site.rules = Rules([], ["b"])
    await site.rollback(1)
    await site.pull()
    assert len(site.releases()) == 3
    site.options = replace(site.options, keep_releases=1)
    await site.pull()
    assert site.releases() == [site.current]


# -- hooks -------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.fault("R1")
async def test_what_was_gone_back_to_is_not_refused_whatever_its_hooks_say(site: RuledSite, mode: Any) -> None:
    """The hook fails for the new generation, and for the one before, too: something else is broken on this host."""
    site.options = replace(site.options, mode=mode, apply=site.says("apply", f"! test -e {site.tmp}/broken"))
    await site.push(a="one", b="b")
    await site.pull()
    (site.tmp / "broken").touch()
    await site.push(a="two")
    for _ in range(2):
        with pytest.raises(Held, match="generation 2 of 'app' is held back: apply hook: exit code 1"):
            await site.pull()
        assert site.files() == {"a": "one", "b": "b"}
        assert site.told() == ["apply 1 after none", "apply 2 after 1", "apply 1 after 2"]
    await site.rollback(1)
    assert (await site.pull()).generation == 1
    assert site.files() == {"a": "one", "b": "b"}


@MODES
async def test_a_change_of_the_mirrors_rules_is_no_new_generation(site: RuledSite, mode: Any) -> None:
    """What the generation has more or less for it comes and goes in place; neither check nor apply is asked."""
    site.options = replace(site.options, mode=mode, check=site.says("check"), apply=site.says("apply"))
    site.rules = Rules([], ["b"])
    await site.push(a="one", b="more")
    await site.pull()
    assert (site.files(), len(site.told())) == ({"a": "one"}, 2)
    site.rules = Rules()
    assert (await site.pull()).generation == 1
    assert (site.files(), len(site.told())) == ({"a": "one", "b": "more"}, 2)


# -- what is built from ------------------------------------------------------------------------------------------------


@pytest.mark.fault("S1", "O7")
async def test_a_file_that_changes_while_a_release_is_built_from_it_is_had_from_the_bucket(
    site: RuledSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes into the current release between the look at it and the building of the next one."""
    site.options = RolloutOptions(mode="release", modes=ModePolicy(read_only=True))
    await site.push(a="one", same="the same in both")
    await site.pull()
    await site.push(a="two")
    real = Rollout.release
    times: list[None] = []

    async def release(self: Rollout, *arguments: Any) -> None:
        if not times:
            path = site.tree / "same"
            path.chmod(0o644)
            path.write_text("forged")
        times.append(None)
        await real(self, *arguments)

    monkeypatch.setattr(Rollout, "release", release)
    assert (await site.pull()).generation == 2
    assert site.files() == {"a": "two", "same": "the same in both"}
    assert len(times) == 2
