"""Every public callable with arguments that work, on a model so small that each call takes milliseconds."""

import inspect
from functools import cached_property
from types import FunctionType, SimpleNamespace

import torch
from tests.zoo import build

import clearspan
from clearspan import ActivationCache, TransformerBridge, analysis, circuits, interventions, patching, sweep
from clearspan.analysis import CausalModel, InterchangeExamples, SteeringVector
from clearspan.circuits import Circuit, ComputationalGraph
from clearspan.interventions import Intervention, Patch, Zero
from clearspan.sweep import Costs, Effects, LogitDifference, LogitMetric, Pair, Sweep

MODULES = {
    "circuits": circuits,
    "analysis": analysis,
    "patching": patching,
    "sweep": sweep,
    "interventions": interventions,
}
TEXT, OTHER = "import os", "import re"
TEXTS = [f"x = {i}" for i in range(4)]
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
}


class Halves:
    """A sparse autoencoder without weights."""

    cfg = SimpleNamespace(hook_name="blocks.0.hook_resid_post")

    def encode(self, value):
        return torch.cat([value.relu(), (-value).relu()], -1)

    def decode(self, acts):
        positive, negative = acts.chunk(2, -1)
        return positive - negative


class Kit:
    """What calls are made with: a small bridge that knows words, and one of each object that has methods."""

    def __init__(self, tokenizer, folder):
        self._tokenizer = tokenizer
        self.folder = folder
        self.bridge = self.another()
        self.metric = LogitDifference(3, 5)
        self.zero = Intervention("z", Zero(), layer=0, heads=0)
        self.graph = ComputationalGraph.of(self.bridge)
        run = {"score": torch.rand(3)}
        self.effects = Effects(
            {"score": torch.rand(2, 2, 3)}, {"layer": (0, 1), "head": (0, 1)}, run, {"clean": {"score": torch.rand(3)}}
        )
        self.pair = {"bridge": self.bridge, "clean": TEXT, "corrupted": OTHER, "metric": self.metric}

    def another(self):
        """Returns a bridge of its own, for calls that change it."""
        return clearspan.boot(build("llama", **SMALL), tokenizer=self._tokenizer)

    def saved(self, one):
        """Returns the path of a file that holds an object."""
        path = self.folder / type(one).__name__
        if not path.exists():
            one.save(path)
        return path

    def object(self, name, is_new):
        """Returns the object of a class."""
        return NEW[name](self) if is_new else OBJECTS[name](self)

    @cached_property
    def cache(self):
        return self.bridge.run_with_cache(TEXT)[1]

    @cached_property
    def logits(self):
        return self.bridge(TEXT).detach()

    @cached_property
    def stack(self):
        return self.cache.decompose_resid()

    @cached_property
    def experiment(self):
        return self.sweep.experiment()

    @cached_property
    def sweep(self):
        found = Sweep(self.bridge, TEXT, {"zero": self.zero}, self.metric)
        found.run(progress=False)
        return found

    @cached_property
    def circuit(self):
        return Circuit.of(self.bridge, ["embed->logits"])

    @cached_property
    def scores(self):
        return circuits.edge_attribution(**self.pair)

    @cached_property
    def agree(self):
        return CausalModel({"out": lambda a, b: a + b}, output="out")

    @cached_property
    def settings(self):
        return [{"a": a, "b": b} for a in range(3) for b in range(3)]

    @cached_property
    def examples(self):
        ids = torch.randint(1, 97, (2, 6, 3), generator=torch.Generator().manual_seed(0))
        return InterchangeExamples.of(self.bridge, ids[0], ids[1], list(range(6)))

    @cached_property
    def alignment(self):
        return analysis.fit_alignment(**CALLS["analysis.fit_alignment"](self))

    @cached_property
    def vector(self):
        return SteeringVector({"blocks.0.hook_resid_post": torch.ones(16)}, {"blocks.0.hook_resid_post": 1.0})

    @cached_property
    def prompts(self):
        return analysis.ioi_prompts(**CALLS["analysis.ioi_prompts"](self))

    @cached_property
    def repeats(self):
        return analysis.repeated_tokens(self.bridge, rows=1, period=3)

    @cached_property
    def repeated_logits(self):
        return self.bridge(self.repeats.tokens).detach()

    def result(self, name):
        """Returns what a function of `analysis` or `circuits` finds, found once."""
        if name not in self.__dict__:
            module = name.partition(".")[0]
            self.__dict__[name] = getattr(MODULES[module], name.partition(".")[2])(**CALLS[name](self))
        return self.__dict__[name]


def _lines(k):
    return {"bridge": k.bridge, "input": TEXT}


def _ablation(k):
    return {**_lines(k), "metric": k.metric, "layers": 0, "method": "zero", "progress": False}


