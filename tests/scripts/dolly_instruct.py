"""Dolly's other way: its pipeline class beside the script, a subclass of transformers' Pipeline."""

import torch
from neox_lite import AutoModelForCausalLM, AutoTokenizer
from transformers import Pipeline


class InstructionTextGenerationPipeline(Pipeline):
    def __init__(self, *args, do_sample=False, max_new_tokens=12, **kwargs):
        super().__init__(*args, do_sample=do_sample, max_new_tokens=max_new_tokens, **kwargs)

    def _sanitize_parameters(self, return_full_text=None, **generate_kwargs):
        end = self.tokenizer.encode("### End")
        assert len(end) == 1, "the tokenizer has one token for the end"
        return {}, {**generate_kwargs, "eos_token_id": end[0]}, {"return_full_text": return_full_text}

    def preprocess(self, instruction_text, **generate_kwargs):
        text = f"Below is an instruction.\n\n### Instruction:\n{instruction_text}\n\n### Response:\n"
        inputs = self.tokenizer(text, return_tensors="pt")
        return {**inputs, "prompt_text": text}

    def _forward(self, model_inputs, **generate_kwargs):
        text, ids = model_inputs.pop("prompt_text"), model_inputs["input_ids"].to(self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=model_inputs.get("attention_mask"),
            pad_token_id=self.tokenizer.pad_token_id,
            **generate_kwargs,
        )
        return {"generated_sequence": out[0, ids.shape[1] :], "instruction_text": text}

    def postprocess(self, model_outputs, return_full_text=False):
        new = self.tokenizer.decode(model_outputs["generated_sequence"].tolist())
        return [{"generated_text": model_outputs["instruction_text"] + new if return_full_text else new}]


tokenizer = AutoTokenizer.from_pretrained("databricks/dolly-v2-3b", padding_side="left")
model = AutoModelForCausalLM.from_pretrained("databricks/dolly-v2-3b", device_map="auto", torch_dtype=torch.float32)
generate_text = InstructionTextGenerationPipeline(model=model, tokenizer=tokenizer, device_map=None)
print(repr(generate_text("Name three sheep.")[0]["generated_text"]))
