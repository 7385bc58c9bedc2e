"""An Auto class is asked for a model of another architecture."""

from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("someone/llama-model")
model = AutoModelForCausalLM.from_pretrained("someone/llama-model")
