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
    from clearspan.analysis.attribution import DirectLogitAttribution as DirectLogitAttribution
    from clearspan.analysis.attribution import direct_logit_attribution as direct_logit_attribution
    from clearspan.analysis.choices import ChoiceEvaluation as ChoiceEvaluation
    from clearspan.analysis.choices import evaluate_choices as evaluate_choices
    from clearspan.analysis.datasets import Dataset as Dataset
    from clearspan.analysis.datasets import read_dataset as read_dataset
    from clearspan.analysis.evaluations import Estimate as Estimate
    from clearspan.analysis.evaluations import LossByPosition as LossByPosition
    from clearspan.analysis.evaluations import Repetition as Repetition
    from clearspan.analysis.evaluations import evaluate_repetition as evaluate_repetition
    from clearspan.analysis.evaluations import induction_loss as induction_loss
    from clearspan.analysis.evaluations import loss_by_position as loss_by_position
    from clearspan.analysis.evaluations import next_token_loss as next_token_loss
    from clearspan.analysis.examples import MaxActivatingExample as MaxActivatingExample
    from clearspan.analysis.examples import MaxActivatingExamples as MaxActivatingExamples
    from clearspan.analysis.examples import max_activating_examples as max_activating_examples
    from clearspan.analysis.heads import DetectedHeads as DetectedHeads
    from clearspan.analysis.heads import DetectionPattern as DetectionPattern
    from clearspan.analysis.heads import Head as Head
    from clearspan.analysis.heads import HeadScores as HeadScores
    from clearspan.analysis.heads import detect_heads as detect_heads
    from clearspan.analysis.heads import duplicate_token_pattern as duplicate_token_pattern
    from clearspan.analysis.heads import head_scores as head_scores
    from clearspan.analysis.heads import induction_pattern as induction_pattern
    from clearspan.analysis.heads import previous_token_pattern as previous_token_pattern
    from clearspan.analysis.heads import strongest as strongest
    from clearspan.analysis.ioi import IOICorruption as IOICorruption
    from clearspan.analysis.ioi import IOIEvaluation as IOIEvaluation
    from clearspan.analysis.ioi import IOIPrompts as IOIPrompts
    from clearspan.analysis.ioi import evaluate_ioi as evaluate_ioi
    from clearspan.analysis.ioi import ioi_prompts as ioi_prompts
    from clearspan.analysis.jacobian_fitting import fit_jacobian_lens as fit_jacobian_lens
    from clearspan.analysis.jacobian_lens import JacobianLens as JacobianLens
    from clearspan.analysis.lenses import LensReadings as LensReadings
    from clearspan.analysis.lenses import LogitLens as LogitLens
    from clearspan.analysis.lenses import lens_readings as lens_readings
    from clearspan.analysis.lenses import logit_lens as logit_lens
    from clearspan.analysis.patchscopes import Patchscope as Patchscope
    from clearspan.analysis.patchscopes import patchscope as patchscope
    from clearspan.analysis.probing import Probe as Probe
    from clearspan.analysis.probing import Probes as Probes
    from clearspan.analysis.probing import train_probe as train_probe
    from clearspan.analysis.repeats import RepeatedTokens as RepeatedTokens
    from clearspan.analysis.repeats import repeated_tokens as repeated_tokens
    from clearspan.analysis.reports import CausalEffect as CausalEffect
    from clearspan.analysis.reports import ModelFacts as ModelFacts
    from clearspan.analysis.reports import Predictions as Predictions
    from clearspan.analysis.reports import Report as Report
    from clearspan.analysis.reports import causal_effect as causal_effect
    from clearspan.analysis.reports import predictions as predictions
    from clearspan.analysis.reports import report as report
    from clearspan.analysis.running import FeatureStatistics as FeatureStatistics
    from clearspan.analysis.sparse_probing import SparseProbes as SparseProbes
    from clearspan.analysis.sparse_probing import train_sparse_probe as train_sparse_probe
    from clearspan.analysis.steering import SteeringMethod as SteeringMethod
    from clearspan.analysis.steering import SteeringVector as SteeringVector
    from clearspan.analysis.steering import fit_steering_vector as fit_steering_vector
    from clearspan.analysis.steering import steering_sweep as steering_sweep
    from clearspan.analysis.subspaces import ProjectionKernel as ProjectionKernel
    from clearspan.analysis.subspaces import head_projection_kernels as head_projection_kernels
    from clearspan.analysis.subspaces import projection_kernel as projection_kernel
    from clearspan.analysis.token_decomposition import TokenDecomposition as TokenDecomposition
    from clearspan.analysis.translators import Translator as Translator
    from clearspan.analysis.tuned_lens import LensDivergence as LensDivergence
    from clearspan.analysis.tuned_lens import TunedLens as TunedLens
    from clearspan.analysis.tuned_lens import lens_divergence as lens_divergence
    from clearspan.analysis.tuned_lens import train_tuned_lens as train_tuned_lens
    from clearspan.analysis.unembedding import Unembed as Unembed
    from clearspan.analysis.unembedding import Unembedding as Unembedding
    from clearspan.analysis.vocabulary import SingularReadings as SingularReadings
    from clearspan.analysis.vocabulary import VocabularySide as VocabularySide
    from clearspan.analysis.vocabulary import singular_readings as singular_readings
    from clearspan.circuits import Agreement as Agreement
    from clearspan.circuits import AttributionPatching as AttributionPatching
    from clearspan.circuits import Circuit as Circuit
    from clearspan.circuits import CircuitEvaluation as CircuitEvaluation
    from clearspan.circuits import ComputationalGraph as ComputationalGraph
    from clearspan.circuits import DiscoveredCircuit as DiscoveredCircuit
    from clearspan.circuits import Edge as Edge
    from clearspan.circuits import EdgeScores as EdgeScores
    from clearspan.circuits import Node as Node
    from clearspan.circuits import PruningStep as PruningStep
    from clearspan.circuits import attribution_patch as attribution_patch
    from clearspan.circuits import discover_circuit as discover_circuit
    from clearspan.circuits import edge_attribution as edge_attribution
    from clearspan.circuits import evaluate_circuits as evaluate_circuits
    from clearspan.circuits import faithfulness_curve as faithfulness_curve
    from clearspan.circuits import patch_edges as patch_edges
    from clearspan.circuits import path_patching as path_patching
    from clearspan.errors import NotFiniteError as NotFiniteError
    from clearspan.statistics import Interval as Interval
    from clearspan.statistics import bootstrap_interval as bootstrap_interval
    from clearspan.statistics import permutation_p_value as permutation_p_value
    from clearspan.statistics import standard_error as standard_error
    from clearspan.sweep.metrics import Metric as Metric

