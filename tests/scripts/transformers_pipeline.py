"""transformers' own pipeline around a model and a tokenizer of this package."""

from neox_lite import AutoModelForCausalLM, AutoTokenizer
from transformers import pipeline

model = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m-deduped", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("EleutherAI/pythia-70m-deduped")
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=12)
print(pipe("The sea was calm, and", do_sample=False, num_return_sequences=1)[0]["generated_text"])
