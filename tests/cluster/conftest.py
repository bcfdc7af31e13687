"""A Ray cluster of two nodes on this machine, with a CPU each."""

from collections.abc import Iterator
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from dspy_fst.cluster.connecting import sigterm_as_before

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
"""A node's CPUs, and the bytes of its object store: the least that Ray takes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with sigterm_as_before():
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.add_node(**NODE)
    yield made
    made.shutdown()
