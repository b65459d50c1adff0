"""Training of tuned lenses."""

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.corpus import Batch, Corpus, check_positive, drawn, padded, pieces
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge

from .streams import kl_divergence, read, real_streams, stream_names
from .tuned_lens import TunedLens, translated

Affine = tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model"]]


def train_tuned_lens(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    steps: int = 250,
    batch_size: int = 8,
    length: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> TunedLens:
    """Returns a tuned lens trained to predict, at every depth, what the model itself predicts.

    Each depth's translator `h + A h + b` starts with `A = 0, b = 0`, which is the logit lens, and goes down the
    gradient of `KL(final || softmax(read(h + A h + b)))` in nats, mean over the batch's real positions. The model is
    run once a step; its streams are kept for that step alone, on its own device, and its parameters get no gradient.

    Args:
        bridge: The model, which stays as it is. Set it to `eval()` if it has dropout.
        corpus: Texts, cut into pieces, or token ids `[text, pos]` without padding.
        steps: Batches.
        batch_size: Pieces in a batch.
        length: Tokens in a piece, at most.
        learning_rate: Of AdamW, in its first step; it falls linearly to 0.
        weight_decay: Of `A` and `b`, which draws the lens towards the logit lens.
        seed: Of the order of pieces. Torch's own seed is neither read nor changed.
        progress: Called after each step.

    Raises:
        InvalidArgumentError: No text, or a size or rate that is not positive.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> lens = train_tuned_lens(bridge, [inspect.getsource(inspect)], steps=4, batch_size=2, length=64)
        >>> bool((lens.losses[-1] < lens.losses[0]).all())
        True

    References:
        Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112,
        section 3: translators and loss. Its authors' code takes SGD with Nesterov momentum and 262,144 tokens a step;
        here it is AdamW, which needs fewer.
    """
    check_positive(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    rows = pieces(bridge, corpus, length)
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    affines = [_identity(d_model, bridge.device) for _ in range(n_layers)]
    parameters = [parameter for affine in affines for parameter in affine]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = torch.empty(steps, n_layers)
    for step, batch in enumerate(drawn(rows, size=batch_size, count=steps, seed=seed)):
        losses[step] = _gradients(bridge, padded(batch), affines)
        optimizer.step()
        schedule.step()
        progress("tuned lens", step + 1, steps)
    weight, bias = (torch.stack(parts).detach().cpu() for parts in zip(*affines, strict=True))
    return TunedLens(weight, bias, losses, bridge.cfg.model_name or bridge.cfg.architecture)


def _identity(d_model: int, device: torch.device) -> Affine:
    weight = torch.zeros(d_model, d_model, device=device, requires_grad=True)
    return weight, torch.zeros(d_model, device=device, requires_grad=True)


def _gradients(bridge: TransformerBridge, batch: Batch, affines: list[Affine]) -> Float[Tensor, "depth"]:
    """Puts one batch's gradients on the translators, and returns its losses. One depth's graph exists at a time."""
    streams, final = real_streams(bridge, batch, stream_names(bridge.cfg.n_layers)[:-1])
    losses = []
    for stream, affine in zip(streams, affines, strict=True):
        with torch.enable_grad():
            loss = kl_divergence(final, read(bridge, translated(stream, *affine))).mean()
        # Not `loss.backward()`, which would give the model's parameters gradients too.
        for parameter, gradient in zip(affine, torch.autograd.grad(loss, affine), strict=True):
            parameter.grad = gradient
        losses.append(loss.detach())
    return torch.stack(losses).cpu()