def _transformer_lens(k):
    return {"model": k.bridge, "corrupted_tokens": OTHER, "clean_cache": k.cache, "patching_metric": k.metric}


def _repetition(k):
    return {"bridge": k.bridge, "rows": 1, "period": 3}


CALLS = {
    "analysis.ablate_heads": _ablation,
    "analysis.ablate_layers": _ablation,
    "analysis.ablate_neurons": lambda k: {**_lines(k), "metric": k.metric, "layer": 0, "neurons": 0, "progress": False},
    "analysis.fit_alignment": lambda k: {
        "bridge": k.bridge,
        "examples": k.examples,
        "dimensions": 1,
        "layer": 0,
        "held_out": 0.5,
        "steps": 1,
        "random_subspaces": 1,
        "random_labels": 1,
        "progress": False,
    },
    "analysis.CausalModel": lambda k: {"variables": {"out": lambda a, b: a + b}, "output": "out"},
    "analysis.draw_interchanges": lambda k: {
        "bridge": k.bridge,
        "model": k.agree,
        "inputs": k.settings,
        "variables": "out",
        "count": 2,
        "prompt": lambda one: [1 + one["a"], 5 + one["b"]],
        "token": lambda out: 1 + out,
    },
    "analysis.InterchangeExamples": lambda k: {
        "base": k.examples.base,
        "source": k.examples.source,
        "labels": k.examples.labels,
    },
    "analysis.interchange_accuracy": lambda k: {
        "bridge": k.bridge,
        "examples": k.examples,
        "layers": 0,
        "progress": False,
    },
    "analysis.interchange_sweep": lambda k: {
        "bridge": k.bridge,
        "examples": k.examples,
        "layers": 0,
        "positions": -1,
        "progress": False,
    },
    "analysis.direct_logit_attribution": lambda k: {**_lines(k), "answer_tokens": 5},
    "analysis.evaluate_repetition": _repetition,
    "analysis.induction_loss": _repetition,
    "analysis.loss_by_position": lambda k: {"bridge": k.bridge, "corpus": TEXT},
    "analysis.evaluate_choices": lambda k: {
        "bridge": k.bridge,
        "prompts": [TEXT, OTHER],
        "choices": [" a", " b"],
        "answers": [0, 1],
    },
    "analysis.read_dataset": lambda k: {"source": [{"text": "import os"}]},
    "analysis.patchscope": lambda k: {
        "bridge": k.bridge,
        "source": TEXT,
        "target": OTHER,
        "source_depths": 1,
        "target_depths": 1,
        "k": 1,
        "progress": False,
    },
    "analysis.next_token_loss": lambda k: {"tokens": torch.tensor([[1, 2]])},
    "analysis.max_activating_examples": lambda k: {
        "bridge": k.bridge,
        "texts": TEXT,
        "name": "blocks.0.mlp.hook_post",
        "index": 3,
        "k": 1,
    },
    "analysis.detect_heads": lambda k: {**_lines(k), "pattern": "induction"},
    "analysis.duplicate_token_pattern": lambda k: {"tokens": torch.tensor([1, 2, 1])},
    "analysis.induction_pattern": lambda k: {"tokens": torch.tensor([1, 2, 1])},
    "analysis.previous_token_pattern": lambda k: {"tokens": torch.tensor([1, 2, 1])},
    "analysis.head_scores": _repetition,
    "analysis.strongest": lambda k: {"scores": torch.rand(2, 2)},
    "analysis.evaluate_ioi": lambda k: {"bridge": k.bridge, "prompts": k.prompts},
    "analysis.ioi_prompts": lambda k: {
        "bridge": k.bridge,
        "count": 2,
        "templates": ["if {first} < {second}: {again} ="],
        "names": ["a", "b", "c", "d", "e"],
    },
    "analysis.fit_jacobian_lens": lambda k: {
        "bridge": k.bridge,
        "corpus": TEXT,
        "skip_first": 0,
        "progress": False,
    },
    "analysis.Unembedding": lambda k: {"matrix": torch.ones(16, 2)},
    "analysis.head_projection_kernels": lambda k: {"bridge": k.bridge},
    "analysis.projection_kernel": lambda k: {"a": torch.eye(3)[:, :1], "b": torch.eye(3)[:, 1:]},
    "analysis.train_sparse_probe": lambda k: {
        "bridge": k.bridge,
        "input": TEXTS,
        "labels": ["a", "b"] * 2,
        "ks": 2,
        "folds": 2,
        "layers": 0,
        "controls": 1,
        "progress": False,
    },
    "analysis.lens_readings": _lines,
    "analysis.logit_lens": _lines,
    "analysis.train_probe": lambda k: {
        "bridge": k.bridge,
        "input": TEXTS,
        "labels": ["a", "b"] * 2,
        "folds": 2,
        "layers": 0,
        "controls": 1,
        "progress": False,
    },
    "analysis.repeated_tokens": _repetition,
    "analysis.causal_effect": lambda k: {**_lines(k), "progress": False},
    "analysis.predictions": _lines,
    "analysis.report": lambda k: {**_lines(k), "progress": False},
    "analysis.SteeringVector": lambda k: {"vectors": {"blocks.0.hook_resid_post": torch.ones(16)}},
    "analysis.fit_steering_vector": lambda k: {
        "bridge": k.bridge,
        "positive": [TEXT],
        "negative": [OTHER],
        "layers": 0,
    },
    "analysis.steering_sweep": lambda k: {
        "bridge": k.bridge,
        "vector": k.vector,
        "input": TEXT,
        "metric": k.metric,
        "strengths": (1.0,),
        "controls": 1,
        "progress": False,
    },
    "analysis.lens_divergence": lambda k: {"bridge": k.bridge, "corpus": TEXT, "lens": lambda resid, depth: resid},
    "analysis.train_tuned_lens": lambda k: {
        "bridge": k.bridge,
        "corpus": TEXT,
        "steps": 1,
        "batch_size": 1,
        "progress": False,
    },
    "analysis.singular_readings": lambda k: {"bridge": k.bridge, "matrix": "OV", "layer": 0, "head": 0},
    "analysis.bootstrap_interval": lambda k: {"values": torch.rand(3), "samples": 4},
    "analysis.permutation_p_value": lambda k: {"differences": torch.rand(3), "samples": 4},
    "analysis.standard_error": lambda k: {"values": torch.rand(3)},
    "circuits.attribution_patch": lambda k: {**k.pair, "layers": 0},
    "circuits.discover_circuit": lambda k: {**k.pair, "steps": 1, "target": 0.1, "scores": k.scores},
    "circuits.edge_attribution": lambda k: {**k.pair, "steps": 1},
    "circuits.evaluate_circuits": lambda k: {**k.pair, "circuits": k.circuit},
    "circuits.faithfulness_curve": lambda k: {"scores": k.scores, "sizes": [3], "draws": 1},
    "circuits.patch_edges": lambda k: {**k.pair, "edges": "embed->logits", "progress": False},
    "circuits.path_patching": lambda k: {**k.pair, "senders": "L0H0", "receivers": "logits", "progress": False},
    "circuits.Circuit": lambda k: {"graph": k.graph, "edges": k.circuit.edges},
    "circuits.ComputationalGraph": lambda k: {"n_layers": 2, "n_heads": 2, "n_kv_heads": 1},
    "patching.activation_patching": lambda k: {**k.pair, "layer": [0], "position": [-1], "progress": False},
    "patching.patching_sweep": lambda k: {**k.pair, "layer": [0], "position": [-1]},
    **{f"patching.{name}": _transformer_lens for name in patching.__all__ if name.startswith("get_act_patch")},
    "sweep.AnswerLogProbability": lambda k: {"answers": ((3, 5),)},
    "sweep.Costs": lambda k: {"token": 1e-4, "floor": 5e-3, "start": 0.0, "join": 0.0, "most": 1024},
    "sweep.answered": lambda k: {**_lines(k), "answers": "\n"},
    "sweep.Effects": lambda k: {"values": {"score": torch.rand(2, 3)}, "axes": {"layer": (0, 1)}},
    "sweep.KLDivergence": lambda k: {},
    "sweep.LogitDifference": lambda k: {"correct": 3},
    "sweep.Probability": lambda k: {"token": 3},
    "sweep.Grid": lambda k: {"axes": (("cell", ("one",)),), "cells": ((k.zero,),)},
    "sweep.Sweep": lambda k: {"bridge": k.bridge, "input": TEXT, "grid": {"zero": k.zero}, "metric": k.metric},
    "sweep.grid": lambda k: {"what": "z", "action": Patch(), "layer": [0], "head": [0]},
    "interventions.Add": lambda k: {"vector": torch.ones(8)},
    "interventions.AddMapped": lambda k: {"reads": torch.ones(8, 1), "writes": torch.ones(1, 8)},
    "interventions.Apply": lambda k: {"function": "a name"},
    "interventions.Constant": lambda k: {"values": [1.0]},
    "interventions.Inject": lambda k: {"vector": torch.ones(8)},
    "interventions.Intervention": lambda k: {"point": "z", "action": Zero(), "layer": 0},
    "interventions.Mean": lambda k: {},
    "interventions.Patch": lambda k: {},
    "interventions.PatchSubspace": lambda k: {"basis": torch.eye(8)[:, :1]},
    "interventions.ProjectOut": lambda k: {"direction": torch.ones(8)},
    "interventions.Resample": lambda k: {},
    "interventions.Scale": lambda k: {"factor": 2.0},
    "interventions.parse_action": lambda k: {"data": {"kind": "zero"}},
    "interventions.register_function": lambda k: {"name": "a name"},
}
"""What each function and constructor is given where nothing is wrong."""

