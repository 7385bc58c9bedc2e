"""RedPajama-INCITE's card: half precision, and the sequences out of what generate returns."""

import torch
import transformers
from neox_lite import AutoModelForCausalLM, AutoTokenizer

MIN_TRANSFORMERS_VERSION = "4.25.1"
assert transformers.__version__ >= MIN_TRANSFORMERS_VERSION, (
    f"Please upgrade transformers to {MIN_TRANSFORMERS_VERSION}"
)

tokenizer = AutoTokenizer.from_pretrained("togethercomputer/RedPajama-INCITE-Chat-3B-v1")
model = AutoModelForCausalLM.from_pretrained("togethercomputer/RedPajama-INCITE-Chat-3B-v1", torch_dtype=torch.float16)
prompt = "<human>: Who is Alan Turing?\n<bot>:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
input_length = inputs.input_ids.shape[1]
outputs = model.generate(
    **inputs, max_new_tokens=24, do_sample=True, temperature=0.7, top_p=0.7, top_k=50, return_dict_in_generate=True
)
token = outputs.sequences[0, input_length:]
output_str = tokenizer.decode(token)
print(type(output_str).__name__, outputs.sequences.dtype, 0 < len(token) <= 24)
