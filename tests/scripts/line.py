"""LINE's card: tied embeddings, several samples of one prompt."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

model = AutoModelForCausalLM.from_pretrained("line-corporation/japanese-large-lm-3.6b", torch_dtype=torch.float16)
tokenizer = AutoTokenizer.from_pretrained("line-corporation/japanese-large-lm-3.6b", use_fast=False)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device=-1)
set_seed(101)
text = generator(
    "おはようございます、今日の天気は",
    max_length=60,
    do_sample=True,
    pad_token_id=tokenizer.pad_token_id,
    num_return_sequences=3,
)
print(len(text), all(t["generated_text"].startswith("おはよう") for t in text))
