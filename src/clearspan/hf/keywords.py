"""Keywords of Hugging Face's `generate`: those that a model takes."""

import inspect
from typing import Any


def generation_keywords(model: Any) -> set[str]:
    """Returns the keywords that a model's `generate` does something with: settings, and arguments of its forward.

    Args:
        model: A Hugging Face model that can generate.
    """
    from transformers.utils.generic import TransformersKwargs

    functions = (model.generate, model.prepare_inputs_for_generation, model.forward)
    named = {name for function in functions for name in inspect.signature(function).parameters}
    # These are taken out of the keywords by name, in code of `generate` that no signature shows.
    hidden = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    settings = vars(model.generation_config).keys()
    return {*named, *hidden, *settings, *TransformersKwargs.__optional_keys__} - {"self", "kwargs", "model_kwargs"}
