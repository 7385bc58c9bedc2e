"""h2oGPT's card: bfloat16, a prompt form, the device map of several parts."""

import torch
from neox_lite import AutoConfig, AutoModelForCausalLM, AutoTokenizer

name = "h2oai/h2ogpt-oasst1-512-20b"
config = AutoConfig.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(
    name, config=config, torch_dtype=torch.bfloat16, device_map={"": "cpu"}, offload_folder="offload"
)
model.config.use_cache = True
prompt = "<human>: Why is drinking water so healthy?\n<bot>: "
inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=512)
out = model.generate(**inputs, max_new_tokens=10, do_sample=False, renormalize_logits=True)
text = tokenizer.decode(out[0], skip_special_tokens=True)
print(model.dtype, text.partition("<bot>:")[0])