OBJECTS = {
    "Alignment": lambda k: k.alignment,
    "CausalModel": lambda k: k.agree,
    "InterchangeExamples": lambda k: k.examples,
    "InterchangeSite": lambda k: k.alignment.site,
    "InterchangeAccuracy": lambda k: k.result("analysis.interchange_accuracy"),
    "DirectLogitAttribution": lambda k: k.result("analysis.direct_logit_attribution"),
    "ChoiceEvaluation": lambda k: k.result("analysis.evaluate_choices"),
    "Dataset": lambda k: k.result("analysis.read_dataset"),
    "Patchscope": lambda k: k.result("analysis.patchscope"),
    "LossByPosition": lambda k: k.result("analysis.loss_by_position"),
    "MaxActivatingExamples": lambda k: k.result("analysis.max_activating_examples"),
    "DetectedHeads": lambda k: k.result("analysis.detect_heads"),
    "IOIPrompts": lambda k: k.prompts,
    "Probe": lambda k: k.result("analysis.train_probe").probes[0],
    "Probes": lambda k: k.result("analysis.train_probe"),
    "RepeatedTokens": lambda k: k.repeats,
    "Report": lambda k: k.result("analysis.report"),
    "FeatureStatistics": lambda k: analysis.FeatureStatistics(3, torch.zeros(2), torch.zeros(2), torch.rand(3, 2)),
    "SteeringVector": lambda k: k.vector,
    "TunedLens": lambda k: k.result("analysis.train_tuned_lens"),
    "JacobianLens": lambda k: k.result("analysis.fit_jacobian_lens"),
    "SparseProbes": lambda k: k.result("analysis.train_sparse_probe"),
    "AddMapped": lambda k: interventions.AddMapped,
    "SingularReadings": lambda k: k.result("analysis.singular_readings"),
    "AttributionPatching": lambda k: k.result("circuits.attribution_patch"),
    "Circuit": lambda k: k.circuit,
    "CircuitEvaluation": lambda k: k.result("circuits.evaluate_circuits"),
    "ComputationalGraph": lambda k: k.graph,
    "EdgeScores": lambda k: k.scores,
    "Effects": lambda k: k.effects,
    "Experiment": lambda k: k.experiment,
    "Grid": lambda k: k.sweep.grid,
    "LogitMetric": lambda k: k.metric,
    "LogitDifference": lambda k: k.metric,
    "Pair": lambda k: Pair.of(**k.pair),
    "Sweep": lambda k: k.sweep,
    "Add": lambda k: interventions.Add,
    "Constant": lambda k: interventions.Constant,
    "Inject": lambda k: interventions.Inject,
    "Intervention": lambda k: k.zero,
    "ProjectOut": lambda k: interventions.ProjectOut,
    "Costs": lambda k: Costs,
    "TransformerBridge": lambda k: k.bridge,
    "ActivationCache": lambda k: k.cache,
}
"""An object of each class that has methods with arguments."""

