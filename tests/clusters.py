"""A Redis Cluster of real Valkeys, for tests."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from redis import Redis

from extproc.local.valkey import LocalValkey, free_port


def start_cluster(directory: Path, stack: ExitStack) -> list[LocalValkey]:
    """Three primaries that share the slots."""
    nodes = []
    for name in "abc":
        config = {"cluster-enabled": "yes", "cluster-port": str(free_port()), "cluster-node-timeout": "2000"}
        nodes.append(stack.enter_context(LocalValkey(directory / name, port=free_port(), config=config)))
    clients = [stack.enter_context(Redis.from_url(node.url)) for node in nodes]
    for place, client in enumerate(clients):
        client.execute_command("CLUSTER ADDSLOTSRANGE", 16_384 * place // 3, 16_384 * (place + 1) // 3 - 1)
        bus_port = client.config_get("cluster-port")["cluster-port"]
        clients[0].execute_command("CLUSTER MEET", "127.0.0.1", nodes[place].port, bus_port)
    while any(len(client.execute_command("CLUSTER SLOTS")) < 3 for client in clients) or any(
        client.execute_command("CLUSTER INFO")["cluster_state"] != "ok" for client in clients
    ):
        time.sleep(0.02)
    return nodes
