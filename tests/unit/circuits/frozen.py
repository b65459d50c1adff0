"""What edges, paths and circuits are, by whole forwards in which every part is given what it writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

PADDINGS = ("none", "left", "right", "mixed", "holes")
"""Where rows are padded. `mixed`: the two inputs on different sides. `holes`: in the middle of a row too."""


def pair_of(padding, seed=8, rows=2, length=6):
    """Returns a clean and a corrupted input of one real length, row by row, each with its mask."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(1, 97, (2, rows, length), generator=generator)
    if padding == "none":
        return clean, corrupted
    masks = []
    for side in {"mixed": ("left", "right")}.get(padding, (padding, padding)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[-1, {"left": [0, 1], "right": [-1, -2], "holes": [0, 3]}[side]] = 0
        masks.append(mask)
    return tuple(
        {"input_ids": ids * mask, "attention_mask": mask} for ids, mask in zip((clean, corrupted), masks, strict=True)
    )


def laid_alike(bridge, pair):
    """Returns both inputs as batches in the clean one's columns."""
    clean, corrupted = map(bridge.to_batch, pair)
    return clean, corrupted.laid_out_as(clean)


def set_to(value):
    """Returns a hook that writes one value."""
    return lambda old, hook: value


@dataclass
class Parts:
    """What all parts of a run write: heads before their output projection, MLPs as they add to the stream."""

    entering: Tensor
    z: list[Tensor]
    mlp: list[Tensor]

    @classmethod
    def of(cls, bridge, batch):
        layers = range(bridge.cfg.n_layers)
        _, cache = bridge.run_with_cache(batch)
        return cls(cache["resid_pre", 0], [cache["z", at] for at in layers], [cache["mlp_out", at] for at in layers])

    def hooks(self):
        z = [(f"blocks.{layer}.attn.hook_z", set_to(value)) for layer, value in enumerate(self.z)]
        mlp = [(f"blocks.{layer}.hook_mlp_out", set_to(value)) for layer, value in enumerate(self.mlp)]
        return [("blocks.0.hook_resid_pre", set_to(self.entering)), *z, *mlp]

    def mixed(self, other, senders):
        """Returns these parts, with some senders writing what they do in another run."""
        mixed = Parts(self.entering, [value.clone() for value in self.z], list(self.mlp))
        for sender in senders:
            match sender.kind:
                case "embed":
                    mixed.entering = other.entering
                case "mlp":
                    mixed.mlp[sender.layer] = other.mlp[sender.layer]
                case "head":
                    head = sender.heads[0]
                    mixed.z[sender.layer][:, :, head] = other.z[sender.layer][:, :, head]
        return mixed


def values_at(bridge, batch, hooks, names):
    """Returns what a run with hooks shows at some points, after the hooks there."""
    kept = {}

    def keep(value, hook):
        kept[hook.name] = value.clone()

    bridge.run_with_hooks(batch, fwd_hooks=[*hooks, *((name, keep) for name in names)])
    return kept


def stream(bridge, graph, batch, parts, receiver):
    """Returns the stream that a receiver reads where all parts are given."""
    name = graph.stream_of(receiver)
    return values_at(bridge, batch, parts.hooks(), [name])[name]


def reading(graph, receiver, value):
    """Returns the hook by which a receiver, and nothing else, reads a stream."""
    place = receiver.place

    def write(old, hook):
        if place is None:
            return value
        old[:, :, place] = value
        return old

    return graph.input_of(receiver), write


def logits_with_edges(bridge, graph, base, source, edges):
    """Returns the logits of the base run in which each edge's receiver reads what its senders write in the source."""
    ours, theirs = Parts.of(bridge, base), Parts.of(bridge, source)
    hooks = []
    for receiver in dict.fromkeys(edge.receiver for edge in edges):
        senders = [edge.sender for edge in edges if edge.receiver == receiver]
        hooks.append(reading(graph, receiver, stream(bridge, graph, base, ours.mixed(theirs, senders), receiver)))
    return bridge.run_with_hooks(base, fwd_hooks=hooks)


def logits_of_circuit(bridge, circuit, clean, corrupted):
    """Returns the logits of a circuit's run: its edges carry this run, all others the corrupted one."""
    graph, entering, outside = circuit.graph, Parts.of(bridge, clean).entering, Parts.of(bridge, corrupted)
    own = Parts(entering, list(outside.z), list(outside.mlp))

    def reads(receiver):
        senders = [edge.sender for edge in circuit.edges if edge.receiver == receiver]
        value = stream(bridge, graph, clean, outside.mixed(own, senders), receiver)
        return reading(graph, receiver, value)

    for layer in range(graph.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        own.z[layer] = values_at(bridge, clean, map(reads, graph.attention_inputs(layer)), [name])[name]
        name = f"blocks.{layer}.hook_mlp_out"
        own.mlp[layer] = values_at(bridge, clean, [reads(graph.node(f"L{layer}.mlp"))], [name])[name]
    return bridge.run_with_hooks(clean, fwd_hooks=[reads(graph.node("logits"))])
