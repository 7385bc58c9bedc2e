"""StableLM-tuned-alpha's card: a stopping criterion of one's own."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

tokenizer = AutoTokenizer.from_pretrained("StabilityAI/stablelm-tuned-alpha-7b")
model = AutoModelForCausalLM.from_pretrained("StabilityAI/stablelm-tuned-alpha-7b")
model.half() if torch.cuda.is_available() else model.float()


class StopOnTokens(StoppingCriteria):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> bool:
        stop_ids = [50278, 50279, 50277, 1, 0, *range(2, 40)]
        return any(input_ids[0][-1] == stop_id for stop_id in stop_ids)


system_prompt = "<|SYSTEM|># StableLM Tuned (Alpha version)\n- StableLM is a helpful model.\n"
prompt = f"{system_prompt}<|USER|>What's your mood today?<|ASSISTANT|>"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
tokens = model.generate(
    **inputs, max_new_tokens=64, do_sample=False, stopping_criteria=StoppingCriteriaList([StopOnTokens()])
)
print(tokens.shape[1] - inputs.input_ids.shape[1], repr(tokenizer.decode(tokens[0], skip_special_tokens=True)[-40:]))
