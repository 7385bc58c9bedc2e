#!/usr/bin/env bash
# "return_dict": false in config.json, or model.config.return_dict = False, asks transformers' models for tuples. The bare model
# gives them. Every model with a head calls the bare model, gets a tuple where it reads .last_hidden_state, and raises.
# Expected: a tuple, as return_dict=False in the call gives.
# Seen: torch 2.13.0+cpu, transformers 5.24.0: AttributeError: 'tuple' object has no attribute 'last_hidden_state', of both classes.
# Exits 0 where this is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
cat > check.py <<'PY'
import sys

import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
shape = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
ids = torch.arange(8)[None]
raised = []
for config, cls in ((GPTNeoXConfig, GPTNeoXForCausalLM), (LlamaConfig, LlamaForCausalLM)):
    model = cls(config(**shape)).eval()
    print(f"{cls.__name__}, return_dict=False in the call: {type(model(ids, return_dict=False)).__name__}")
    model.config.return_dict = False
    print(f"{cls.__name__}, bare model, in the config: {type(model.base_model(ids)).__name__}")
    try:
        print(f"{cls.__name__}, in the config: {type(model(ids)).__name__}")
    except AttributeError as error:
        print(f"{cls.__name__}, in the config: AttributeError: {error}")
        raised.append(cls)
sys.exit(0 if len(raised) == 2 else 1)
PY
venv/bin/python check.py
