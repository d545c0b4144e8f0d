"""The verb about a cluster: nodes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import Verbs, argument

VERBS = Verbs()
_RESOURCES = "/apis/resource.k8s.io/v1"
_FEW = 3  # namespaces named in a row


@VERBS.add(
    "show the memory that a Kubernetes cluster's nodes offer, and who has claimed it; kubectl names the cluster",
    argument("--by", choices=("node", "namespace", "claim"), default="node",
             help="a row for each device of a node (default), each namespace, or each claim"),
    argument("--driver", metavar="NAME", default="memory.gmemd.example", help="that of gmemd-dra (%(default)s)"),
    examples=("nodes", "nodes --by namespace", "nodes --by claim -o json"))
def nodes(connection: Connection, options: Namespace) -> int:
    from gmemd.cli.cluster import Cluster
    from gmemd.kubernetes.fleet import Fleet

    fleet = Fleet(options.driver)
    with Cluster(options.timeout) as cluster:
        fleet.read_slices(cluster.list(f"{_RESOURCES}/resourceslices", fieldSelector=f"spec.driver={options.driver}"))
        fleet.read_claims(cluster.list(f"{_RESOURCES}/resourceclaims"))
    rows = {"node": fleet.by_node, "namespace": fleet.by_namespace, "claim": fleet.by_claim}[options.by]()
    if not connection.for_people:
        connection.show(rows)
    elif not rows:
        print(f"nothing of the driver '{options.driver}' is {'offered' if options.by == 'node' else 'claimed'}")
    else:
        render.show({"node": _of_nodes, "namespace": _of_namespaces, "claim": _of_claims}[options.by](rows))
    for name, (there, wanted) in sorted(fleet.incomplete.items()):
        note(f"node '{name}' has published {there} of {wanted} slices: nothing is allocated there until it has")
    return DONE


def _of_nodes(rows: list[dict[str, Any]]) -> render.Table:
    header = ("NODE", "DEVICE", "PAGES", "SIZE", "CLAIMED", "FREE", "CLAIMS", "NAMESPACES")
    return render.Table(header, [
        (row["name"], row["device"], render.size(row["page-size"]) if "page-size" in row else "gone",
         render.size(row["size"]), render.size(row["claimed"]), render.size(row["size"] - row["claimed"]),
         str(row["claims"]), _first(row["namespaces"])) for row in rows], header[2:7])


def _of_namespaces(rows: list[dict[str, Any]]) -> render.Table:
    header = ("NAMESPACE", "CLAIMED", "CLAIMS", "NODES")
    return render.Table(header, [(row["name"], render.size(row["claimed"]), str(row["claims"]), str(row["nodes"]))
                                 for row in rows], header[1:])


def _of_claims(rows: list[dict[str, Any]]) -> render.Table:
    return render.Table(("CLAIM", "NODE", "DEVICE", "CLAIMED", "PODS"), [
        (row["name"], row["node"], row["device"], render.size(row["claimed"]), " ".join(row["pods"])) for row in rows],
        ("CLAIMED",))


def _first(namespaces: dict[str, int]) -> str:
    """The namespaces with the most memory, and how many more there are."""
    told = [f"{name} {render.size(size)}" for name, size in list(namespaces.items())[:_FEW]]
    return ", ".join(told + [f"{len(namespaces) - _FEW} more"] * (len(namespaces) > _FEW))
