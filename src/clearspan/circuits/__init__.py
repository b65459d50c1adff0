"""Circuits: a model's computational graph, and what its edges, paths and parts do on a pair of inputs."""

from clearspan.circuits.attribution import Agreement as Agreement
from clearspan.circuits.attribution import AttributionPatching as AttributionPatching
from clearspan.circuits.attribution import attribution_patch as attribution_patch
from clearspan.circuits.circuit import Circuit as Circuit
from clearspan.circuits.edge_scores import EdgeScores as EdgeScores
from clearspan.circuits.edge_scores import edge_attribution as edge_attribution
from clearspan.circuits.edges import patch_edges as patch_edges
from clearspan.circuits.edges import path_patching as path_patching
from clearspan.circuits.evaluation import CircuitEvaluation as CircuitEvaluation
from clearspan.circuits.evaluation import evaluate_circuits as evaluate_circuits
from clearspan.circuits.evaluation import faithfulness_curve as faithfulness_curve
from clearspan.circuits.graph import ComputationalGraph as ComputationalGraph
from clearspan.circuits.graph import Edge as Edge
from clearspan.circuits.graph import Node as Node
from clearspan.circuits.search import DiscoveredCircuit as DiscoveredCircuit
from clearspan.circuits.search import PruningStep as PruningStep
from clearspan.circuits.search import discover_circuit as discover_circuit

__all__ = [
    "Agreement",
    "AttributionPatching",
    "Circuit",
    "CircuitEvaluation",
    "ComputationalGraph",
    "DiscoveredCircuit",
    "Edge",
    "EdgeScores",
    "Node",
    "PruningStep",
    "attribution_patch",
    "discover_circuit",
    "edge_attribution",
    "evaluate_circuits",
    "faithfulness_curve",
    "patch_edges",
    "path_patching",
]
