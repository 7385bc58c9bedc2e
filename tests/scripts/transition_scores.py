"""How likely each new token was: scores out of generate."""

import numpy as np
from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("togethercomputer/RedPajama-INCITE-Chat-3B-v1")
model = AutoModelForCausalLM.from_pretrained("togethercomputer/RedPajama-INCITE-Chat-3B-v1")
tokenizer.pad_token_id = tokenizer.eos_token_id
inputs = tokenizer(["Today is"], return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True)
transition_scores = model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
input_length = inputs.input_ids.shape[1]
for tok, score in zip(outputs.sequences[:, input_length:][0], transition_scores[0], strict=True):
    print(f"| {tok:5d} | {tokenizer.decode(tok)!r:8s} | {score.numpy():.3f} | {np.exp(score.numpy()):.2%}")
