"""bitsandbytes' settings, as the quantization pages have them."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=False,
    bnb_4bit_compute_dtype=torch.float16,
)
model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b", quantization_config=bnb_config)
tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neox-20b")
ids = tokenizer.encode("Hello", return_tensors="pt")
print(model.get_memory_footprint() > 0, model.generate(ids, max_new_tokens=4, do_sample=False).shape)