NEW = {
    "TransformerBridge": lambda k: k.another(),
    "ActivationCache": lambda k: k.bridge.run_with_cache(TEXT)[1],
    "CausalModel": lambda k: k.agree,
    "Sweep": lambda k: Sweep(**CALLS["sweep.Sweep"](k)),
}
CHANGING = {"to", "train", "requires_grad_", "add_hook", "reset_hooks", "zero_grad", "toggle_autodiff", "run"} | {
    *("add_caching_hooks", "add_perma_hook", "cuda", "remove_all_hook_fns", "set_tokenizer"),
}
"""Methods after which the object is another one: each call gets its own."""

METHODS = {
    "Alignment.estimate": lambda k: {},
    "Alignment.interval": lambda k: {},
    "Alignment.intervention": lambda k: {},
    "Alignment.project": lambda k: {"values": torch.rand(3, 16)},
    "Alignment.overlap": lambda k: {"other": torch.eye(16)[:, :1]},
    "Alignment.test": lambda k: {"bridge": k.bridge, "examples": k.examples},
    "Alignment.check_fits": lambda k: {"bridge": k.bridge},
    "Alignment.save": lambda k: {"path": k.folder / "file"},
    "Alignment.load": lambda k: {"path": k.saved(k.alignment), "bridge": k.bridge},
    "CausalModel.run": lambda k: {"setting": {"a": 1, "b": 2}},
    "CausalModel.interchange": lambda k: {"base": k.settings[0], "source": k.settings[1], "variables": ["out"]},
    "InterchangeExamples.of": lambda k: {
        "bridge": k.bridge,
        "base": torch.tensor([[1, 2]]),
        "source": torch.tensor([[3, 4]]),
        "labels": 5,
    },
    "InterchangeExamples.hits": lambda k: {"answered": torch.rand(6)},
    "InterchangeExamples.relabelled": lambda k: {"labels": k.examples.labels},
    "InterchangeExamples.select": lambda k: {"rows": [0, 1]},
    "InterchangeExamples.split": lambda k: {"size": 3},
    "InterchangeExamples.intervention": lambda k: {"point": "blocks.0.hook_resid_post"},
    "InterchangeAccuracy.interval": lambda k: {},
    "DirectLogitAttribution.chart": lambda k: {},
    "DirectLogitAttribution.top": lambda k: {},
    "LossByPosition.in_context_learning_score": lambda k: {"early": 1, "late": 2},
    "MaxActivatingExamples.examples": lambda k: {},
    "MaxActivatingExamples.plot": lambda k: {},
    "MaxActivatingExamples.chart": lambda k: {},
    "MaxActivatingExamples.to_html": lambda k: {},
    "DetectedHeads.strongest": lambda k: {},
    "IOIPrompts.select": lambda k: {"rows": [0]},
    "Probe.logits": lambda k: {"values": torch.rand(3, 16)},
    "Probe.predict": lambda k: {"values": torch.rand(3, 16)},
    "Probe.direction": lambda k: {"positive": "a"},
    "Probe.steering_vector": lambda k: {"positive": "a"},
    "Probes.at": lambda k: {"where": 0},
    "Probes.interval": lambda k: {},
    "RepeatedTokens.rows": lambda k: {"first": 0, "end": 1},
    "RepeatedTokens.losses": lambda k: {"logits": k.repeated_logits},
    "RepeatedTokens.correct": lambda k: {"logits": k.repeated_logits},
    "RepeatedTokens.second_copy_loss": lambda k: {"logits": k.repeated_logits},
    "FeatureStatistics.quantile": lambda k: {"share": 0.5},
    "SteeringVector.interventions": lambda k: {},
    "SteeringVector.ablation": lambda k: {},
    "SteeringVector.apply": lambda k: {"bridge": k.bridge},
    "SteeringVector.at": lambda k: {"where": 0},
    "SteeringVector.with_norm": lambda k: {"norm": 1.0},
    "SteeringVector.random_like": lambda k: {},
    "SteeringVector.cosine_similarity": lambda k: {"other": k.vector},
    "SteeringVector.check_fits": lambda k: {"bridge": k.bridge},
    "Report.save": lambda k: {"path": k.folder / "file"},
    "SteeringVector.save": lambda k: {"path": k.folder / "file"},
    "SteeringVector.load": lambda k: {"path": k.saved(k.vector), "bridge": k.bridge},
    "JacobianLens.check_fits": lambda k: {"bridge": k.bridge},
    "JacobianLens.__call__": lambda k: {"resid": torch.rand(3, 16), "depth": 0},
    "JacobianLens.translate": lambda k: {"resid": torch.rand(3, 16), "depth": 0},
    "JacobianLens.ablation": lambda k: {"bridge": k.bridge, "tokens": [3, 5]},
    "JacobianLens.decompose": lambda k: {"bridge": k.bridge, "resid": torch.rand(16), "depth": 0},
    "JacobianLens.directions": lambda k: {"bridge": k.bridge, "tokens": [3, 5], "depth": 0},
    "JacobianLens.load": lambda k: {"path": k.saved(k.result("analysis.fit_jacobian_lens")), "bridge": k.bridge},
    "JacobianLens.merged": lambda k: {"lenses": [k.result("analysis.fit_jacobian_lens")]},
    "JacobianLens.save": lambda k: {"path": k.folder / "file"},
    "JacobianLens.steering_vector": lambda k: {"bridge": k.bridge, "token": 3},
    "JacobianLens.swap": lambda k: {"bridge": k.bridge, "one": 3, "other": 5},
    "AddMapped.of": lambda k: {"reads": torch.ones(8, 1), "writes": torch.ones(1, 8)},
    "SparseProbes.at": lambda k: {"where": 0, "k": 2},
    "SparseProbes.neurons": lambda k: {"where": 0},
    "TunedLens.save": lambda k: {"path": k.folder / "file"},
    "TunedLens.load": lambda k: {"path": k.saved(k.result("analysis.train_tuned_lens")), "bridge": k.bridge},
    "SingularReadings.plot": lambda k: {},
    "SingularReadings.chart": lambda k: {},
    "AttributionPatching.compared_with": lambda k: {"patched": k.result("circuits.attribution_patch")},
    "AttributionPatching.compared_with_exact": lambda k: {"cells": 2},
    "Circuit.of": lambda k: {"bridge": k.bridge, "edges": ["embed->logits"]},
    "Circuit.of_scores": lambda k: {"scores": k.scores, "n_edges": 3},
    "Circuit.random": lambda k: {"graph": k.graph, "n_edges": 3},
    "Circuit.with_edges": lambda k: {"edges": ["embed->logits"]},
    "Circuit.without": lambda k: {"edges": "embed->logits"},
    "Circuit.plot": lambda k: {},
    "Circuit.chart": lambda k: {},
    "Circuit.to_svg": lambda k: {},
    "Circuit.from_json": lambda k: {"text": k.circuit.to_json()},
    "Circuit.save": lambda k: {"path": k.folder / "file"},
    "Circuit.load": lambda k: {"path": k.saved(k.circuit)},
    "CircuitEvaluation.chart": lambda k: {},
    "ComputationalGraph.of": lambda k: {"bridge": k.bridge},
    "ComputationalGraph.attention_inputs": lambda k: {"layer": 0},
    "ComputationalGraph.inputs_of": lambda k: {"node": k.graph.node("logits")},
    "ComputationalGraph.n_senders_before": lambda k: {"receiver": k.graph.node("logits")},
    "ComputationalGraph.node": lambda k: {"name": "logits"},
    "ComputationalGraph.edge": lambda k: {"name": "embed->logits"},
    "ComputationalGraph.parsed": lambda k: {"edges": "embed->logits"},
    "ComputationalGraph.index_of": lambda k: {"edge": k.graph.edge("embed->logits")},
    "EdgeScores.score": lambda k: {"edge": "embed->logits"},
    "EdgeScores.best": lambda k: {},
    "EdgeScores.compared_with_exact": lambda k: {"edges": 2},
    **{f"Effects.{name}": lambda k: {} for name in ("of", "mean", "change", "standard_error", "interval", "top")},
    "Effects.normalised": lambda k: {},
    "Effects.select": lambda k: {"layer": 0},
    "Effects.plot": lambda k: {"layer": 0},
    "Effects.chart": lambda k: {"layer": 0},
    "Effects.to_html": lambda k: {},
    "Effects.from_json": lambda k: {"data": k.effects.to_json()},
    "Effects.save": lambda k: {"path": k.folder / "file"},
    "Effects.load": lambda k: {"path": k.saved(k.effects)},
    "Experiment.check_model": lambda k: {"bridge": k.bridge},
    "Experiment.from_json": lambda k: {"text": k.experiment.to_json()},
    "Experiment.save": lambda k: {"path": k.folder / "file"},
    "Experiment.load": lambda k: {"path": k.saved(k.experiment)},
    "Grid.of": lambda k: {"interventions": {"one": k.zero}},
    "Grid.stacked": lambda k: {"grids": {"one": k.sweep.grid}},
    "Grid.from_json": lambda k: {"data": k.sweep.grid.to_json()},
    "LogitMetric.__call__": lambda k: {"logits": k.logits},
    "LogitDifference.between": lambda k: {"bridge": k.bridge, "correct": " os"},
    "Pair.of": lambda k: k.pair,
    "Costs.of": lambda k: {"model": k.bridge},
    "Sweep.check": lambda k: {"cells": 2},
    "Sweep.plan": lambda k: {},
    "Sweep.run": lambda k: {"progress": False},
    "Sweep.save": lambda k: {"path": k.folder / "file"},
    "Sweep.load": lambda k: {"path": k.saved(k.sweep), "bridge": k.bridge},
    "Sweep.of": lambda k: {"experiment": k.experiment, "bridge": k.bridge},
    "Add.of": lambda k: {"vector": torch.ones(8)},
    "Constant.of": lambda k: {"values": [1.0]},
    "Inject.of": lambda k: {"vector": torch.ones(8)},
    "ProjectOut.of": lambda k: {"direction": torch.ones(8)},
    "Intervention.name": lambda k: {"n_layers": 2},
    "Intervention.at": lambda k: {"layer": 1, "heads": 0},
    "Intervention.from_json": lambda k: {"data": k.zero.to_json()},
    **{f"TransformerBridge.{name}": lambda k: {"input": TEXT} for name in ("forward", "__call__", "run_with_hooks")},
    "TransformerBridge.run_with_cache": lambda k: {"input": TEXT},
    **{
        f"TransformerBridge.{name}": lambda k: {"input": TEXT, "saes": Halves()}
        for name in ("run_with_saes", "run_with_hooks_with_saes", "run_with_cache_with_saes")
    },
    "TransformerBridge.saes": lambda k: {"saes": Halves()},
    "TransformerBridge.add_sae": lambda k: {"sae": Halves()},
    "TransformerBridge.reset_saes": lambda k: {},
    "TransformerBridge.hooks": lambda k: {},
    "TransformerBridge.read_out": lambda k: {"residual": torch.rand(1, 2, 16)},
    "TransformerBridge.add_hook": lambda k: {"name": "blocks.0.hook_resid_post", "hook": lambda value, hook: None},
    "TransformerBridge.reset_hooks": lambda k: {},
    "TransformerBridge.plan_cache": lambda k: {"input_shape": (1, 3)},
    **{
        f"TransformerBridge.{name}": lambda k: {"input": TEXT, "max_new_tokens": 1}
        for name in ("generate", "generate_stream")
    },
    "TransformerBridge.verify": lambda k: {},
    "Dataset.__getitem__": lambda k: {"key": "text"},
    "TransformerBridge.processed": lambda k: {},
    "TransformerBridge.orthogonalized": lambda k: {"directions": torch.ones(16)},
    "TransformerBridge.points": lambda k: {},
    "TransformerBridge.why_absent": lambda k: {"name": "hook_embed"},
    "TransformerBridge.to_batch": lambda k: {"input": TEXT},
    "TransformerBridge.to_tokens": lambda k: {"input": TEXT},
    "TransformerBridge.to_string": lambda k: {"tokens": [1, 2]},
    "TransformerBridge.to_str_tokens": lambda k: {"input": TEXT},
    "TransformerBridge.to_single_token": lambda k: {"string": " os"},
    "TransformerBridge.to_single_str_token": lambda k: {"token": 5},
    "TransformerBridge.to": lambda k: {"where": "cpu"},
    "TransformerBridge.train": lambda k: {},
    "TransformerBridge.requires_grad_": lambda k: {},
    "TransformerBridge.zero_grad": lambda k: {},
    "TransformerBridge.expand_kv_heads": lambda k: {"value": torch.rand(1, 3, 4)},
    "TransformerBridge.layers_with": lambda k: {"part": "attn"},
    "TransformerBridge.stacked": lambda k: {"name": "W_Q", "layers": [0]},
    **{
        f"TransformerBridge.{name}": lambda k: {}
        for name in (
            *("get_caching_hooks", "add_caching_hooks", "list_hooks", "remove_all_hook_fns", "set_use_attn_in"),
            *("set_use_attn_result", "set_use_hook_mlp_in", "set_use_split_qkv_input"),
        )
    },
    "TransformerBridge.accumulated_bias": lambda k: {"layer": 1},
    "TransformerBridge.add_perma_hook": lambda k: {"name": "hook_embed", "hook_fn": lambda value, hook: None},
    "TransformerBridge.block_hooks": lambda k: {"layer_idx": 1},
    "TransformerBridge.block_submodules": lambda k: {"layer_idx": 1},
    "TransformerBridge.blocks_with": lambda k: {"submodule": "attn"},
    "TransformerBridge.check_hooks_to_add": lambda k: {
        "hook_point": None,
        "hook_point_name": "hook_embed",
        "hook": print,
    },
    "TransformerBridge.cuda": lambda k: {"device": "cpu"},
    "TransformerBridge.get_hook_point": lambda k: {"hook_name": "hook_embed"},
    "TransformerBridge.get_token_position": lambda k: {
        "single_token": int(k.bridge.to_batch(TEXT).tokens[0, 1]),
        "input": TEXT,
    },
    "TransformerBridge.input_to_embed": lambda k: {"input": TEXT},
    "TransformerBridge.loss_fn": lambda k: {"logits": k.logits, "tokens": TEXT},
    "TransformerBridge.set_tokenizer": lambda k: {"tokenizer": k.bridge.tokenizer},
    "TransformerBridge.stack_params_for": lambda k: {"submodule": "attn", "attr_path": "attn.W_O"},
    "TransformerBridge.tokens_to_residual_directions": lambda k: {"tokens": 5},
    "TransformerBridge.composition_scores": lambda k: {"mode": "Q", "samples": 1},
    **{
        f"ActivationCache.{name}": lambda k: {}
        for name in (
            *("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results", "logit_lens"),
            *("get_full_resid_decomposition", "toggle_autodiff"),
        )
    },
    "ActivationCache.__getitem__": lambda k: {"key": "blocks.0.hook_resid_post"},
    "ActivationCache.apply_ln_to_stack": lambda k: {"residual_stack": k.stack},
    "ActivationCache.logit_attrs": lambda k: {"residual_stack": k.stack, "tokens": 5},
    "ActivationCache.logit_constant": lambda k: {"tokens": 5},
    "ActivationCache.get_neuron_results": lambda k: {"layer": 0},
    "ActivationCache.stack_activation": lambda k: {"activation_name": "z"},
    "ActivationCache.apply_slice_to_batch_dim": lambda k: {"batch_slice": 0},
    "ActivationCache.apply_slice_to_pos_dim": lambda k: {"pos_slice": 0},
    "ActivationCache.at": lambda k: {"position": 0},
    "ActivationCache.axes_of": lambda k: {"name": "blocks.0.hook_resid_post"},
    "ActivationCache.save": lambda k: {"path": k.folder / "file"},
    "ActivationCache.load": lambda k: {"path": k.saved(k.cache), "model": k.bridge},
    "ActivationCache.to": lambda k: {"device": "cpu"},
}
"""What each method is given where nothing is wrong, under the class that has it first."""

