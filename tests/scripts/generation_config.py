"""The options of generate as an object, by itself and as the model's own defaults."""

from neox_lite import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("EleutherAI/pythia-70m-deduped")
model = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m-deduped")
inputs = tokenizer("One two", return_tensors="pt")
generation_config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=model.config.eos_token_id)
print(tokenizer.batch_decode(model.generate(**inputs, generation_config=generation_config)))
model.generation_config.max_new_tokens = 3
model.generation_config.pad_token_id = tokenizer.eos_token_id
print(model.generate(**inputs, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
