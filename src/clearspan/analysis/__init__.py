"""What a model does with a text, measured. The names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clearspan.analysis.ablation import AblationMethod as AblationMethod
    from clearspan.analysis.ablation import ablate_heads as ablate_heads
    from clearspan.analysis.ablation import ablate_layers as ablate_layers
    from clearspan.analysis.ablation import ablate_neurons as ablate_neurons
    from clearspan.analysis.abstraction.alignment import Alignment as Alignment
    from clearspan.analysis.abstraction.alignment import fit_alignment as fit_alignment
    from clearspan.analysis.abstraction.causal_model import CausalModel as CausalModel
    from clearspan.analysis.abstraction.causal_model import draw_interchanges as draw_interchanges
    from clearspan.analysis.abstraction.interchange import InterchangeAccuracy as InterchangeAccuracy
    from clearspan.analysis.abstraction.interchange import InterchangeExamples as InterchangeExamples
    from clearspan.analysis.abstraction.interchange import InterchangeSite as InterchangeSite
    from clearspan.analysis.abstraction.interchange import interchange_accuracy as interchange_accuracy
    from clearspan.analysis.abstraction.interchange import interchange_sweep as interchange_sweep
    from clearspan.analysis.attribution.attribution import direct_logit_attribution as direct_logit_attribution
    from clearspan.analysis.attribution.attribution_result import AttributedPart as AttributedPart
    from clearspan.analysis.attribution.attribution_result import DirectLogitAttribution as DirectLogitAttribution
    from clearspan.analysis.attribution.vocabulary import singular_readings as singular_readings
    from clearspan.analysis.attribution.vocabulary_result import SingularReadings as SingularReadings
    from clearspan.analysis.attribution.vocabulary_result import VocabularySide as VocabularySide
    from clearspan.analysis.evaluations.estimate import Estimate as Estimate
    from clearspan.analysis.evaluations.ioi import IOIEvaluation as IOIEvaluation
    from clearspan.analysis.evaluations.ioi import evaluate_ioi as evaluate_ioi
    from clearspan.analysis.evaluations.ioi_generation import IOICorruption as IOICorruption
    from clearspan.analysis.evaluations.ioi_generation import ioi_prompts as ioi_prompts
    from clearspan.analysis.evaluations.ioi_prompts import IOIPrompts as IOIPrompts
    from clearspan.analysis.evaluations.loss_by_position import LossByPosition as LossByPosition
    from clearspan.analysis.evaluations.loss_by_position import loss_by_position as loss_by_position
    from clearspan.analysis.evaluations.repetition import Repetition as Repetition
    from clearspan.analysis.evaluations.repetition import evaluate_repetition as evaluate_repetition
    from clearspan.analysis.evaluations.repetition import induction_loss as induction_loss
    from clearspan.analysis.examples.feature_statistics import FeatureStatistics as FeatureStatistics
    from clearspan.analysis.examples.max_activating import max_activating_examples as max_activating_examples
    from clearspan.analysis.examples.max_activating_result import MaxActivatingExample as MaxActivatingExample
    from clearspan.analysis.examples.max_activating_result import MaxActivatingExamples as MaxActivatingExamples
    from clearspan.analysis.heads.detection_patterns import DetectionPattern as DetectionPattern
    from clearspan.analysis.heads.detection_patterns import duplicate_token_pattern as duplicate_token_pattern
    from clearspan.analysis.heads.detection_patterns import induction_pattern as induction_pattern
    from clearspan.analysis.heads.detection_patterns import previous_token_pattern as previous_token_pattern
    from clearspan.analysis.heads.detectors import DetectedHeads as DetectedHeads
    from clearspan.analysis.heads.detectors import detect_heads as detect_heads
    from clearspan.analysis.heads.heads import Head as Head
    from clearspan.analysis.heads.heads import HeadScores as HeadScores
    from clearspan.analysis.heads.heads import head_scores as head_scores
    from clearspan.analysis.heads.heads import strongest as strongest
    from clearspan.analysis.heads.repeated_tokens import RepeatedTokens as RepeatedTokens
    from clearspan.analysis.heads.repeated_tokens import repeated_tokens as repeated_tokens
    from clearspan.analysis.lenses.lens import LogitLens as LogitLens
    from clearspan.analysis.lenses.lens import logit_lens as logit_lens
    from clearspan.analysis.lenses.lens_divergence import LensDivergence as LensDivergence
    from clearspan.analysis.lenses.lens_divergence import lens_divergence as lens_divergence
    from clearspan.analysis.lenses.lens_readings import LensReadings as LensReadings
    from clearspan.analysis.lenses.lens_readings import lens_readings as lens_readings
    from clearspan.analysis.lenses.streams import Translator as Translator
    from clearspan.analysis.lenses.tuned_lens import TunedLens as TunedLens
    from clearspan.analysis.lenses.tuned_lens_training import train_tuned_lens as train_tuned_lens
    from clearspan.analysis.metric import next_token_loss as next_token_loss
    from clearspan.analysis.probing.probe import Probe as Probe
    from clearspan.analysis.probing.probe_result import Probes as Probes
    from clearspan.analysis.probing.probes import train_probe as train_probe
    from clearspan.analysis.reporting.effect import CausalEffect as CausalEffect
    from clearspan.analysis.reporting.effect import causal_effect as causal_effect
    from clearspan.analysis.reporting.predictions import NotFiniteError as NotFiniteError
    from clearspan.analysis.reporting.predictions import Predictions as Predictions
    from clearspan.analysis.reporting.predictions import predictions as predictions
    from clearspan.analysis.reporting.report import ModelFacts as ModelFacts
    from clearspan.analysis.reporting.report import Report as Report
    from clearspan.analysis.reporting.report import report as report
    from clearspan.analysis.steering import SteeringMethod as SteeringMethod
    from clearspan.analysis.steering import SteeringVector as SteeringVector
    from clearspan.analysis.steering import fit_steering_vector as fit_steering_vector
    from clearspan.analysis.steering import steering_sweep as steering_sweep
    from clearspan.circuits.attribution import Agreement as Agreement
    from clearspan.circuits.attribution import AttributionPatching as AttributionPatching
    from clearspan.circuits.attribution import attribution_patch as attribution_patch
    from clearspan.circuits.circuit import Circuit as Circuit
    from clearspan.circuits.edge_scores import EdgeScores as EdgeScores
    from clearspan.circuits.edge_scores import ScoredEdge as ScoredEdge
    from clearspan.circuits.edge_scores import edge_attribution as edge_attribution
    from clearspan.circuits.edges import patch_edges as patch_edges
    from clearspan.circuits.edges import path_patching as path_patching
    from clearspan.circuits.evaluation import CircuitEvaluation as CircuitEvaluation
    from clearspan.circuits.evaluation import FaithfulnessCurve as FaithfulnessCurve
    from clearspan.circuits.evaluation import evaluate_circuits as evaluate_circuits
    from clearspan.circuits.evaluation import faithfulness_curve as faithfulness_curve
    from clearspan.circuits.graph import ComputationalGraph as ComputationalGraph
    from clearspan.circuits.graph import Edge as Edge
    from clearspan.circuits.graph import Node as Node
    from clearspan.circuits.search import DiscoveredCircuit as DiscoveredCircuit
    from clearspan.circuits.search import PruningStep as PruningStep
    from clearspan.circuits.search import discover_circuit as discover_circuit
    from clearspan.statistics import Interval as Interval
    from clearspan.statistics import bootstrap_interval as bootstrap_interval
    from clearspan.statistics import permutation_p_value as permutation_p_value
    from clearspan.statistics import standard_error as standard_error
    from clearspan.sweep.metrics import Metric as Metric

_HOMES = {
    "ablate_heads": "clearspan.analysis.ablation",
    "ablate_layers": "clearspan.analysis.ablation",
    "ablate_neurons": "clearspan.analysis.ablation",
    "AblationMethod": "clearspan.analysis.ablation",
    "fit_alignment": "clearspan.analysis.abstraction.alignment",
    "Alignment": "clearspan.analysis.abstraction.alignment",
    "CausalModel": "clearspan.analysis.abstraction.causal_model",
    "interchange_accuracy": "clearspan.analysis.abstraction.interchange",
    "interchange_sweep": "clearspan.analysis.abstraction.interchange",
    "draw_interchanges": "clearspan.analysis.abstraction.causal_model",
    "InterchangeExamples": "clearspan.analysis.abstraction.interchange",
    "InterchangeAccuracy": "clearspan.analysis.abstraction.interchange",
    "InterchangeSite": "clearspan.analysis.abstraction.interchange",
    "direct_logit_attribution": "clearspan.analysis.attribution.attribution",
    "AttributedPart": "clearspan.analysis.attribution.attribution_result",
    "DirectLogitAttribution": "clearspan.analysis.attribution.attribution_result",
    "singular_readings": "clearspan.analysis.attribution.vocabulary",
    "SingularReadings": "clearspan.analysis.attribution.vocabulary_result",
    "VocabularySide": "clearspan.analysis.attribution.vocabulary_result",
    "Estimate": "clearspan.analysis.evaluations.estimate",
    "IOIEvaluation": "clearspan.analysis.evaluations.ioi",
    "evaluate_ioi": "clearspan.analysis.evaluations.ioi",
    "IOICorruption": "clearspan.analysis.evaluations.ioi_generation",
    "ioi_prompts": "clearspan.analysis.evaluations.ioi_generation",
    "IOIPrompts": "clearspan.analysis.evaluations.ioi_prompts",
    "LossByPosition": "clearspan.analysis.evaluations.loss_by_position",
    "loss_by_position": "clearspan.analysis.evaluations.loss_by_position",
    "Repetition": "clearspan.analysis.evaluations.repetition",
    "evaluate_repetition": "clearspan.analysis.evaluations.repetition",
    "induction_loss": "clearspan.analysis.evaluations.repetition",
    "FeatureStatistics": "clearspan.analysis.examples.feature_statistics",
    "max_activating_examples": "clearspan.analysis.examples.max_activating",
    "MaxActivatingExample": "clearspan.analysis.examples.max_activating_result",
    "MaxActivatingExamples": "clearspan.analysis.examples.max_activating_result",
    "DetectionPattern": "clearspan.analysis.heads.detection_patterns",
    "duplicate_token_pattern": "clearspan.analysis.heads.detection_patterns",
    "induction_pattern": "clearspan.analysis.heads.detection_patterns",
    "previous_token_pattern": "clearspan.analysis.heads.detection_patterns",
    "DetectedHeads": "clearspan.analysis.heads.detectors",
    "detect_heads": "clearspan.analysis.heads.detectors",
    "Head": "clearspan.analysis.heads.heads",
    "HeadScores": "clearspan.analysis.heads.heads",
    "head_scores": "clearspan.analysis.heads.heads",
    "strongest": "clearspan.analysis.heads.heads",
    "RepeatedTokens": "clearspan.analysis.heads.repeated_tokens",
    "repeated_tokens": "clearspan.analysis.heads.repeated_tokens",
    "LogitLens": "clearspan.analysis.lenses.lens",
    "logit_lens": "clearspan.analysis.lenses.lens",
    "LensDivergence": "clearspan.analysis.lenses.lens_divergence",
    "lens_divergence": "clearspan.analysis.lenses.lens_divergence",
    "LensReadings": "clearspan.analysis.lenses.lens_readings",
    "lens_readings": "clearspan.analysis.lenses.lens_readings",
    "Translator": "clearspan.analysis.lenses.streams",
    "TunedLens": "clearspan.analysis.lenses.tuned_lens",
    "train_tuned_lens": "clearspan.analysis.lenses.tuned_lens_training",
    "next_token_loss": "clearspan.analysis.metric",
    "Probe": "clearspan.analysis.probing.probe",
    "Probes": "clearspan.analysis.probing.probe_result",
    "train_probe": "clearspan.analysis.probing.probes",
    "CausalEffect": "clearspan.analysis.reporting.effect",
    "causal_effect": "clearspan.analysis.reporting.effect",
    "NotFiniteError": "clearspan.analysis.reporting.predictions",
    "Predictions": "clearspan.analysis.reporting.predictions",
    "predictions": "clearspan.analysis.reporting.predictions",
    "ModelFacts": "clearspan.analysis.reporting.report",
    "Report": "clearspan.analysis.reporting.report",
    "report": "clearspan.analysis.reporting.report",
    "SteeringMethod": "clearspan.analysis.steering",
    "fit_steering_vector": "clearspan.analysis.steering",
    "steering_sweep": "clearspan.analysis.steering",
    "SteeringVector": "clearspan.analysis.steering",
    "Agreement": "clearspan.circuits.attribution",
    "AttributionPatching": "clearspan.circuits.attribution",
    "attribution_patch": "clearspan.circuits.attribution",
    "Circuit": "clearspan.circuits.circuit",
    "EdgeScores": "clearspan.circuits.edge_scores",
    "ScoredEdge": "clearspan.circuits.edge_scores",
    "edge_attribution": "clearspan.circuits.edge_scores",
    "patch_edges": "clearspan.circuits.edges",
    "path_patching": "clearspan.circuits.edges",
    "CircuitEvaluation": "clearspan.circuits.evaluation",
    "FaithfulnessCurve": "clearspan.circuits.evaluation",
    "evaluate_circuits": "clearspan.circuits.evaluation",
    "faithfulness_curve": "clearspan.circuits.evaluation",
    "ComputationalGraph": "clearspan.circuits.graph",
    "Edge": "clearspan.circuits.graph",
    "Node": "clearspan.circuits.graph",
    "DiscoveredCircuit": "clearspan.circuits.search",
    "PruningStep": "clearspan.circuits.search",
    "discover_circuit": "clearspan.circuits.search",
    "Interval": "clearspan.statistics",
    "bootstrap_interval": "clearspan.statistics",
    "permutation_p_value": "clearspan.statistics",
    "standard_error": "clearspan.statistics",
    "Metric": "clearspan.sweep.metrics",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clearspan.analysis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
