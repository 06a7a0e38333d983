"""What becomes of each field of Hugging Face's config.json, generation_config.json and
tokenizer_config.json when a folder is read, converted or merged.

docs/files.md has the same table, and a test compares the two.
"""

# Keys of config.json -> fields of ModelArgs.  The width of SwiGLU goes into multiple_of at first;
# huggingface.args_with_hidden_dim replaces it.
SIZES = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "vocab_size": "vocab_size",
    "intermediate_size": "multiple_of", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
    "max_position_embeddings": "max_seq_len"}
FRACTIONS = ("rms_norm_eps", "rope_theta")           # the sizes that need not be whole numbers
DEFAULTS = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 2048}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Keys that can describe another kind of model -> the values that this model accepts, besides null.
FEATURES = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,), "sliding_window": (), "quantization_config": (),
    "partial_rotary_factor": (1,), "rope_interleaved": (False,),
    "tie_word_embeddings": (False, True), "dtype": DTYPES, "torch_dtype": DTYPES}

USED = "used"              # read or checked here; what is written says it again, of the new model
CARRIED = "carried"        # not used here, and copied as it is
LOST = "lost"              # not copied; the converter names it

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FIELDS = {
    CONFIG: {
        **dict.fromkeys(SIZES, USED),
        **dict.fromkeys(FEATURES, USED),
        "head_dim": USED, "rope_scaling": USED, "rope_parameters": USED,
        "architectures": USED, "eos_token_id": USED,
        "bos_token_id": CARRIED, "pad_token_id": CARRIED,
        "attention_dropout": CARRIED, "initializer_range": CARRIED, "pretraining_tp": CARRIED,
        "use_cache": CARRIED, "transformers_version": CARRIED, "_name_or_path": CARRIED,
        # It names Python files of the folder, and no code is copied.
        "auto_map": LOST},
    GENERATION_CONFIG: {
        "eos_token_id": USED,
        "bos_token_id": CARRIED, "pad_token_id": CARRIED, "do_sample": CARRIED,
        "temperature": CARRIED, "top_k": CARRIED, "top_p": CARRIED, "repetition_penalty": CARRIED,
        "max_length": CARRIED, "max_new_tokens": CARRIED, "transformers_version": CARRIED,
        "_from_model_config": CARRIED},
    TOKENIZER_CONFIG: {
        "tokenizer_class": CARRIED, "bos_token": CARRIED, "eos_token": CARRIED,
        "unk_token": CARRIED, "pad_token": CARRIED, "additional_special_tokens": CARRIED,
        "extra_special_tokens": CARRIED, "added_tokens_decoder": CARRIED,
        "chat_template": CARRIED, "add_bos_token": CARRIED, "add_eos_token": CARRIED,
        "add_prefix_space": CARRIED, "legacy": CARRIED, "sp_model_kwargs": CARRIED,
        "spaces_between_special_tokens": CARRIED, "clean_up_tokenization_spaces": CARRIED,
        "use_default_system_prompt": CARRIED, "model_max_length": CARRIED,
        "padding_side": CARRIED, "truncation_side": CARRIED, "model_input_names": CARRIED,
        "auto_map": LOST},
}
# A field that is not listed is carried: LLaMA's code in transformers gives it no meaning.
OTHER_FIELDS = CARRIED


def fate(file: str, field: str) -> str:
    """Return what becomes of a field of one of the three files: USED, CARRIED or LOST."""
    return FIELDS[file].get(field, OTHER_FIELDS)
