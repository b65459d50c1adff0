"""Why a name differs from TransformerLens 4.3.0's, as data: one entry for each kind of difference."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """Why lines differ whose model, weights, text and difference match the pattern `of`."""

    of: str
    text: str


EXPLANATIONS = (
    Explanation(
        r"signature: bridge\.forward",
        "`labels` and other modalities' values are keywords of the model's own forward; what comes after "
        "`attention_mask` is given by keyword.",
    ),
    Explanation(
        r"signature: bridge\.run_with_cache",
        "`names_filter` is the first argument after the input; the cache is always an `ActivationCache`.",
    ),
    Explanation(r"signature: bridge\.run_with_hooks", "`remove_batch_dim` is of `run_with_cache` alone."),
    Explanation(r"signature: bridge\.add_hook", "The function's keyword is `hook`, as in `HookedTransformer`."),
    Explanation(
        r"signature: bridge\.reset_hooks", "There are no levels of hooks: `with bridge.hooks(...)` can be nested."
    ),
    Explanation(r"signature: bridge\.to_tokens", "`truncate` is False by default: see `to_tokens`."),
    Explanation(r"signature: bridge\.to_str_tokens", "Each text is taken by itself, so nothing is padded."),
    Explanation(r"signature: cache\.remove_batch_dim", "The cache knows how many rows its run had."),
    Explanation(
        r"resid_pre3",
        "`get_act_name('resid_pre3')` is the point of layer 3 here; there the digits stay in a name that no point has.",
    ),
    Explanation(r"name_seen", "`hook.name` is the name under which you asked; there it is the point's first name."),
    Explanation(
        r": len\(bridge.run_with_cache",
        "Each value is in the cache once; there it has an entry under each of its names.",
    ),
    Explanation(
        r"hook_resid_mid'.*differs",
        "A write to `hook_resid_mid` reaches the MLP and the residual stream; there it reaches the MLP alone.",
    ),
    Explanation(
        r"Llama.*hook_normalized', in_place=True.*differs",
        "An edit in place of an RMS norm's `hook_normalized` counts as one that is returned; there it is lost.",
    ),
    Explanation(
        r"stop_at_layer=3\)",
        "`stop_at_layer=n_layers` gives the last residual stream, as `HookedTransformer` does; there it gives logits.",
    ),
    Explanation(
        r"MissingWeightError here, None there",
        "A weight that the model lacks raises, with the reason; there it is None, or the attribute is missing.",
    ),
    Explanation(
        r"to_tokens\('5 ' \* 70",
        "Text longer than the context is not cut unless you ask: `truncate=True`, the default there.",
    ),
    Explanation(r"to_tokens\(''\)", "An empty text raises; there it is the BOS token alone."),
    Explanation(r"to_str_tokens\((\[5|tokens\))", "Also takes lists of ids and rows of ids, which raise there."),
    Explanation(
        r"to_str_tokens", "What each token adds to the text, so that the pieces join to it; there each token by itself."
    ),
    Explanation(
        r"FactoredMatrix\(R, L\)\.eigenvalues",
        "Eigenvalues that must be zero, since the inner size is larger than the matrix, are left out.",
    ),
    Explanation(
        r"patching.*every.*nan",
        "Where keys and values have fewer heads than queries, rows are filled up with NaN; there with zeros, which "
        "look like heads without an effect.",
    ),
    Explanation(
        r"mlp_input=True.*KeyError there",
        "`mlp_input=True` means nothing before the unembedding; there it raises KeyError.",
    ),
    Explanation(
        r"(layer=|results\()0.*incl_remainder=True.*differs",
        "With `layer=0` the remainder is the stream at layer 0; there it is the last stream.",
    ),
    Explanation(
        r"decompose_resid\(.*incl_embeds=False.*RuntimeError there",
        "A decomposition of nothing is an empty stack; there it raises.",
    ),
    Explanation(
        r"apply_ln_to_stack\([^~]*recompute_ln=True[^~]*differs",
        "`recompute_ln=True` gives each component a scale of its own at every layer; there only before the "
        "unembedding.",
    ),
    Explanation(
        r" raw: [^~]*(apply_ln=True|apply_ln_to_stack|logit_attrs)[^~]*differs",
        "On raw weights the norm's own weight is used, so that sums are the model's logits; there it is left out. On "
        "folded weights the two are equal.",
    ),
    Explanation(
        r"step: fold_value_biases=True: RuntimeError there",
        "Value biases are folded with fewer key/value heads too; there that raises where norms are not folded.",
    ),
    Explanation(
        r"GPTBigCode.*step: refactor_factored_attn_matrices=True: IndexError there",
        "Heads that share keys or values get one basis; there that raises.",
    ),
    Explanation(
        r"step: (center_writing_weights|refactor_factored_attn_matrices)=True: InexactProcessingError here",
        "A step that was asked for and is not exact on this model raises: centring under RMS norms, a basis of rotated "
        "queries. There it is left out.",
    ),
    Explanation(
        r"detect_heads.*error_measure='abs'.*differs by 0\.000",
        "Scores are not rounded; there those of `abs` have three decimals.",
    ),
    Explanation(
        r"FactoredMatrix\(A, B\)\[.*None.*\]: InvalidArgumentError here",
        "A new axis goes in front of the matrix's own two; there also behind them, which makes it a row or a column.",
    ),
    Explanation(
        r"FactoredMatrix\(A, B\)\[.*(\[1, 0\]|\[0, 1\]).*(\[1, 0\]|\[0, 1\])",
        "Several lists: those on the matrix's own axes pick rows of `A` and columns of `B`, whatever lists pick layers "
        "and heads; there they are paired in one factor and not in the other, or raise.",
    ),
)
