"""Paths, edges and circuits by brute force: streams are made by forwards in which every part is given."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .reference import Edit, Reference, full_name
from .rows import Rows


@dataclass(frozen=True)
class Sender:
    """What writes to the residual stream.

    Attributes:
        kind: `"embed"`, `"head"`, `"mlp"` or `"neuron"`.
        layer: The layer; -1 for the embeddings.
        place: The head or neuron.
    """

    kind: str
    layer: int = -1
    place: int | None = None

    def __str__(self) -> str:
        names = {"head": f"L{self.layer}H{self.place}", "mlp": f"L{self.layer}.mlp"}
        return {"embed": "embed", "neuron": f"L{self.layer}N{self.place}", **names}[self.kind]


@dataclass(frozen=True)
class Receiver:
    """What reads the residual stream.

    Attributes:
        kind: `"q"`, `"k"`, `"v"`, `"mlp"` or `"logits"`.
        layer: The layer; the number of layers for the logits.
        place: The head; the key and value head for `"k"` and `"v"`.
        heads: The query heads that it serves.
    """

    kind: str
    layer: int
    place: int | None = None
    heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind in ("mlp", "logits"):
            return "logits" if self.kind == "logits" else f"L{self.layer}.mlp"
        span = f"{self.heads[0]}" if len(self.heads) == 1 else f"{self.heads[0]}-{self.heads[-1]}"
        return f"L{self.layer}H{span}.{self.kind}"


def senders_of(reference: Reference) -> list[Sender]:
    """Returns `embed`, then each layer's heads and MLP."""
    found = [Sender("embed")]
    for layer in range(reference.n_layers):
        found += [Sender("head", layer, head) for head in range(reference.n_heads)]
        found.append(Sender("mlp", layer))
    return found


def receivers_of(reference: Reference) -> list[Receiver]:
    """Returns each layer's query, key and value inputs and its MLP, then the logits."""
    found, size = [], reference.group_size
    for layer in range(reference.n_layers):
        found += [Receiver("q", layer, head, (head,)) for head in range(reference.n_heads)]
        groups = [tuple(range(first, first + size)) for first in range(0, reference.n_heads, size)]
        found += [Receiver(kind, layer, place, heads) for kind in "kv" for place, heads in enumerate(groups)]
        found.append(Receiver("mlp", layer))
    return [*found, Receiver("logits", reference.n_layers)]


def is_before(reference: Reference, sender: Sender, receiver: Receiver) -> bool:
    """Whether a receiver reads what a sender writes."""
    if sender.layer != receiver.layer:
        return sender.layer < receiver.layer
    return receiver.kind == "mlp" and sender.kind == "head" and not reference.family.is_parallel


# --- what parts write and read ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """What all parts write in one run: heads before their output projection, MLPs as they add to the stream."""

    entering: Tensor
    z: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]

    @classmethod
    def of(cls, reference: Reference, rows: Rows) -> "Parts":
        """Returns what the parts of a plain run write."""
        layers = range(reference.n_layers)
        names = [full_name(point, layer) for point in ("z", "mlp_out") for layer in layers]
        values = reference.run(rows, (), ["blocks.0.hook_resid_pre", *names]).values
        z, mlp = (tuple(values[full_name(point, layer)] for layer in layers) for point in ("z", "mlp_out"))
        return cls(values["blocks.0.hook_resid_pre"], z, mlp)

    def edits(self) -> list[Edit]:
        """Returns edits that have every part write this."""
        z = [(full_name("z", layer), set_to(value)) for layer, value in enumerate(self.z)]
        mlp = [(full_name("mlp_out", layer), set_to(value)) for layer, value in enumerate(self.mlp)]
        return [("blocks.0.hook_resid_pre", set_to(self.entering)), *z, *mlp]

    def mixed(self, other: "Parts", senders: Iterable[Sender]) -> "Parts":
        """Returns these parts, with some senders writing what they do in another run."""
        entering, z, mlp = self.entering, [value.clone() for value in self.z], list(self.mlp)
        for sender in senders:
            match sender.kind:
                case "embed":
                    entering = other.entering
                case "mlp":
                    mlp[sender.layer] = other.mlp[sender.layer]
                case "head":
                    z[sender.layer][:, :, sender.place] = other.z[sender.layer][:, :, sender.place]
                case _:
                    raise ValueError(f"{sender} is no whole part")
        return Parts(entering, tuple(z), tuple(mlp))


def set_to(value: Tensor):
    """Returns the function that puts a value in place of another."""
    return lambda old: value


def read_at(reference: Reference, receiver: Receiver) -> str:
    """Returns the point of the stream that a receiver reads."""
    match receiver.kind:
        case "logits":
            return full_name("resid_post", reference.n_layers - 1)
        case "mlp":
            return full_name("mlp_in", receiver.layer)
    return full_name("resid_pre", receiver.layer)


def written_to(reference: Reference, receiver: Receiver, stream: Tensor) -> Edit:
    """Returns the edit by which a receiver, and it alone, reads a stream."""
    if receiver.kind not in "qkv":
        return read_at(reference, receiver), set_to(stream)

    def write(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, :, receiver.place] = stream
        return new

    return full_name(f"{receiver.kind}_input", receiver.layer), write


