"""The vocabulary of hook points as data: each name's axes, meaning, the effect of a write, and why it may be absent.

Points, their shapes, the table of `bridge.points()`, the documentation and the tests use it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from clearspan.points.address import Address
from clearspan.shapes import Axes, axes


@dataclass(frozen=True)
class Entry:
    """One name of the vocabulary.

    Attributes:
        name: The name; `{l}` stands for a layer, and a leading `*.` for any component.
        axes: Its axes, unless the component says otherwise.
        value: What it shows.
        write: What a write changes.
        absent: Why an architecture lacks it, unless its adapter gives another reason.
    """

    name: str
    axes: Axes
    value: str
    write: str
    absent: str = ""

    @property
    def leaf(self) -> str:
        """The name without its component, such as `hook_q`."""
        return self.name.rpartition(".")[2]

    @property
    def component(self) -> str:
        """Canonical path of its component, with `{l}` for the layer; empty for the model itself."""
        return self.name.rpartition(".")[0]


_STREAMS = "batch pos stream d_model"
_ONE_STREAM = "the residual is one stream"
_NO_ALTUP = "the sublayers read the residual itself, and no prediction of it by AltUp"
_STREAM, _HEADS, _KV_HEADS, _SQUARE = (
    "batch pos d_model",
    "batch pos head d_head",
    "batch pos kv_head d_head",
    "batch head q_pos k_pos",
)
_DENSE = "the MLP is dense, not a mixture of experts"
_BLOCK, _ATTN, _MLP = "blocks.{l}.", "blocks.{l}.attn.", "blocks.{l}.mlp."


def _norm(path: str, place: str, absent: str) -> Iterator[Entry]:
    yield Entry(
        f"{path}.hook_scale",
        axes("batch pos 1"),
        f"denominator of the norm {place}: the root of its input's variance (layer norm) or mean square (RMS norm) "
        "plus epsilon",
        "the norm's output",
        absent,
    )
    yield Entry(
        f"{path}.hook_normalized",
        axes(_STREAM),
        f"input of the norm {place}, centred (layer norm) and divided by the scale, before weight and bias",
        "the norm's output",
        absent,
    )


_NO_MIXER = "the model's layers mix positions by attention alone"
_M = "blocks.{l}.mixer."


def _mixer(name: str, dimensions: str, value: str, write: str) -> Entry:
    return Entry(f"{_M}{name}", axes(dimensions), value, write, _NO_MIXER)


_MIXER = (
    _mixer("hook_in_proj", "batch pos width", "output of the mixer's input projection", "all that is computed of it"),
    _mixer(
        "hook_q_pre_conv",
        "batch pos qk_head d_head_qk",
        "queries as projected, before the convolution",
        "`hook_conv`, at this position and the next ones",
    ),
    _mixer(
        "hook_k_pre_conv",
        "batch pos qk_head d_head_qk",
        "keys as projected, before the convolution",
        "`hook_conv`, at this position and the next ones",
    ),
    _mixer(
        "hook_v_pre_conv",
        "batch pos head d_head_v",
        "values as projected, before the convolution",
        "`hook_conv`, at this position and the next ones",
    ),
    _mixer(
        "hook_conv_in",
        "batch pos d_inner",
        "what the input gate multiplies before the convolution",
        "`hook_conv`, at this position and the next ones",
    ),
    _mixer(
        "hook_conv",
        "batch pos width",
        "result of the convolution over the last positions, after its activation function",
        "all that is computed of it",
    ),
    _mixer(
        "hook_x_proj",
        "batch pos width",
        "output of the projection to step sizes, B and C, before any norm of these",
        "step sizes, B and C",
    ),
    _mixer("hook_dt_proj", "batch pos head", "step sizes before their bias and softplus", "`hook_dt`"),
    _mixer(
        "hook_dt",
        "batch pos head",
        "step sizes as used, after bias, softplus and limits: the state decays by exp(dt A), and takes in dt B x",
        "the state from this position on",
    ),
    _mixer(
        "hook_A",
        "batch pos head",
        "A as used at each position, negative: a parameter, the same for all rows and positions unless it is written",
        "the decay at this position alone",
    ),
    _mixer("hook_B", "batch pos group state", "B: how an input enters the state", "the state from this position on"),
    _mixer("hook_C", "batch pos group state", "C: how the state is read out", "`hook_scan_out` at this position"),
    _mixer(
        "hook_scan_in",
        "batch pos head d_head",
        "what the state sums up over positions",
        "`hook_scan_out` from this position on",
    ),
    _mixer("hook_q", "batch pos qk_head d_head_qk", "queries as given to the recurrence", "`hook_recurrence_out` here"),
    _mixer(
        "hook_k",
        "batch pos qk_head d_head_qk",
        "keys as given to the recurrence",
        "`hook_recurrence_out` from this position on",
    ),
    _mixer(
        "hook_v",
        "batch pos head d_head_v",
        "values as given to the recurrence",
        "`hook_recurrence_out` from this position on",
    ),
    _mixer("hook_beta", "batch pos head", "how much of a key's value is replaced", "the state from this position on"),
    _mixer(
        "hook_log_decay",
        "batch pos head",
        "logarithm of what the state is multiplied by before each position",
        "the state from this position on",
    ),
    _mixer(
        "hook_decay",
        "batch pos d_inner",
        "what the state is multiplied by before each position",
        "the state from this position on",
    ),
    _mixer(
        "hook_input_gate",
        "batch pos head",
        "the gate on what enters the convolution (LFM2), or on the state's input, before its exponential (xLSTM)",
        "the convolution or the state, from this position on",
    ),
    _mixer(
        "hook_forget_gate",
        "batch pos head",
        "the forget gate before its sigmoid",
        "the state from this position on",
    ),
    _mixer(
        "hook_effective_attention",
        "batch head q_pos k_pos",
        "how much of each position's input or value is in each later result, computed by the model's own function on "
        "basis vectors; kept in a cache where it is asked for by name",
        "nothing: a write raises",
    ),
    _mixer(
        "hook_state",
        "batch pos head d_head state",
        "the state after each position, computed by the model's own function for single tokens; kept in a cache where "
        "it is asked for by name",
        "what is read at this position, and the states after it",
    ),
    _mixer(
        "hook_scan_out",
        "batch pos head d_head",
        "result of the scan, with the skip connection D, before the gate and any norm",
        "`hook_ssm_out`",
    ),
    _mixer(
        "hook_recurrence_out",
        "batch pos head d_head_v",
        "result of the recurrence, before the gate and any norm",
        "`hook_ssm_out`",
    ),
    _mixer(
        "hook_gate",
        "batch pos d_inner",
        "the gate on the recurrence's result, before its activation function",
        "`hook_ssm_out`",
    ),
    _mixer("hook_ssm_out", "batch pos d_inner", "input of the output projection", "what the mixer adds"),
)


VOCABULARY: tuple[Entry, ...] = (
    Entry(
        "hook_embed",
        axes(_STREAM),
        "what the token embedding adds to the residual stream, after any scale, norm or projection",
        "everything after it",
    ),
    Entry(
        "hook_pos_embed",
        axes(_STREAM),
        "what a position embedding, learned or of sines, adds to the residual stream, for every row of the batch",
        "everything after it, for each row on its own",
        "positions are not embedded: attention itself tells them apart",
    ),
    Entry(
        "hook_type_embed",
        axes(_STREAM),
        "what the embedding of token types adds to the residual stream, for every row of the batch",
        "everything after it, for each row on its own",
        "tokens have no types",
    ),
    Entry(
        f"{_BLOCK}hook_streams_pre",
        axes(_STREAMS),
        "residual streams entering the block; `hook_streams` is another name of it",
        "all that the block reads and hands on",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}hook_streams",
        axes(_STREAMS),
        "residual streams entering the block",
        "all that the block reads and hands on",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}hook_streams_added",
        axes(_STREAMS),
        "what the block adds to all residual streams before its first sublayer reads them, such as an embedding",
        "the streams from there on",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}attn_connection.hook_write",
        axes("batch pos stream"),
        "how much of what the sublayer gives is written to each residual stream",
        "the streams after the sublayer",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}attn_connection.hook_mix",
        axes("batch pos stream to_stream"),
        "how much of each residual stream goes on in each, before the sublayer's output is written",
        "the streams after the sublayer",
        _ONE_STREAM,
    ),
    Entry(f"{_BLOCK}hook_resid_pre", axes(_STREAM), "residual stream entering the block", "both branches of the block"),
    *_norm(f"{_BLOCK}ln1", "before attention (or what the block runs first)", "no norm comes before attention"),
    Entry(
        f"{_BLOCK}hook_attn_in",
        axes("batch pos kv_head d_model"),
        "residual stream as read by each group of heads that shares keys and values (each head, in multi-head "
        "attention)",
        "that group's queries, keys and values alone",
    ),
    Entry(
        f"{_BLOCK}hook_q_input",
        axes("batch pos head d_model"),
        "residual stream as read by each head's query",
        "that query alone",
    ),
    Entry(
        f"{_BLOCK}hook_k_input",
        axes("batch pos kv_head d_model"),
        "residual stream as read by each key projection",
        "that key alone",
    ),
    Entry(
        f"{_BLOCK}hook_v_input",
        axes("batch pos kv_head d_model"),
        "residual stream as read by each value projection",
        "that value alone",
    ),
    Entry(f"{_ATTN}hook_q", axes(_HEADS), "queries as projected, before any norm and rotary embedding", "scores"),
    Entry(f"{_ATTN}hook_k", axes(_KV_HEADS), "keys as projected, before any norm and rotary embedding", "scores"),
    Entry(f"{_ATTN}hook_v", axes(_KV_HEADS), "values", "`hook_z`"),
    *_norm(f"{_ATTN}q_norm", "on queries", "queries are not normed"),
    *_norm(f"{_ATTN}k_norm", "on keys", "keys are not normed"),
    Entry(
        f"{_ATTN}hook_rot_q",
        axes(_HEADS),
        "queries as used in the product, after norm and rotary embedding",
        "scores",
        "no rotary embedding and no query norm: the product reads hook_q as it is",
    ),
    Entry(
        f"{_ATTN}hook_rot_k",
        axes(_KV_HEADS),
        "keys as used in the product, after norm and rotary embedding; with a KV cache, those of all tokens",
        "scores",
        "no rotary embedding and no key norm: the product reads hook_k as it is",
    ),
    Entry(
        f"{_ATTN}hook_attn_scores",
        axes(_SQUARE),
        "input of the softmax: scaled, capped, biased and masked; where there are sinks, before a row's sink is joined "
        "to it",
        "the pattern",
    ),
    Entry(
        f"{_ATTN}hook_pattern",
        axes(_SQUARE),
        "what multiplies the values in the product; a few models then scale it by the sink's share",
        "`hook_z`",
    ),
    Entry(
        f"{_ATTN}hook_z",
        axes(_HEADS),
        "pattern times values, by head: input of the output projection, or of the gate or norm before it",
        "what attention adds",
    ),
    Entry(
        f"{_ATTN}hook_gate",
        axes(_HEADS),
        "the gate that multiplies z before the output projection, after its activation function",
        "what attention adds",
        "no gate lies between z and the output projection",
    ),
    Entry(
        f"{_ATTN}hook_o_in",
        axes(_HEADS),
        "input of the output projection by head, where it is z after a gate or norm",
        "what attention adds",
        "neither gate nor norm lies between z and the output projection, which reads hook_z",
    ),
    Entry(
        f"{_ATTN}hook_result",
        axes("batch pos head d_model"),
        "each head's own contribution, `z @ W_O[head]`; their sum and the output bias are the projection's output",
        "what attention adds",
    ),
    *_norm(f"{_BLOCK}ln1_post", "on attention's output", "no norm comes after attention"),
    Entry(
        f"{_BLOCK}hook_attn_out",
        axes(_STREAM),
        "what attention adds to the residual stream, after any norm, gate or multiplier",
        "the residual stream after it",
    ),
    *_MIXER,
    Entry(
        f"{_BLOCK}hook_mixer_in",
        axes(_STREAM),
        "residual stream as read by the mixer: a state space, linear attention or convolution",
        "the mixer's input alone; the residual branch keeps its value",
        _NO_MIXER,
    ),
    Entry(
        f"{_BLOCK}hook_mixer_out",
        axes(_STREAM),
        "what the mixer adds to the residual stream, after any norm, gate or multiplier",
        "the residual stream after it",
        _NO_MIXER,
    ),
    Entry(
        f"{_BLOCK}hook_resid_mid",
        axes(_STREAM),
        "residual stream between attention (or a mixer) and MLP",
        "the MLP's input and the residual branch",
        "attention and MLP run in parallel: no residual stream lies between them",
    ),
    Entry(
        f"{_BLOCK}hook_mlp_in",
        axes(_STREAM),
        "residual stream as read by the MLP",
        "the MLP's input alone; the residual branch keeps its value",
    ),
    Entry(
        f"{_BLOCK}hook_streams_mid",
        axes(_STREAMS),
        "residual streams between attention (or a mixer) and MLP",
        "what the MLP's connection reads, and the streams that go on",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}hook_streams_mid2",
        axes(_STREAMS),
        "residual streams after the second stage of a block that has three or more",
        "what the next connection reads, and the streams that go on",
        _ONE_STREAM,
    ),
    Entry(
        f"{_BLOCK}hook_resid_mid2",
        axes(_STREAM),
        "residual stream after the second stage of a block that has three or more; `hook_resid_mid3` and so on follow",
        "what the next sublayers read, and the residual branch",
        "the block has no more than two stages",
    ),
    *_norm(f"{_BLOCK}ln2", "before the MLP (or what the block runs second)", "no norm comes before the MLP"),
    Entry(
        f"{_MLP}hook_router_logits",
        axes("batch pos expert"),
        "the router's linear output, before softmax or sigmoid, bias and choice",
        "which experts are chosen, and their weights",
        _DENSE,
    ),
    Entry(
        f"{_MLP}hook_expert_weights",
        axes("batch pos k"),
        "weights of the experts chosen for each token",
        "what the MLP adds",
        _DENSE,
    ),
    Entry(
        f"{_MLP}hook_expert_indices",
        axes("batch pos k"),
        "indices of the experts chosen for each token",
        "what the MLP adds",
        _DENSE,
    ),
    Entry(
        f"{_MLP}hook_pre",
        axes("batch pos d_mlp"),
        "input of the activation function (of the gate, in a gated MLP)",
        "`hook_post`",
    ),
    Entry(
        f"{_MLP}hook_pre_linear",
        axes("batch pos d_mlp"),
        "the linear branch of a gated MLP",
        "`hook_post`",
        "the MLP has no gate",
    ),
    Entry(f"{_MLP}hook_post", axes("batch pos d_mlp"), "input of the MLP's output projection", "what the MLP adds"),
    *_norm(f"{_BLOCK}ln2_post", "on the MLP's output", "no norm comes after the MLP"),
    Entry(
        f"{_BLOCK}hook_mlp_out",
        axes(_STREAM),
        "what the MLP adds to the residual stream, after any norm, gate or multiplier",
        "`hook_resid_post`",
    ),
    Entry(
        f"{_BLOCK}hook_resid_post",
        axes(_STREAM),
        "residual stream leaving the block",
        "the next block, or the final norm",
    ),
    Entry(
        f"{_BLOCK}hook_active_pre",
        axes(_STREAM),
        "the one stream that AltUp predicts of all, as attention's norm and the residual branch read it",
        "both branches of the block",
        _NO_ALTUP,
    ),
    Entry(
        f"{_BLOCK}hook_active_mid",
        axes(_STREAM),
        "the predicted stream between attention and MLP",
        "the MLP's input and the residual branch",
        _NO_ALTUP,
    ),
    Entry(
        f"{_BLOCK}hook_active_post",
        axes(_STREAM),
        "the predicted stream after the MLP, by which AltUp corrects all streams",
        "`hook_streams_post`",
        _NO_ALTUP,
    ),
    Entry(
        f"{_BLOCK}altup.hook_mix",
        axes("batch pos stream to_stream"),
        "how much of each stream is in the prediction of each",
        "the predicted streams",
        _NO_ALTUP,
    ),
    Entry(
        f"{_BLOCK}altup.hook_write",
        axes("batch pos stream"),
        "how much of what the sublayers changed in the predicted stream is added to each stream",
        "`hook_streams_post`",
        _NO_ALTUP,
    ),
    Entry(
        f"{_BLOCK}hook_streams_post",
        axes(_STREAMS),
        "residual streams leaving the block",
        "the next block, or what makes one vector of the streams for the final norm",
        _ONE_STREAM,
    ),
    *_norm("ln_final", "before the unembedding", "no norm comes before the unembedding"),
    Entry(
        "hook_logits",
        axes("batch pos d_vocab"),
        "what the model returns as logits, after any scale or cap",
        "what the run returns, and the loss",
    ),
)
"""The names that all architectures share, in the order of the forward."""

RAW_ENDS: tuple[Entry, ...] = (
    Entry("*.hook_in", axes(_STREAM), "input of the component's own module", "what this module computes, alone"),
    Entry("*.hook_out", axes(_STREAM), "output of the component's own module", "what reads this output, alone"),
)
"""The two points that every component has."""

_GIVES = "what the autoencoder gives the model"
OF_AUTOENCODERS: tuple[Entry, ...] = (
    Entry("*.hook_sae_input", axes(_STREAM), "what the sparse autoencoder reads", "its features"),
    Entry("*.hook_sae_acts_post", axes("batch pos feature"), "its features' activations", "its reconstruction"),
    Entry("*.hook_sae_recons", axes(_STREAM), "its reconstruction of what it reads", _GIVES),
    Entry("*.hook_sae_error", axes(_STREAM), "the value less its reconstruction, where that is kept", _GIVES),
    Entry("*.hook_sae_output", axes(_STREAM), _GIVES, "the value that the model goes on with"),
)
"""Points inside a sparse autoencoder that is on a hook point, behind that point's name."""

