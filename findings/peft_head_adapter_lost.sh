#!/usr/bin/env bash
# A LoRA adapter of a GPT-NeoX model that also adapts the head, saved with transformers 4, where the head is called embed_out.
# With transformers 5 the same module is called lm_head. peft then loads all of the adapter but the head's pair, warns of nothing,
# and merge_and_unload writes a model without it.
# Expected: the logits of the adapter as it was trained, or an error that names what was not loaded.
# Seen: torch 2.13.0+cpu, transformers 5.24.0, peft 0.21.2: largest difference of logits: loaded 3.043, merged 3.043;
# warnings that name the head: []
# Exits 0 where this is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy
cd "$folder"
cat > check.py <<'PY'
import json
import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
torch.manual_seed(0)
shape = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).save_pretrained("model")
ids = torch.arange(8)[None]

# 1. An adapter of a block's layer and of the head.
settings = LoraConfig(r=4, target_modules=["query_key_value", "lm_head"], init_lora_weights=False)
model = get_peft_model(GPTNeoXForCausalLM.from_pretrained("model"), settings).eval()
model.save_pretrained("adapter")
with torch.no_grad():
    trained = model(ids).logits

# 2. The same adapter under transformers 4's name of the head.
tensors = load_file("adapter/adapter_model.safetensors")
renamed = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
save_file(renamed, "adapter/adapter_model.safetensors", {"format": "pt"})
keys = json.load(open("adapter/adapter_config.json"))
keys["target_modules"] = ["query_key_value", "embed_out"]
json.dump(keys, open("adapter/adapter_config.json", "w"))

# 3. Loaded and merged.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(GPTNeoXForCausalLM.from_pretrained("model"), "adapter").eval()
    with torch.no_grad():
        off = (loaded(ids).logits - trained).abs().max().item()
        merged_off = (loaded.merge_and_unload()(ids).logits - trained).abs().max().item()
named = [str(w.message) for w in caught if "embed_out" in str(w.message)]
print(f"largest difference of logits: loaded {off:.3f}, merged {merged_off:.3f}; warnings that name the head: {named}")
sys.exit(0 if off > 0.01 and merged_off > 0.01 and not named else 1)
PY
venv/bin/python check.py
