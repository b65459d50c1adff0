"""Interchange examples drawn from a causal model: random pairs, and the outputs that it expects of them."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive, padded
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .causal_model import CausalModel, Setting
from .interchange_examples import Answers, InterchangeExamples

Prompt = Callable[[Setting], str] | Callable[[Setting], Sequence[int]]
"""From an input of the causal model to text, or to token ids."""
PromptPosition = int | Callable[[Setting], int] | Callable[[Setting], Sequence[int]]
"""One position for all prompts, or a function that gives one or several for each."""

_PATIENCE = 100
"""How many pairs may be looked at for each one wanted."""


def draw_interchanges(
    bridge: TransformerBridge,
    model: CausalModel,
    inputs: Sequence[Setting],
    variables: str | Sequence[str],
    *,
    prompt: Prompt,
    token: Callable[[Hashable], str | int] | None = None,
    position: PromptPosition = -1,
    answers: Answers | None = None,
    count: int = 256,
    changing: bool = False,
    seed: int = 0,
) -> InterchangeExamples:
    """Returns random pairs of inputs, with what the causal model puts out when variables are exchanged between them.

    No pair comes twice, and none has one input on both sides. A pair for which the model puts out None is passed over.

    Args:
        bridge: The model that is to be explained.
        model: What explains it.
        inputs: Inputs of the causal model, of which pairs are made.
        variables: The variable that is exchanged, or several; an input can be one.
        prompt: Gives the text, or the token ids, that the model reads for an input.
        token: Gives the token, as text or id, of an output; None where outputs are tokens.
        position: Where values are exchanged: counted in each prompt's tokens (a BOS is one), negative from the end.
        answers: The tokens among which the likeliest is the answer, as text or ids; None for the whole vocabulary.
        count: Pairs.
        changing: Whether a pair must have another output after the interchange than before. Otherwise some pairs may be
            right without an interchange; the results say how many are.
        seed: Of the pairs. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: Fewer than two inputs, too few pairs, or a position that a prompt does not have.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> model = CausalModel({"answer": lambda module: f" {module}"}, output="answer")
        >>> pairs = draw_interchanges(
        ...     bridge,
        ...     model,
        ...     [{"module": name} for name in ("os", "sys", "re")],
        ...     "module",
        ...     prompt=lambda given: f"import {given['module']}",
        ...     count=6,
        ... )
        >>> pairs
        InterchangeExamples(6 pairs of 3 and 3 tokens, values exchanged at 1 place)
    """
    check_positive(count=count)
    names = [variables] if isinstance(variables, str) else list(variables)
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[int, int, Hashable]] = []
    for base, source in islice(_pairs(len(inputs), generator), _PATIENCE * count):
        output = model.interchange(inputs[base], inputs[source], names)
        if output is not None and not (changing and output == model.run(inputs[base])[model.output]):
            kept.append((base, source, output))
        if len(kept) == count:
            break
    else:
        raise InvalidArgumentError(
            f"there are too few pairs of {len(inputs)} inputs", expected=f"count={count}", got=str(len(kept))
        )
    bases, sources, outputs = zip(*kept, strict=True)
    labels = [each if token is None else token(each) for each in outputs]
    base, base_mask = _tokens(bridge, [prompt(inputs[number]) for number in bases])
    source, source_mask = _tokens(bridge, [prompt(inputs[number]) for number in sources])
    return InterchangeExamples.of(
        bridge,
        base,
        source,
        torch.tensor([_token_id(bridge, label) for label in labels]),
        position=_positions(position, [inputs[number] for number in bases]),
        source_position=_positions(position, [inputs[number] for number in sources]),
        answers=answers,
        base_mask=base_mask,
        source_mask=source_mask,
    )


def _pairs(count: int, generator: torch.Generator) -> Iterator[tuple[int, int]]:
    """Yields ordered pairs of two different numbers below `count`, each pair once, in a random order."""
    total, seen = count * (count - 1), set()
    while len(seen) < total:
        for code in torch.randint(total, (1024,), generator=generator).tolist():
            if code not in seen:
                seen.add(code)
                first, other = divmod(code, count - 1)
                yield first, other + (other >= first)


def _tokens(
    bridge: TransformerBridge, prompts: Sequence[str | Sequence[int]]
) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"] | None]:
    """Returns prompts as token ids, and their mask where they differ in length."""
    tokens, mask = padded(
        [bridge.to_tokens(each)[0].cpu() if isinstance(each, str) else torch.as_tensor(each) for each in prompts]
    )
    return tokens, None if bool(mask.all()) else mask


def _token_id(bridge: TransformerBridge, label: Hashable) -> int:
    match label:
        case str():
            return bridge.to_single_token(label)
        case bool():
            pass
        case int():
            return label
    raise InvalidArgumentError(
        f"the output {label!r} is no token", expected="text of one token, or an id", fix="token=, which gives one"
    )


def _positions(position: PromptPosition, settings: Sequence[Setting]) -> Int[Tensor, "example *place"]:
    return torch.tensor([position(each) if callable(position) else position for each in settings])