_ALL = (*VOCABULARY, *RAW_ENDS, *OF_AUTOENCODERS)
_BY_NAME = {entry.name: entry for entry in _ALL}
_BY_LEAF = {entry.leaf: entry for entry in reversed(_ALL)}


def template_of(name: str) -> str:
    """Returns a point's name with `{l}` in place of its layer.

    Example:
        >>> template_of("blocks.3.attn.hook_q")
        'blocks.{l}.attn.hook_q'
    """
    return Address.parse(name).template


def entry_of(name: str) -> Entry:
    """Returns the entry of a point's name: its own, or that of points with the same last part."""
    template = template_of(name)
    if template not in _BY_NAME:
        template = unnumbered(template)
    if template in _BY_NAME:
        return _BY_NAME[template]
    leaf = template.rpartition(".")[2]
    assert leaf in _BY_LEAF, f"{name} is not in the vocabulary"
    return _BY_LEAF[leaf]


_NUMBERED = re.compile(r"(?<![a-z])(?:(attn|mlp|mixer|moe|ple|laurel)\d*|([qkv])\d+(?=_input))(?![a-z0-9])")


def unnumbered(template: str) -> str:
    """Returns the name that a further sublayer's point has for the first one: `hook_mlp_out` for `hook_mlp2_out`.

    Example:
        >>> unnumbered("blocks.{l}.hook_moe_out"), unnumbered("blocks.{l}.attn2.hook_q")
        ('blocks.{l}.hook_mlp_out', 'blocks.{l}.attn.hook_q')
    """
    template = re.sub(r"(?<=hook_resid_mid)\d+|(?<=hook_streams_mid)\d+", "2", template)
    return _NUMBERED.sub(
        lambda found: {"moe": "mlp", "ple": "mlp", "laurel": "mlp"}.get(found[1], found[1] or found[2]), template
    )


def names_in_block() -> Iterator[str]:
    """Yields the names that blocks may have, without the block's own, such as `attn.hook_q`."""
    return (entry.name.removeprefix(_BLOCK) for entry in VOCABULARY if entry.name.startswith(_BLOCK))


def is_in_vocabulary(name: str) -> bool:
    """Returns whether all architectures share the name; one of them may lack the point."""
    return template_of(name) in _BY_NAME
