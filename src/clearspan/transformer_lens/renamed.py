"""Names of TransformerLens that are others here, or are not there, each with what to use; and a few of other libraries.

Those of nnsight, nnterp and pyvene are what a newcomer tries first.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn

from clearspan.errors import RenamedError, RenamedImportError

Hook = Callable[..., Any]

_LETTERS = "the weights by letter, such as bridge.W_Q and bridge.blocks[0].attn.W_Q"
_HF = "bridge.hf_model, the Hugging Face model itself"
OF_BRIDGE = {
    "enable_compatibility_mode": "bridge.processed(), which returns a new bridge",
    "process_weights": "bridge.processed(...), which takes the same steps and returns a new bridge",
    "state_dict": "bridge.hf_model.state_dict(), under Hugging Face's names; or " + _LETTERS,
    "load_state_dict": "bridge.hf_model.load_state_dict(...), under Hugging Face's names",
    **dict.fromkeys(("get_params", "tl_parameters", "tl_named_parameters"), _LETTERS),
    "fold_layer_norm": "bridge.processed(fold_ln=True), which returns a new bridge",
    **{
        name: f"bridge.processed({name}=True), which returns a new bridge"
        for name in (
            *("center_writing_weights", "center_unembed", "fold_value_biases"),
            "refactor_factored_attn_matrices",
        )
    },
    "set_ungroup_grouped_query_attention": "bridge.expand_kv_heads(value)",
    "all_composition_scores": "bridge.composition_scores(mode)",
    "hf_generate": "bridge.generate(...), which is Hugging Face's",
    **dict.fromkeys(("cache_all", "cache_some"), "bridge.add_caching_hooks(...) or bridge.run_with_cache(...)"),
    "hook_aliases": "bridge.hook_dict[name].aliases",
    "hook_unembed": "bridge.hook_logits",
    "context_level": "with bridge.hooks(...), which takes its own hooks off",
    "clear_hook_registry": "bridge.reset_hooks(); hook points stay as long as the bridge",
    "init_weights": "a model that you initialise before clearspan.boot(model)",
    "processor": "transformers.AutoProcessor.from_pretrained(...)",
    "to_sentence_pair_tokens": "bridge.tokenizer(first, second)",
    "real_components": "bridge.components",
    **dict.fromkeys(
        ("diffusion_generate", "encoder_output", "predict_next_sentence", "prepare_multimodal_inputs"), _HF
    ),
}
"""Names of TransformerLens's bridge that are not here, each with what to use."""
_TRACE = (
    "bridge.run_with_cache(...) to read and bridge.run_with_hooks(...) to write, with functions in place of a trace"
)
OF_BRIDGE |= {
    **dict.fromkeys(("trace", "invoke", "scan", "session"), _TRACE),
    "edit": "with bridge.hooks(fwd_hooks=[...]), or bridge.add_hook(...)",
    **dict.fromkeys(("model", "_model"), _HF),
    **dict.fromkeys(
        ("layers", "layers_input", "layers_output"), "bridge.blocks, and the points hook_resid_pre and _post"
    ),
    **dict.fromkeys(
        ("attentions", "mlps"), "bridge.blocks[layer].attn and .mlp, and the points hook_attn_out and _mlp_out"
    ),
    "lm_head": "bridge.unembed; bridge.ln_final is the norm before it",
    "transformer": "bridge.blocks; bridge.hf_model has the model's own modules",
    "project_on_vocab": "bridge.read_out(residual)",
    "steer": "clearspan.analysis.SteeringVector",
    "config": "bridge.cfg, or bridge.hf_model.config for Hugging Face's",
    "logits": "bridge(tokens), or the point hook_logits",
    **dict.fromkeys(("save", "save_pretrained"), "bridge.hf_model.save_pretrained(folder)"),
}
_SEEN = "bridge.points(name), which lists a point's axes and place"
OF_HOOK_POINT = {
    "backward_scale": "a backward hook that returns the gradient times the factor",
    **dict.fromkeys(("enable_reshape", "hook_conversion"), "values come in canonical axes: " + _SEEN),
    "pos_dim": "point.axes.index('pos')",
}
OF_CONFIG = {
    **dict.fromkeys(("from_dict", "unwrap"), "clearspan.boot(model), which reads the sizes from the model"),
    "attn_implementation": "bridge.hf_model.config._attn_implementation",
    "default_padding_side": "bridge.tokenizer.padding_side",
    **dict.fromkeys(("tokenizer_appends_eos", "tokenizer_prepends_bos"), "bridge.to_tokens(text), which adds one BOS"),
    "layer_norm_folding": "bridge.processing, which says what was done to the weights",
    "parallel_attn_mlp": "bridge.blocks[0].is_parallel",
    "n_devices": "bridge.hf_model.hf_device_map",
    "original_architecture": "bridge.cfg.architecture",
    "use_hook_tokens": "embed.hook_in, which shows the tokens",
}
"""Names of TransformerLens's config that no entry of Hugging Face's has."""
BOOT = "clearspan.boot(model), of a hub id, a folder, or a loaded model"
_OF_LIBRARY = {
    **dict.fromkeys(("HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"), BOOT),
    **dict.fromkeys(("HookedTransformerConfig", "TransformerBridgeConfig"), f"bridge.cfg of {BOOT}"),
    "HookedSAETransformer": "clearspan.boot(model), whose saes(...) and run_with_saes(...) are its",
    "HookedRootModule": BOOT,
    "supported_models": "clearspan.architectures, and the list in the README",
    "lit": "the command clearspan report, and .plot() of results",
    "SVDInterpreter": "clearspan.analysis.singular_readings",
    **dict.fromkeys(("hook_points", "model_bridge"), "clearspan.HookPoint and clearspan.TransformerBridge"),
    **dict.fromkeys(("utils", "utilities"), "clearspan.get_act_name, clearspan.analysis and clearspan.weights"),
    **dict.fromkeys(("evals", "head_detector", "tools", "train"), "clearspan.analysis"),
    **dict.fromkeys(
        ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache"),
        "transformers.DynamicCache, past_key_values=",
    ),
}
_OF_LIBRARY |= {
    **dict.fromkeys(("LanguageModel", "NNsight", "StandardizedTransformer", "IntervenableModel"), BOOT),
    **dict.fromkeys(("from_pretrained", "boot_transformers", "load", "load_model"), BOOT),
    **dict.fromkeys(("IntervenableConfig", "RepresentationConfig"), "clearspan.Intervention(point, action, layer=...)"),
}
FORWARD_KEYWORDS = {
    "return_cache_object": "dict(cache): the cache is a mapping from names to tensors",
    "reset_hooks_end": "bridge.reset_hooks(), or with bridge.hooks(...)",
    "clear_contexts": "bridge.clear_contexts()",
    "remove_batch_dim": "bridge.run_with_cache(..., remove_batch_dim=True), or value[0] in the hook function",
    "decoder_input": _HF,
    "shortformer_pos_embed": _HF,
}
"""Keywords of TransformerLens's runs that are not here, each with what to do instead."""
_OF_MODULE = {name for name in dir(nn.Module) if not name.startswith("_")} | {
    "T_destination",
    "dump_patches",
    "training",
}


def missing(one: object, name: str, what: str, fixes: Mapping[str, str], of_module: str) -> Any:
    """Raises for an attribute that `one` lacks: with what to use, where TransformerLens has it."""
    fix = fixes.get(name) or (of_module if name in _OF_MODULE else None)
    if fix is not None:
        raise RenamedError(f"{what} has no {name!r}", fix=fix)
    return object.__getattribute__(one, name)  # raises, also what a property raised that led here


def missing_from_library(name: str) -> None:
    """Raises for a name of TransformerLens's that `clearspan` is asked for; does nothing for any other name.

    An AttributeError would not be shown by `from clearspan import ...`.
    """
    if name in _OF_LIBRARY:
        raise RenamedImportError(f"clearspan has no {name!r}", fix=_OF_LIBRARY[name])


class Renamed:
    """A name of a class that raises, and says what to use.

    Args:
        fix: What.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, one: object, owner: type) -> NoReturn:
        raise RenamedError(f"clearspan.{owner.__name__} has no {self._name!r}", fix=self._fix)
