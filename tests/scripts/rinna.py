"""rinna's card: a sentencepiece tokenizer."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("rinna/japanese-gpt-neox-3.6b", use_fast=False)
model = AutoModelForCausalLM.from_pretrained("rinna/japanese-gpt-neox-3.6b")
if torch.cuda.is_available():
    model = model.to("cuda")
token_ids = tokenizer.encode("西田幾多郎は、", add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    output_ids = model.generate(token_ids.to(model.device), max_new_tokens=10, do_sample=True)
print(tokenizer.decode(output_ids.tolist()[0]))