# --- paths and edges -------------------------------------------------------------------------------------------------


def carried(
    reference: Reference, base_rows: Rows, base: Parts, source_rows: Rows, source: Parts, sender: Sender, freeze: str
) -> dict[str, Tensor]:
    """Returns the streams of the base run in which one sender writes as in the source run, and others are frozen.

    Args:
        reference: The model.
        base_rows: The run that is changed.
        base: What its parts write.
        source_rows: The other run.
        source: What its parts write.
        sender: What writes.
        freeze: `"all"`: every other part writes what it does in the base run; `"attention"`: later MLPs are computed.
    """
    points = sorted({read_at(reference, receiver) for receiver in receivers_of(reference)})
    own: list[Edit] = []
    if sender.kind == "neuron":
        name = full_name("post", sender.layer)
        theirs = reference.run(source_rows, (), [name]).values[name][:, :, sender.place]

        def write(value: Tensor) -> Tensor:
            new = value.clone()
            new[:, :, sender.place] = theirs
            return new

        own = [(name, write)]
    mixed = base if sender.kind == "neuron" else base.mixed(source, [sender])
    if freeze == "all":
        edits = [edit for edit in mixed.edits() if not (own and edit[0] == full_name("mlp_out", sender.layer))]
        return reference.run(base_rows, [*edits, *own], points).values
    layers = range(reference.n_layers)
    names = [full_name("attn_out", layer) for layer in layers]
    outs = reference.run(base_rows, (), names).values
    frozen = [(names[layer], set_to(outs[names[layer]])) for layer in layers if layer > sender.layer]
    if sender.kind == "embed":
        own = [("blocks.0.hook_resid_pre", set_to(mixed.entering))]
    elif sender.kind == "head":
        own = [(full_name("z", sender.layer), set_to(mixed.z[sender.layer]))]
    elif sender.kind == "mlp":
        own = [(full_name("mlp_out", sender.layer), set_to(mixed.mlp[sender.layer]))]
    return reference.run(base_rows, [*own, *frozen], points).values


def path_logits(
    reference: Reference, base_rows: Rows, sender: Sender, receivers: Sequence[Receiver], streams: Mapping[str, Tensor]
) -> Tensor:
    """Returns the logits of the base run in which receivers read what a sender carries to them."""
    edits = [
        written_to(reference, receiver, streams[read_at(reference, receiver)])
        for receiver in receivers
        if is_before(reference, sender, receiver)
    ]
    return reference.run(base_rows, edits).logits


def edge_logits(
    reference: Reference, base_rows: Rows, base: Parts, source: Parts, edges: Sequence[tuple[Sender, Receiver]]
) -> Tensor:
    """Returns the logits of the base run in which each edge's receiver reads what its senders write in the source."""
    edits = []
    for receiver in dict.fromkeys(receiver for _, receiver in edges):
        senders = [sender for sender, other in edges if other == receiver]
        name = read_at(reference, receiver)
        stream = reference.run(base_rows, base.mixed(source, senders).edits(), [name]).values[name]
        edits.append(written_to(reference, receiver, stream))
    return reference.run(base_rows, edits).logits


# --- circuits --------------------------------------------------------------------------------------------------------


def circuit_logits(
    reference: Reference, rows: Rows, clean: Parts, corrupted: Parts, edges: Iterable[tuple[Sender, Receiver]]
) -> Tensor:
    """Returns the logits of a circuit's run: its edges carry this run, all others the corrupted one.

    Args:
        reference: The model.
        rows: Any input of the pair: all that is read is given.
        clean: What the parts write in the clean run, of which the embeddings are taken.
        corrupted: What they write in the corrupted run.
        edges: The circuit.
    """
    senders_to: dict[Receiver, list[Sender]] = {receiver: [] for receiver in receivers_of(reference)}
    for sender, receiver in edges:
        senders_to[receiver].append(sender)
    z, mlp = list(corrupted.z), list(corrupted.mlp)

    def reads(receiver: Receiver) -> Edit:
        own = Parts(clean.entering, tuple(z), tuple(mlp))
        name = read_at(reference, receiver)
        mixed = corrupted.mixed(own, senders_to[receiver])
        return written_to(reference, receiver, reference.run(rows, mixed.edits(), [name]).values[name])

    for layer in range(reference.n_layers):
        inputs = [reads(each) for each in senders_to if each.layer == layer and each.kind in "qkv"]
        name = full_name("z", layer)
        z[layer] = reference.run(rows, inputs, [name]).values[name]
        name = full_name("mlp_out", layer)
        mlp[layer] = reference.run(rows, [reads(Receiver("mlp", layer))], [name]).values[name]
    return reference.run(rows, [reads(Receiver("logits", reference.n_layers))]).logits


def edges_of(reference: Reference) -> list[tuple[Sender, Receiver]]:
    """Returns all edges."""
    return [
        (sender, receiver)
        for receiver in receivers_of(reference)
        for sender in senders_of(reference)
        if is_before(reference, sender, receiver)
    ]
