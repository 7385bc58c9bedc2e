"""Open Assistant's form of a prompt, with the options that its notebooks pass."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer, set_seed

set_seed(42)
name = "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5"
tokenizer = AutoTokenizer.from_pretrained(name, token=None)
model = AutoModelForCausalLM.from_pretrained(name, low_cpu_mem_usage=True, use_safetensors=True)
model.eval()
message = "<|prompter|>What is a meme?<|endoftext|><|assistant|>"
inputs = tokenizer(message, return_tensors="pt").to(model.device)
with torch.inference_mode():
    tokens = model.generate(
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        use_cache=True,
    )
print(repr(tokenizer.decode(tokens[0][inputs["input_ids"].shape[-1] :], skip_special_tokens=True)))
