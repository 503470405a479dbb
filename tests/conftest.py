"""Fixtures that every level shares."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from tests import faults
from tests.support.server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    """A command that runs within a test configures the logs of the whole process: not those of the tests after it."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A fresh nats-server with JetStream for one test."""
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for all tests that only need a bucket of their own."""
    server = NatsServer(tmp_path_factory.mktemp("nats-shared")).start()
    try:
        yield server
    finally:
        server.stop()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-results", metavar="FILE", help="write the results of fault tests, for tests/faults.py")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--fault-results")
    if file and not hasattr(config, "workerinput"):  # with xdist, the reports of all workers arrive in one process
        config.pluginmanager.register(faults.ResultWriter(Path(file)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each report say which faults its test provokes."""
    for item in items:
        ids = [one for mark in item.iter_markers(faults.IDS) for one in faults.split_ids(mark.args)]
        if ids:
            item.user_properties.append((faults.IDS, " ".join(ids)))
    items[:] = spread(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def spread(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order tests so that each worker begins with its share of the slow ones: at the end all have something to do.

    ``--dist worksteal`` gives each worker one stretch of the list, and later takes from the ends of the others'.
    """
    if workers < 2:
        return items
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = iter([item for item in items if not item.get_closest_marker("slow")])
    ordered: list[pytest.Item] = []
    for number in range(workers):
        mine = slow[number::workers]
        size = (len(items) - len(ordered)) // (workers - number)
        ordered += [*mine, *islice(quick, max(0, size - len(mine)))]
    return [*ordered, *quick]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report travel between processes: what a test logged may hold undecodable names."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    faults.count_runs(report, getattr(item, "hypothesis_statistics", ""))
    return report
