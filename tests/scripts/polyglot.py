"""Polyglot-Ko, in a batch padded on the left, with words that must not come and a limit of time."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("EleutherAI/polyglot-ko-1.3b", padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained("EleutherAI/polyglot-ko-1.3b")
inputs = tokenizer(["안녕", "한국어 모델"], return_tensors="pt", padding=True, return_token_type_ids=False)
bad_words_ids = tokenizer(["e", "th"], add_special_tokens=False).input_ids
with torch.no_grad():
    output = model.generate(
        **inputs,
        max_new_tokens=10,
        do_sample=False,
        bad_words_ids=bad_words_ids,
        suppress_tokens=[5, 6],
        max_time=60.0,
        pad_token_id=tokenizer.pad_token_id,
    )
for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print(repr(text))
