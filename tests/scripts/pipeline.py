"""A pipeline by task and id, then one around a loaded model, as tutorials have them."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer, pipeline

pipe = pipeline(task="text-generation", model="EleutherAI/gpt-neox-20b", dtype=torch.float32, device=-1)
print(pipe("Plants create energy through", max_new_tokens=8, do_sample=False))

model = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m-deduped")
tokenizer = AutoTokenizer.from_pretrained("EleutherAI/pythia-70m-deduped")
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
outputs = generator(["one", "two, three"], max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
for output in outputs:
    print(output[0]["generated_text"])
