"""Fixtures: `cluster` is shared by the tests of a module and must be idle after each of them;
`start` makes clusters that a test may break."""

import json

import pytest

from cluster import GOLDEN, Cluster

DEFAULT_FLAGS = ("--mtp-step", "2", "--max-total-token-num", "65536")


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDEN / "golden.json").read_text())["cases"]


@pytest.fixture(scope="module")
def shared_cluster():
    with Cluster(*DEFAULT_FLAGS) as c:
        yield c


@pytest.fixture
def cluster(shared_cluster):
    yield shared_cluster
    shared_cluster.wait_idle()
    shared_cluster.wait_connections_closed()


@pytest.fixture
def start():
    """start(*flags, **kw) -> a ready Cluster. At the end everything must be idle, unless the test
    says cluster.broken = True."""
    clusters = []

    def begin(*flags, wait=True, **kw):
        c = Cluster(*flags, **kw)
        c.broken = not wait
        clusters.append(c)
        return c.ready() if wait else c

    yield begin
    try:
        for c in clusters:
            if not c.broken:
                c.wait_idle(5)
    finally:
        for c in clusters:
            c.close()