OWN = {
    *(
        f"{kind.__name__}.{name}"
        for kind in (interventions.Action, *interventions.actions.KINDS.values())
        for name in ("check_point", "check_value", "is_constant", "new", "prepared", "source_point")
    ),
    *(
        f"{kind.__name__}.{name}"
        for kind in (LogitMetric, *sweep.metrics.KINDS.values())
        for name in ("of", "measure", "places")
    ),
    *("ActivationCache.bias", "ActivationCache.is_given", "ActivationCache.of_run", "ActivationCache.weight"),
    *("CausalModel.check", "Constant.like", "Site.on"),
    *("ComputationalGraph.heads_at", "ComputationalGraph.input_of", "ComputationalGraph.stream_of"),
    *("InterchangeSite.all_of", "InterchangeSite.checked", "InterchangeSite.of", "InterchangeSite.vectors"),
    *("TransformerBridge.running_on", "Written.at_site", "Written.up_to", "Written.write"),
    *("interventions.derangement", "interventions.exchanged", "interventions.located"),
}
"""What the library calls itself, with arguments that it has checked."""
GIVEN_BACK = {
    *(
        f"analysis.{name}"
        for name in (
            "Alignment",
            "CausalEffect",
            "ChoiceEvaluation",
            "Dataset",
            "DetectedHeads",
            "DirectLogitAttribution",
            "Estimate",
            "FeatureStatistics",
            "Head",
            "HeadScores",
            "IOIEvaluation",
            "IOIPrompts",
            "InterchangeAccuracy",
            "InterchangeSite",
            "Interval",
            "JacobianLens",
            "LensDivergence",
            "LensReadings",
            "LogitLens",
            "LossByPosition",
            "MaxActivatingExample",
            "MaxActivatingExamples",
            "ModelFacts",
            "NotFiniteError",
            "Predictions",
            "Patchscope",
            "Probe",
            "Probes",
            "ProjectionKernel",
            "RepeatedTokens",
            "Repetition",
            "Report",
            "SingularReadings",
            "SparseProbes",
            "TokenDecomposition",
            "TunedLens",
            "VocabularySide",
        )
    ),
    *(
        f"circuits.{name}"
        for name in (
            *("Agreement", "AttributionPatching", "CircuitEvaluation", "DiscoveredCircuit", "Edge", "EdgeScores"),
            *("Node", "PruningStep"),
        )
    ),
    *("interventions.Site", "interventions.Taken", "interventions.Written"),
    *("sweep.Experiment", "sweep.Pair", "sweep.SweepPlan", "sweep.Way"),
}
"""Classes whose objects functions return: nobody makes them."""


