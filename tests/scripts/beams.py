"""Beam search, which there is none of here."""

from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("EleutherAI/pythia-70m-deduped")
model = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m-deduped")
inputs = tokenizer("One two", return_tensors="pt")
print(model.generate(**inputs, num_beams=4, early_stopping=True))
