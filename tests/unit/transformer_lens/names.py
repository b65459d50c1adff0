"""Public names of TransformerLens 4.3.0's bridge, hook points and config, besides those of torch's modules."""

BRIDGE = """
    OV OV_for_attn_layers QK QK_for_attn_layers W_E W_E_pos W_K W_O W_Q W_U W_V W_gate W_in W_out W_pos
    accumulated_bias adapter add_caching_hooks add_hook add_perma_hook all_composition_scores all_head_labels
    attn_head_labels b_K b_O b_Q b_U b_V b_in b_out block_hooks block_submodules blocks blocks_with boot_native
    boot_tl_legacy boot_transformers cache_all cache_some cfg check_hooks_to_add check_model_support clear_contexts
    clear_hook_registry close compatibility_mode composition_layer_indices context_level diffusion_generate embed
    enable_compatibility_mode encoder_output generate generate_stream get_caching_hooks get_hook_point get_params
    get_token_position hf_generate hook_aliases hook_dict hook_embed hook_points hook_pos_embed hook_unembed hooks
    init_weights input_to_embed layer_types list_hooks list_supported_models ln_final loss_fn mod_dict mps
    n_params_total original_model pos_embed predict_next_sentence prepare_multimodal_inputs process_weights
    processor real_components remove_all_hook_fns reset_hooks run_with_cache run_with_hooks set_use_attn_in
    set_use_attn_result set_use_hook_mlp_in set_use_split_qkv_input stack_params_for tl_named_parameters
    tl_parameters to_sentence_pair_tokens to_single_str_token to_single_token to_str_tokens to_string to_tokens
    tokenizer tokens_to_residual_directions training unembed
""".split()
HOOK_POINT = """
    add_hook add_perma_hook backward_scale bwd_hooks clear_context ctx enable_reshape fwd_hooks has_hooks
    hook_conversion layer name pos_dim remove_hooks training
""".split()
CONFIG = """
    NTK_by_parts_factor NTK_by_parts_high_freq_factor NTK_by_parts_low_freq_factor act_fn architecture attention_dir
    attn_implementation attn_only attn_scale attn_scores_soft_cap attn_types bos_token_id checkpoint_index
    checkpoint_label_type checkpoint_value d_head d_mlp d_model d_vocab d_vocab_out decoder_start_token_id
    default_padding_side default_prepend_bos device dtype eos_token_id eps experts_per_token final_rms
    from_checkpoint from_dict gated_mlp head_dim init_mode init_weights initializer_range is_audio_model
    is_multimodal is_stateful is_visual_model layer_norm_folding load_in_4bit mm_tokens_per_image model_name n_ctx
    n_devices n_heads n_key_value_heads n_layers n_params normalization_type num_experts original_architecture
    output_logits_soft_cap parallel_attn_mlp per_layer_head_dim per_layer_num_key_value_heads
    positional_embedding_type post_embedding_ln qk_norm_after_rope relative_attention_max_distance
    relative_attention_num_buckets rmsnorm_uses_offset rotary_adjacent_pairs rotary_base rotary_dim
    rotary_interleaved_cos_sin scale_attn_by_inverse_layer_idx scale_embedding seed split_attention_weights
    tie_word_embeddings to_dict tokenizer_appends_eos tokenizer_name tokenizer_prepends_bos trust_remote_code unwrap
    use_NTK_by_parts_rope use_attn_in use_attn_result use_attn_scale use_hook_mlp_in use_hook_tokens use_local_attn
    use_normalization_before_and_after use_qk_norm use_split_qkv_input uses_rms_norm vision_hidden_size
    vision_num_heads vision_num_layers window_size
""".split()
