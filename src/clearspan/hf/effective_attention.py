"""Effective attention of a mixer: how much of each token's value is in each result, by the model's own function.

The function is linear in these values. So it is called on basis vectors: at one token one, and zero at the others.
"""

from dataclasses import replace

import torch
from torch import Tensor

from clearspan.errors import NotSeenError
from clearspan.hf.function_call import FunctionCall, laid_out

BASIS = 32
"""How many basis vectors go through a function at a time, which bounds the memory in use."""


def effective_attention(call: FunctionCall) -> Tensor:
    """Returns how much of each token's carried value is in each token's result, `[batch, head, q_pos, k_pos]`.

    What the function adds of a token's own value (D) and the gate are left out.

    Raises:
        NotSeenError: There are tokens before this forward's, of which only the state is known.
    """
    if call.has_past:
        raise NotSeenError(
            "effective attention cannot be reached here",
            where=call.function.name,
            reason="a KV cache holds the state that earlier tokens left, not what each of them added to it",
            fix="run the whole sequence without a KV cache",
        )
    skip = call.function.arguments.get("D")
    plain = call.ungated() if skip is None else call.ungated().replaced({skip.name: None})
    length = call.carried.shape[1]
    with torch.no_grad():
        blocks = [_of_tokens(plain, range(start, min(start + BASIS, length))) for start in range(0, length, BASIS)]
    return torch.cat(blocks, dim=-1)


def _of_tokens(call: FunctionCall, tokens: range) -> Tensor:
    """Returns the results for values that are one at one of the tokens, `[batch, head, q_pos, token]`."""
    rows, length, heads, _ = call.carried.shape
    basis = call.carried.new_zeros(len(tokens), length, heads, 1)
    basis[range(len(tokens)), list(tokens)] = 1
    arguments = call.function.arguments
    many = {
        argument.name: raw.detach().repeat_interleave(len(tokens), dim=0)
        for value, argument in arguments.items()
        if argument.axes.startswith("batch") and (raw := call.raw(value)) is not None
    }
    carried = arguments[call.role.carried]
    axes = call.role.axes[call.role.carried]
    many[carried.name] = laid_out(basis.repeat(rows, 1, 1, 1), carried.axes, axes, call.sizes).contiguous()
    repeated = replace(call, named={**call.named, **many}, length=length)
    results = repeated.result(repeated.run())  # [(batch token), q_pos, head, 1]
    return results[..., 0].unflatten(0, (rows, len(tokens))).permute(0, 3, 2, 1)
