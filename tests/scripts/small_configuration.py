"""The same for a model that fits, and its Auto form."""

from neox_lite import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXModel

configuration = GPTNeoXConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
)
model = GPTNeoXModel(configuration)
configuration = model.config
language_model = AutoModelForCausalLM.from_config(configuration)
print(configuration.hidden_size, model.num_parameters(), language_model.can_generate(), model.can_generate())
