"""The page's example with another attention, in half precision."""

import torch
from neox_lite import AutoTokenizer, GPTNeoXForCausalLM

device = "cuda" if torch.cuda.is_available() else "cpu"
model = GPTNeoXForCausalLM.from_pretrained(
    "EleutherAI/gpt-neox-20b", torch_dtype=torch.float16, attn_implementation="sdpa"
).to(device)
tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neox-20b")
inputs = tokenizer("A sentence", return_tensors="pt").to(model.device)
print(model.dtype, model.config.model_type, model.generate(**inputs, max_new_tokens=3, do_sample=False).shape)