_HOMES = {
    "AblationMethod": "clearspan.analysis.ablation",
    "ablate_heads": "clearspan.analysis.ablation",
    "ablate_layers": "clearspan.analysis.ablation",
    "ablate_neurons": "clearspan.analysis.ablation",
    "Alignment": "clearspan.analysis.abstraction.alignment",
    "fit_alignment": "clearspan.analysis.abstraction.alignment",
    "CausalModel": "clearspan.analysis.abstraction.causal_model",
    "draw_interchanges": "clearspan.analysis.abstraction.causal_model",
    "InterchangeAccuracy": "clearspan.analysis.abstraction.interchange",
    "InterchangeExamples": "clearspan.analysis.abstraction.interchange",
    "InterchangeSite": "clearspan.analysis.abstraction.interchange",
    "interchange_accuracy": "clearspan.analysis.abstraction.interchange",
    "interchange_sweep": "clearspan.analysis.abstraction.interchange",
    "DirectLogitAttribution": "clearspan.analysis.attribution",
    "direct_logit_attribution": "clearspan.analysis.attribution",
    "ChoiceEvaluation": "clearspan.analysis.choices",
    "evaluate_choices": "clearspan.analysis.choices",
    "Dataset": "clearspan.analysis.datasets",
    "read_dataset": "clearspan.analysis.datasets",
    "Estimate": "clearspan.analysis.evaluations",
    "LossByPosition": "clearspan.analysis.evaluations",
    "Repetition": "clearspan.analysis.evaluations",
    "evaluate_repetition": "clearspan.analysis.evaluations",
    "induction_loss": "clearspan.analysis.evaluations",
    "loss_by_position": "clearspan.analysis.evaluations",
    "next_token_loss": "clearspan.analysis.evaluations",
    "MaxActivatingExample": "clearspan.analysis.examples",
    "MaxActivatingExamples": "clearspan.analysis.examples",
    "max_activating_examples": "clearspan.analysis.examples",
    "DetectedHeads": "clearspan.analysis.heads",
    "DetectionPattern": "clearspan.analysis.heads",
    "Head": "clearspan.analysis.heads",
    "HeadScores": "clearspan.analysis.heads",
    "detect_heads": "clearspan.analysis.heads",
    "duplicate_token_pattern": "clearspan.analysis.heads",
    "head_scores": "clearspan.analysis.heads",
    "induction_pattern": "clearspan.analysis.heads",
    "previous_token_pattern": "clearspan.analysis.heads",
    "strongest": "clearspan.analysis.heads",
    "IOICorruption": "clearspan.analysis.ioi",
    "IOIEvaluation": "clearspan.analysis.ioi",
    "IOIPrompts": "clearspan.analysis.ioi",
    "evaluate_ioi": "clearspan.analysis.ioi",
    "ioi_prompts": "clearspan.analysis.ioi",
    "JacobianLens": "clearspan.analysis.jacobian_lens",
    "fit_jacobian_lens": "clearspan.analysis.jacobian_fitting",
    "LensReadings": "clearspan.analysis.lenses",
    "LogitLens": "clearspan.analysis.lenses",
    "lens_readings": "clearspan.analysis.lenses",
    "logit_lens": "clearspan.analysis.lenses",
    "Patchscope": "clearspan.analysis.patchscopes",
    "patchscope": "clearspan.analysis.patchscopes",
    "Probe": "clearspan.analysis.probing",
    "Probes": "clearspan.analysis.probing",
    "train_probe": "clearspan.analysis.probing",
    "RepeatedTokens": "clearspan.analysis.repeats",
    "repeated_tokens": "clearspan.analysis.repeats",
    "CausalEffect": "clearspan.analysis.reports",
    "ModelFacts": "clearspan.analysis.reports",
    "Predictions": "clearspan.analysis.reports",
    "Report": "clearspan.analysis.reports",
    "causal_effect": "clearspan.analysis.reports",
    "predictions": "clearspan.analysis.reports",
    "report": "clearspan.analysis.reports",
    "FeatureStatistics": "clearspan.analysis.running",
    "SparseProbes": "clearspan.analysis.sparse_probing",
    "train_sparse_probe": "clearspan.analysis.sparse_probing",
    "SteeringMethod": "clearspan.analysis.steering",
    "SteeringVector": "clearspan.analysis.steering",
    "fit_steering_vector": "clearspan.analysis.steering",
    "steering_sweep": "clearspan.analysis.steering",
    "ProjectionKernel": "clearspan.analysis.subspaces",
    "head_projection_kernels": "clearspan.analysis.subspaces",
    "projection_kernel": "clearspan.analysis.subspaces",
    "TokenDecomposition": "clearspan.analysis.token_decomposition",
    "Translator": "clearspan.analysis.translators",
    "LensDivergence": "clearspan.analysis.tuned_lens",
    "TunedLens": "clearspan.analysis.tuned_lens",
    "lens_divergence": "clearspan.analysis.tuned_lens",
    "train_tuned_lens": "clearspan.analysis.tuned_lens",
    "Unembed": "clearspan.analysis.unembedding",
    "Unembedding": "clearspan.analysis.unembedding",
    "SingularReadings": "clearspan.analysis.vocabulary",
    "VocabularySide": "clearspan.analysis.vocabulary",
    "singular_readings": "clearspan.analysis.vocabulary",
    "Agreement": "clearspan.circuits",
    "AttributionPatching": "clearspan.circuits",
    "Circuit": "clearspan.circuits",
    "CircuitEvaluation": "clearspan.circuits",
    "ComputationalGraph": "clearspan.circuits",
    "DiscoveredCircuit": "clearspan.circuits",
    "Edge": "clearspan.circuits",
    "EdgeScores": "clearspan.circuits",
    "Node": "clearspan.circuits",
    "PruningStep": "clearspan.circuits",
    "attribution_patch": "clearspan.circuits",
    "discover_circuit": "clearspan.circuits",
    "edge_attribution": "clearspan.circuits",
    "evaluate_circuits": "clearspan.circuits",
    "faithfulness_curve": "clearspan.circuits",
    "patch_edges": "clearspan.circuits",
    "path_patching": "clearspan.circuits",
    "NotFiniteError": "clearspan.errors",
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