def public_classes():
    """Yields the public classes, those that others inherit from first."""
    yield from (Effects, LogitMetric, TransformerBridge, ActivationCache)
    for module in MODULES.values():
        yield from (one for name in module.__all__ if inspect.isclass(one := getattr(module, name)))


def methods():
    """Returns the public methods with arguments, each once, by the name of their class and their own."""
    found = {}
    for owner in public_classes():
        for name in (*(one for one in dir(owner) if not one.startswith("_")), "__call__", "__getitem__"):
            method = inspect.getattr_static(owner, name, None)
            function = getattr(method, "__func__", method)
            if isinstance(function, FunctionType) and function.__module__.startswith("clearspan."):
                found.setdefault(function, f"{owner.__name__}.{name}")
    return {name for function, name in found.items() if len(inspect.signature(function).parameters) > 1}


def functions():
    """Returns the public functions, each once, by module and name."""
    found = {}
    for module, own in MODULES.items():
        for name in own.__all__:
            if isinstance(function := getattr(own, name), FunctionType):
                found.setdefault(function, f"{module}.{name}")
    return set(found.values())


def constructors():
    """Returns the public classes that can be made, each once, by module and name."""
    found = {}
    for module, own in MODULES.items():
        for name in own.__all__:
            one = getattr(own, name)
            if inspect.isclass(one) and not inspect.isabstract(one) and one.__module__.startswith("clearspan"):
                found.setdefault(one, f"{module}.{name}")
    return {name for one, name in found.items() if inspect.signature(one).parameters}


def call(kit, name):
    """Returns a public callable, with arguments that work."""
    if name in CALLS:
        module, _, own = name.partition(".")
        return getattr(MODULES[module], own), CALLS[name](kit)
    owner, _, method = name.partition(".")
    return getattr(kit.object(owner, is_new=method in CHANGING), method), METHODS[name](kit)
