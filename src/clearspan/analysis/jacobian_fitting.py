"""Fitting a Jacobian lens: the mean derivative of the last residual stream, by batched backward passes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._forward.readout import exact
from clearspan.analysis.activations import depths_of
from clearspan.analysis.corpus import Corpus, pieces
from clearspan.analysis.jacobian_lens import JacobianLens
from clearspan.analysis.translators import name_of, stream_names
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.inputs import Batch
from clearspan.points import HookPoint
from clearspan.progress import Progress, shown


def fit_jacobian_lens(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    depths: int | Sequence[int] | None = None,
    skip_first: int = 16,
    length: int = 128,
    batch_size: int = 8,
    progress: bool | Progress = True,
) -> JacobianLens:
    """Returns the Jacobian lens of a model over texts: what a change of the stream makes of the last one, on average.

    `jacobian[depth] = mean over texts of mean over t of sum over t' of d last[t'] / d stream[depth, t]`, where `t` and
    `t'` run over a text's positions but the first `skip_first`, at which streams are unlike others, and the last. In a
    causal model `t'` before `t` adds nothing. The derivative is exact, by backward passes: one gives a row of the
    Jacobians of all depths for all texts of a batch, so a batch takes `d_model` of them. The model's parameters get no
    gradient. Gradients are the model's dtype; half precision rounds them, and the sums are float32.

    Args:
        bridge: The model, which stays as it is. Set it to `eval()` if it has dropout.
        corpus: Any input, or any number of them; they are cut into pieces, and each piece counts as a text.
        depths: At which: 0 for the embedding, `l + 1` for what leaves block `l`; negative from the end; by default all
            before the last.
        skip_first: Positions at a text's start that are left out. A text with nothing left is passed over.
        length: Tokens in a piece, at most.
        batch_size: Rows in a backward pass. Where fewer texts are left, each row is there several times, for as many
            rows of the Jacobians.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)` after each text.

    Raises:
        InvalidArgumentError: No text that is long enough, a depth that is not there or is the last, a size that is not
            positive, or a model whose blocks hand on several streams.
        NotFiniteError: A derivative is infinite or not a number.
        NoTokenizerError: Texts, and the bridge has no tokenizer.
        WholeForwardError: Blocks of the model do not run apart.

    Example:
        >>> import clearspan
        >>> from clearspan.analysis import lens_readings
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> lens = fit_jacobian_lens(bridge, "def f(self, x): return self.x", skip_first=1)
        >>> lens.depths, lens.jacobians.shape
        ((0, 1, 2, 3, 4), torch.Size([5, 256, 256]))
        >>> lens_readings(bridge, "def f(self", lens=lens).kl.shape
        torch.Size([6, 1])

    References:
        Gurnee et al. (2026), transformer-circuits.pub/2026/workspace, for the estimator.
    """
    check_counts(length=length, batch_size=batch_size)
    check_counts(0, skip_first=skip_first)
    rows = pieces(bridge, corpus, length)
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    chosen = list(range(n_layers)) if depths is None else sorted({*depths_of(n_layers, depths)})
    if chosen[-1] == n_layers:
        raise InvalidArgumentError("the last depth is what the others are derived by", expected=f"0 to {n_layers - 1}")
    if len(bridge.blocks[0].stream_shape) > 1:
        raise InvalidArgumentError(
            "a Jacobian lens is of one residual stream",
            got=f"{bridge.blocks[0].stream_shape[0]} streams between the blocks of {name_of(bridge)}",
        )
    long = (rows.lengths > skip_first + 1).nonzero()[:, 0]
    if not len(long):
        raise InvalidArgumentError(
            "no text is long enough",
            expected=f"more than {skip_first + 1} tokens",
            got=f"{rows.longest} at most",
            fix="skip_first=0, or longer texts",
        )
    totals = [torch.zeros(d_model, d_model) for _ in chosen]
    norms, done = torch.zeros(len(chosen), dtype=torch.double), 0
    with shown(progress) as tell:
        for numbers in long.split(batch_size):
            batch = rows.select(numbers)
            found, sizes = _summed(bridge, batch, chosen, skip_first, max(1, batch_size // batch.rows))
            totals = [total + one.cpu() for total, one in zip(totals, found, strict=True)]
            norms += sizes
            done += batch.rows
            tell("Jacobian lens", done, len(long))
    jacobians = torch.stack(totals) / done
    if not jacobians.isfinite().all():
        raise NotFiniteError(
            "the derivatives of the last stream are not finite",
            got=str(bridge.hf_model.dtype),
            fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
        )
    return JacobianLens(jacobians, tuple(chosen), (norms / done).float(), n_layers, done, name_of(bridge))


def _summed(
    bridge: TransformerBridge, batch: Batch, depths: list[int], skip_first: int, copies: int
) -> tuple[list[Float[Tensor, "d_model d_model"]], Float[Tensor, "depth"]]:
    """Returns the Jacobians of a batch's texts, summed over texts, by depth; and the sums of the streams' mean norms.

    Args:
        bridge: The model.
        batch: The texts, each of more than `skip_first + 1` tokens.
        depths: Rising.
        skip_first: Positions at a text's start that are left out.
        copies: How often each text runs at a time: for as many rows of the Jacobians.
    """
    counts = torch.zeros(batch.rows, batch.width)
    for row, columns in enumerate(batch.real_columns):
        counts[row, list(columns[skip_first:-1])] = 1
    final, streams = _on_graph(bridge, batch.repeated(copies), depths)
    is_counted = counts.bool().to(final.device)
    weights = counts / counts.sum(1, keepdim=True)
    d_model = final.shape[-1]
    totals = [torch.zeros(d_model, d_model, device=stream.device) for stream in streams]
    for start in range(0, d_model, copies):
        outputs = range(start, min(start + copies, d_model))
        seed = torch.zeros_like(final).unflatten(0, (copies, batch.rows))
        for copy, output in enumerate(outputs):
            seed[copy, :, :, output] = is_counted.to(seed.dtype)
        gradients = torch.autograd.grad(final, streams, seed.flatten(0, 1), retain_graph=outputs.stop < d_model)
        for total, gradient in zip(totals, gradients, strict=True):
            by_copy = exact(gradient).unflatten(0, (copies, batch.rows))[: len(outputs)]
            total[outputs.start : outputs.stop] = torch.einsum("crpd,rp->cd", by_copy, weights.to(by_copy))
    sizes = [(exact(one[: batch.rows]).norm(dim=-1).cpu() * weights).sum() for one in streams]
    return totals, torch.stack(sizes).detach().double()


@torch.enable_grad()
def _on_graph(
    bridge: TransformerBridge, batch: Batch, depths: list[int]
) -> tuple[Float[Tensor, "row pos d_model"], list[Float[Tensor, "row pos d_model"]]]:
    """Returns the last stream of a run, and those of some depths on its graph, which starts at the first of them."""
    names = [stream_names(bridge.cfg.n_layers)[depth] for depth in depths]
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> Tensor:
        kept[hook.name] = value.detach().requires_grad_() if hook.name == names[0] else value.view_as(value)
        return kept[hook.name]

    final = bridge.run_with_hooks(batch, fwd_hooks=[(name, keep) for name in names], stop_at_layer=bridge.cfg.n_layers)
    assert isinstance(final, Tensor), "a run that stops at a layer returns the stream"
    return final, [kept[name] for name in names]
