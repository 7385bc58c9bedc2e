"""The usage example of transformers' GPT-NeoX page, as it stands there, greedy and sampled."""

from neox_lite import GPTNeoXForCausalLM, GPTNeoXTokenizerFast

model = GPTNeoXForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b")
tokenizer = GPTNeoXTokenizerFast.from_pretrained("EleutherAI/gpt-neox-20b")
prompt = "GPTNeoX20B is a 20B-parameter autoregressive Transformer model developed by EleutherAI."
input_ids = tokenizer(prompt, return_tensors="pt").input_ids
gen_tokens = model.generate(input_ids, do_sample=False, max_length=100)
gen_text = tokenizer.batch_decode(gen_tokens)[0]
print(repr(gen_text))
gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
gen_text = tokenizer.batch_decode(gen_tokens)[0]
assert gen_text.startswith(prompt) and gen_tokens.shape[1] <= 100
