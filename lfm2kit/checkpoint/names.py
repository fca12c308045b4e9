"""The names of a checkpoint's files, and of the two tensors that may be one."""

CONFIG, SPECS, SPEC_SUFFIX = "config.json", "model.toml", ".toml"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_BIN = "model.bin"
WEIGHTS = (SINGLE, INDEX, MODEL_BIN)  # what is looked for in a folder, in this order
INPUTS = "inputs.bin"

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
