"""GPT-NeoXT-Chat-Base's card, in 8 bits."""

from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("togethercomputer/GPT-NeoXT-Chat-Base-20B")
model = AutoModelForCausalLM.from_pretrained(
    "togethercomputer/GPT-NeoXT-Chat-Base-20B", device_map="auto", load_in_8bit=True
)
inputs = tokenizer("<human>: Hello!\n<bot>:", return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=10, do_sample=True, temperature=0.8)
output_str = tokenizer.decode(outputs[0])
assert output_str.startswith("<human>: Hello!\n<bot>:")
print(outputs.shape[1] - inputs.input_ids.shape[1], model.base_model.layers[0].mlp.dense_h_to_4h.format.name)
